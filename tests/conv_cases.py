"""The one table of convolutions that every device is held to, with the bound of the rounding errors of each.

`test_kernels.py` runs all `CASES` on the CPU, `test_cuda.py` all on a CUDA device, `cuda_simulated.py` those that `for_simulator` finds
small enough. `agree` holds kernels to the float64 reference, `same_as_cpu` to the CPU's bits.
"""

import math
import struct
from itertools import pairwise, product

import numpy as np

from streamcnn.kernels import ACTIVATIONS, POOLS, cpu, naive
from streamcnn.kernels.half import narrow
from streamcnn.kernels.simd import make_tile

TILES = [make_tile(4, 4, 16), make_tile(2, 6, 8), make_tile(2, 4, 4)]
EPS = float(np.finfo(np.float32).eps)


def windows(size):
    """Edges of windows of `size` that drop what is incomplete."""
    return lambda length: np.arange(length // size + 1) * size


EACH = windows(1)


def grid(cells):
    """Edges of `cells` windows of unequal size over everything."""
    return lambda length: np.arange(cells + 1) * length // cells


def given_edges(*edges):
    return lambda length: np.array(edges)


def edges_of(images, filters, *, stride=1, padding=0, edges=EACH, **options):
    """Row and column edges; `edges` makes them from the size of the conv map, a tuple of two each its own."""
    sizes = [(length + 2 * padding - side) // stride + 1 for length, side in zip(images.shape[1:3], filters.shape[1:3])]
    return [make(size) for make, size in zip(edges if isinstance(edges, tuple) else (edges, edges), sizes)]


def run(kernels, images, filters, bias, *, stride=1, padding=0, activation="relu", threshold=0.0, pool="mean", edges=EACH, **options):
    """Call `conv_layer` with fresh NaN-filled buffers; `edges` as for `edges_of`."""
    n_threads, patch_norm = options.pop("n_threads", 2), options.pop("patch_norm", None)
    rows, cols = edges_of(images, filters, stride=stride, padding=padding, edges=edges)
    shape = (len(rows) - 1, len(cols) - 1, len(filters) * (2 if activation == "split" else 1))
    m = kernels.conv_scratch(images.shape[1:], filters.shape, shape, padding, patch_norm, **options)
    scratch, out = np.full((n_threads, m), np.nan, np.float32), np.full((len(images), *shape), np.nan, np.float32)
    codes = (ACTIVATIONS[activation], threshold, POOLS[pool])
    kernels.conv_layer(images, filters, bias, stride, padding, *codes, rows, cols, scratch, out, patch_norm=patch_norm, **options)
    return out


def make(n, shape, n_filters, kernel, dtype=np.uint8, seed=0):
    """Random images, filters and bias."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape)).astype(dtype)
    if dtype == np.float32:
        images = rng.normal(size=images.shape).astype(np.float32) * 100
    filters = rng.normal(size=(n_filters, *kernel, shape[2])).astype(np.float32) / 100
    return images, filters, rng.normal(size=n_filters).astype(np.float32)


def tolerance(images, filters, bias, threshold=0.0, **options):
    """Bound of the rounding errors of each output.

    A chain of t fused multiply-adds is off by at most t u (sum |w||x| + |bias|) (Higham, section 3.1; u = eps / 2), the
    threshold and the sequential mean of s values by another s + 2 roundings of numbers not above the largest such sum. The
    naive kernel itself gives that largest sum of each cell. Below the normal range a rounding is off by up to 2**-149.
    With `patch_norm` the chain is multiplied by 1 / s, itself off by one rounding and what float64 leaves, before the bias is added:
    two more, of sums over s.
    """
    options = {**options, "activation": "split" if options.get("activation") == "split" else "relu", "pool": "max"}
    if patch_norm := options.pop("patch_norm", None):
        largest = _largest_normed(images, filters, bias, patch_norm, **options)
    else:
        largest = run(naive, np.abs(images), np.abs(filters), np.abs(bias), **options)
    if options["activation"] == "split":
        largest[..., len(filters) :] = largest[..., : len(filters)]
    roundings = filters[0].size + int(np.prod([np.diff(edges).max() for edges in edges_of(images, filters, **options)])) + 5
    return roundings * (EPS / 2 * (largest.astype(np.float64) + threshold) + 2.0**-149)


def _largest_normed(images, filters, bias, patch_norm, *, stride=1, padding=0, **options):
    """The largest sum |w||x| / s + |bias| of each cell, the negative part of `split` left open."""
    rows, cols = edges_of(images, filters, stride=stride, padding=padding, **options)
    padded = np.pad(images.astype(np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[1:3], axis=(1, 2))[:, ::stride, ::stride]
    s = np.sqrt(seen.var(axis=(3, 4, 5)) + patch_norm)[..., None]
    sums = run(naive, np.abs(images), np.abs(filters), 0 * bias, stride=stride, padding=padding) / s + np.abs(bias)
    shape = (len(images), len(rows) - 1, len(cols) - 1, len(bias) * (2 if options["activation"] == "split" else 1))
    largest = np.zeros(shape)
    for i, (top, bottom) in enumerate(pairwise(rows)):
        for j, (left, right) in enumerate(pairwise(cols)):
            largest[:, i, j, : len(bias)] = sums[:, top:bottom, left:right].max(axis=(1, 2))
    return largest


def fused(a, b, c):
    """a * b + c of float32, rounded once: the sum in float64 is rounded to odd, which a second rounding cannot betray.

    S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    product, addend = float(a) * float(b), float(c)  # exact: 48 of 53 bits
    total = product + addend
    if math.isfinite(total):
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        if error and not struct.unpack("q", struct.pack("d", total))[0] & 1:
            total = math.nextafter(total, math.copysign(math.inf, error))
    return np.float32(total)


def bits(array):
    return array.view(np.uint32)


def agree(kernels, case):
    """Assert that kernels agree with the reference to the rounding of their sums; returns their output."""
    arrays, options = case
    expected, out, allowed = run(naive, *arrays, **options), run(kernels, *arrays, **options), tolerance(*arrays, **options)
    error = np.abs(out.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"off by up to {np.nanmax(error / allowed):.3g} times the bound"
    # not vacuous: the case has responses, and the bound is well below them, even where sums cancel
    assert np.abs(expected).max() > 10 * np.median(allowed), "the bound is as large as the responses"
    return out


def same_as_cpu(out, case):
    """Assert that an output is NaN where the CPU's is, and has its bits elsewhere."""
    expected = run(cpu, *case[0], **case[1])
    alike = (bits(out) == bits(expected)) | (np.isnan(out) & np.isnan(expected))
    assert alike.all(), f"{(~alike).sum()} of {alike.size} numbers differ from the CPU's"


def rounds_as_the_cpu(kernels):
    """Assert that float16 results have the bits of `half.narrow`, and that what float16 cannot hold is told.

    Each number is a bias on a black pixel: exact ones, ties, their neighbours, denormals, and the ends of the range.
    """
    steps = [1, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-23, 2**-14, 2**-24, 2**-25, 3 * 2**-25, 2**-26, 2**-140, 0, 65504, 65519.996]
    numbers = np.array([*steps, -2, -(2**-25), -1 - 2**-11], np.float32)
    pixel, filters, edges = np.zeros((1, 1, 1, 1), np.uint8), np.zeros((len(numbers), 1, 1, 1), np.float32), np.arange(2)

    def convolve(bias):
        out = np.empty((1, 1, 1, 2 * len(bias)), np.float16)
        scratch = np.empty((1, kernels.conv_scratch((1, 1, 1), filters.shape, out.shape[1:], 0)), np.float32)
        return out, kernels.conv_layer(*(pixel, filters, bias, 1, 0, ACTIVATIONS["split"], 0.0, POOLS["mean"], edges, edges, scratch, out))

    out, fits = convolve(numbers)
    expected = np.empty(2 * len(numbers), np.float16)
    assert narrow(np.maximum(np.concatenate([numbers, -numbers]), 0), expected)
    assert fits is True and np.array_equal(out.reshape(-1).view(np.uint16), expected.view(np.uint16))
    for beyond in (65520, -65520, np.inf, np.nan):
        assert convolve(np.append(numbers[1:], np.float32(beyond)))[1] is False, beyond


def multiply_adds(case):
    """How many a convolution takes, over all images, filters and taps of every position that is pooled."""
    (images, filters, _), options = case
    return len(images) * filters.size * int(np.prod([np.ptp(edges) for edges in edges_of(images, filters, **options)]))


def for_simulator(cases):
    """The cases small enough for numba's simulator, which takes 10 to 200 us for one, by how well they fill a block."""
    return {name: case for name, case in cases.items() if multiply_adds(case) <= 1 << 16}


CASES = {
    "one pixel, one tap": (make(1, (1, 1, 1), 1, (1, 1)), {}),
    "one image, one filter": (make(1, (8, 8, 1), 1, (3, 3)), {}),
    "odd sizes": (make(7, (17, 13, 3), 10, (5, 5)), {"edges": windows(2)}),
    "small odd sizes": (make(3, (7, 9, 3), 5, (3, 5)), {"edges": windows(2)}),
    "stride 2, padding 1": (make(7, (9, 10, 3), 10, (3, 3)), {"stride": 2, "padding": 1}),
    "stride 3, padding 2": (make(5, (16, 11, 1), 3, (5, 3)), {"stride": 3, "padding": 2, "edges": windows(2)}),
    "stride 3, padding 2 of float32": (make(2, (9, 8, 1), 3, (5, 3), np.float32), {"stride": 3, "padding": 2}),
    "stride above the kernel": (make(3, (13, 14, 2), 3, (2, 2)), {"stride": 3}),
    "padding 3 of float32": (make(16, (8, 9, 5), 10, (7, 7), np.float32), {"padding": 3, "edges": windows(3), "pool": "max"}),
    "padding above the kernel": (make(2, (4, 4, 1), 2, (2, 2)), {"padding": 3, "edges": windows(2)}),
    "row filter": (make(7, (6, 15, 1), 10, (1, 7)), {"edges": windows(2)}),
    "column filter": (make(7, (11, 5, 3), 10, (7, 1), np.float32), {"edges": windows(2)}),
    "1 x n images": (make(33, (1, 40, 1), 3, (1, 9)), {"edges": (windows(1), windows(4))}),
    "pixel filter": (make(4, (5, 5, 16), 64, (1, 1), np.float32), {"pool": "max", "edges": windows(5)}),
    "deep": (make(7, (10, 10, 16), 64, (3, 3), np.float32), {"edges": windows(2)}),
    "small deep": (make(2, (4, 3, 16), 4, (2, 2), np.float32), {"edges": windows(2)}),
    "many filters": (make(2, (4, 4, 1), 19, (3, 3)), {}),
    "few images, filters beyond a tile": (make(2, (11, 9, 3), 70, (3, 3)), {"padding": 1, "edges": windows(2), "activation": "split"}),
    "few images, filters of no whole vector": (make(1, (10, 10, 3), 21, (5, 5)), {"stride": 2, "edges": windows(2), "threshold": 0.3}),
    "1 x 1 output": (make(5, (3, 3, 2), 4, (3, 3)), {}),
    "1 x 1 output of a stride": (make(3, (7, 7, 2), 5, (5, 5)), {"stride": 3}),
    "1 x 1 output of many images": (make(33, (5, 5, 3), 64, (5, 5)), {}),
    "1 x 1 output of many channels": (make(2, (3, 3, 40), 70, (3, 3), np.float32), {"activation": "split", "pool": "max"}),
    "global pool": (make(3, (9, 7, 1), 10, (3, 3)), {"edges": grid(1)}),
    "unequal grid": (make(16, (20, 17, 3), 10, (5, 5)), {"edges": (grid(3), grid(5)), "pool": "max"}),
    "small unequal grid": (make(2, (8, 7, 1), 3, (2, 2)), {"edges": (grid(2), grid(4)), "pool": "max"}),
    "very unequal grid": (make(3, (10, 9, 1), 3, (3, 3)), {"edges": (given_edges(0, 1, 7), given_edges(2, 3, 4, 6))}),
    "window of 9": (make(17, (17, 17, 1), 5, (3, 3)), {"edges": windows(3)}),
    "large image in bands": (make(2, (70, 300, 3), 3, (5, 5)), {"edges": windows(33), "pool": "mean"}),
    "wide image in bands": (make(2, (40, 700, 2), 2, (3, 3)), {"edges": (windows(2), windows(50)), "padding": 2}),
}
for activation, pool in product(ACTIVATIONS, POOLS):
    options = {"activation": activation, "pool": pool, "threshold": 0.3}
    CASES[f"{activation} {pool} in tiles"] = (make(4, (7, 8, 1), 7, (3, 3)), {**options, "padding": 1, "edges": windows(4)})
    CASES[f"{activation} {pool} across cells"] = (make(5, (9, 12, 1), 7, (3, 3), np.float32), {**options, "edges": windows(3)})
    # contrast normalisation, with every activation and pool
    normed = {**options, "patch_norm": 10.0, "edges": windows(2)}
    CASES[f"{activation} {pool} of normed windows"] = (make(3, (6, 7, 2), 5, (3, 2)), normed)


def _with(case, images=None, filters=None, bias=None):
    """A case with some of its arrays changed by functions."""
    arrays, options = case
    changed = [array if change is None else change(array) for array, change in zip(arrays, (images, filters, bias))]
    return tuple(np.ascontiguousarray(array, np.float32) for array in changed), options


_OFFSET = (make(5, (12, 12, 1), 6, (5, 5), np.float32), {"edges": windows(2)})
_SMALL = (make(3, (6, 6, 2), 5, (2, 2), np.float32), {"edges": windows(2)})
CASES |= {
    # what is left of the pixels is far below them: the tolerance says how far
    "large offset": _with(_OFFSET, images=lambda x: x + 1e6),
    "cancelling sums on a large offset": _with(
        _OFFSET, images=lambda x: x + 1e6, filters=lambda w: w - w.mean(axis=(1, 2, 3), keepdims=True)
    ),
    "cancelling pairs": _with(_OFFSET, images=lambda x: 0 * x + 1, filters=lambda w: np.sign(w - np.median(w)) * 1e3),
    # products below float32's normal range, and a bias that does not hide them
    "denormal responses": _with(_SMALL, images=lambda x: x * 2.0**-90, filters=lambda w: w * 2.0**-40, bias=lambda b: 0 * b),
    "denormal pixels": _with(_SMALL, images=lambda x: x * 2.0**-140, bias=lambda b: 0 * b),
}
CASES |= {
    "normed, stride 2, padding 1": (make(7, (9, 10, 3), 10, (3, 3)), {"stride": 2, "padding": 1, "patch_norm": 3.0}),
    "normed, stride 3, padding 2 of float32": (
        make(2, (9, 8, 1), 3, (5, 3), np.float32),
        {"stride": 3, "padding": 2, "patch_norm": 100.0, "activation": "abs"},
    ),
    # windows of padding alone, below the image and beside it
    "normed, padding wider than the filters": (make(2, (4, 3, 2), 3, (2, 1)), {"padding": 3, "patch_norm": 5.0}),
    "normed, one pixel, one tap": (make(1, (1, 1, 1), 1, (1, 1)), {"patch_norm": 1.0}),
    "normed, deep": (make(17, (7, 7, 16), 9, (3, 3), np.float32), {"patch_norm": 1e3, "edges": windows(2), "padding": 1}),
    "normed, few images, filters beyond a tile": (
        make(2, (11, 9, 3), 70, (3, 3)),
        {"patch_norm": 10.0, "padding": 1, "edges": windows(2), "activation": "split"},
    ),
    "normed, one image, filters of no whole vector": (make(1, (10, 10, 3), 21, (5, 5)), {"patch_norm": 10.0, "stride": 2}),
    "normed, very unequal grid": (
        make(19, (10, 9, 1), 3, (3, 3)),
        {"edges": (given_edges(0, 1, 7), given_edges(2, 3, 4, 6)), "patch_norm": 10.0, "activation": "abs"},
    ),
    "normed, image in bands": (make(2, (70, 300, 3), 3, (5, 5)), {"edges": windows(33), "patch_norm": 10.0}),
    "normed, large offset": _with((_OFFSET[0], {**_OFFSET[1], "patch_norm": 10.0}), images=lambda x: x + 1e6),
    "normed, constant images": _with((_SMALL[0], {**_SMALL[1], "patch_norm": 4.0}), images=lambda x: 0 * x + 100.3),
    "normed, faint images": _with((_SMALL[0], {**_SMALL[1], "patch_norm": 1e-30}), images=lambda x: x * 2.0**-60),
    # the sum of squares of a window is beyond 2**24, times their number beyond 2**32
    "normed, sums of many large bytes": (make(1, (72, 70, 1), 3, (70, 70)), {"patch_norm": 10.0}),
}


def _put_non_finite(images):
    """NaN in one image; in another inf, and inf beside -inf."""
    images[0, 2, 3], images[1, 0, 0], images[1, 4, 4], images[1, 4, 5] = np.nan, np.inf, -np.inf, np.inf
    return images


# for `same_as_cpu` only: there is no bound of the rounding errors
NON_FINITE = {
    f"{activation} {pool} of NaN and infinity": (
        _with(_SMALL, images=lambda x: _put_non_finite(x.copy()))[0],
        {"activation": activation, "pool": pool, "edges": windows(2)},
    )
    for activation, pool in product(ACTIVATIONS, POOLS)
}
NON_FINITE["normed NaN and infinity"] = (
    _with(_SMALL, images=lambda x: _put_non_finite(x.copy()))[0],
    {"activation": "split", "edges": windows(2), "patch_norm": 10.0},
)
