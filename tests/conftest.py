"""Data that several test modules use."""

import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import streamcnn

# children import what these tests import: not what lies in the folder they start in, which `-c` and `-m` put first. Programs of the tests
# and tools then do not see the files beside them, so those folders are named
os.environ["PYTHONSAFEPATH"] = "1"
_FOLDERS = [Path(__file__).parent, Path(__file__).parent.parent / "tools", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(folder).absolute()) for folder in _FOLDERS if folder)


def pytest_report_header():
    """Which package is tested."""
    return f"streamcnn: {Path(streamcnn.__file__).parent}"


@pytest.fixture(autouse=True, scope="session")
def scratch(tmp_path_factory):
    """Intermediate data of estimators go below pytest's own temporary folder."""
    os.environ["STREAMCNN_TMPDIR"] = str(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def digits():
    """Digits 8 x 8 as uint8 images (1797, 8, 8, 1) and labels."""
    data = load_digits()
    return (data.images * 15).astype(np.uint8)[..., None], data.target


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets that STREAMCNN_DATA names."""
    folder = os.environ.get("STREAMCNN_DATA")
    if not folder:
        pytest.skip("STREAMCNN_DATA is not set: tests on Extended Yale B and CIFAR-10 are left out")
    return Path(folder)


@pytest.fixture
def tree(tmp_path, digits):
    """A class-per-folder tree of 300 PNG digits, and the same rows as arrays in the tree's order."""
    from PIL import Image

    images, labels = digits[0][:300], digits[1][:300]
    order = np.argsort(labels, kind="stable")
    for row in order:
        folder = tmp_path / "tree" / f"digit {labels[row]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row, :, :, 0]).save(folder / f"{row:04d}.png")
    return tmp_path / "tree", images[order], np.array([f"digit {label}" for label in labels[order]])
