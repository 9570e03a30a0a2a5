"""The rungs of the SVM ladder: which kernel is used for what sizes, and the bytes and passes of each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from streamcnn import nystroem
from streamcnn.decisions import TILE
from streamcnn.errors import ParameterError
from streamcnn.few import few_bytes
from streamcnn.hessians import active_bytes, group_size, n_lanes, pass_rows
from streamcnn.quasinewton import HISTORY
from streamcnn.rbf import TILE as SUPPORT_TILE
from streamcnn.rows import block_rows
from streamcnn.selection import LINEAR_C, RBF_C, RBF_GAMMA, SELECTION_LANDMARKS, most_landmarks, sample_rows
from streamcnn.wide import linear_method, most_few, wide_bytes

KERNELS = ("auto", "linear", "rbf", "nystroem")
RBF_ROWS, RBF_CLASSES = 20_000, 100
# rows to calibrate probabilities on, at most
HELD_OUT = 4_000  # and one for each class
# passes of the linear solver from its start to its end; scikit-learn's digits take 9 to 11, for C from 1 to 10 and chosen
_TYPICAL_PASSES = 12
# and of the quasi-Newton solvers, on CIFAR-10
_QUASI_NEWTON_PASSES = 40
# share of these while C and gamma are chosen, to a coarser tolerance and each from the one before
_CHOOSING = 0.4
# all eigenvectors of an m x m matrix take as long as so many times m^3 multiplications of a product, about
_EIGEN = 20


def resolve_kernel(kernel: str, n_rows: int, n_classes: int) -> str:
    """What `kernel` means for these sizes: the exact RBF SVM takes 20,000 rows and 100 classes, beyond it come "linear" for "auto" and
    "nystroem" for "rbf".

    Landmarks for "auto" too were tried: 69.2 instead of 63.4 % of CIFAR-10's test images, but on 57,000 digits, where a large C is chosen,
    the SVM took 263 s instead of 3 on one thread, ten times everything else, for 99.2 instead of 98.3 %.

    Raises
    ------
    ParameterError
        For an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ParameterError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    small = n_rows <= RBF_ROWS and n_classes <= RBF_CLASSES
    if kernel == "rbf":
        return "rbf" if small else "nystroem"
    return kernel if kernel != "auto" else "rbf" if small else "linear"


def check_landmarks(n_landmarks: Any) -> None:
    """Refuse what is no number of landmarks."""
    if not isinstance(n_landmarks, (int, np.integer)) or isinstance(n_landmarks, bool) or n_landmarks < 1:
        raise ParameterError(f"n_landmarks must be a whole number of at least 1, got {n_landmarks!r}")


def check_probability(probability: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(probability, (bool, np.bool_)):
        raise ParameterError(f"probability must be True or False, got {probability!r}")


def check_class_weight(class_weight: Any) -> Any:
    """None, "balanced", or a dict of label to weight in Python's own numbers; anything else is refused.

    Raises
    ------
    ParameterError
    """
    if class_weight is None or (isinstance(class_weight, str) and class_weight == "balanced"):
        return class_weight
    if not isinstance(class_weight, dict):
        raise ParameterError(f'class_weight must be None, "balanced" or a dict of label to weight, got {class_weight!r}')
    result = {label.item() if isinstance(label, np.generic) else label: weight for label, weight in class_weight.items()}
    for label, weight in result.items():
        number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
        if not number or not 0 < weight < np.inf:
            raise ParameterError(f"class_weight must be positive, got {weight!r} for {label!r}; leave out rows that shall not count")
    if len({isinstance(label, str) for label in result}) > 1:
        raise ParameterError(f"class_weight must have labels of one kind, got {', '.join(map(repr, result))}")
    return {label: float(weight) for label, weight in result.items()}


def svm_passes(kernel: str, n_rows: int, n_features: int, probability: bool = False) -> int:
    """How often training reads the rows: for size, for the sample on which C and gamma are chosen, for landmarks, and to train (about)."""
    # of wide rows the products of features are a pass more; few of them are read once
    linear = {"newton": _TYPICAL_PASSES, "wide": _QUASI_NEWTON_PASSES + 1, "few": 1}[linear_method(n_rows, n_features)]
    training = {"rbf": 1, "linear": linear, "nystroem": _QUASI_NEWTON_PASSES}[kernel]
    return 2 + (kernel == "nystroem") + (2 * training + 1 if probability else training)


def svm_work(
    kernel: str, n_rows: int, n_features: int, n_classes: int, choose_C: bool, choose_gamma: bool, n_landmarks: int, probability: bool
) -> float:
    """About how many multiplications `StreamingSVC.fit` takes with a kernel that is resolved: how its time grows with rows, no time."""
    k, planes = n_features, n_classes if n_classes > 2 else 1

    def newton(rows: int, width: int, share: float) -> float:
        return planes * (rows * width**2 / 2 + share * _TYPICAL_PASSES * width**3 / 3)

    def train(rows: int, landmarks: int, share: float) -> float:
        if kernel == "rbf":
            return rows**2
        if kernel == "nystroem":
            m = min(landmarks, rows)
            return share * _QUASI_NEWTON_PASSES * rows * m * (k + 4 * planes) + _EIGEN * m**3
        if (method := linear_method(rows, k)) == "few":
            return rows**2 * k + _EIGEN * rows**3 + newton(rows, rows, share)
        if method == "wide":
            return rows * k**2 / 2 + k**3 / 3 + share * _QUASI_NEWTON_PASSES * 2 * planes * rows * k
        return newton(rows, k, share)

    of_C = len(RBF_C if kernel == "rbf" else LINEAR_C) if choose_C else 1
    of_gamma = len(RBF_GAMMA) if choose_gamma and kernel != "linear" else 1
    n_tried = of_C + of_gamma - 1 if of_C + of_gamma > 2 else 0
    # a fifth of the sample is held out
    sample = 4 * min(n_rows, sample_rows(kernel, k)) // 5
    return n_tried * train(sample, min(n_landmarks, SELECTION_LANDMARKS), _CHOOSING) + (1 + probability) * train(n_rows, n_landmarks, 1.0)


def svm_bytes(
    kernel: str,
    n_features: int,
    class_counts: Sequence[int],
    cache_bytes: int = 200 << 20,
    itemsize: int = 4,
    label_bytes: int = 4,
    n_jobs: int = 1,
    n_landmarks: int = nystroem.LANDMARKS,
    probability: bool = False,
) -> dict[str, int]:
    """Bytes of each buffer of `StreamingSVC.fit`, C and gamma being chosen, what the source of the rows holds left out.

    Parameters
    ----------
    kernel : {"auto", "linear", "rbf", "nystroem"}
    n_features : int
    class_counts : sequence of int
        Rows of each class.
    cache_bytes : int
        libsvm's kernel cache. It serves one pair of classes after the other and never holds more than all products of a pair's rows.
    itemsize, label_bytes : int
        Of the rows and of a label.
    n_jobs : int
        Threads of the linear solver.
    n_landmarks : int
    probability : bool
    """
    n_rows, n_classes, k = sum(class_counts), len(class_counts), n_features
    kernel = resolve_kernel(kernel, n_rows, n_classes)
    sample, rows = min(n_rows, sample_rows(kernel, k)), block_rows(k)
    claims = {"label codes": (4 + label_bytes) * n_rows, "row block": rows * k * itemsize}
    if probability:  # weights of rows in float64, those held out as 0; rows held out, and their decisions as logistic regression has them
        claims["calibration"] = 8 * n_rows + (HELD_OUT + n_classes) * (k * itemsize + 8 * (n_classes + 12))
    if kernel == "rbf":
        pair = sum(sorted(class_counts)[-2:])
        return claims | {
            # the sample is gone before all rows are read
            "float64 rows": max(8 * n_rows, (2 * itemsize + 16) * sample) * k,
            # one pointer, index and length for each row, and one more set for the pair being solved
            "libsvm rows": 2 * 24 * n_rows,
            "kernel cache": min(cache_bytes, 4 * pair * pair),
            "support vectors": 8 * n_rows * (k + n_classes),
        }
    n_planes = n_classes if n_classes > 2 else 1
    if kernel == "nystroem":
        m = most_landmarks(n_landmarks, n_rows, n_classes)
        group, piece = nystroem.group_size(m, n_planes), min(nystroem.PIECE, rows)
        threads, pieces = min(n_jobs, rows // piece), rows // piece
        return claims | {
            "sample": 2 * sample * k * itemsize,
            "landmarks": m * (k + 2) * (4 * 8 + itemsize),
            # the eigenvectors, and before that the matrix they are of
            "landmark kernel": 2 * 8 * m * m,
            "kernel blocks": threads * piece * (m + k + 2) * itemsize,
            # decisions, targets, margins and their products with weights
            "margins": threads * piece * group * 10 * itemsize,
            "planes": 8 * group * (m + 1) * (2 * HISTORY + 12) + pieces * group * m * itemsize + 3 * 8 * n_planes * (m + 1),
            "decisions": decision_bytes(kernel, k, n_classes, m) + 8 * 16 * TILE * n_classes,
        }
    deciding = {
        "sample": 2 * sample * k * itemsize,
        "decisions": decision_bytes(kernel, k, n_classes, 0) + 8 * 16 * TILE * n_classes,
    }
    solving = _linear_bytes(n_rows, k, n_planes, itemsize, n_jobs)
    total = sum(solving.values())
    # C is chosen on four fifths of the sample, which may have the solver of few rows where all rows have not
    few = min(sample, most_few(k))
    choosing = sum(_linear_bytes(few, k, n_planes, itemsize, n_jobs).values()) - total if 3 * sample // 4 <= few else 0
    # sums of squares are taken in float64, before there are Hessians
    measuring = (2 * 8 + itemsize) * rows * k - total
    return claims | solving | deciding | {"choosing C": max(0, choosing), "float64 block": max(0, measuring)}


def _linear_bytes(n_rows: int, k: int, n_planes: int, itemsize: int, n_jobs: int) -> dict[str, int]:
    """Bytes of each buffer of the linear solver."""
    method = linear_method(n_rows, k)
    if method == "wide":
        return wide_bytes(k, n_planes, itemsize, n_jobs)
    if method == "few":
        return few_bytes(n_rows, k, n_planes, itemsize) | _linear_bytes(n_rows, n_rows, n_planes, itemsize, n_jobs)
    group, k1 = group_size(k, n_planes), k + 1
    lanes, together = n_lanes(k, group, n_jobs), pass_rows(k)
    return {
        "row block": together * k * itemsize,
        "scaled blocks": (min(2, lanes) + lanes) * together * k1 * itemsize,
        "margins": 4 * group * together * itemsize,
        "active rows": active_bytes(n_rows, group),
        "Hessians": 8 * group * k1 * k1,
        "block products and factor": (lanes * itemsize + 8) * k1 * k1,
        "planes": 8 * 8 * (n_planes + 1) * k1,
    }


def fitted_svm_bytes(kernel: str, n_features: int, n_classes: int, n_support: int) -> int:
    """Bytes of a trained SVM: `n_support` support vectors or landmarks with their coefficients, or a plane per class."""
    if kernel != "linear":
        return 8 * n_support * (n_features + n_classes + 1) + 24 * n_classes * n_classes
    return 8 * (n_classes if n_classes > 2 else 1) * (n_features + 2)


def decision_bytes(kernel: str, n_features: int, n_classes: int, n_support: int) -> int:
    """Bytes of work to decide a tile of rows."""
    work = 8 * TILE * (n_features + 3 * n_classes)
    if kernel != "linear":
        work += 8 * TILE * (2 * min(SUPPORT_TILE, n_support) + n_classes * n_classes)
    return work
