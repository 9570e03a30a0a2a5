"""Measures a whole training, from an HDF5 file of images to an SVM, against the usual tools with everything in memory.

Both have the same filters (64 of 5 x 5, drawn at random, pooled over 4 x 4), 200 components and a linear SVM with C = 1 on rows of mean
energy one. The rival convolves with PyTorch and goes on with scikit-learn's IncrementalPCA and LinearSVC, each with its defaults.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from sklearn.decomposition import IncrementalPCA
from sklearn.svm import LinearSVC

from streamcnn.datasets import digits_split, enlarged_digits
from streamcnn.errors import ParameterError
from streamcnn.estimators import StreamCNNClassifier
from streamcnn.files import scratch_folder
from streamcnn.images import ImageSource, open_images, write_images_h5
from streamcnn.layers import ConvLayer
from streamcnn.model import load_model
from streamcnn.system import peak_resident_bytes
from streamcnn.threads import limit_blas, resolve_n_jobs
from streamcnn.timing import torch_with
from streamcnn.warmup import compile_kernels

LIMIT = "512MiB"
N_FILTERS, POOL, N_COMPONENTS, C = 64, 4, 200, 1.0
# images of a convolution in PyTorch
_BATCH = 512


def measure(n_threads: int, repeats: int, shrink: int, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """`streamcnn bench pipeline`.

    Parameters
    ----------
    n_threads : int
        Of both; liblinear has one.
    repeats : int
        Turns of each, in fresh processes, at most three; the smallest time counts.
    shrink : int
        Divides the numbers of images made.
    folders : sequence of Path
        Training and test images, a class-per-folder tree each. None: digits of 32 x 32, varied, 20,000 and 2,000.

    Returns
    -------
    dict
        - `images`, `test_images`, `shape`, `memory_limit` (of ours)
        - `rows`, for each of "streamcnn" and, where PyTorch is installed, "PyTorch, IncrementalPCA, LinearSVC": `engine`, `seconds`,
          `stage_seconds` (name to seconds), `times_as_long`, `peak_bytes` (of the process, test included), `times_the_memory`, `accuracy`
    """
    if len(folders) not in (0, 2):
        raise ParameterError(f"--images must be two folders, of training and of test images, got {len(folders)}")
    compile_kernels()
    folder = scratch_folder()
    try:
        files = [folder / "train.h5", folder / "test.h5"]
        sources = [open_images(path, need_labels=True) for path in folders] or _digits(shrink)
        for path, source in zip(files, sources):
            _write(path, source)
        engines = ["streamcnn", *(["rival"] if torch_with(n_threads) else [])]
        best: dict[str, dict[str, Any]] = {}
        for _ in range(min(repeats, 3)):
            for engine in engines:
                command = [
                    sys.executable,
                    "-P",
                    "-W",
                    "ignore",
                    "-m",
                    "streamcnn.pipebench",
                    engine,
                    str(folder),
                    str(resolve_n_jobs(n_threads)),
                ]
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                if engine not in best or result["seconds"] < best[engine]["seconds"]:
                    best[engine] = result
        ours = best["streamcnn"]
        for result in best.values():
            result["times_as_long"] = result["seconds"] / ours["seconds"]
            result["times_the_memory"] = result["peak_bytes"] / ours["peak_bytes"]
        train, test = sources
        sizes = {"images": train.n_samples, "test_images": test.n_samples, "shape": list(train.image_shape)}
        return sizes | {"memory_limit": LIMIT, "rows": list(best.values())}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digits(shrink: int) -> list[ImageSource]:
    train, sizes = digits_split(0), (max(1000, 20_000 // shrink), max(200, 2000 // shrink))
    return [enlarged_digits(n, 32, 0, originals=np.flatnonzero(chosen)) for n, chosen in zip(sizes, (train, ~train))]


def _write(path: Path, source: ImageSource) -> None:
    def blocks() -> Iterator[tuple]:
        for number, (images, labels) in enumerate(source.iter_chunks(_BATCH)):
            yield images, source.labels[number * _BATCH :][: len(images)] if labels is None and source.labels is not None else labels

    write_images_h5(path, blocks(), source.n_samples, source.image_shape, np.uint8)


def ours(folder: Path, n_jobs: int) -> dict[str, Any]:
    """Train on `train.h5` under the limit, and leave the model beside it."""
    layers = [ConvLayer(N_FILTERS, 5, filters="random", pool_size=POOL)]
    parameters: dict[str, Any] = {"n_components": N_COMPONENTS, "kernel": "linear", "C": C, "memory_limit": LIMIT, "random_state": 0}
    start = time.perf_counter()
    classifier = StreamCNNClassifier(layers=layers, n_jobs=n_jobs, device="cpu", **parameters).fit(str(folder / "train.h5"))
    seconds = time.perf_counter() - start
    classifier.save(folder / "model.h5")
    accuracy = classifier.score(str(folder / "test.h5"))
    return {"engine": "streamcnn", "seconds": seconds, "stage_seconds": classifier.report_.stage_seconds, "accuracy": accuracy}


def rival(folder: Path, n_jobs: int) -> dict[str, Any]:
    """The same from PyTorch and scikit-learn, with the filters of the model that `ours` has left."""
    torch = torch_with(n_jobs)
    weights = torch.from_numpy(load_model(folder / "model.h5").network.filters[0]).permute(0, 3, 1, 2)
    functional = torch.nn.functional

    def features(name: str) -> tuple[np.ndarray, np.ndarray]:
        with h5py.File(folder / name) as file:
            images, labels = file["images"][()], file["labels"][()]
        pixels, result = torch.from_numpy(images).permute(0, 3, 1, 2), None
        w = weights.contiguous(memory_format=torch.channels_last)
        for first in range(0, len(images), _BATCH):
            # the faster layout of the two, see `bench conv`
            x = pixels[first : first + _BATCH].to(torch.float32, memory_format=torch.channels_last)
            part = functional.avg_pool2d(torch.relu_(functional.conv2d(x, w)), POOL).reshape(len(x), -1).numpy()
            result = np.empty((len(images), part.shape[1]), np.float32) if result is None else result
            result[first : first + len(part)] = part
        assert result is not None
        return result, labels

    times, clock = {}, [time.perf_counter()]

    def lap(name: str) -> None:
        clock.append(time.perf_counter())
        times[name] = clock[-1] - clock[-2]

    with limit_blas(n_jobs):
        rows, labels = features("train.h5")
        lap("convolve")
        pca = IncrementalPCA(min(N_COMPONENTS, *rows.shape)).fit(rows)
        lap("pca")
        reduced = pca.transform(rows)
        lap("project")
        scale = 1 / np.sqrt(np.square(reduced).sum(axis=1).mean())
        svm = LinearSVC(C=C, dual=False).fit(reduced * scale, labels)
        lap("svm")
        test_rows, test_labels = features("test.h5")
        accuracy = float(svm.score(pca.transform(test_rows) * scale, test_labels))
    return {
        "engine": "PyTorch, IncrementalPCA, LinearSVC",
        "seconds": sum(times.values()),
        "stage_seconds": times,
        "accuracy": accuracy,
    }


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    height, width, channels = result["shape"]
    lines = [
        f"| {result['images']:,} images of {height} x {width} x {channels} to a linear SVM | seconds | times as long | peak memory "
        "| times the memory | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stage_seconds"].items())
        lines.append(
            f"| {row['engine']} ({stages}) | {row['seconds']:.1f} | {row['times_as_long']:.1f} | {row['peak_bytes'] / 2**20:,.0f} MiB "
            f"| {row['times_the_memory']:.1f} | {100 * row['accuracy']:.2f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = (ours if sys.argv[1] == "streamcnn" else rival)(Path(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(found | {"peak_bytes": peak_resident_bytes()}) + "\n")
