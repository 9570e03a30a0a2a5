"""Limited-memory quasi-Newton steps for many independent functions at once, one pass over the rows for a step of all of them."""

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from streamcnn.checkpoint import Checkpoint

# steps along a direction whose losses a pass finds together; the gradient is that of the first
STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)
HISTORY = 10
_ARMIJO = 1e-4


def _state(planes: list["_Plane"], passes: np.ndarray, live: np.ndarray, number: int) -> dict[str, np.ndarray]:
    """All of a minimisation after `number` passes, as arrays; not copied."""
    found = {"passes": passes, "live": live, "number": np.array(number)}
    for c, plane in enumerate(planes):
        found |= plane.to_arrays(c)
    return found


class _Plane:
    """One function: its point, and the steps and changes of the gradient from which a direction is made."""

    def __init__(self, weights: np.ndarray):
        self.weights, self.direction = weights, np.zeros_like(weights)
        self.value, self.slope = np.inf, 0.0
        self.gradient: np.ndarray | None = None
        self.pairs: deque[tuple[np.ndarray, np.ndarray, float]] = deque(maxlen=HISTORY)

    def to_arrays(self, number: int) -> dict[str, np.ndarray]:
        """Everything, as arrays whose names begin with `number`; not copied."""
        found = {"weights": self.weights, "direction": self.direction}
        if self.gradient is not None:
            found["gradient"] = self.gradient
        for i, (step, change, _) in enumerate(self.pairs):
            found |= {f"step {i:02d}": step, f"change {i:02d}": change}
        found["facts"] = np.array([self.value, self.slope, *(along for *_, along in self.pairs)])
        return {f"{number} {name}": array for name, array in found.items()}

    def go_on(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Take what `to_arrays` gave for `number`."""
        self.weights, self.direction = (arrays[f"{number} {name}"] for name in ("weights", "direction"))
        self.gradient = arrays.get(f"{number} gradient")
        self.value, self.slope, *alongs = arrays[f"{number} facts"].tolist()
        for i, along in enumerate(alongs):
            self.pairs.append((arrays[f"{number} step {i:02d}"], arrays[f"{number} change {i:02d}"], along))

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
    evaluate: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]],
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
        and positive numbers (n, D): about the diagonal of each second derivative.
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
    planes = [_Plane(point) for point in start.copy()]
    passes, live, first = np.zeros(len(planes), np.int64), np.ones(len(planes), bool), 0
    if (left := checkpoint.left()) is not None:
        passes, live, first = left["passes"], left["live"], int(left["number"])
        for number, plane in enumerate(planes):
            plane.go_on(number, left)
    for number in range(first, max_iter):
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
        checkpoint.keep(partial(_state, planes, passes, live, number + 1))
    return np.stack([plane.weights for plane in planes]), np.array([plane.value for plane in planes]), passes, ~live
