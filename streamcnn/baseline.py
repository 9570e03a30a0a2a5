"""`streamcnn reproduce lee2017 FOLDER --baseline cnn frozen`: the other systems of the paper's Fig. 4 beside ours, on the same machine.

Each system and seed is a fresh process, so that memory is comparable and nothing is warm from the run before; they take turns, so that a
machine that gets slower does so for all. Ours is this same command without a baseline, the others are `streamcnn.cnn`.
"""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from streamcnn import cnn
from streamcnn.datasets import extended_yale_b
from streamcnn.errors import DataError, ParameterError, StreamCNNError
from streamcnn.files import scratch_folder
from streamcnn.images import ImageSource
from streamcnn.kernels import get_kernels
from streamcnn.layers import resolve_layers
from streamcnn.memory import format_bytes
from streamcnn.network import Network
from streamcnn.pipeline import draw_filters
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import Progress
from streamcnn.reproduce import SUBSETS, combined, table
from streamcnn.selection import stratified_sample
from streamcnn.warmup import compile_kernels

BASELINES = {"cnn": "back-propagated CNN", "frozen": "frozen filters, neural network"}
KEYS = {"cnn": "baseline", "frozen": "baseline_frozen"}


def check_baselines(names: Sequence[str]) -> list[str]:
    """`names` without repetitions.

    Raises
    ------
    ParameterError
        For an unknown name, or where PyTorch is not installed.
    """
    for name in names:
        if name not in BASELINES:
            raise ParameterError(f"--baseline must be {' or '.join(BASELINES)}, got {name!r}")
    if importlib.util.find_spec("torch") is None:
        raise ParameterError(
            f"--baseline {' '.join(names)} needs PyTorch, which is not installed: pip install torch, or leave --baseline out"
        )
    return list(dict.fromkeys(names))


def write_images(subsets: Mapping[int, ImageSource], path: Path) -> None:
    """All images and labels as `streamcnn.cnn.run` reads them: `images_S`, `labels_S`."""
    arrays: dict[str, Any] = {}
    for subset, source in subsets.items():
        images = np.empty((source.n_samples, *source.image_shape), source.dtype)
        source.read(0, source.n_samples, images)
        arrays |= {f"images_{subset}": images, f"labels_{subset}": source.labels}
    np.savez(path, **arrays)


def write_seed(training: ImageSource, settings: Settings, path: Path) -> float:
    """What follows from the seed of `settings` and subset 1 alone: which of its images are held out, and the random filters.

    Held out is one image of each class and a fifth of larger ones, by a hash. Filters are those of our own model of that seed.

    Returns
    -------
    float
        Seconds to draw the filters.
    """
    if training.labels is None or training.classes_ is None:
        raise DataError("labels are missing: a baseline needs them")
    rows, held_out = stratified_sample(training.labels, len(training.classes_), settings.seed, training.n_samples)
    assert len(rows) == training.n_samples
    start = perf_counter()
    network = Network(resolve_layers(settings.layers, training.image_shape), settings.preprocess)
    draw_filters(network, training, settings, get_kernels(settings.device))
    seconds = perf_counter() - start
    pools = [layer.pool_size for layer in settings.layers]
    arrays: dict[str, Any] = {f"filters_{number}": bank for number, bank in enumerate(network.filters, start=1)}
    np.savez(path, held_out=held_out, pools=pools, **arrays)
    return seconds


def side_by_side(folder: str | Path, settings: Settings, limit: int, n_seeds: int, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Ours and baselines, for `n_seeds` seeds from `settings.seed` on.

    Parameters
    ----------
    folder : path
        The standard cropped Extended Yale B folder.
    settings : Settings
        Of ours; the baselines have the topology of preset `lee2017` and as many threads.
    limit : int
        Bytes for ours.
    names : sequence of "cnn", "frozen"

    Returns
    -------
    result : dict
        What `reproduce.lee2017` gives for ours, `seconds` and peak over the processes of all seeds; and under `baseline` (the CNN) and
        `baseline_frozen`, null where not asked for, the same keys for a rival. It has also `best_seconds` (mean seconds to the best
        epoch; `train_seconds` are until training has stopped), lists `epochs_per_seed`, `best_epoch_per_seed`, `held_out_loss_per_seed`
        and `held_out_accuracy_per_seed`, `times_as_long` and `times_the_memory` (`train_seconds` and `peak_rss_bytes` to ours).
    table : str

    Raises
    ------
    StreamCNNError
        When a process fails: with what it said.
    """
    names = check_baselines(names)
    subsets, progress = extended_yale_b(folder), Progress(1)
    rival = resolve_settings("lee2017", n_jobs=settings.n_jobs, device="cpu")
    compile_kernels()  # onto the disk, or the first process of ours would count the compiler's seconds and megabytes
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("streamcnn", *names)}
    scratch = scratch_folder()
    try:
        write_images(subsets, scratch / "images.npz")
        for seed in range(settings.seed, settings.seed + n_seeds):
            drawing = write_seed(subsets[1], replace(rival, seed=seed), scratch / "seed.npz")
            for name in runs:
                run = (
                    _ours(folder, replace(settings, seed=seed), limit)
                    if name == "streamcnn"
                    else _rival(scratch, name, settings.n_jobs, seed)
                )
                if name == "frozen":  # these filters are its own, too
                    run["train_seconds"] += drawing
                    run["best_seconds"] += drawing
                    run["stage_seconds"] = {"filters": drawing} | run["stage_seconds"]
                runs[name].append(run)
                progress.say(f"seed {seed}, {BASELINES.get(name, name)}: {_line(run)}")
                progress.check()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    ours = merged(runs["streamcnn"], settings.seed)
    rivals = {name: merged(runs[name], settings.seed) for name in names}
    same = {key: ours[key] for key in ("n_train", "n_test", "data_bytes", "n_jobs")}
    for name, result in rivals.items():
        result |= same | {"memory_limit_bytes": None, "store_bytes": None, "device": "cpu", "preset": name, "resumed": False, "model": None}
        for key, of in (("times_as_long", "train_seconds"), ("times_the_memory", "peak_rss_bytes")):
            result[key] = result[of] / ours[of]
    lines = [table({f"streamcnn {settings.preset}": ours} | {BASELINES[name]: result for name, result in rivals.items()}), ""]
    for name, result in rivals.items():
        lines.append(
            f"{BASELINES[name]}: {result['best_seconds']:.1f} s to its best epoch; altogether {result['times_as_long']:.1f} times as long "
            f"and {result['times_the_memory']:.2f} times the memory of streamcnn"
        )
    return ours | {key: rivals.get(name) for name, key in KEYS.items()}, "\n".join(lines)


def merged(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """One result of runs with the seeds from `seed` on, each a process of its own."""
    result = runs[-1] | combined(runs) | {"seed": seed, "seeds": len(runs)}
    result |= {"seconds": sum(run["seconds"] for run in runs), "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs)}
    result["peak_exact"] = all(run["peak_exact"] for run in runs)
    if "best_seconds" in result:
        result["best_seconds"] = float(np.mean([run["best_seconds"] for run in runs]))
        for key in ("epochs", "best_epoch", "held_out_loss", "held_out_accuracy"):
            del result[key]
            result[f"{key}_per_seed"] = [run[key] for run in runs]
    return result


def _ours(folder: str | Path, settings: Settings, limit: int) -> dict[str, Any]:
    """This command without a baseline."""
    options = {
        "preset": settings.preset,
        "seed": settings.seed,
        "threads": settings.n_jobs,
        "device": settings.device,
        "memory-limit": limit,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return _child("streamcnn", settings.seed, ["-m", "streamcnn", "reproduce", "lee2017", str(folder), *words, "--json"])


def _rival(scratch: Path, name: str, n_threads: int, seed: int) -> dict[str, Any]:
    """`cnn.run` in a process of its own."""
    arguments = [str(Path(cnn.__file__)), str(scratch / "images.npz"), str(scratch / "seed.npz"), name, str(n_threads), str(seed)]
    result = _child(BASELINES[name], seed, arguments)
    return result | {"seconds": sum(result["stage_seconds"].values()), "planned_peak_bytes": None}


def _child(who: str, seed: int, arguments: list[str]) -> dict[str, Any]:
    """The JSON object that Python prints when it is run with `arguments`.

    Raises
    ------
    StreamCNNError
        With what it said last, when it fails.
    KeyboardInterrupt
        When it was interrupted.
    """
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True)
    if done.returncode in (130, -signal.SIGINT):  # Ctrl-C reaches every process of a terminal; ours answers with 130
        raise KeyboardInterrupt
    if done.returncode:
        _, own, other = ("\n" + done.stderr.strip()).rpartition("\nstreamcnn: ")
        said = other if own else other.rpartition("\n")[2]  # our errors may have a table below them, tracebacks end with the reason
        raise StreamCNNError(f"{who} with seed {seed} failed with exit code {done.returncode}: {said}")
    return json.loads(done.stdout)


def _line(run: dict[str, Any]) -> str:
    shares = " / ".join(f"{100 * run['accuracy'][name]:.2f}" for name in SUBSETS)
    epochs = f", {run['epochs']} epochs" if "epochs" in run else ""
    return f"{shares} % of subsets {', '.join(SUBSETS)}, {run['train_seconds']:.1f} s, {format_bytes(run['peak_rss_bytes'])}{epochs}"
