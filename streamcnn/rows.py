"""Blocks of rows at fixed places: the unit in which every floating-point result is computed.

The same matrix product cut into other blocks has other last bits. So all linear algebra runs on blocks of a fixed number of
rows that start at multiples of that number, the last one padded with zeros, however the rows arrive.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from streamcnn.slicing import Pieced

# blocks of rows are no larger
_PIECE_BYTES = 8 << 20


def block_rows(n_features: int) -> int:
    """Rows of a block: a power of two from 64 to 1024 that keeps a float32 block near 8 MiB; follows the width alone."""
    fitting = max(1, (8 << 20) // (4 * n_features))
    return min(1024, max(64, 1 << (fitting.bit_length() - 1)))


class Rows(Protocol):
    """Rows that can be read again and again, from any place: a store, or images convolved on demand."""

    n_rows: int
    n_features: int

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` (float32) with rows `start` to `stop`."""


class ArrayRows:
    """A 2-D array, in memory or one that slices, seen as `Rows`."""

    def __init__(self, array):
        self.array = array if isinstance(array, np.ndarray) else Pieced(array, _PIECE_BYTES)
        self.n_rows, self.n_features = map(int, array.shape)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        if isinstance(self.array, np.ndarray):
            out[: stop - start] = self.array[start:stop]
            return
        for first, rows in self.array.pieces(start, stop):
            out[first - start : first - start + len(rows)] = rows


def iter_blocks(rows: Rows, block: np.ndarray, first: int = 0) -> Iterator[tuple[int, int]]:
    """Read `rows` from row `first`, where a block starts, block by block into `block` (block_rows, n_features), zero-padding the last.

    Yields
    ------
    (start, n_valid) : int, int
        First row of the block and how many of its rows are real.
    """
    size = len(block)
    for start in range(first, rows.n_rows, size):
        n_valid = min(size, rows.n_rows - start)
        rows.read(start, start + n_valid, block)
        block[n_valid:] = 0
        yield start, n_valid


def recut(
    batches: Iterable[np.ndarray], block: np.ndarray, copy: Callable[[np.ndarray, np.ndarray], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Like `iter_blocks` for rows that arrive in batches of any size: the same blocks whatever the batches.

    Each batch is (m, n_features); `block` is filled in turn and must be used before the next step. `copy(source, target)` converts
    rows on the way, where assignment would be slow.
    """
    size, start, filled = len(block), 0, 0
    for batch in batches:
        taken = 0
        while taken < len(batch):
            n = min(size - filled, len(batch) - taken)
            if copy is None:
                block[filled : filled + n] = batch[taken : taken + n]
            else:
                copy(batch[taken : taken + n], block[filled : filled + n])
            filled, taken = filled + n, taken + n
            if filled == size:
                yield start, size
                start, filled = start + size, 0
    if filled:
        block[filled:] = 0
        yield start, filled


def row_hash(seed: int, rows) -> np.ndarray:
    """A uint64 for each row number, by which rows are chosen: the same for the same seed wherever and in what order it is asked.

    The finaliser of SplitMix64 (Steele, Lea & Flood 2014), first over the seed, then over seed + row.
    """
    return _mix(_mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64)) + np.asarray(rows).astype(np.uint64))


def sample_rows(n_rows: int, size: int, seed: int) -> np.ndarray:
    """`size` of `n_rows` row numbers, ascending: one from each of `size` equal stretches, placed there by a hash of the seed.

    Folders are sorted by class, so equal stretches are a sample stratified by label.
    """
    stretch = np.arange(size, dtype=np.int64)
    first, last = stretch * n_rows // size, (stretch + 1) * n_rows // size
    return first + (row_hash(seed, stretch) % (last - first).astype(np.uint64)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
