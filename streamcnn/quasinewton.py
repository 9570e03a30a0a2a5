"""Limited-memory quasi-Newton steps for many independent functions at once, one pass over the rows for a step of all of them."""

from collections.abc import Callable

import numpy as np

from streamcnn.checkpoint import Checkpoint

# steps along a direction whose losses a pass finds together; the gradient is that of the first
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
HISTORY = 10
FOUND = ("weights", "objective", "n_passes", "converged")
"""What `minimise` gives, as `LinearSolution` calls it."""
_ARMIJO = 1e-4


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

    def aim(self, planes: list[int], precondition: Callable[[list[int], np.ndarray], np.ndarray]) -> None:
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
    evaluate: Callable[..., tuple[np.ndarray, np.ndarray, Callable[[list[int], np.ndarray], np.ndarray]]],
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
