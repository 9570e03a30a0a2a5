"""Files that released versions wrote are read for ever.

Each folder of `tests/archive` was written once by `tools/make_archive.py` and holds a store, a model and what reading them has to give.
The oldest h5py that `pyproject.toml` allows is tried by hand before a release: `pip install "h5py==3.12.*"` into an environment of its own,
then `pytest tests/test_archive.py` there.
"""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from streamcnn import FeatureStore, load_model
from streamcnn.arrays import load_arrays
from streamcnn.images import open_images

ARCHIVE = Path(__file__).parent / "archive"
VERSIONS = sorted(path.name for path in ARCHIVE.iterdir() if path.is_dir())


@pytest.fixture(params=VERSIONS)
def archived(request, tmp_path):
    """(a copy of an archived folder, what reading it has to give)."""
    shutil.copytree(ARCHIVE / request.param, tmp_path / "a")
    return tmp_path / "a", json.loads((tmp_path / "a/expected.json").read_text(encoding="utf-8"))


def test_the_first_version_is_archived():
    """There is something to read."""
    assert "v1" in VERSIONS


def test_archived_stores_are_read(archived):
    """Rows, labels, manifest and stages of every released version are what they were, and `verify` finds nothing."""
    folder, expected = archived
    store = FeatureStore(folder / "store")
    assert store.config["format_version"] == expected["store_version"]
    assert store.entries == expected["manifest"]
    assert store.verify() == []
    for kind, rows in expected["rows"].items():
        parts = [(features.copy(), labels) for features, labels in store.iter_batches(7, kind)]
        np.testing.assert_array_equal(np.concatenate([features for features, _ in parts]), np.array(rows, np.float32), strict=True)
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), expected["labels"][kind])
    for name, arrays in expected["stages"].items():
        digest = next(entry["digest"] for entry in store.entries if entry.get("stage") == name)
        found = store.stage_arrays(name, digest)
        assert found is not None
        assert found.keys() == arrays.keys()
        for key, values in arrays.items():
            np.testing.assert_array_equal(found[key], np.reshape(values, found[key].shape))


def test_archived_stores_can_be_added_to(archived):
    """An archived store takes the lock and new rows, and is read again with them."""
    folder, expected = archived
    rows = np.array(expected["rows"]["features"], np.float16)
    with FeatureStore(folder / "store") as store:
        store.lock()
        store.append(rows[:5], labels=[1, 2, 0, 1, 2])
    ((features, labels),) = FeatureStore(folder / "store").iter_batches(1000)
    np.testing.assert_array_equal(features, np.concatenate([rows, rows[:5]]))
    assert labels[-5:].tolist() == [1, 2, 0, 1, 2]


def test_archived_models_predict(archived):
    """Classes and predictions are those of the version that trained it."""
    folder, expected = archived
    model, images = load_model(folder / "model.h5"), np.array(expected["images"], np.uint8)
    assert load_arrays(folder / "model.h5", "streamcnn-model", expected["model_version"])[1]["format_version"] == expected["model_version"]
    assert model.classes_.tolist() == expected["classes"]
    decisions = np.concatenate([values for _, values in model.decisions(open_images(images), device="cpu")])
    # products of float32 in another order on another CPU: 24 features rounded to float16 (2**-11), of which a last bit may turn
    np.testing.assert_allclose(decisions, expected["decisions"], rtol=0, atol=2**-9)
    assert model.classes_[model.labels_of(decisions)].tolist() == expected["predictions"]


def test_plain_h5py_reads_archived_features(archived):
    """`features.h5` is one virtual data set for other programs, wherever the folder lies."""
    folder, expected = archived
    with h5py.File(folder / "store/features.h5") as file:
        np.testing.assert_array_equal(file["features"][:], np.array(expected["rows"]["features"], np.float16), strict=True)
        np.testing.assert_array_equal(file["labels"][:], expected["labels"]["features"])
