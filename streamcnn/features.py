"""Feature rows of a source's images: convolved chunk by chunk, rounded as the model stores them."""

import hashlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from streamcnn.images import ImageSource
from streamcnn.memory import MemoryMonitor
from streamcnn.network import Network
from streamcnn.system import trim_heap


class DataHash:
    """SHA-256 of the pixels of each `step` images, as delivered, which come in order but may be ahead of those asked for."""

    def __init__(self, step: int):
        self._step = step
        self._hashes: dict[int, Any] = {}

    def add(self, first: int, pixels: np.ndarray) -> None:
        """Take in images from number `first` on, of one and the same step."""
        self._hashes.setdefault(first // self._step, hashlib.sha256()).update(pixels.reshape(-1).view(np.uint8).data)

    def take(self, number: int) -> str:
        """The digest of step `number`, which is complete."""
        return self._hashes.pop(number).hexdigest()


class FeatureExtractor:
    """Reads images and convolves them in chunks, with buffers allocated once.

    While a chunk is convolved on a thread of its own, whoever iterates takes the chunk before it (writes it, say), and the next one is
    read: pixels and rounded rows have two buffers each. All reading stays on the thread that iterates, which so is the only one to
    call HDF5.

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
    data_hash : DataHash or None
        Gets all pixels that are read.
    """

    def __init__(
        self,
        source: ImageSource,
        network: Network,
        dtype: str,
        chunk_size: int,
        n_jobs: int,
        kernels,
        monitor: MemoryMonitor | None = None,
        data_hash: "DataHash | None" = None,
    ):
        self._data_hash = data_hash
        self.source, self.network, self._dtype, self._n_jobs, self._kernels = source, network, dtype, n_jobs, kernels
        self.n_rows, self.n_features, self._monitor = source.n_samples, network.n_features, monitor
        source.n_jobs = n_jobs
        self._allocate(min(chunk_size, max(1, source.n_samples)))

    def _allocate(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        n_buffers = 1 if self.n_rows <= chunk_size else 2
        self._pixels = [np.empty((chunk_size, *self.source.image_shape), self.source.dtype) for _ in range(n_buffers)]
        self._rounded = [np.empty((chunk_size, self.n_features), self._dtype) for _ in range(n_buffers)]
        self._buffers = self.network.allocate(chunk_size, self._n_jobs, self._kernels)

    def _shrink(self) -> None:
        """Let the large buffers go, then make those of the smallest chunk."""
        del self._pixels, self._buffers, self._rounded
        self._allocate(1)
        trim_heap()

    def convolve(self, images: np.ndarray, turn: int = 0) -> np.ndarray:
        """Rounded rows of at most a chunk of images, in the buffer `turn`."""
        rounded = self._rounded[turn][: len(images)]
        self.network.transform_rounded(images, self._buffers, self._kernels, rounded)
        return rounded

    def _read_pixels(self, start: int, stop: int, turn: int) -> None:
        self.source.read(start, stop, self._pixels[turn])
        if self._data_hash is not None:
            self._data_hash.add(start, self._pixels[turn][: stop - start])

    def chunks(self, *ranges: tuple[int, int]) -> Generator[tuple[int, np.ndarray], None, None]:
        """Yield (first row, rounded rows (m, n_features)) for images of each range (start, stop), in order.

        An array is used again for the chunk after the next one.
        """
        if self._monitor is not None and self._monitor.tight and self.chunk_size > 1:
            self._shrink()
        if sum(stop - start for start, stop in ranges) <= self.chunk_size:
            for start, stop in ranges:
                if start < stop:
                    self._read_pixels(start, stop, 0)
                    yield start, self.convolve(self._pixels[0][: stop - start])
            return
        with ThreadPoolExecutor(1, thread_name_prefix="streamcnn convolution") as thread:
            yield from self._overlapped(ranges, thread)

    def _overlapped(self, ranges: Iterable[tuple[int, int]], thread: ThreadPoolExecutor) -> Iterator[tuple[int, np.ndarray]]:
        running: tuple[int, Future[np.ndarray]] | None = None
        turn = 0
        for start, stop in ranges:
            first = start
            while first < stop:
                if self._monitor is not None and self._monitor.tight and self.chunk_size > 1:
                    if running is not None:
                        yield running[0], running[1].result()
                        running = None
                    self._shrink()
                    turn = 0
                n = min(self.chunk_size, stop - first)
                self._read_pixels(first, first + n, turn)
                # queued behind the chunk that is running, and in the buffers of the one before it, which has been taken: handed over only
                # when the running one had ended, each chunk waited up to 5 ms for this thread to let the interpreter go
                before, running = running, (first, thread.submit(self.convolve, self._pixels[turn][:n], turn))
                if before is not None:
                    yield before[0], before[1].result()
                first += n
                turn = (turn + 1) % len(self._pixels)
        if running is not None:
            yield running[0], running[1].result()

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` (float32) with rows `start` to `stop`."""
        from streamcnn.kernels.half import widen

        for first, rows in self.chunks((start, stop)):
            widen(rows, out[first - start : first - start + len(rows)])
