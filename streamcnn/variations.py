"""Any number of images made from a few: row r is a pure function of (seed, r), computed when it is read."""

import hashlib
from collections.abc import Iterator

import numpy as np

from streamcnn.errors import DataError, ParameterError
from streamcnn.images import ImageSource
from streamcnn.labels import encode_labels
from streamcnn.threads import resolve_n_jobs

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORIGINALS_BYTES = 64 << 20
_PIECE = 1 << 16


def hash_counters(key: np.uint64, counters: np.ndarray) -> np.ndarray:
    """splitmix64 of the counters under `key`: uint64, the same on every machine."""
    with np.errstate(over="ignore"):
        x = key + counters.astype(np.uint64) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def seed_key(seed: int) -> np.uint64:
    check_whole("seed", seed, 0)
    # hashed, so that the rows of seed 1 are not those of seed 0 moved on by one
    return hash_counters(np.uint64(0x5EED), np.array([seed % 2**64], np.uint64))[0]


def check_whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ParameterError(f"{name} must be a whole number of at least {least}, got {value!r}")


class Variations(ImageSource):
    """Images made from pictures held in memory; what a row looks like follows from its key, a hash of seed and row number.

    So any chunk of any range has the same pixels, and a longer stream starts with a shorter one.

    Parameters
    ----------
    pictures : ndarray of shape (k, ...)
    picture_labels : ndarray of shape (k,)
    n_samples : int
    image_shape : (height, width, channels)
    seed : int
    originals : array of int
        Rows of the pictures to draw from.

    Attributes
    ----------
    original_index : int32 (n_samples,)
        Row of the picture that each image was made from.
    """

    def __init__(self, pictures: np.ndarray, picture_labels: np.ndarray, n_samples: int, image_shape, seed: int, originals: np.ndarray):
        check_whole("n_samples", n_samples, 1)
        self.seed, self._key = int(seed), seed_key(seed)
        self._pictures, self._picture_labels, self._allowed = pictures, picture_labels, originals
        codes, classes = encode_labels(picture_labels, len(picture_labels))
        self.original_index, labels = np.empty(n_samples, np.int32), np.empty(n_samples, np.int32)
        # in pieces: memory grows by these two numbers an image alone
        for start in range(0, n_samples, _PIECE):
            piece = slice(start, min(start + _PIECE, n_samples))
            # from other bits than the kernel's draws, which hash these keys once more
            place = self._keys(piece.start, piece.stop) % np.uint64(len(originals))
            self.original_index[piece] = originals[place.astype(np.int64)]
            labels[piece] = codes[self.original_index[piece]]
        counts = np.bincount(labels, minlength=len(classes))
        if not counts.all():  # few images do not draw every class
            drawn = np.flatnonzero(counts)
            labels, classes = np.searchsorted(drawn, labels).astype(np.int32), classes[drawn]
        super().__init__(n_samples, image_shape, np.uint8, (labels, classes))

    def _keys(self, start: int, stop: int) -> np.ndarray:
        return hash_counters(self._key, np.arange(start, stop))

    def _fill(self, start, stop, out):
        self._vary(
            self._keys(start, stop), self.original_index[start:stop].astype(np.int64), out, min(resolve_n_jobs(None), max(1, stop - start))
        )

    def _vary(self, keys: np.ndarray, originals: np.ndarray, out: np.ndarray, n_threads: int) -> None:
        raise NotImplementedError

    def blocks(self, block_size: int = 1024) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (images, labels, original_index) of following rows; images are a view of one buffer used again."""
        start = 0
        for images, _ in self.iter_chunks(block_size):
            index = self.original_index[start : start + len(images)]
            yield images, self._picture_labels[index], index
            start += len(images)

    def _scratch(self, chunk_size):
        fixed = self._pictures.nbytes + self.original_index.nbytes + self._allowed.nbytes + self._picture_labels.nbytes
        return {"originals": fixed, "keys": 4 * 8 * min(chunk_size, self.n_samples)}

    def _identity(self):
        allowed = hashlib.sha256(self._allowed.astype("<i8").tobytes()).hexdigest()
        return {**super()._identity(), "seed": self.seed, "originals": allowed}


class VariedImages(Variations):
    """Crops of real images, resized, mirrored and made lighter or darker: a data set as large as wanted out of one that fits on a disk.

    A crop has 60 to 100 % of the sides and lies anywhere; half of the images are mirrored; brightness changes by up to 25 %; each
    drawn uniformly from a hash of (seed, row). Pixels are bilinear between pixel centres.

    Parameters
    ----------
    source : ImageSource
        uint8 images with labels; as many of them as fill 64 MiB, spread evenly, are read and held.
    n_samples : int
    size : (height, width)
    seed : int
    mirror : bool
        False for digits, letters and all else that has a right way round.
    """

    kind = "varied"

    def __init__(self, source: ImageSource, n_samples: int, size: tuple[int, int], seed: int = 0, mirror: bool = True):
        if source.dtype != np.uint8 or source.labels is None or source.classes_ is None:
            raise DataError(
                f"variations need 8-bit images with labels, got {source.dtype} {'without' if source.labels is None else 'with'} labels"
            )
        if len(size) != 2 or min(size) < 1:
            raise ParameterError(f"size must be (height, width) of at least one pixel, got {size!r}")
        kept = min(source.n_samples, max(1, _ORIGINALS_BYTES // source.row_values))
        rows = np.arange(kept) * source.n_samples // kept
        pictures = np.empty((kept, *source.image_shape), np.uint8)
        source.read_rows(rows, pictures)
        self.mirror, self._of = bool(mirror), source.fingerprint()
        shape = (*map(int, size), source.image_shape[2])
        super().__init__(pictures, source.classes_[source.labels[rows]], n_samples, shape, seed, np.arange(kept))

    def _vary(self, keys, originals, out, n_threads):
        from streamcnn.kernels.warp import crop  # numba is loaded by those who draw images only

        crop(self._pictures, keys, originals, self.mirror, out, n_threads)

    def _identity(self):
        return {**super()._identity(), "mirror": self.mirror, "of": self._of}
