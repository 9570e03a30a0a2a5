"""The machine's rate of fused multiply-adds, measured: what no convolution can pass.

The chains of `simd.multiply_adds` live in registers alone, as many as the tile of `cpu.conv_layer` has accumulators: enough to
hide the latency of the unit, and no load or store beside them.
"""

import time

import numpy as np

from streamcnn.kernels.cpu import TILE
from streamcnn.kernels.jit import jit, run_workers
from streamcnn.kernels.simd import multiply_adds, tile_shape

__all__ = ["multiply_add_rate"]


@jit()
def _peak_worker(n_steps, numbers, tile):
    """`n_steps` multiply-adds on each of the tile's accumulators; returns the number of floating-point operations.

    Parameters
    ----------
    numbers : (P F + 2,) float32
        Start of each chain, then factor and summand; the front is overwritten, so that nothing is optimised away.
    """
    multiply_adds(n_steps, numbers, tile)
    n_positions, n_filters, lanes = tile_shape(tile)
    return 2 * n_steps * n_positions * n_filters * lanes


def multiply_add_rate(n_threads: int, n_steps: int = 1 << 23) -> float:
    """Floating-point operations per second of `n_threads` threads that do nothing else, two per multiply-add.

    Parameters
    ----------
    n_threads : int
    n_steps : int
        Links of each chain; the default takes some 40 ms, beside which the start of a thread is nothing.
    """
    positions, filters, _ = TILE.dtype["accumulators"].shape
    numbers = np.empty((n_threads, positions * filters + 2), np.float32)
    # distinct starts, or the compiler would merge the chains; r <- 0.5 r + 0.5 stays a normal number
    numbers[:, :-2] = np.arange(1, positions * filters + 1)
    numbers[:, -2:] = 0.5
    _peak_worker(1, numbers[0].copy(), TILE)
    counts = [0] * n_threads

    def work(worker):
        counts[worker] = _peak_worker(n_steps, numbers[worker], TILE)

    start = time.perf_counter()
    run_workers(work, n_threads)
    return sum(counts) / (time.perf_counter() - start)
