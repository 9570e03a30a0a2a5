"""Leading eigenpairs of a large covariance: of few rows by their products, else found in float32, put right in float64, and checked."""

import logging
import warnings

import numpy as np
from scipy.linalg import LinAlgError, LinAlgWarning, eigh, qr
from scipy.linalg.blas import dsymm

logger = logging.getLogger("streamcnn")

# narrower matrices take no time worth saving
NARROWEST = 1024
# components are followed by an eighth more, which tell how far away what was left out is
_MORE = 8
# share of the variance of the components that may be missing
_MISSING = 1e-10
_STEPS = 3
# few rows: their products with each other are at most a sixteenth of those of their columns
_FEW = 4
# smallest eigenvalue, as a share of the largest, that `pairs_of_few` finds at once: its eigenvectors are orthogonal to 1e-10; and the
# share below which there is nothing but the rounding of the rows
_STEEPEST, _NOTHING = 1e-6, 1e-26


def takes_float32(d: int, k: int) -> bool:
    """Whether `leading_pairs` first works in float32: wide matrices, of whose directions few are wanted."""
    return d >= NARROWEST and 4 * k <= d


def few_rows(d: int) -> int:
    """The most rows of `d` features that `pairs_of_few` takes; 0 for narrow ones."""
    return d // _FEW if d >= NARROWEST else 0


def n_pairs(d: int, k: int) -> int:
    """Pairs computed for `k` wanted."""
    return min(d, k + max(16, k // _MORE))


def leading_pairs(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest eigenvalues of a symmetric matrix >= 0, ascending, and their eigenvectors.

    Parameters
    ----------
    matrix : ndarray of shape (d, d), float64, in Fortran order
        Its lower triangle is used, and overwritten.
    k : int

    Returns
    -------
    values : ndarray of shape (k,), float64
    vectors : ndarray of shape (d, k), float64

    Notes
    -----
    LAPACK reduces the whole matrix to a tridiagonal one, half of it by products of the matrix with single vectors, at the speed of
    memory: half as many bytes take half the time. Its float32 eigenvectors are off by 1e-7 of the largest eigenvalue over the gap
    between what they mix. A step of block power iteration with the float64 matrix (V <- orthonormal basis of C V, rotated to a diagonal
    V'C V) shrinks what is foreign in them by the ratio of eigenvalues, and gives values whose error is the square of that.

    For each pair, with r the norm of C v - theta v and `last` the smallest value of the block, which holds more pairs than wanted, theta
    falls short of an eigenvalue by about r^2 / (theta - last) at most, and by r (Kato and Temple; Parlett, *The Symmetric Eigenvalue
    Problem*, 1998, section 10.5). Where these do not come to less than 1e-10 of the sum in three steps, LAPACK does it all in float64.
    """
    d = len(matrix)
    if takes_float32(d, k):
        found = _refined(matrix, k, n_pairs(d, k))
        if found is not None:
            return found
        logger.debug("leading eigenpairs by LAPACK in float64: the spectrum is too flat or too steep for float32")
    return eigh(matrix, lower=True, overwrite_a=True, check_finite=False, subset_by_index=(d - k, d - 1), driver="evr")


def pairs_of_few(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest eigenpairs of the sum of outer products of fewer rows than features, less their mean.

    Parameters
    ----------
    rows : ndarray of shape (n, d)
    k : int

    Returns
    -------
    values : ndarray of shape (k,), float64
        Descending.
    vectors : ndarray of shape (k, d), float64
        Orthonormal, also where rows vary in fewer than `k` directions.

    Notes
    -----
    With X the rows less their mean, X X' u = s u makes X' u / sqrt(s) an eigenvector of X'X with the same s (Turk & Pentland,
    *Eigenfaces for Recognition*, 1991), and X X' is small. All is in float64. Squares let it see six decades of s at a time: what is
    smaller is found again among the rows less what was found, whose largest s is then its own.
    """
    left, found = rows - rows.mean(axis=0, dtype=np.float64), np.zeros(k)
    vectors = np.empty((k, rows.shape[1]))
    nothing = _NOTHING * np.einsum("ij,ij->", rows, rows, dtype=np.float64)
    done = good = 0
    while done < k:
        values, weights = eigh(left @ left.T, overwrite_a=True, check_finite=False)
        values, weights = values[::-1][: k - done], weights[:, ::-1][:, : k - done]
        good = int(np.count_nonzero(values > max(_STEEPEST * values[0], nothing)))
        if good == 0:
            break
        new = vectors[done : done + good]
        np.matmul((weights[:, :good] / np.sqrt(values[:good])).T, left, out=new)
        found[done : done + good] = values[:good]
        done += good
        del values, weights  # as large as the products below
        if done < k:
            left -= (left @ new.T) @ new
    if done < k:  # any directions will do in which nothing varies
        random = np.random.default_rng(0)
        for number in range(k):  # also of those found, so that the numbers of a row follow from its place
            drawn = random.standard_normal(rows.shape[1])
            if number >= done:
                vectors[number] = drawn
    if good < k:  # not all at once
        vectors = np.ascontiguousarray(qr(vectors.T, overwrite_a=True, mode="economic", check_finite=False)[0].T)
    return found, vectors


def _refined(matrix: np.ndarray, k: int, width: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The pairs by float32 and power steps; None when they cannot be vouched for. `matrix` is left as it is."""
    d = len(matrix)
    # a power of two puts the largest diagonal entry near 1: exact, and nothing leaves the range of float32
    largest = float(matrix.diagonal().max())
    if not np.isfinite(largest) or largest <= 0:
        return None
    scale = 2.0 ** -np.frexp(largest)[1]
    small = np.empty((d, d), np.float32, order="F")
    for j in range(0, d, NARROWEST):
        np.multiply(matrix[:, j : j + NARROWEST], scale, out=small[:, j : j + NARROWEST], casting="same_kind")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LinAlgWarning)
            vectors = eigh(small, lower=True, overwrite_a=True, check_finite=False, subset_by_index=(d - width, d - 1), driver="evr")[1]
    except (LinAlgError, LinAlgWarning):
        return None
    del small
    # of many equal eigenvalues LAPACK was seen to give none at all
    if vectors.shape[1] < width:
        return None
    # the largest first, so that small ones are made orthogonal to them and not the other way about
    basis = np.asfortranarray(vectors[:, ::-1], np.float64)
    product = dsymm(1.0, matrix, basis, lower=1)
    for _ in range(_STEPS):
        basis = qr(product, overwrite_a=True, mode="economic", check_finite=False)[0]
        product = dsymm(1.0, matrix, basis, lower=1)
        inner = basis.T @ product
        values, rotation = np.linalg.eigh((inner + inner.T) / 2)
        values, rotation = values[::-1], rotation[:, ::-1]
        basis, product = basis @ rotation, product @ rotation
        residuals = np.linalg.norm(product[:, :k] - basis[:, :k] * values[:k], axis=0)
        gaps = np.maximum(values[:k] - values[-1], np.finfo(np.float64).tiny)
        if np.minimum(residuals, np.square(residuals) / gaps).sum() <= _MISSING * values[:k].sum():
            return values[:k][::-1], basis[:, :k][:, ::-1]
    return None
