"""Probabilities from decisions, by a slope fitted on held-out rows."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from streamcnn.errors import DataError
from streamcnn.ladder import HELD_OUT
from streamcnn.selection import stratified_sample

_FEWEST = 2


def check_counts(counts: np.ndarray, classes: np.ndarray) -> None:
    """Refuse classes of which nothing can be held out; `counts` (n_classes,) are rows of each.

    Raises
    ------
    DataError
        When a class has fewer than 2 rows.
    """
    rare = int(np.argmin(counts))
    if counts[rare] < _FEWEST:
        raise DataError(
            f"probability=True needs at least {_FEWEST} rows of each class to hold some out, got {counts[rare]} of {np.sum(counts)} rows "
            f"for class {classes.tolist()[rare]!r}; leave probability away or give more rows of it"
        )


def held_out_rows(codes: np.ndarray, classes: np.ndarray, seed: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Row numbers, ascending, to calibrate on: a fifth of each class in a sample, one at least, by hash of seed and row number.

    At most 4,000 and one for each class. Rows of weight 0 are none; errors as `check_counts`.
    """
    check_counts(np.bincount(codes if weights is None else codes[weights > 0], minlength=len(classes)), classes)
    rows, held_out = stratified_sample(codes, len(classes), seed, 5 * HELD_OUT, weights, least=_FEWEST)
    return rows[held_out]


def fit_slope(decisions: np.ndarray, codes: np.ndarray, weights: np.ndarray | None) -> float:
    """The positive number a for which `probabilities` of a * decisions are likeliest.

    Temperature scaling (Guo, Pleiss, Sun & Weinberger 2017, section 4.2). Offsets are left away, so that the likeliest class is the
    one predicted. As in Platt (1999, section 2.2) targets are a little less than certain, by 1 / (m + 2) of m rows: where all rows
    held out are told apart the slope stays finite.

    Parameters
    ----------
    decisions : ndarray of shape (m,) for two classes or (m, n_classes)
        Of held-out rows.
    codes : ndarray of shape (m,)
    weights : ndarray of shape (m,) or None
    """
    weights = np.ones(len(codes)) if weights is None else weights
    table = _scores(decisions)
    # decisions of unit size, so that the search means the same everywhere
    table /= (size := np.abs(table).max() or 1.0)
    doubt = 1 / (len(codes) + 2)
    own, mean = table[np.arange(len(codes)), codes], table.mean(axis=1)

    def loss(log_slope: float) -> float:
        slope = np.exp(log_slope)
        return float(weights @ (logsumexp(slope * table, axis=1) - slope * ((1 - doubt) * own + doubt * mean)))

    return float(np.exp(minimize_scalar(loss, bounds=(-7.0, 7.0), method="bounded").x) / size)


def probabilities(decisions: np.ndarray, slope: float) -> np.ndarray:
    """Probabilities (m, n_classes) of `decisions`: softmax of slope * decisions, for two classes of (0, slope * decision)."""
    return softmax(slope * _scores(decisions), axis=1)


def _scores(decisions: np.ndarray) -> np.ndarray:
    return np.stack([np.zeros_like(decisions), decisions], axis=1) if decisions.ndim == 1 else decisions.copy()
