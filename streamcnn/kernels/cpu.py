"""Kernels for the CPU: see the package for their contract.

`conv_layer` interleaves L images at a time (L = lanes of a vector register), a band of rows after the other, and convolves from
there: for every tile of positions all tiles of filters, straight into the pooled cells of one row, which are then written back
image by image. Where images are so few that most lanes would idle, a register holds L filters of one image instead, and nothing is
interleaved. Bands, tiles, lanes, workers and their shares of the work decide where a number is computed, never how.
"""

import numpy as np

from streamcnn.errors import ParameterError
from streamcnn.kernels import ACTIVATIONS, POOLS
from streamcnn.kernels.jit import jit, run_workers
from streamcnn.kernels.simd import choose_tile, convolve, deinterleave, interleave, tile_shape

__all__ = ["contrast_scratch", "conv_layer", "conv_scratch", "local_contrast", "log", "standardize"]

TILE = choose_tile()
_MEAN, _SPLIT = POOLS["mean"], ACTIVATIONS["split"]
# a band that stays in a core's second-level cache beside the filters; measured from 128 KiB to 1 MiB
_BAND_BYTES = 3 << 17
# multiply-adds below which starting a thread takes longer than it saves
_ONE_WORKER = 1 << 23
_LINE = 16  # floats of a cache line: a vector that crosses two costs two loads


def conv_scratch(image_shape, filters_shape, out_shape, padding: int, tile: np.ndarray = TILE) -> int:
    """float32 numbers of scratch per worker; see the package.

    A band of interleaved rows, the filters regrouped by tiles, one row of output cells.
    """
    _, wide, lanes = tile.dtype["accumulators"].shape
    n_filters, n_rows, n_cols, channels = filters_shape
    band = _band_rows(image_shape, n_rows, padding, lanes) * (image_shape[1] + 2 * padding) * channels * lanes
    cells = (out_shape[1] * out_shape[2] + 1) * lanes
    # by filter: at least as many as by image, while band and cells are not larger
    regrouped = -(-n_filters // (wide * lanes)) * wide * lanes * (n_rows * n_cols * channels + 1)
    return -(-(band + cells + regrouped) // _LINE) * _LINE + _LINE


def _band_rows(image_shape, n_rows: int, padding: int, lanes: int) -> int:
    """Rows of the padded images to interleave at a time: at least twice what one conv row needs, or few would be of use."""
    height, width, channels = image_shape
    row = 4 * (width + 2 * padding) * channels * lanes
    return min(height + 2 * padding, max(2 * n_rows + 6, _BAND_BYTES // row))


def conv_layer(images, filters, bias, stride, padding, activation, threshold, pool, row_edges, col_edges, scratch, out, tile=TILE) -> None:
    """Convolution, activation and pooling; see the package.

    `tile` is for tests: every tile gives the same bits.
    """
    n, height, width, channels = images.shape
    n_filters, n_rows, n_cols, _ = filters.shape
    if scratch.shape[1] < conv_scratch(images.shape[1:], filters.shape, out.shape[1:], padding, tile):
        raise ParameterError(f"scratch must have conv_scratch(...) columns, got {scratch.shape[1]}: allocate it for this layer")
    if n == 0:
        return
    _, wide, lanes = tile.dtype["accumulators"].shape
    # few images leave lanes empty, and so do few filters: the fewer registers run, the better
    by_filter = n * -(-n_filters // (wide * lanes)) < -(-n // lanes) * -(-n_filters // wide)
    band = _band_rows(images.shape[1:], n_rows, padding, lanes)
    numbers = [n, height, width, channels, n_filters, n_rows, n_cols, stride, padding, activation, pool, band, by_filter]
    sizes = np.array(numbers, np.int64)
    edges = [np.ascontiguousarray(edge, np.int64) for edge in (row_edges, col_edges)]
    n_workers = len(scratch) if n * edges[0][-1] * edges[1][-1] * filters.size > _ONE_WORKER else 1
    arrays = (*_by_type(images), _flat(filters), _flat(bias), *edges, sizes, np.float32(threshold))

    def work(worker):
        skip = -scratch[worker].ctypes.data // 4 % _LINE
        _conv_worker(worker, n_workers, *arrays, scratch[worker, skip:], out.reshape(-1), tile)

    run_workers(work, n_workers)


def _flat(array: np.ndarray) -> np.ndarray:
    """The numbers of a C-contiguous array in one axis, never marked read-only: numba would compile once more for that type."""
    if array.flags.writeable:
        return array.reshape(-1)

    class Writable:
        __array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False), "shape": (array.size,)}

    return np.asarray(Writable())


def _by_type(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images as (uint8, float32), one of them empty, so that one compiled kernel serves both."""
    if images.dtype == np.uint8:
        return _flat(images), np.empty(0, np.float32)
    return np.empty(0, np.uint8), _flat(images)


@jit()
def _conv_worker(worker, n_workers, pixels, floats, filters, bias, row_edges, col_edges, sizes, threshold, buffer, out, tile):
    """The share of one worker; an item is some rows of cells of L images, or by filter of one.

    Parameters
    ----------
    sizes : (13,) int64
        As packed by `conv_layer`.
    buffer : (m,) float32
        This worker's scratch, at the start of a cache line: the band, the output cells, the spare vector, filters, bias.
    """
    n, height, width, channels, n_filters, n_rows, n_cols, stride, padding, activation, pool, band, by_filter = sizes
    _, wide, lanes = tile_shape(tile)
    # images and filters in a vector
    span, grain = (1, lanes) if by_filter else (lanes, 1)
    wide_row = (width + 2 * padding) * channels * span
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
    _regroup(filters, bias, taps.size, buffer, filters_at, bias_at, wide * grain)

    n_blocks = (n + span - 1) // span
    n_cell_rows = row_edges.size - 1
    # few blocks: share out the rows of each, or some workers would idle
    parts = min(n_workers, n_cell_rows) if n_blocks < 8 * n_workers and n_blocks % n_workers else 1
    starts = np.empty(lanes, np.int64)
    for item in range(n_blocks * parts * worker // n_workers, n_blocks * parts * (worker + 1) // n_workers):
        first = item // parts * span
        part = item % parts
        band_start = band_stop = 0
        for i in range(n_cell_rows * part // parts, n_cell_rows * (part + 1) // parts):
            top, bottom = row_edges[i], row_edges[i + 1]
            y = top
            while y < bottom:
                if (bottom - 1) * stride + n_rows > band_stop:
                    band_start = y * stride
                    band_stop = min(height + 2 * padding, band_start + band)
                    for lane in range(lanes):  # lanes beyond the last image repeat it
                        starts[lane] = min(first + lane, n - 1) * height * width * channels
                    shape = (height, width * channels, padding, channels, band_start, band_stop, span)
                    if floats.size:
                        _interleave_rows(floats, starts, shape, buffer, tile)
                    else:
                        _interleave_rows(pixels, starts, shape, buffer, tile)
                y_stop = min(bottom, (band_stop - n_rows) // stride + 1)
                _conv_rows(
                    (y, y_stop, top, bottom, band_start),
                    (stride, channels * span, wide_row, n_vectors, grain, cell, activation, pool),
                    (filters_at, bias_at, cells, spare),
                    *(col_edges, taps, threshold, buffer, tile),
                )
                y = y_stop
            size = n_cells * deep
            for lane in range(lanes):
                starts[lane] = (min(first + lane, n - 1) * n_cell_rows + i) * size
            if by_filter:
                _copy_cells(buffer, cells, n_vectors * lanes, out, starts[0], size, n_filters)
            else:
                _deinterleave_row(buffer, cells, out, starts, size, min(lanes, n - first), tile)


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
    if span == 1 or count < lanes:
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
def _copy_cells(buffer, at, padded, out, start, size, n_filters):
    """Outputs of one image from cells whose filters fill whole vectors, `padded` numbers."""
    for i in range(size):
        out[start + i] = buffer[at + i // n_filters * padded + i % n_filters]


@jit(cache=False)
def _conv_rows(rows, sizes, ats, col_edges, taps, threshold, buffer, tile):
    """Conv rows y to y_stop of one row of cells, position after position in the order of the cells, then of the rows."""
    y, y_stop, top, bottom, band_start = rows
    stride, pixel, wide_row, n_vectors, grain, cell, activation, pool = sizes
    filters_at, bias_at, cells, spare = ats
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
                for vector in range(0, n_vectors, wide):
                    first = vector * grain
                    convolve(
                        *(buffer, taps, places, scales, filters_at + first * taps.size, bias_at + first, cells + vector * lanes),
                        *(n_vectors - vector, spare, n_vectors * lanes, activation, threshold, pool, grain == lanes, tile),
                    )
                filled = 0


def standardize(images, out, n_threads: int = 1) -> None:
    """(x - mean) / deviation of each image; see the package."""
    size = images[0].size if len(images) else 0
    sources = _by_type(images)
    run_workers(lambda worker: _standardize_worker(worker, n_threads, *sources, size, out.reshape(-1)), n_threads)


@jit()
def _standardize_worker(worker, n_workers, pixels, floats, size, out):
    """The share of one worker of `standardize`; `size` is the numbers of one image."""
    n = out.size // max(size, 1)
    for image in range(n * worker // n_workers, n * (worker + 1) // n_workers):
        start = image * size
        if floats.size:
            _standardize(floats[start : start + size], *_moments(floats[start : start + size]), out[start : start + size])
        else:
            _standardize(pixels[start : start + size], *_moments_exact(pixels[start : start + size]), out[start : start + size])


@jit(cache=False)
def _moments(x):
    """Mean and variance in float64, two passes in order."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i])
    mean = total / x.size
    total = 0.0
    for i in range(x.size):
        total += (x[i] - mean) ** 2
    return mean, total / x.size


@jit(cache=False)
def _moments_exact(x):
    """Mean and variance of uint8: all sums in integers, squares about the whole part of the mean so that nothing cancels."""
    total = squares = np.int64(0)
    for i in range(x.size):
        value = np.int64(x[i])
        total += value
        squares += value * value
    whole = total // x.size
    rest = (total - x.size * whole) / x.size
    about_whole = squares - 2 * whole * total + x.size * whole * whole
    return whole + rest, about_whole / x.size - rest * rest


@jit(cache=False)
def _standardize(x, mean, variance, out):
    factor = 0.0 if variance == 0 else 1 / np.sqrt(variance)
    for i in range(x.size):
        out[i] = np.float32((x[i] - mean) * factor)


def log(images, out, n_threads: int = 1) -> None:
    """log(1 + x); see the package."""
    sources = _by_type(images)
    run_workers(lambda worker: _log_worker(worker, n_threads, *sources, _LOG_OF_BYTES, out.reshape(-1)), n_threads)


_LOG_OF_BYTES = np.log1p(np.arange(256.0)).astype(np.float32)


@jit()
def _log_worker(worker, n_workers, pixels, floats, table, out):
    """The share of one worker of `log`."""
    for i in range(out.size * worker // n_workers, out.size * (worker + 1) // n_workers):
        out[i] = np.float32(np.log1p(np.float64(floats[i]))) if floats.size else table[pixels[i]]


def contrast_scratch(image_shape, window: int) -> int:
    """float32 numbers of scratch per worker: four sums in float64 for each number of an image row, and `window` rows."""
    return -(-(8 + window) * image_shape[1] * image_shape[2] // _LINE) * _LINE + _LINE


def local_contrast(images, window: int, epsilon: float, scratch, out) -> None:
    """(x - local mean) / (local deviation + epsilon); see the package."""
    n, height, width, channels = images.shape
    row = width * channels
    if scratch.shape[1] < contrast_scratch(images.shape[1:], window):
        raise ParameterError(f"scratch must have contrast_scratch(...) columns, got {scratch.shape[1]}: allocate it for this window")
    sources, sizes = _by_type(images), (n, height, width, channels, window // 2)

    def work(worker):
        skip = -scratch[worker].ctypes.data // 4 % _LINE
        sums = scratch[worker, skip : skip + 8 * row].view(np.float64).reshape(4, row)
        rows = scratch[worker, skip + 8 * row : skip + (8 + window) * row]
        _contrast_worker(worker, len(scratch), *sources, sizes, float(epsilon), sums, rows, out.reshape(-1))

    run_workers(work, len(scratch))


@jit()
def _contrast_worker(worker, n_workers, pixels, floats, sizes, epsilon, sums, rows, out):
    """The share of one worker of `local_contrast`.

    Every window is summed afresh, columns first, 2 `window` additions a pixel: a running sum would carry the rounding of a
    large pixel, or NaN, through the rest of its row.

    Parameters
    ----------
    sums : (4, W C) float64
        Sums and sums of squares over the window's rows, then over the whole window.
    rows : (window W C,) float32
        Copies of those rows, row y at y % window, because `out` may be the images.
    """
    n, height, width, channels, half = sizes
    row, window = width * channels, 2 * half + 1
    column, column_squares, box, box_squares = sums[0], sums[1], sums[2], sums[3]
    for image in range(n * worker // n_workers, n * (worker + 1) // n_workers):
        loaded = 0
        for y in range(height):
            top, bottom = max(y - half, 0), min(y + half + 1, height)
            while loaded < bottom:
                source, to = (image * height + loaded) * row, loaded % window * row
                for i in range(row):
                    rows[to + i] = floats[source + i] if floats.size else np.float32(pixels[source + i])
                loaded += 1
            sums[:] = 0
            for other in range(top, bottom):
                start = other % window * row
                _add_moments(rows[start : start + row], column, column_squares)
            # column after column for all pixels of the row at once: vectors instead of one long chain of sums
            reach = min(half, width - 1)
            for shift in range(-reach * channels, (reach + 1) * channels, channels):
                start, stop = max(-shift, 0), row - max(shift, 0)
                _add(column[start + shift : stop + shift], box[start:stop])
                _add(column_squares[start + shift : stop + shift], box_squares[start:stop])
            to = (image * height + y) * row
            centre = y % window * row
            for x in range(width):
                left, right = max(x - half, 0), min(x + half + 1, width)
                count = (bottom - top) * (right - left)
                for i in range(x * channels, (x + 1) * channels):
                    mean = box[i] / count
                    variance = box_squares[i] / count - mean * mean
                    deviation = 0.0 if variance < 0 else np.sqrt(variance)
                    out[to + i] = np.float32((rows[centre + i] - mean) / (deviation + epsilon))


@jit(cache=False)
def _add_moments(x, total, squares):
    for i in range(x.size):
        value = np.float64(x[i])
        total[i] += value
        squares[i] += value * value


@jit(cache=False)
def _add(x, total):
    for i in range(x.size):
        total[i] += x[i]
