"""Mean and covariance of rows that stream by: exact, mergeable, in one d x d matrix."""

import numpy as np

from streamcnn.checkpoint import Checkpoint
from streamcnn.eigen import few_rows, leading_pairs, pairs_of_few
from streamcnn.errors import DataError
from streamcnn.rowinput import Batches, Pieces, blocks_of, is_rows
from streamcnn.rows import Rows, block_rows
from streamcnn.threads import limit_blas, share

# columns of the Gram matrix computed at a time. Measured at 4,096 and 8,192 features: as fast as a whole `ssyrk` and faster
# than 1,024, without a second d x d matrix for the block's product
_STRIP = 256
# narrower rows are multiplied by all threads together, as parts would be too small
_NARROW = 1024


def gram_rows(n_features: int) -> int:
    """Rows of a block whose product is added at once: a power of two up to 2,048 that keeps a float32 block near 32 MiB.

    Each addition passes through the whole float64 matrix. Measured at 4,096 features: 58 ms for 512 rows in blocks of 512, 51 in
    blocks of 2,048, of which 46 are the product, at the speed of SGEMM.
    """
    fitting = max(1, (32 << 20) // (4 * n_features))
    return max(block_rows(n_features), min(2048, 1 << (fitting.bit_length() - 1)))


def n_strips(n_features: int, n_jobs: int) -> int:
    """Strips of the Gram matrix that are computed at the same time."""
    return min(n_jobs, -(-n_features // _STRIP)) if n_features >= _NARROW else 1


class Moments:
    """Count, sum and second moments of rows shifted by a fixed estimate of their mean.

    Products of a block are computed in the rows' own precision and added up in float64: summing in float32 throughout lost
    11 % of the variance at an offset of 100, and without the shift the offset's square would drown the variance.

    Parameters
    ----------
    shift : ndarray of shape (d,)
        Anything near the mean; rounded to `dtype`.
    dtype : numpy dtype
        float32 or float64, that of the blocks.
    n_jobs : int
        Threads. From 1,024 features on the sums have the same bits for any number.

    Attributes
    ----------
    n : int
    shift, total : ndarray of shape (d,), float64
        `total` is the sum of the shifted rows.
    gram : ndarray of shape (d, d), float64
        The lower triangle is the sum of outer products of the shifted rows; the upper one is scratch.
    """

    def __init__(self, shift: np.ndarray, dtype, n_jobs: int = 1):
        d = len(shift)
        self.n = 0
        self.shift = shift.astype(dtype).astype(np.float64)
        self.total = np.zeros(d)
        self.gram = np.zeros((d, d))
        self._strips = [np.empty(min(_STRIP, d) * d, dtype) for _ in range(n_strips(d, n_jobs))]

    @classmethod
    def about(cls, block: np.ndarray, n_valid: int, n_jobs: int) -> "Moments":
        """Of no rows yet, shifted by the mean of the first `n_valid` rows of `block`."""
        return cls(block[:n_valid].mean(axis=0, dtype=np.float64), block.dtype, n_jobs)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything, as arrays; not copied."""
        return {"n": np.array(self.n), "shift": self.shift, "total": self.total, "gram": self.gram}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], dtype, n_jobs: int) -> "Moments":
        """What `to_arrays` gave, in the memory of `arrays`."""
        made = cls(arrays["shift"], dtype, n_jobs)
        made.n, made.total, made.gram = int(arrays["n"]), arrays["total"], arrays["gram"]
        return made

    def add(self, block: np.ndarray, n_valid: int) -> None:
        """Take in a zero-padded block (fixed rows, d) of `n_valid` rows. `block` is overwritten.

        Costs rows * d^2 multiplications, half of a full product. Threads take strips of columns, each with its product and the sum: by
        threads within the products alone, every sum and the shift, a fifth of the time at 4,096 features, would be left to one of them.
        """
        shift = self.shift.astype(block.dtype)
        # the widest ones last into the queue and first out of it, so that no thread is left with a long one at the end
        starts = range(0, len(shift), _STRIP)[::-1]

        def prepare(start: int) -> None:
            here = slice(start, start + _STRIP)
            block[:n_valid, here] -= shift[here]
            self.total[here] += block[:, here].sum(axis=0, dtype=np.float64)

        def multiply(start: int) -> None:
            stop = min(start + _STRIP, len(shift))
            buffer = self._strips.pop()
            strip = buffer[: (stop - start) * stop].reshape(stop - start, stop)
            np.matmul(block[:, start:stop].T, block[:, :stop], out=strip)
            self.gram[start:stop, :stop] += strip
            self._strips.append(buffer)

        n_threads = len(self._strips)
        if n_threads == 1:
            for work in (prepare, multiply):
                share(work, starts, 1)
        else:
            with limit_blas(1):
                for work in (prepare, multiply):
                    share(work, starts, n_threads)
        self.n += n_valid

    def merge(self, other: "Moments") -> None:
        """Take in the rows that `other` has seen. `other` stays as it is.

        With delta = other.shift - self.shift, sum (x + delta)(x + delta)' = sum xx' + delta t' + t delta' + n delta delta'.
        """
        delta = other.shift - self.shift
        total = other.total
        for start in range(0, len(delta), _STRIP):
            stop = min(start + _STRIP, len(delta))
            here, left = slice(start, stop), slice(0, stop)
            self.gram[here, left] += other.gram[here, left]
            self.gram[here, left] += np.outer(delta[here], total[left] + other.n * delta[left])
            self.gram[here, left] += np.outer(total[here], delta[left])
        self.total += total + other.n * delta
        self.n += other.n

    @property
    def mean(self) -> np.ndarray:
        """Mean of the rows: (d,), float64."""
        return self.shift + self.total / self.n

    @property
    def variance(self) -> np.ndarray:
        """Variance of each column, divided by n: (d,), float64."""
        return np.maximum(self.gram.diagonal() / self.n - np.square(self.total / self.n), 0)

    def leading(self, k: int, few: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `k` largest eigenvalues of the covariance (divided by n - 1) and their eigenvectors.

        Parameters
        ----------
        k : int
        few : ndarray of shape (n, d) or None
            All rows there were, of which there are few: by these it takes a fraction of the time.

        Returns
        -------
        values : ndarray of shape (k,), float64
            Descending, none below 0.
        vectors : ndarray of shape (k, d), float64
            Rows of unit length; of each, the coefficient of largest size is positive.

        Raises
        ------
        DataError
            When squares of the rows were too large for their precision.

        Notes
        -----
        LAPACK destroys one triangle and the diagonal. The covariance is built in the unused upper triangle, so that the moments
        survive and no second float64 d x d matrix is needed. Only the leading pairs are computed: all of them took five times as
        long at 8,192 columns.
        """
        d = len(self.total)
        mean = self.total / self.n
        diagonal = self.gram.diagonal().copy()
        check_squares(diagonal)
        if few is not None:
            values, vectors = pairs_of_few(few, k)
            return values / (self.n - 1), make_largest_positive(vectors)
        for start in range(0, d, _STRIP):
            stop = min(start + _STRIP, d)
            covariance = np.outer(self.total[start:stop], mean[:stop])
            np.subtract(self.gram[start:stop, :stop], covariance, out=covariance)
            covariance /= self.n - 1
            self.gram[:start, start:stop] = covariance[:, :start].T
            corner, upper = self.gram[start:stop, start:stop], np.triu_indices(stop - start)
            corner[upper] = covariance[:, start:].T[upper]
        try:
            # the transpose is in Fortran order, so that nothing is copied; its lower triangle is the upper one here
            values, vectors = leading_pairs(self.gram.T, k)
        finally:
            np.fill_diagonal(self.gram, diagonal)
        return np.maximum(values[::-1], 0), make_largest_positive(np.ascontiguousarray(vectors[:, ::-1].T))


def moments_of(source: Rows | Batches, dtype, n_jobs: int, checkpoint: Checkpoint) -> tuple[Moments, np.ndarray | None]:
    """Moments of all rows, and all rows themselves, (n, d) of `dtype`, where they are few (`eigen.few_rows`).

    Parameters
    ----------
    source : Rows or Batches
    dtype : numpy dtype
    n_jobs : int
    checkpoint : Checkpoint
        Keeps the sums between blocks; not of few rows, as sums would lead to other bits than these.

    Raises
    ------
    DataError
        When there is no row, or for NaN or infinity.
    """
    d, state = source.n_features, None
    most = few_rows(d)
    few = np.empty((most, d), dtype) if getattr(source, "n_rows", 0) <= most else None
    if few is not None and is_rows(source):
        checkpoint = Checkpoint()
    if (left := checkpoint.left()) is not None:
        state = Moments.from_arrays(left, dtype, n_jobs)
    block = np.empty((gram_rows(d), d), dtype)
    pieces = Pieces(source, block_rows(d)) if is_rows(source) else source
    for start, n_valid in blocks_of(pieces, block, 0 if state is None else state.n):
        if few is not None and start + n_valid > most:
            few = None
        if few is not None:
            few[start : start + n_valid] = block[:n_valid]
        if state is None:
            state = Moments.about(block, n_valid, n_jobs)
        state.add(block, n_valid)
        checkpoint.keep(state.to_arrays)
    if state is None:
        raise DataError("X must have at least 2 rows, got 0 sample(s)")
    return state, None if few is None else few[: state.n]


def check_squares(squares: np.ndarray) -> None:
    """Refuse sums of squares of finite rows that have overflowed: LAPACK would give no eigenpairs of them, or none that mean anything."""
    if not np.isfinite(squares).all():
        raise DataError("X must have squares that its precision holds (1e38 for float32), got larger ones; divide X by a constant")


def make_largest_positive(vectors: np.ndarray) -> np.ndarray:
    """Flip those rows of `vectors` (k, d) whose coefficient of largest size is negative, in place: the sign convention."""
    for vector in vectors:
        if vector[np.abs(vector).argmax()] < 0:
            np.negative(vector, out=vector)
    return vectors
