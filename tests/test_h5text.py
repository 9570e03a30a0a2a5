"""Strings of variable length in HDF5 files, against what h5py reads."""

import h5py
import numpy as np
import pytest

from streamcnn.errors import FileError
from streamcnn.images import open_images

WORDS = np.array(["a", "bé" * 3, "", "x" * 3000, "long label " * 5], object)


@pytest.mark.parametrize("libver", ["earliest", ("v110", "v110"), "latest"], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"userblock": 512},
        {"chunks": (3,)},
        {"chunks": (200,), "compression": "gzip", "shuffle": True},
        {"chunks": (64, 1), "compression": "gzip"},
    ],
    ids=str,
)
def test_strings_are_read_as_h5py_reads_them(tmp_path, libver, options):
    """Contiguous, chunked and packed, of any length, behind a user block, in old and new files."""
    labels = WORDS[np.random.default_rng(0).integers(0, 5, 500)]
    options = dict(options)
    with h5py.File(tmp_path / "a.h5", "w", libver=libver, userblock_size=options.pop("userblock", 0)) as file:
        file["images"] = np.zeros((500, 2, 2), np.uint8)
        shaped = labels[:, None] if len(options.get("chunks", (1,))) == 2 else labels
        file.create_dataset("labels", data=shaped, dtype=h5py.string_dtype(), **options)
    source = open_images(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert source.classes_[source.labels].tolist() == file["labels"].asstr()[:].reshape(-1).tolist() == labels.tolist()


def test_strings_packed_otherwise_are_refused(tmp_path):
    """The error says which filters are known."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros((5, 2, 2), np.uint8)
        file.create_dataset("labels", data=WORDS, dtype=h5py.string_dtype(), chunks=(5,), compression="lzf")
    with pytest.raises(FileError, match="other filters than gzip and shuffle"):
        open_images(tmp_path / "a.h5")
