"""Feature rows of a source's images: convolved chunk by chunk, rounded as the model stores them."""

from collections.abc import Iterator

import numpy as np

from streamcnn.images import ImageSource
from streamcnn.memory import MemoryMonitor
from streamcnn.network import Network, round_features
from streamcnn.system import trim_heap


class FeatureExtractor:
    """Reads images and convolves them in chunks, with buffers allocated once.

    Also usable as `rows.Rows`: any range of rows is computed on demand, bit-equal to what a store would hold.

    Parameters
    ----------
    source : ImageSource
    network : Network
    dtype : "float16" or "float32"
    chunk_size : int
        Images per kernel call.
    n_jobs : int
    kernels : module
        As `kernels.get_kernels` gives it.
    monitor : MemoryMonitor or None
        Once it is `tight`, chunks are single images.
    """

    def __init__(
        self, source: ImageSource, network: Network, dtype: str, chunk_size: int, n_jobs: int, kernels, monitor: MemoryMonitor | None = None
    ):
        self.source, self.network, self._dtype, self._n_jobs, self._kernels = source, network, dtype, n_jobs, kernels
        self.n_rows, self.n_features, self._monitor = source.n_samples, network.n_features, monitor
        self._allocate(min(chunk_size, max(1, source.n_samples)))

    def _allocate(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self._pixels = np.empty((chunk_size, *self.source.image_shape), self.source.dtype)
        self._buffers = self.network.allocate(chunk_size, self._n_jobs, self._kernels)
        self._rounded = np.empty((chunk_size, self.n_features), self._dtype)

    def _shrink(self) -> None:
        """Let the large buffers go, then make those of the smallest chunk."""
        del self._pixels, self._buffers, self._rounded
        self._allocate(1)
        trim_heap()

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rounded rows (m, n_features)) for images `start` to `stop`; the array is reused."""
        first = start
        while first < stop:
            if self._monitor is not None and self._monitor.tight and self.chunk_size > 1:
                self._shrink()
            n = min(self.chunk_size, stop - first)
            self.source.read(first, first + n, self._pixels)
            rows = self.network.transform(self._pixels[:n], self._buffers, self._kernels)
            round_features(rows, self._rounded[:n])
            yield first, self._rounded[:n]
            first += n

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` (float32) with rows `start` to `stop`."""
        from streamcnn.kernels.half import widen

        for first, rows in self.chunks(start, stop):
            widen(rows, out[first - start : first - start + len(rows)])
