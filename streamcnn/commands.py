"""Commands that train and use a model; each returns its JSON object. Those beside are in `upkeep` and `tryouts`."""

import argparse
import contextlib
import csv
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from streamcnn.candidates import Search, ladder, parse_seconds
from streamcnn.commandparts import (
    class_counts,
    memory_facts,
    open_data,
    open_model,
    parameters_of,
    result_of,
    say,
    settings_of,
    tell,
    tell_result,
)
from streamcnn.evaluate import evaluate as evaluate_model
from streamcnn.files import check_output_file, replacing
from streamcnn.fitting import finished_model, fit_model
from streamcnn.images import ImageSource, check_alike, warn_of_rows
from streamcnn.kernels import resolve_device
from streamcnn.labels import codes_among
from streamcnn.memory import MemoryMonitor, resolve_limit
from streamcnn.model import Model, plan_decisions
from streamcnn.plan import make_plan
from streamcnn.presets import Settings
from streamcnn.progress import Progress, counted
from streamcnn.runrecord import record_evaluation
from streamcnn.search import stored_search
from streamcnn.stages import evaluate_claims
from streamcnn.storefolder import delete_store
from streamcnn.threads import resolve_n_jobs


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn plan DATA`."""
    settings, limit = settings_of(args), resolve_limit(args.memory_limit)
    with open_data(args, args.data, True, "auto") as source:
        _say_data(source)
        result = make_plan(source, settings, limit, None)
    tell(args, str(result))
    return result.to_dict()


def _say_data(source: ImageSource) -> None:
    """What is going to be learnt, before anything is spent on it: a wrong folder is noticed here."""
    if source.labels is not None and source.classes_ is not None:
        say(class_counts(source.classes_, np.bincount(source.labels, minlength=len(source.classes_))))
    warn_of_rows(source)


def fit(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn fit DATA --model M.h5`."""
    settings, limit, model_path = settings_of(args), resolve_limit(args.memory_limit), Path(args.model)
    check_output_file(model_path, "--model", "streamcnn model", args.data, args.test or args.data)
    store = Path(args.store) if args.store else model_path.with_name(model_path.name + ".store")
    seconds = None if args.search is None else parse_seconds(args.search)
    with MemoryMonitor(limit) as monitor, open_data(args, args.data, True, "auto", store) as source:
        _say_data(source)
        test = open_data(args, args.test, True, source.reading_shape) if args.test else None
        if test is not None:  # not after hours of training
            check_alike(test, source.image_shape, source.dtype.name)
            codes_among(test.classes_, source.classes_)  # type: ignore[arg-type]
        found = None
        if seconds is not None:
            found = _search(args, source, limit, seconds, store, monitor)
            settings = found.settings
        result, _ = run_fit(args, source, test, settings, limit, store, model_path, monitor)
        result["search"] = None
        if found is not None:
            result["search"] = found.result
        if found is not None and not found.result["reused"]:
            result["planned_peak_bytes"] = max(result["planned_peak_bytes"], found.result["planned_peak_bytes"])
    if not args.store:
        delete_store(store)
        result["store_bytes"] = None
    tell_result(args, result)
    return result


def _search(args: argparse.Namespace, source: ImageSource, limit: int, seconds: float, store: Path, monitor: MemoryMonitor) -> Search:
    """The best of what `--search` tries, its table said."""
    candidates = ladder(args.preset, **parameters_of(args))
    found = stored_search(source, candidates, limit, seconds, Progress(1, monitor), monitor, store, args.resume)
    # the fit's stages have the same names
    monitor.stage_peaks.clear()
    monitor.stage_planned.clear()
    say(str(found) if found.result["reused"] else found.verdict)
    return found


def run_fit(
    args: argparse.Namespace,
    source: ImageSource,
    test: ImageSource | None,
    settings: Settings,
    limit: int,
    store: Path | None,
    model_path: Path | None,
    monitor: MemoryMonitor,
) -> tuple[dict[str, Any], Model]:
    start = time.perf_counter()
    progress = Progress(1, monitor)
    resume, verify_data = getattr(args, "resume", False), getattr(args, "verify_data", False)
    known = None
    if resume and not verify_data and model_path is not None and model_path.is_file() and not (store and (store / "config.json").exists()):
        known = finished_model(model_path, source, settings, limit, test)
    if known is not None:
        progress.say(f"{model_path} is finished: made of the same data and parameters")
    model, report = known or fit_model(source, settings, store, limit, progress, monitor, resume, test, verify_data)
    if known is None and model_path is not None:
        model.save(model_path)
    seconds = time.perf_counter() - start
    measured: dict[str, Any] = {}
    if test is not None:
        planned = report.plan.planned("evaluate")
        measured = _evaluate(
            model, test, settings.n_jobs, settings.device, report.plan.chunk_size, planned, progress, report.stage_seconds, monitor
        )
        if store is not None:
            with contextlib.suppress(OSError):  # a picture less in a report must not hide the result
                spent = report.stage_seconds["evaluate"]
                record_evaluation(store, model.header["digest"], str(test.path), measured, spent, monitor)
    result = result_of(
        **measured,
        n_train=source.n_samples,
        seconds=seconds,
        stage_seconds=report.stage_seconds,
        **memory_facts(monitor, report.plan),
        data_bytes=source.nbytes_,
        store_bytes=report.store_bytes,
        device=model.header["settings"]["device"],
        preset=settings.preset,
        seed=settings.seed,
        n_jobs=settings.n_jobs,
        resumed=report.resumed,
        model=None if model_path is None else str(model_path),
        svm=model.svm_facts(),
        reused=report.reused,
        skipped=[list(map(str, bad)) for bad in source.bad_files],
    )
    return result, model


def _evaluate(
    model: Model,
    source: ImageSource,
    n_jobs: int,
    device: str,
    chunk: int,
    planned: int,
    progress: Progress,
    seconds: dict[str, float],
    monitor: MemoryMonitor,
) -> dict[str, Any]:
    start = time.perf_counter()
    with monitor.stage("evaluate", planned), progress.bar("evaluate", source.n_samples) as update:
        measured = evaluate_model(model, source, chunk, n_jobs, device, update, monitor)
    seconds["evaluate"] = time.perf_counter() - start
    return measured


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn evaluate M.h5 DATA`."""
    limit, n_jobs = resolve_limit(args.memory_limit), resolve_n_jobs(args.threads)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with MemoryMonitor(limit) as monitor:
        model = open_model(Path(args.model), limit)
        with open_data(args, args.data, True, model.reading_shape) as source:
            plan = plan_decisions(model, source, n_jobs, limit, args.device, evaluate_claims(source, len(model.classes_)))
            progress = Progress(1, monitor)
            measured = _evaluate(model, source, n_jobs, args.device, plan.chunk_size, plan.peak_bytes, progress, seconds, monitor)
            data_bytes = source.nbytes_
    header = model.header["settings"]
    result = result_of(
        **measured,
        n_train=model.header["n_train"],
        seconds=time.perf_counter() - start,
        stage_seconds=seconds,
        **memory_facts(monitor, plan),
        data_bytes=data_bytes,
        device=resolve_device(args.device),
        preset=header["preset"],
        seed=header["seed"],
        n_jobs=n_jobs,
        model=args.model,
    )
    tell_result(args, result)
    for name, recall in result["recall"].items():
        tell(args, f"  recall {name:<20} {'no images' if recall is None else f'{100 * recall:.2f} %'}")
    return result


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn predict M.h5 DATA`."""
    limit, n_jobs = resolve_limit(args.memory_limit), resolve_n_jobs(args.threads)
    output = None if args.output is None else Path(args.output)
    if output is not None:
        check_output_file(output, "--output", "CSV of predict", args.data, args.model)
    start = time.perf_counter()
    with MemoryMonitor(limit) as monitor:
        model = open_model(Path(args.model), limit)
        with open_data(args, args.data, False, model.reading_shape) as source:
            plan = plan_decisions(model, source, n_jobs, limit, args.device)
            with monitor.stage("predict", plan.peak_bytes):
                if output is not None:
                    with replacing(output) as temporary, _csv_file(temporary) as file:
                        counts = _write_predictions(model, source, plan.chunk_size, n_jobs, args.device, monitor, file)
                else:
                    # with --json standard output belongs to the one object
                    out = sys.stderr if args.json else sys.stdout
                    counts = _write_predictions(model, source, plan.chunk_size, n_jobs, args.device, monitor, out)
            n, data_bytes = source.n_samples, source.nbytes_
    if output is not None:
        found = np.flatnonzero(counts)
        tell(args, f"{output}: {counted(n, 'images')} of {class_counts(model.classes_[found], counts[found])}")
    return {
        "n_images": n,
        "seconds": time.perf_counter() - start,
        **memory_facts(monitor, plan),
        "data_bytes": data_bytes,
        "device": resolve_device(args.device),
        "n_jobs": n_jobs,
        "model": args.model,
        "output": args.output,
        "score": "probability" if model.svm.probability else "decision",
        "skipped": [list(map(str, bad)) for bad in source.bad_files],
    }


def _csv_file(path: Path) -> TextIO:
    """A new file; of paths whose bytes are no text it gets escapes, as standard output does."""
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")


def _write_predictions(
    model: Model, source: ImageSource, chunk: int, n_jobs: int, device: str, monitor: MemoryMonitor, file: TextIO
) -> np.ndarray:
    """Write the CSV; returns the number of images of each label."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "path", "label", "score"])
    counts = np.zeros(len(model.classes_), np.int64)
    # lines on a terminal are progress enough, and a bar would be drawn through them
    with Progress(0 if file.isatty() else 1, monitor).bar("predict", source.n_samples) as update:
        for start, decisions in model.decisions(source, chunk, n_jobs, device, update, monitor):
            codes = model.labels_of(decisions)
            counts += np.bincount(codes, minlength=len(counts))
            if model.svm.probability:
                decisions = model.svm.probabilities(decisions)
            scores = np.abs(decisions) if decisions.ndim == 1 else decisions[np.arange(len(codes)), codes]
            for i, (code, score) in enumerate(zip(codes, scores), start=start):
                writer.writerow([i, source.name_of(i), model.classes_[code], f"{score:.6g}"])
    return counts
