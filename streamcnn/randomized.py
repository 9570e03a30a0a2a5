"""PCA of rows too wide for a d x d matrix: a few passes, each multiplying a block of directions by the covariance.

Block Krylov iteration (Musco & Musco, *Randomized block Krylov methods for stronger and faster approximate singular value
decomposition*, 2015). Plain block power iteration, of which only the last block is kept, needs two to three times the passes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from streamcnn.checkpoint import Checkpoint
from streamcnn.errors import DataError
from streamcnn.krylov import KrylovSpace
from streamcnn.moments import check_squares, make_largest_positive
from streamcnn.rowinput import Batches, Pieces, blocks_of, check_finite, is_rows
from streamcnn.rows import Rows, block_rows, recut

logger = logging.getLogger("streamcnn")

# passes at most. Eigenvalues falling as i^-2 need two, as 1/i three to four, as i^-0.25 five
PASSES = 6
# passes end when less than this share of the variance that exact components capture is missing, by `Leading.missing`
_MISSING = 6e-5
# consecutive rows of the sample, which is read from all over the source
_STRIPE = 16


def n_directions(n_features: int, n_components: int) -> int:
    """Directions multiplied at a time: `n_components` and a quarter more, at least 16 more.

    Measured on eigenvalues 1/i, 16,384 columns and 256 components, missing after three passes: 11e-5 of the captured variance with an
    eighth more, 6e-5 with a quarter, 2e-5 with a half.
    """
    return min(n_features, n_components + max(16, n_components // 4))


def n_sample_rows(n_components: int) -> int:
    """Rows of the sample whose own components are the first directions: four for each component."""
    return 4 * n_components


def pass_rows(n_features: int, width: int) -> int:
    """Rows of a block, of which `width` directions are taken.

    Each block's product is added to a float64 matrix of width x d. Measured at 16,384 columns and 288 directions: with 128 rows that adding
    took as long as the product, with 512 a tenth.
    """
    return max(block_rows(n_features), min(512, 1 << (2 * width - 1).bit_length()))


class CovarianceProduct:
    """Sums of one pass, from which the covariance times a block of directions follows; sums of parts of the rows can be merged.

    Block products are in the rows' own precision and added up in float64, as in `Moments`.

    Parameters
    ----------
    directions : ndarray of shape (l, d), float64
    shift : ndarray of shape (d,)
        Anything near the mean; rounded to `dtype`.
    dtype : numpy dtype
        float32 or float64, that of the blocks.
    n_rows : int
        Of a block.
    squares : bool
        Whether to sum the squares of each column too.

    Attributes
    ----------
    n : int
    total : ndarray of shape (d,), float64
        Sum of the shifted rows.
    squares : ndarray of shape (d,), float64, or None
    product : ndarray of shape (l, d), float64
        Sum of (x q) x' over shifted rows x, for each direction q.
    """

    def __init__(self, directions: np.ndarray, shift: np.ndarray, dtype, n_rows: int, squares: bool = False):
        self.n = 0
        self.shift = shift.astype(dtype).astype(np.float64)
        self.total = np.zeros(len(shift))
        self.squares = np.zeros(len(shift)) if squares else None
        self.product = np.zeros(directions.shape)
        self._directions = directions.astype(dtype)
        self._projected = np.empty((n_rows, len(directions)), dtype)
        self._product = np.empty(directions.shape, dtype)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The sums, as arrays; not copied."""
        squares = {} if self.squares is None else {"squares": self.squares}
        return {"n": np.array(self.n), "total": self.total, "product": self.product} | squares

    def go_on(self, arrays: dict[str, np.ndarray]) -> None:
        """Take the sums that `to_arrays` gave, made with the same directions and shift, for one's own."""
        self.n, self.total, self.product = int(arrays["n"]), arrays["total"], arrays["product"]
        self.squares = arrays.get("squares")

    def add(self, block: np.ndarray, n_valid: int) -> None:
        """Take in a zero-padded block (n_rows, d) of `n_valid` rows. `block` is overwritten. 4 * n_rows * l * d operations."""
        block[:n_valid] -= self.shift.astype(block.dtype)
        self.total += block.sum(axis=0, dtype=np.float64)
        if self.squares is not None:
            self.squares += np.einsum("ij,ij->j", block, block)
        np.matmul(block, self._directions.T, out=self._projected)
        np.matmul(self._projected.T, block, out=self._product)
        self.product += self._product
        self.n += n_valid

    def merge(self, other: "CovarianceProduct") -> None:
        """Take in the sums of other rows, made with the same directions and shift. `other` stays as it is."""
        self.n += other.n
        self.total += other.total
        if self.squares is not None and other.squares is not None:
            self.squares += other.squares
        self.product += other.product

    @property
    def mean(self) -> np.ndarray:
        """Mean of the rows: (d,), float64."""
        return self.shift + self.total / self.n

    def variance(self) -> np.ndarray:
        """Variance of each column, divided by n: (d,), float64."""
        assert self.squares is not None
        return np.maximum(self.squares / self.n - np.square(self.total / self.n), 0)

    def finish(self) -> np.ndarray:
        """The covariance (divided by n - 1) times the directions, in the memory of `product`: (l, d), float64.

        With t the sum of shifted rows: (sum (x q) x' - (t q) t' / n) / (n - 1).
        """
        mean = self.total / self.n
        for row, direction in zip(self.product, self._directions):
            row -= (direction.astype(np.float64) @ mean) * self.total
        self.product /= max(self.n - 1, 1)
        return self.product


@dataclass
class RandomizedResult:
    """What `randomized_pca` finds: eigenpairs as `Moments.leading` gives them, `mean` and `variance` (d,), counts, and `missing`."""

    values: np.ndarray
    vectors: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    n: int
    n_passes: int
    missing: float


def randomized_pca(
    source: Rows | Batches, most: int, resolve: Callable[[int], int], dtype, seed: int, checkpoint: Checkpoint
) -> RandomizedResult:
    """Leading principal components in a few passes over `source`.

    Parameters
    ----------
    source : Rows or Batches
    most : int
        Components wanted, as far as known before the rows are counted.
    resolve : callable
        Number of rows -> components wanted; raises when there are too few rows.
    dtype : numpy dtype
        Of blocks and their products.
    seed : int
    checkpoint : Checkpoint
        Keeps the directions and the sums of the pass between blocks.

    Returns
    -------
    RandomizedResult

    Raises
    ------
    DataError
        For NaN or infinity, values whose squares overflow, or fewer than two rows.
    """
    d, width = source.n_features, n_directions(source.n_features, most)
    n_passes, n, mean, variance = 0, 0, np.zeros(d), np.zeros(d)
    left = checkpoint.left()
    if left is not None and not 0 <= int(left["n_passes"]) < PASSES:
        raise ValueError(f"a checkpoint of pass {left['n_passes']}, which there is none of")
    if left is None:
        shift, start = _start(source, most, width, dtype, seed)
        space = KrylovSpace(start)
        del start
    else:
        space = KrylovSpace.from_arrays(left)
        shift, mean, variance, n_passes, n = left["shift"], left["mean"], left["variance"], int(left["n_passes"]), int(left["n"])
        k = resolve(n) if n_passes else 0
        trace = _trace(variance, n)
    block = np.empty((pass_rows(d, width), d), dtype)

    def state() -> dict[str, np.ndarray]:
        facts = {"shift": shift, "mean": mean, "variance": variance, "n_passes": np.array(n_passes), "n": np.array(n)}
        return space.to_arrays() | facts | {f"sums {name}": array for name, array in sums.to_arrays().items()}

    while True:
        sums = CovarianceProduct(space.blocks[-1], shift, dtype, len(block), squares=n_passes == 0)
        if left is not None:
            sums.go_on({name.removeprefix("sums "): array for name, array in left.items() if name.startswith("sums ")})
            left = None
        for _, n_valid in blocks_of(Pieces(source, block_rows(d)) if is_rows(source) else source, block, sums.n):
            sums.add(block, n_valid)
            checkpoint.keep(state)
        n_passes += 1
        if n_passes == 1:
            if sums.n < 2:
                raise DataError(f"X must have at least 2 rows, got {sums.n} sample(s)")
            k = resolve(sums.n)
            n, mean, variance = sums.n, sums.mean, sums.variance()
            shift, trace = mean, _trace(variance, n)
            check_squares(variance)
        product = sums.finish()
        del sums
        space.extend(product)
        del product
        leading = space.leading(k, trace, min(n - 1, d))
        # one pass cannot tell: directions in which few rows vary, absent from the sample, show in the second
        if space.finished or (n_passes > 1 and leading.missing <= _MISSING):
            break
        if n_passes == PASSES:
            logger.warning(
                "randomized PCA ended after %d passes with about %.2f %% of the variance that exact components capture missing: "
                'the spectrum is flat; solver="covariance" or fewer components do better',
                PASSES,
                100 * leading.missing,
            )
            break
    del block
    vectors = make_largest_positive(space.directions(leading.weights))
    return RandomizedResult(leading.values, vectors, mean, variance, n, n_passes, leading.missing)


def _trace(variance: np.ndarray, n: int) -> float:
    """Of the covariance, from variances that are divided by n."""
    return float(variance.sum()) * n / max(n - 1, 1)


def _start(source, n_components: int, width: int, dtype, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An estimate of the mean (d,) and directions (width, d), float64: components of a sample of rows, and random ones.

    Against random directions alone the sample saves half a pass to a whole one. The random ones find what the sample does not hold.
    """
    sample = _sample(source, n_sample_rows(n_components), dtype)
    mean = sample.mean(axis=0, dtype=np.float64)
    sample -= mean.astype(dtype)
    n = len(sample)
    n_taken, products = min(n, n_components), (sample @ sample.T).astype(np.float64)
    check_squares(products.diagonal())
    values, vectors = eigh(products, overwrite_a=True, subset_by_index=(n - n_taken, n - 1))
    vectors = vectors[:, values > 1e-6 * max(values[-1], 0.0)].astype(dtype)
    start = np.empty((width, sample.shape[1]))
    start[: vectors.shape[1]] = vectors.T @ sample
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    generator.standard_normal(out=start[vectors.shape[1] :])
    return mean, start


def _sample(source: Rows | Batches, size: int, dtype) -> np.ndarray:
    """At most `size` finite rows: stripes from all over `Rows`, which may be sorted by class; the first ones of `Batches`."""
    if isinstance(source, Batches):
        sample = np.empty((size, source.n_features), dtype)
        _, n_valid = next(recut(source, sample), (0, 0))
        if n_valid == 0:
            raise DataError("X must have at least 2 rows, got 0 sample(s)")
        check_finite(sample[:n_valid])
        return sample[:n_valid]
    n = source.n_rows
    stripe = 1 if n < size else min(_STRIPE, size)
    starts = np.arange(n) if n < size else np.linspace(0, n - stripe, -(-size // stripe)).astype(np.int64)
    sample = np.empty((len(starts) * stripe, source.n_features), dtype)
    for number, start in enumerate(starts):
        piece = sample[number * stripe : (number + 1) * stripe]
        source.read(int(start), int(start) + stripe, piece)
        check_finite(piece, int(start))
    return sample
