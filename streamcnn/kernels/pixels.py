"""What `cpu` does to pixels before the convolution: see the package for the contract of each."""

import numpy as np

from streamcnn.errors import ParameterError
from streamcnn.kernels import LINE
from streamcnn.kernels.jit import by_type, jit, run_workers


def standardize(images, out, n_threads: int = 1) -> None:
    """(x - mean) / deviation of each image; see the package."""
    size = images[0].size if len(images) else 0
    sources = by_type(images)
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
    sources = by_type(images)
    run_workers(lambda worker: _log_worker(worker, n_threads, *sources, _LOG_OF_BYTES, out.reshape(-1)), n_threads)


_LOG_OF_BYTES = np.log1p(np.arange(256.0)).astype(np.float32)


@jit()
def _log_worker(worker, n_workers, pixels, floats, table, out):
    """The share of one worker of `log`."""
    for i in range(out.size * worker // n_workers, out.size * (worker + 1) // n_workers):
        out[i] = np.float32(np.log1p(np.float64(floats[i]))) if floats.size else table[pixels[i]]


def contrast_scratch(image_shape, window: int) -> int:
    """float32 numbers of scratch per worker: four sums in float64 for each number of an image row, and `window` rows."""
    return -(-(8 + window) * image_shape[1] * image_shape[2] // LINE) * LINE + LINE


def local_contrast(images, window: int, epsilon: float, scratch, out) -> None:
    """(x - local mean) / (local deviation + epsilon); see the package."""
    _boxes(images, window, True, epsilon, scratch, out)


def smooth(images, window: int, scratch, out) -> None:
    """Local mean; see the package."""
    _boxes(images, window, False, 0.0, scratch, out)


def _boxes(images, window: int, contrast: bool, epsilon: float, scratch, out) -> None:
    """Run `_box_worker` on all workers."""
    n, height, width, channels = images.shape
    row = width * channels
    if scratch.shape[1] < contrast_scratch(images.shape[1:], window):
        raise ParameterError(f"scratch must have contrast_scratch(...) columns, got {scratch.shape[1]}: allocate it for this window")
    sources, sizes = by_type(images), (n, height, width, channels, window // 2)

    def work(worker):
        skip = -scratch[worker].ctypes.data // 4 % LINE
        sums = scratch[worker, skip : skip + 8 * row].view(np.float64).reshape(4, row)
        rows = scratch[worker, skip + 8 * row : skip + (8 + window) * row]
        _box_worker(worker, len(scratch), *sources, sizes, contrast, float(epsilon), sums, rows, out.reshape(-1))

    run_workers(work, len(scratch))


@jit()
def _box_worker(worker, n_workers, pixels, floats, sizes, contrast, epsilon, sums, rows, out):
    """The share of one worker of `local_contrast`, or where `contrast` is false of `smooth`, which needs no squares.

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
                if contrast:
                    _add_moments(rows[start : start + row], column, column_squares)
                else:
                    _add(rows[start : start + row], column)
            # column after column for all pixels of the row at once: vectors instead of one long chain of sums
            reach = min(half, width - 1)
            for shift in range(-reach * channels, (reach + 1) * channels, channels):
                start, stop = max(-shift, 0), row - max(shift, 0)
                _add(column[start + shift : stop + shift], box[start:stop])
                if contrast:
                    _add(column_squares[start + shift : stop + shift], box_squares[start:stop])
            to = (image * height + y) * row
            centre = y % window * row
            for x in range(width):
                left, right = max(x - half, 0), min(x + half + 1, width)
                count = (bottom - top) * (right - left)
                for i in range(x * channels, (x + 1) * channels):
                    mean = box[i] / count
                    if not contrast:
                        out[to + i] = np.float32(mean)
                        continue
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


KERNELS = {"standardize": _standardize_worker, "log": _log_worker, "local_contrast": _box_worker, "smooth": _box_worker}
