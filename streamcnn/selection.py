"""Choosing C and gamma on held-out rows of a small sample that does not depend on how the rows arrive."""

from collections.abc import Callable

import numpy as np

from streamcnn.newton import LinearProblem, LinearSolution, solve
from streamcnn.rbf import RbfMachine
from streamcnn.rowinput import gather
from streamcnn.rows import ArrayRows, row_hash

# for rows scaled to a mean squared norm of 1
LINEAR_C = (0.01, 0.1, 1.0, 10.0, 100.0)
RBF_C = (1.0, 10.0, 100.0)
RBF_GAMMA = (0.1, 0.3, 1.0, 3.0, 10.0)
# used when a class has too few rows to choose, and for the parameter that is not being varied
DEFAULTS = {"linear": (1.0, float("nan")), "rbf": (10.0, 1.0)}
_SAMPLE = {"linear": 20_000, "rbf": 4_000}
_SAMPLE_BYTES = 64 << 20
_FEWEST = 5
# enough to tell two values of C apart; a large C on rows that a plane separates may take many more passes than it is worth
_SELECTION_TOL, _SELECTION_PASSES = 1e-3, 30
_CHUNK = 1 << 18


def sample_rows(kernel: str, n_features: int) -> int:
    """Rows of the sample at most: 20,000 (linear) or 4,000 (rbf), less where they would pass 64 MiB."""
    return min(_SAMPLE[kernel], max(1000, _SAMPLE_BYTES // (4 * n_features)))


def stratified_sample(codes: np.ndarray, n_classes: int, seed: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """About `limit` row numbers with each class's share, a fifth of each class held out; by hash of seed and row number.

    Parameters
    ----------
    codes : ndarray of shape (n,), int
    n_classes, seed, limit : int

    Returns
    -------
    rows : ndarray of shape (m,), int64
        Ascending.
    held_out : ndarray of shape (m,), bool
    """
    n, counts = len(codes), np.bincount(codes, minlength=n_classes)
    take = counts if n <= limit else counts * limit // n
    # candidates: somewhat more than needed of each class, so that no array of all hashes is held or sorted
    share = np.minimum(1.0, (take + 4 * np.sqrt(take) + 20) / np.maximum(counts, 1))
    found = []
    for start in range(0, n, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, n))
        found.append(rows[row_hash(seed, rows) / 2.0**64 <= share[codes[rows]]])
    rows = np.concatenate(found)
    rows = rows[np.lexsort((row_hash(seed, rows), codes[rows]))]
    of_class = codes[rows]
    rank = np.arange(len(rows)) - np.searchsorted(of_class, np.arange(n_classes))[of_class]
    kept = rank < take[of_class]
    held_out = rank[kept] < take[of_class[kept]] // 5
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
    decide: Callable[..., np.ndarray],
) -> tuple[float, float, dict]:
    """Best C and gamma of a small grid on held-out rows; of equals the smaller C, then the smaller gamma.

    Linear: C of `LINEAR_C`. RBF: gamma of `RBF_GAMMA` at the given C (or 10), then C of `RBF_C` at the gamma chosen. Accuracy weighs
    each row as the fit does.

    Parameters
    ----------
    kernel : {"linear", "rbf"}
    C, gamma : float or None
        None: to be chosen.
    problem : LinearProblem
        All rows.
    seed, max_iter : int
    cache_size : float
        MiB.
    decide : callable
        (machine, raw rows) -> predicted class codes.

    Returns
    -------
    C, gamma : float
    tried : dict of C (linear) or (C, gamma) (rbf) to float
        Accuracy; empty when nothing was chosen because there was nothing to choose, or a class has fewer than 5 rows in the
        sample: then the defaults C = 1 (linear), C = 10 and gamma = 1 (rbf) stand.
    """
    default_C, default_gamma = DEFAULTS[kernel]
    tried: dict = {}
    chosen = (default_C if C is None else C, default_gamma if gamma is None else gamma)
    if C is not None and (gamma is not None or kernel == "linear"):
        return *chosen, tried
    n_classes = len(problem.row_weights)
    rows, held_out = stratified_sample(problem.codes, n_classes, seed, sample_rows(kernel, problem.source.n_features))
    if np.bincount(problem.codes[rows], minlength=n_classes).min() < _FEWEST:
        return *chosen, tried
    sample, codes = gather(problem.source, rows, problem.dtype, problem.dtype), problem.codes[rows]
    kept, test = sample[~held_out], sample[held_out]
    del sample
    weights = problem.row_weights[codes[held_out]]

    def accuracy(machine) -> float:
        right = decide(machine, test) == codes[held_out]
        return float(weights[right].sum() / weights.sum())

    if kernel == "linear":
        part = LinearProblem(ArrayRows(kept), problem.dtype, problem.scale, codes[~held_out], problem.row_weights, problem.n_jobs)
        solution: LinearSolution | None = None
        for value in LINEAR_C:
            solution = solve(part, value, _SELECTION_TOL, min(max_iter, _SELECTION_PASSES), start=solution)
            tried[value] = accuracy(problem.machine(solution))
        return max(tried, key=lambda c: (tried[c], -c)), chosen[1], tried

    scaled = kept.astype(np.float64) * problem.scale
    del kept

    def try_rbf(c: float, g: float) -> None:
        if (c, g) not in tried:
            machine, _ = RbfMachine.fit(scaled, codes[~held_out], problem.row_weights, c, g, problem.scale, cache_size)
            tried[c, g] = accuracy(machine)

    def best() -> tuple[float, float]:
        return max(tried, key=lambda pair: (tried[pair], -pair[0], -pair[1]))

    for value in RBF_GAMMA if gamma is None else (gamma,):
        try_rbf(chosen[0], value)
    if C is None:
        middle = best()[1]
        for value in RBF_C:
            try_rbf(value, middle)
    return *best(), tried
