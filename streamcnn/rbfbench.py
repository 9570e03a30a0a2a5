"""Measures the RBF kernel by landmarks against scikit-learn's exact SVC: whole fits in fresh processes, of the same scaled rows.

Ours reads the rows from a store on disk, pass by pass; SVC finds them scaled and in float64 in memory. Both have the same C and gamma;
accuracy is on a sixth of the rows, held out by hash.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.svm import SVC

from streamcnn.errors import ParameterError
from streamcnn.files import scratch_folder
from streamcnn.rows import row_hash
from streamcnn.store import FeatureStore
from streamcnn.svm import StreamingSVC
from streamcnn.svmbench import image_rows, overlapping_rows
from streamcnn.system import peak_resident_bytes
from streamcnn.threads import limit_blas, resolve_n_jobs

SIZES, LANDMARKS = (60_000,), (2048, 8192)
# chosen on 3,000 held-out rows of CIFAR-10 for SVC
C, GAMMA = 3.0, 1.0
THEIRS = "SVC"
_HELD_OUT = 6


def write_stores(folder: Path, batches: Iterable[tuple]) -> None:
    """Stores `train` and `test` of the batches (rows, labels), a shard each."""
    first = 0
    with FeatureStore.create(folder / "train", durable=False) as train, FeatureStore.create(folder / "test", durable=False) as test:
        for rows, labels in batches:
            held_out = row_hash(0, np.arange(first, first + len(rows))) % np.uint64(_HELD_OUT) == 0
            train.append(rows[~held_out], labels[~held_out])
            test.append(rows[held_out], labels[held_out])
            first += len(rows)


def fit(engine: str, folder: str, n_threads: str, scale: str) -> None:
    """Fit one engine to `train` and print a JSON object: a process of its own. `engine` is `THEIRS` or a number of landmarks."""
    train, test, jobs = FeatureStore(Path(folder) / "train"), FeatureStore(Path(folder) / "test"), int(n_threads)
    with train.rows() as rows, limit_blas(jobs):
        labels = rows.read_labels(0, rows.n_rows)
        if engine == THEIRS:
            X = np.empty((rows.n_rows, rows.n_features), np.float32)
            rows.read(0, rows.n_rows, X)
            X = X * float(scale)
            model: Any = SVC(C=C, gamma=GAMMA, cache_size=1000)
            start = time.perf_counter()
            model.fit(X, labels)
        else:
            model = StreamingSVC("nystroem", C=C, gamma=GAMMA, n_landmarks=int(engine), n_jobs=jobs, random_state=0)
            start = time.perf_counter()
            model.fit(rows, labels)
        seconds, peak = time.perf_counter() - start, peak_resident_bytes()
        right = 0
        for part, truth in test.iter_batches(2000):
            right += int((model.predict(part * float(scale) if engine == THEIRS else part) == truth).sum())
    result = {"seconds": seconds, "peak_bytes": peak, "accuracy": right / test.n_rows, "n_iter": int(np.max(model.n_iter_))}
    sys.stdout.write(json.dumps(result | {"scale": getattr(model, "scale_", None)}) + "\n")


def measure(
    n_threads: int,
    repeats: int,
    shrink: int,
    sizes: Sequence[int] = SIZES,
    folders: Sequence[Path] = (),
    alone: bool = False,
    landmarks: Sequence[int] = LANDMARKS,
) -> dict[str, Any]:
    """`streamcnn bench rbf`.

    Parameters
    ----------
    n_threads : int
        Of ours; libsvm has one.
    repeats : int
        Not used: a fit of SVC takes minutes, and each contestant is run once.
    shrink : int
        Divides the numbers of rows made.
    sizes : sequence of int
        Rows of 200 columns, made as `svmbench.overlapping_rows` makes them, held-out ones included.
    folders : sequence of Path
        Class-per-folder trees of images, whose features take their place.
    alone : bool
        Leave SVC out.
    landmarks : sequence of int
        Each a contestant.

    Returns
    -------
    dict
        `rows`, for each contestant: `engine`, `rows` (what they are), `n_rows` (trained on), `n_features`, `n_landmarks` (null for SVC),
        `n_threads`, `seconds` (of the fit), `peak_bytes` (of the process, when it is fitted), `accuracy`, `points` (percentage points
        above SVC; null without it), `n_iter`.
    """
    if wrong := [size for size in sizes if size < 1000]:
        raise ParameterError(f"--rows must be at least 1000, got {wrong[0]}")
    jobs, found = resolve_n_jobs(n_threads), []
    cases: list[tuple[str, Any]] = [("features of images", lambda: image_rows(folders))] if folders else []
    if not folders:
        cases = [("made", lambda size=size: overlapping_rows(size)) for size in (max(1000, size // shrink) for size in sizes)]
    scratch = scratch_folder()
    try:
        for what, make in cases:
            folder = scratch / "rows"
            write_stores(folder, make())
            train, scale, rows = FeatureStore(folder / "train"), 1.0, []
            for engine in [*map(str, landmarks), *([] if alone else [THEIRS])]:
                command = [sys.executable, "-P", "-W", "ignore", "-m", "streamcnn.rbfbench", engine, str(folder), str(jobs), repr(scale)]
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                scale = result.pop("scale") or scale
                ours = engine != THEIRS
                names = {"engine": "streamcnn nystroem" if ours else "SVC, exact", "rows": what, "n_threads": jobs if ours else 1}
                shape = {"n_rows": train.n_rows, "n_features": train.n_features, "n_landmarks": int(engine) if ours else None}
                rows.append(names | shape | result)
            for row in rows:
                row["points"] = None if alone else 100 * (row["accuracy"] - rows[-1]["accuracy"])
            found += rows
            shutil.rmtree(folder)
        return {"rows": found}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| RBF SVM, 10 classes | rows | landmarks | seconds | peak memory | accuracy | points |", "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        marks = "" if row["n_landmarks"] is None else f"{row['n_landmarks']:,}"
        points = "" if row["points"] is None else f"{row['points']:+.2f}"
        lines.append(
            f"| {row['engine']}, {row['n_threads']} thread{'s' if row['n_threads'] > 1 else ''} | {row['n_rows']:,} x {row['n_features']} "
            f"({row['rows']}) | {marks} | {row['seconds']:.1f} | {row['peak_bytes'] / 2**20:,.0f} MiB | {100 * row['accuracy']:.2f} % "
            f"| {points} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    fit(*sys.argv[1:])
