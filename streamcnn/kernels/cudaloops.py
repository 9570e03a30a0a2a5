"""The convolution on the CUDA device: a factory of kernels whose sizes are compile-time constants.

The convolution is a matrix product that is never written down: rows are output cells of all images one after the other, columns
filters, and the inner dimension the taps. A block of threads computes `cells` x `filters` of it. For each position of the pooling
window it walks through all taps in order, some at a time: their pixels are gathered and their weights copied into shared memory
while the previous ones are multiplied, and each thread keeps a small tile of sums, and of pooled sums, in registers.

All indices are unsigned: numba guards a signed one against being negative, several instructions each (seen in the PTX).
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import float32, int32, int64

from streamcnn.kernels import ACTIVATIONS, POOLS, simulated
from streamcnn.kernels.cudadevice import cuda, intrinsic

SIMULATED = simulated()
NEVER = 1 << 24  # a row outside of every image
ZERO, ONE, MINUS_ONE, INFINITY = (np.float32(value) for value in (0, 1, -1, np.inf))
HALF_END = np.float32(65520)  # the first number that float16 rounds to infinity


class Tile(NamedTuple):
    """Threads of a block, and what each computes.

    A thread's cells and filters come in groups of 4 neighbours; `block_cells` must divide `threads`. `taps` are in shared memory at
    a time.
    """

    cell_threads: int
    filter_threads: int
    cells: int
    filters: int
    taps: int

    @property
    def threads(self) -> int:
        return self.cell_threads * self.filter_threads

    @property
    def block_cells(self) -> int:
        return self.cell_threads * self.cells

    @property
    def block_filters(self) -> int:
        return self.filter_threads * self.filters

    @property
    def unrolled(self) -> int:
        """Taps per turn of the innermost loop: at most 192 multiply-adds; more the compiler does not unroll (seen in the PTX)."""
        return max(k for k in range(1, 7) if self.taps % k == 0 and k * self.cells * self.filters <= 192)


if SIMULATED:

    def load4(array, i):
        """Elements i to i + 3."""
        return array[i], array[i + np.uint64(1)], array[i + np.uint64(2)], array[i + np.uint64(3)]

else:
    from llvmlite import ir
    from numba import types

    @intrinsic
    def load4(typingctx, array, i):
        """Elements i to i + 3, i a multiple of 4, of a flat float32 array whose data begin at a multiple of 16 bytes, in one load.

        Left to itself the compiler finds this load for some tiles and misses it for others (seen in the PTX).
        """

        def generate(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            vector = ir.VectorType(ir.FloatType(), 4)
            loaded = builder.load(builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer()))
            loaded.align = 16
            numbers = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), k)) for k in range(4)]
            return context.make_tuple(builder, signature.return_type, numbers)

        return types.UniTuple(types.float32, 4)(array, i), generate


@cuda.jit(device=True)
def spread(i, thread, threads):
    """Where in its block's row or column the i-th cell or filter of a thread lies: groups of 4 neighbours, `threads` groups apart.

    With all of a thread's side by side, a warp's loads from shared memory would meet in half the banks.
    """
    four = np.uint64(4)
    return i // four * four * threads + thread * four + i % four


@cuda.jit(device=True)
def rectified(value, threshold):
    """max(value - threshold, 0) that lets NaN through: an ordered comparison is false for it."""
    value = value - threshold
    return ZERO if value < ZERO else value


@cuda.jit(device=True)
def clipped(value):
    """min(max(value, -1), 1) that lets NaN through."""
    value = MINUS_ONE if value < MINUS_ONE else value
    return ONE if value > ONE else value


@cuda.jit(device=True)
def larger(old, new):
    """The larger of two numbers, NaN when one is."""
    return new if new > old or new != new else old


@cache
def conv_kernel(tile: Tile, activation: int, pool: int, checked: bool, to_half: bool, normed: bool):
    """The convolution kernel for a tile, an activation and a kind of pooling; `checked` where pixels may lie outside the image,
    `to_half` for float16 results, `normed` where each sum is multiplied by the inverse deviation of its window.

    It is compiled anew in every process: numba-cuda's cache raises where no folder can be written, and again and again once a file was
    cut short, which `jit` prevents for the CPU with internals that are others here and cannot be tried without a device.

    The kernel's arguments, all arrays flat:

    - images : (n H W C,) uint8 or float32
    - filters : (F / f, T, f) float32 with the f filters of a block; taps T and filters F rounded up to what `tile` takes at a time,
      taps beyond the last -0.0: that times a pixel of 0 is -0.0, which changes no sum, not even another -0.0
    - bias : (F,) float32
    - taps : (3 T,) uint32, for all: numbers from a window's first pixel to the tap's; its row, `NEVER` beyond the last; its column
    - cells : (4 n_cells,) int32, for each cell of one image: first row and column of its window on the conv map, height, width
    - scales : (n_cells,) float32, what the cell is multiplied by at the end
    - sizes : (11,) int64: H, W, C, cells of one image, K, stride, padding, height and width of the largest window and of the conv map
    - norms : (n map height map width,) float32, what `inverse_deviations` left, or anything
    - threshold : float32
    - out : (n n_cells (K or 2 K),) float32, or float16: rounded to nearest, ties to even, as `half.narrow` does
    - beyond : (1,) uint32, made 1 when a float16 result is not finite; else left as it is
    """
    options = {}
    if tile.cells * tile.filters <= 32 and activation != ACTIVATIONS["split"] and not SIMULATED:
        # two blocks of 256 threads on a multiprocessor: ptxas takes 170 to 190 on its own, and needs no spill at 128
        options["max_registers"] = 128
    return cuda.jit(**options)(conv_function(tile, activation, pool, checked, to_half, normed))


def conv_function(tile: Tile, activation: int, pool: int, checked: bool, to_half: bool, normed: bool):
    """The Python function behind `conv_kernel`."""
    clip, absolute, split = (activation == ACTIVATIONS[name] for name in ("clip", "abs", "split"))
    is_max = pool == POOLS["max"]
    n_threads, n_taps, block_cells, block_filters = (
        np.uint64(size) for size in (tile.threads, tile.taps, tile.block_cells, tile.block_filters)
    )
    cell_threads, filter_threads, n_p, n_f = (np.uint64(size) for size in tile[:4])
    local_p, local_f = tile.cells, tile.filters
    negatives = tile.filters if split else 1
    pixels_size, weights_size, windows_size = (2 * tile.taps * tile.block_cells, 2 * tile.taps * tile.block_filters, 2 * tile.block_cells)
    pixels_half, weights_half = np.uint64(pixels_size // 2), np.uint64(weights_size // 2)
    local_pixels, local_weights = (-(-size // 2 // tile.threads) for size in (pixels_size, weights_size))
    n_pixels, n_weights = np.uint64(local_pixels), np.uint64(local_weights)
    tap_step = np.uint64(tile.threads // tile.block_cells)
    unrolled = np.uint64(tile.unrolled)
    zero, one, two, three, four = (np.uint64(number) for number in range(5))

    def conv(images, filters, bias, taps, cells, scales, sizes, norms, threshold, out, beyond):
        if SIMULATED:  # which knows no alignment
            pixels_ = cuda.shared.array(pixels_size, float32)
            weights_ = cuda.shared.array(weights_size, float32)
        else:
            pixels_ = cuda.shared.array(pixels_size, float32, alignment=16)
            weights_ = cuda.shared.array(weights_size, float32, alignment=16)
        windows = cuda.shared.array(windows_size, int32)
        acc = cuda.local.array((local_p, local_f), float32)
        pooled = cuda.local.array((local_p, local_f), float32)
        pooled_negative = cuda.local.array((local_p, negatives), float32)
        x = cuda.local.array(local_p, float32)
        w = cuda.local.array(local_f, float32)
        next_pixels = cuda.local.array(local_pixels, float32)
        next_weights = cuda.local.array(local_weights, float32)

        height, width, channels, n_cells, n_filters = sizes[0], sizes[1], sizes[2], np.uint64(sizes[3]), np.uint64(sizes[4])
        stride, padding, window_rows, window_cols, map_rows, map_cols = sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10]
        deep = n_filters * two if split else n_filters
        all_taps = np.uint64(taps.size) // three
        first_row = np.uint64(cuda.blockIdx.y) * all_taps
        n_out = np.uint64(out.size) // deep
        thread = np.uint64(cuda.threadIdx.x)
        filter_thread, cell_thread = thread % filter_threads, thread // filter_threads
        first_cell, first_filter = np.uint64(cuda.blockIdx.x) * block_cells, np.uint64(cuda.blockIdx.y) * block_filters

        # the cell that this thread gathers pixels for, and its window
        mine, first_tap = thread % block_cells, thread // block_cells
        cell = min(first_cell + mine, n_out - one)
        place = cell % n_cells * four
        top, left, rows, cols = cells[place], cells[place + one], cells[place + two], cells[place + two + one]
        image = int64(cell // n_cells) * height * width * channels
        if first_tap == zero:
            windows[mine] = rows
            windows[mine + block_cells] = cols

        for p in range(n_p):
            for f in range(n_f):
                acc[p, f] = ZERO if normed else bias[first_filter + spread(f, filter_thread, filter_threads)]
                pooled[p, f] = -INFINITY if is_max else ZERO
                if split:
                    pooled_negative[p, f] = -INFINITY if is_max else ZERO

        # step by step: the window's positions, row by row, and for each the taps; what is gathered is one step ahead
        u, v, at = int64(0), int64(0), zero
        ahead_u, ahead_v, ahead_at = int64(0), int64(0), zero
        y, x0 = top * stride - padding, left * stride - padding
        base = image + (y * width + x0) * channels
        n_steps = np.uint64(window_rows * window_cols) * (all_taps // n_taps)
        for step in range(n_steps + one):
            more = step < n_steps
            if more:
                for i in range(n_pixels):
                    tap = first_tap + i * tap_step
                    if (i + one) * tap_step <= n_taps or tap < n_taps:
                        tap += ahead_at
                        value = ZERO
                        if checked:
                            row, col = y + taps[all_taps + tap], x0 + taps[all_taps * two + tap]
                            if row >= 0 and row < height and col >= 0 and col < width:
                                value = np.float32(images[np.uint64(base + taps[tap])])
                        else:
                            value = np.float32(images[np.uint64(base + taps[tap])])
                        next_pixels[i] = value
                ahead_weight = (first_row + ahead_at) * block_filters + thread
                for i in range(n_weights):
                    if (i + one) * n_threads <= weights_half or thread + i * n_threads < weights_half:
                        next_weights[i] = filters[ahead_weight + i * n_threads]
                ahead_at += n_taps
                if ahead_at == all_taps:
                    ahead_at = zero
                    ahead_v += 1
                    if ahead_v == window_cols:
                        ahead_v = int64(0)
                        ahead_u += 1
                    # beyond the cell's own window its last position again, which is not counted
                    y = (top + min(ahead_u, int64(rows) - 1)) * stride - padding
                    x0 = (left + min(ahead_v, int64(cols) - 1)) * stride - padding
                    base = image + (y * width + x0) * channels

            if step > zero:
                half = (step + one) % two
                pixel, weight = half * pixels_half + cell_thread * four, half * weights_half + filter_thread * four
                last = weight + weights_half
                while weight < last:
                    for k in range(unrolled):
                        for p in range(zero, n_p, four):
                            x[p], x[p + one], x[p + two], x[p + three] = load4(pixels_, pixel + k * block_cells + p * cell_threads)
                        for f in range(zero, n_f, four):
                            w[f], w[f + one], w[f + two], w[f + three] = load4(weights_, weight + k * block_filters + f * filter_threads)
                        for p in range(n_p):
                            for f in range(n_f):
                                acc[p, f] = cuda.fma(x[p], w[f], acc[p, f])
                    pixel += unrolled * block_cells
                    weight += unrolled * block_filters
                at += n_taps
                if at == all_taps:
                    at = zero
                    for p in range(n_p):
                        local = spread(p, cell_thread, cell_threads)
                        if u < windows[local] and v < windows[local + block_cells]:
                            if normed:
                                cell = min(first_cell + local, n_out - one)
                                place = cell % n_cells * four
                                row = int64(cell // n_cells) * map_rows + cells[place] + u
                                norm = norms[np.uint64(row * map_cols + cells[place + one] + v)]
                            for f in range(n_f):
                                value = acc[p, f]
                                if normed:
                                    value = cuda.fma(value, norm, bias[first_filter + spread(f, filter_thread, filter_threads)])
                                if split:
                                    negative = rectified(-value, threshold)
                                    old = pooled_negative[p, f]
                                    pooled_negative[p, f] = larger(old, negative) if is_max else old + negative
                                if clip:
                                    value = clipped(value)
                                else:
                                    value = rectified(abs(value) if absolute else value, threshold)
                                pooled[p, f] = larger(pooled[p, f], value) if is_max else pooled[p, f] + value
                        for f in range(n_f):
                            acc[p, f] = ZERO if normed else bias[first_filter + spread(f, filter_thread, filter_threads)]
                    v += 1
                    if v == window_cols:
                        v = int64(0)
                        u += 1

            if more:
                half = step % two
                pixel, weight = half * pixels_half + thread, half * weights_half + thread
                for i in range(n_pixels):
                    if (i + one) * tap_step <= n_taps or first_tap + i * tap_step < n_taps:
                        pixels_[pixel + i * n_threads] = next_pixels[i]
                for i in range(n_weights):
                    if (i + one) * n_threads <= weights_half or thread + i * n_threads < weights_half:
                        weights_[weight + i * n_threads] = next_weights[i]
            # one barrier a step: what is written now was last read two steps ago
            cuda.syncthreads()

        for p in range(n_p):
            cell = first_cell + spread(p, cell_thread, cell_threads)
            if cell < n_out:
                scale = scales[cell % n_cells]
                for f in range(n_f):
                    k = first_filter + spread(f, filter_thread, filter_threads)
                    if k < n_filters:
                        value = pooled[p, f] * scale
                        out[cell * deep + k] = value
                        if to_half and not abs(value) < HALF_END:
                            beyond[zero] = np.uint32(1)
                        if split:
                            value = pooled_negative[p, f] * scale
                            out[cell * deep + n_filters + k] = value
                            if to_half and not abs(value) < HALF_END:
                                beyond[zero] = np.uint32(1)

    return conv


@cuda.jit
def multiply_adds(factor, turns, out):
    """What the device can do at most, to compare with: 16 chains of `turns` multiply-adds in registers."""
    sums = cuda.local.array(16, float32)
    for i in range(16):
        sums[i] = np.float32(cuda.threadIdx.x + i)
    for _ in range(turns):
        for i in range(16):
            sums[i] = cuda.fma(sums[i], factor, factor)
    total = ZERO
    for i in range(16):
        total += sums[i]
    if total == INFINITY:  # never; but the compiler cannot know, and has to compute the sums
        out[np.uint64(cuda.blockIdx.x)] = total
