"""Feature rows of a source's images: convolved chunk by chunk, rounded as the model stores them."""

from collections.abc import Iterator

import numpy as np

from streamcnn.images import ImageSource
from streamcnn.network import Network, round_features


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
    """

    def __init__(self, source: ImageSource, network: Network, dtype: str, chunk_size: int, n_jobs: int, kernels):
        self.source, self.network, self.chunk_size, self._kernels = source, network, chunk_size, kernels
        self.n_rows, self.n_features = source.n_samples, network.n_features
        chunk_size = min(chunk_size, max(1, source.n_samples))
        self._pixels = np.empty((chunk_size, *source.image_shape), source.dtype)
        self._buffers = network.allocate(chunk_size, n_jobs, kernels)
        self._rounded = np.empty((chunk_size, self.n_features), dtype)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rounded rows (m, n_features)) for images `start` to `stop`; the array is reused."""
        for first in range(start, stop, self.chunk_size):
            n = min(self.chunk_size, stop - first)
            self.source.read(first, first + n, self._pixels)
            rows = self.network.transform(self._pixels[:n], self._buffers, self._kernels)
            round_features(rows, self._rounded[:n])
            yield first, self._rounded[:n]

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` (float32) with rows `start` to `stop`."""
        from streamcnn.kernels.half import widen

        for first, rows in self.chunks(start, stop):
            widen(rows, out[first - start : first - start + len(rows)])
