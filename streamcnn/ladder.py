"""The rungs of the SVM ladder: which kernel is used for what sizes, and the bytes and passes of each."""

from collections.abc import Sequence

from streamcnn.errors import ParameterError
from streamcnn.newton import active_bytes, group_size, n_lanes, pass_rows
from streamcnn.rbf import TILE as SUPPORT_TILE
from streamcnn.rows import block_rows
from streamcnn.selection import sample_rows

KERNELS = ("auto", "linear", "rbf")
RBF_ROWS, RBF_CLASSES = 20_000, 100
# rows of one decision product: every block is cut into these
TILE = 64
# passes of the linear solver from its start to its end; scikit-learn's digits take 9 to 11, for C from 1 to 10 and chosen
_TYPICAL_PASSES = 12


def resolve_kernel(kernel: str, n_rows: int, n_classes: int) -> str:
    """What `kernel="auto"` means for these sizes.

    Raises
    ------
    ParameterError
        For an unknown kernel, or `"rbf"` beyond 20,000 rows or 100 classes.
    """
    if kernel not in KERNELS:
        raise ParameterError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    small = n_rows <= RBF_ROWS and n_classes <= RBF_CLASSES
    if kernel == "rbf" and not small:
        raise ParameterError(
            f'kernel="rbf" takes at most {RBF_ROWS} rows and {RBF_CLASSES} classes, got {n_rows} rows and {n_classes} classes; use '
            'kernel="linear" or "auto"'
        )
    return kernel if kernel != "auto" else "rbf" if small else "linear"


def svm_passes(kernel: str) -> int:
    """How often training reads the rows: for their size, for the sample on which C and gamma are chosen, and to train (linear: about)."""
    return 3 if kernel == "rbf" else 2 + _TYPICAL_PASSES


def svm_bytes(
    kernel: str,
    n_features: int,
    class_counts: Sequence[int],
    cache_bytes: int = 200 << 20,
    itemsize: int = 4,
    label_bytes: int = 4,
    n_jobs: int = 1,
) -> dict[str, int]:
    """Bytes of each buffer of `StreamingSVC.fit`, C and gamma being chosen, what the source of the rows holds left out.

    Parameters
    ----------
    kernel : {"auto", "linear", "rbf"}
    n_features : int
    class_counts : sequence of int
        Rows of each class.
    cache_bytes : int
        libsvm's kernel cache. It serves one pair of classes after the other and never holds more than all products of a pair's rows.
    itemsize, label_bytes : int
        Of the rows and of a label.
    n_jobs : int
        Threads of the linear solver.
    """
    n_rows, n_classes, k = sum(class_counts), len(class_counts), n_features
    kernel = resolve_kernel(kernel, n_rows, n_classes)
    sample, rows = min(n_rows, sample_rows(kernel, k)), block_rows(k)
    claims = {"label codes": (4 + label_bytes) * n_rows, "row block": rows * k * itemsize}
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
    group, k1 = group_size(k, n_classes if n_classes > 2 else 1), k + 1
    lanes, together = n_lanes(k, group, n_jobs), pass_rows(k)
    solving = {
        "row block": together * k * itemsize,
        "scaled blocks": (min(2, lanes) + lanes) * together * k1 * itemsize,
        "margins": 4 * group * together * itemsize,
        "active rows": active_bytes(n_rows, group),
        "Hessians": 8 * group * k1 * k1,
        "block products and factor": (lanes * itemsize + 8) * k1 * k1,
    }
    # sums of squares are taken in float64, before there are Hessians
    measuring = (2 * 8 + itemsize) * rows * k - sum(solving.values())
    return (
        claims
        | solving
        | {
            "sample": 2 * sample * k * itemsize,
            "decisions": decision_bytes(kernel, k, n_classes, 0) + 8 * 16 * TILE * n_classes,
            "planes": 8 * 8 * n_classes * k1,
            "float64 block": max(0, measuring),
        }
    )


def fitted_svm_bytes(kernel: str, n_features: int, n_classes: int, n_support: int) -> int:
    """Bytes of a trained SVM: `n_support` support vectors with their coefficients, or a plane per class."""
    if kernel == "rbf":
        return 8 * n_support * (n_features + n_classes + 1) + 24 * n_classes * n_classes
    return 8 * (n_classes if n_classes > 2 else 1) * (n_features + 2)


def decision_bytes(kernel: str, n_features: int, n_classes: int, n_support: int) -> int:
    """Bytes of work to decide a tile of rows."""
    work = 8 * TILE * (n_features + 3 * n_classes)
    if kernel == "rbf":
        work += 8 * TILE * (2 * min(SUPPORT_TILE, n_support) + n_classes * n_classes)
    return work
