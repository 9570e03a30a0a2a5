"""The linear L2-loss SVM, one against the rest: its rows, its planes, and what they decide.

For each class, with t = +1 for its rows and -1 for the others, and z = (scale * x, 1):

    f(w) = w'w / 2 + C * sum_i v_i * max(0, 1 - t_i w'z_i)^2

which is the problem of `LinearSVC(loss="squared_hinge", dual=False, intercept_scaling=1)` on the scaled rows: the intercept is
regularised as any other weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamcnn.rowinput import Batches, gather
from streamcnn.rows import Rows


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
    n_jobs : int
        Threads. Up to 1,024 features the result has the same bits for any number.
    sample_weight : ndarray of shape (n,), float64, or None
        Further factor on v_i.
    """

    source: Rows | Batches
    dtype: np.dtype
    scale: float
    codes: np.ndarray
    row_weights: np.ndarray
    n_jobs: int = 1
    sample_weight: np.ndarray | None = None

    def weights_of(self, start: int, stop: int) -> np.ndarray | None:
        """v_i of rows `start` to `stop`, float64; None when all rows weigh 1."""
        if self.sample_weight is None and (self.row_weights == 1).all():
            return None
        weights = self.row_weights[self.codes[start:stop]]
        return weights if self.sample_weight is None else weights * self.sample_weight[start:stop]

    def scaled(self, rows: np.ndarray) -> np.ndarray:
        """The rows numbered `rows`, ascending, times `scale`: (m, n_features) float64, in one pass."""
        result = gather(self.source, rows, self.dtype, np.float64)
        result *= self.scale
        return result

    def columns(self, positive: np.ndarray) -> np.ndarray:
        """Column (n_classes,) of each class among planes of the classes `positive`, -1 for classes that have none there."""
        column = np.full(len(self.row_weights), -1)
        column[positive] = np.arange(len(positive))
        return column

    def own_planes(self, column: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Planes (m,), by `columns`, and numbers (m,) from `start` of the rows to `stop` whose class has one."""
        planes = column[self.codes[start:stop]]
        rows = np.flatnonzero(planes >= 0)
        return planes[rows], rows

    def losses_along(
        self, column: np.ndarray, start: int, count: int, here: np.ndarray, along: np.ndarray, steps: Sequence[float]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squared hinge losses of a block of rows at several steps along a direction.

        Parameters
        ----------
        column : ndarray of shape (n_classes,), int
            Of `columns`.
        start, count : int
            Number of the first row, and how many of the m there are.
        here, along : ndarray of shape (n, m)
            Decisions by the n planes, and by the directions they are moved in.
        steps : sequence of float

        Returns
        -------
        losses : ndarray of shape (len(steps), n), float64
            Sums of v max(0, 1 - t (here + step along))^2 over the rows.
        residual : ndarray of shape (n, m)
            v t max(0, 1 - t (here + step along)) at the first step, 0 beyond `count`.
        active : ndarray of shape (n,)
            Sums of v over the rows whose loss is not 0 there.
        """
        n, m = here.shape
        targets = np.full((n, count), -1, here.dtype)
        targets[self.own_planes(column, start, start + count)] = 1
        weights = self.weights_of(start, start + count)
        here, along = targets * here[:, :count], targets * along[:, :count]
        losses, residual, active = np.empty((len(steps), n)), np.zeros((n, m), here.dtype), np.empty(n)
        for number, step in enumerate(steps):
            short = np.maximum(1 - here - here.dtype.type(step) * along, 0)
            weighted = short if weights is None else short * weights.astype(short.dtype)
            losses[number] = np.einsum("ci,ci->c", short, weighted, dtype=np.float64)
            if number == 0:
                residual[:, :count] = weighted * targets
                active = (short > 0) @ (np.ones(count) if weights is None else weights)
        return losses, residual, active

    @property
    def positive(self) -> np.ndarray:
        """Class that each separating plane tells from the rest; two classes need one plane."""
        n_classes = len(self.row_weights)
        return np.arange(n_classes) if n_classes > 2 else np.array([1])

    def begin(self, planes: np.ndarray, known: np.ndarray) -> "LinearSolution":
        """A start for a solver, from planes of an earlier problem whose classes are among those here.

        Parameters
        ----------
        planes : ndarray of shape (n_planes, D), float64
        known : ndarray of shape (n_classes before,), int
            Classes that the earlier ones are here; planes of others begin at 0.
        """
        # of two classes the one plane, seen from the other side, is the first class's too
        planes = np.concatenate([-planes, planes]) if len(known) == 2 else planes
        weights = np.zeros((len(self.row_weights), planes.shape[1]))
        weights[known] = planes
        weights, n = weights[self.positive], len(self.positive)
        return LinearSolution(weights, np.full(n, np.inf), np.zeros(n, np.int64), np.zeros(n, bool))

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
    start_gradient : ndarray of shape (n_planes,) or None
        Largest component of the gradient at w = 0, divided by C; None where nobody has asked for it.
    """

    weights: np.ndarray
    objective: np.ndarray
    n_passes: np.ndarray
    converged: np.ndarray
    start_gradient: np.ndarray | None = None
