"""Choosing C and gamma on held-out rows of a small sample that does not depend on how the rows arrive."""

from dataclasses import replace

import numpy as np

from streamcnn.decisions import codes_of
from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.nystroem import Landmarks, NystroemProblem
from streamcnn.rbf import RbfMachine
from streamcnn.rowinput import gather
from streamcnn.rows import ArrayRows, row_hash
from streamcnn.wide import linear_solver

# for rows scaled to a mean squared norm of 1
LINEAR_C = (0.01, 0.1, 1.0, 10.0, 100.0)
RBF_C = (1.0, 10.0, 100.0)
RBF_GAMMA = (0.1, 0.3, 1.0, 3.0, 10.0)
# used when a class has too few rows to choose, and for the parameter that is not being varied
DEFAULTS = {"linear": (1.0, float("nan")), "rbf": (10.0, 1.0), "nystroem": (1.0, 1.0)}
_SAMPLE = {"linear": 20_000, "rbf": 4_000, "nystroem": 20_000}
# landmarks while choosing at most: what they cost grows faster than their number
SELECTION_LANDMARKS = 1024
# added to the seed, where no user's seed reaches: by the hash of held-out rows, landmarks were sought among the very rows of weight 0
_LANDMARK_SEED = 1 << 32
_SAMPLE_BYTES = 64 << 20
_FEWEST = 5
# enough to tell two values of C apart; a large C on rows that a plane separates may take many more passes than it is worth
_SELECTION_TOL, _SELECTION_PASSES = 1e-3, 30
_CHUNK = 1 << 18


def sample_rows(kernel: str, n_features: int) -> int:
    """Rows of the sample at most: 20,000, with rbf 4,000, less where they would pass 64 MiB."""
    return min(_SAMPLE[kernel], max(1000, _SAMPLE_BYTES // (4 * n_features)))


def stratified_sample(
    codes: np.ndarray, n_classes: int, seed: int, limit: int, weights: np.ndarray | None = None, least: int = 0, fifth: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """About `limit` row numbers with each class's share, a fifth of each class held out, one row at least; by hash of seed and row number.

    Parameters
    ----------
    codes : ndarray of shape (n,), int
    n_classes, seed, limit : int
    weights : ndarray of shape (n,) or None
        Rows of weight 0 are none.
    least : int
        Rows of a class, as far as it has them, even where its share is smaller: so many more than `limit` for each class at most.
    fifth : int
        Which is held out, from 0 to 4; no two have a row in common.

    Returns
    -------
    rows : ndarray of shape (m,), int64
        Ascending.
    held_out : ndarray of shape (m,), bool
    """
    pieces, counts = range(0, len(codes), _CHUNK), np.zeros(n_classes, np.int64)

    def rows_of(start: int) -> np.ndarray:
        rows = np.arange(start, min(start + _CHUNK, len(codes)))
        return rows if weights is None else rows[weights[rows] > 0]

    for start in pieces:
        counts += np.bincount(codes[rows_of(start)], minlength=n_classes)
    n = counts.sum()
    take = counts if n <= limit else np.maximum(counts * limit // n, np.minimum(counts, least))
    # candidates: somewhat more than needed of each class, so that no array of all hashes is held or sorted
    share = np.minimum(1.0, (take + 4 * np.sqrt(take) + 20) / np.maximum(counts, 1))
    found = []
    for start in pieces:
        rows = rows_of(start)
        found.append(rows[row_hash(seed, rows) / 2.0**64 <= share[codes[rows]]])
    rows = np.concatenate(found)
    rows = rows[np.lexsort((row_hash(seed, rows), codes[rows]))]
    of_class = codes[rows]
    rank = np.arange(len(rows)) - np.searchsorted(of_class, np.arange(n_classes))[of_class]
    kept = rank < take[of_class]
    held_out = rank[kept] // np.maximum(take[of_class[kept]] // 5, 1) == fifth
    order = np.argsort(rows[kept])
    return rows[kept][order], held_out[order]


def select(
    kernel: str,
    C: float | None,
    gamma: float | None,
    problem: LinearProblem,
    seed: int,
    max_iter: int,
    cache_size: float,
    n_landmarks: int,
) -> tuple[float, float, dict]:
    """Best C and gamma of a small grid on held-out rows; of equals the smaller C, then the smaller gamma.

    Linear: C of `LINEAR_C`. Others: gamma of `RBF_GAMMA` at the given C (or the default), then C of `LINEAR_C` (nystroem) or `RBF_C`
    at the gamma chosen. Accuracy weighs each row as the fit does.

    Parameters
    ----------
    kernel : {"linear", "rbf", "nystroem"}
    C, gamma : float or None
        None: to be chosen.
    problem : LinearProblem
        All rows.
    seed, max_iter : int
    cache_size : float
        MiB.
    n_landmarks : int
        While choosing, 1,024 at most.

    Returns
    -------
    C, gamma : float
    tried : dict of C (linear) or (C, gamma) to float
        Accuracy; empty when nothing was chosen because there was nothing to choose, or a class has fewer than 5 rows in the
        sample: then the defaults C = 1, with rbf 10, and gamma = 1 stand.
    """
    chosen_C, chosen_gamma = DEFAULTS[kernel][0] if C is None else C, DEFAULTS[kernel][1] if gamma is None else gamma
    if C is not None and (gamma is not None or kernel == "linear"):
        return chosen_C, chosen_gamma, {}
    n_classes = len(problem.row_weights)
    limit = sample_rows(kernel, problem.source.n_features)
    rows, held_out = stratified_sample(problem.codes, n_classes, seed, limit, problem.sample_weight)
    if np.bincount(problem.codes[rows], minlength=n_classes).min() < _FEWEST:
        return chosen_C, chosen_gamma, {}
    sample, codes = gather(problem.source, rows, problem.dtype, problem.dtype), problem.codes[rows]
    weights = problem.row_weights[codes] * (1 if problem.sample_weight is None else problem.sample_weight[rows])
    kept, test, test_weights = sample[~held_out], sample[held_out], weights[held_out]
    del sample
    part = replace(
        problem,
        source=ArrayRows(kept),
        codes=codes[~held_out],
        row_weights=np.ones(n_classes),
        sample_weight=None if (weights == 1).all() else weights[~held_out],
    )
    trainers: dict[str, type[_Linear | _Rbf | _Nystroem]] = {"linear": _Linear, "rbf": _Rbf, "nystroem": _Nystroem}
    trainer = trainers[kernel](part, seed, max_iter, cache_size, n_landmarks)
    tried: dict[tuple[float, float], float] = {}

    def try_pair(c: float, g: float) -> None:
        if (c, g) not in tried:
            right = codes_of(trainer.fit(c, g), test) == codes[held_out]
            tried[c, g] = float(test_weights[right].sum() / test_weights.sum())

    def best() -> tuple[float, float]:
        return max(tried, key=lambda pair: (tried[pair], -pair[0], -pair[1]))

    if kernel != "linear":
        for value in RBF_GAMMA if gamma is None else (gamma,):
            try_pair(chosen_C, value)
        chosen_gamma = best()[1]
    if C is None:
        for value in RBF_C if kernel == "rbf" else LINEAR_C:
            try_pair(value, chosen_gamma)
    if kernel == "linear":
        accuracies = {c: accuracy for (c, _), accuracy in tried.items()}
        return max(accuracies, key=lambda c: (accuracies[c], -c)), chosen_gamma, accuracies
    return *best(), tried


class _Linear:
    """Planes for one C after the other, each started from the one before."""

    def __init__(self, part: LinearProblem, seed: int, max_iter: int, cache_size: float, n_landmarks: int):
        self.part, self.passes, self.solve = part, min(max_iter, _SELECTION_PASSES), linear_solver(part)
        self.solution: LinearSolution | None = None

    def fit(self, C: float, gamma: float):
        self.solution = self.solve(C, _SELECTION_TOL, self.passes, self.solution)
        return self.part.machine(self.solution)


class _Rbf:
    """libsvm, each time from the beginning."""

    def __init__(self, part: LinearProblem, seed: int, max_iter: int, cache_size: float, n_landmarks: int):
        self.part, self.cache_size = part, cache_size
        self.weights = part.weights_of(0, len(part.codes))
        self.rows = part.scaled(np.arange(len(part.codes)))

    def fit(self, C: float, gamma: float):
        return RbfMachine.fit(self.rows, self.part.codes, self.weights, C, gamma, self.part.scale, self.cache_size)[0]


class _Nystroem:
    """Landmarks for one gamma after the other; of the same gamma each C starts from the one before."""

    def __init__(self, part: LinearProblem, seed: int, max_iter: int, cache_size: float, n_landmarks: int):
        self.part, self.passes = part, min(max_iter, _SELECTION_PASSES)
        self.rows = landmark_rows(part, min(n_landmarks, SELECTION_LANDMARKS), seed)
        self.problem: NystroemProblem | None = None
        self.solution: LinearSolution | None = None

    def fit(self, C: float, gamma: float):
        if self.problem is None or self.problem.landmarks.gamma != gamma:
            self.problem = None  # two bases at a time would be the largest thing in memory
            self.problem, self.solution = NystroemProblem(self.part, Landmarks(self.rows, gamma, self.part.dtype, self.part.scale)), None
        self.solution = self.problem.solve(C, _SELECTION_TOL, self.passes, self.solution)
        return self.problem.machine(self.solution)


def most_landmarks(n_landmarks: int, n_rows: int, n_classes: int) -> int:
    """Rows that `landmark_rows` draws at most."""
    return min(n_rows, n_landmarks + n_classes)


def landmark_rows(problem: LinearProblem, n_landmarks: int, seed: int) -> np.ndarray:
    """About `n_landmarks` scaled rows, float64, each class with its share and a row at least, by hash of seed and row number; in one pass.

    Rows of weight 0 are none: a landmark held out would be told from all rows trained on by its own feature.
    """
    n_classes = len(problem.row_weights)
    rows, _ = stratified_sample(problem.codes, n_classes, seed + _LANDMARK_SEED, n_landmarks, problem.sample_weight, least=1)
    return problem.scaled(rows)
