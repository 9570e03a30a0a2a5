"""What `StreamingSVC` is given, checked and brought into one form: parameters, labels, weights of classes and of rows."""

from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from streamcnn.errors import DataError, ParameterError
from streamcnn.labels import decoded
from streamcnn.ladder import KERNELS, check_class_weight, check_landmarks, check_probability
from streamcnn.rowinput import Batches
from streamcnn.rows import Rows


def check_parameters(svc) -> None:
    """Refuse parameters out of range; `class_weight` is looked at again with the labels, the seed where it is taken."""
    if svc.kernel not in KERNELS:
        raise ParameterError(f"kernel must be one of {', '.join(KERNELS)}, got {svc.kernel!r}")
    for name, value, words in (("C", svc.C, ("auto",)), ("gamma", svc.gamma, ("auto", "scale")), ("tol", svc.tol, ())):
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (value in words if isinstance(value, str) else number and 0 < value < np.inf):
            wanted = " or ".join(["a positive number", *(f'"{word}"' for word in words)])
            raise ParameterError(f"{name} must be {wanted}, got {value!r}")
    if not isinstance(svc.max_iter, (int, np.integer)) or isinstance(svc.max_iter, bool) or svc.max_iter < 1:
        raise ParameterError(f"max_iter must be a whole number of at least 1, got {svc.max_iter!r}")
    if not isinstance(svc.cache_size, (int, float, np.number)) or not 0 < svc.cache_size < np.inf:
        raise ParameterError(f"cache_size must be a positive number of MiB, got {svc.cache_size!r}")
    check_landmarks(svc.n_landmarks)
    check_class_weight(svc.class_weight)
    check_probability(svc.probability)


def seed_of(random_state: Any) -> int:
    """The seed that `random_state` is or draws; None is 0."""
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if random_state is None or (isinstance(random_state, (int, np.integer)) and random_state >= 0):
        return int(random_state or 0)
    raise ParameterError(f"random_state must be None, a whole number >= 0 or a RandomState, got {random_state!r}")


def encoded_labels(source: Rows | Batches, y: Any, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted classes and the code of each row's label (n,) int32; labels are `y`, or what batches brought."""
    if isinstance(source, Batches) and y is None:
        if not source.labels:
            raise DataError("batches must be (rows, labels), or y must be given, got rows alone")
        y = np.concatenate(source.labels)
    if y is None:
        raise DataError("StreamingSVC requires y to be passed, but the target y is None")
    y = column_or_1d(decoded(y), warn=True)
    if len(y) != n_rows:
        raise DataError(f"y must have one label for each of {n_rows} rows, got {len(y)}")
    check_classification_targets(y)
    classes, codes = _encode(y)
    if len(classes) < 2:
        raise DataError(f"y must hold at least 2 classes, got 1 class: {classes.tolist()[0]!r}")
    return classes, codes


def class_weights(class_weight: Any, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weight of each class, (n_classes,) float64; "balanced" is n / (n_classes * count), as scikit-learn's."""
    if isinstance(class_weight, str) and class_weight == "balanced":
        return counts.sum() / (len(classes) * counts)
    wanted = check_class_weight(class_weight) or {}
    if unknown := set(wanted).difference(classes.tolist()):
        raise ParameterError(f"class_weight must weigh classes of y, got {unknown.pop()!r}; leave it away")
    return np.array([wanted.get(label, 1.0) for label in classes.tolist()])


def check_sample_weight(sample_weight: Any) -> np.ndarray | None:
    """Weights of rows (n,) float64 or None; their number is checked when the rows are counted."""
    if sample_weight is None:
        return None
    try:
        weights = np.asarray(sample_weight, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"sample_weight must be numbers, got a {type(sample_weight).__name__} of others; convert them") from None
    if weights.ndim != 1:
        raise DataError(f"sample_weight must be 1D, a weight for each row, got an array of shape {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise DataError("sample_weight must be finite numbers of at least 0 and not all zero; a weight of 0 leaves a row out")
    return weights


def _encode(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted classes, the code of each label (n,) int32.

    Labels that are codes already, as a run's are, are taken as they are; a sort of them would take 24 bytes a row.
    """
    if y.dtype.kind in "iu" and len(y) and y.min() == 0 and y.max() < len(y):
        counts = np.bincount(y)
        if counts.all():
            return np.arange(len(counts), dtype=y.dtype), y.astype(np.int32, copy=False)
    classes, codes = np.unique(y, return_inverse=True)
    return classes, codes.reshape(-1).astype(np.int32)
