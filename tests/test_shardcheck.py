"""What `verify` refuses in a shard, whatever its size and place say."""

import shutil

import h5py
import numpy as np
import pytest
from mutations import lookup3, metadata_blocks

from streamcnn.shardcheck import shard_errors
from streamcnn.store import FeatureStore

ROWS = np.random.default_rng(0).normal(size=(37, 7)).astype(np.float16)
LABELS = np.arange(37) % 3


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two equal shards of four chunks of 10 rows, the last one filled in part."""
    monkeypatch.setattr("streamcnn.shards.HDF5_CHUNK_BYTES", 140)
    with FeatureStore.create(tmp_path / "store") as store:
        store.append(ROWS, LABELS)
        store.append(ROWS, LABELS)
    return store


def rewritten(store, **changes):
    """The error of shard 1, written anew with the same rows by other means, its size in the manifest put right."""
    path = store.path / "features/00001.h5"
    options = {"chunks": (10, 7), "fletcher32": True, "dtype": "<f2"} | changes
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        if "external" in options:
            options = {"dtype": "<f2", "external": [(str(path.with_name("rows")), 0, h5py.h5f.UNLIMITED)]}
        rows = options.pop("rows", ROWS)
        data = file.create_dataset("features", rows.shape, fillvalue=np.nan, **options)
        data[: len(rows)] = rows
        file.create_dataset("labels", data=LABELS.astype("<i8"), chunks=(37,), fletcher32=True)
    return checked(store)


def checked(store):
    entry = store.shards("features")[1]
    entry["bytes"] = (store.path / entry["file"]).stat().st_size
    return shard_errors(store.path, store.shards("features"))


def test_rows_written_by_plain_hdf5_in_the_same_way_are_accepted(store):
    """The control of the tests below: what differs in nothing is no error."""
    assert rewritten(store) == [None, None]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chunks": (37, 7)}, "features is in pieces of (37, 7)"),
        ({"chunks": (10, 1)}, "features is in pieces of (10, 1)"),
        ({"fletcher32": False}, "features is in pieces of (10, 7) or without checksums"),
        ({"compression": "gzip"}, "features is stored through filter 1"),
        ({"shuffle": True}, "features is stored through filter 2"),
        ({"dtype": ">f2"}, "features is not an array (37, 7) of float16"),
        ({"dtype": "<f4"}, "features is not an array (37, 7) of float16"),
        ({"rows": ROWS[:30]}, "features is not an array (37, 7) of float16"),
        ({"external": True}, "features keeps its values in other files"),
        ({"rows": ROWS[::-1]}, "contents do not match their hash"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(value),
)
def test_rows_stored_otherwise_are_refused_and_the_shard_named(store, changes, reason):
    """Other chunks, filters, types, places or values: the right shard, and why."""
    first, second = rewritten(store, **changes)
    assert first is None
    assert reason in second


def test_a_virtual_data_set_is_refused(store):
    """Rows that lie in another file are not this shard's."""
    path = store.path / "features/00001.h5"
    shutil.copy(path, path.with_name("other.h5"))
    with h5py.File(path, "r+") as file:
        del file["features"]
        layout = h5py.VirtualLayout((37, 7), "<f2")
        layout[:] = h5py.VirtualSource("other.h5", "features", (37, 7))
        file.create_virtual_dataset("features", layout)
    assert "features keeps its values in other files" in checked(store)[1]


@pytest.mark.parametrize("link", [h5py.SoftLink("/moved"), h5py.ExternalLink("00000.h5", "/features")], ids=["soft", "external"])
def test_a_link_is_refused(store, link):
    """Also one that leads to the very same rows."""
    with h5py.File(store.path / "features/00001.h5", "r+") as file:
        file.move("features", "moved")
        file["features"] = link
    assert "features leads elsewhere by a link" in checked(store)[1]


@pytest.mark.parametrize("size", [144, 140], ids=["mask alone", "mask and no checksum"])
def test_a_chunk_without_checksum_is_refused(store, size):
    """HDF5 reads a chunk whose mask says that a filter was left out without checking it: so may we not."""
    path = store.path / "features/00001.h5"
    with h5py.File(path) as file:
        chunks = {row: file["features"].id.read_direct_chunk((row, 0))[1] for row in range(0, 40, 10)}
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        data = file.create_dataset("features", (37, 7), "<f2", chunks=(10, 7), fletcher32=True, fillvalue=np.nan)
        for row, stored in chunks.items():
            # into new places: HDF5 ignores the mask of a chunk that takes the place of another
            data.id.write_direct_chunk((row, 0), stored[:size] if row == 10 else stored, int(row == 10))
        file.create_dataset("labels", data=LABELS.astype("<i8"), chunks=(37,), fletcher32=True)
    assert "chunk of row 10 is missing, of another size or without checksum" in checked(store)[1]


def test_a_missing_chunk_is_refused(store):
    """Rows never written come back as fill values: an error before any hash."""
    path = store.path / "features/00001.h5"
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        data = file.create_dataset("features", (37, 7), "<f2", chunks=(10, 7), fletcher32=True, fillvalue=np.nan)
        data[:20] = ROWS[:20]
        file.create_dataset("labels", data=LABELS.astype("<i8"), chunks=(37,), fletcher32=True)
    assert "chunk of row 20 is missing" in checked(store)[1]


def test_no_flipped_byte_goes_unnoticed_that_changes_what_is_read(store):
    """Every 5th byte of a shard in turn: verify reports it, or h5py still reads the very same rows and labels."""
    path = store.path / "features/00001.h5"
    entry, whole, unnoticed = store.shards("features")[1], path.read_bytes(), 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        if shard_errors(store.path, [entry]) == [None]:
            unnoticed += 1
            with h5py.File(path) as file:
                np.testing.assert_array_equal(file["features"][:], ROWS)
                np.testing.assert_array_equal(file["labels"][:], LABELS)
    # space that HDF5 leaves unused between its objects
    assert unnoticed < len(whole) / 10


def test_chunks_beyond_the_end_that_the_file_declares_are_refused(store):
    """HDF5 does not read them, though their bytes are there: verify must not call such a shard well."""
    path = store.path / "features/00001.h5"
    with h5py.File(path) as file:
        last = max(file[name].id.get_chunk_info(i).byte_offset for name in file for i in range(file[name].id.get_num_chunks()))
    content = bytearray(path.read_bytes())
    start, end = next(block for block in metadata_blocks(bytes(content)) if block[0] == 0)
    # superblock version 3: the end of the file is the third address, from byte 28 on
    assert int.from_bytes(content[28:36], "little") == len(content)
    content[28:36] = (last + 10).to_bytes(8, "little")
    content[end : end + 4] = lookup3(bytes(content[start:end])).to_bytes(4, "little")
    path.write_bytes(content)
    assert checked(store)[1] is not None
