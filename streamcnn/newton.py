"""The exact L2-loss linear SVM, one against the rest, by Newton steps over rows that stream by.

For each class, with t = +1 for its rows and -1 for the others, and z = (scale * x, 1):

    f(w) = w'w / 2 + C * sum_i v_i * max(0, 1 - t_i w'z_i)^2

which is the problem of `LinearSVC(loss="squared_hinge", dual=False, intercept_scaling=1)` on the scaled rows: the intercept is
regularised as any other weight. f is convex and piecewise quadratic, and its Hessian 1 + 2 C sum over active rows of v z z' (those
with margin below 1) comes from the same pass as f and its gradient. So a pass evaluates every class at its trial point; classes whose
trial is good take it and go on with the Hessian they have, the others halve their step. No pass serves the line search alone.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from streamcnn.rowinput import Batches, blocks_of
from streamcnn.rows import Rows, block_rows
from streamcnn.threads import limit_blas

# Hessians held at a time; classes beyond are solved afterwards, in passes of their own
_HESSIANS = 64 << 20
_ARMIJO = 1e-4
# a larger C is approached by factors of 10 from here, each roughly solved
_DIRECT_C, _ROUGH_TOL = 10.0, 1e-2


class LinearMachine:
    """Decision values of separating planes, coefficients (n_planes, n_features) and intercepts (n_planes,) of raw rows, float64."""

    def __init__(self, coef: np.ndarray, intercept: np.ndarray):
        self.coef, self.intercept = coef, intercept

    @property
    def n_outputs(self) -> int:
        """Columns of the decisions."""
        return len(self.coef)

    def decide(self, tile: np.ndarray, out: np.ndarray) -> None:
        """Decisions of raw float64 rows `tile` (rows, n_features) into `out` (rows, n_planes)."""
        np.matmul(tile, self.coef.T, out=out)
        out += self.intercept


@dataclass
class LinearProblem:
    """Rows and labels of a linear SVM.

    Attributes
    ----------
    source : Rows or Batches
    dtype : numpy dtype
        Of block products; their sums are float64.
    scale : float
        Factor on the rows.
    codes : ndarray of shape (n,), integer
        Class of each row, 0 to n_classes - 1.
    row_weights : ndarray of shape (n_classes,), float64
        v_i by the class of row i.
    """

    source: Rows | Batches
    dtype: np.dtype
    scale: float
    codes: np.ndarray
    row_weights: np.ndarray

    @property
    def positive(self) -> np.ndarray:
        """Class that each separating plane tells from the rest; two classes need one plane."""
        n_classes = len(self.row_weights)
        return np.arange(n_classes) if n_classes > 2 else np.array([1])

    def machine(self, solution: "LinearSolution") -> LinearMachine:
        """Decisions of raw rows by `solution`."""
        return LinearMachine(np.ascontiguousarray(solution.weights[:, :-1] * self.scale), solution.weights[:, -1].copy())


@dataclass
class LinearSolution:
    """Planes of a `LinearProblem`.

    Attributes
    ----------
    weights : ndarray of shape (n_planes, n_features + 1), float64
        For scaled rows; the last column is the intercept.
    objective : ndarray of shape (n_planes,)
        f.
    n_passes : ndarray of shape (n_planes,), int
    converged : ndarray of shape (n_planes,), bool
    start_gradient : ndarray of shape (n_planes,)
        Largest component of the gradient at w = 0, divided by C.
    """

    weights: np.ndarray
    objective: np.ndarray
    n_passes: np.ndarray
    converged: np.ndarray
    start_gradient: np.ndarray


def group_size(n_features: int, n_planes: int) -> int:
    """Planes solved together: their Hessians fill 64 MiB at most; follows the shapes alone."""
    return int(min(n_planes, max(1, _HESSIANS // (8 * (n_features + 1) ** 2))))


def solve(problem: LinearProblem, C: float, tol: float, max_iter: int, start: LinearSolution | None = None) -> LinearSolution:
    """Minimise f for every plane.

    Parameters
    ----------
    problem : LinearProblem
    C : float
    tol : float
        A plane is done when the largest component of its gradient is below `tol` times that at w = 0 and the step left
        would lower f by less than a tenth of `tol`; or by less than the rounding of f.
    max_iter : int
        Passes over the rows at most.
    start : LinearSolution, optional
        Of the same problem with another C, to start from.

    Returns
    -------
    LinearSolution

    Raises
    ------
    DataError
        For NaN or infinity in the rows.

    Notes
    -----
    C above 10 is solved from the solution for C / 10: where planes separate the rows, Newton steps from w = 0 overshoot for hundreds
    of passes at C = 10,000, and for 20 to 40 in all this way. Elsewhere it costs one to three passes more.

    A pass costs rows * n_features^2 / 2 multiplications times the mean share of active rows, summed over planes. From w = 0, where all
    rows are active for all planes, the first one costs a single such product.
    """
    if start is None and C > _DIRECT_C and max_iter > 1:
        start = solve(problem, C / 10, _ROUGH_TOL, max_iter // 2)
        solution = solve(problem, C, tol, max_iter - int(start.n_passes.max()), start)
        solution.n_passes += start.n_passes
        return solution
    k, positive = problem.source.n_features, problem.positive
    size = group_size(k, len(positive))
    parts = []
    # products of this size are too short for BLAS's own threads: with two, 200 features took 2 to 3.5 times as long as with one
    with limit_blas(1):
        for first in range(0, len(positive), size):
            group = slice(first, min(first + size, len(positive)))
            parts.append(_solve_group(problem, positive[group], C, tol, max_iter, start, group))
    fields = ("weights", "objective", "n_passes", "converged", "start_gradient")
    return LinearSolution(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _solve_group(problem, positive, C, tol, max_iter, start, group) -> LinearSolution:
    n, k1 = len(positive), problem.source.n_features + 1
    rounding = 1e-8 if problem.dtype == np.float32 else 1e-12
    evaluator = _Evaluator(problem, positive, C)
    weights = np.zeros((n, k1)) if start is None else start.weights[group].copy()
    start_gradient = None if start is None else start.start_gradient[group]
    trial, direction = weights.copy(), np.zeros((n, k1))
    value, slope, step = np.full(n, np.inf), np.zeros(n), np.ones(n)
    passes, live = np.zeros(n, np.int64), np.ones(n, bool)
    for number in range(max_iter):
        value_here, gradient, hessian = evaluator(trial, live, at_zero=number == 0 and start is None)
        if start_gradient is None:
            start_gradient = np.abs(gradient).max(axis=1) / C
        passes += live
        for c in np.flatnonzero(live):
            # at the first pass value is infinite: any point is better than none
            rise = value_here[c] - value[c]
            lower = rise <= _ARMIJO * step[c] * slope[c] + rounding * value[c]
            # the approximate Wolfe condition of Hager & Zhang (2005): near the end a change of f drowns in the rounding of margins
            # (4e-7 of f was seen), where that of the gradient is plain; steps were halved there until max_iter
            near = rise <= 100 * rounding * value[c] and gradient[c] @ direction[c] <= (2 * _ARMIJO - 1) * slope[c]
            if number and not (lower or near):
                step[c] /= 2
                trial[c] = weights[c] + step[c] * direction[c]
                continue
            weights[c], value[c] = trial[c], value_here[c]
            direction[c] = _newton_direction(hessian[c], gradient[c])
            slope[c], step[c] = gradient[c] @ direction[c], 1.0
            left = -slope[c] / 2
            small = np.abs(gradient[c]).max() <= tol * C * start_gradient[c] and left <= 0.1 * tol * value[c]
            live[c] = not (small or left <= rounding * value[c])
            if live[c]:
                trial[c] = weights[c] + direction[c]
        if not live.any():
            break
    assert start_gradient is not None
    return LinearSolution(weights, value, passes, ~live, start_gradient)


def _newton_direction(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """-inverse(hessian) gradient; `hessian` (its lower triangle is used) is overwritten."""
    diagonal = hessian.diagonal().copy()
    lift = 0.0
    while True:
        # float32 products of near-dependent columns may leave it indefinite by their rounding
        np.fill_diagonal(hessian, diagonal + lift)
        try:
            factor = cho_factor(hessian, lower=True, check_finite=False)
            return -cho_solve(factor, gradient, check_finite=False)
        except LinAlgError:
            lift = max(1e-7 * diagonal.max(), 10 * lift)


class _Evaluator:
    """f, gradient and Hessian of a group of planes in one pass, in buffers made once."""

    def __init__(self, problem: LinearProblem, positive: np.ndarray, C: float):
        self.problem, self.positive, self.C = problem, positive, C
        dtype, k = problem.dtype, problem.source.n_features
        rows, n = block_rows(k), len(positive)
        self.block, self.z = np.empty((rows, k), dtype), np.zeros((rows, k + 1), dtype)
        self.margins, self.residual = np.empty((n, rows), dtype), np.empty((n, rows), dtype)
        self.active_rows, self.product = np.empty((rows, k + 1), dtype), np.empty((k + 1, k + 1), dtype)
        self.hessian = np.empty((n, k + 1, k + 1))
        # column of each class among the planes of this group, -1 for classes of other groups
        self.column = np.full(len(problem.row_weights), -1)
        self.column[positive] = np.arange(n)
        self.weighted = bool(np.any(problem.row_weights != 1))

    def __call__(self, weights: np.ndarray, live: np.ndarray, at_zero: bool):
        """f (n,), gradient (n, k + 1) and Hessian (n, k + 1, k + 1; of live planes) at `weights` (n, k + 1), all float64.

        With `at_zero`, where all rows are active for all planes, one Hessian serves all.
        """
        problem, C, m = self.problem, self.C, self.margins
        rounded = weights.astype(problem.dtype)
        loss, gradient = np.zeros(len(weights)), np.zeros_like(weights)
        planes = np.flatnonzero(live)[:1] if at_zero else np.flatnonzero(live)
        self.hessian[planes] = 0
        for start, n_valid in blocks_of(problem.source, self.block):
            np.multiply(self.block, problem.dtype.type(problem.scale), out=self.z[:, :-1])
            self.z[:n_valid, -1], self.z[n_valid:, -1] = 1, 0
            np.matmul(rounded, self.z.T, out=m)
            codes = problem.codes[start : start + n_valid]
            column = self.column[codes]
            own = np.flatnonzero(column >= 0)
            column = column[own]
            # 1 - t w'z: rows of the plane's class last, as each row has at most one such plane
            of_own = 1 - m[column, own]
            m += 1
            m[column, own] = of_own
            m[:, n_valid:] = 0
            np.maximum(m, 0, out=m)
            row_weights = problem.row_weights[codes] if self.weighted else None
            residual = self.residual
            if row_weights is None:
                np.copyto(residual, m)
            else:
                np.multiply(m[:, :n_valid], row_weights.astype(m.dtype), out=residual[:, :n_valid])
                residual[:, n_valid:] = 0
            loss += np.einsum("ci,ci->c", m, residual, dtype=np.float64)
            residual[column, own] *= -1
            gradient += residual @ self.z
            for c in planes:
                self._add_active(c, n_valid, row_weights)
        loss *= C
        gradient *= 2 * C
        self.hessian[planes] *= 2 * C
        if at_zero:
            self.hessian[:] = self.hessian[planes[0]]
        diagonal = np.arange(weights.shape[1])
        self.hessian[:, diagonal, diagonal] += 1
        return loss + 0.5 * np.square(weights).sum(axis=1), gradient + weights, self.hessian

    def _add_active(self, c: int, n_valid: int, row_weights: np.ndarray | None) -> None:
        """Add z z' of the active rows of plane `c`.

        Only these rows are multiplied. Measured at 200 features: 1.6, 3, 6 and 11 times as fast at 60, 30, 10 and 2 % active rows
        as all rows with weights 0, and as fast when all are active.
        """
        active = np.flatnonzero(self.margins[c, :n_valid])
        if not len(active):
            return
        rows = self.active_rows[: len(active)]
        np.take(self.z, active, axis=0, out=rows, mode="clip")
        if row_weights is not None:
            rows *= np.sqrt(row_weights[active]).astype(rows.dtype)[:, None]
        np.matmul(rows.T, rows, out=self.product)
        self.hessian[c] += self.product


def continued(problem: LinearProblem, C: float, coef: np.ndarray, intercept: np.ndarray, known: np.ndarray) -> LinearSolution | None:
    """Planes of an earlier problem, whose rows and classes are among those of `problem`, as a start for `solve`.

    Parameters
    ----------
    problem : LinearProblem
    C : float
        Of both problems.
    coef, intercept : ndarray of shape (n_planes, n_features) and (n_planes,), float64
        For raw rows, as `LinearMachine` has them.
    known : ndarray of shape (n_classes before,), int
        Classes of `problem` that the earlier classes are.

    Returns
    -------
    LinearSolution or None
        Planes of new classes are 0; None where C is too large for Newton steps from there, see `solve`. Its `start_gradient` is of
        `problem`, from one pass: at w = 0 all rows are active, and the gradient is -2 C sum_i v_i t_i z_i.
    """
    n_classes, k = len(problem.row_weights), problem.source.n_features
    if C > _DIRECT_C and len(known) < n_classes:
        return None
    before = np.column_stack([coef / problem.scale, intercept])
    # of two classes the one plane, seen from the other side, is the first class's too
    before = np.concatenate([-before, before]) if len(known) == 2 else before
    weights = np.zeros((n_classes, k + 1))
    weights[known] = before
    block, sums = np.empty((block_rows(k), k), problem.dtype), np.zeros((n_classes, k + 1))
    for start, n_valid in blocks_of(problem.source, block):
        codes = problem.codes[start : start + n_valid]
        order = np.argsort(codes, kind="stable")
        found, first = np.unique(codes[order], return_index=True)
        sums[found, :-1] += np.add.reduceat(block[order], first, axis=0)
        sums[found, -1] += np.diff(np.append(first, n_valid))
    sums[:, :-1] *= problem.scale
    sums *= problem.row_weights[:, None]
    gradient = 2 * np.abs(2 * sums - sums.sum(axis=0)).max(axis=1)
    n, positive = len(problem.positive), problem.positive
    return LinearSolution(weights[positive], np.full(n, np.inf), np.zeros(n, np.int64), np.zeros(n, bool), gradient[positive])
