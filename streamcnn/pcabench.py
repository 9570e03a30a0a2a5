"""Measures PCA against scikit-learn's IncrementalPCA on rows whose exact components are known."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
from sklearn.decomposition import IncrementalPCA

from streamcnn.pca import StreamingPCA
from streamcnn.rows import block_rows
from streamcnn.threads import limit_blas, resolve_n_jobs

_STRIP = 256
# batches of the rival that are timed when not all are: the first, which is cheaper, and two that merge
_TIMED = 3


def spectrum_rows(n_rows: int, n_features: int, eigenvalues: np.ndarray, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    """Rows whose sample covariance has the given eigenvalues, up to rounding of the rows to float32.

    X = U diag(s) V' with discrete cosines for U and V: orthonormal, those of U of mean 0, and a fast transform makes X in
    O(n d log n). Which cosine goes with which value, the signs and the order of rows are random.

    Parameters
    ----------
    n_rows, n_features : int
    eigenvalues : ndarray of shape (r,), r <= n_features and r < n_rows
    offset : float
        Size of the columns' means.
    seed : int

    Returns
    -------
    ndarray of shape (n_rows, n_features), float32
    """
    rng = np.random.default_rng(seed)
    r = len(eigenvalues)
    of_rows, of_columns = 1 + rng.permutation(n_rows - 1)[:r], rng.permutation(n_features)[:r]
    order, flips, means = rng.permutation(n_rows), rng.choice([-1.0, 1.0], n_features), offset * rng.uniform(0.5, 1.5, n_features)
    sizes = (
        np.sqrt(eigenvalues * (n_rows - 1)) * rng.choice([-1.0, 1.0], r) * np.where(of_columns == 0, 1, np.sqrt(2)) / np.sqrt(n_features)
    )
    rows = np.empty((n_rows, n_features), np.float32)
    for start in range(0, n_features, _STRIP):
        columns = np.arange(start, min(start + _STRIP, n_features))
        waves = np.zeros((n_rows, len(columns)))
        waves[of_rows] = sizes[:, None] * np.cos(np.pi / n_features * (columns + 0.5) * of_columns[:, None]) * flips[columns]
        rows[:, columns] = scipy.fft.idct(waves, axis=0, norm="ortho", overwrite_x=True)[order] + means[columns]
    return rows


def captured(rows: np.ndarray, mean: np.ndarray, components: np.ndarray) -> float:
    """Variance of float32 rows (n, d) along orthonormal components (k, d): products of a block in float32, sums in float64."""
    size, shift, weights, total = block_rows(rows.shape[1]), mean.astype(np.float32), components.T.astype(np.float32), 0.0
    for start in range(0, len(rows), size):
        total += float(np.square((rows[start : start + size] - shift) @ weights, dtype=np.float64).sum())
    # the mean of rows so shifted, as float32 cannot hold it
    return total / (len(rows) - 1) - float(np.square((mean - shift) @ components.T).sum()) * len(rows) / (len(rows) - 1)


def pca_rows(
    solver: str,
    n_rows: int,
    n_features: int,
    n_components: int = 256,
    *,
    decay: float = 1.0,
    offset: float = 0.0,
    batch_sizes: tuple[int, ...] = (1280,),
    rounds: int = 1,
    whole: bool = True,
    n_jobs: int | None = None,
) -> list[dict[str, Any]]:
    """`StreamingPCA(solver)` beside `IncrementalPCA`, taking turns on the same rows in memory.

    Parameters
    ----------
    solver : {"covariance", "randomized"}
    n_rows, n_features, n_components : int
        The rows take 4 * n_rows * n_features bytes.
    decay : float
        Eigenvalue i of the covariance is i^-decay.
    offset : float
        Size of the columns' means.
    batch_sizes : tuple of int
        Of IncrementalPCA, one contestant each.
    rounds : int
        Turns of each; the smallest time counts.
    whole : bool
        False times IncrementalPCA on its first three batches only and takes the others to last as the mean of the second and third;
        what it would capture is then not known (None).
    n_jobs : int or None
        BLAS threads of both.

    Returns
    -------
    list of dict
        One for each contestant: `engine`, `n_rows`, `n_features`, `n_components`, `decay`, `offset`, `n_jobs`, `seconds`,
        `cpu_seconds`, `whole`, `times_as_long` (of ours in the first row, by `seconds`), `cpu_times_as_long`, `captured` (share of what
        exact components capture), `largest_error` (of an eigenvalue, over the largest one), `n_passes`.
    """
    jobs = resolve_n_jobs(n_jobs)
    eigenvalues = np.arange(1, min(n_features, n_rows - 1) + 1.0) ** -decay
    rows = spectrum_rows(n_rows, n_features, eigenvalues, offset)

    def ours() -> tuple[Any, float, float]:
        return _timed(lambda: StreamingPCA(n_components, solver=solver, n_jobs=jobs).fit(rows))

    def rival(size: int) -> tuple[Any, float, float]:
        # a last batch below n_components would be refused by some versions: it joins the one before
        stops = [*range(size, n_rows - n_components + 1, size), n_rows]
        stops = stops if len(stops) == 1 or stops[-1] != stops[-2] else stops[:-1]
        model, wall, cpu = IncrementalPCA(n_components), [], []
        for first, stop in zip([0, *stops[:-1]], stops if whole else stops[:_TIMED]):
            _, seconds, cpu_seconds = _timed(lambda first=first, stop=stop: model.partial_fit(rows[first:stop]))
            wall.append(seconds)
            cpu.append(cpu_seconds)
        left = len(stops) - len(wall)
        return model, *(sum(times) + (left * float(np.mean(times[1:])) if left else 0.0) for times in (wall, cpu))

    contestants: dict[str, Callable] = {f"streamcnn {solver}": ours}
    contestants |= {f"IncrementalPCA(batch_size={size})": lambda size=size: rival(size) for size in batch_sizes}
    best: dict[str, tuple[Any, float, float]] = {}
    with limit_blas(jobs):
        for _ in range(rounds):
            for name, run in contestants.items():
                model, *times = run()
                wall, cpu = (min(pair) for pair in zip(times, best[name][1:] if name in best else times))
                best[name] = model, wall, cpu
        exact, mean = eigenvalues[:n_components], rows.mean(axis=0, dtype=np.float64)
        result = []
        for name, (model, wall, cpu) in best.items():
            complete = whole or isinstance(model, StreamingPCA)
            result.append(
                {
                    "engine": name,
                    "n_rows": n_rows,
                    "n_features": n_features,
                    "n_components": n_components,
                    "decay": decay,
                    "offset": offset,
                    "n_jobs": jobs,
                    "seconds": wall,
                    "cpu_seconds": cpu,
                    "whole": complete,
                    "times_as_long": wall / best[f"streamcnn {solver}"][1],
                    "cpu_times_as_long": cpu / best[f"streamcnn {solver}"][2],
                    "captured": captured(rows, mean, model.components_) / exact.sum() if complete else None,
                    "largest_error": float(np.abs(model.explained_variance_ - exact).max() / exact[0]) if complete else None,
                    "n_passes": getattr(model, "n_passes_", 1),
                }
            )
    return result


def _timed(work: Callable) -> tuple[Any, float, float]:
    """Result of `work()`, seconds, and processor seconds of this process (all its threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


# rows, features: what `auto` gives to each solver; IncrementalPCA's batches beside them
CASES = (("covariance", 50_000, 4096, (5000, 1280)), ("randomized", 20_000, 12_288, (1280,)))


def measure(n_threads: int, repeats: int, shrink: int) -> dict[str, Any]:
    """Both solvers of `streamcnn bench pca`; IncrementalPCA is timed on its first three batches and takes minutes for all of them.

    Returns
    -------
    dict
        `rows`: the objects of `pca_rows` for each of `CASES`, 256 components, eigenvalues falling as 1 / i.
    """
    rows = []
    for solver, n_rows, n_features, batch_sizes in CASES:
        n, d = max(2000, n_rows // shrink), max(256, n_features // shrink)
        sizes = tuple(min(size, n // 4) for size in batch_sizes)
        rows += pca_rows(solver, n, d, min(256, d // 4), batch_sizes=sizes, rounds=min(repeats, 3), whole=False, n_jobs=n_threads)
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| PCA | rows x features -> components | seconds | times as long | captured of exact |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        shape = f"{row['n_rows']:,} x {row['n_features']:,} -> {row['n_components']}"
        share = "-" if row["captured"] is None else f"{100 * row['captured']:.3f} %"
        lines.append(f"| {row['engine']} | {shape} | {row['seconds']:.1f} | {row['times_as_long']:.1f} | {share} |")
    return "\n".join(lines)
