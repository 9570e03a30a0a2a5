"""Runs the measurements and writes their tables into the README and `docs/`; numbers there come from here only.

python tools/bench.py                    demo, convolution, extraction
STREAMCNN_DATA=... python tools/bench.py  those and Extended Yale B; with STREAMCNN_LARGE=big.h5 also a fit of that file under 1 GiB
python tools/bench.py conv                only this table, likewise demo, limits, io, yale, faces and large
python tools/bench.py million             LinearSVC with a million rows (a quarter of an hour), likewise scaling (10 million, 8 GB of disk)
STREAMCNN_DATA=... python tools/bench.py frontier   what `tools/frontier.csv` lacks (an hour), and its picture
STREAMCNN_DATA=... python tools/bench.py defaults   what the filters of `fast` give, against others
python tools/bench.py pca                 IncrementalPCA, by its first batches
STREAMCNN_DATA=... python tools/bench.py svm   and rbf, pipeline, patches: from `cifar10/train` and `cifar10/test` there, a folder a class
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import defaults
import frontier
import numpy as np

from streamcnn import bench, iobench, pcabench, pipebench, rbfbench, svmbench
from streamcnn.baseline import BASELINES, KEYS, merged
from streamcnn.reproduce import PAPER

# for preset lee2017 on Extended Yale B: little more than the smallest that will do
SMALL_LIMIT = "480MiB"
SEEDS = 10
ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> dict[str, Any]:
    """The JSON object of a streamcnn command, run in a fresh process."""
    command = [sys.executable, "-m", "streamcnn", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def mib(n_bytes: int) -> str:
    """Bytes as MiB."""
    return f"{n_bytes / 2**20:,.0f} MiB"


def demo_table() -> str:
    """What `streamcnn demo` measures."""
    r = run("demo")
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in r["stage_seconds"].items() if name != "evaluate")
    train = sum(seconds for name, seconds in r["stage_seconds"].items() if name != "evaluate")
    whole = r["compile_seconds"] + r["data_seconds"] + sum(r["stage_seconds"].values())
    rows = [
        ("data on disk", f"{mib(r['data_bytes'])}, {r['n_train'] + r['n_test']:,} images of 64 x 64"),
        ("memory limit", mib(r["memory_limit_bytes"])),
        ("peak resident memory of the process", f"{mib(r['peak_rss_bytes'])} ({mib(r['planned_peak_bytes'])} planned)"),
        ("accuracy on variants of digits never trained on", f"{100 * r['accuracy']:.2f} %"),
        ("training", f"{train:.1f} s ({stages})"),
        ("in all, with compiling kernels and making and testing the data", f"{whole:.0f} s"),
        ("disk for the time being", mib(r["data_bytes"] + r["store_bytes"])),
        ("machine", f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"),
    ]
    return "\n".join(["| `streamcnn demo` | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


# images, (height, width, channels)
DATA_SETS = [(1_000, (64, 64, 1)), (10_000, (96, 96, 3)), (100_000, (32, 32, 3))]


def smallest_limit(data: Path, preset: str, kernels: Path) -> int:
    """Bytes of the smallest limit that `streamcnn plan` allows, as its refusal of a far too small one names it.

    `kernels` is the folder that compiled kernels are looked for in: those that are not there are compiled by the run, which takes memory.
    """
    command = [sys.executable, "-m", "streamcnn", "plan", str(data), "--preset", preset, "--memory-limit", "1MiB"]
    refusal = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"NUMBA_CACHE_DIR": str(kernels)}).stderr
    return int(refusal.partition("at least ")[2].partition("MiB")[0]) << 20


def limits_table() -> str:
    """The smallest memory limits for images of some sizes, and what Python holds."""
    presets = ("fast", "faces", "patches")
    lines = [f"| smallest memory limit | {' | '.join(f'`{preset}`' for preset in presets)} |", "|---" * 4 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        compiled, none = Path(folder) / "compiled", Path(folder) / "none"
        subprocess.run([sys.executable, "-m", "streamcnn", "warmup"], check=True, env=os.environ | {"NUMBA_CACHE_DIR": str(compiled)})
        for rows, shape in DATA_SETS:
            path = Path(folder) / f"{rows}.npy"
            np.lib.format.open_memmap(path, "w+", np.uint8, (rows, *shape))  # never written: hardly a byte on disk
            np.save(path.with_name(f"{rows}_labels.npy"), np.arange(rows) % 10)
            limits = [smallest_limit(path, preset, compiled) for preset in presets]
            size = " x ".join(map(str, shape[:2])) + (" in colour" if shape[2] == 3 else "")
            lines.append(f"| {rows:,} images of {size} | {' | '.join(map(mib, limits))} |")
        held = run("plan", str(path), "--memory-limit", "64GiB")["already_in_use_bytes"]
        more = max(smallest_limit(path, preset, none) - limit for preset, limit in zip(presets, limits))
    notes = f"Python, Numba and scikit-learn alone hold {mib(held)}; a first run, which compiles kernels, needs up to {mib(more)} more"
    return "\n".join([*lines, "", f"{notes}; {os.cpu_count()} threads, {platform.system()}, Python {platform.python_version()}"])


def yale_table(folder: Path) -> str:
    """`streamcnn reproduce lee2017` with both baselines, and under a small limit, beside the paper's figures."""
    reproduce = ("reproduce", "lee2017", str(folder), "--memory-limit")
    r = run(*reproduce, "1GiB", "--seeds", str(SEEDS), "--baseline", *BASELINES)
    # a process for each seed: what the first leaves in memory would be too much for the second
    small = merged([run(*reproduce, SMALL_LIMIT, "--seed", str(seed)) for seed in range(SEEDS)], 0)
    systems = {"streamcnn, preset `lee2017`": r, f"streamcnn under {mib(small['memory_limit_bytes'])}": small}
    systems |= {f"{who}, PyTorch": r[KEYS[name]] for name, who in BASELINES.items()}
    subsets = list(r["accuracy"])
    columns = [f"Extended Yale B, {SEEDS} seeds", *(f"subset {s}, %" for s in subsets), "learning", "memory"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for who, result in systems.items():
        cells = [f"{100 * result['accuracy'][s]:.2f} ± {100 * result['accuracy_std'][s]:.2f}" for s in subsets]
        lines.append(f"| {who} | {' | '.join(cells)} | {result['train_seconds']:.1f} s | {mib(result['peak_rss_bytes'])} |")
    for who, (accuracy, seconds, kilobytes) in PAPER.items():
        cells = [f"{accuracy[s]:g}" if s in accuracy else "-" for s in subsets]
        lines.append(f"| {who} | {' | '.join(cells)} | {seconds:,} s | {mib(1024 * kilobytes)} |")
    lines += ["", f"{r['n_jobs']} threads; the limit of streamcnn is {mib(r['memory_limit_bytes'])}", ""]
    for name, who in BASELINES.items():
        rival = r[KEYS[name]]
        epochs = " to ".join(str(of(rival["epochs_per_seed"])) for of in (min, max))
        share = f"{100 / rival['times_as_long']:.1f} % of its learning time and {100 / rival['times_the_memory']:.0f} % of its memory"
        lines.append(f"- {who}: {epochs} epochs, the best after {rival['best_seconds']:.1f} s; streamcnn takes {share}")
    return "\n".join(lines)


def faces_table(folder: Path) -> str:
    """The presets on all five subsets of Extended Yale B."""
    lines = ["| Extended Yale B, 10 seeds | subset 2, % | subset 3, % | subset 4, % | subset 5, % | learning | memory |", "|---" * 7 + "|"]
    for preset in ("faces", "lee2017", "fast"):
        r = run("reproduce", "lee2017", str(folder), "--preset", preset, "--seeds", "10", "--memory-limit", "1GiB")
        cells = [f"{100 * r['accuracy'][s]:.2f} ± {100 * r['accuracy_std'][s]:.2f}" for s in ("2", "3", "4", "5")]
        lines.append(f"| preset `{preset}` | {' | '.join(cells)} | {r['train_seconds']:.1f} s | {mib(r['peak_rss_bytes'])} |")
    return "\n".join(lines)


def patches_table(train: str, test: str) -> str:
    """Preset `patches` on CIFAR-10, three seeds, under 2 GiB."""
    lines = ["| CIFAR-10, limit 2 GiB | test accuracy, % | training | memory | store on disk |", "|---" * 5 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            model, store = str(Path(folder) / "m.h5"), str(Path(folder) / f"store{seed}")
            where = ("--model", model, "--store", store, "--test", test)
            r = run("fit", train, *where, "--preset", "patches", "--memory-limit", "2GiB", "--seed", str(seed))
            shutil.rmtree(store)
            seconds = {name: took for name, took in r["stage_seconds"].items() if name != "evaluate"}
            stages = ", ".join(f"{name} {took:.0f}" for name, took in seconds.items())
            cells = [
                f"{100 * r['accuracy']:.2f}",
                f"{sum(seconds.values()):.0f} s ({stages})",
                mib(r["peak_rss_bytes"]),
                mib(r["store_bytes"]),
            ]
            lines.append(f"| preset `patches`, seed {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conv_table() -> str:
    """`streamcnn bench conv` here and held to AVX2."""
    native = run("bench", "conv")
    lines = [bench.conv_table(native["conv"]), "", machine(native), *(f"- {line}" for line in bench.conv_summary(native["conv"]))]
    if platform.machine().lower() in ("x86_64", "amd64"):
        older = run("bench", "conv", "--emulate", "avx2")["conv"]
        ratios = " / ".join("-" if row["ratio"] is None else f"{row['ratio']:.1f}" for row in older["rows"])
        lines.append(f"- held to AVX2 on both sides, the ratios are {ratios}")
    return "\n".join(lines)


def io_table() -> str:
    """`streamcnn bench io`."""
    result = run("bench", "io")
    return "\n".join([iobench.table(result["io"]), "", machine(result), *(f"- {line}" for line in iobench.summary(result["io"]))])


def bench_table(name: str, module: Any, *arguments: str) -> str:
    """`streamcnn bench NAME`, of which `module` makes a table."""
    result = run("bench", name, *arguments)
    return "\n".join([module.table(result[name]), "", machine(result).rstrip()])


def large_table(path: Path) -> str:
    """A fit of a file far larger than the limit: `tools/make_dataset.py` makes one of any size."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        model = str(Path(folder) / "m.h5")
        r = run("fit", str(path), "--model", model, "--store", str(Path(folder) / "store"), "--memory-limit", "1GiB")
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in r["stage_seconds"].items())
    rows = [
        ("data on disk", f"{mib(r['data_bytes'])}, {r['n_train']:,} images"),
        ("memory limit", mib(r["memory_limit_bytes"])),
        ("peak resident memory of the process", f"{mib(r['peak_rss_bytes'])} ({mib(r['planned_peak_bytes'])} planned)"),
        ("store on disk", mib(r["store_bytes"])),
        ("training", f"{r['seconds']:.0f} s ({stages})"),
    ]
    return "\n".join(["| `streamcnn fit --memory-limit 1GiB` | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def machine(result: dict[str, Any]) -> str:
    """What the figures were measured with."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number and name != "streamcnn")
    return f"{result['threads']} threads of {result['cpu']}; {versions}\n"


def pages() -> list[Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write(name: str, table: str) -> None:
    """Put a table between its markers, on every page that has them."""
    pattern, found = re.compile(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", re.DOTALL), False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if place := pattern.search(text):
            # pictures lie in docs/, beside its pages
            here = table if page.parent == ROOT else table.replace("](docs/", "](")
            page.write_text(f"{text[: place.start(1)]}{here}\n{text[place.end(1) :]}", encoding="utf-8")
            found = True
    if not found:
        raise SystemExit(f"neither README.md nor docs/*.md has markers for {name}")


def main(names: list[str]) -> None:
    """Measure the tables named, or everything there is data for."""
    folder = os.environ.get("STREAMCNN_DATA")
    tables: dict[str, Callable[[], str]] = {"demo": demo_table, "limits": limits_table, "conv": conv_table, "io": io_table}
    if large := os.environ.get("STREAMCNN_LARGE"):
        tables["large"] = lambda: large_table(Path(large))
    if folder:
        tables["faces"] = lambda: faces_table(Path(folder) / "CroppedYale")
        tables["yale"] = lambda: yale_table(Path(folder) / "CroppedYale")
    # minutes to a quarter of an hour each: only when asked for
    slow: dict[str, Callable[[], str]] = {
        "frontier": frontier.table,
        "defaults": defaults.table,
        "pca": lambda: bench_table("pca", pcabench, "--repeats", "1"),
        "million": lambda: bench_table("svm", svmbench, "--rows", "1000000", "--repeats", "1"),
        "scaling": lambda: bench_table("svm", svmbench, "--alone", "--rows", "100000", "1000000", "10000000"),
    }
    if folder:
        parts = [str(Path(folder) / "cifar10" / part) for part in ("train", "test")]
        slow["patches"] = lambda: patches_table(*parts)
        slow["svm"] = lambda: bench_table("svm", svmbench, "--images", *parts, "--rows", "60000", "--repeats", "2")
        slow["rbf"] = lambda: bench_table("rbf", rbfbench, "--images", *parts)
        slow["pipeline"] = lambda: bench_table("pipeline", pipebench, "--images", *parts, "--repeats", "1")
    if unknown := set(names) - tables.keys() - slow.keys():
        raise SystemExit(
            f"no table {', '.join(sorted(unknown))}: there are {', '.join([*tables, *slow])}" + ("" if folder else "; set STREAMCNN_DATA")
        )
    for name in names or tables:
        write(name, (tables | slow)[name]())


if __name__ == "__main__":
    main(sys.argv[1:])
