"""Kernels for a CUDA device: see the package for their contract, `cudaloops` and `cudapixels` for what runs there, `cudadevice` for
how it is fed.

Same bits as the CPU. Each output is one accumulator that starts at the bias and takes `fma.rn.f32` in the order of the contract,
then the same comparisons, sums and one product, none of them fused or flushed: IEEE leaves no choice, whatever the tile, the chunk
and the device. The same holds for `standardize`, `local_contrast`, `smooth` and `log` of uint8, in float64. Two exceptions: the bits inside
a NaN, and `log` of float32, where the device's log1p may differ in the last bit of float64, so now and then in that of float32.
No tensor cores, so no TF32.

Scratch is not touched. Its bytes are the bytes of page-locked host memory that transfers go through, its rows the host threads
that copy into and out of that memory.
"""

from functools import cache
from itertools import pairwise

import numpy as np

from streamcnn.kernels import ACTIVATIONS, POOLS
from streamcnn.kernels.checksum import KERNELS as CHECKSUM_KERNELS
from streamcnn.kernels.cudadevice import context_exists, cuda, held_bytes, host_floats, send, stream_chunks
from streamcnn.kernels.cudaloops import NEVER, Tile, conv_kernel
from streamcnn.kernels.cudapixels import (
    contrast_boxes,
    contrast_columns,
    inverse_deviations,
    log_bytes,
    log_floats,
    smooth_boxes,
    standardize_floats_kernel,
    standardize_kernel,
)
from streamcnn.kernels.half import KERNELS as HALF_KERNELS
from streamcnn.kernels.jit import pending_bytes as pending_of

__all__ = [
    "WRITES_HALF",
    "contrast_scratch",
    "conv_lanes",
    "conv_layer",
    "conv_scratch",
    "local_contrast",
    "log",
    "pending_bytes",
    "smooth",
    "standardize",
]

WRITES_HALF = True
# threads x what each computes; `taps` is chosen for the layer
TILES = (Tile(64, 4, 4, 4, 0), Tile(32, 8, 8, 4, 0), Tile(16, 16, 8, 4, 0), Tile(16, 16, 8, 8, 0))
_CONTEXT_BYTES = 384 << 20
_THREADS = 128  # of a block of the kernels that go through memory once


@cache
def choose_tile(n_filters: int, n_taps: int, split: bool) -> Tile:
    """The tile with the fewest instructions per sum that counts; the choice changes no bit.

    Counted in the machine code for compute capability 9.0, not measured on a device. Per thread and tap: one multiply-add for each
    of its sums, a load from shared memory for every 4 pixels or weights, some 6 instructions to gather a pixel and 3 to copy a
    weight; 8 per turn of the innermost loop; per step some 60 for the barrier and the bookkeeping. `split` doubles the pooled sums,
    which leaves no registers for 8 x 8.
    """

    def cost(tile: Tile) -> float:
        sums, taps = tile.cells * tile.filters, tile.taps
        per_tap = sums + (tile.cells + tile.filters) / 4 + (6 * tile.block_cells + 3 * tile.block_filters) / tile.threads
        per_tap += 8 / tile.unrolled
        padded = -(-n_filters // tile.block_filters) * tile.block_filters
        return padded * -(-n_taps // taps) * (taps * per_tap + 60) / sums

    # 48 KiB of shared memory on every device
    tiles = [tile._replace(taps=taps) for tile in TILES for taps in range(min(4, n_taps), 17)]
    fitting = [tile for tile in tiles if 8 * (tile.taps + 1) * (tile.block_cells + tile.block_filters) <= 48 << 10]
    return min((tile for tile in fitting if not (split and tile.filters > 4)), key=cost)


def conv_memory(image_shape, itemsize: int, filters_shape, out_shape) -> tuple[int, int]:
    """Device bytes per image of a chunk in flight, and fixed ones, of `conv_layer`; shapes without the sample axis, `itemsize` of pixels.

    Two chunks are in flight. The largest tile is assumed: the others need less.
    """
    n_filters, n_taps = filters_shape[0], int(np.prod(filters_shape[1:]))
    wide, deep = -(-n_filters // 128) * 128, -(-n_taps // 4) * 4 + 16
    fixed = 4 * (wide * (deep + 1) + 3 * deep + 5 * out_shape[0] * out_shape[1]) + 7 * 256
    return int(np.prod(image_shape)) * itemsize + 4 * int(np.prod(out_shape)), fixed


def conv_scratch(image_shape, filters_shape, out_shape, padding: int, patch_norm: float | None = None) -> int:
    """float32 numbers of page-locked host memory per host thread: a few MiB, or what one image and its results need.

    The deviations of an image's windows lie on the device, a number for each, at most as many as with a stride of 1.
    """
    rows, cols = (side + 2 * padding - k + 1 for side, k in zip(image_shape[:2], filters_shape[1:3]))
    return host_floats(int(np.prod(image_shape)), int(np.prod(out_shape)), 0 if patch_norm is None else 4 * rows * cols)


def conv_lanes(n: int, n_filters: int) -> int:
    """1: images lie as they are; see the package."""
    return 1


def conv_layer(
    images,
    filters,
    bias,
    stride,
    padding,
    activation,
    threshold,
    pool,
    row_edges,
    col_edges,
    scratch,
    out,
    patch_norm=None,
    tile=None,
    limit=None,
) -> bool:
    """Convolution, activation and pooling; see the package.

    `tile` is for tests: every tile gives the same bits. `limit` is the device memory in bytes, by default `device_limit()`.
    """
    if not len(images):
        return True
    if tile is None:
        tile = choose_tile(len(filters), filters[0].size, activation == ACTIVATIONS["split"])
    fixed = conv_memory(images.shape[1:], images.itemsize, filters.shape, out.shape[1:])[1]
    codes, half = (stride, padding, activation, threshold, pool, row_edges, col_edges), out.dtype == np.float16
    launch, beyond, work_bytes = prepare_conv(images.shape[1:], filters, bias, *codes, tile, half, patch_norm)
    stream_chunks(images, out, scratch.nbytes, len(scratch), launch, work_bytes=work_bytes, fixed_bytes=fixed, limit=limit)
    return not (half and beyond.copy_to_host()[0])


def prepare_conv(
    image_shape,
    filters,
    bias,
    stride,
    padding,
    activation,
    threshold,
    pool,
    row_edges,
    col_edges,
    tile: Tile,
    half=False,
    patch_norm=None,
):
    """Send filters and tables to the device; `half` for float16 results.

    Returns
    -------
    launch : callable (stream, images, out, work, n)
        Starts the kernels on n images from flat device arrays.
    beyond : device array of one number
        1 once a float16 result was not finite.
    work_bytes : int
        Bytes of `work` per image: the deviations of its windows.
    """
    height, width, channels = image_shape
    n_filters, n_rows, n_cols, _ = filters.shape
    weights = filters.reshape(n_filters, -1).T
    wide = -(-n_filters // tile.block_filters) * tile.block_filters
    deep = -(-len(weights) // tile.taps) * tile.taps
    padded_weights, padded_bias = np.full((deep, wide), -0.0, np.float32), np.zeros(wide, np.float32)
    padded_weights[: len(weights), :n_filters], padded_bias[:n_filters] = weights, bias
    padded_weights = padded_weights.reshape(deep, -1, tile.block_filters).transpose(1, 0, 2)

    taps = np.zeros((3, deep), np.uint32)
    row, col, channel = (axis.ravel() for axis in np.indices((n_rows, n_cols, channels)))
    taps[:, : len(weights)] = (row * width + col) * channels + channel, row, col
    taps[1, len(weights) :] = NEVER

    rows, cols = (np.array(list(pairwise(edges)), np.int64) for edges in (row_edges, col_edges))
    cells = np.empty((len(rows), len(cols), 4), np.int32)
    cells[..., 0], cells[..., 1] = rows[:, None, 0], cols[None, :, 0]
    cells[..., 2], cells[..., 3] = (rows[:, 1] - rows[:, 0])[:, None], (cols[:, 1] - cols[:, 0])[None, :]
    counts = cells[..., 2].astype(np.int64) * cells[..., 3]
    scales = (1 / counts).astype(np.float32) if pool == POOLS["mean"] else np.ones(counts.shape, np.float32)

    normed = patch_norm is not None
    kernel = conv_kernel(tile, int(activation), int(pool), padding > 0 or deep > len(weights), half, normed)
    largest = cells[..., 2].max(), cells[..., 3].max()
    n_windows = tuple((side + 2 * padding - k) // stride + 1 for side, k in zip((height, width), (n_rows, n_cols)))
    sizes = np.array([height, width, channels, counts.size, n_filters, stride, padding, *largest, *n_windows], np.int64)
    *constants, beyond = send(padded_weights, padded_bias, taps, cells, scales, sizes, np.zeros(1, np.uint32))
    threshold = np.float32(threshold)

    def launch(stream, images, out, work, n):
        norms = constants[0]  # any: they are not looked at
        if normed:
            norms = work.view(np.float32)
            shape = (height, width, channels, n_rows, n_cols, stride, padding, *n_windows)
            inverse_deviations[-(-norms.size // _THREADS), _THREADS, stream](images, *shape, float(patch_norm), norms)
        grid = -(-n * counts.size // tile.block_cells), wide // tile.block_filters
        kernel[grid, tile.threads, stream](images, *constants, norms, threshold, out, beyond)

    return launch, beyond, 4 * n_windows[0] * n_windows[1] if normed else 0


def standardize(images, out, n_threads: int = 1, threads: int = _THREADS) -> None:
    """(x - mean) / deviation of each image; see the package. `threads` of a block are for tests."""
    kernel = (standardize_kernel if images.dtype == np.uint8 else standardize_floats_kernel)(threads)

    def launch(stream, device_images, device_out, work, n):
        kernel[n, threads, stream](device_images, device_images.size // n, device_out)

    _stream_through(images, out, n_threads, launch)


def log(images, out, n_threads: int = 1, threads: int = _THREADS) -> None:
    """log(1 + x); see the package."""
    table = cuda.to_device(np.log1p(np.arange(256.0)).astype(np.float32)) if images.dtype == np.uint8 else None

    def launch(stream, device_images, device_out, work, n):
        grid = -(-device_out.size // threads)
        if table is None:
            log_floats[grid, threads, stream](device_images, device_out)
        else:
            log_bytes[grid, threads, stream](device_images, table, device_out)

    _stream_through(images, out, n_threads, launch)


def _stream_through(images, out, n_threads: int, launch) -> None:
    """`stream_chunks` for steps without scratch: with the page-locked memory that is there, if it is enough."""
    if len(images):
        smallest = 4 * n_threads * host_floats(images[0].size, out[0].size)
        stream_chunks(images, out, max(held_bytes(), smallest), n_threads, launch)


def contrast_scratch(image_shape, window: int) -> int:
    """float32 numbers of page-locked host memory per host thread; two float64 sums for each number lie on the device."""
    size = int(np.prod(image_shape))
    return host_floats(size, size, 16 * size)


def local_contrast(images, window: int, epsilon: float, scratch, out, threads: int = _THREADS, limit=None) -> None:
    """(x - local mean) / (local deviation + epsilon); see the package."""
    _boxes(images, window, float(epsilon), scratch, out, threads, limit)


def smooth(images, window: int, scratch, out, threads: int = _THREADS, limit=None) -> None:
    """Local mean; see the package."""
    _boxes(images, window, None, scratch, out, threads, limit)


def _boxes(images, window: int, epsilon: float | None, scratch, out, threads: int, limit) -> None:
    """Both steps over boxes: the local mean where there is no `epsilon`."""
    _, height, width, channels = images.shape
    half = window // 2

    def launch(stream, device_images, device_out, work, n):
        grid = -(-device_out.size // threads)
        columns = work.view(np.float64)
        contrast_columns[grid, threads, stream](device_images, height, width * channels, half, columns)
        if epsilon is None:
            smooth_boxes[grid, threads, stream](device_images, height, width, channels, half, columns, device_out)
        else:
            contrast_boxes[grid, threads, stream](device_images, height, width, channels, half, epsilon, columns, device_out)

    work_bytes = 16 * height * width * channels
    stream_chunks(images, out, scratch.nbytes, len(scratch), launch, work_bytes=work_bytes, limit=limit)


def pending_bytes(steps: tuple[str, ...], patch_norm: bool = False) -> int:
    """Host bytes this process will still grow by when these kernels come into use; see the package.

    What the driver keeps for a context differs from version to version; this is assumed, and not measured.
    """
    return pending_of([*HALF_KERNELS, *CHECKSUM_KERNELS]) + (0 if context_exists() else _CONTEXT_BYTES)
