"""Rows as users hand them over (an array, a store, batches) made into fixed, finite blocks."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from sklearn.utils.validation import validate_data

from streamcnn.errors import DataError, ParameterError
from streamcnn.rows import ArrayRows, Rows, block_rows, iter_blocks, recut
from streamcnn.slicing import check_known, is_sliced


def open_rows(estimator, X, reset: bool, ensure_min_samples: int = 1) -> tuple["Rows | Batches", np.dtype]:
    """`X` as a source of rows, its width checked against `estimator.n_features_in_` (set with `reset`).

    Parameters
    ----------
    estimator : scikit-learn estimator
    X : array-like of shape (n, n_features), also one that slices (HDF5, zarr, dask), Rows, or re-iterable of batches
    reset : bool
    ensure_min_samples : int
        Of an array.

    Returns
    -------
    source : Rows or Batches
        For `blocks_of`.
    dtype : numpy dtype
        float64 for arrays that float32 cannot hold, else float32.
    """
    if not is_rows(X) and not is_batches(X):
        array = check_rows(estimator, X, reset, ensure_min_samples)
        return ArrayRows(array), working_dtype(array.dtype)
    source, dtype = (X, np.dtype(np.float32)) if is_rows(X) else ((batches := Batches(X)), batches.dtype)
    _check_width(estimator, source.n_features, reset)
    return source, dtype


def check_rows(estimator, X, reset: bool, ensure_min_samples: int = 1):
    """scikit-learn's `validate_data`, without a conversion or a look at the values, which would copy or load the array.

    Blocks are converted and looked at later, one at a time. What slices (`streamcnn.slicing`) stays as it is.

    Raises
    ------
    ValueError
        For other than 2 axes, another width than `estimator` was fitted with, too few rows, or values that are no numbers.
    """
    if not is_sliced(X):
        return validate_data(estimator, X, reset=reset, dtype="numeric", ensure_all_finite=False, ensure_min_samples=ensure_min_samples)
    check_known(X, "X")
    if len(X.shape) != 2 or np.dtype(X.dtype).kind not in "fiub":
        raise DataError(f"X must be real numbers of shape (rows, features), got {X.dtype} {tuple(X.shape)}")
    if X.shape[0] < ensure_min_samples or not X.shape[1]:
        raise DataError(f"X must have at least {ensure_min_samples} rows of at least 1 feature, got {X.shape[0]} of {X.shape[1]}")
    _check_width(estimator, int(X.shape[1]), reset)
    return X


def _check_width(estimator, n_features: int, reset: bool) -> None:
    """Publish the width of rows, or compare it with that of the fit."""
    if reset:
        estimator.n_features_in_ = n_features
        vars(estimator).pop("feature_names_in_", None)
    elif n_features != estimator.n_features_in_:
        name = type(estimator).__name__
        raise DataError(f"X has {n_features} features, but {name} is expecting {estimator.n_features_in_} features as input")


class Batches:
    """A re-iterable of batches, each (m, n_features) or (rows, labels), of any sizes, seen as rows.

    Parameters
    ----------
    batches : iterable
        Gives the same batches every time it is iterated; a generator does not.

    Attributes
    ----------
    n_features : int
        Of the first batch; any other width is a `DataError`.
    dtype : numpy dtype
        float64 when the first batch is wider than float32, else float32.
    labels : list of ndarray
        Of the batches seen by the latest iteration, where they have labels.
    """

    def __init__(self, batches: Iterable):
        if iter(batches) is batches:
            raise ParameterError(
                f"batches must be re-iterable, got {type(batches).__name__}, which can be read once; "
                "pass a list, or an object whose __iter__ starts again"
            )
        self._batches = batches
        self.labels: list[np.ndarray] = []
        self.n_features = -1
        first = next(iter(self), None)
        if first is None:
            raise DataError("batches must hold at least one batch, got none")
        self.n_features, self.dtype = first.shape[1], working_dtype(first.dtype)

    def __iter__(self) -> Iterator[np.ndarray]:
        self.labels = []
        for number, batch in enumerate(self._batches):
            labelled = isinstance(batch, tuple) and len(batch) == 2
            rows = np.asarray(batch[0] if labelled else batch)
            if rows.ndim != 2 or rows.dtype.kind not in "fiub":
                raise DataError(f"batch {number} must be real numbers of shape (rows, features), got {rows.dtype} {rows.shape}")
            if self.n_features not in (-1, rows.shape[1]):
                raise DataError(f"batch {number} must have {self.n_features} features as the first, got {rows.shape[1]}")
            if labelled:
                self.labels.append(np.asarray(batch[1]))
                if len(self.labels[-1]) != len(rows):
                    raise DataError(f"batch {number} has {len(rows)} rows but {len(self.labels[-1])} labels")
            yield rows


def working_dtype(dtype) -> np.dtype:
    """float32 where it holds every value of `dtype` (or `dtype` is float32), else float64."""
    return np.dtype(np.float32) if np.can_cast(dtype, np.float32) else np.dtype(np.float64)


def is_rows(X) -> bool:
    """Whether `X` follows `Rows`."""
    return all(hasattr(X, name) for name in ("n_rows", "n_features", "read"))


def is_batches(X) -> bool:
    """Whether `X` is an iterable of batches and not itself something to make an array of."""
    if isinstance(X, (list, tuple)):
        first = X[0] if len(X) else None
        first = first[0] if isinstance(first, tuple) and len(first) == 2 else first
        return isinstance(first, np.ndarray) and first.ndim == 2
    return hasattr(X, "__iter__") and not isinstance(X, (str, bytes)) and not hasattr(X, "__array__") and not hasattr(X, "shape")


def blocks_of(source, block: np.ndarray, first: int = 0) -> Iterator[tuple[int, int]]:
    """`iter_blocks` of `Rows` from row `first`, or `recut` of all `Batches`, refusing NaN and infinity.

    Raises
    ------
    DataError
        Naming the first bad row, or when there are no rows.
    """
    start = -1
    for start, n_valid in iter_blocks(source, block, first) if is_rows(source) else recut(source, block):
        check_finite(block[:n_valid], start)
        yield start, n_valid
    if start < 0 and not first:
        raise DataError("X must have at least 1 row, got 0 sample(s)")


def check_finite(rows: np.ndarray, start: int = 0) -> None:
    """Refuse NaN and infinity in `rows` (m, n_features), whose first is row number `start`."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(rows, axis=None)
    # a finite sum has finite terms; a sum that overflowed is looked at again
    if np.isfinite(total) or np.isfinite(rows).all():
        return
    row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
    what = "NaN" if np.isnan(rows[row]).any() else "infinity"
    raise DataError(f"X must be finite, row {start + row} contains {what}; leave such rows out or repair them")


def gather(source: Rows | Batches, rows: np.ndarray, dtype, out_dtype) -> np.ndarray:
    """The rows numbered `rows`, ascending, in one pass in blocks of `dtype`: (m, n_features) of `out_dtype`."""
    result = np.empty((len(rows), source.n_features), out_dtype)
    block = np.empty((block_rows(source.n_features), source.n_features), dtype)
    for start, n_valid in blocks_of(source, block):
        first, last = np.searchsorted(rows, (start, start + n_valid))
        result[first:last] = block[rows[first:last] - start]
    return result


def row_sizes(source: Rows | Batches, dtype, weights: np.ndarray | None = None) -> tuple[int, float, float]:
    """Number of rows, mean squared row norm, and variance of all values, in one pass in blocks of `dtype`.

    `weights` (n,) are those of the rows in the means, None for 1; a `DataError` when there are more or fewer of them.
    """
    block = np.empty((block_rows(source.n_features), source.n_features), dtype)
    n_rows, counted, squares, total, shifted, shift = 0, 0.0, 0.0, 0.0, 0.0, None
    for start, n_valid in blocks_of(source, block):
        rows = block[:n_valid].astype(np.float64)
        if shift is None:
            shift = float(rows.mean())
        weight = np.ones(n_valid) if weights is None else weights[start : start + n_valid]
        if len(weight) < n_valid:
            break
        n_rows, counted = n_rows + n_valid, counted + float(weight.sum())
        squares += float(np.sum(weight * np.square(rows).sum(axis=1)))
        # about a value near the mean, so that a large offset does not drown the variance
        rows -= shift
        total += float(np.sum(weight * rows.sum(axis=1)))
        shifted += float(np.sum(weight * np.square(rows, out=rows).sum(axis=1)))
    if weights is not None and len(weights) != n_rows:
        raise DataError(f"sample_weight must have one weight for each row of X, got {len(weights)}")
    values = counted * source.n_features
    return n_rows, squares / counted, max(shifted / values - (total / values) * (total / values), 0.0)


class Pieces:
    """Rows read a few at a time, for sources whose buffers are planned for that many."""

    def __init__(self, rows: Any, size: int):
        self._rows, self._size = rows, size
        self.n_rows, self.n_features = rows.n_rows, rows.n_features

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        for first in range(start, stop, self._size):
            last = min(first + self._size, stop)
            self._rows.read(first, last, out[first - start : last - start])
