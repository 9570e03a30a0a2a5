"""Data sets of any size made from a few images."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcnn.errors import DataError, ParameterError
from streamcnn.images import open_images
from streamcnn.kernels.warp import crop
from streamcnn.labels import encode_labels, encode_pieces
from streamcnn.variations import VariedImages

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import make_dataset  # lives beside the package, not in it


@pytest.fixture(scope="module")
def few():
    """Ten colour images of 12 x 9 with labels."""
    rng = np.random.default_rng(0)
    return open_images(rng.integers(0, 256, (10, 12, 9, 3), dtype=np.uint8), labels=list("aabbccddee"))


def read(source, start, stop):
    """Rows as an array."""
    out = np.empty((stop - start, *source.image_shape), np.uint8)
    source.read(start, stop, out)
    return out


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 60), size=st.integers(1, 40))
def test_any_chunk_has_the_same_pixels(few, start, size):
    """A row is a function of seed and row number, whatever is read with it; a longer stream starts with a shorter one."""
    stream = VariedImages(few, 100, (16, 20), seed=3)
    whole = read(stream, 0, 100)
    np.testing.assert_array_equal(read(stream, start, start + size), whole[start : start + size])
    np.testing.assert_array_equal(read(VariedImages(few, 400, (16, 20), seed=3), 0, 100), whole)
    assert not np.array_equal(read(VariedImages(few, 100, (16, 20), seed=4), 0, 100), whole)


def test_labels_are_those_of_the_originals(few):
    """Every image has the label of the picture it was cut from, and every class comes up."""
    stream = VariedImages(few, 200, (8, 8))
    assert stream.classes_.tolist() == list("abcde")
    np.testing.assert_array_equal(stream.labels, np.arange(10)[stream.original_index] // 2)
    assert set(stream.labels) == set(range(5))


def test_crops_match_a_slow_reference():
    """Bilinear crops, mirrored in half of the rows, lighter or darker: one by one in float64 from the same draws."""
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (3, 11, 14, 2), dtype=np.uint8)
    keys, originals = rng.integers(0, 2**63, 40).astype(np.uint64), rng.integers(0, 3, 40)
    out = np.empty((40, 7, 9, 2), np.uint8)
    crop(pictures, keys, originals, True, out, 3)
    mirrored = 0
    for row in range(40):
        draws = [uniform(int(keys[row]), stream) for stream in range(1, 6)]
        scale = 0.6 + 0.4 * (draws[0] + 1) / 2
        top, left = ((draws[i] + 1) / 2 * (1 - scale) * side for i, side in ((1, 11), (2, 14)))
        mirrored += draws[3] < 0
        expected = np.empty((7, 9, 2))
        for y in range(7):
            for x in range(9):
                place = 8 - x if draws[3] < 0 else x
                v = np.clip(top + (y + 0.5) * scale * 11 / 7 - 0.5, 0, 10)
                u = np.clip(left + (place + 0.5) * scale * 14 / 9 - 0.5, 0, 13)
                i, j = min(int(v), 9), min(int(u), 12)
                a, b = v - i, u - j
                box = pictures[originals[row], i : i + 2, j : j + 2].astype(float)
                expected[y, x] = np.tensordot([[(1 - a) * (1 - b), (1 - a) * b], [a * (1 - b), a * b]], box, 2)
        expected = np.minimum(expected * (1 + 0.25 * draws[4]), 255)
        # rounded to whole numbers from float32, so half a unit and 2**-16 of 255
        assert np.abs(out[row] - expected).max() <= 0.5 + 255 * 2**-16
    assert 10 < mirrored < 30


def uniform(key, stream):
    """The kernel's draw in [-1, 1) in Python's integers: splitmix64 of key + stream * golden ratio."""
    mask = 2**64 - 1
    x = (key + stream * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return 2.0 * ((x ^ (x >> 31)) >> 11) * 2.0**-53 - 1.0


def test_digits_are_not_mirrored(few):
    """With mirror=False nothing is mirrored, and that makes another data set."""
    plain, mirrored = VariedImages(few, 60, (9, 9), mirror=False), VariedImages(few, 60, (9, 9))
    same = [np.array_equal(a, b) for a, b in zip(read(plain, 0, 60), read(mirrored, 0, 60))]
    flipped = [np.array_equal(a, b[:, ::-1]) for a, b in zip(read(plain, 0, 60), read(mirrored, 0, 60))]
    assert sum(same) + sum(flipped) == 60
    assert min(sum(same), sum(flipped)) > 15
    assert plain.fingerprint() != mirrored.fingerprint()


def test_what_cannot_be_varied_is_refused(few):
    """Floats, missing labels and a size without pixels."""
    with pytest.raises(DataError, match="need 8-bit images with labels, got float32"):
        VariedImages(open_images(np.zeros((3, 4, 4), np.float32), labels=[0, 1, 2]), 5, (4, 4))
    with pytest.raises(DataError, match="got uint8 without labels"):
        VariedImages(open_images(np.zeros((3, 4, 4), np.uint8)), 5, (4, 4))
    with pytest.raises(ParameterError, match="size must be"):
        VariedImages(few, 5, (0, 4))


def test_the_tool_writes_rows_or_bytes_from_a_folder_or_digits(tmp_path, tree, capsys):
    """The file opens as a data set of the asked size, twice the same, its labels named; a wrong folder is one line."""
    for name in ("a.h5", "b.h5"):
        assert make_dataset.main([str(tmp_path / name), "--from", str(tree[0]), "--size", "24x20", "--bytes", "300KiB"]) == 0
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    source = open_images(tmp_path / "a.h5", need_labels=True)
    assert source.image_shape == (24, 20, 1)
    assert source.n_samples == -(-300 * 1024 // 480)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["label_names"].asstr()[:].tolist() == [f"digit {i}" for i in range(10)]
    assert make_dataset.main([str(tmp_path / "c.h5"), "--from", "digits", "--size", "16x16", "--rows", "50"]) == 0
    assert open_images(tmp_path / "c.h5").n_samples == 50
    assert "50 images of 16 x 16 x 1" in capsys.readouterr().err
    assert make_dataset.main([str(tmp_path / "d.h5"), "--from", str(tmp_path / "none"), "--rows", "5"]) == 1
    assert "make_dataset:" in capsys.readouterr().err


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(-5, 5), min_size=1, max_size=60), cuts=st.lists(st.integers(1, 20), min_size=1), text=st.booleans())
def test_labels_in_pieces_are_labels_as_a_whole(labels, cuts, text):
    """However labels are cut: the classes of `numpy.unique`, and the place of each label among them."""
    values = np.array([f"class {label}" for label in labels]) if text else np.array(labels)
    pieces, start = [], 0
    while start < len(values):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(values[start : start + size])
        start += size
    codes, classes = encode_pieces(iter(pieces), len(values))
    expected, places = np.unique(values, return_inverse=True)
    assert (classes.tolist(), codes.tolist()) == (expected.tolist(), places.tolist())
    assert codes.dtype == np.int32
    whole = encode_labels(values, len(values))
    assert (whole[0].tolist(), whole[1].tolist(), whole[1].dtype.kind) == (codes.tolist(), classes.tolist(), values.dtype.kind)
