"""The loops that touch every pixel: their contract, and the choice of the machine that runs them.

Each of `naive` (float64 reference), `cpu` and, where there is one, `cuda` is a module with what is listed below under the same
names and signatures; tests hold them together. Callers check shapes, types and ranges; kernels write `out` and allocate nothing
that grows with the images.

conv_layer(images, filters, bias, stride, padding, activation, threshold, pool, row_edges, col_edges, scratch, out, patch_norm=None)
    Convolution, activation and pooling of every image.

    - images : (n, H, W, C) uint8 or float32, C-contiguous; zero padding of `padding` pixels on all sides
    - filters : (K, kh, kw, C) float32, the layer's gain folded in; bias : (K,) float32
    - conv map : r = sum w * x + bias, a cross-correlation, of (H + 2 padding - kh) // stride + 1 rows, columns likewise
    - patch_norm : None, or e > 0: contrast normalisation, r = (sum w * x) / s + bias with s = sqrt(v + e) and v the variance, divided by
      the count, of the window's kh kw C pixels, padding included
    - activation : code from `ACTIVATIONS`, with t = threshold: relu max(r - t, 0); abs max(|r| - t, 0); clip min(max(r, -1), 1);
      split the K channels max(r - t, 0), then the K channels max(-r - t, 0)
    - pool : code from `POOLS`; output cell (i, j) is the mean or largest value of conv rows row_edges[i] to row_edges[i + 1] and
      columns col_edges[j] to col_edges[j + 1] (int64, ascending, cells not empty); no pooling is edges 0, 1, 2, ...
    - scratch : (n_threads, m) float32 with m at least `conv_scratch(...)`; its rows are the number of workers. `cuda` leaves it
      untouched and takes as many bytes of page-locked memory instead: so a plan that counts the scratch counts those
    - out : (n, len(row_edges) - 1, len(col_edges) - 1, K, or 2 K for split) float32, C-contiguous; with `WRITES_HALF` also
      float16: then each number is rounded as `half.narrow` does, and the result is false when one of them is not finite

    Where `conv_lanes` can be L > 1, `images` and `out`, both float32, may each be interleaved: (ceil(n / L), H, W, C, L), with image
    b L + l at [b, ..., l] and anything in lanes beyond the last image. The other array tells n, or all lanes count.

    NaN in a window is NaN in its cell. The bits of a cell follow from its own image alone: one float32 accumulator started at
    the bias, fused multiply-adds in the order (row, column, channel) of the filter, then a sequential sum or maximum over the
    window in row-major order, times float32(1 / count) for the mean. (`naive` computes in float64 and rounds once.) With `patch_norm`
    the accumulator starts at 0, and r = fma(accumulator, i, bias) with i = float32(1 / s) from sums in float64 of the differences d to
    the window's first pixel, and of their squares, in the same order: v = max(n sum d^2 - (sum d)^2, 0) / n^2 of n pixels. Sums of
    differences lose nothing to a large offset, are exact for uint8, and 0 where all pixels are equal.

conv_lanes(n, n_filters) -> int
    L where `conv_layer` with so many images and filters gains by interleaved ones, else 1: they are to lie as they are. Of the n that
    fill equally many blocks, it is L for the larger ones. Always 1 in `naive` and `cuda`, which know no interleaved images.

conv_scratch(image_shape, filters_shape, out_shape, padding, patch_norm=None) -> int
    float32 numbers of scratch per worker; shapes without the sample axis.

standardize(images, out, n_threads=1)
    (x - mean) / deviation over all pixels and channels of each image; a constant image gives zeros.

log(images, out, n_threads=1)
    log(1 + x); values are above -1.

local_contrast(images, window, epsilon, scratch, out)
    (x - m) / (s + epsilon) with mean m and deviation s of the channel over the box of `window` x `window` pixels (odd) around the
    pixel, cut at the image's edge.

smooth(images, window, scratch, out)
    The mean of the channel over that box.

contrast_scratch(image_shape, window) -> int
    float32 numbers of scratch per worker for either.

WRITES_HALF
    Whether `conv_layer` rounds to float16 itself: true where the results then take a shorter way.

pending_bytes(steps, patch_norm=False) -> int
    What the process will still grow by when convolution, with `patch_norm` where some layer has it, and these preprocessing steps are
    first called: compiler and compiled code.

`standardize`, `log`, `local_contrast` and `smooth` read (n, H, W, C) uint8 or float32 and write float32 `out` of the same shape,
which may be `images` itself.
"""

import importlib
import os
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np

from streamcnn.errors import DeviceError, ParameterError

ACTIVATIONS = {"relu": 0, "abs": 1, "clip": 2, "split": 3}
POOLS = {"mean": 0, "max": 1}
DEVICES = ("auto", "cpu", "cuda", "naive")
LINE = 16
"""Floats of a cache line: a vector that crosses two costs two loads."""


def empty_lines(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 array that starts at a cache line, for `scratch` and `out`.

    numpy's begin 16 bytes into one, and then every full vector stored touches two lines: 5 % of the time of a layer with few taps.
    """
    size = int(np.prod(shape))
    room = np.empty(size + LINE, np.float32)
    skip = -room.ctypes.data // 4 % LINE
    return room[skip : skip + size].reshape(shape)


def simulated() -> bool:
    """Whether numba simulates a CUDA device, for tests."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


@lru_cache(maxsize=1)
def cuda_problem() -> str | None:
    """Why device "cuda" cannot be used, or None when it can; asked once per process, and without importing numba where there is no CUDA."""
    if not simulated() and find_spec("numba_cuda") is None:
        return 'numba-cuda is not installed: pip install "numba-cuda[cu13]", or "numba-cuda[cu12]" where the driver is for CUDA 12'
    try:
        device = importlib.import_module("streamcnn.kernels.cudadevice")
    except Exception as error:  # an old numba-cuda beside a new numba: "auto" must still find the CPU
        return f"numba-cuda cannot be imported ({error}); update it"
    return device.problem()


def resolve_device(device: str) -> str:
    """The device that will do the work: the one asked for; for `"auto"` `"cuda"` where one can be used, else `"cpu"`.

    Raises
    ------
    DeviceError
        For `"cuda"` without a usable device: never another one instead.
    ParameterError
        For any other name.
    """
    if device not in DEVICES:
        raise ParameterError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "auto":
        return "cuda" if not simulated() and cuda_problem() is None else "cpu"
    if device == "cuda" and cuda_problem() is not None:
        raise DeviceError(f'device "cuda" is not there: {cuda_problem()}, or use "cpu" or "auto"')
    return device


def get_kernels(device: str) -> ModuleType:
    """The kernel module of a device, resolved first; same errors."""
    # imported here: numba takes a second, which `import streamcnn` should not
    return importlib.import_module(f"streamcnn.kernels.{resolve_device(device)}")
