"""The exact linear SVM of `linear`, by Newton steps over rows that stream by.

f is convex and piecewise quadratic, and its Hessian comes from the same pass as f and its gradient, see `hessians`. So a pass evaluates
every class at its trial point; classes whose trial is good take it and go on with the Hessian they have, the others halve their step.
No pass serves the line search alone.
"""

from dataclasses import fields
from functools import partial

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from streamcnn.checkpoint import Checkpoint
from streamcnn.hessians import NARROW, Evaluator, group_size
from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.threads import limit_blas

_ARMIJO = 1e-4
# a larger C is approached by factors of 10 from here, each roughly solved
_DIRECT_C, _ROUGH_TOL = 10.0, 1e-2
# what of the planes goes from pass to pass
_STATE = ("weights", "trial", "direction", "value", "slope", "step", "passes", "live")


def solve(
    problem: LinearProblem, C: float, tol: float, max_iter: int, start: LinearSolution | None = None, checkpoint: Checkpoint | None = None
) -> LinearSolution:
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
        Of the same problem with another C, or from `continued`, to start from.
    checkpoint : Checkpoint, optional
        Each group of planes is a step of it, whose state is kept between passes.

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

    A pass costs rows * n_features^2 / 2 multiplications times the share of rows that are active and were not, or the other way about,
    summed over planes. From w = 0, where all rows are active for all planes, the first one costs a single such product.
    """
    checkpoint = checkpoint or Checkpoint()
    if start is None and C > _DIRECT_C and max_iter > 1:
        start = solve(problem, C / 10, _ROUGH_TOL, max_iter // 2, None, checkpoint)
        solution = solve(problem, C, tol, max_iter - int(start.n_passes.max()), start, checkpoint)
        solution.n_passes += start.n_passes
        return solution
    k, positive = problem.source.n_features, problem.positive
    size = group_size(k, len(positive))
    parts = []
    # narrow products are too short for BLAS's own threads: with two, 200 features took 2 to 3.5 times as long as with one
    with limit_blas(problem.n_jobs if k >= NARROW else 1):
        for first in range(0, len(positive), size):
            group = slice(first, min(first + size, len(positive)))
            parts.append(checkpoint.step(partial(_solve_group, problem, positive[group], C, tol, max_iter, start, group, checkpoint)))
    return LinearSolution(*(np.concatenate([part[field.name] for part in parts]) for field in fields(LinearSolution)))


def _solve_group(problem, positive, C, tol, max_iter, start, group, checkpoint) -> dict[str, np.ndarray]:
    """Planes of a group, as the fields of a `LinearSolution`."""
    n, k1 = len(positive), problem.source.n_features + 1
    rounding = 1e-8 if problem.dtype == np.float32 else 1e-12
    weights = np.zeros((n, k1)) if start is None else start.weights[group].copy()
    start_gradient = None if start is None or start.start_gradient is None else start.start_gradient[group]
    trial, direction = weights.copy(), np.zeros((n, k1))
    value, slope, step = np.full(n, np.inf), np.zeros(n), np.ones(n)
    passes, live, first = np.zeros(n, np.int64), np.ones(n, bool), 0
    with Evaluator(problem, positive, C) as evaluator:
        if (left := checkpoint.left()) is not None:
            first, start_gradient = int(left["number"]), left["start_gradient"]
            weights, trial, direction, value, slope, step, passes, live = (left[name] for name in _STATE)
            evaluator.go_on(left)
        for number in range(first, max_iter):
            zero_gradient = np.zeros((n, k1)) if start is not None and start_gradient is None else None
            value_here, gradient = evaluator(trial, live, number == 0 and start is None, zero_gradient)
            if start_gradient is None:
                start_gradient = np.abs(gradient if zero_gradient is None else zero_gradient).max(axis=1) / C
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
                direction[c] = _newton_direction(evaluator.hessian(c), gradient[c])
                slope[c], step[c] = gradient[c] @ direction[c], 1.0
                left = -slope[c] / 2
                small = np.abs(gradient[c]).max() <= tol * C * start_gradient[c] and left <= 0.1 * tol * value[c]
                live[c] = not (small or left <= rounding * value[c])
                if live[c]:
                    trial[c] = weights[c] + direction[c]
            if not live.any():
                break
            state = dict(zip(_STATE, (weights, trial, direction, value, slope, step, passes, live)))
            state |= {"number": np.array(number + 1), "start_gradient": start_gradient}
            checkpoint.keep(partial(_with_hessians, state, evaluator))
    assert start_gradient is not None
    return vars(LinearSolution(weights, value, passes, ~live, start_gradient))


def _with_hessians(state: dict[str, np.ndarray], evaluator: Evaluator) -> dict[str, np.ndarray]:
    return state | evaluator.to_arrays()


def _newton_direction(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """-inverse(hessian) gradient; `hessian`, symmetric, is overwritten, and not copied when it is in Fortran order."""
    diagonal = hessian.diagonal().copy()
    lift = 0.0
    while True:
        # float32 products of near-dependent columns may leave it indefinite by their rounding
        np.fill_diagonal(hessian, diagonal + lift)
        try:
            factor = cho_factor(hessian, lower=True, overwrite_a=True, check_finite=False)
            return -cho_solve(factor, gradient, check_finite=False)
        except LinAlgError:
            lift = max(1e-7 * diagonal.max(), 10 * lift)
            # LAPACK has written on and below the diagonal only
            for j in range(len(diagonal)):
                hessian[j + 1 :, j] = hessian[j, j + 1 :]


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
        Planes of new classes are 0; None where C is too large for Newton steps from there, see `solve`.
    """
    if C > _DIRECT_C and len(known) < len(problem.row_weights):
        return None
    return problem.begin(np.column_stack([coef / problem.scale, intercept]), known)
