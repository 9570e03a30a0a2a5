"""Kernels for the CPU: see the package for their contract.

`conv_layer` interleaves L images at a time (L = lanes of a vector register), a band of rows after the other, and convolves from
there: for every tile of positions all tiles of filters, straight into the pooled cells of one row, which are then written back
image by image. Where images are so few that most lanes would idle, a register holds L filters of one image instead, and nothing is
interleaved. Bands, tiles, lanes, workers and their shares of the work decide where a number is computed, never how.

Between two layers that both interleave, images stay so: the first writes its cells, and the second reads its pixels, where they lie.
That takes 1 to 2 % less time in two layers and 2 to 6 % less in three than to write them back and interleave them again; copies to and
from scratch in their place took up to 1 % more in two layers, and 4 % in three.
"""

import numpy as np
from numba import typeof

from streamcnn.errors import ParameterError
from streamcnn.kernels import ACTIVATIONS, LINE, POOLS
from streamcnn.kernels.checksum import KERNELS as CHECKSUM_KERNELS
from streamcnn.kernels.half import KERNELS as HALF_KERNELS
from streamcnn.kernels.jit import by_type, compiles_first, flat, jit, run_workers
from streamcnn.kernels.jit import pending_bytes as pending_of
from streamcnn.kernels.pixels import KERNELS as PIXEL_KERNELS
from streamcnn.kernels.pixels import contrast_scratch, local_contrast, log, smooth, standardize
from streamcnn.kernels.simd import choose_tile, convolve, copy, deinterleave, interleave, inverse_deviations, tile_shape

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

WRITES_HALF = False

TILE = choose_tile()
_MEAN, _SPLIT = POOLS["mean"], ACTIVATIONS["split"]
# a band that stays in a core's second-level cache beside the filters; measured from 128 KiB to 1 MiB
_BAND_BYTES = 3 << 17
# of a worker, where each is a full vector of images at least. Measured beside reading and writing: 8 to 32 take 6 % less time than 4
_SHARES = 16
# multiply-adds below which starting a thread takes longer than it saves
_ONE_WORKER = 1 << 23


def conv_scratch(image_shape, filters_shape, out_shape, padding: int, patch_norm: float | None = None, tile: np.ndarray = TILE) -> int:
    """float32 numbers of scratch per worker; see the package.

    A band of interleaved rows, the filters regrouped by tiles, one row of output cells, the deviations of a tile's windows.
    """
    positions, wide, lanes = tile.dtype["accumulators"].shape
    n_filters, n_rows, n_cols, channels = filters_shape
    band = _band_rows(image_shape, n_rows, padding, lanes) * (image_shape[1] + 2 * padding) * channels * lanes
    cells = (out_shape[1] * out_shape[2] + 1) * lanes
    # by filter: at least as many as by image, while band and cells are not larger
    regrouped = -(-n_filters // (wide * lanes)) * wide * lanes * (n_rows * n_cols * channels + 1)
    norms = 0 if patch_norm is None else positions * lanes
    return -(-(band + cells + regrouped + norms) // LINE) * LINE + LINE


def conv_lanes(n: int, n_filters: int, tile: np.ndarray = TILE) -> int:
    """Lanes where registers hold images and one is full, else 1; see the package. Less than a block would take more memory."""
    lanes = tile.dtype["accumulators"].shape[2]
    return lanes if n >= lanes and not _by_filter(n, n_filters, tile) else 1


def _by_filter(n: int, n_filters: int, tile: np.ndarray) -> bool:
    """Whether a register holds filters. Few images leave lanes empty, and so do few filters: the fewer registers run, the better."""
    _, wide, lanes = tile.dtype["accumulators"].shape
    return n * -(-n_filters // (wide * lanes)) < -(-n // lanes) * -(-n_filters // wide)


def _band_rows(image_shape, n_rows: int, padding: int, lanes: int) -> int:
    """Rows of the padded images to interleave at a time: at least twice what one conv row needs, or few would be of use."""
    height, width, channels = image_shape
    row = 4 * (width + 2 * padding) * channels * lanes
    return min(height + 2 * padding, max(2 * n_rows + 6, _BAND_BYTES // row))


def conv_layer(
    images, filters, bias, stride, padding, activation, threshold, pool, row_edges, col_edges, scratch, out, patch_norm=None, tile=TILE
) -> None:
    """Convolution, activation and pooling; see the package.

    `tile` is for tests: every tile gives the same bits.
    """
    lanes = tile.dtype["accumulators"].shape[2]
    in_blocks, out_blocks = images.ndim == 5, out.ndim == 5
    n = min(len(images) * (lanes if in_blocks else 1), len(out) * (lanes if out_blocks else 1))
    image_shape, out_shape = images.shape[1:4], out.shape[1:4]
    n_filters, n_rows, n_cols, _ = filters.shape
    if scratch.shape[1] < conv_scratch(image_shape, filters.shape, out_shape, padding, patch_norm, tile):
        raise ParameterError(f"scratch must have conv_scratch(...) columns, got {scratch.shape[1]}: allocate it for this layer")
    if n == 0:
        return
    by_filter = not in_blocks and not out_blocks and _by_filter(n, n_filters, tile)
    band = _band_rows(image_shape, n_rows, padding, lanes)
    numbers = [n, *image_shape, n_filters, n_rows, n_cols, stride, padding, activation, pool, band, by_filter, in_blocks, out_blocks]
    sizes = np.array(numbers, np.int64)
    edges = [np.ascontiguousarray(edge, np.int64) for edge in (row_edges, col_edges)]
    n_workers = len(scratch) if n * edges[0][-1] * edges[1][-1] * filters.size > _ONE_WORKER else 1
    arrays = (*by_type(images), flat(filters), flat(bias), *edges, sizes, np.float32(threshold))
    kernel, norm = (_conv_worker, ()) if patch_norm is None else (_normed_worker, (float(patch_norm),))
    if norm and compiles_first(_normed_worker):
        # plans count both, as layers of images without contrast take the other: never used, it would be counted as to be compiled for ever
        _conv_worker.compile(tuple(map(typeof, (0, 1, *arrays, scratch[0], out.reshape(-1), tile))))

    # small shares, taken in turn: a worker whose core also reads or writes files would keep the others waiting with a share of its own
    n_shares = _SHARES * n_workers if n >= _SHARES * n_workers * lanes else n_workers
    shares = iter(range(n_shares))

    def work(worker):
        skip = -scratch[worker].ctypes.data // 4 % LINE
        for share in shares:
            kernel(share, n_shares, *arrays, *norm, scratch[worker, skip:], out.reshape(-1), tile)

    run_workers(work, n_workers)


@jit()
def _conv_worker(worker, n_workers, pixels, floats, filters, bias, row_edges, col_edges, sizes, threshold, buffer, out, tile):
    """`_convolve` without contrast normalisation."""
    _convolve(worker, n_workers, pixels, floats, filters, bias, row_edges, col_edges, sizes, threshold, None, buffer, out, tile)


@jit()
def _normed_worker(worker, n_workers, pixels, floats, filters, bias, row_edges, col_edges, sizes, threshold, epsilon, buffer, out, tile):
    """`_convolve` with it: a kernel of its own, compiled by who needs it."""
    _convolve(worker, n_workers, pixels, floats, filters, bias, row_edges, col_edges, sizes, threshold, epsilon, buffer, out, tile)


@jit(cache=False)
def _convolve(worker, n_workers, pixels, floats, filters, bias, row_edges, col_edges, sizes, threshold, epsilon, buffer, out, tile):
    """Share `worker` of `n_workers`; an item is some rows of cells of L images, or by filter of one.

    Parameters
    ----------
    sizes : (15,) int64
        As packed by `conv_layer`.
    epsilon : float64 or None
        `patch_norm`.
    buffer : (m,) float32
        This worker's scratch, at the start of a cache line: the band, the output cells, the spare vector, filters, bias, deviations.
    """
    n, height, width, channels, n_filters, n_rows, n_cols, stride, padding, activation, pool, band, by_filter, in_blocks, out_blocks = sizes
    _, wide, lanes = tile_shape(tile)
    # images and filters in a vector
    span, grain = (1, lanes) if by_filter else (lanes, 1)
    pixel = channels * span
    wide_row = (width + 2 * padding) * pixel
    # to whoever reads it, a block of images that lie interleaved is one image of all their channels
    read = 1 if in_blocks else span
    depth = pixel // read
    in_place = in_blocks and padding == 0
    source, target = floats if in_place else buffer, out if out_blocks else buffer
    taps = np.empty(n_rows * n_cols * channels, np.int64)
    for row in range(n_rows):
        for i in range(n_cols * channels):
            taps[row * n_cols * channels + i] = row * wide_row + i * span
    n_cells, deep = col_edges.size - 1, n_filters * (2 if activation == _SPLIT else 1)
    n_vectors = (n_filters + grain - 1) // grain
    cell = n_vectors * lanes * deep // n_filters
    cells = band * wide_row
    spare = cells + n_cells * cell
    filters_at = spare + lanes
    bias_at = filters_at + (n_vectors + wide - 1) // wide * wide * grain * taps.size
    norms = bias_at + (n_vectors + wide - 1) // wide * wide * grain
    _regroup(filters, bias, taps.size, buffer, filters_at, bias_at, wide * grain)

    n_blocks = (n + span - 1) // span
    n_cell_rows = row_edges.size - 1
    # few blocks: share out the rows of each, or some workers would idle
    parts = min(n_workers, n_cell_rows) if n_blocks < 8 * n_workers and n_blocks % n_workers else 1
    starts = np.empty(lanes, np.int64)
    for item in range(n_blocks * parts * worker // n_workers, n_blocks * parts * (worker + 1) // n_workers):
        block, part = item // parts, item % parts
        band_start, band_stop = (-block * height, height) if in_place else (0, 0)
        for i in range(n_cell_rows * part // parts, n_cell_rows * (part + 1) // parts):
            top, bottom = row_edges[i], row_edges[i + 1]
            if out_blocks:
                cells = (block * n_cell_rows + i) * n_cells * cell
            y = top
            while y < bottom:
                if (bottom - 1) * stride + n_rows > band_stop:
                    band_start = y * stride
                    band_stop = min(height + 2 * padding, band_start + band)
                    for lane in range(lanes):  # lanes beyond the last image repeat it
                        starts[lane] = min(block * read + lane, n - 1) * height * width * depth
                    shape = (height, width * depth, padding, depth, band_start, band_stop, read)
                    if floats.size:
                        _interleave_rows(floats, starts, shape, buffer, tile)
                    else:
                        _interleave_rows(pixels, starts, shape, buffer, tile)
                y_stop = min(bottom, (band_stop - n_rows) // stride + 1)
                _conv_rows(
                    (y, y_stop, top, bottom, band_start),
                    (stride, pixel, wide_row, n_vectors, grain, cell, activation, pool),
                    (filters_at, bias_at, cells, spare, norms),
                    *(col_edges, taps, threshold, epsilon, source, buffer, target, tile),
                )
                y = y_stop
            size = n_cells * deep
            for lane in range(lanes):
                starts[lane] = (min(block * span + lane, n - 1) * n_cell_rows + i) * size
            if by_filter:
                _copy_cells(buffer, cells, n_vectors * lanes, out, starts[0], size, n_filters)
            elif not out_blocks:
                _deinterleave_row(buffer, cells, out, starts, size, min(lanes, n - block * lanes), tile)


@jit(cache=False)
def _regroup(filters, bias, n_taps, buffer, filters_at, bias_at, wide):
    """(K, taps) filters to (tiles, taps, wide), the last tile and the bias filled up with zeros."""
    n_filters = bias.size
    for k in range((n_filters + wide - 1) // wide * wide):
        buffer[bias_at + k] = bias[k] if k < n_filters else np.float32(0)
        to = filters_at + k // wide * wide * n_taps + k % wide
        for tap in range(n_taps):
            buffer[to + tap * wide] = filters[k * n_taps + tap] if k < n_filters else np.float32(0)


@jit(cache=False)
def _interleave_rows(images, starts, shape, buffer, tile):
    """Rows `band_start` to `band_stop` of the padded images to the front of `buffer`, as (rows, columns, channels, span)."""
    height, row, padding, channels, band_start, band_stop, span = shape
    if padding == 0:
        _interleave_run(images, starts, band_start * row, (band_stop - band_start) * row, buffer, 0, span, tile)
        return
    edge = padding * channels * span
    at = 0
    for y in range(band_start - padding, band_stop - padding):
        inside = 0 <= y < height
        buffer[at : at + (edge if inside else 2 * edge + row * span)] = 0
        if inside:
            _interleave_run(images, starts, y * row, row, buffer, at + edge, span, tile)
            buffer[at + edge + row * span : at + 2 * edge + row * span] = 0
        at += 2 * edge + row * span


@jit(cache=False)
def _interleave_run(images, starts, offset, count, buffer, at, span, tile):
    """`count` consecutive elements of each of `span` images, one or as many as lanes."""
    lanes = tile_shape(tile)[2]
    if span == 1:
        copy(images, starts[0] + offset, buffer, at, count)
        return
    if count < lanes:
        for i in range(count):
            for lane in range(span):
                buffer[at + i * span + lane] = images[starts[lane] + offset + i]
        return
    for i in range(0, count - lanes + 1, lanes):
        interleave(images, starts, offset + i, buffer, at + i * lanes, tile)
    if count % lanes:  # the last block again from its end, in place of a slow rest
        interleave(images, starts, offset + count - lanes, buffer, at + (count - lanes) * lanes, tile)


@jit(cache=False)
def _deinterleave_row(buffer, at, out, starts, count, n_lanes, tile):
    """`count` consecutive outputs of each of the first `n_lanes` images."""
    lanes = tile_shape(tile)[2]
    if count < lanes:
        for lane in range(n_lanes):
            for i in range(count):
                out[starts[lane] + i] = buffer[at + i * lanes + lane]
        return
    for i in range(0, count - lanes + 1, lanes):
        deinterleave(buffer, at + i * lanes, out, starts, i, n_lanes, tile)
    if count % lanes:
        deinterleave(buffer, at + (count - lanes) * lanes, out, starts, count - lanes, n_lanes, tile)


@jit(cache=False)
def _copy_cells(buffer, at, padded, out, start, size, run):
    """`size` outputs, of which each `run` lies at the front of `padded` numbers."""
    for k in range(size // run):
        copy(buffer, at + k * padded, out, start + k * run, run)


@jit(cache=False)
def _conv_rows(rows, sizes, ats, col_edges, taps, threshold, epsilon, source, buffer, target, tile):
    """Conv rows y to y_stop of one row of cells, position after position in the order of the cells, then of the rows."""
    y, y_stop, top, bottom, band_start = rows
    stride, pixel, wide_row, n_vectors, grain, cell, activation, pool = sizes
    filters_at, bias_at, cells, spare, norms = ats
    n_positions, wide, lanes = tile_shape(tile)
    places = np.empty(4 * n_positions, np.int64)
    scales = np.empty(n_positions, np.float32)
    filled = 0
    for j in range(col_edges.size - 1):
        left, right = col_edges[j], col_edges[j + 1]
        scale = np.float32(1 / ((bottom - top) * (right - left))) if pool == _MEAN else np.float32(1)
        for row in range(y, y_stop):
            for col in range(left, right):
                places[filled] = (row * stride - band_start) * wide_row + col * stride * pixel
                places[n_positions + filled] = j * cell
                places[2 * n_positions + filled] = row == top and col == left
                scales[filled] = scale if row == bottom - 1 and col == right - 1 else np.float32(1)
                filled += 1
                last = j == col_edges.size - 2 and row == y_stop - 1 and col == right - 1
                if filled < n_positions and not last:
                    continue
                for p in range(filled, n_positions):  # what does not count still needs pixels to read
                    places[p] = places[0]
                    places[n_positions + p] = -1
                places[3 * n_positions] = filled == n_positions and places[n_positions] == places[2 * n_positions - 1]
                places[3 * n_positions + 1] = filled
                if epsilon is not None:  # once for all filters
                    inverse_deviations(source, buffer, taps, places, norms, epsilon, grain == lanes, tile)
                for vector in range(0, n_vectors, wide):
                    first = vector * grain
                    convolve(
                        *(source, buffer, target, taps, places, scales),
                        (filters_at + first * taps.size, bias_at + first, cells + vector * lanes, spare, norms),
                        *(n_vectors - vector, n_vectors * lanes, activation, threshold, pool, grain == lanes, epsilon, tile),
                    )
                filled = 0


def pending_bytes(steps: tuple[str, ...], patch_norm: bool = False) -> int:
    """Bytes this process will still grow by when these kernels come into use; see the package."""
    convolutions = [_conv_worker, _normed_worker] if patch_norm else [_conv_worker]
    return pending_of([*convolutions, *HALF_KERNELS, *CHECKSUM_KERNELS, *(PIXEL_KERNELS[step] for step in steps)])
