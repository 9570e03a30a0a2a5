"""The house rules on imports, and what an import of the package costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import streamcnn

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import check_layout  # noqa: E402 - lives beside the package, not in it


def test_imports_follow_the_flow_of_data():
    """Upward only, h5py and numba never in one file."""
    assert check_layout.problems(Path(streamcnn.__file__).parent) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("store", "import h5py\nimport numba\n", "both h5py and numba"),
        ("errors", "from streamcnn.cli import main\n", "errors imports cli, which comes after it"),
        ("novelty", "", "not in the list of modules"),
        ("model", "import matplotlib.pyplot\n", "imports matplotlib at its top"),
        ("model", "def f():\n    from numba import cuda\n", "model imports numba.cuda: take it from kernels.cudadevice"),
    ],
)
def test_broken_rules_are_found(tmp_path, name, text, problem):
    """Each rule can fail."""
    (tmp_path / f"{name}.py").write_text(text)
    assert problem in check_layout.problems(tmp_path)[0]


def test_import_is_light():
    """`import streamcnn` compiles nothing and loads neither numba, matplotlib, CUDA nor torch."""
    code = "import sys, streamcnn; print([m for m in ('numba', 'matplotlib', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_all_public_names_are_there_and_documented():
    """Every agreed name can be imported and has a docstring."""
    for name in streamcnn.__all__:
        assert getattr(streamcnn, name).__doc__, name


def test_examples_in_docstrings_run():
    """The examples people copy work, in whichever module they stand."""
    import doctest
    import importlib

    package = Path(streamcnn.__file__).parent
    having = [path for path in sorted(package.rglob("*.py")) if "    >>> " in path.read_text(encoding="utf-8")]
    names = {check_layout.module_name(path, package) for path in having}
    assert {"store", "memory", "estimators", "convfeatures", "images", "pca", "svm", "plan", "filters", "layers", "search"} <= names
    for name in names:
        result = doctest.testmod(importlib.import_module(f"streamcnn.{name}"))
        assert result.attempted, name
        assert not result.failed, name
