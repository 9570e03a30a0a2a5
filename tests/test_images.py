"""Image sources over arrays and array files: one contract for all of them."""

import importlib
import itertools
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streamcnn import arrayfiles
from streamcnn.errors import DataError, FileError, ParameterError
from streamcnn.images import ArraySource, FlatFileSource, H5Source, ImageSource, open_images, write_images_h5
from streamcnn.plan import plan

N, H, W, C = 13, 6, 5, 3
LABELS = np.arange(N) % 4


def make_pixels(dtype=np.uint8, shape=(N, H, W, C)) -> np.ndarray:
    """Pixels of the given type that differ everywhere."""
    values = np.random.default_rng(3).integers(0, 2 if np.dtype(dtype).kind == "b" else 250, shape)
    return values.astype(dtype)


def read_all(source: ImageSource) -> np.ndarray:
    out = np.empty((source.n_samples, *source.image_shape), source.dtype)
    source.read(0, source.n_samples, out)
    return out


class Slices:
    """An array that can only be sliced, as zarr's can."""

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.largest = 0

    def __getitem__(self, key):
        self.largest = max(self.largest, self._array[key].nbytes)
        return self._array[key]


def make_source(kind: str, pixels: np.ndarray, folder: Path):
    """`pixels` (uint8 or float32) as a source of each kind, with labels."""
    if kind == "array":
        return open_images(pixels, LABELS)
    if kind == "slices":
        return open_images(Slices(pixels), LABELS)
    if kind == "memmap":
        mapped = np.memmap(folder / "map.bin", pixels.dtype, "w+", shape=pixels.shape)
        mapped[:] = pixels
        return open_images(mapped, LABELS)
    if kind == "npy":
        np.save(folder / "a.npy", pixels)
        np.save(folder / "a_labels.npy", LABELS)
        return open_images(folder / "a.npy")
    if kind == "npz":
        np.savez_compressed(folder / "a.npz", images=pixels, labels=LABELS)
        return open_images(str(folder / "a.npz"))
    if kind == "h5":
        write_images_h5(folder / "a.h5", [(pixels, LABELS)], len(pixels), pixels.shape[1:], pixels.dtype)
        return open_images(folder / "a.h5")
    if kind == "folder":
        for row, image in enumerate(pixels):
            (folder / f"tree/c{LABELS[row]}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"tree/c{LABELS[row]}/{row:02d}.png")
        return open_images(folder / "tree")
    raise AssertionError(kind)


KINDS = ("array", "slices", "memmap", "npy", "npz", "h5", "folder")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A source of every kind over the same uint8 pixels, and what it should deliver."""
    made = {}
    for kind in KINDS:
        pixels = make_pixels()
        order = np.argsort(LABELS, kind="stable") if kind == "folder" else np.arange(N)
        made[kind] = make_source(kind, pixels, tmp_path_factory.mktemp(kind)), pixels[order], LABELS[order]
    return made


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(chunk_size=st.integers(1, N + 4))
def test_chunks_of_any_size_hold_the_same_pixels(sources, kind, chunk_size):
    """Chunks of any size, joined, are the same pixels and labels, in views of one buffer."""
    source, pixels, labels = sources[kind]
    found, codes, buffers = [], [], set()
    for images, chunk_labels in source.iter_chunks(chunk_size):
        assert len(images) <= chunk_size
        buffers.add(images.__array_interface__["data"][0])
        found.append(images.copy())
        codes.append(chunk_labels)
    np.testing.assert_array_equal(np.concatenate(found), pixels)
    np.testing.assert_array_equal(np.concatenate(codes), labels)
    assert len(buffers) == 1


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(rows=st.lists(st.integers(0, N - 1), max_size=N).map(sorted))
def test_rows_are_read_at_any_place(sources, kind, rows):
    """Point reads of sorted rows, repeated or not, deliver these rows; each image read is counted."""
    source, pixels, _ = sources[kind]
    out = np.zeros((N, *source.image_shape), source.dtype)
    before = source.n_images_read
    source.read_rows(np.array(rows, int), out)
    np.testing.assert_array_equal(out[: len(rows)], pixels[rows])
    assert source.n_images_read - before == len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_source_reads_on(sources, kind):
    """A pickled source, taken while its file is open, reads the same pixels and has the same fingerprint."""
    source, pixels, _ = sources[kind]
    read_all(source)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    np.testing.assert_array_equal(read_all(copy), pixels)
    assert copy.fingerprint() == source.fingerprint()
    copy.close()
    np.testing.assert_array_equal(read_all(copy), pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_reads_no_pixel_of_files(sources, kind, monkeypatch):
    """A fingerprint is stable hex SHA-256 and counts no image as read; file sources do not read pixels for it."""
    source, _, _ = sources[kind]
    before = source.n_images_read
    if kind not in ("array", "slices"):
        monkeypatch.setattr(type(source), "_fill", None)
    first = source.fingerprint()
    assert first == source.fingerprint()
    assert len(bytes.fromhex(first)) == 32
    assert source.n_images_read == before


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_a_source(sources, kind):
    """Every source tells shape, types, classes, bytes, a description and an HTML table."""
    source, _, _ = sources[kind]
    assert (source.n_samples, source.image_shape, source.dtype) == (N, (H, W, C), np.uint8)
    assert source.labels.dtype == np.int32
    assert source.classes_.tolist() == (["c0", "c1", "c2", "c3"] if kind == "folder" else [0, 1, 2, 3])
    assert source.nbytes_ == N * H * W * C
    assert source.bad_files == []
    facts = source.describe()
    assert list(facts) == ["kind", "n_samples", "image_shape", "dtype", "n_classes", "path"]
    assert facts["n_classes"] == 4
    assert (facts["path"] is None) == (kind in ("array", "slices"))
    assert re.search(r"<th[^>]*>images</th><td[^>]*>13 of 6 x 5 x 3</td>", source._repr_html_())
    assert all(isinstance(size, int) and size > 0 for size in source.scratch_bytes(4).values())
    assert source.scratch_bytes(4)["labels"] >= 4 * N
    assert (source.name_of(0) != "") == (kind == "folder")
    with source as entered:
        assert entered is source


TYPES = ("bool", "u1", "u2", "i1", "i4", "u8", "f2", "f4", "f8", ">u2", ">f4", ">f8")


@pytest.mark.parametrize("kind", ["array", "slices", "memmap", "npy", "npz", "h5"])
@pytest.mark.parametrize("stored", TYPES)
def test_delivered_types(kind, stored, tmp_path, monkeypatch):
    """bool and uint8 come as uint8, uint16 as float32 divided by 257, every other real type as float32, in any byte order."""
    # pieces of 1000 bytes: several of the smaller images, with borders inside images
    for module in ("sources", "arrayfiles", "h5images"):
        monkeypatch.setattr(importlib.import_module(f"streamcnn.{module}"), "PIECE_BYTES", 1000)
    pixels = make_pixels(np.dtype(stored))
    source = make_source(kind, pixels, tmp_path)
    if stored in ("bool", "u1"):
        expected = pixels.astype(np.uint8)
    else:
        expected = pixels.astype(np.float32)
        if stored in ("u2", ">u2"):
            expected = expected / np.float32(257)
    assert source.dtype == expected.dtype
    np.testing.assert_array_equal(read_all(source), expected)
    assert source.nbytes_ == pixels.nbytes
    # the conversion buffer is bounded and declared
    assert source.scratch_bytes(4).get("conversion", 0) <= 1000


def test_bool_bytes_other_than_one_count_as_one(tmp_path):
    """A bool file may hold any non-zero byte for True; it is delivered as 1."""
    pixels = make_pixels(np.uint8)
    np.save(tmp_path / "a.npy", pixels.view(bool))
    np.testing.assert_array_equal(read_all(open_images(tmp_path / "a.npy")), (pixels != 0).astype(np.uint8))


@pytest.mark.parametrize("stored", [np.complex64, object, "U3", "S2", "M8[s]", [("a", "f4")]])
def test_types_that_are_no_pixels(stored):
    """Complex numbers, objects, strings, dates and records are refused."""
    with pytest.raises(DataError, match="images must be real numbers"):
        open_images(np.zeros((3, 4, 4), stored))


@pytest.mark.parametrize("kind", ["array", "slices", "memmap", "npy", "npz", "h5"])
@pytest.mark.parametrize(
    ("stored", "value", "word"),
    [("f4", np.nan, "NaN"), ("f4", -np.inf, "infinity"), ("f8", np.nan, "NaN"), ("f8", np.inf, "infinity"), ("f8", 1e39, "1e.39")],
)
def test_values_that_are_not_finite(kind, stored, value, word, tmp_path, monkeypatch):
    """NaN, infinity and what float32 cannot hold are errors that name the first row, wherever a chunk starts."""
    for module in ("sources", "arrayfiles", "h5images"):
        monkeypatch.setattr(importlib.import_module(f"streamcnn.{module}"), "PIECE_BYTES", 1000)
    pixels = make_pixels(stored)
    pixels[7, 2, 1, 0] = pixels[11, 0, 0, 0] = value
    source = make_source(kind, pixels, tmp_path)
    for start in (0, 5, 7):
        with pytest.raises(DataError, match=f"image 7 contains {word}"):
            source.read(start, N, np.empty((N, H, W, C), np.float32))
    source.read(0, 7, np.empty((7, H, W, C), np.float32))


def test_axes_of_arrays():
    """4-D as it is, 3-D is grey, rows are lines of pixels unless image_shape says how to fold them."""
    assert open_images(np.zeros((3, 4, 5, 7))).image_shape == (4, 5, 7)
    assert open_images(np.zeros((3, 4, 5))).image_shape == (4, 5, 1)
    assert open_images(np.zeros((3, 20))).image_shape == (1, 20, 1)
    assert open_images(np.zeros((3, 20)), image_shape=(4, 5)).image_shape == (4, 5, 1)
    rows = make_pixels(shape=(3, 60))
    folded = open_images(rows, image_shape=(4, 5, 3))
    np.testing.assert_array_equal(read_all(folded), rows.reshape(3, 4, 5, 3))
    assert open_images([[[1, 2], [3, 4]]]).image_shape == (2, 2, 1)
    assert open_images(np.zeros((3, 4, 5)), image_shape=(4, 5)).image_shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("data", "image_shape", "error", "message"),
    [
        (np.zeros(4), None, DataError, "got shape"),
        (np.float64(3), None, DataError, "got shape"),
        (np.zeros((1, 2, 3, 4, 5)), None, DataError, "got shape"),
        (np.zeros((0, 4, 4)), None, DataError, "at least one image"),
        (np.zeros((3, 0, 4)), None, DataError, "at least one image"),
        (np.zeros((3, 20)), (4, 4), DataError, "needs rows of 16 values, got rows of 20"),
        (np.zeros((3, 4, 5)), (5, 4), DataError, "image_shape is"),
        (np.zeros((3, 4, 5)), (4, 5, 3), DataError, "image_shape is"),
        (np.zeros((3, 20)), (20,), ParameterError, "image_shape must be"),
        (np.zeros((3, 20)), (4, -5), ParameterError, "image_shape must be"),
        (np.zeros((3, 20)), 20, ParameterError, "image_shape must be"),
        ([[1, 2], [3]], None, DataError, "images have one shape"),
    ],
)
def test_shapes_that_are_refused(data, image_shape, error, message):
    """Arrays that are no images, and image shapes that do not agree with them, are errors that say both."""
    with pytest.raises(error, match=message):
        open_images(data, image_shape=image_shape)


def test_sparse_matrix_is_refused():
    """A sparse matrix is refused with the way out."""
    from scipy.sparse import csr_array

    with pytest.raises(DataError, match=r"sparse matrix; give images\.toarray"):
        open_images(csr_array(np.eye(4)))


@pytest.mark.parametrize("order", ["F", "strided", "readonly", "reversed"])
def test_memory_layouts(order):
    """Arrays in Fortran order, strided, reversed or read-only are read as they look."""
    pixels = make_pixels()
    view = {
        "F": np.asfortranarray(pixels),
        "strided": np.repeat(pixels, 2, axis=2)[:, :, ::2],
        "readonly": pixels.copy(),
        "reversed": pixels[::-1].copy()[::-1],
    }[order]
    view.flags.writeable = order != "readonly"
    source = open_images(view)
    np.testing.assert_array_equal(read_all(source), pixels)
    assert source.fingerprint() == open_images(pixels).fingerprint()


def test_fingerprint_follows_content_and_labels():
    """In memory, another pixel, label, type or shape is another fingerprint; a copy is the same."""
    pixels = make_pixels()
    other = pixels.copy()
    other[-1, -1, -1, -1] ^= 1
    prints = [
        open_images(*args).fingerprint()
        for args in (
            (pixels, LABELS),
            (other, LABELS),
            (pixels, LABELS[::-1]),
            (pixels, LABELS + 1),
            (pixels,),
            (pixels.astype("u2"), LABELS),
            (pixels.reshape(N, -1), LABELS),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert open_images(pixels.copy(), LABELS.tolist()).fingerprint() == prints[0]


def test_fingerprint_of_files_follows_their_change(tmp_path):
    """A file's fingerprint changes with its time or size, and not with the folder it lies in."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "x.npy", make_pixels())
        os.utime(tmp_path / folder / "x.npy", ns=(10**18, 10**18))
    one, two = (open_images(tmp_path / folder / "x.npy") for folder in ("a", "b"))
    assert one.fingerprint() == two.fingerprint()
    os.utime(tmp_path / "b/x.npy", ns=(10**18, 10**18 + 1000))
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, None])
def test_chunk_size_must_be_a_positive_whole_number(chunk_size):
    """chunk_size is a whole number of at least 1."""
    with pytest.raises(ParameterError, match="chunk_size must be"):
        next(open_images(make_pixels()).iter_chunks(chunk_size))


def test_read_checks_rows_and_buffer():
    """Rows out of range or unsorted and buffers of another type, shape or order are errors, not silent conversions."""
    source = open_images(make_pixels())
    for start, stop in ((-1, 2), (0, N + 1), (3, 2)):
        with pytest.raises(ParameterError, match="rows must lie within"):
            source.read(start, stop, np.empty((N, H, W, C), np.uint8))
    for out in (np.empty((N, H, W, C)), np.empty((2, H, W, C), np.uint8), np.empty((N, W, H, C), np.uint8).transpose(0, 2, 1, 3)):
        with pytest.raises(ParameterError, match="out must be"):
            source.read(0, 3, out)
    with pytest.raises(ParameterError, match="rows must be sorted"):
        source.read_rows(np.array([3, 1]), np.empty((2, H, W, C), np.uint8))


# labels


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([3, 1, 3], np.uint8), [1, 3]),
        (np.array([-3, 7, -3], ">i2"), [-3, 7]),
        ([True, False, True], [0, 1]),
        ([2.0, -1.0, 2.0], [-1, 2]),
        (["b", "ä", "b"], ["b", "ä"]),
        (np.array(["b", "ä", "b"], object), ["b", "ä"]),
        (np.array([4, 2, 4], object), [2, 4]),
        ([b"x", "ä".encode(), b"x"], ["x", "ä"]),
        (np.array([[3], [1], [3]]), [1, 3]),
    ],
)
def test_labels_of_every_kind(labels, classes):
    """Integers, bool, whole floats and strings are labels; codes point into the sorted classes."""
    source = open_images(np.zeros((3, 2, 2), np.uint8), labels)
    assert source.classes_.tolist() == classes
    assert source.classes_.dtype.kind in "iuU"
    values = [classes[code] for code in source.labels]
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1, 2], "whole numbers or strings, got 0.5"),
        ([np.nan, 1, 2], "got nan"),
        ([1j, 1, 2], "got type complex"),
        (np.array([1, "a", 2], object), "all whole numbers or all strings, got int, str"),
        (np.array([None, 1, 2], object), "got NoneType, int|got int, NoneType|got NoneType"),
        ([1, 2], "one value for each of the 3 images, got 2"),
        (np.zeros((3, 2), int), r"got shape \(3, 2\)"),
        (3, "got shape"),
        ([b"\xff", b"a", b"b"], "UTF-8"),
    ],
)
def test_labels_that_are_refused(labels, message):
    """Fractions, mixtures, wrong counts and shapes of labels are errors that show the value."""
    with pytest.raises(DataError, match=message):
        open_images(np.zeros((3, 2, 2), np.uint8), labels)


def test_labels_that_are_needed(tmp_path):
    """need_labels refuses every kind of source without labels and says what to give."""
    pixels = make_pixels()
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", X=pixels)
    write_images_h5(tmp_path / "a.h5", [(pixels, None)], N, (H, W, C))
    ways_out = {"a.npy": "a_labels.npy", "a.npz": "labels_key= one of X", "a.h5": "labels="}
    for data, way_out in ((pixels, "give one label per image"), *ways_out.items()):
        path = tmp_path / data if isinstance(data, str) else data
        with pytest.raises(DataError, match=way_out):
            open_images(path, need_labels=True)
        assert open_images(path).labels is None
        assert open_images(path, LABELS, need_labels=True).classes_.tolist() == [0, 1, 2, 3]
    (tmp_path / "cat").mkdir()
    for i in range(2):
        Image.fromarray(pixels[i]).save(tmp_path / "cat" / f"{i}.png")
    where = r"cat: labels are needed, and there are none, as no image lies in a subfolder \(perhaps the path is one level too deep\): give "
    with pytest.raises(DataError, match=where):
        open_images(tmp_path / "cat", need_labels=True)
    with pytest.raises(DataError, match=r"cat: labels are missing, as no image lies in a subfolder \(perhaps"):
        plan(open_images(tmp_path / "cat"))


def test_an_open_source_is_returned_as_it_is():
    """A source passes through; labels cannot be put on it."""
    source = open_images(make_pixels())
    assert open_images(source) is source
    with pytest.raises(ParameterError, match="beside an image source"):
        open_images(source, LABELS)
    with pytest.raises(DataError, match="labels are needed"):
        open_images(source, need_labels=True)


def test_array_likes_are_asked_for_small_slices(monkeypatch):
    """Anything with shape, dtype and slicing is read in pieces of the declared size, also for the fingerprint."""
    pixels = make_pixels(shape=(64, 6, 5, 3))
    monkeypatch.setattr(importlib.import_module("streamcnn.sources"), "PIECE_BYTES", 1000)
    data = Slices(pixels)
    source = open_images(data)
    np.testing.assert_array_equal(read_all(source), pixels)
    source.fingerprint()
    assert 0 < data.largest <= source.scratch_bytes(64)["conversion"] <= 1000


# memory-mapped and .npy files


def test_memmap_and_npy_are_read_through_a_file(tmp_path, monkeypatch):
    """Memory maps, their slices and plain arrays over them, and .npy files are read by readinto, from the right byte."""
    calls = []
    real = arrayfiles.read_fully
    monkeypatch.setattr(arrayfiles, "read_fully", lambda file, view, where: (calls.append(len(view)), real(file, view, where)))
    pixels = make_pixels()
    path = tmp_path / "größe 像.npy"
    np.save(path, pixels)
    mapped = np.load(path, mmap_mode="r")
    for data, expected in (
        (path, pixels),
        (mapped, pixels),
        (mapped[4:9], pixels[4:9]),
        (np.asarray(mapped)[2:], pixels[2:]),
        (mapped[3:7].reshape(4, -1), pixels[3:7].reshape(4, 1, -1, 1)),
        (mapped[1:][1:4], pixels[2:5]),
    ):
        source = open_images(data)
        assert isinstance(source, FlatFileSource)
        calls.clear()
        np.testing.assert_array_equal(read_all(source), expected)
        assert sum(calls) == expected.nbytes
    # what does not lie in C order in the file is taken from memory
    for view in (mapped[::2], mapped[:, :, ::-1], mapped.T):
        assert isinstance(open_images(view), ArraySource)
    np.testing.assert_array_equal(read_all(open_images(mapped[::2])), pixels[::2])


def test_a_map_that_cannot_be_read_as_a_file_is_declared(tmp_path):
    """Every page of a map that is read stays resident: a slice with steps declares the whole file, a whole map and an array nothing."""
    np.save(tmp_path / "a.npy", np.zeros((40, 50, 50), np.uint8))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert open_images(mapped[::2]).scratch_bytes(4)["mapped pages"] >= 40 * 50 * 50
    assert "mapped pages" not in open_images(mapped).scratch_bytes(4)
    assert "mapped pages" not in open_images(np.array(mapped)[::2]).scratch_bytes(4)


def test_memmap_changes_are_seen(tmp_path):
    """Writes to a shared map reach the reader; those of a copy-on-write map, which the file does not have, too."""
    shared = np.memmap(tmp_path / "a.bin", np.uint8, "w+", shape=(3, 2, 2))
    shared[1] = 7
    assert read_all(open_images(shared))[1].max() == 7
    private = np.memmap(tmp_path / "a.bin", np.uint8, "c", shape=(3, 2, 2))
    private[2] = 9
    assert isinstance(open_images(private), ArraySource)
    assert read_all(open_images(private))[2].max() == 9


def test_memmap_whose_file_is_gone_is_read_from_memory(tmp_path):
    """A map that outlives its file is still read."""
    mapped = np.memmap(tmp_path / "a.bin", np.uint8, "w+", shape=(3, 2, 2))
    mapped[:] = 5
    try:
        (tmp_path / "a.bin").unlink()
    except PermissionError:
        pytest.skip("this system keeps mapped files")
    assert (read_all(open_images(mapped)) == 5).all()


def test_reading_a_large_npy_adds_no_memory(tmp_path):
    """Streaming 48 MiB from .npy leaves the process's memory where it was: no mapped page is touched."""
    psutil = pytest.importorskip("psutil")
    images = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (48, 1024, 1024))
    images[:] = 1
    del images
    source = open_images(np.load(tmp_path / "a.npy", mmap_mode="r"))
    process = psutil.Process()
    chunks = source.iter_chunks(1)
    next(chunks)
    before = process.memory_info().rss
    for _ in chunks:
        pass
    # 47 MiB if pages were touched; 8 MiB leaves room for the allocator
    assert process.memory_info().rss - before < 8 << 20


def test_npy_that_cannot_be_used(tmp_path):
    """Fortran order, objects, truncation, text and a changed file are errors of one line that name the file."""
    np.save(tmp_path / "f.npy", np.asfortranarray(make_pixels()))
    with pytest.raises(DataError, match=r"f\.npy: is in Fortran order; save numpy\.ascontiguousarray"):
        open_images(tmp_path / "f.npy")
    np.save(tmp_path / "o.npy", np.array([{}, []], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"o\.npy: holds Python objects"):
        open_images(tmp_path / "o.npy")
    (tmp_path / "t.npy").write_text("no array\n" * 9)
    with pytest.raises(FileError, match=r"t\.npy: not a \.npy file \(.*\)$"):
        open_images(tmp_path / "t.npy")
    np.save(tmp_path / "c.npy", make_pixels())
    whole = (tmp_path / "c.npy").read_bytes()
    (tmp_path / "c.npy").write_bytes(whole[:-10])
    with pytest.raises(FileError, match=r"c\.npy: is truncated, 10 bytes"):
        open_images(tmp_path / "c.npy")
    (tmp_path / "c.npy").write_bytes(whole)
    source = open_images(tmp_path / "c.npy")
    (tmp_path / "c.npy").write_bytes(whole[:-10])
    with pytest.raises(FileError, match=r"c\.npy: is truncated, it ends 10 bytes too early"):
        read_all(source)
    np.save(tmp_path / "c.npy", make_pixels())
    np.save(tmp_path / "c_labels.npy", LABELS[:5])
    with pytest.raises(DataError, match=r"c_labels\.npy: must hold one label for each of the 13 images, got shape \(5,\)"):
        open_images(tmp_path / "c.npy")


# .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_forward_and_backward(tmp_path, save, monkeypatch):
    """A member is streamed: reading on goes on in the stream, going back starts it again, and both are right."""
    monkeypatch.setattr(arrayfiles, "_UNZIP_BYTES", 64)
    pixels = make_pixels(np.float64)
    save(tmp_path / "a.npz", X=pixels, y=LABELS.astype(str))
    source = open_images(tmp_path / "a.npz")
    assert source.classes_.tolist() == ["0", "1", "2", "3"]
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(arrayfiles.zipfile, "ZipFile", lambda *args: (opened.append(1), real(*args))[1])
    out = np.empty((3, H, W, C), np.float32)
    for start, times in ((0, 1), (3, 1), (8, 1), (2, 2), (5, 2), (0, 3)):
        source.read(start, start + 3, out)
        np.testing.assert_array_equal(out, pixels[start : start + 3].astype(np.float32))
        assert len(opened) == times
    source.close()


def test_npz_keys(tmp_path):
    """images and labels go before X and y; keys can be given; a missing key lists those there."""
    one, two = make_pixels(), make_pixels()[::-1].copy()
    np.savez(tmp_path / "a.npz", X=one, images=two, y=LABELS, labels=LABELS + 5)
    source = open_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(read_all(source), two)
    assert source.classes_.tolist() == [5, 6, 7, 8]
    source = open_images(tmp_path / "a.npz", images_key="X", labels_key="y")
    np.testing.assert_array_equal(read_all(source), one)
    assert source.classes_.tolist() == [0, 1, 2, 3]
    with pytest.raises(FileError, match="images_key is 'Z' but the file holds X, images, y, labels"):
        open_images(tmp_path / "a.npz", images_key="Z")
    with pytest.raises(FileError, match="labels_key is 'Z' but the file holds"):
        open_images(tmp_path / "a.npz", labels_key="Z")
    np.savez(tmp_path / "b.npz", other=one)
    with pytest.raises(FileError, match="no member images or X; give images_key= one of other"):
        open_images(tmp_path / "b.npz")


def test_npz_that_cannot_be_used(tmp_path):
    """Text, objects, Fortran order, a header that promises too much and damaged data are errors that name the file."""
    (tmp_path / "t.npz").write_text("no zip")
    with pytest.raises(FileError, match=r"t\.npz: not a readable \.npz file"):
        open_images(tmp_path / "t.npz")
    np.savez(tmp_path / "o.npz", images=make_pixels(), labels=np.array([None] * N))
    with pytest.raises(DataError, match=r"o\.npz, member labels: holds Python objects"):
        open_images(tmp_path / "o.npz")
    np.savez(tmp_path / "f.npz", images=np.asfortranarray(make_pixels()))
    with pytest.raises(DataError, match="Fortran order"):
        open_images(tmp_path / "f.npz")
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive, archive.open("images.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64)})
        member.write(bytes(100))
    with pytest.raises(FileError, match="promises 4096000000000 bytes, 100 are stored"):
        open_images(tmp_path / "p.npz")
    np.savez(tmp_path / "d.npz", images=np.zeros((9, 40, 40), np.uint8))
    whole = bytearray((tmp_path / "d.npz").read_bytes())
    whole[5000] ^= 1
    (tmp_path / "d.npz").write_bytes(whole)
    source = open_images(tmp_path / "d.npz")
    with pytest.raises(FileError, match=r"d\.npz, member images: cannot be read \(Bad CRC"):
        read_all(source)


# HDF5


def test_h5_keys_and_label_types(tmp_path):
    """Keys may be nested; labels may be integers, fixed or variable strings; a missing key lists those there."""
    pixels = make_pixels()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/in/pictures"] = pixels
        file["deep/names"] = ["ä" if label else "b" for label in LABELS]
        file["fixed"] = np.array([b"x", b"y"])[LABELS % 2]
        file["numbers"] = LABELS[:, None]
    for key, classes in (("deep/names", ["b", "ä"]), ("fixed", ["x", "y"]), ("/numbers", [0, 1, 2, 3])):
        source = open_images(tmp_path / "a.h5", images_key="deep/in/pictures", labels_key=key)
        assert source.classes_.tolist() == classes
    np.testing.assert_array_equal(read_all(source), pixels)
    assert open_images(tmp_path / "a.h5", images_key="deep/in/pictures").labels is None
    for key in ("images", "deep/images", "fixed/x", "", "/"):
        with pytest.raises(FileError, match=r"is not there; the file holds deep/in/pictures, deep/names, fixed, numbers"):
            open_images(tmp_path / "a.h5", images_key=key or "//")
    with pytest.raises(FileError, match="labels_key 'labels' is not there"):
        open_images(tmp_path / "a.h5", images_key="deep/in/pictures", labels_key="labels")
    with pytest.raises(FileError, match="'deep' is a group"):
        open_images(tmp_path / "a.h5", images_key="deep")
    with pytest.raises(DataError, match=r"must hold one label for each of the 13 images, got shape \(13, 6, 5, 3\)"):
        open_images(tmp_path / "a.h5", images_key="deep/in/pictures", labels_key="deep/in/pictures")


def test_h5_that_leads_elsewhere_is_refused(tmp_path):
    """External and soft links, external storage, virtual data sets, objects and text named .h5 are refused."""
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["images"] = make_pixels()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["away"] = h5py.ExternalLink("b.h5", "images")
        file["soft"] = h5py.SoftLink("/away")
        file.create_dataset("stored", (4, 2, 2), np.uint8, external=[("raw.bin", 0, h5py.h5f.UNLIMITED)])
        layout = h5py.VirtualLayout((N, H, W, C), np.uint8)
        layout[:] = h5py.VirtualSource("b.h5", "images", (N, H, W, C))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("lists", (3, 2), h5py.vlen_dtype(np.int32))
        file.create_dataset("refs", (3, 2), h5py.ref_dtype)
    for key, message in (
        ("away", "leads elsewhere by a link"),
        ("soft", "leads elsewhere by a link"),
        ("stored", "values in other files"),
        ("virtual", "values in other files"),
        ("lists", "must hold numbers"),
        ("refs", "must hold numbers"),
    ):
        with pytest.raises((DataError, FileError), match=message):
            open_images(tmp_path / "a.h5", images_key=key)
    (tmp_path / "t.h5").write_text("no HDF5")
    with pytest.raises(FileError, match=r"t\.h5: not a readable HDF5 file \(.*\)$"):
        open_images(tmp_path / "t.h5")


def test_h5_slices_are_never_more_than_asked(tmp_path, monkeypatch):
    """Only the slices asked for are read, straight into the caller's buffer or a declared one."""
    write_images_h5(tmp_path / "a.h5", [(make_pixels("f8"), LABELS)], N, (H, W, C), "f8")
    source = open_images(tmp_path / "a.h5")
    seen = []
    real = h5py.Dataset.read_direct
    monkeypatch.setattr(h5py.Dataset, "read_direct", lambda data, out, *key: (seen.append(out.nbytes), real(data, out, *key)))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    source.read(3, 9, np.empty((6, H, W, C), np.float32))
    assert sum(seen) == 6 * H * W * C * 8
    assert max(seen) <= source.scratch_bytes(6)["conversion"]


def test_h5_chunk_cache_is_chosen_and_declared(tmp_path):
    """The chunk cache holds the chunks that one image touches, at least 1 MiB; data without chunks has none."""
    pixels = np.zeros((300, 64, 64, 1), np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("small", data=pixels, chunks=(10, 64, 64, 1))
        file.create_dataset("wide", data=pixels, chunks=(300, 64, 32, 1), compression="lzf")
        file.create_dataset("plain", data=pixels)
    for key, cache, unpacking in (("small", 1 << 20, 0), ("wide", 300 * 64 * 64, 2 * 300 * 64 * 32), ("plain", 0, 0)):
        source = open_images(tmp_path / "a.h5", images_key=key)
        read_all(source)
        assert source.scratch_bytes(8).get("chunk cache", 0) == cache
        if cache:
            assert source._data.id.get_access_plist().get_chunk_cache()[1] == cache
        assert source.scratch_bytes(8).get("unpacking", 0) == unpacking
        source.close()


def test_an_open_h5_dataset_is_a_source(tmp_path):
    """An h5py data set is read by slices; opened for reading it is identified by its file, not by a pass over its pixels."""
    pixels = make_pixels()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["deep/images"] = pixels
        source = open_images(file["deep/images"], LABELS)
        assert isinstance(source, ArraySource)
        np.testing.assert_array_equal(read_all(source), pixels)
    with h5py.File(tmp_path / "a.h5", "r") as file:
        source = open_images(file["deep/images"], LABELS)
        assert isinstance(source, H5Source)
        np.testing.assert_array_equal(read_all(source), pixels)
    source.close()
    np.testing.assert_array_equal(read_all(pickle.loads(pickle.dumps(source))), pixels)  # noqa: S301


def test_damaged_h5_is_an_error_that_names_the_rows(tmp_path):
    """A flipped pixel is found by the checksum that write_images_h5 puts on its chunks."""
    pixels = make_pixels()
    write_images_h5(tmp_path / "a.h5", [(pixels, LABELS)], N, (H, W, C))
    whole = bytearray((tmp_path / "a.h5").read_bytes())
    place = bytes(whole).find(pixels[2].tobytes())
    whole[place] ^= 1
    (tmp_path / "a.h5").write_bytes(whole)
    with pytest.raises(FileError, match=r"a\.h5, key images: images 0 to 12 cannot be read"):
        read_all(open_images(tmp_path / "a.h5"))


@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(0, N), max_size=5).map(sorted), text=st.booleans())
def test_written_blocks_of_any_size_are_the_same_file(tmp_path_factory, cuts, text):
    """write_images_h5 gives the same images and labels however they are cut into blocks."""
    path = tmp_path_factory.mktemp("write") / "a.h5"
    pixels, labels = make_pixels(np.uint16), LABELS.astype(str) if text else LABELS
    edges = [0, *cuts, N]
    write_images_h5(path, ((pixels[a:b], labels[a:b], "more") for a, b in itertools.pairwise(edges)), N, (H, W, C), np.uint16)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["images"], pixels)
        assert file["images"].fletcher32
        stored = file["labels"].asstr()[...] if text else file["labels"][...]
        np.testing.assert_array_equal(stored, labels)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.h5"]


def test_written_file_is_complete_or_absent(tmp_path):
    """When blocks are too many, too few or of another shape, or writing fails, no file is left."""
    pixels = make_pixels()
    for blocks, message in (
        ([(pixels, None)] * 2, "must hold 13 images of shape"),
        ([(pixels[:4], None)], "must hold 13 images in all, got 4"),
        ([(pixels[:, :, :, :1], None)], "must hold 13 images of shape"),
        ([(pixels[:4], LABELS[:4]), (pixels[4:], None)], "labels in every block or in none"),
        ([(pixels[:4], None), (pixels[4:], LABELS[4:])], "labels in every block or in none"),
    ):
        with pytest.raises(DataError, match=message):
            write_images_h5(tmp_path / "a.h5", blocks, N, (H, W, C))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileError, match=r"a\.h5: cannot be written"):
        write_images_h5(tmp_path / "none/a.h5", [(pixels, None)], N, (H, W, C))


# paths


def test_paths_that_are_no_data(tmp_path):
    """A missing path, an unknown extension and a wrong on_error are errors that say what is accepted."""
    with pytest.raises(FileError, match="nowhere: no such file or folder"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(FileError, match=r"a\.csv: not a supported kind of file; supported are folders, \.h5"):
        open_images(str(tmp_path / "a.csv"))
    with pytest.raises(ParameterError, match="on_error must be"):
        open_images(make_pixels(), on_error="ignore")


def test_arrays_in_pytorchs_order_are_warned_of():
    """Three rows of many columns and channels are more likely three channels; colour images and flat ones are not asked about."""
    with pytest.warns(UserWarning, match=r"if they are of 3 channels, as PyTorch orders them, give images\.transpose\(0, 2, 3, 1\)"):
        open_images(np.zeros((2, 3, 16, 16), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((2, 16, 16, 3), (2, 3, 16, 1), (2, 1, 16), (2, 5, 16, 16)):
            open_images(np.zeros(shape, np.uint8))
