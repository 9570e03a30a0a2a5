"""What the commands of the command line have in common: reading the arguments, opening DATA, the keys of their results."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from streamcnn.errors import ParameterError
from streamcnn.images import ImageSource, open_images
from streamcnn.memory import MemoryMonitor, format_bytes, resolve_limit
from streamcnn.planning import MemoryPlan
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import counted
from streamcnn.store import FeatureStore
from streamcnn.threads import resolve_n_jobs

RESULT_KEYS = (
    "accuracy n_train n_test seconds stage_seconds memory_limit_bytes peak_rss_bytes planned_peak_bytes data_bytes store_bytes "
    "device preset seed n_jobs resumed model"
).split()


def result_of(**values: Any) -> dict[str, Any]:
    """The common keys, null where not applicable, and what else the command has."""
    return dict.fromkeys(RESULT_KEYS) | values


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _number(name: str, text: str | None) -> Any:
    if text is None or text in ("auto", "scale"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ParameterError(f'{name} must be a number or "auto", got {text!r}') from None


def parameters_of(args: argparse.Namespace) -> dict[str, Any]:
    """What overrides a preset."""
    values: dict[str, Any] = {"device": args.device}
    if hasattr(args, "n_components"):
        components: Any = args.n_components
        if components is not None and components != "auto":
            if components != "none" and not components.isdigit():
                raise ParameterError(f'--n-components must be a positive whole number, "auto" or "none", got {components!r}')
            components = None if components == "none" else int(components)
        if args.n_components is not None:
            values["n_components"] = components
        for name in ("pca_solver", "kernel", "n_landmarks", "class_weight", "probability", "feature_dtype"):
            values[name] = getattr(args, name)
        values |= {"C": _number("--C", args.C), "gamma": _number("--gamma", args.gamma)}
        words = {"auto": "auto", "yes": True, "no": False}
        values["keep_features"] = words[args.keep_features]
        # None, as a word would stand above what a search varies
        values["mirror"] = None if args.mirror == "auto" else words[args.mirror]
    if not 0 <= args.seed < 2**32:
        raise ParameterError(f"--seed must be a whole number from 0 to 2**32 - 1, got {args.seed}")
    return values | {"n_jobs": resolve_n_jobs(args.threads), "seed": args.seed}


def settings_of(args: argparse.Namespace) -> Settings:
    return resolve_settings(args.preset or "fast", **parameters_of(args))


def _image_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+x\d+(x\d+)?", text):
        raise ParameterError(f"--image-size must look like 96x96 or 96x96x3, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def open_data(
    args: argparse.Namespace, path: str, need_labels: bool, image_shape: tuple[int, ...] | str | None, store: Path | None = None
) -> ImageSource:
    """Open DATA with the common flags, in `image_shape` where no `--image-size` is given.

    Files that an earlier run into `store` found bad are left out without reading all again.
    """
    options: dict[str, Any] = {"images_key": args.images_key, "labels_key": args.labels_key, "need_labels": need_labels}
    options["memory_limit"] = resolve_limit(args.memory_limit)
    options["image_shape"] = _image_shape(args.image_size) or image_shape
    if args.skip_bad:
        options["on_error"] = "skip"
        if store is not None and (store / "config.json").exists():
            config = FeatureStore(store).config
            known = [tuple(bad) for bad in config.get("bad_files", [])]
            source = open_images(path, **options, known_bad=known)
            if source.fingerprint() == config.get("fingerprint"):
                return source
            source.close()
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
    accuracy = svm["held_out_accuracy"]
    chosen = "" if accuracy is None else f", chosen as they recognise {100 * accuracy:.2f} % of some training images held out"
    return f"{svm['kernel']}, C {svm['C']:.4g}{gamma}{chosen}"


def say_result(result: dict[str, Any]) -> None:
    if result["accuracy"] is not None and not isinstance(result["accuracy"], dict):
        say(f"accuracy        {100 * result['accuracy']:.2f} % on {counted(result['n_test'], 'images')}")
    if (svm := result.get("svm")) is not None:
        say(f"SVM             {svm_line(svm)}")
    if result["seconds"] is not None:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in (result["stage_seconds"] or {}).items())
        say(f"seconds         {result['seconds']:.1f} ({stages})")
    sampled = "" if result["peak_exact"] else " (the largest sample)"
    limit, planned, data = (format_bytes(result[key]) for key in ("memory_limit_bytes", "planned_peak_bytes", "data_bytes"))
    say(f"peak memory     {format_bytes(result['peak_rss_bytes'])}{sampled} of {limit} allowed, {planned} planned; data {data}")
    if result["model"]:
        say(f"model           {result['model']}")
