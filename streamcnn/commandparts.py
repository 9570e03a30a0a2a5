"""What the commands of the command line have in common: reading the arguments, opening DATA, the keys of their results."""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.errors import FileError, StoreError
from streamcnn.files import is_kind
from streamcnn.images import ImageSource, open_images
from streamcnn.labels import unknown_note
from streamcnn.memory import MemoryMonitor, format_bytes, resolve_limit
from streamcnn.model import Model, load_model
from streamcnn.planning import MemoryPlan
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import counted
from streamcnn.store import FeatureStore
from streamcnn.threads import resolve_n_jobs
from streamcnn.untrusted import check_regular

# of a damaged model too, which is refused as such when it is read
_MODEL_SUFFIXES = ("", ".h5", ".hdf5")
# classes by name, where there are more than one more
_MOST_SHOWN = 6

RESULT_KEYS = (
    "accuracy n_train n_test seconds stage_seconds memory_limit_bytes peak_rss_bytes planned_peak_bytes data_bytes store_bytes "
    "device preset seed n_jobs resumed model"
).split()


def result_of(**values: Any) -> dict[str, Any]:
    """The common keys, null where not applicable, and what else the command has."""
    return dict.fromkeys(RESULT_KEYS) | values


def say(text: str) -> None:
    """A notice: to standard error."""
    sys.stderr.write(text + "\n")


def tell(args: argparse.Namespace, text: str) -> None:
    """The result for people: to standard output, or with `--json`, whose one object has that for itself, to standard error."""
    (sys.stderr if args.json else sys.stdout).write(text + "\n")


def class_counts(classes: np.ndarray, counts: np.ndarray) -> str:
    """The classes and their numbers of images for people: all of a few, of many the first six and the range of the rest."""
    shown = len(classes) if len(classes) <= _MOST_SHOWN + 1 else _MOST_SHOWN
    parts = [f"{name} {count:,}" for name, count in zip(classes[:shown].tolist(), counts[:shown].tolist())]
    if (rest := counts[shown:]).size:
        least, most = int(rest.min()), int(rest.max())
        parts.append(f"and {len(rest):,} more, {f'{least:,} to ' if least < most else ''}{most:,} images each")
    return f"{len(classes):,} class{'es' if len(classes) != 1 else ''}: {', '.join(parts)}"


def open_model(path: Path, limit: int) -> Model:
    """The model in a file, which is told from the other things that people name in its place."""
    if path.is_dir():
        inside = path / "model.h5"
        raise FileError(f"{path} is a folder, not a model: " + (f"give {inside}" if inside.is_file() else "give the file of fit --model"))
    if path.suffix.lower() not in _MODEL_SUFFIXES and not _begins_as_hdf5(path):
        raise FileError(f"{path} is a {path.suffix} file, not a model: give the file of fit --model")
    return load_model(path, limit)


def check_store(path: Path) -> None:
    """Refuse a file where the folder of a store is wanted."""
    if path.is_file():
        what = "an HDF5 file, perhaps a model" if _begins_as_hdf5(path) else "a file"
        raise StoreError(f"{path} is {what}, not the folder of a store: give what fit --store has made")


def _begins_as_hdf5(path: Path) -> bool:
    check_regular(path)
    return is_kind(path, "HDF5 file")


def parameters_of(args: argparse.Namespace) -> dict[str, Any]:
    """What overrides a preset."""
    values: dict[str, Any] = {"device": args.device}
    if hasattr(args, "n_components"):
        if args.n_components is not None:
            values["n_components"] = None if args.n_components == "none" else args.n_components
        for name in ("pca_solver", "kernel", "n_landmarks", "C", "gamma", "class_weight", "probability", "feature_dtype"):
            values[name] = getattr(args, name)
        words = {"auto": "auto", "yes": True, "no": False}
        values["keep_features"] = words[args.keep_features]
        # None, as a word would stand above what a search varies
        values["mirror"] = None if args.mirror == "auto" else words[args.mirror]
    return values | {"n_jobs": resolve_n_jobs(args.threads), "seed": args.seed}


def settings_of(args: argparse.Namespace) -> Settings:
    return resolve_settings(args.preset or "fast", **parameters_of(args))


def open_data(
    args: argparse.Namespace, path: str, need_labels: bool, image_shape: tuple[int, ...] | str | None, store: Path | None = None
) -> ImageSource:
    """Open DATA with the common flags, in `image_shape` where no `--image-size` is given.

    Files that an earlier run into `store` found bad are left out without reading all again.
    """
    options: dict[str, Any] = {"images_key": args.images_key, "labels_key": args.labels_key, "need_labels": need_labels}
    options["memory_limit"] = resolve_limit(args.memory_limit)
    options["image_shape"] = args.image_size or image_shape
    if args.skip_bad:
        options["on_error"] = "skip"
        if store is not None and (store / "config.json").exists():
            config = FeatureStore(store).config
            known = [tuple(bad) for bad in config.get("bad_files", [])]
            source = open_images(path, **options, known_bad=known)
            if source.fingerprint() == config.get("fingerprint"):
                return source
            source.close()
        if Path(path).is_dir():
            say(f"--skip-bad reads every file of {path} once, to find those that cannot be read")
    source = open_images(path, **options)
    for name, reason in source.bad_files:
        say(f"left out: {name}: {reason}")
    return source


def memory_facts(monitor: MemoryMonitor, plan: MemoryPlan) -> dict[str, Any]:
    """What a run held, against its plan: the process's peak since entry, exact or the largest sample, and that of each stage."""
    return {
        "memory_limit_bytes": plan.limit,
        "peak_rss_bytes": monitor.peak_bytes,
        "peak_exact": monitor.exact,
        "base_bytes": plan.base_bytes,
        "planned_peak_bytes": plan.peak_bytes,
        "stage_peak_bytes": dict(monitor.stage_peaks),
        "stage_planned_bytes": dict(monitor.stage_planned),
        "tightened": monitor.tight,
    }


def svm_line(svm: dict[str, Any]) -> str:
    """`Model.svm_facts` for people."""
    gamma = "" if svm["gamma"] is None else f", gamma {svm['gamma']:.4g}"
    chosen = ""
    if svm["held_out_accuracy"] is not None:
        as_they = "as they recognise" if len(svm["chosen"]) > 1 else "as it recognises"
        accuracy = f"{100 * svm['held_out_accuracy']:.2f} %"
        chosen = f"; {' and '.join(svm['chosen'])} chosen, {as_they} {accuracy} of some training images held out"
    return f"{svm['kernel']}, C {svm['C']:.4g}{gamma}{chosen}"


def tell_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if result["accuracy"] is not None and not isinstance(result["accuracy"], dict):
        tell(args, f"accuracy        {100 * result['accuracy']:.2f} % on {counted(result['n_test'], 'images')}")
    if unknown := result.get("unknown_classes"):
        tell(args, f"  {unknown_note(unknown, result['n_test'])}")
    if (svm := result.get("svm")) is not None:
        tell(args, f"SVM             {svm_line(svm)}")
    if result["seconds"] is not None:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in (result["stage_seconds"] or {}).items())
        tell(args, f"seconds         {result['seconds']:.1f}{f' ({stages})' if stages else ''}")
    sampled = "" if result["peak_exact"] else " (the largest sample)"
    limit, planned, data = (format_bytes(result[key]) for key in ("memory_limit_bytes", "planned_peak_bytes", "data_bytes"))
    searched = " (search included)" if (found := result.get("search")) is not None and not found["reused"] else ""
    held = f"{format_bytes(result['peak_rss_bytes'])}{sampled} of {limit} allowed, {planned} planned{searched}"
    tell(args, f"peak memory     {held}; data {data}")
    if result["model"]:
        tell(args, f"model           {result['model']}")
