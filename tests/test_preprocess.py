"""Preprocessing of single images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcnn import preprocess
from streamcnn.errors import DataError, ParameterError
from streamcnn.kernels import cpu, naive

BOTH = pytest.mark.parametrize("kernels", [naive, cpu])


def run(steps, images, kernels=cpu, n_threads=2):
    """Apply steps with fresh NaN-filled buffers."""
    steps = preprocess.resolve_preprocess(steps)
    scratch = np.full((n_threads, preprocess.scratch(steps, images.shape[1:], kernels)), np.nan, np.float32)
    out = np.full(images.shape, np.nan, np.float32)
    preprocess.apply(steps, images, scratch, out, kernels)
    return out


def make(n, shape, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape))
    return images.astype(np.uint8) if dtype == np.uint8 else (images / 17 + rng.random(images.shape)).astype(np.float32)


def test_names_resolve_to_steps():
    """None, one name and a sequence of names are accepted, in their order; anything else names what exists."""
    assert preprocess.resolve_preprocess(None) == ()
    assert preprocess.resolve_preprocess("log") == ("log",)
    assert preprocess.resolve_preprocess(["log", "local_contrast"]) == ("log", "local_contrast")
    with pytest.raises(ParameterError, match="standardize, log, smooth, local_contrast, got 'gamma'"):
        preprocess.resolve_preprocess(("log", "gamma"))
    with pytest.raises(ParameterError, match=r"preprocess must be None, a name or a sequence.*got 3"):
        preprocess.resolve_preprocess(3)


@BOTH
def test_standardize_by_hand(kernels):
    """Pixels 0, 0, 0, 4 have mean 1 and deviation sqrt 3; the images are treated one by one."""
    images = np.array([[0, 0, 0, 4], [8, 8, 0, 0]], np.uint8).reshape(2, 2, 2, 1)
    out = run("standardize", images, kernels)
    expected = np.array([[-1, -1, -1, 3] / np.sqrt(3), [1, 1, -1, -1]], np.float32)
    np.testing.assert_allclose(out.reshape(2, 4), expected, rtol=2e-7)


@BOTH
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_constant_images_become_zeros(kernels, dtype):
    """An image without contrast gives zeros, not a division by zero."""
    images = np.stack([np.full((5, 7, 3), value) for value in (0, 1, 77, 255)]).astype(dtype)
    if dtype == np.float32:
        images *= np.float32(0.1)
    assert not run("standardize", images, kernels).any()
    assert not run("local_contrast", images, kernels).any()
    # the sum of up to 9 equal numbers is exact in float64, and the division gives the number back
    np.testing.assert_array_equal(run("smooth", images, kernels), images)


def test_one_different_pixel_in_a_bright_image_counts():
    """Integer sums about the mean lose nothing: one pixel of 254 among 255 has the exact deviation."""
    images = np.full((1, 500, 500, 1), 255, np.uint8)
    images[0, 17, 4] = 254
    out = run("standardize", images)
    n = 250_000
    # deviation sqrt((n - 1)) / n; so the odd pixel is at -sqrt(n - 1), to one float32 rounding
    np.testing.assert_allclose(out[0, 17, 4, 0], -np.sqrt(n - 1), rtol=1.2e-7)


def test_log_by_hand():
    """log(1 + x) of 0, 1 and 255."""
    images = np.array([0, 1, 255], np.uint8).reshape(1, 1, 3, 1)
    expected = np.log([1, 2, 256]).astype(np.float32)
    np.testing.assert_array_equal(run("log", images).ravel(), expected)
    np.testing.assert_array_equal(run("log", images.astype(np.float32)).ravel(), expected)


def test_log_refuses_negative_pixels():
    """Values below 0, which standardised images have, are an error that names the way out."""
    images = np.array([1.0, -0.5], np.float32).reshape(1, 1, 2, 1)
    with pytest.raises(DataError, match=r'"log" needs pixels of at least 0, got -0.5: put it before'):
        run("log", images)
    with pytest.raises(DataError, match="put it before the other steps"):
        run(("standardize", "log"), make(2, (4, 4, 1)))


@BOTH
def test_local_contrast_by_hand(kernels):
    """A box of 3 at a corner holds only the 4 pixels inside the image."""
    image = np.array([[2, 4, 9], [6, 8, 9], [9, 9, 9]], np.uint8).reshape(1, 3, 3, 1)
    out, scratch = np.empty(image.shape, np.float32), np.empty((1, kernels.contrast_scratch((3, 3, 1), 3)), np.float32)
    kernels.local_contrast(image, 3, 0.5, scratch, out)
    # 2, 4, 6, 8: mean 5, deviation sqrt 5
    np.testing.assert_allclose(out[0, 0, 0, 0], -3 / (np.sqrt(5) + 0.5), rtol=2e-7)
    pixels = image.ravel().astype(float)
    np.testing.assert_allclose(out[0, 1, 1, 0], (8 - pixels.mean()) / (pixels.std() + 0.5), rtol=2e-7)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 20, 1), (20, 3, 3), (17, 23, 3), (9, 9, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("steps", ["standardize", "log", "smooth", "local_contrast", ("log", "smooth", "local_contrast", "standardize")])
def test_cpu_agrees_with_naive(steps, dtype, shape):
    """Both compute in float64 and round each step to float32 once: a few units in the last place."""
    images = make(5, shape, dtype)
    np.testing.assert_allclose(run(steps, images), run(steps, images, naive), rtol=1e-5, atol=1e-5)


@BOTH
def test_smoothing_by_hand(kernels):
    """Each pixel becomes the mean of those of its box of 3 that are inside the image, whatever the other channel holds."""
    image = np.zeros((1, 3, 4, 2), np.uint8)
    image[0, :, :, 0] = [[36, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 72]]
    out = run("smooth", image, kernels)
    # boxes of 4 pixels at corners, 6 at edges, 9 inside
    expected = [[9, 6, 0, 0], [6, 4, 8, 12], [0, 0, 12, 18]]
    np.testing.assert_array_equal(out[0, :, :, 0], expected)
    assert not out[..., 1].any()


def test_boxes_grow_with_the_image():
    """The boxes cover the same part of larger images: odd, at least 9 and 3 pixels, and no larger than the kernels' scratch allows for."""
    sizes = {(8, 8): (9, 3), (96, 84): (9, 3), (104, 300): (9, 3), (105, 105): (11, 3), (192, 168): (17, 5), (480, 640): (45, 11)}
    for (height, width), windows in sizes.items():
        shape = (height, width, 1)
        assert (preprocess.contrast_window(shape), preprocess.smooth_window(shape)) == windows
        assert preprocess.scratch(("smooth", "log"), shape, cpu) == cpu.contrast_scratch(shape, windows[1])
        assert preprocess.scratch(("local_contrast", "smooth"), shape, cpu) == cpu.contrast_scratch(shape, windows[0])
    images = make(2, (110, 106, 1))
    np.testing.assert_allclose(
        run(("smooth", "local_contrast"), images), run(("smooth", "local_contrast"), images, naive), rtol=1e-5, atol=1e-5
    )


def test_local_contrast_on_a_large_offset():
    """float64 sums of squares keep the deviation: 1e4 plus noise of 1 loses 1e8 * 2**-53, nothing that float32 shows."""
    rng = np.random.default_rng(0)
    images = (1e4 + rng.normal(size=(2, 20, 20, 1))).astype(np.float32)
    np.testing.assert_allclose(run("local_contrast", images), run("local_contrast", images, naive), rtol=1e-5, atol=1e-6)


def test_local_contrast_forgets_a_huge_pixel():
    """Outside its box a pixel of 1e15 or NaN changes no bit: no running sum carries it along."""
    images = make(1, (30, 30, 1), np.float32)
    expected = run("local_contrast", images)
    far = np.ones((30, 30), bool)
    far[10 - 4 : 10 + 5, 12 - 4 : 12 + 5] = False
    for value in (1e15, np.nan):
        changed = images.copy()
        changed[0, 10, 12] = value
        out = run("local_contrast", changed)
        assert np.array_equal(out[0, far], expected[0, far])
        assert np.isnan(out[0, ~far]).all() == np.isnan(value)


@BOTH
def test_nan_stays_in_its_image(kernels):
    """NaN makes NaN of its own image only, never 0."""
    images = make(3, (6, 6, 1), np.float32)
    images[1, 2, 2] = np.nan
    out = run("standardize", images, kernels)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
    assert np.isnan(run("log", images, kernels)[1, 2, 2, 0])


@settings(deadline=None, max_examples=40)
@given(
    steps=st.sampled_from(
        ["standardize", "log", "smooth", "local_contrast", ("log", "smooth", "local_contrast"), ("local_contrast", "standardize")]
    ),
    dtype=st.sampled_from([np.uint8, np.float32]),
    shape=st.tuples(st.integers(1, 15), st.integers(1, 15), st.integers(1, 3)),
    n=st.integers(1, 9),
    cut=st.integers(0, 9),
    n_threads=st.integers(1, 4),
)
def test_chunking_and_threads_never_change_a_bit(steps, dtype, shape, n, cut, n_threads):
    """Any cut of the images and any number of threads give the bits of one call."""
    images = make(n, shape, dtype)
    expected = run(steps, images, n_threads=1)
    parts = [run(steps, part, n_threads=n_threads) for part in (images[:cut], images[cut:])]
    assert np.array_equal(np.concatenate(parts).view(np.uint32), expected.view(np.uint32))


@BOTH
@pytest.mark.parametrize("steps", ["standardize", "log", "smooth", "local_contrast"])
def test_out_may_be_the_images(kernels, steps):
    """Each step gives the same in place."""
    images = make(4, (14, 11, 2), np.float32)
    expected = run(steps, images, kernels)
    scratch = np.empty((2, preprocess.scratch((steps,), images.shape[1:], kernels)), np.float32)
    preprocess.apply((steps,), images, scratch, images, kernels)
    assert np.array_equal(images, expected)


def test_too_small_scratch_is_refused():
    """Scratch for another window is an error, not a write past its end."""
    images = make(1, (9, 9, 1))
    with pytest.raises(ParameterError, match="contrast_scratch"):
        cpu.local_contrast(images, 9, 0.1, np.empty((1, 50), np.float32), np.empty(images.shape, np.float32))
