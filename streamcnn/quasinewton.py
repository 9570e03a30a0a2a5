"""Limited-memory quasi-Newton steps for many independent functions at once, one pass over the rows for a step of all of them.

Planes of the SVM of `linear` are such functions: `PlanesSolver` is what its solvers have in common.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import numpy as np

from streamcnn.checkpoint import Checkpoint
from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.threads import limit_blas

# steps along a direction whose losses a pass finds together; the gradient is that of the first
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
HISTORY = 10
_ARMIJO = 1e-4

# inverses of second derivatives, about, times vectors: (numbers of functions (m,), rows (m, D)) -> (m, D)
Precondition = Callable[[list[int], np.ndarray], np.ndarray]
# (points (n, D), directions (n, D)) -> values (len(STEPS), n), gradients (n, D), Precondition; see `minimise`
Evaluate = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, Precondition]]


class _State:
    """n functions of D variables: the point of each, and the steps and changes of the gradient from which a direction is made.

    Attributes
    ----------
    points, directions, gradients : ndarray of shape (n, D), float64
    steps, changes : ndarray of shape (n, HISTORY, D), float64
        Pair number i of a function is in place i % HISTORY.
    alongs : ndarray of shape (n, HISTORY), float64
        Their inner products.
    values, slopes : ndarray of shape (n,), float64
        At the point, and along the direction; infinity where no gradient is known yet.
    n_pairs, n_passes : ndarray of shape (n,), int64
    live : ndarray of shape (n,), bool
        Not done.
    number : ndarray of shape ()
        Passes of all.
    """

    def __init__(self, start: np.ndarray):
        n, d = start.shape
        self.points, self.directions, self.gradients = start.copy(), np.zeros((n, d)), np.zeros((n, d))
        self.steps, self.changes, self.alongs = np.zeros((n, HISTORY, d)), np.zeros((n, HISTORY, d)), np.zeros((n, HISTORY))
        self.values, self.slopes = np.full(n, np.inf), np.zeros(n)
        self.n_pairs, self.n_passes, self.live = np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n, bool)
        self.number = np.array(0)

    def take(self, c: int, value: float, gradient: np.ndarray) -> None:
        """Go to point + direction."""
        self.points[c] += self.directions[c]
        if np.isfinite(self.values[c]):
            change = gradient - self.gradients[c]
            along = float(self.directions[c] @ change)
            if along > 0:
                place = self.n_pairs[c] % HISTORY
                self.steps[c, place], self.changes[c, place], self.alongs[c, place] = self.directions[c], change, along
                self.n_pairs[c] += 1
        self.values[c], self.gradients[c] = value, gradient

    def aim(self, planes: list[int], precondition: Precondition) -> None:
        """New directions: the two-loop recursion, Algorithm 7.4 of Nocedal & Wright, "Numerical Optimization" (2006)."""
        pairs, parts, rows = [], [], []
        for c in planes:
            last = int(self.n_pairs[c])
            places = [i % HISTORY for i in range(max(0, last - HISTORY), last)]
            pairs.append([(self.steps[c, i], self.changes[c, i], float(self.alongs[c, i])) for i in places])
            q, of_pairs = self.gradients[c].copy(), []
            for step, change, along in reversed(pairs[-1]):
                of_pairs.append(step @ q / along)
                q -= of_pairs[-1] * change
            rows.append(q)
            parts.append(of_pairs)
        rows += [known[-1][1] for known in pairs if known]
        solved = iter(precondition([*planes, *(c for c, known in zip(planes, pairs) if known)], np.array(rows)))
        directions = [next(solved) for _ in planes]
        for c, q, known, of_pairs in zip(planes, directions, pairs, parts):
            if known:  # of the size that the latest change of the gradient showed, (7.20) there
                _, change, along = known[-1]
                q *= along / (change @ next(solved))
            for (step, change, along), part in zip(known, reversed(of_pairs)):
                q += (part - change @ q / along) * step
            slope = -float(self.gradients[c] @ q)
            if slope > 0:  # rounding has turned it uphill: down the gradient, and what is known of the curvature begins anew
                q, slope, self.n_pairs[c] = self.gradients[c].copy(), -float(self.gradients[c] @ self.gradients[c]), 0
            self.directions[c], self.slopes[c] = -q, slope

    def shorten(self, c: int, values: np.ndarray) -> None:
        """Keep that part of the direction which of `values` at `STEPS` is the best."""
        steps = np.array(STEPS)
        good = values <= self.values[c] + _ARMIJO * steps * self.slopes[c]
        step = steps[np.argmin(np.where(good, values, np.inf))] if good.any() else 0.3 * steps[-1]
        self.directions[c] *= step
        self.slopes[c] *= step


def minimise(
    evaluate: Evaluate,
    start: np.ndarray,
    tol: float,
    rounding: float,
    max_iter: int,
    checkpoint: Checkpoint | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Minimise n convex functions of D variables each.

    Parameters
    ----------
    evaluate : callable
        (points (n, D), directions (n, D)) -> values (len(STEPS), n) at points + step * directions, gradients (n, D) at the first step,
        and a function of numbers of functions (m,) and rows (m, D) that multiplies each row by about the inverse of its function's
        second derivative.
    start : ndarray of shape (n, D), float64
    tol : float
        A function is done when the step left would lower it by less than `tol` of its value.
    rounding : float
        Relative error of values.
    max_iter : int
        Calls of `evaluate` at most.
    checkpoint : Checkpoint, optional
        Keeps points and history between calls.

    Returns
    -------
    points : ndarray of shape (n, D)
    values : ndarray of shape (n,)
    n_passes : ndarray of shape (n,), int
    converged : ndarray of shape (n,), bool
    """
    checkpoint = checkpoint or Checkpoint()
    state = _State(start)
    vars(state).update(checkpoint.left() or {})
    for number in range(int(state.number), max_iter):
        values, gradients, precondition = evaluate(state.points, state.directions)
        state.n_passes += state.live
        taken: list[int] = []
        for c in np.flatnonzero(state.live).tolist():
            # at the first pass value is infinite: any point is better than none
            if not values[0, c] <= state.values[c] + _ARMIJO * state.slopes[c] + rounding * abs(state.values[c]):
                state.shorten(c, values[:, c])
                continue
            state.take(c, float(values[0, c]), gradients[c])
            taken.append(c)
        if taken:
            state.aim(taken, precondition)
        for c in taken:
            if -state.slopes[c] / 2 <= tol * state.values[c]:
                state.live[c] = False
                state.directions[c] = 0
        if not state.live.any():
            break
        state.number = np.array(number + 1)
        checkpoint.keep(lambda: vars(state))
    return state.points, state.values, state.n_passes, ~state.live


class PlanesSolver(ABC):
    """Planes of a linear SVM by `minimise`, some at a time; how f is evaluated is each solver's own.

    Parameters
    ----------
    problem : LinearProblem
    width : int
        Numbers of a plane.
    together : int
        Planes solved at a time.
    """

    def __init__(self, problem: LinearProblem, width: int, together: int):
        self.problem, self._width, self._together = problem, width, together

    @abstractmethod
    def evaluator(self, C: float, positive: np.ndarray) -> AbstractContextManager[Evaluate]:
        """What `minimise` asks for the planes of the classes `positive`."""

    def solve(
        self, C: float, tol: float, max_iter: int, start: LinearSolution | None = None, checkpoint: Checkpoint | None = None
    ) -> LinearSolution:
        """Minimise f for every plane.

        Parameters
        ----------
        C : float
        tol : float
            A plane is done when the step left would lower f by less than `tol` of it.
        max_iter : int
            Passes over the rows at most, for each group of planes; those that only prepare are left out.
        start : LinearSolution, optional
            Of the same features with another C, or of fewer rows.
        checkpoint : Checkpoint, optional
            Each group of planes is a step of it, whose state is kept between passes.

        Returns
        -------
        LinearSolution
        """
        checkpoint, positive = checkpoint or Checkpoint(), self.problem.positive
        n, parts = len(positive), []
        # one thread of BLAS: bits follow from no number of threads
        with limit_blas(1):
            for first in range(0, n, self._together):
                group = slice(first, min(first + self._together, n))
                points = np.zeros((group.stop - first, self._width)) if start is None else start.weights[group]
                parts.append(checkpoint.step(partial(self._solve, C, positive[group], points, tol, max_iter, checkpoint)))
        return LinearSolution(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _solve(
        self, C: float, positive: np.ndarray, points: np.ndarray, tol: float, max_iter: int, checkpoint: Checkpoint
    ) -> dict[str, np.ndarray]:
        """Planes of a group, as the fields of a `LinearSolution`."""
        rounding = 1e-7 if self.problem.dtype == np.float32 else 1e-12
        with self.evaluator(C, positive) as evaluate:
            weights, objective, n_passes, converged = minimise(evaluate, points, tol, rounding, max_iter, checkpoint)
        return {"weights": weights, "objective": objective, "n_passes": n_passes, "converged": converged}
