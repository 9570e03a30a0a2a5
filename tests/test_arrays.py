"""Files of arrays: what is written is read, and nothing else is."""

import time

import h5py
import numpy as np
import pytest

from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.errors import FileError, ModelError

HEADER = {"format": "test", "format_version": 1}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.h5"
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 3)),
        "n": np.array([1, 2]),
    }
    save_arrays(path, arrays, HEADER)
    return path, arrays


def test_arrays_come_back_with_type_shape_and_header(good):
    """Every array has the type, shape and values it was saved with."""
    path, arrays = good
    back, header = load_arrays(path, "test", 1)
    assert header["format"] == "test"
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, strict=True)


def test_equal_arrays_make_equal_files(good, tmp_path):
    """Files hold no time of day, so the same model is the same file."""
    path, arrays = good
    time.sleep(1.1)  # HDF5's times are in seconds
    save_arrays(tmp_path / "again.h5", arrays, HEADER)
    assert path.read_bytes() == (tmp_path / "again.h5").read_bytes()


def test_missing_text_and_foreign_files_are_refused(tmp_path):
    """A file that is missing, is text, or is HDF5 of another program gets one clear line."""
    with pytest.raises(FileError, match="no such file"):
        load_arrays(tmp_path / "none.h5", "test", 1)
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(ModelError, match="is not a test file, or it is damaged"):
        load_arrays(tmp_path / "text.h5", "test", 1)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1, 2]
    with pytest.raises(ModelError, match="is not a test file: its header is missing"):
        load_arrays(tmp_path / "other.h5", "test", 1)


def test_newer_versions_are_refused(tmp_path):
    """A file from the future says to update."""
    save_arrays(tmp_path / "new.h5", {}, HEADER | {"format_version": 2})
    with pytest.raises(ModelError, match="format version 2, this streamcnn reads up to 1: update"):
        load_arrays(tmp_path / "new.h5", "test", 1)


def test_a_changed_value_is_noticed(good):
    """One changed number, with valid HDF5 checksums, is found by the hash."""
    path, _ = good
    with h5py.File(path, "r+") as file:
        file["a"][1, 1] = 7
    with pytest.raises(ModelError, match="damaged: its contents do not match their hash"):
        load_arrays(path, "test", 1)


def _external_link(file, folder):
    file["bad"] = h5py.ExternalLink(str(folder / "other.h5"), "/x")


def _soft_link(file, folder):
    file["bad"] = h5py.SoftLink("/a")


def _group(file, folder):
    file.create_group("bad")


def _external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(80))
    file.create_dataset("bad", (10,), "f8", external=[(str(folder / "secret"), 0, 80)])


def _virtual(file, folder):
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource(".", "a", (2, 3))
    file.create_virtual_dataset("bad", layout)


def _shape_bomb(file, folder):
    file.create_dataset("bad", (1 << 34,), "f8", chunks=(1 << 20,))


def _text(file, folder):
    file.create_dataset("bad", data=["a", "b"], dtype=h5py.string_dtype())


def _compressed(file, folder):
    file.create_dataset("bad", data=np.zeros(10), compression="gzip")


@pytest.mark.parametrize(
    "spoil", [_external_link, _soft_link, _group, _external_storage, _virtual, _shape_bomb, _text, _compressed], ids=lambda f: f.__name__
)
def test_hostile_contents_are_refused(good, tmp_path, spoil):
    """Links, groups, outside or virtual storage, bombs, texts and filters never reach the reader."""
    path, _ = good
    with h5py.File(path, "r+") as file:
        spoil(file, tmp_path)
    with pytest.raises(ModelError, match="bad"):
        load_arrays(path, "test", 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(good, monkeypatch):
    """When writing fails half-way, the file that was there is still there and no temporary file is left."""
    path, arrays = good
    before = path.read_bytes()
    real = h5py.File.create_dataset

    def failing(self, name, *args, **kwargs):
        if name == "n":
            raise OSError("disk full")
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(h5py.File, "create_dataset", failing)
    with pytest.raises(OSError, match="disk full"):
        save_arrays(path, arrays, HEADER)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
