"""Measures the streamed linear SVM against scikit-learn's LinearSVC: whole fits in fresh processes, of the same scaled rows.

Ours reads the rows from a store on disk, pass by pass. LinearSVC, which takes arrays only, finds them scaled and in float64 in memory:
loading is not part of its time.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.svm import LinearSVC

from streamcnn.errors import ParameterError
from streamcnn.estimators import ConvFeatures
from streamcnn.files import scratch_folder
from streamcnn.images import open_images
from streamcnn.layers import ConvLayer
from streamcnn.pca import StreamingPCA
from streamcnn.store import FeatureStore
from streamcnn.svm import StreamingSVC
from streamcnn.system import machine_bytes, peak_resident_bytes, resident_bytes
from streamcnn.threads import limit_blas, resolve_n_jobs

SIZES = (60_000, 1_000_000)
N_FEATURES, N_CLASSES, C = 200, 10, 1.0
OURS, THEIRS, PATCHED = "streamcnn linear", "LinearSVC(dual=False, tol=1e-8)", "LinearSVC, patched by scikit-learn-intelex"
# rows made, written and judged at a time
_BATCH = 50_000
# passes of the fit that is timed by pass and row; every plane takes part in each
_PASSES = 5


def overlapping_rows(n_rows: int, n_features: int = N_FEATURES, n_classes: int = N_CLASSES, seed: int = 0) -> Iterator[tuple]:
    """Rows like reduced features: variances falling as 1 / i, classes of two lumps each that overlap, in random order.

    The first rows are the same for every `n_rows`, batch by batch of 50,000.

    Yields
    ------
    rows : ndarray of shape (m, n_features), float32
    labels : ndarray of shape (m,), int64
    """
    spread = np.arange(1, n_features + 1, dtype=np.float32) ** -0.5
    centres = np.random.default_rng(seed).standard_normal((n_classes, 2, n_features), np.float32) * spread
    for start in range(0, n_rows, _BATCH):
        rng, m = np.random.default_rng([seed, start]), min(_BATCH, n_rows - start)
        labels, lump = rng.integers(0, n_classes, _BATCH)[:m], rng.integers(0, 2, _BATCH)[:m]
        rows = rng.standard_normal((m, n_features), np.float32) * spread
        # near enough that a plane leaves about half of the rows inside its margin, as those of CIFAR-10 do
        rows += 0.3 * centres[labels, lump]
        yield rows, labels


def image_rows(folders: Iterable[Path], n_components: int = N_FEATURES) -> Iterator[tuple]:
    """Rows of class-per-folder trees of images: 64 random filters of 5 x 5, pooled over 4 x 4, reduced by PCA. In memory.

    Yields
    ------
    As `overlapping_rows`.
    """
    sources = [open_images(folder, need_labels=True) for folder in folders]
    images = np.concatenate([np.concatenate([pixels.copy() for pixels, _ in source.iter_chunks(1000)]) for source in sources])
    labels = np.concatenate([source.labels for source in sources if source.labels is not None]).astype(np.int64)
    features = ConvFeatures(layers=[ConvLayer(64, 5, filters="random", pool_size=4)], random_state=0).fit_transform(images)
    rows = StreamingPCA(n_components).fit(features).transform(features)
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH], labels[start : start + _BATCH]


def write_store(path: Path, batches: Iterable[tuple]) -> None:
    """A store of the batches (rows, labels), a shard each."""
    with FeatureStore.create(path, durable=False) as store:
        for rows, labels in batches:
            store.append(rows, labels)


def scaled_batches(store: FeatureStore, scale: float) -> Iterator[tuple]:
    """The rows as the solvers see them, multiplied in float32, in float64; and their labels."""
    for rows, labels in store.iter_batches(_BATCH):
        yield (rows * np.float32(scale)).astype(np.float64), labels


def objective(store: FeatureStore, scale: float, weights: np.ndarray) -> np.ndarray:
    """f of `streamcnn.linear` for each plane, all in float64.

    Parameters
    ----------
    store : FeatureStore
        Labels 0 to n_classes - 1.
    scale : float
    weights : ndarray of shape (n_planes, n_features + 1)
        Of scaled rows, the intercept last.
    """
    total = np.square(weights).sum(axis=1) / 2
    positive = np.arange(len(weights)) if len(weights) > 1 else np.array([1])
    for rows, labels in scaled_batches(store, scale):
        targets = np.where(labels[:, None] == positive, 1.0, -1.0)
        margins = np.maximum(0, 1 - targets * (rows @ weights[:, :-1].T + weights[:, -1]))
        total += C * np.square(margins).sum(axis=0)
    return total


def fit(engine: str, path: str, n_threads: str, scale: str, output: str) -> None:
    """Fit one engine to a store and print a JSON object: a process of its own.

    `engine` is `OURS`, "passes" (ours, `_PASSES` passes and no more), `THEIRS` or `PATCHED`. The weights, of scaled rows, go to the
    `.npy` file `output`.
    """
    store, jobs = FeatureStore(path), int(n_threads)
    with store.rows() as rows:
        labels = rows.read_labels(0, rows.n_rows)
        if engine in (OURS, "passes"):
            limits = {"tol": 1e-30, "max_iter": _PASSES} if engine == "passes" else {}
            model: Any = StreamingSVC("linear", C=C, n_jobs=jobs, **limits)
            before, start = resident_bytes(), time.perf_counter()
            model.fit(rows, labels)
            seconds, factor = time.perf_counter() - start, model.scale_
        else:
            X = np.empty((rows.n_rows, rows.n_features))
            for number, (part, _) in enumerate(scaled_batches(store, float(scale))):
                X[number * _BATCH : number * _BATCH + len(part)] = part
            del part
            model = _their_class(engine)(C=C, dual=False, tol=1e-8, max_iter=10_000)
            with limit_blas(jobs):
                before, start = resident_bytes(), time.perf_counter()
                model.fit(X, labels)
                seconds, factor = time.perf_counter() - start, 1.0
    np.save(output, np.column_stack([model.coef_ / factor, model.intercept_]))
    passes = int(np.max(model.n_iter_))
    result = {"seconds": seconds, "peak_bytes": peak_resident_bytes(), "before_bytes": before, "scale": factor, "n_iter": passes}
    sys.stdout.write(json.dumps(result) + "\n")


def _their_class(engine: str) -> Any:
    if engine != PATCHED:
        return LinearSVC
    from sklearnex import patch_sklearn

    patch_sklearn(verbose=False)
    from sklearn import svm

    return svm.LinearSVC


def _child(engine: str, store: Path, n_threads: int, scale: float) -> tuple[dict[str, Any], np.ndarray]:
    output = store.with_suffix(".npy")
    arguments = [engine, str(store), str(n_threads), repr(scale), str(output)]
    command = [sys.executable, "-P", "-W", "ignore", "-m", "streamcnn.svmbench", *arguments]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result, np.load(output)


def rival_bytes(n_rows: int, n_features: int) -> int:
    """Memory that LinearSVC takes: float64 rows and liblinear's own, an index and a value for each number and three more a row."""
    return n_rows * (8 * n_features + 16 * (n_features + 3))


def svm_rows(store: Path, what: str, rounds: int, n_threads: int, alone: bool) -> list[dict[str, Any]]:
    """The contestants on one store, taking turns; see `measure`."""
    opened = FeatureStore(store)
    n, k = opened.n_rows, opened.n_features
    rivals = [THEIRS, *([PATCHED] if find_spec("sklearnex") else [])]
    engines = [OURS, *(rivals if not alone and rival_bytes(n, k) < 0.8 * machine_bytes() else [])]
    best: dict[str, dict[str, Any]] = {}
    weights, scale, per_pass = {}, 1.0, []
    for _ in range(rounds):
        for engine in engines:
            result, weights[engine] = _child(engine, store, n_threads, scale)
            scale = result["scale"] if engine == OURS else scale
            if engine not in best or result["seconds"] < best[engine]["seconds"]:
                best[engine] = result
        per_pass.append(_child("passes", store, n_threads, scale)[0]["seconds"])
    values = {engine: objective(opened, scale, weights[engine]).sum() for engine in engines} if len(engines) > 1 else {}
    return [
        {
            "engine": engine,
            "rows": what,
            "n_rows": n,
            "n_features": k,
            "n_threads": n_threads if engine == OURS else 1,
            "seconds": result["seconds"],
            "times_as_long": result["seconds"] / best[OURS]["seconds"],
            "peak_bytes": result["peak_bytes"],
            "before_bytes": result["before_bytes"],
            "n_iter": result["n_iter"],
            "objective": float(values[engine]) if values else None,
            "objective_difference": float(values[engine] / values[THEIRS] - 1) if values else None,
            # one pass more than those of the solver, for the size of the rows
            "pass_row_ns": 1e9 * min(per_pass) / (n * (_PASSES + 1)) if engine == OURS else None,
        }
        for engine, result in best.items()
    ]


def measure(
    n_threads: int, repeats: int, shrink: int, sizes: Sequence[int] = SIZES, folders: Sequence[Path] = (), alone: bool = False
) -> dict[str, Any]:
    """`streamcnn bench svm`.

    Parameters
    ----------
    n_threads : int
        Of ours; liblinear has one.
    repeats : int
        Turns of each contestant, at most three; one beyond 200,000 rows. The smallest time counts.
    shrink : int
        Divides the numbers of rows.
    sizes : sequence of int
        Rows of 200 columns. Where LinearSVC's memory would pass four fifths of the machine's, ours run alone.
    folders : sequence of Path
        Class-per-folder trees of images, whose features are measured besides; 60,000 made rows are then left out.
    alone : bool
        Leave the rivals out.

    Returns
    -------
    dict
        `rows`, for each contestant: `engine`, `rows` (what they are), `n_rows`, `n_features`, `n_threads`, `seconds` (of the fit),
        `times_as_long` (ours 1), `peak_bytes` (of the process), `before_bytes` (resident as the fit begins), `n_iter`, `objective` (summed
        over planes, in float64; null where ours run alone), `objective_difference` (relative to LinearSVC's), `pass_row_ns` (ours:
        nanoseconds for each pass and row, of a fit held to five passes).
    """
    if wrong := [size for size in sizes if size < 1000]:
        raise ParameterError(f"--rows must be at least 1000, got {wrong[0]}")
    turns, rows = min(repeats, 3), []
    sizes = [max(1000, size // shrink) for size in sizes if not folders or size != SIZES[0]]
    scratch = scratch_folder()
    try:
        cases: list[tuple[str, int, Any]] = [("features of images", 0, lambda: image_rows(folders))] if folders else []
        cases += [("made", size, lambda size=size: overlapping_rows(size)) for size in sorted(sizes)]
        for what, size, make in cases:
            store = scratch / "rows"
            write_store(store, make())
            rows += svm_rows(store, what, turns if size <= 200_000 else 1, resolve_n_jobs(n_threads), alone)
            shutil.rmtree(store)
        return {"rows": rows}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| linear SVM, 10 classes | rows | seconds | times as long | peak memory | objective | ns a pass and row |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = f"{row['n_rows']:,} x {row['n_features']} ({row['rows']})"
        difference = "-" if row["objective_difference"] is None else f"{row['objective_difference']:+.1e}"
        each = "" if row["pass_row_ns"] is None else f"{row['pass_row_ns']:.0f}"
        lines.append(
            f"| {row['engine']}, {row['n_threads']} thread{'s' if row['n_threads'] > 1 else ''} | {shape} | {row['seconds']:.1f} "
            f"| {row['times_as_long']:.1f} | {row['peak_bytes'] / 2**20:,.0f} MiB | {difference} | {each} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    fit(*sys.argv[1:])
