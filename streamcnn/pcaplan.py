"""Which PCA solver, how many passes over the rows, and bytes of every buffer: what can be said from shapes alone."""

import math

from streamcnn.eigen import few_rows, n_pairs, takes_float32
from streamcnn.errors import ParameterError
from streamcnn.incremental import incremental_batches
from streamcnn.moments import gram_rows, n_strips
from streamcnn.randomized import PASSES, n_directions, n_sample_rows, pass_rows

# a saved model holds the place of its solver in this list: new ones go to the end
SOLVERS = ("auto", "covariance", "incremental", "randomized")
# widest rows whose d x d Gram matrix pays: 512 MiB
COVARIANCE_FEATURES = 8192


def choose_solver(solver: str, n_features: int, n_components: int | None = None, one_pass: bool = False) -> tuple[str, str]:
    """What `solver="auto"` means for these shapes, and why; never from the memory budget, which must not change the model.

    Parameters
    ----------
    solver : {"auto", "covariance", "incremental", "randomized"}
    n_features : int
    n_components : int or None
        At most min(rows, features). None: not known.
    one_pass : bool
        Whether each row can be seen once only.

    Returns
    -------
    solver, why : str

    Raises
    ------
    ParameterError
        For another word.
    """
    if solver not in SOLVERS:
        raise ParameterError(f"pca solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    d = n_features
    if solver != "auto":
        return solver, "asked for"
    if d <= COVARIANCE_FEATURES:
        return "covariance", f"{d} features, at most {COVARIANCE_FEATURES}: exact in one pass"
    if one_pass:
        return "incremental", f"{d} features, more than {COVARIANCE_FEATURES}, and each row is seen once"
    width = 0 if n_components is None else (PASSES + 1) * n_directions(d, n_components)
    if width >= d:
        return "covariance", f"{d} features and {n_components} components: their covariance is smaller than the directions of randomized"
    return "randomized", f"{d} features, more than {COVARIANCE_FEATURES}: their covariance would take {8 * d * d / 2**30:.1f} GiB"


def resolve_solver(solver: str, n_features: int, n_components: int | None = None) -> str:
    """The solver that `choose_solver` chooses."""
    return choose_solver(solver, n_features, n_components)[0]


def pca_passes(solver: str, n_features: int = 1, n_components: int | None = None) -> int:
    """How often `StreamingPCA.fit` reads the rows, at most; `"randomized"` ends earlier when more passes gain nothing."""
    return PASSES if resolve_solver(solver, n_features, n_components) == "randomized" else 1


def pca_bytes(
    solver: str,
    n_features: int,
    n_components: int | None,
    n_rows: int,
    batch_size: int | None = None,
    itemsize: int = 4,
    n_jobs: int = 1,
) -> dict[str, int]:
    """Bytes of each buffer of `StreamingPCA.fit`, what the source of the rows holds left out.

    Parameters
    ----------
    solver : {"auto", "covariance", "incremental", "randomized"}
    n_features, n_rows : int
    n_components, batch_size : int or None
    itemsize : int
        Of the rows.
    n_jobs : int
        Threads of `"covariance"`.

    Notes
    -----
    Measured: `IncrementalPCA.partial_fit` takes 4.1 * batch * features float64 values on top of its batch for the first one, 5.1
    to 6.0 * (batch + components + 1) * features for later ones. The eigensolver of the covariance works in place. `"randomized"` is
    counted with all its passes; each pass not needed saves one block of directions.
    """
    d, k = n_features, min(n_components or n_features, n_rows, n_features)
    name = resolve_solver(solver, d, k)
    if name == "covariance":
        claims = {"Gram matrix": 8 * d * d, "strips of products": 256 * d * (n_strips(d, n_jobs) * itemsize + 8)}
        in_pass = {"row block": gram_rows(d) * d * itemsize}
        after = {"components": 20 * k * d + 30 * 8 * d}
        if takes_float32(d, k):
            after = {"float32 covariance": 4 * d * d, "directions": 4 * 8 * n_pairs(d, k) * d}
        if n_rows <= few_rows(d):
            claims["few rows"] = n_rows * d * itemsize
            # what is found is taken from the rows when their products are gone again
            products = max(4 * 8 * n_rows * n_rows, 8 * n_rows * (d + k))
            after = {"centred rows": 8 * n_rows * d, "products of rows": products, "components": 3 * 8 * k * d}
        return claims | max((in_pass, after), key=lambda part: sum(part.values()))
    if name == "randomized":
        width = n_directions(d, k)
        # no more directions than features, or than rows vary in, besides the first ones
        basis = min(d, (PASSES + 1) * width, n_rows + width)
        rows, sample = pass_rows(d, width), min(n_rows, n_sample_rows(k))
        in_pass = {
            "row block": rows * d * itemsize,
            "basis of directions": 8 * max(basis, 2 * width) * d,
            "directions and products": itemsize * width * (2 * d + rows),
            "coefficients": 8 * basis * basis,
            "means and variances": 100 * d,
        }
        after = {
            "row block": rows * d * itemsize,
            "basis of directions": 8 * basis * d,
            "components": 8 * k * d,
            "coefficients": 7 * 8 * basis * basis,
            "means and variances": 100 * d,
        }
        before = {"sample of rows": sample * (d * itemsize + 24 * sample), "first directions": 8 * width * d + 8 * k * d}
        return max((in_pass, after, before), key=lambda claims: sum(claims.values()))
    n_batches, stripe = incremental_batches(n_rows, k, batch_size)
    rows = math.ceil(math.ceil(n_rows / stripe) / n_batches) * stripe
    height = rows + (k + 1 if n_batches > 1 else 0)
    matrices = int((5.4 if n_batches > 1 else 4.2) * 8 * height * d)
    # left singular vectors and LAPACK's work space, which count where a batch has about as many rows as columns
    square = 3 * 8 * min(height, d) ** 2
    return {"batch": 8 * rows * d, "stripe": itemsize * stripe * d, "IncrementalPCA": matrices, "singular vectors": square}
