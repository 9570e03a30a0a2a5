"""Preprocessing and contrast normalisation on the CUDA device: the sums of the CPU in the same order, in float64 or integers."""

import math
from functools import cache

import numpy as np
from numba import float32, float64, int64

from streamcnn.kernels import simulated
from streamcnn.kernels.cudadevice import cuda


def _times(a, b):
    return a * b


# a float64 product that the compiler must not fuse with the sum that follows: the CPU's is not
times = _times if simulated() else cuda.libdevice.dmul_rn


@cache
def standardize_kernel(threads: int):
    """(x - mean) / deviation of uint8 images, one block each, all sums in integers: (images, size, out), flat."""
    n_threads, shared_size = np.uint64(threads), 2 * threads

    def standardize(images, size, out):
        sums = cuda.shared.array(shared_size, int64)
        thread, start, n = np.uint64(cuda.threadIdx.x), np.uint64(cuda.blockIdx.x) * np.uint64(size), np.uint64(size)
        total = squares = int64(0)
        for i in range(thread, n, n_threads):
            value = int64(images[start + i])
            total += value
            squares += value * value
        sums[thread], sums[thread + n_threads] = total, squares
        cuda.syncthreads()
        total = squares = int64(0)
        for i in range(n_threads):
            total += sums[i]
            squares += sums[i + n_threads]
        whole = total // size
        rest = float64(total - size * whole) / float64(size)
        about_whole = squares - 2 * whole * total + size * whole * whole
        mean = float64(whole) + rest
        variance = float64(about_whole) / float64(size) - times(rest, rest)
        factor = 0.0 if variance == 0.0 else 1.0 / math.sqrt(variance)
        for i in range(thread, n, n_threads):
            out[start + i] = np.float32((float64(images[start + i]) - mean) * factor)

    return cuda.jit(standardize)


@cache
def standardize_floats_kernel(threads: int):
    """(x - mean) / deviation of float32 images, one block each: (images, size, out), flat.

    The sums are one chain of float64 additions, as on the CPU: all threads load, the first one adds.
    """
    n_threads, shared_size = np.uint64(threads), threads

    def standardize(images, size, out):
        loaded = cuda.shared.array(shared_size, float32)
        result = cuda.shared.array(2, float64)
        thread, start, n = np.uint64(cuda.threadIdx.x), np.uint64(cuda.blockIdx.x) * np.uint64(size), np.uint64(size)
        first = thread == np.uint64(0)
        mean = variance = 0.0
        for turn in range(2):
            total = 0.0
            for begin in range(np.uint64(0), n, n_threads):
                if begin + thread < n:
                    loaded[thread] = images[start + begin + thread]
                cuda.syncthreads()
                if first:
                    for i in range(min(n_threads, n - begin)):
                        value = float64(loaded[i])
                        if turn == 1:
                            value = times(value - mean, value - mean)
                        total += value
                cuda.syncthreads()
            if first:
                result[turn] = total / float64(size)
            cuda.syncthreads()
            mean = result[0]
        variance = result[1]
        factor = 0.0 if variance == 0.0 else 1.0 / math.sqrt(variance)
        for i in range(thread, n, n_threads):
            out[start + i] = np.float32((float64(images[start + i]) - mean) * factor)

    return cuda.jit(standardize)


@cuda.jit
def log_bytes(images, table, out):
    """log(1 + x) of uint8 from a table of 256."""
    for i in range(np.uint64(cuda.grid(1)), np.uint64(out.size), np.uint64(cuda.gridsize(1))):
        out[i] = table[np.uint64(images[i])]


@cuda.jit
def log_floats(images, out):
    """log(1 + x) of float32, computed in float64."""
    for i in range(np.uint64(cuda.grid(1)), np.uint64(out.size), np.uint64(cuda.gridsize(1))):
        out[i] = np.float32(math.log1p(float64(images[i])))


@cuda.jit
def contrast_columns(images, height, row, half, columns):
    """Sums, then sums of squares, over the window's rows around each number: `columns` is (2, n H row) float64, flat."""
    size = np.uint64(images.size)
    for i in range(np.uint64(cuda.grid(1)), size, np.uint64(cuda.gridsize(1))):
        y = int64(i // np.uint64(row)) % height
        total = squares = 0.0
        for other in range(max(y - half, 0), min(y + half + 1, height)):
            value = float64(images[np.uint64(int64(i) + (other - y) * row)])
            total += value
            squares += times(value, value)
        columns[i] = total
        columns[size + i] = squares


@cuda.jit
def smooth_boxes(images, height, width, channels, half, columns, out):
    """The mean of each box from the sums over rows that `contrast_columns` left."""
    for i in range(np.uint64(cuda.grid(1)), np.uint64(out.size), np.uint64(cuda.gridsize(1))):
        col, y = int64(i // np.uint64(channels)) % width, int64(i // np.uint64(channels * width)) % height
        left, right = max(col - half, 0), min(col + half + 1, width)
        total = 0.0
        for other in range(left, right):
            total += columns[np.uint64(int64(i) + (other - col) * channels)]
        out[i] = np.float32(total / float64((min(y + half + 1, height) - max(y - half, 0)) * (right - left)))


@cuda.jit
def contrast_boxes(images, height, width, channels, half, epsilon, columns, out):
    """(x - mean) / (deviation + epsilon) from the sums over rows that `contrast_columns` left."""
    size = np.uint64(out.size)
    for i in range(np.uint64(cuda.grid(1)), size, np.uint64(cuda.gridsize(1))):
        col, y = int64(i // np.uint64(channels)) % width, int64(i // np.uint64(channels * width)) % height
        left, right = max(col - half, 0), min(col + half + 1, width)
        total = squares = 0.0
        for other in range(left, right):
            at = np.uint64(int64(i) + (other - col) * channels)
            total += columns[at]
            squares += columns[size + at]
        count = float64((min(y + half + 1, height) - max(y - half, 0)) * (right - left))
        mean = total / count
        variance = squares / count - times(mean, mean)
        deviation = 0.0 if variance < 0.0 else math.sqrt(variance)
        out[i] = np.float32((float64(images[i]) - mean) / (deviation + epsilon))


@cuda.jit
def inverse_deviations(images, height, width, channels, kernel_rows, kernel_cols, stride, padding, map_rows, map_cols, epsilon, norms):
    """1 / sqrt(variance + epsilon) of every window of a convolution, a thread each: `norms` is (n map_rows map_cols,) float32."""
    for i in range(np.uint64(cuda.grid(1)), np.uint64(norms.size), np.uint64(cuda.gridsize(1))):
        place = int64(i)
        top = place // map_cols % map_rows * stride - padding
        left = place % map_cols * stride - padding
        image = place // (map_rows * map_cols) * height
        first = total = squares = 0.0
        if top >= 0 and top < height and left >= 0 and left < width:
            first = float64(images[np.uint64(((image + top) * width + left) * channels)])
        for y in range(top, top + kernel_rows):
            for x in range(left, left + kernel_cols):
                inside = y >= 0 and y < height and x >= 0 and x < width
                at = ((image + y) * width + x) * channels
                for channel in range(channels):
                    value = -first
                    if inside:
                        value = float64(images[np.uint64(at + channel)]) - first
                    total += value
                    squares += times(value, value)
        count = float64(kernel_rows * kernel_cols * channels)
        value = times(count, squares) - times(total, total)
        value = 0.0 if value < 0.0 else value
        norms[i] = np.float32(1.0 / math.sqrt(value / times(count, count) + epsilon))
