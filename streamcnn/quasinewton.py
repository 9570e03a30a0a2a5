"""Limited-memory quasi-Newton steps for many independent functions at once, one pass over the rows for a step of all of them."""

from collections import deque
from collections.abc import Callable

import numpy as np

# steps along a direction whose losses a pass finds together; the gradient is that of the first
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
HISTORY = 10
_ARMIJO = 1e-4


class _Plane:
    """One function: its point, and the steps and changes of the gradient from which a direction is made."""

    def __init__(self, weights: np.ndarray):
        self.weights, self.direction = weights, np.zeros_like(weights)
        self.value, self.slope = np.inf, 0.0
        self.gradient: np.ndarray | None = None
        self.pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=HISTORY)

    def take(self, value: float, gradient: np.ndarray) -> None:
        """Go to `weights + direction`."""
        self.weights += self.direction
        if self.gradient is not None:
            change = gradient - self.gradient
            along = float(self.direction @ change)
            if along > 0:
                self.pairs.append((self.direction.copy(), change, along))
        self.value, self.gradient = value, gradient

    def aim(self, scaling: np.ndarray) -> None:
        """New direction: the two-loop recursion, Algorithm 7.4 of Nocedal & Wright, "Numerical Optimization" (2006)."""
        assert self.gradient is not None
        q, parts = self.gradient.copy(), []
        for step, change, along in reversed(self.pairs):
            parts.append(step @ q / along)
            q -= parts[-1] * change
        q /= scaling
        if self.pairs:  # of the size that the latest change of the gradient showed, (7.20) there
            _, change, along = self.pairs[-1]
            q *= along / (change @ (change / scaling))
        for (step, change, along), part in zip(self.pairs, reversed(parts)):
            q += (part - change @ q / along) * step
        self.direction, self.slope = -q, -float(self.gradient @ q)

    def shorten(self, values: np.ndarray) -> None:
        """Keep that part of the direction which of `values` at `STEPS` is the best."""
        steps = np.array(STEPS)
        good = values <= self.value + _ARMIJO * steps * self.slope
        step = steps[np.argmin(np.where(good, values, np.inf))] if good.any() else 0.3 * steps[-1]
        self.direction *= step
        self.slope *= step


def minimise(
    evaluate: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]], start: np.ndarray, tol: float, rounding: float, max_iter: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Minimise n convex functions of D variables each.

    Parameters
    ----------
    evaluate : callable
        (points (n, D), directions (n, D)) -> values (len(STEPS), n) at points + step * directions, gradients (n, D) at the first step,
        and positive numbers (n, D): about the diagonal of each second derivative.
    start : ndarray of shape (n, D), float64
    tol : float
        A function is done when the step left would lower it by less than `tol` of its value.
    rounding : float
        Relative error of values.
    max_iter : int
        Calls of `evaluate` at most.

    Returns
    -------
    points : ndarray of shape (n, D)
    values : ndarray of shape (n,)
    n_passes : ndarray of shape (n,), int
    converged : ndarray of shape (n,), bool
    """
    planes = [_Plane(point) for point in start.copy()]
    passes, live = np.zeros(len(planes), np.int64), np.ones(len(planes), bool)
    for _ in range(max_iter):
        points, directions = (np.stack([getattr(plane, name) for plane in planes]) for name in ("weights", "direction"))
        values, gradients, scaling = evaluate(points, directions)
        passes += live
        for c in np.flatnonzero(live):
            plane = planes[c]
            # at the first pass value is infinite: any point is better than none
            if not values[0, c] <= plane.value + _ARMIJO * plane.slope + rounding * abs(plane.value):
                plane.shorten(values[:, c])
                continue
            plane.take(float(values[0, c]), gradients[c])
            plane.aim(scaling[c])
            if -plane.slope / 2 <= tol * plane.value:
                live[c] = False
                plane.direction[:] = 0
        if not live.any():
            break
    return np.stack([plane.weights for plane in planes]), np.array([plane.value for plane in planes]), passes, ~live
