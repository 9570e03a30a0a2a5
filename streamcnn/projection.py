"""Projection of rows on components: affine, in one precision, without allocation."""

import numpy as np


class Projector:
    """Rows minus mean, times components.

    Rows are centred before the product: at an offset of 1,000 standard deviations a float32 product of rows as they are keeps 3
    digits. What rounding the mean to float32 leaves over is taken off the result.

    Parameters
    ----------
    components : ndarray of shape (k, d)
    mean : ndarray of shape (d,)
    variance : ndarray of shape (k,) or None
        Of the reduced columns, to be made 1.
    dtype : numpy dtype
        Of rows and result.
    """

    def __init__(self, components: np.ndarray, mean: np.ndarray, variance: np.ndarray | None, dtype):
        weights = components.T if variance is None else components.T / deviation(variance)
        self.mean = mean.astype(dtype)
        self.rest = ((mean - self.mean) @ weights).astype(dtype)
        self.weights = np.ascontiguousarray(weights, dtype)

    def __call__(self, block: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Project `block` (rows, d), which is overwritten, into `out` (rows, k)."""
        block -= self.mean
        np.matmul(block, self.weights, out=out)
        out -= self.rest
        return out


def deviation(variance: np.ndarray) -> np.ndarray:
    """Standard deviations, those of directions without variance lifted so that dividing by them blows nothing up."""
    result = np.sqrt(variance)
    return np.maximum(result, max(np.finfo(np.float64).eps, 1e-7 * result.max(initial=0.0)))
