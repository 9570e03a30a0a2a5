"""The convolution kernels: naive against theory, CPU against naive, and the bits of the CPU kernels."""

import os
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conv_cases import CASES, EPS, TILES, agree, bits, edges_of, for_simulator, fused, grid, make, run, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate

from streamcnn.errors import ParameterError
from streamcnn.kernels import ACTIVATIONS, POOLS, cpu, empty_lines, get_kernels, jit, naive

# --- the reference ---------------------------------------------------------------------------------------------------------------


def test_naive_is_the_cross_correlation_of_scipy():
    """Without activation's bend and pooling the naive kernel is scipy.signal.correlate summed over channels, plus the bias."""
    images, filters, bias = make(2, (9, 11, 3), 4, (3, 5), np.float32)
    out = run(naive, images, filters, bias, activation="split")
    for k in range(4):
        for image, result in zip(images.astype(float), out):
            expected = correlate(image, filters[k].astype(float), mode="valid")[..., 0] + bias[k]
            signed = result[..., k] - result[..., 4 + k]
            # one rounding to float32 of values below 100
            np.testing.assert_allclose(signed, expected, atol=100 * EPS)


def test_naive_normalises_by_the_deviations_of_scipy():
    """With `patch_norm` each sum of scipy is divided by the root of the window's variance, from box sums of scipy, plus that number."""
    images, filters, bias = make(2, (9, 11, 3), 4, (3, 5), np.float32)
    out = run(naive, images, filters, bias, activation="split", patch_norm=30.0)
    box = np.ones((3, 5, 3))
    for image, result in zip(images.astype(float), out):
        mean, square = (correlate(x, box, mode="valid") / box.size for x in (image, image**2))
        sums = np.concatenate([correlate(image, f.astype(float), mode="valid") for f in filters], axis=-1)
        expected = sums / np.sqrt(square - mean**2 + 30) + bias
        # one rounding to float32 of values below 4
        np.testing.assert_allclose(result[..., :4] - result[..., 4:], expected, atol=4 * EPS)


@pytest.mark.parametrize("kernels", [naive, cpu])
def test_hand_worked_example(kernels):
    """A 3 x 3 image, a 2 x 2 filter: every activation and pool gives the numbers worked out on paper."""
    image = np.array([[1, 2, 0], [0, 3, 1], [4, 0, 2]], np.uint8).reshape(1, 3, 3, 1)
    weights = np.array([[1, -1], [0, 2]], np.float32).reshape(1, 2, 2, 1)
    half = np.array([0.5], np.float32)
    # 1-2+6, 2-0+2, 0-3+0, 3-1+4, each plus 0.5: [[5.5, 4.5], [-2.5, 6.5]]

    def values(**options):
        return run(kernels, image, weights, half, **options).ravel().tolist()

    assert values(threshold=1.0) == [4.5, 3.5, 0.0, 5.5]
    assert values(threshold=1.0, activation="abs") == [4.5, 3.5, 1.5, 5.5]
    assert values(activation="clip") == [1.0, 1.0, -1.0, 1.0]
    assert values(threshold=1.0, activation="split") == [4.5, 0.0, 3.5, 0.0, 0.0, 1.5, 5.5, 0.0]
    assert values(edges=windows(2)) == [4.125]
    assert values(edges=windows(2), pool="max") == [6.5]
    assert values(edges=windows(2), activation="clip", pool="mean") == [0.5]
    assert values(edges=(windows(1), windows(2)), pool="mean") == [5.0, 3.25]
    assert values(stride=2) == [5.5]
    # padded: only the corner pixels under the filter's corners
    assert values(stride=2, padding=1, activation="split")[:4] == [2.5, 0.0, 0.5, 0.0]
    # variances 5/4, 5/4, 51/16, 5/4: with 1 added, three deviations of 3/2; of 0, 0, 0, 1 it is 3/16, and with 1/16 added 1/2
    found = values(activation="split", patch_norm=1.0)[::2]
    np.testing.assert_allclose(found, [5 / 1.5 + 0.5, 4 / 1.5 + 0.5, 0, 4.5], rtol=EPS)
    assert values(activation="split", patch_norm=1.0)[5] == pytest.approx(3 / 4.1875**0.5 - 0.5, rel=EPS)
    assert values(stride=2, padding=1, patch_norm=0.0625)[0] == 4.5


# --- CPU against naive -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_cpu_agrees_with_naive(name):
    """The CPU kernel is the naive one to the rounding of its sums."""
    agree(cpu, CASES[name])


KINDS = {
    "odd sizes": lambda images, filters, bias, **options: images.shape[1] % 2 and images.shape[2] % 2,
    "stride": lambda *arrays, stride=1, **options: stride > 1,
    "padding": lambda *arrays, padding=0, **options: padding > 0,
    "bytes": lambda images, *arrays, **options: images.dtype == np.uint8,
    "floats": lambda images, *arrays, **options: images.dtype == np.float32,
    "1 x 1 output": lambda images, filters, bias, **options: all(list(edges) == [0, 1] for edges in edges_of(images, filters, **options)),
    "large offset": lambda images, *arrays, **options: images.min() > 9e5,
    "filters of sum 0": lambda images, filters, bias, **options: np.abs(filters.sum(axis=(1, 2, 3))).max() < 1e-6 * np.abs(filters).max(),
    "filters of pairs": lambda images, filters, bias, **options: filters.size > 1 and np.ptp(np.abs(filters)) == 0 != np.ptp(filters),
    "normed": lambda *arrays, patch_norm=None, **options: patch_norm is not None,
    "normed bytes": lambda images, *arrays, patch_norm=None, **options: patch_norm is not None and images.dtype == np.uint8,
    "denormal pixels": lambda images, *arrays, **options: np.abs(images).max() < TINY,
    "denormal products": lambda images, filters, bias, **options: (
        np.abs(images).max() >= TINY and float(np.abs(images).max()) * float(np.abs(filters).max()) < TINY
    ),
}
TINY = float(np.finfo(np.float32).tiny)


def test_simulator_runs_every_kind_of_case():
    """The cases small enough for the CUDA simulator have every activation with every pool, and every kind; only size leaves some out."""
    cases = for_simulator(CASES).values()
    pairs = {(options.get("activation", "relu"), options.get("pool", "mean")) for _, options in cases}
    assert pairs == set(product(ACTIVATIONS, POOLS))
    for name, holds in KINDS.items():
        assert any(holds(*arrays, **options) for arrays, options in cases), name
    assert 0 < len(CASES) - len(cases) < len(CASES) / 4


def test_denormals_are_not_flushed():
    """Products below the normal range of float32 count."""
    images = np.full((3, 4, 4, 1), 2.0**-100, np.float32)
    filters = np.full((2, 2, 2, 1), 2.0**-40, np.float32)
    out = run(cpu, images, filters, np.zeros(2, np.float32))
    assert (out == np.float32(4 * 2.0**-140)).all() and out[0, 0, 0, 0] > 0


@pytest.mark.parametrize("kernels", [naive, cpu])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("size", "patch_norm"), [(2, None), (3, None), (3, 10.0)])
def test_nan_reaches_exactly_the_cells_that_see_it(kernels, activation, pool, size, patch_norm):
    """A NaN pixel makes NaN of every cell whose windows hold it, never 0, and of no other cell or image."""
    images, filters, bias = make(3, (14, 14, 1), 5, (3, 3), np.float32)
    images[1, 6, 7] = np.nan
    out = run(kernels, images, filters, bias, activation=activation, pool=pool, edges=windows(size), patch_norm=patch_norm)
    expected = np.zeros(out.shape, bool)
    seen = np.zeros((12, 12), bool)
    seen[4:7, 5:8] = True
    seen = seen.reshape(12 // size, size, 12 // size, size).any(axis=(1, 3))
    expected[1, seen] = True
    assert np.array_equal(np.isnan(out), expected)


def test_infinite_pixels_follow_ieee():
    """inf gives inf or 0 by the sign of its weight, inf - inf gives NaN; as in the naive kernel."""
    images = np.zeros((2, 4, 4, 1), np.float32)
    images[0, 0, 0], images[0, 3, 3], images[1, :2, 0] = np.inf, -np.inf, np.inf
    filters = np.array([[[1, 0.5], [-1, 2]], [[-1, 1], [1, 1]]], np.float32)[..., None]
    for activation in ACTIVATIONS:
        expected, out = (run(k, images, filters, np.zeros(2, np.float32), activation=activation) for k in (naive, cpu))
        np.testing.assert_array_equal(out, expected)


# --- bits ------------------------------------------------------------------------------------------------------------------------


def emulate(images, filters, bias, activation, threshold, pool, size):
    """The promised order of operations, one float32 rounding each, for operands whose exact sums fit float64.

    uint8 pixels times weights that are multiples of 2**-24 below 1 sum to less than 2**16 in units of 2**-24: 40 of 53 bits.
    So rounding the float64 sum to float32 is the fused multiply-add.
    """
    n, height, width, channels = images.shape
    n_filters, rows, cols, _ = filters.shape
    acc = np.empty((n, height - rows + 1, width - cols + 1, n_filters), np.float32)
    acc[:] = bias
    for dy in range(rows):
        for dx in range(cols):
            for c in range(channels):
                x = images[:, dy : dy + acc.shape[1], dx : dx + acc.shape[2], c, None].astype(np.float64)
                acc = (acc + x * filters[:, dy, dx, c].astype(np.float64)).astype(np.float32)
    t, zero, one = np.float32(threshold), np.float32(0), np.float32(1)
    if activation == "clip":
        values = np.minimum(np.maximum(acc, -one), one)
    elif activation == "split":
        values = np.concatenate([np.maximum(acc - t, zero), np.maximum(-acc - t, zero)], axis=-1)
    else:
        values = np.maximum((np.abs(acc) if activation == "abs" else acc) - t, zero)
    n_rows, n_cols = values.shape[1] // size, values.shape[2] // size
    total = np.full((n, n_rows, n_cols, values.shape[3]), 0 if pool == "mean" else -np.inf, np.float32)
    for y in range(size):
        for x in range(size):
            value = values[:, y : n_rows * size : size, x : n_cols * size : size]
            total = total + value if pool == "mean" else np.maximum(total, value)
    return total * np.float32(1 / size**2) if pool == "mean" else total


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_bits_are_those_of_the_promised_order(activation, pool, size):
    """Taps by row, column and channel from the bias on, then the window row by row: bit for bit."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (19, 14, 13, 3), dtype=np.uint8)
    filters, bias = (rng.integers(-(2**24), 2**24, s).astype(np.float32) * np.float32(2.0**-24) for s in [(7, 3, 4, 3), (7,)])
    expected = emulate(images, filters, bias, activation, 0.3, pool, size)
    out = run(cpu, images, filters, bias, activation=activation, threshold=0.3, pool=pool, edges=windows(size))
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(("dtype", "offset"), [(np.uint8, 0), (np.float32, 0), (np.float32, 1e7)])
@pytest.mark.parametrize("n", [1, 17])
def test_bits_of_normed_windows_are_those_of_the_promised_order(n, dtype, offset):
    """Sums of differences to the first pixel in float64, tap by tap, one factor in float32, then one fused multiply-add with the bias."""
    images, filters, bias = make(n, (6, 5, 2), 3, (3, 4), dtype)
    images += dtype(offset)
    out = run(cpu, images, filters, bias, activation="split", patch_norm=7.5)
    sums = run(cpu, images, filters, 0 * bias, activation="split")
    sums = sums[..., :3] - sums[..., 3:]  # one of the two is zero
    for place in np.ndindex(n, 4, 2):
        image, y, x = place
        window = images[image, y : y + 3, x : x + 4].astype(np.float64).ravel()
        total = squares = 0.0
        for difference in window - window[0]:
            total += difference
            squares += difference * difference
        factor = np.float32(1 / np.sqrt(max(24 * squares - total * total, 0) / 24**2 + 7.5))
        expected = [fused(value, factor, b) for value, b in zip(sums[place], bias)]
        assert np.array_equal(out[place][:3] - out[place][3:], expected), place


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_constant_windows_have_no_variance_at_all(dtype):
    """Where all pixels are equal the deviation is the root of `patch_norm`, exactly, however large they are."""
    large = np.random.default_rng(0).uniform(1e6, 1.6e7, 20)
    values = np.array([0, 1, 255] if dtype == np.uint8 else [0.1, -3e30, *large], dtype)
    images = np.repeat(values, 110).reshape(-1, 11, 10, 1)
    filters = np.zeros((1, 9, 10, 1), np.float32)
    filters[0, 1, 1] = 1
    for n in (1, len(values)):  # by filter and by image
        out = run(cpu, images[-n:], filters, np.zeros(1, np.float32), activation="split", patch_norm=2.0**-20)
        assert np.array_equal(out[:, 0, 0, 0] - out[:, 0, 0, 1], values[-n:].astype(np.float32) * 1024)


def test_sums_of_large_windows_are_exact():
    """9,000 bytes, half of them 255: the variance is 255**2 / 4 to the last bit, of which float32 sums or 32-bit integers know nothing."""
    images = np.zeros((17, 90, 100, 1), np.uint8)
    images[:, ::2] = 255
    filters = np.zeros((1, 90, 100, 1), np.float32)
    filters[0, 0, 0] = 1
    for n in (1, 17):
        out = run(cpu, images[:n], filters, np.zeros(1, np.float32), patch_norm=2.5)
        assert (out == np.float32(255) * np.float32(1 / np.sqrt(127.5**2 + 2.5))).all()


def test_normalisation_asks_for_scratch_of_its_own():
    """Scratch that is enough for a layer is too little for the same layer with `patch_norm`, and is refused, not written beyond."""
    images, filters, bias = make(2, (9, 9, 1), 3, (3, 3))
    m = cpu.conv_scratch((9, 9, 1), filters.shape, (7, 7, 3), 0)
    arguments = (images, filters, bias, 1, 0, 0, 0.0, 0, np.arange(8), np.arange(8), np.empty((1, m), np.float32))
    out = np.empty((2, 7, 7, 3), np.float32)
    cpu.conv_layer(*arguments, out)
    with pytest.raises(ParameterError, match="conv_scratch"):
        cpu.conv_layer(*arguments, out, 10.0)


@pytest.mark.parametrize("name", CASES)
def test_lanes_and_tiles_never_change_a_bit(name):
    """16, 8 and 4 lanes with their tiles give the same bits as the tile of this machine."""
    arrays, options = CASES[name]
    expected = bits(run(cpu, *arrays, **options))
    for tile in TILES:
        assert np.array_equal(bits(run(cpu, *arrays, tile=tile, **options)), expected)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_chunking_and_threads_never_change_a_bit(data):
    """Any cut of the images into chunks, any number of threads and any spare scratch give the bits of one call."""
    shape = (data.draw(st.integers(5, 30)), data.draw(st.integers(5, 30)), data.draw(st.sampled_from([1, 2, 3])))
    dtype = data.draw(st.sampled_from([np.uint8, np.float32]))
    n = data.draw(st.integers(1, 40))
    images, filters, bias = make(n, shape, data.draw(st.integers(1, 9)), (3, 5), dtype, seed=data.draw(st.integers(0, 99)))
    options = {
        "stride": data.draw(st.integers(1, 2)),
        "padding": data.draw(st.integers(0, 2)),
        "activation": data.draw(st.sampled_from(list(ACTIVATIONS))),
        "pool": data.draw(st.sampled_from(list(POOLS))),
        "edges": data.draw(st.sampled_from([windows(1), grid(1)])),
        "patch_norm": data.draw(st.sampled_from([None, 10.0])),
    }
    expected = run(cpu, images, filters, bias, n_threads=1, **options)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    for start, stop in pairwise(cuts):
        n_threads = data.draw(st.integers(1, 5))
        part = run(cpu, images[start:stop], filters, bias, n_threads=n_threads, **options)
        assert np.array_equal(bits(part), bits(expected[start:stop]))


@pytest.mark.parametrize("name", CASES)
def test_one_image_at_a_time_has_the_bits_of_many(name):
    """Filters in the lanes, for one image, and images in the lanes, for 64, give the same bits."""
    arrays, options = CASES[name]
    images = np.resize(arrays[0], (64, *arrays[0].shape[1:]))
    many = run(cpu, images, *arrays[1:], **options)
    for i in range(min(len(arrays[0]), 2)):
        assert np.array_equal(bits(run(cpu, images[i : i + 1], *arrays[1:], **options)), bits(many[i : i + 1]))


def interleaved(images, lanes):
    """Images (n, H, W, C) as (blocks, H, W, C, lanes), float32; NaN in the lanes beyond the last image."""
    room = np.full((-(-len(images) // lanes) * lanes, *images.shape[1:]), np.nan, np.float32)
    room[: len(images)] = images
    return np.ascontiguousarray(np.moveaxis(room.reshape(-1, lanes, *images.shape[1:]), 1, -1))


class Interleaving:
    """The CPU's kernels, where `conv_layer` reads or writes interleaved images between guard values, or both."""

    conv_scratch = staticmethod(cpu.conv_scratch)

    def __init__(self, reads, writes):
        self.reads, self.writes = reads, writes

    def conv_layer(self, images, *others, patch_norm, tile):
        *others, out = others
        lanes = tile.dtype["accumulators"].shape[2]
        images = interleaved(images, lanes) if self.reads else images
        blocks = interleaved(out, lanes) if self.writes else out
        room = np.full(blocks.size + 64, 7.25, np.float32)
        inner = room[32:-32].reshape(blocks.shape)
        cpu.conv_layer(images, *others, inner, patch_norm, tile)
        assert (room[:32] == 7.25).all() and (room[-32:] == 7.25).all()
        out[:] = np.moveaxis(inner, -1, 1).reshape(-1, *out.shape[1:])[: len(out)] if self.writes else inner


@pytest.mark.parametrize("name", CASES)
def test_interleaved_images_have_the_bits_of_others(name):
    """Read, written or both as blocks of as many images as lanes; nothing is made of lanes without image, or written beside the blocks."""
    (images, filters, bias), options = CASES[name]
    expected = bits(run(cpu, images, filters, bias, **options))
    for tile, (reads, writes) in product(TILES, ((True, False), (False, True), (True, True))):
        out = run(Interleaving(reads, writes), images, filters, bias, tile=tile, **options)
        assert np.array_equal(bits(out), expected), (reads, writes)


@pytest.mark.parametrize("tile", TILES)
def test_larger_chunks_of_equally_many_blocks_are_interleaved(tile):
    """So the room for the largest chunk is enough for every smaller one; less than a block is never interleaved."""
    lanes = tile.dtype["accumulators"].shape[2]
    for n_filters in (1, 4, 16, 17, 64, 100, 1000):
        assert {cpu.conv_lanes(n, n_filters, tile) for n in range(1, lanes)} == {1}
        for first in range(lanes, 5 * lanes, lanes):
            found = [cpu.conv_lanes(n, n_filters, tile) for n in range(first + 1, first + lanes + 1)]
            assert found == sorted(found) and found[-1] == lanes
    assert naive.conv_lanes(1000, 64) == 1


def test_buffers_start_at_a_cache_line():
    """`empty_lines` gives arrays of the shape asked for whose first number starts a line of 64 bytes."""
    for shape in ((3, 5), (1,), (7, 1, 9), (0, 4)):
        array = empty_lines(shape)
        assert array.shape == shape and array.dtype == np.float32 and array.flags.c_contiguous
        assert array.size == 0 or array.ctypes.data % 64 == 0


def test_wider_misaligned_scratch_and_read_only_arrays_give_the_same_bits():
    """Scratch may be shared with other layers and start anywhere; nothing but scratch and out is written."""
    images, filters, bias = make(20, (12, 12, 3), 7, (3, 3))
    expected = run(cpu, images, filters, bias, edges=windows(2))
    for array in (images, filters, bias):
        array.flags.writeable = False
    m = cpu.conv_scratch((12, 12, 3), filters.shape, (5, 5, 7), 0)
    room = np.full(2 * (m + 37) + 3, np.nan, np.float32)
    compiled = len(cpu._conv_worker.signatures)
    for offset in range(3):
        scratch = room[offset : offset + 2 * (m + 37)].reshape(2, -1)
        out = np.empty_like(expected)
        edges = np.arange(6) * 2
        cpu.conv_layer(images, filters, bias, 1, 0, 0, 0.0, 0, edges, edges, scratch, out)
        assert np.array_equal(bits(out), bits(expected))
    assert len(cpu._conv_worker.signatures) == compiled


def test_no_write_outside_scratch_and_out():
    """Guard values around both buffers survive every case."""
    for arrays, options in CASES.values():
        images, filters, bias = arrays
        expected = run(cpu, images, filters, bias, **options)
        captured = {}

        class Guarded:
            conv_scratch = staticmethod(cpu.conv_scratch)

            @staticmethod
            def conv_layer(*args, patch_norm, captured=captured):
                *head, scratch, out = args
                rooms = [np.full(a.size + 64, 7.25, np.float32) for a in (scratch, out)]
                inner = [room[32:-32].reshape(a.shape) for room, a in zip(rooms, (scratch, out))]
                cpu.conv_layer(*head, *inner, patch_norm)
                out[:] = inner[1]
                captured["guards"] = np.concatenate([part for room in rooms for part in (room[:32], room[-32:])])

        assert np.array_equal(bits(run(Guarded, images, filters, bias, **options)), bits(expected))
        assert (captured["guards"] == 7.25).all()


AT_THE_BRINK = """
import ctypes, mmap
import numpy as np
from streamcnn.kernels import cpu
room = mmap.mmap(-1, 2 * mmap.PAGESIZE)
inside = np.frombuffer(room, np.uint8)
guard = ctypes.c_void_p(inside.ctypes.data + mmap.PAGESIZE)
assert ctypes.CDLL(None, use_errno=True).mprotect(guard, mmap.PAGESIZE, 0) == 0
for dtype, side in ((np.uint8, 9), (np.float32, 5), (np.uint8, 3)):
    size = 5 * side * side * np.dtype(dtype).itemsize
    x = inside[mmap.PAGESIZE - size : mmap.PAGESIZE].view(dtype).reshape(5, side, side, 1)
    x[:] = 1
    w, e, out = np.ones((2, 3, 3, 1), np.float32), np.arange(side - 1), np.empty((5, side - 2, side - 2, 2), np.float32)
    scratch = np.empty((2, cpu.conv_scratch(x.shape[1:], w.shape, out.shape[1:], 0)), np.float32)
    cpu.conv_layer(x, w, np.zeros(2, np.float32), 1, 0, 0, 0.0, 0, e, e, scratch, out)
    assert (out == 9).all()
print("survived")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect to make a page unreadable")
def test_no_read_past_the_last_image():
    """Images that end at an unreadable page are convolved: lanes and vectors never reach beyond the array."""
    assert python(AT_THE_BRINK) == "survived"


def test_more_than_two_to_the_31_pixels():
    """The last image of an array of more than 2**31 pixels is found."""
    images = np.zeros((2100, 1024, 1024, 1), np.uint8)  # untouched pages are one page of zeros
    images[-1, -1, -1] = 200
    filters, bias = np.full((1, 1, 1, 1), 0.5, np.float32), np.zeros(1, np.float32)
    out = run(cpu, images, filters, bias, stride=1023, pool="max", edges=windows(2))
    assert out[-1, 0, 0, 0] == 100 and not out[:-1].any()


def test_too_small_scratch_is_refused():
    """Scratch for another layer is an error, not a write past its end."""
    images, filters, bias = make(2, (9, 9, 1), 3, (3, 3))
    out, edges = np.empty((2, 7, 7, 3), np.float32), np.arange(8)
    with pytest.raises(ParameterError, match="conv_scratch"):
        cpu.conv_layer(images, filters, bias, 1, 0, 0, 0.0, 0, edges, edges, np.empty((1, 100), np.float32), out)


def test_no_images_is_no_work():
    """A chunk of no images returns."""
    images, filters, bias = make(0, (9, 9, 1), 3, (3, 3))
    assert run(cpu, images, filters, bias).shape == (0, 7, 7, 3)


# --- device and cache ------------------------------------------------------------------------------------------------------------


def test_device_choice():
    """cpu is the CPU kernels, naive the reference, anything unknown a parameter error; for auto and cuda see test_cuda.py."""
    assert get_kernels("cpu") is cpu and get_kernels("naive") is naive
    with pytest.raises(ParameterError, match="auto, cpu, cuda, naive, got 'gpu'"):
        get_kernels("gpu")
    assert all(hasattr(naive, name) for name in cpu.__all__) and cpu.__all__ == naive.__all__


# the package without its __init__, which brings in everything
BARE = f"""
import sys, types
package = types.ModuleType("streamcnn")
package.__path__ = [{str(Path(jit.__file__).parents[1])!r}]
sys.modules["streamcnn"] = package
"""


def python(code, **environment):
    """Run code in a new process; what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", BARE + code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


CONVOLVE = """
import numpy as np
from streamcnn.kernels import cpu
x = np.ones((3, 5, 5, 1), np.uint8); w = np.ones((2, 3, 3, 1), np.float32); e = np.arange(4); out = np.empty((3, 3, 3, 2), np.float32)
scratch = np.empty((2, cpu.conv_scratch((5, 5, 1), w.shape, (3, 3, 2), 0)), np.float32)
cpu.conv_layer(x, w, np.zeros(2, np.float32), 1, 0, 0, 0.0, 0, e, e, scratch, out)
assert (out == 9).all()
stats = cpu._conv_worker.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""

SMALL = """
sys.path.insert(0, {folder!r})
import small
assert small.double(21) == 42
print(sum(small.double.stats.cache_hits.values()), sum(small.double.stats.cache_misses.values()))
"""


@pytest.fixture
def small(tmp_path):
    """Code that runs a small kernel of a module of its own, and its cache folder."""
    (tmp_path / "small.py").write_text("from streamcnn.kernels.jit import jit\n\n@jit()\ndef double(x):\n    return 2 * x\n")
    return SMALL.format(folder=str(tmp_path)), tmp_path / "cache"


def test_second_process_finds_the_compiled_kernels(tmp_path):
    """The second process compiles nothing and writes no file."""
    assert python(CONVOLVE, NUMBA_CACHE_DIR=str(tmp_path)) == "0 1"
    files = sorted(p.name for p in tmp_path.rglob("*.nb?"))
    assert python(CONVOLVE, NUMBA_CACHE_DIR=str(tmp_path)) == "1 0"
    assert files and sorted(p.name for p in tmp_path.rglob("*.nb?")) == files


def test_whoever_compiles_a_normed_convolution_compiles_the_plain_one(monkeypatch):
    """For the same types; else plans would count it as to be compiled for ever. Found on disk, neither is compiled."""
    arrays = make(2, (6, 6, 1), 2, (3, 3), np.uint8)
    run(cpu, *arrays)
    run(cpu, *arrays, patch_norm=1.0)
    known, asked = cpu._conv_worker.signatures, []
    monkeypatch.setattr(cpu, "_conv_worker", SimpleNamespace(compile=asked.append))
    run(cpu, *arrays, patch_norm=1.0)
    assert not asked
    monkeypatch.setattr(cpu, "compiles_first", lambda kernel: kernel is cpu._normed_worker)
    run(cpu, *arrays, patch_norm=1.0)
    assert len(asked) == 1 and asked[0] in known


def test_two_processes_may_compile_at_once(small):
    """Two processes that start on an empty cache both work, and leave one whole entry."""
    code, cache = small
    command, environment = [sys.executable, "-c", BARE + code], {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(process.communicate(timeout=300)[0] and process.returncode == 0 for process in both)
    assert python(code, NUMBA_CACHE_DIR=str(cache)) == "1 0"
    assert len(list(cache.rglob("*.nbi"))) == len(list(cache.rglob("*.nbc"))) == 1


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("keep", [0, 40])
def test_truncated_cache_files_are_replaced(small, suffix, keep):
    """A cache file cut short by a kill costs one compilation; the next process finds a whole one."""
    code, cache = small
    assert python(code, NUMBA_CACHE_DIR=str(cache)) == "0 1"
    for path in cache.rglob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:keep])
    assert python(code, NUMBA_CACHE_DIR=str(cache)) == "0 1"
    assert python(code, NUMBA_CACHE_DIR=str(cache)) == "1 0"


def test_no_writable_cache_folder_still_compiles(small):
    """Where no folder can be written the kernels compile in memory, which is said before."""
    code, _ = small
    # a locator that never finds a folder: root, as in containers, can write anywhere
    nowhere = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n"
    plain = "import numba\ntry:\n    numba.njit(cache=True)(lambda: 0)\nexcept RuntimeError:\n    print('refused')\n"
    assert python(nowhere + plain) == "refused"
    heard = "import logging\nlogging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(message)s')\n"
    told = "compiling kernels for this machine, as each process does: no folder for them can be written (NUMBA_CACHE_DIR)"
    assert python(nowhere + heard + code).splitlines() == [told, "0 1"]


def test_changed_kernel_source_is_compiled_anew(small):
    """A kernel whose inlined helpers in kernels/ changed is not served from the old cache."""
    code, cache = small
    assert python(code, NUMBA_CACHE_DIR=str(cache)) == "0 1"
    changed = "from streamcnn.kernels import jit\njit._sources_digest = lambda: 'other sources'\n" + code
    assert python(changed, NUMBA_CACHE_DIR=str(cache)) == "0 1"


def test_full_disk_while_saving_is_no_error(small):
    """A cache that cannot be saved leaves the compiled kernel in memory."""
    code, cache = small
    full = "from numba.core import caching\ndef fail(*args):\n    raise OSError(28, 'full')\n"
    full += "caching.IndexDataCacheFile._save_data = fail\n"
    assert python(full + code, NUMBA_CACHE_DIR=str(cache)) == "0 1"


def test_choosing_no_device_loads_no_compiler():
    """`import streamcnn.kernels` does not import numba."""
    assert python("import streamcnn.kernels; print('numba' in sys.modules)") == "False"


def test_workers_report_their_errors():
    """An error in any worker reaches the caller."""

    def work(worker):
        if worker == 2:
            raise ValueError("worker 2 failed")

    with pytest.raises(ValueError, match="worker 2 failed"):
        jit.run_workers(work, 4)
