"""Arrays that are not in memory but slice along the first axis: open HDF5 data sets, zarr, dask, xarray."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from streamcnn.errors import DataError


def is_sliced(data: Any) -> bool:
    """Whether `data` is an array of numbers that can be sliced without loading all of it, and is no NumPy array."""
    if isinstance(data, np.ndarray) or hasattr(data, "tocsr"):
        return False
    try:
        np.dtype(data.dtype)  # a torch tensor's is none
        return isinstance(data.shape, tuple) and hasattr(data, "__getitem__") and len(data.shape) > 0
    except (AttributeError, TypeError):
        return False


def check_known(data: Any, name: str) -> None:
    """Refuse an array that does not know how large it is, as dask's may not; `name` is the argument's."""
    if any(size != size for size in data.shape):
        raise DataError(f"{name} must have a known shape, got {data.shape}; call compute_chunk_sizes() on it first")


class Pieced:
    """An array of `is_sliced`, read in pieces.

    Pixels of a chunk are decoded (zarr, HDF5) or computed (dask) together, however few are asked for. So where a chunk is larger than
    a quarter of a piece, whole chunks are read, and the latest one is kept for the read that goes on in it. (40,960 images of 64 x 64 from
    zarr in chunks of 64 MiB: 0.8 s; in pieces of 4 MiB, each of which decodes a chunk, 5.9 s.)

    Parameters
    ----------
    data : array-like
    piece_bytes : int
        Bytes of a slice, where chunks are no larger.
    """

    def __init__(self, data: Any, piece_bytes: int):
        self.data = data
        self.row_bytes = max(1, math.prod(data.shape[1:]) * np.dtype(data.dtype).itemsize)
        self.piece_rows = max(1, piece_bytes // self.row_bytes)
        rows = min(_chunk_rows(data), data.shape[0])
        self.chunk_rows = rows if rows * self.row_bytes > piece_bytes // 4 else 0
        self._kept: tuple[int, np.ndarray] | None = None

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, values) of neighbouring slices that are rows `start` to `stop`; the values are not to be written to."""
        while start < stop:
            if not self.chunk_rows:
                end = min(start + self.piece_rows, stop)
                yield start, np.asarray(self.data[start:end])
            else:
                first, chunk = self._chunk(start)
                end = min(first + len(chunk), stop)
                yield start, chunk[start - first : end - first]
            start = end

    def _chunk(self, row: int) -> tuple[int, np.ndarray]:
        """First row and values of the chunk with `row`; another thread may change which one is kept in the meantime."""
        first, kept = row - row % self.chunk_rows, self._kept
        if kept is None or kept[0] != first:
            self._kept = None  # let go of before the next one is made
            self._kept = kept = first, np.asarray(self.data[first : first + self.chunk_rows])
        return kept

    def claims(self, most_rows: int) -> dict[str, int]:
        """Bytes held while at most `most_rows` are read at once. What a dask graph computes on the way to its chunks is not known."""
        if self.chunk_rows:
            # decoded, and what it was decoded or computed from
            return {"conversion": self.chunk_rows * self.row_bytes, "chunks of the array": 2 * self.chunk_rows * self.row_bytes}
        return {"conversion": min(self.piece_rows, most_rows) * self.row_bytes}

    def close(self) -> None:
        """Let go of the chunk."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _chunk_rows(data: Any) -> int:
    """Rows that `data` decodes or computes together: HDF5's and zarr's `chunks` (its `shards` hold several) are sizes, dask's and xarray's
    a tuple of sizes for each axis."""
    chunks = getattr(data, "chunks", None)
    if not isinstance(chunks, tuple) or not chunks:
        return 0
    rows = max(chunks[0], default=0) if isinstance(chunks[0], tuple) else chunks[0]
    return int(rows) if isinstance(rows, (int, np.integer)) else 0
