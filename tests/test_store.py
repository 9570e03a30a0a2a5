"""FeatureStore: shards, manifest, locks, damage."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcnn.errors import DataError, StoreError
from streamcnn.files import FolderLock, check_output_file, is_memory_disk, replacing, scratch_folder
from streamcnn.shards import hdf5_chunk_rows, shard_rows
from streamcnn.store import FeatureStore

ROWS = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float16)
LABELS = np.arange(50) % 3


def filled(path, cuts=(0, 20, 33, 50)):
    with FeatureStore.create(path) as store:
        for start, stop in zip(cuts, cuts[1:]):
            store.append(ROWS[start:stop], LABELS[start:stop])
    return FeatureStore(path)


@given(cuts=st.lists(st.integers(1, 49), unique=True, max_size=5), batch_size=st.integers(1, 60))
@settings(deadline=None, max_examples=25)
def test_rows_come_back_however_they_were_cut(tmp_path_factory, cuts, batch_size):
    """Any shards and any batches give the same rows and labels in the same order."""
    store = filled(tmp_path_factory.mktemp("s") / "store", (0, *sorted(cuts), 50))
    batches = [(x.copy(), y) for x, y in store.iter_batches(batch_size)]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), ROWS.astype(np.float32), strict=True)
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), LABELS)


def test_any_range_can_be_read(tmp_path):
    """A range across shards lands at the start of the output and leaves the rest alone."""
    store = filled(tmp_path / "store")
    out = np.full((40, 7), 9, np.float32)
    store.read(15, 41, out)
    np.testing.assert_array_equal(out[:26], ROWS[15:41].astype(np.float32))
    assert (out[26:] == 9).all()


def test_plain_h5py_reads_the_virtual_data_set_after_a_move(tmp_path):
    """features.h5 shows all rows and labels to other programs, wherever the folder goes."""
    filled(tmp_path / "store").write_virtual()
    (tmp_path / "store").rename(tmp_path / "moved")
    with h5py.File(tmp_path / "moved" / "features.h5") as file:
        np.testing.assert_array_equal(file["features"][:], ROWS)
        np.testing.assert_array_equal(file["labels"][:], LABELS)
        assert np.isnan(file["features"].fillvalue)


def test_shards_have_checksums_and_the_agreed_format(tmp_path):
    """Every data set has fletcher32, and the superblock is version 3."""
    filled(tmp_path / "store")
    with h5py.File(tmp_path / "store/features/00000.h5") as file:
        assert file["features"].fletcher32
        assert file["labels"].fletcher32
        assert file.id.get_create_plist().get_version()[0] == 3


@pytest.mark.parametrize(("n_rows", "steps"), [(37, [37]), (42, [1, 2, 39]), (50, [7] * 7 + [1]), (8, [8])])
def test_plain_h5py_reads_and_checks_rows_written_in_any_steps(tmp_path, monkeypatch, n_rows, steps):
    """Chunks of 10 rows, the last one filled in part: h5py reads the rows, and finds a flipped byte in any chunk, its checksum included."""
    monkeypatch.setattr("streamcnn.shards.HDF5_CHUNK_BYTES", 140)
    with FeatureStore.create(tmp_path / "store") as store:
        with store.writing("features", 0, 0, n_rows, 7, np.float16, "") as writer:
            for n in steps:
                writer.write(ROWS[writer.filled : writer.filled + n], None)
        assert store.verify() == []
    path = tmp_path / "store/features/00000.h5"
    with h5py.File(path) as file:
        data = file["features"]
        assert data.chunks[0] == min(10, n_rows)
        np.testing.assert_array_equal(data[:], ROWS[:n_rows])
        places = [(data.id.get_chunk_info(i).byte_offset, data.id.get_chunk_info(i).size) for i in range(data.id.get_num_chunks())]
    assert len(places) == -(-n_rows // 10)
    whole = path.read_bytes()
    for chunk, (offset, size) in enumerate(places):
        for at in (offset, offset + size - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with h5py.File(path) as file, pytest.raises(OSError, match=r"filter|Fletcher32"):
                file["features"][10 * chunk]


@pytest.mark.parametrize("rows", [ROWS[:21], ROWS[:3].astype(np.float32), ROWS[:3, :6]], ids=["too many", "another type", "another width"])
def test_a_shard_takes_only_rows_of_its_kind(tmp_path, rows):
    """Rows beyond the last, of another dtype or width are refused, and no shard appears."""
    with FeatureStore.create(tmp_path / "store") as store:
        with pytest.raises(StoreError, match="features must be at most 20 more rows of 7 float16 numbers"):  # noqa: SIM117
            with store.writing("features", 0, 0, 20, 7, np.float16, "") as writer:
                writer.write(rows, None)
        assert store.shards("features") == []


@pytest.mark.parametrize("change", ["flip", "truncate", "grow", "delete", "swap"])
def test_verify_names_the_bad_shard(tmp_path, change):
    """A flipped bit, a cut file, a longer one, a missing file and an exchanged one are found, and the shard is named."""
    store = filled(tmp_path / "store")
    assert store.verify() == []
    shard = tmp_path / "store/features/00001.h5"
    data = bytearray(shard.read_bytes())
    if change == "flip":
        data[data.find(ROWS[20:33].tobytes()[:64]) + 5] ^= 1
        shard.write_bytes(data)
    elif change == "truncate":
        shard.write_bytes(data[:-10])
    elif change == "grow":
        shard.write_bytes(data + b"0")
    elif change == "delete":
        shard.unlink()
    else:
        shard.write_bytes((tmp_path / "store/features/00000.h5").read_bytes())
    problems = store.verify()
    assert len(problems) == 1
    assert problems[0].startswith("features/00001.h5: ")


def test_reading_damaged_rows_is_an_error_not_data(tmp_path):
    """A flipped bit in the rows is noticed by the read itself."""
    store = filled(tmp_path / "store", (0, 50))
    shard = tmp_path / "store/features/00000.h5"
    data = bytearray(shard.read_bytes())
    at = data.find(ROWS.tobytes()[:64])
    assert at > 0
    data[at + 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"00000.h5 is damaged: features: chunk 0 does not match its checksum"):
        store.read(0, 50, np.empty((50, 7), np.float32))


def test_a_torn_last_line_is_dropped_and_a_damaged_one_refused(tmp_path):
    """The process may die while writing a line; a line damaged later is another matter."""
    filled(tmp_path / "store")
    manifest = tmp_path / "store/manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-20])
    store = FeatureStore(tmp_path / "store")
    assert store.n_rows == 33
    with store:
        store.lock()
        store.append(ROWS[33:], LABELS[33:])
    assert FeatureStore(tmp_path / "store").n_rows == 50
    manifest.write_bytes(whole.replace(b'"rows": 13', b'"rows": 14'))
    with pytest.raises(StoreError, match="line 2 is damaged"):
        FeatureStore(tmp_path / "store")


def test_a_manifest_may_not_lead_out_of_the_store(tmp_path):
    """A line with a valid CRC that names a file elsewhere is refused."""
    from streamcnn.manifest import line_of

    filled(tmp_path / "store")
    manifest = tmp_path / "store/manifest.jsonl"
    entry = json.loads(manifest.read_bytes().splitlines()[0]) | {"file": "../../etc/passwd"}
    manifest.write_bytes(line_of(entry) + manifest.read_bytes())
    with pytest.raises(StoreError, match="line 1 is damaged"):
        FeatureStore(tmp_path / "store")


def test_a_store_is_used_by_one_process_at_a_time_and_freed_by_death(tmp_path):
    """A second process is refused with one line; when the first is gone nothing stands in the way."""
    store = FeatureStore.create(tmp_path / "store")
    code = f"from streamcnn.store import FeatureStore; FeatureStore({str(tmp_path / 'store')!r}).lock()"
    held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert held.returncode == 1
    assert "is in use by another process" in held.stderr
    store.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_stage_arrays_belong_to_their_digest(tmp_path):
    """A finished stage is found under its digest only, and damage to its file is as if it were not there."""
    with FeatureStore.create(tmp_path / "store") as store:
        store.finish("pca", "d1", {"mean": np.arange(3.0)}, note=5)
        assert store.finished("pca", "d1")["note"] == 5
        assert store.stage_arrays("pca", "d2") is None
        np.testing.assert_array_equal(store.stage_arrays("pca", "d1")["mean"], np.arange(3.0))
        store.finish("pca", "d2", {"mean": np.zeros(3)})
        assert store.stage_arrays("pca", "d1") is None
        (tmp_path / "store/stages/pca.h5").write_bytes(b"x")
        assert store.stage_arrays("pca", "d2") is None
        assert store.verify() == ["stages/pca.h5: missing or damaged; fit again with --resume to recompute it"]


def test_begin_keeps_shards_of_the_same_digest_and_drops_the_rest(tmp_path):
    """Other parameters make old shards worthless; files without a manifest line go too."""
    with FeatureStore.create(tmp_path / "store") as store:
        for shard in range(3):
            with store.writing("features", shard, 10 * shard, 10, 7, "float16", "old" if shard == 1 else "new") as writer:
                writer.write(ROWS[:10], LABELS[:10])
        (tmp_path / "store/features/00009.h5").write_bytes(b"stray")
        data = bytearray((tmp_path / "store/features/00002.h5").read_bytes())
        data[data.find(ROWS[:10].tobytes()[:64]) + 5] ^= 1
        (tmp_path / "store/features/00002.h5").write_bytes(data)
        assert store.begin("features", "new") == {0, 2}
        assert store.begin("features", "new", check=lambda n: None) == {0}
        assert [p.name for p in (tmp_path / "store/features").iterdir()] == ["00000.h5"]


def test_a_shard_that_fails_half_way_leaves_no_trace(tmp_path):
    """An exception while writing, or too few rows, leaves neither file nor line."""
    with FeatureStore.create(tmp_path / "store") as store:
        with pytest.raises(KeyboardInterrupt), store.writing("features", 0, 0, 10, 7, "float16", "") as writer:
            writer.write(ROWS[:5], LABELS[:5])
            raise KeyboardInterrupt
        with pytest.raises(StoreError, match="5 of 10 rows"), store.writing("features", 0, 0, 10, 7, "float16", "") as writer:
            writer.write(ROWS[:5], LABELS[:5])
        assert FeatureStore(tmp_path / "store").n_rows == 0


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_wrong_rows_are_refused(tmp_path):
    """append takes float16 or float32 rows of one width, with one label each."""
    with FeatureStore.create(tmp_path / "store") as store:
        store.append(ROWS, LABELS)
        for rows, labels, text in [
            (ROWS[:, :3], None, "must have 7 columns"),
            (ROWS / np.float16(0), None, "finite"),
            (ROWS.astype(float), None, "float16 or float32"),
            (ROWS, LABELS[:3], "50 rows, 3 labels"),
        ]:
            with pytest.raises(DataError, match=text):
                store.append(rows, labels)


def test_folders_that_are_no_store_are_refused(tmp_path):
    """A missing folder, a folder of other things and a store of the future are told apart."""
    with pytest.raises(StoreError, match="no such folder"):
        FeatureStore(tmp_path / "none")
    with pytest.raises(StoreError, match=r"is no feature store: .*; a store is the folder that fit --store \(store=\) has made"):
        FeatureStore(tmp_path)
    (tmp_path / "x").write_text("mine")
    with pytest.raises(StoreError, match="not an empty folder"):
        FeatureStore.create(tmp_path)
    FeatureStore.create(tmp_path / "s").close()
    config = json.loads((tmp_path / "s/config.json").read_text())
    (tmp_path / "s/config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(StoreError, match="store version 99, this streamcnn reads up to 1"):
        FeatureStore(tmp_path / "s")


def test_shard_size_follows_the_row_alone():
    """Shards are whole multiples of 1,024 rows, so fixed blocks of rows never straddle two."""
    assert [shard_rows(d, 2) for d in (10, 3136, 10**6)] == [1_677_312, 5120, 1024]
    assert [hdf5_chunk_rows(d, 4) for d in (1, 200, 10**6)] == [65536, 327, 1]


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    """A file is complete or as it was."""
    path = tmp_path / "f"
    with replacing(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_output_files_are_checked_before_any_work(tmp_path):
    """A folder, or a file in a folder that does not exist, is refused with the path."""
    with pytest.raises(OSError, match="is a folder: give a file name"):
        check_output_file(tmp_path, "--model", "HDF5 file")
    with pytest.raises(OSError, match="does not exist; create it first"):
        check_output_file(tmp_path / "a/b.h5", "--model", "HDF5 file")


def test_output_files_replace_only_their_kind(tmp_path):
    """A file that is there is replaced only if it is empty or begins as the output will, and is named otherwise."""
    path = tmp_path / "there"
    kinds = {b"\x89HDF\r\n": "HDF5 file", b"index,path,label,score": "CSV of predict", b"<!doctype HTML>": "HTML page"}
    for content in (*kinds, b"\xff\xd8\xff\xe0 a photo", b"P5 8 8 255 ", b"my thesis"):
        path.write_bytes(content)
        for kind in kinds.values():
            if kinds.get(content) == kind:
                check_output_file(path, "--output", kind)
                continue
            with pytest.raises(OSError, match=f"there, which is no {kind} and so is not replaced: give another file name, or remove it"):
                check_output_file(path, "--output", kind)
    path.write_bytes(b"")
    for kind in kinds.values():
        check_output_file(path, "--output", kind)


def test_scratch_folder_obeys_the_environment(tmp_path, monkeypatch):
    """STREAMCNN_TMPDIR is where intermediate data go, and a memory disk is not."""
    monkeypatch.setenv("STREAMCNN_TMPDIR", str(tmp_path / "t"))
    assert scratch_folder().parent == tmp_path / "t"
    monkeypatch.setattr("streamcnn.files.is_memory_disk", lambda folder: True)
    with pytest.raises(OSError, match="set STREAMCNN_TMPDIR"):
        scratch_folder()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_memory_disks_are_recognised(tmp_path):
    """/dev/shm is RAM."""
    from pathlib import Path

    assert is_memory_disk(Path("/dev/shm"))


def test_lock_can_be_taken_again_after_release(tmp_path):
    """Release and acquire in one process."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(StoreError, match="in use"):
        FolderLock(tmp_path).acquire()
    lock.release()
    FolderLock(tmp_path).acquire()


def test_a_shard_that_a_forked_child_leaves_too_is_the_parents(tmp_path, monkeypatch):
    """Where the lock is no longer this process's by the end of the block, no file and no line is written."""
    with FeatureStore.create(tmp_path / "s") as store:
        refused = pytest.raises(StoreError, match="locked by the process that this one was forked from")
        with refused, store.writing("features", 0, 0, 2, 3, np.float32, "d") as writer:
            writer.write(np.ones((2, 3), np.float32), None)
            monkeypatch.setattr(store, "_in_parent", True)
        monkeypatch.undo()
        assert not store.shards("features") and not (tmp_path / "s/features/00000.h5").exists()
