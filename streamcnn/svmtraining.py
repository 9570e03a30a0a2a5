"""What `StreamingSVC.fit` computes, each as a step of its checkpoint: sizes of the rows, C and gamma, and the machine of its kernel."""

from dataclasses import dataclass, replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from streamcnn.calibration import fit_slope, held_out_rows
from streamcnn.checkpoint import Checkpoint
from streamcnn.decisions import Machine, decide_rows
from streamcnn.errors import warn
from streamcnn.linear import LinearMachine, LinearProblem, LinearSolution
from streamcnn.newton import continued
from streamcnn.nystroem import Landmarks, NystroemMachine, NystroemProblem
from streamcnn.rbf import RBF_ARRAYS, RbfMachine
from streamcnn.rowinput import Batches, gather, row_sizes
from streamcnn.rows import Rows
from streamcnn.selection import landmark_rows, select
from streamcnn.wide import linear_method, linear_solver


def measure_rows(source: Rows | Batches, dtype, weights: np.ndarray | None, checkpoint: Checkpoint) -> tuple[int, float, float]:
    """`row_sizes`, as a step."""
    n_rows, mean_square, variance = checkpoint.step(lambda: {"sizes": np.array(row_sizes(source, dtype, weights))})["sizes"].tolist()
    return int(n_rows), mean_square, variance


def choose_parameters(checkpoint: Checkpoint, *arguments) -> tuple[float, float, dict]:
    """What `select` gives for its arguments, as a step."""

    def compute() -> dict[str, np.ndarray]:
        C, gamma, tried = select(*arguments)
        pairs = [(*(key if isinstance(key, tuple) else (key, np.nan)), accuracy) for key, accuracy in tried.items()]
        return {"chosen": np.array([C, gamma]), "tried": np.array(pairs).reshape(-1, 3)}

    found = checkpoint.step(compute)
    tried = {(c if np.isnan(g) else (c, g)): accuracy for c, g, accuracy in found["tried"].tolist()}
    return *found["chosen"].tolist(), tried


@dataclass
class Trainer:
    """Trains machines with the same parameters, the second one from where the first one ended; a kernel's landmarks are drawn once.

    Attributes
    ----------
    kernel : {"linear", "rbf", "nystroem"}
    C, gamma : float
    seed : int
    tol, max_iter, cache_size, n_landmarks
        As in `StreamingSVC`.
    checkpoint : Checkpoint
    landmarks, solution
        What the next machine starts from.
    """

    kernel: str
    C: float
    gamma: float
    seed: int
    tol: float
    max_iter: int
    cache_size: float
    n_landmarks: int
    checkpoint: Checkpoint
    landmarks: Landmarks | None = None
    solution: LinearSolution | None = None

    def go_on(self, before: Machine, problem: LinearProblem, known: np.ndarray) -> None:
        """Start from the planes of `before`, whose classes are `known` among those of `problem`; an exact RBF SVM starts from nothing."""
        if isinstance(before, LinearMachine):
            self.solution = continued(problem, self.C, before.coef, before.intercept, known)
        elif isinstance(before, NystroemMachine):
            self.landmarks = Landmarks(before.landmarks, self.gamma, problem.dtype, problem.scale)
            self.solution = NystroemProblem(problem, self.landmarks).continued(before.dual_coef, before.intercept, known)

    def fit(self, problem: LinearProblem) -> tuple[Machine, np.ndarray]:
        """The machine and the passes of each plane, or libsvm's iterations of each pair."""
        if self.kernel == "rbf":
            return self._fit_rbf(problem)
        if self.kernel == "linear":
            quasi_newton = linear_method(len(problem.codes), problem.source.n_features) == "wide"
            tol = 100 * self.tol if quasi_newton else self.tol
            self.solution = solution = linear_solver(problem)(self.C, tol, self.max_iter, self.solution, self.checkpoint)
            machine: Machine = problem.machine(solution)
        else:
            if self.landmarks is None:
                rows = landmark_rows(problem, self.n_landmarks, self.seed)
                self.landmarks = Landmarks(rows, self.gamma, problem.dtype, problem.scale)
            kernel = NystroemProblem(problem, self.landmarks)
            self.solution = solution = kernel.solve(self.C, 100 * self.tol, self.max_iter, self.solution, self.checkpoint)
            machine = kernel.machine(solution)
        if not solution.converged.all():
            warn(
                f"the {self.kernel} SVM has not converged in max_iter={self.max_iter} passes for {np.sum(~solution.converged)} of "
                f"{len(solution.converged)} planes; raise max_iter or tol, or lower C",
                ConvergenceWarning,
            )
        return machine, solution.n_passes

    def calibrate(self, problem: LinearProblem, classes: np.ndarray) -> float:
        """Slope fitted on the decisions of rows that the machine has not seen."""
        rows = held_out_rows(problem.codes, classes, self.seed, problem.sample_weight)
        weights = np.ones(len(problem.codes)) if problem.sample_weight is None else problem.sample_weight.copy()
        weights[rows] = 0
        machine, _ = self.fit(replace(problem, sample_weight=weights))
        own = None if problem.sample_weight is None else problem.sample_weight[rows]
        decisions = decide_rows(machine, gather(problem.source, rows, problem.dtype, problem.dtype))
        return fit_slope(decisions, problem.codes[rows], own)

    def _fit_rbf(self, problem: LinearProblem) -> tuple[RbfMachine, np.ndarray]:
        n = len(problem.codes)

        def train() -> dict[str, np.ndarray]:
            rows, weights = problem.scaled(np.arange(n)), problem.weights_of(0, n)
            machine, n_iter = RbfMachine.fit(rows, problem.codes, weights, self.C, self.gamma, problem.scale, self.cache_size)
            return {name: getattr(machine, name) for name in RBF_ARRAYS} | {"n_iter": n_iter}

        found = self.checkpoint.step(train)
        return RbfMachine(self.gamma, problem.scale, *(found[name] for name in RBF_ARRAYS)), found["n_iter"]
