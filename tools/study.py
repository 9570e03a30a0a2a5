"""What choosing filters by the 10 % rule does: runs the study that `notebooks/06_what_the_ten_percent_rule_does.ipynb` shows.

STREAMCNN_DATA=... python tools/study.py     every run that `notebooks/filter_study.csv` does not have yet
... --data cifar10 --factors choice --seeds 20    only these runs, 20 seeds

One factor at a time around one layer of 24 filters of at most 10 % "peak" similarity, 5 x 5, on faces 7 x 7. All cells
of a seed have the same candidate filters. `CroppedYale`, `cifar10/train` and `cifar10/test` are looked for in STREAMCNN_DATA; what is not
there is left out. Every run is one line of the results, written at once: a study that was stopped goes on where it was, and cells,
seeds or data added here are run the next time. Images and features are held in memory.

The classifier is the same for all cells of a data set. Its C is what `StreamingSVC` chose on held-out training images with plain random
filters of seed 1000: 0.01 on faces, where every C tried, 0.01 to 100, recognises all that is held out; on CIFAR-10 1.0 with 200
components and, found afterwards, 10 with the 256 that the study has (48.5 % against 48.0 %), so default and plain filters have both.
Over 20 seeds 1.0 is the better.
"""

import argparse
import csv
import io
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from study_banks import CHOICES, Cell, ChosenBanks

from streamcnn import preprocess
from streamcnn.datasets import extended_yale_b
from streamcnn.errors import FilterBankError
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import get_kernels
from streamcnn.layers import ConvLayer, resolve_layers
from streamcnn.pca import StreamingPCA
from streamcnn.presets import PRESETS
from streamcnn.svm import StreamingSVC

RESULTS = Path(__file__).parent.parent / "notebooks" / "filter_study.csv"
CELL = ("data", "factor", "selection", "max_similarity", "kernel_size", "n_filters", "seed")
FIGURES = ("kurtosis", "correlation", "shifted", "acceptance")
ACCURACIES = ("heldout", "test", "subset2", "subset3", "subset4", "subset5")
COLUMNS = (*CELL, "status", *FIGURES, *ACCURACIES, "seconds")
CHUNK, N_JOBS = 256, 2
# one layer of random filters, which preset "fast" was until filters made of the data proved better
RANDOM = {"layers": (ConvLayer(24, activation="split", pool="mean"),)}
LEE2017 = PRESETS["lee2017"]
SMOOTH = ("smoothest", "blurred")
THRESHOLDS = (0.05, 0.06, 0.075, 0.15, 0.2, 0.3, 0.5)


@dataclass
class Data:
    """Images in memory, as the first layer gets them, and the rest of the pipeline, which is fixed."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    tests: dict[str, tuple[np.ndarray, np.ndarray]]
    layers: tuple[ConvLayer, ...]
    pca_solver: str
    svm: dict[str, Any]
    cells: list[Cell]
    n_seeds: int


def measure(cell: Cell, data: Data, seed: int, known: dict[bytes, dict[str, float]]) -> dict[str, Any]:
    """One run: figures of the first bank, recognition of each test set, seconds.

    Parameters
    ----------
    known : dict
        Recognition by bank, of this data and seed: a rule that lets everything pass has the filters of no rule.

    Raises
    ------
    FilterBankError
        When the rule lets too few filters pass.
    """
    kernels, start = get_kernels("cpu"), time.perf_counter()
    sizes: dict[str, Any] = {name: size for name in ("kernel_size", "n_filters") if (size := getattr(cell, name)) is not None}
    geometry = resolve_layers([replace(layer, **sizes) for layer in data.layers], data.train[0].shape[1:])
    network = ChosenBanks(geometry, cell)
    # for their scale, on which nothing but `clip` depends
    network.draw(data.train[0][:: max(1, len(data.train[0]) // 128)], seed, N_JOBS, kernels)
    key = b"".join(bank.tobytes() for bank in network.banks)
    if key not in known:
        known[key] = accuracies(network, data, kernels)
    return network.figures() | known[key] | {"seconds": time.perf_counter() - start}


def accuracies(network: ChosenBanks, data: Data, kernels) -> dict[str, float]:
    """Recognition of each test set by what is trained on `data.train`."""
    buffers = network.allocate(CHUNK, N_JOBS, kernels)

    def rows_of(images: np.ndarray) -> np.ndarray:
        rows = np.empty((len(images), network.n_features), np.float32)
        for at in range(0, len(images), CHUNK):
            rows[at : at + CHUNK] = network.transform(images[at : at + CHUNK], buffers, kernels)
        return rows

    images, labels = data.train
    rows = rows_of(images)
    # As many components as "auto" takes; incremental PCA of a single batch is exact. BLAS in one thread: with two, one decomposition on
    # a machine with other work took 2 to 40 s instead of 2.
    pca = StreamingPCA(min(256, *rows.shape), solver=data.pca_solver, batch_size=max(256, len(rows)), n_jobs=1, random_state=0).fit(rows)
    svm = StreamingSVC(**data.svm, n_jobs=1, random_state=0).fit(pca.transform(rows).astype(np.float32), labels)
    return {
        name: float(np.mean(svm.predict(pca.transform(rows_of(images)).astype(np.float32)) == labels))
        for name, (images, labels) in data.tests.items()
    }


def cells_around(side: int, signed: tuple[float, float]) -> list[Cell]:
    """The default, plain random filters, and one factor at a time around them; `signed` are thresholds at which that reading selects."""
    both: tuple[tuple[str, float | None], ...] = (("peak", 0.1), ("random", None))
    cells = [Cell("default", s, t, side, 24) for s, t in both]
    cells += [Cell("threshold", "peak", t, side, 24) for t in THRESHOLDS]
    cells += [Cell("reading", reading, 0.1, side, 24) for reading in ("l1", "l2", "signed")]
    cells += [Cell("reading", reading, t, side, 24) for reading, ts in (("l2", (0.65, 0.7)), ("signed", signed)) for t in ts]
    cells += [Cell("kernel size", s, t, k, 24) for k in (3, 5, 7, 9, 11) if k != side for s, t in both]
    cells += [Cell("bank", s, t, side, n) for n in (8, 16, 32, 64, 128) for s, t in both]
    cells += [Cell("choice", name, None, side, 24) for name in CHOICES]
    cells += [Cell("choice", "orthogonal", None, side, n) for n in (8, 64)]
    return cells + [Cell("choice", "orthogonal", None, k, 24) for k in (3, 5, 7) if k != side]


def faces(folder: Path) -> list[Data]:
    """Extended Yale B: train on subset 1, test on the others."""
    images = {number: read(source) for number, source in extended_yale_b(folder).items()}
    linear, rbf = {"kernel": "linear", "C": 0.01}, {name: LEE2017[name] for name in ("kernel", "C", "gamma")}
    one, two = cells_around(7, (0.31, 0.35)), [Cell("default", "peak", 0.1), Cell("default", "random")]
    two += [Cell("threshold", "peak", t) for t in (0.09, 0.15)]
    found = []
    for name, preset, steps, svm, cells in (
        # without logarithm and local contrast, subsets 4 and 5 are next to chance
        ("yale", RANDOM, ("log", "local_contrast"), linear, one),
        ("yale, no preprocessing", RANDOM, (), linear, one[:2]),
        # whether smooth filters still help where the noise is smoothed away before
        ("yale, smoothed", RANDOM, ("log", "smooth", "local_contrast"), linear, one[:2] + [c for c in one if c.selection in SMOOTH]),
        ("yale, lee2017", LEE2017, LEE2017["preprocess"], rbf, two),
    ):
        ready = {number: (preprocessed(x, steps), codes) for number, (x, codes) in images.items()}
        tests = {f"subset{number}": ready[number] for number in (2, 3, 4, 5)}
        found.append(Data(name, ready[1], tests, preset["layers"], "incremental", svm, cells, 20))
    return found


def cifar10(folder: Path) -> list[Data]:
    """5,000 images of `train`, 2,000 others of it on which a choice may be made, and 2,000 of `test`, all drawn by seed 0."""
    train, test = (open_images(folder / part) for part in ("train", "test"))
    rows, test_rows = (np.random.default_rng(0).permutation(source.n_samples) for source in (train, test))
    tests = {"heldout": read(train, np.sort(rows[5000:7000])), "test": read(test, np.sort(test_rows[:2000]))}
    svm, cells = {"kernel": "linear", "C": 1.0}, cells_around(5, (0.25, 0.35))
    data = Data("cifar10", read(train, np.sort(rows[:5000])), tests, RANDOM["layers"], "randomized", svm, cells, 5)
    return [data, replace(data, name="cifar10, C = 10", svm=svm | {"C": 10.0}, cells=cells[:2], n_seeds=20)]


def read(source: ImageSource, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images and label codes of `rows`, or of all."""
    rows = np.arange(source.n_samples) if rows is None else rows
    images = np.empty((len(rows), *source.image_shape), source.dtype)
    source.read_rows(rows, images)
    return images, np.asarray(source.labels)[rows]


def preprocessed(images: np.ndarray, steps: tuple[str, ...]) -> np.ndarray:
    """What the first layer gets of `images`; once for all runs."""
    if not steps:
        return images
    kernels, out = get_kernels("cpu"), np.empty(images.shape, np.float32)
    scratch = np.empty((N_JOBS, preprocess.scratch(steps, images.shape[1:], kernels)), np.float32)
    preprocess.apply(steps, images, scratch, out, kernels)
    return out


def written(output: Path) -> set[tuple[str, ...]]:
    """Cells and seeds that `output` has; begins it where it is missing, and drops a last line that was not finished."""
    text = output.read_text(encoding="utf-8") if output.exists() else ""
    whole = text[: text.rfind("\n") + 1] or ",".join(COLUMNS) + "\n"
    if whole != text:
        output.write_text(whole, encoding="utf-8", newline="")
    reader = csv.DictReader(io.StringIO(whole))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise SystemExit(f"{output} has other columns than this study: give another --output")
    return {tuple(line[name] for name in CELL) for line in reader}


def runs(all_data: list[Data], n_seeds: int | None) -> Iterator[tuple[int, Data, Cell]]:
    """Seed by seed, so that a study that is stopped has all cells with equally many seeds."""
    for seed in range(n_seeds or max(data.n_seeds for data in all_data)):
        for data in all_data:
            if n_seeds or seed < data.n_seeds:
                yield from ((seed, data, cell) for cell in data.cells)


def study(all_data: list[Data], output: Path, n_seeds: int | None = None) -> int:
    """Append every run that `output` lacks, one line each; returns how many."""
    done, n_run, current = written(output), 0, None
    known: dict[bytes, dict[str, float]] = {}
    for seed, data, cell in runs(all_data, n_seeds):
        values = {"data": data.name, "seed": seed} | asdict(cell)
        key = tuple("" if values[name] is None else str(values[name]) for name in CELL)
        if key in done:
            continue
        if current != (seed, data.name):
            known, current = {}, (seed, data.name)
        try:
            line = {"status": "ok"} | measure(cell, data, seed, known)
        except FilterBankError:
            line = {"status": "infeasible"}
        texts = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in line.items()}
        with output.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(dict(zip(CELL, key)) | texts)
        n_run += 1
    return n_run


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What choosing filters by the 10 %% rule does; see the head of this file.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--data", nargs="+", help="only these, as the column `data` names them")
    parser.add_argument("--factors", nargs="+", help="only cells of these factors")
    parser.add_argument("--seeds", type=int, help="so many seeds, instead of 20 on faces and 5 on CIFAR-10")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("STREAMCNN_DATA", "."))
    readers = {"CroppedYale": faces, "cifar10": cifar10}
    all_data = [data for name, reader in readers.items() if (folder / name).is_dir() for data in reader(folder / name)]
    all_data = [data for data in all_data if options.data is None or data.name in options.data]
    if not all_data:
        raise SystemExit("no data: set STREAMCNN_DATA to a folder with CroppedYale or cifar10")
    for data in all_data:
        data.cells = [cell for cell in data.cells if options.factors is None or cell.factor in options.factors]
    logging.getLogger("streamcnn").setLevel(logging.ERROR)
    added = study(all_data, options.output, options.seeds)
    print(f"{added} runs added to {options.output}")  # noqa: T201


if __name__ == "__main__":
    main()
