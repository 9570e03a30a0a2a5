"""The linear SVM of `linear` where rows are few for their width: Newton's, in coordinates of the rows' own span.

The minimum of f lies in the span of the rows, as what is orthogonal to them adds to w'w alone. With their products
scale^2 X X' = V diag(l) V' the short rows R = V diag(l)^(1/2) have the same products, so f has the same minimum on them, and a plane u of
theirs is w = scale X' V diag(l)^(-1/2) u. All is exact but for directions in which rows vary by less than a millionth of what they do in
their first one. 300 rows of 16,000 features in three classes, C = 300, take 0.1 s this way; by `wide` one had no end in 45 s.
"""

from dataclasses import replace

import numpy as np
from scipy.linalg import eigh

from streamcnn.checkpoint import Checkpoint
from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.newton import solve
from streamcnn.rowinput import gather
from streamcnn.rows import ArrayRows
from streamcnn.threads import limit_blas

# features taken at a time, in float64
_SLICE = 1024
# eigenvalues below this share of the largest are rounding
_CUT = 1e-12


def few_bytes(n_rows: int, n_features: int, n_planes: int, itemsize: int) -> dict[str, int]:
    """Bytes of each buffer of `FewSolver`, those of `newton.solve` on the short rows left out."""
    return {
        "rows": n_rows * n_features * itemsize,
        "float64 features": 8 * _SLICE * (n_rows + 2 * n_planes),
        # their eigenvectors and LAPACK's work space
        "products of rows": 3 * 8 * n_rows * n_rows + 128 * n_rows,
        "short rows": (itemsize + 8) * n_rows * n_rows,
        "wide planes": 3 * 8 * n_planes * (n_features + 1),
    }


class FewSolver:
    """Planes of one problem for one C after the other; products of rows are taken once.

    Parameters
    ----------
    problem : LinearProblem
    """

    def __init__(self, problem: LinearProblem):
        self._scale = problem.scale
        self._rows = gather(problem.source, np.arange(len(problem.codes)), problem.dtype, problem.dtype)
        n, k = self._rows.shape
        self._slices = [slice(first, min(first + _SLICE, k)) for first in range(0, k, _SLICE)]
        # one thread, so that bits follow from no number of threads
        with limit_blas(1):
            products = np.zeros((n, n), order="F")
            for features in self._slices:
                part = self._rows[:, features].astype(np.float64)
                products += part @ part.T
            products *= problem.scale**2
            values, vectors = eigh(products, overwrite_a=True, check_finite=False, driver="evd")
        del products
        first = int(np.argmax(values > _CUT * values[-1]))  # 0 where all rows are zero
        roots = np.sqrt(np.maximum(values[first:], np.finfo(np.float64).tiny))
        vectors = vectors[:, first:]
        self._short = replace(problem, source=ArrayRows((vectors * roots).astype(problem.dtype)), scale=1.0)
        vectors /= roots
        self._back = vectors

    def solve(
        self, C: float, tol: float, max_iter: int, start: LinearSolution | None = None, checkpoint: Checkpoint | None = None
    ) -> LinearSolution:
        """As `newton.solve`, of the problem's own rows."""
        with limit_blas(1):
            begin = None if start is None else replace(start, weights=self._shortened(start.weights))
        found = solve(self._short, C, tol, max_iter, begin, checkpoint)
        with limit_blas(1):
            return replace(found, weights=self._widened(found.weights))

    def _shortened(self, weights: np.ndarray) -> np.ndarray:
        """Planes (n_planes, n_features + 1) in coordinates of the short rows."""
        decisions = np.zeros((len(self._rows), len(weights)))
        for features in self._slices:
            decisions += self._rows[:, features].astype(np.float64) @ weights[:, features].T
        return np.column_stack([self._scale * decisions.T @ self._back, weights[:, -1]])

    def _widened(self, weights: np.ndarray) -> np.ndarray:
        """Planes of the short rows as (n_planes, n_features + 1)."""
        of_rows = self._scale * weights[:, :-1] @ self._back.T
        wide = np.empty((len(weights), self._rows.shape[1] + 1))
        wide[:, -1] = weights[:, -1]
        for features in self._slices:
            np.matmul(of_rows, self._rows[:, features].astype(np.float64), out=wide[:, features])
        return wide
