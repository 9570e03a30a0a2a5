"""What choosing filters by the 10 % rule does: runs the study whose results `notebooks/06_what_the_ten_percent_rule_does.ipynb` shows.

STREAMCNN_DATA=... python tools/study.py                        every run that `notebooks/filter_study.csv` does not have yet
STREAMCNN_DATA=... python tools/study.py --data cifar10 --seeds 2   only these runs

One factor at a time around the default of preset `fast` (24 filters, at most 10 % "peak" similarity, 5 x 5, on faces 7 x 7), each cell
with the candidate filters of the same seed. `CroppedYale`, `cifar10/train` and `cifar10/test` are looked for in STREAMCNN_DATA, what
is not there is left out. Every run is one line of the results, written at once: a study that was stopped goes on, and cells, seeds
or data added here are run the next time.

The classifier is the same for all cells of a data set: C is what `StreamingSVC` chooses on held-out training images, plain random
filters of seed 1000: 1.0 on CIFAR-10, and 0.01 on faces, where all C from there on recognise all that is held out.
"""

import argparse
import csv
import io
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn import preprocess
from streamcnn.datasets import extended_yale_b
from streamcnn.errors import FilterBankError
from streamcnn.filters import filter_similarity, random_filter_bank
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import get_kernels
from streamcnn.network import ConvLayer, Network, resolve_layer
from streamcnn.pca import StreamingPCA
from streamcnn.presets import PRESETS
from streamcnn.svm import StreamingSVC

RESULTS = Path(__file__).parent.parent / "notebooks" / "filter_study.csv"
CELL = ("data", "factor", "selection", "max_similarity", "kernel_size", "n_filters", "seed")
MEASURED = ("kurtosis", "correlation", "shifted", "acceptance", "heldout", "test", "subset2", "subset3", "subset4", "subset5", "seconds")
COLUMNS = (*CELL, "status", *MEASURED)
# candidates among which the selections other than the rule choose
POOL = 512
CHUNK = 256
# BLAS in one thread: with two, an eigenvalue problem beside a busy machine took 2 to 40 s instead of 2
N_JOBS = 2


@dataclass(frozen=True)
class Cell:
    """One choice of filters. `selection` is a reading of eq. (2), "random" or one of `CHOICES`; None leaves layers as they are."""

    factor: str
    selection: str
    max_similarity: float | None = None
    kernel_size: int | None = None
    n_filters: int | None = None


@dataclass
class Data:
    """Images in memory, what is done to them before the layers, and the fixed rest of the pipeline."""

    name: str
    train: tuple[np.ndarray, np.ndarray]
    tests: dict[str, tuple[np.ndarray, np.ndarray]]
    layers: tuple[ConvLayer, ...]
    pca_solver: str
    svm: dict[str, Any]
    cells: list[Cell]
    n_seeds: int


def candidates_of(n: int, shape: tuple[int, int, int], seed: int, number: int, **rule: Any) -> Any:
    """A bank from the candidates that `Network` would draw for layer `number`."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    return random_filter_bank(n, shape[:2], shape[2], random_state=rng, **rule)


def lowest(pool: np.ndarray, n: int, similarity: str) -> np.ndarray:
    """The first filter, then again and again the one whose largest similarity to those taken is lowest."""
    between = filter_similarity(pool, None, similarity)
    taken, largest = [0], between[0].copy()
    while len(taken) < n:
        largest[taken[-1]] = np.inf
        taken.append(int(np.argmin(largest)))
        largest = np.maximum(largest, between[taken[-1]])
    return pool[taken]


def tight(bank: np.ndarray) -> np.ndarray:
    """The bank made orthogonal, changed as little as can be; more filters than dimensions become a tight frame of unit norm."""
    rows = bank.reshape(len(bank), -1).astype(np.float64)
    for _ in range(50):
        u, s, v = np.linalg.svd(rows, full_matrices=False)
        # the mean, which no filter has, is no direction of the bank
        rows = u[:, s > 1e-6 * s[0]] @ v[s > 1e-6 * s[0]]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.reshape(bank.shape).astype(np.float32)


def peaks(pool: np.ndarray) -> np.ndarray:
    """Largest coefficient of each filter of unit norm."""
    return np.abs(pool).max(axis=(1, 2, 3))


def roughness(pool: np.ndarray) -> np.ndarray:
    """Squared differences of neighbours, summed."""
    return sum(np.square(np.diff(pool, axis=axis)).sum(axis=(1, 2, 3)) for axis in (1, 2))


def blurred(bank: np.ndarray) -> np.ndarray:
    """The bank convolved by (1 2 1) / 4 both ways, zeros outside, zero mean and unit norm again."""
    for axis in (1, 2):
        wide = np.pad(bank.astype(np.float64), [(0, 0) if a != axis else (1, 1) for a in range(4)])
        bank = sum(w * np.take(wide, range(s, s + bank.shape[axis]), axis) for s, w in enumerate((0.25, 0.5, 0.25)))
    bank = bank - bank.mean(axis=(1, 2, 3), keepdims=True)
    return (bank / np.sqrt(np.square(bank).sum(axis=(1, 2, 3), keepdims=True))).astype(np.float32)


CHOICES = {
    "lowest peak": lambda pool, n: lowest(pool, n, "peak"),
    "lowest signed": lambda pool, n: lowest(pool, n, "signed"),
    "orthogonal": lambda pool, n: tight(pool[:n]),
    "peaked": lambda pool, n: pool[np.argsort(-peaks(pool), kind="stable")[:n]],
    "flat": lambda pool, n: pool[np.argsort(peaks(pool), kind="stable")[:n]],
    "smoothest": lambda pool, n: pool[np.argsort(roughness(pool), kind="stable")[:n]],
    "blurred": lambda pool, n: blurred(pool[:n]),
}


def draw(cell: Cell, shape: tuple[int, int, int, int], seed: int, number: int) -> tuple[np.ndarray, float]:
    """A bank of `shape` as the cell chooses it, and the part of the candidates looked at that it keeps."""
    n = shape[0]
    if cell.selection in CHOICES:
        return CHOICES[cell.selection](candidates_of(max(n, POOL), shape[1:], seed, number, max_similarity=None), n), n / max(n, POOL)
    rule = {"similarity": cell.selection} if cell.selection != "random" else {}
    bank, info = candidates_of(n, shape[1:], seed, number, max_similarity=cell.max_similarity, return_info=True, **rule)
    return bank, info["acceptance_rate"]


class GivenBanks(Network):
    """A network whose banks, chosen by a cell, are scaled as any."""

    def __init__(self, geometry, cell: Cell):
        super().__init__(geometry, ())
        self.cell, self.banks, self.rates = cell, [], []

    def _draw_bank(self, number, g, seed):
        bank, rate = draw(self.cell, g.filters_shape, seed, number)
        self.info = [*self.info[:number], {}]
        self.banks.append(bank)
        self.rates.append(rate)
        return bank


def kurtosis(bank: np.ndarray) -> float:
    """Mean excess kurtosis of the coefficients of a filter: 0 when Gaussian, larger with few large ones."""
    rows = bank.reshape(len(bank), -1)
    return float(np.mean(np.mean(rows**4, axis=1) / np.mean(rows**2, axis=1) ** 2 - 3))


def correlation(bank: np.ndarray) -> float:
    """Mean |F1 . F2| of two different filters of unit norm, not shifted."""
    rows = bank.reshape(len(bank), -1).astype(np.float64)
    return float(np.abs(rows @ rows.T)[np.triu_indices(len(rows), 1)].mean())


def layers_of(cell: Cell, layers: tuple[ConvLayer, ...]) -> tuple[ConvLayer, ...]:
    """`layers` with the sizes of the cell."""
    sizes = {name: size for name in ("kernel_size", "n_filters") if (size := getattr(cell, name)) is not None}
    return tuple(replace(layer, **sizes) for layer in layers)


def measure(cell: Cell, data: Data, seed: int, known: dict[bytes, dict[str, float]]) -> dict[str, Any]:
    """One run: the measured columns of its line.

    Raises
    ------
    FilterBankError
        When the rule lets too few filters pass.
    """
    kernels, start = get_kernels("cpu"), time.perf_counter()
    geometry: list[Any] = []
    for layer in layers_of(cell, data.layers):
        geometry.append(resolve_layer(layer, geometry[-1].out_shape if geometry else data.train[0].shape[1:]))
    network = GivenBanks(geometry, cell)
    network.draw(data.train[0][:: max(1, len(data.train[0]) // 128)], seed, N_JOBS, kernels)
    first = network.banks[0]
    between = filter_similarity(first, None, "signed")[np.triu_indices(len(first), 1)]
    line: dict[str, Any] = {"kurtosis": kurtosis(first), "correlation": correlation(first), "shifted": float(between.mean())}
    line["acceptance"] = network.rates[0]
    # a rule that lets everything pass has the filters of no rule
    key = b"".join(bank.tobytes() for bank in network.banks)
    if key not in known:
        known[key] = accuracies(network, data, kernels)
    return line | known[key] | {"seconds": time.perf_counter() - start}


def accuracies(network: Network, data: Data, kernels) -> dict[str, float]:
    """Recognition of each test set by what is trained on `data.train`."""
    buffers = network.allocate(CHUNK, N_JOBS, kernels)

    def rows_of(images: np.ndarray) -> np.ndarray:
        rows = np.empty((len(images), network.n_features), np.float32)
        for at in range(0, len(images), CHUNK):
            rows[at : at + CHUNK] = network.transform(images[at : at + CHUNK], buffers, kernels)
        return rows

    images, labels = data.train
    rows = rows_of(images)
    # as many components as "auto" takes; one batch of incremental PCA is exact
    pca = StreamingPCA(min(256, *rows.shape), solver=data.pca_solver, batch_size=max(256, len(rows)), n_jobs=1, random_state=0).fit(rows)
    svm = StreamingSVC(**data.svm, n_jobs=1, random_state=0).fit(pca.transform(rows).astype(np.float32), labels)
    return {
        name: float(np.mean(svm.predict(pca.transform(rows_of(images)).astype(np.float32)) == labels))
        for name, (images, labels) in data.tests.items()
    }


def read(source: ImageSource, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images and label codes of `rows`, or of all."""
    rows = np.arange(source.n_samples) if rows is None else rows
    images = np.empty((len(rows), *source.image_shape), source.dtype)
    source.read_rows(rows, images)
    return images, np.asarray(source.labels)[rows]


def cells_around(kernel_size: int, thresholds: tuple[float, ...], others: list[Cell]) -> list[Cell]:
    """The default, plain random filters, and one factor at a time around them."""
    default = {"kernel_size": kernel_size, "n_filters": 24}
    cells = [Cell("default", "peak", 0.1, **default), Cell("default", "random", None, **default)]
    cells += [Cell("threshold", "peak", t, **default) for t in thresholds]
    cells += [Cell("reading", reading, 0.1, **default) for reading in ("l1", "l2", "signed")]
    cells += [replace(cell, **default) for cell in others]
    cells += [Cell("kernel size", s, t, k, 24) for k in (3, 5, 7, 9, 11) if k != kernel_size for s, t in (("peak", 0.1), ("random", None))]
    cells += [Cell("bank", s, t, kernel_size, n) for n in (8, 16, 32, 64, 128) for s, t in (("peak", 0.1), ("random", None))]
    cells += [Cell("choice", name, None, **default) for name in CHOICES]
    cells += [Cell("choice", "orthogonal", None, kernel_size, n) for n in (8, 64)]
    return cells + [Cell("choice", "orthogonal", None, k, 24) for k in (3, 5, 7) if k != kernel_size]


THRESHOLDS = (0.05, 0.06, 0.075, 0.15, 0.2, 0.3, 0.5)
FAST = PRESETS["fast"]["layers"]


def faces(folder: Path) -> list[Data]:
    """Extended Yale B: train on subset 1, test on the others."""
    images = {str(number): read(source) for number, source in extended_yale_b(folder).items()}
    others = [Cell("reading", "l2", 0.65), Cell("reading", "l2", 0.7), Cell("reading", "signed", 0.31), Cell("reading", "signed", 0.35)]
    found = []
    for name, steps, layers, solver, svm, cells in (
        # the logarithm and local contrast, as without them subsets 4 and 5 are next to chance
        ("yale", ("log", "local_contrast"), FAST, "incremental", LINEAR | {"C": 0.01}, cells_around(7, THRESHOLDS, others)),
        ("yale, no preprocessing", (), FAST, "incremental", LINEAR | {"C": 0.01}, cells_around(7, (), [])[:2]),
        ("yale, lee2017", ("standardize",), PRESETS["lee2017"]["layers"], "incremental", PAPER, PAPER_CELLS),
    ):
        ready = {number: (preprocessed(x, steps), y) for number, (x, y) in images.items()}
        tests = {f"subset{number}": ready[number] for number in ("2", "3", "4", "5")}
        found.append(Data(name, ready["1"], tests, layers, solver, svm, cells, 20))
    return found


LINEAR = {"kernel": "linear"}
PAPER = {"kernel": "rbf", "C": PRESETS["lee2017"]["C"], "gamma": PRESETS["lee2017"]["gamma"]}
PAPER_CELLS = [Cell("default", "peak", 0.1), Cell("default", "random"), Cell("threshold", "peak", 0.09), Cell("threshold", "peak", 0.15)]


def preprocessed(images: np.ndarray, steps: tuple[str, ...]) -> np.ndarray:
    """What the first layer gets of `images`."""
    if not steps:
        return images
    kernels, out = get_kernels("cpu"), np.empty(images.shape, np.float32)
    scratch = np.empty((N_JOBS, preprocess.scratch(steps, images.shape[1:], kernels)), np.float32)
    preprocess.apply(preprocess.resolve_preprocess(steps), images, scratch, out, kernels)
    return out


def cifar10(folder: Path) -> list[Data]:
    """5,000 images of `train`, 2,000 others of it for choices, and 2,000 of `test`, all drawn by seed 0."""
    train, test = (open_images(folder / part) for part in ("train", "test"))
    rows = np.random.default_rng(0).permutation(train.n_samples)
    tests = {"heldout": read(train, np.sort(rows[5000:7000])), "test": read(test, np.sort(np.random.default_rng(0).permutation(test.n_samples)[:2000]))}
    others = [Cell("reading", "l2", 0.65), Cell("reading", "l2", 0.7), Cell("reading", "signed", 0.25), Cell("reading", "signed", 0.35)]
    cells = cells_around(5, THRESHOLDS, others)
    return [Data("cifar10", read(train, np.sort(rows[:5000])), tests, FAST, "randomized", LINEAR | {"C": 1.0}, cells, 5)]


def written(output: Path) -> set[tuple[str, ...]]:
    """Keys of the finished runs; makes the file, or cuts off a last line that was not finished."""
    if not output.exists() or not output.stat().st_size:
        output.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    text = output.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        output.write_text(whole, encoding="utf-8", newline="")
    return {tuple(line[name] for name in CELL) for line in csv.DictReader(io.StringIO(whole))}


def runs(all_data: list[Data], first: int, n_seeds: int | None) -> Iterator[tuple[int, Data, Cell]]:
    """Seed by seed, so that a study that is stopped has all cells with equally many seeds."""
    for place in range(n_seeds or max(data.n_seeds for data in all_data)):
        for data in all_data:
            if place < (n_seeds or data.n_seeds):
                for cell in data.cells:
                    yield first + place, data, cell


def study(all_data: list[Data], output: Path, first: int = 0, n_seeds: int | None = None) -> int:
    """Append every run that `output` lacks; how many these were."""
    done, n_run, known, of = written(output), 0, {}, None
    for seed, data, cell in runs(all_data, first, n_seeds):
        key = {"data": data.name, "seed": seed} | {name: getattr(cell, name) for name in CELL if hasattr(cell, name)}
        texts = tuple("" if key[name] is None else str(key[name]) for name in CELL)
        if texts in done:
            continue
        if of != (seed, data.name):
            known, of = {}, (seed, data.name)
        try:
            line = {"status": "ok", **measure(cell, data, seed, known)}
        except FilterBankError:
            line = {"status": "infeasible"}
        shown = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in line.items()}
        with output.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(dict(zip(CELL, texts)) | shown)
        done.add(texts)
        n_run += 1
    return n_run


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What choosing filters by the 10 %% rule does; see the head of this file.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--data", nargs="*", help="only these, as the column `data` names them")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="so many seeds, instead of 20 and 5")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("STREAMCNN_DATA", "."))
    all_data = [*(faces(folder / "CroppedYale") if (folder / "CroppedYale").is_dir() else [])]
    all_data += cifar10(folder / "cifar10") if (folder / "cifar10").is_dir() else []
    all_data = [data for data in all_data if options.data is None or data.name in options.data]
    if not all_data:
        raise SystemExit("no data: set STREAMCNN_DATA to a folder with CroppedYale or cifar10")
    logging.getLogger("streamcnn").setLevel(logging.ERROR)
    print(f"{study(all_data, options.output, options.first_seed, options.seeds)} runs added to {options.output}")  # noqa: T201


if __name__ == "__main__":
    main()
