"""Checks the house rules on imports that no linter knows; run by the tests.

- imports go upward only in the order below, which is the flow of data
- no file imports both h5py and numba
- `kernels/cuda.py` and matplotlib are imported inside functions only
- `numba.cuda` is imported in one place
"""

import ast
import sys
from pathlib import Path

ORDER = """
errors faults forking files h5files threads slicing rows system drawing tracing memory h5layout untrusted
 labels imagetraps imagefiles sources arrayfiles h5text h5images folderimages images subset
kernels.jit kernels kernels.half kernels.checksum kernels.emitter kernels.simd kernels.naive kernels.pixels kernels.cpu kernels.peak
 kernels.warp kernels.cudadevice kernels.cudaloops kernels.cudapixels kernels.cuda
variations datasets preprocess filters patches layers network arrays manifest shards shardcheck storefolder store checkpoint
rowinput eigen moments incremental krylov randomized pcaplan pcasaved projection pca
 linear hessians newton rbf quasinewton few wide nystroem decisions selection ladder
 availability calibration svmchecks svmtraining svmsaved svm
 presets planning stages plan digests features progress runrecord pipeline model fitting adding evaluate
 convfeatures candidates search estimators demo
 warmup reproduce timing cnn baseline gpubench safetybench iobench pcabench svmbench rbfbench pipebench bench
 displays.base displays.fitted displays.runs displays.results displays recipe page report
 commandparts commands upkeep tryouts arguments cli __init__ __main__
""".split()


def module_name(path: Path, package: Path) -> str:
    """Name of a module inside the package; a folder's is the folder's."""
    name = ".".join(path.relative_to(package).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


def imported(tree: ast.AST) -> set[str]:
    """Full names of what a module imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def problems(package: Path) -> list[str]:
    """One line for each broken rule."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = module_name(path, package)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported(tree)
        if name not in ORDER:
            found.append(f"{name}: not in the list of modules; give it its place in the flow of data")
            continue
        for other in sorted(names):
            inner = other.removeprefix("streamcnn.")
            if other.startswith("streamcnn.") and inner in ORDER and ORDER.index(inner) >= ORDER.index(name):
                found.append(f"{name} imports {inner}, which comes after it")
        roots = {other.split(".")[0] for other in names}
        if {"h5py", "numba"} <= roots:
            found.append(f"{name} imports both h5py and numba")
        if name != "kernels.cudadevice" and any(n == "numba.cuda" or n.startswith("numba.cuda.") for n in names):
            found.append(f"{name} imports numba.cuda: take it from kernels.cudadevice")
        top = imported(ast.Module(tree.body, []) if isinstance(tree, ast.Module) else tree)
        direct = {n for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for n in imported(node)}
        for banned in ("matplotlib", "streamcnn.kernels.cuda"):
            if any(n == banned or n.startswith(banned + ".") for n in direct & top):
                found.append(f"{name} imports {banned} at its top: import it inside the function that needs it")
    return found


def main() -> int:
    """Print broken rules; the exit code says whether there are any."""
    lines = problems(Path(__file__).parent.parent / "streamcnn")
    sys.stdout.write("".join(f"{line}\n" for line in lines) or "imports: all well\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
