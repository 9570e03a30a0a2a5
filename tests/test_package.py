"""The package as it is built, installed and typed: contents of wheel and sdist, versions, clean environments."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import streamcnn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import lowest  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "streamcnn").rglob("*.py")}

USER = """
import numpy as np
from streamcnn import ConvFeatures, ConvLayer, FeatureStore, StreamCNNClassifier, StreamingPCA, StreamingSVC, load_model, open_images, plan

classifier = StreamCNNClassifier(layers=[ConvLayer(8, 3)], memory_limit="1GiB")
labels = classifier.fit(np.zeros((4, 8, 8)), [0, 1, 0, 1]).predict("photos/")
n: int = open_images("photos/").n_samples
shape: tuple[int, int, int] = open_images("photos/").image_shape
peak: int = plan("photos/").peak_bytes
model = load_model("m.h5")
"""


def run(*command, cwd=None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, made without the network."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_children_import_the_package_that_is_tested(tmp_path):
    """With `-c` and `-m`, wherever they start: not a package of that name in their folder, as the checkout is when a wheel is tested."""
    (tmp_path / "streamcnn").mkdir()
    (tmp_path / "streamcnn" / "__init__.py").write_text("raise ImportError('the wrong one')")
    assert run(sys.executable, "-c", "import streamcnn; print(streamcnn.__file__)", cwd=tmp_path).strip() == streamcnn.__file__
    assert run(sys.executable, "-m", "streamcnn", "--version", cwd=tmp_path).split() == ["streamcnn", PROJECT["version"]]


def test_the_wheel_is_the_package_and_nothing_else(built):
    """All modules, py.typed, the licence and the command; no test, tool, notebook or data."""
    with zipfile.ZipFile(built[0]) as wheel:
        names, metadata = set(wheel.namelist()), f"streamcnn-{PROJECT['version']}.dist-info"
        entry = wheel.read(f"{metadata}/entry_points.txt").decode()
    extra = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert names == MODULES | {"streamcnn/py.typed"} | {f"{metadata}/{name}" for name in extra}
    assert "streamcnn = streamcnn.cli:main" in entry


def test_the_sdist_has_what_tests_need(built):
    """Package, tests with their archive of old files, tools, notebooks and texts; below 4 MiB; nothing that git ignores."""
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "tools/lowest.py", "tests/conftest.py", "streamcnn/py.typed"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "archive").rglob("*") if path.is_file()}
    assert names >= wanted | MODULES and any(name.endswith(".ipynb") for name in names)
    assert not [name for name in names - {".gitignore"} if "__pycache__" in name or name.startswith((".", "dist/"))]
    assert built[1].stat().st_size < 4 << 20


def test_the_newest_entry_of_the_changelog_is_this_version():
    """Versions newest first, with a date or unreleased; changes below Added, Changed, Deprecated, Removed, Fixed or Security."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [re.fullmatch(r"## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)", line) for line in lines if line.startswith("## ")]
    assert all(versions) and versions[0][1] == PROJECT["version"]
    order = [tuple(map(int, match[1].split("."))) for match in versions]
    assert order == sorted(set(order), reverse=True)
    kinds = {line for line in lines if line.startswith("### ")}
    assert kinds and kinds <= {f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}
    heading = ""
    for line in lines:
        heading = line if line.startswith("#") else heading
        assert not line.startswith("- ") or heading.startswith("### "), f"below no kind of change: {line}"


def test_lowest_versions_are_the_bounds():
    """Bounds of a project and its extras, and of extras that these name, become pins; a requirement without one is refused."""
    extras = {"x": ["c-d==5.0"], "y": ["e>=1"], "z": ["f>=2", "own[x,y]"]}
    project = {"name": "own", "dependencies": ["b>=1.2,<9", "a[cu12]>=3"], "optional-dependencies": extras}
    assert lowest.lowest(project, ["x"]) == ["a==3", "b==1.2", "c-d==5.0"]
    assert lowest.lowest(project, ["z"]) == ["a==3", "b==1.2", "c-d==5.0", "e==1", "f==2"]
    with pytest.raises(ValueError, match="lower bound, got 'numpy'"):
        lowest.lowest({"name": "own", "dependencies": ["numpy"]}, [])
    assert len(lowest.lowest(PROJECT, ["test", "plot", "notebook"])) >= len(PROJECT["dependencies"]) + 5


@pytest.mark.large
@pytest.mark.parametrize("versions", ["lowest", "highest"])
def test_a_clean_environment_passes_from_the_sdist(built, tmp_path, versions):
    """The wheel with the lowest or highest dependencies, from the package index: commands, types and a fast part of the sdist's tests."""
    if versions == "lowest" and sys.version_info[:2] != (3, 11):
        pytest.skip("the lowest versions have wheels for the lowest Python, 3.11, alone")
    wheel, sdist = built
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    limits = tmp_path / "constraints.txt"
    limits.write_text("\n".join(lowest.lowest(PROJECT, ["test"])) if versions == "lowest" else "")
    run(binaries / "python", "-m", "pip", "install", "-q", "-c", limits, f"{wheel}[test]", "mypy")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # 3.11.4 on
    root = next(tmp_path.glob("streamcnn-*"))
    assert run(binaries / "streamcnn", "--version").split()[-1] == PROJECT["version"]
    (tmp_path / "user.py").write_text(USER)
    run(binaries / "python", "-m", "mypy", "--no-incremental", "user.py", cwd=tmp_path)
    tests = ["test_package.py", "test_arrays.py", "test_layout.py", "test_store.py", "test_slicing.py", "test_cli.py"]
    # as people are told to: not `python -m pytest`, which puts the folder it starts in first
    out = run(binaries / "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests), cwd=root)
    assert "venv" in re.search("streamcnn: (.*)", run(binaries / "pytest", "--collect-only", "tests/test_layout.py", cwd=root))[1], out
