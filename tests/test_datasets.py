"""Digits, the stream of distorted digits, and Extended Yale B."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from streamcnn.datasets import (
    YALE_SIZES,
    digits_split,
    enlarged_digits,
    extended_yale_b,
    load_digits_images,
    yale_subset,
)
from streamcnn.errors import DataError, FileError, ParameterError


def read(source, start, stop):
    out = np.empty((stop - start, *source.image_shape), np.uint8)
    source.read(start, stop, out)
    return out


def test_digits_keep_their_pixels_and_labels():
    """At 8 x 8 the digits are scikit-learn's scaled to 255; enlarged 8-fold their means stay."""
    bunch = load_digits()
    images, labels = load_digits_images(8)
    np.testing.assert_array_equal(images[:, :, :, 0], np.rint(bunch.images * (255 / 16)))
    np.testing.assert_array_equal(labels, bunch.target)
    large, _ = load_digits_images()
    assert (large.shape, large.dtype) == ((1797, 64, 64, 1), np.uint8)
    # bilinear weights sum to one; repeated edges shift the mean a little where a digit touches them
    assert np.abs(large.mean((1, 2, 3)) - images.mean((1, 2, 3))).max() < 8
    assert images.max() == 255


def test_digits_of_any_size():
    """Other sizes, odd and small ones too, are made."""
    for size in (1, 5, 13):
        assert load_digits_images(size)[0].shape == (1797, size, size, 1)
    with pytest.raises(ParameterError, match="size must be a whole number of at least 1, got 0"):
        load_digits_images(0)


def test_split_is_stratified_and_follows_the_seed():
    """80 % of every class are for training; the same seed gives the same split, another seed another."""
    labels = load_digits().target
    train = digits_split(0)
    assert (train.dtype, train.shape) == (bool, (1797,))
    for digit in range(10):
        rows = labels == digit
        assert train[rows].sum() == round(0.8 * rows.sum())
    np.testing.assert_array_equal(train, digits_split(0))
    # of two independent splits 32 % of the rows differ
    assert 0.2 < (train != digits_split(1)).mean() < 0.45


@settings(deadline=None, max_examples=15)
@given(start=st.integers(0, 60), count=st.integers(1, 60), chunk_size=st.integers(1, 40))
def test_rows_of_the_stream_do_not_depend_on_chunks(start, count, chunk_size):
    """Any range in chunks of any size, of a longer stream too, has the same pixels, labels and originals."""
    whole = enlarged_digits(120, 17, seed=5)
    expected = read(whole, 0, 120)
    np.testing.assert_array_equal(read(whole, start, start + count), expected[start : start + count])
    images, labels, originals = [], [], []
    for part, part_labels, part_originals in enlarged_digits(90, 17, seed=5).blocks(chunk_size):
        images.append(part.copy())
        labels.append(part_labels)
        originals.append(part_originals)
    np.testing.assert_array_equal(np.concatenate(images), expected[:90])
    np.testing.assert_array_equal(np.concatenate(originals), whole.original_index[:90])
    np.testing.assert_array_equal(np.concatenate(labels), whole.classes_[whole.labels[:90]])


def test_thread_count_does_not_change_the_stream(monkeypatch):
    """One thread and several give the same pixels."""
    source = enlarged_digits(50)
    several = []
    for threads in (1, 2, 5):
        monkeypatch.setattr("streamcnn.variations.resolve_n_jobs", lambda n_jobs, threads=threads: threads)
        several.append(read(source, 0, 50))
    np.testing.assert_array_equal(several[0], several[1])
    np.testing.assert_array_equal(several[0], several[2])


def test_labels_belong_to_the_originals():
    """Each label is that of the digit the row was made from; only allowed originals are drawn, all of them, evenly."""
    allowed = np.flatnonzero(~digits_split(0))
    source = enlarged_digits(20_000, 8, originals=allowed)
    np.testing.assert_array_equal(source.classes_[source.labels], load_digits().target[source.original_index])
    drawn = np.bincount(source.original_index, minlength=1797)
    assert (drawn[allowed] > 0).all()
    assert drawn.sum() == drawn[allowed].sum()
    # 20,000 draws of 359: 56 each, deviation 7.5; six deviations
    assert np.abs(drawn[allowed] - 20_000 / len(allowed)).max() < 45


def mix(x: int) -> int:
    """splitmix64's finaliser on Python integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


GOLDEN = 0x9E3779B97F4A7C15


def naive_row(digit: np.ndarray, key: int, size: int) -> np.ndarray:
    """One distorted digit pixel by pixel in float64, from its formula: digit (8, 8) from 0 to 255 -> (size, size) unrounded."""
    angle, scale, down, across = (2 * (mix((key + n * GOLDEN) % 2**64) >> 11) / 2**53 - 1 for n in (1, 2, 3, 4))
    angle, scale = np.radians(12 * angle), 1 + 0.15 * scale
    out = np.empty((size, size))
    for y in range(size):
        for x in range(size):
            dy, dx = (y + 0.5) / size - 0.5 - 0.1 * down, (x + 0.5) / size - 0.5 - 0.1 * across
            v = ((np.cos(angle) * dy - np.sin(angle) * dx) / scale + 0.5) * 8 - 0.5
            u = ((np.sin(angle) * dy + np.cos(angle) * dx) / scale + 0.5) * 8 - 0.5
            value = 0.0
            for i in range(8):
                for j in range(8):
                    value += digit[i, j] * max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j))
            bits = mix((key + (8 + y * size + x) * GOLDEN) % 2**64)
            noise = (sum((bits >> shift) % 256 for shift in (0, 8, 16, 24)) - 510) * 8 / 147.8
            out[y, x] = min(max(value + noise, 0), 255)
    return out


def test_the_stream_equals_its_formula():
    """Each pixel is that of the formula in float64, up to the rounding of float32 and to whole levels."""
    source = enlarged_digits(6, 11, seed=3)
    found = read(source, 0, 6)[..., 0]
    digits = load_digits().images * (255 / 16)
    seed_key = mix((0x5EED + 3 * GOLDEN) % 2**64)
    for row in range(6):
        key = mix((seed_key + row * GOLDEN) % 2**64)
        assert source.original_index[row] == key % 1797
        expected = naive_row(digits[source.original_index[row]], key, 11)
        # half a level of rounding, and 0.01 for float32 positions (1e-6 pixels) times slopes of up to 255
        assert np.abs(found[row] - expected).max() < 0.51


def test_the_stream_looks_like_its_originals():
    """A distorted digit is nearer to its own original than to others."""
    source = enlarged_digits(400, 64, seed=1)
    found = read(source, 0, 400)
    originals = load_digits_images(64)[0]

    def similarity(shift):
        pairs = zip(found, source.original_index)
        return np.mean([np.corrcoef(image.ravel(), originals[row - shift].ravel())[0, 1] for image, row in pairs])

    # measured 0.77 and 0.46
    assert similarity(0) > 0.7 > 0.55 > similarity(500)


def test_seeds_give_other_streams():
    """Another seed is another stream with another fingerprint; the same seed, pickled too, is the same one."""
    one, two = enlarged_digits(64, 16, seed=0), enlarged_digits(64, 16, seed=1)
    assert (read(one, 0, 64) != read(two, 0, 64)).mean() > 0.5
    # not the same rows moved on either
    assert not np.array_equal(one.original_index[1:], two.original_index[:-1])
    prints = {
        source.fingerprint()
        for source in (one, two, enlarged_digits(63, 16), enlarged_digits(64, 17), enlarged_digits(64, 16, originals=range(50)))
    }
    assert len(prints) == 5
    copy = pickle.loads(pickle.dumps(one))  # noqa: S301
    assert copy.fingerprint() == one.fingerprint() == enlarged_digits(64, 16).fingerprint()
    np.testing.assert_array_equal(read(copy, 0, 64), read(one, 0, 64))


def test_first_pixels_are_pinned():
    """The stream is part of published figures: originals and pixel sums of seed 0 stay as they are."""
    source = enlarged_digits(4, 16)
    assert source.original_index.tolist() == [1372, 544, 694, 1786]
    # a last-bit difference of another processor may move single pixels by one level
    sums = read(source, 0, 4).reshape(4, -1).astype(int).sum(1)
    np.testing.assert_allclose(sums, [13885, 19629, 17294, 24320], atol=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 0}, "n_samples must be"),
        ({"n_samples": 2, "size": 1.5}, "size must be"),
        ({"n_samples": 2, "seed": -1}, "seed must be"),
        ({"n_samples": 2, "originals": []}, "originals must be rows"),
        ({"n_samples": 2, "originals": [1797]}, "originals must be rows"),
    ],
)
def test_stream_arguments_are_checked(arguments, message):
    """Counts, sizes, seeds and originals out of range are errors."""
    with pytest.raises(ParameterError, match=message):
        enlarged_digits(**arguments)


def test_importing_datasets_compiles_nothing():
    """numba and scikit-learn's data sets come with the first digits, not with the import."""
    code = """
import sys
import streamcnn.datasets
print([name for name in ("numba", "sklearn.datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Extended Yale B


@pytest.mark.parametrize(
    ("azimuth", "elevation", "subset"),
    [
        *((0, 0, 1), (5, -10, 1), (-25, 0, 2), (25, 0, 2), (35, 0, 3), (-35, 40, 3)),
        *((50, -40, 4), (60, 20, 4), (85, 20, 5), (130, 20, 5), (0, 90, 5)),
    ],
)
def test_subset_by_the_angle_of_the_light(azimuth, elevation, subset):
    """Angles belong to their subset, those on a border (25 degrees) to the lower one."""
    assert yale_subset(azimuth, elevation) == subset


def test_incomplete_yale_folder(tmp_path):
    """A folder with missing images is an error that says which subset has how many instead; a missing one is named."""
    (tmp_path / "yaleB01").mkdir()
    for name in ("yaleB01_P00A+000E+00.pgm", "yaleB01_P00_Ambient.pgm", "yaleB02_P00A+000E+00.pgm"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "yaleB01" / name)
    with pytest.raises(DataError, match="subset 1 must have 263 images, found 1"):
        extended_yale_b(tmp_path)
    with pytest.raises(FileError, match="nowhere: no such folder"):
        extended_yale_b(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def yale():
    if "STREAMCNN_DATA" not in os.environ:
        pytest.skip("STREAMCNN_DATA does not say where the real data is")
    folder = Path(os.environ["STREAMCNN_DATA"]) / "CroppedYale"
    if not folder.is_dir():
        pytest.skip("there is no CroppedYale folder in STREAMCNN_DATA")
    return folder, extended_yale_b(folder)


def test_yale_subsets(yale):
    """The five subsets have the literature's sizes, share no file, and show the same 38 persons."""
    _, subsets = yale
    assert {subset: source.n_samples for subset, source in subsets.items()} == YALE_SIZES
    names = [source.name_of(row) for source in subsets.values() for row in range(source.n_samples)]
    assert len(set(names)) == 2414
    for source in subsets.values():
        assert source.image_shape == (96, 84, 1)
        assert source.classes_.tolist() == subsets[1].classes_.tolist()
        assert len(source.classes_) == 38
        assert [source.name_of(row).split("/")[0] for row in (0, source.n_samples - 1)] == ["yaleB01", "yaleB39"]
    assert len({source.fingerprint() for source in subsets.values()}) == 5


def test_yale_images_are_halved(yale):
    """At half the size a pixel is the mean of 2 x 2 of the file; at the file's size it is the file."""
    folder, subsets = yale
    half = read(subsets[1], 0, 1)[0, :, :, 0]
    stored = np.asarray(Image.open(folder / subsets[1].name_of(0)))
    # Pillow rounds once per axis: half a level each
    assert np.abs(half - stored.reshape(96, 2, 84, 2).mean((1, 3))).max() <= 1
    full = extended_yale_b(folder, (192, 168))[1]
    np.testing.assert_array_equal(read(full, 0, 1)[0, :, :, 0], stored)
    with pytest.raises(ParameterError, match="image_size must be"):
        extended_yale_b(folder, (192, 168, 1))
