"""What each command of the command line does; each returns its JSON object."""

import argparse
import contextlib
import csv
import json
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.candidates import Search, ladder, parse_seconds
from streamcnn.errors import FileError, ParameterError, StoreError
from streamcnn.evaluate import Tested, plan_testing, run_testing
from streamcnn.evaluate import evaluate as evaluate_model
from streamcnn.files import check_output_file, replacing, scratch_folder
from streamcnn.fitting import fit_model
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import resolve_device
from streamcnn.memory import MemoryMonitor, format_bytes, parse_bytes, resolve_limit
from streamcnn.model import Model, load_model, plan_decisions
from streamcnn.plan import make_plan
from streamcnn.planning import MemoryPlan, StagePlan, added
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import Progress
from streamcnn.runrecord import record_evaluation
from streamcnn.search import stored_search
from streamcnn.stages import evaluate_claims
from streamcnn.store import KINDS, FeatureStore, delete_store, way_out
from streamcnn.system import resident_bytes
from streamcnn.threads import resolve_n_jobs

RESULT_KEYS = (
    "accuracy n_train n_test seconds stage_seconds memory_limit_bytes peak_rss_bytes planned_peak_bytes data_bytes store_bytes "
    "device preset seed n_jobs resumed model"
).split()


def _result(**values: Any) -> dict[str, Any]:
    """The common keys, null where not applicable, and what else the command has."""
    return dict.fromkeys(RESULT_KEYS) | values


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _number(name: str, text: str | None) -> Any:
    if text is None or text in ("auto", "scale"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ParameterError(f'{name} must be a number or "auto", got {text!r}') from None


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
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
        for name in ("pca_solver", "kernel", "n_landmarks", "class_weight", "feature_dtype"):
            values[name] = getattr(args, name)
        values |= {"C": _number("--C", args.C), "gamma": _number("--gamma", args.gamma)}
        words = {"auto": "auto", "yes": True, "no": False}
        values["keep_features"], values["mirror"] = words[args.keep_features], words[args.mirror]
    if not 0 <= args.seed < 2**32:
        raise ParameterError(f"--seed must be a whole number from 0 to 2**32 - 1, got {args.seed}")
    return values | {"n_jobs": resolve_n_jobs(args.threads), "seed": args.seed}


def _settings(args: argparse.Namespace) -> Settings:
    return resolve_settings(args.preset or "fast", **_parameters(args))


def _image_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+x\d+(x\d+)?", text):
        raise ParameterError(f"--image-size must look like 96x96 or 96x96x3, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def _open(
    args: argparse.Namespace, path: str, need_labels: bool, image_shape: tuple[int, ...] | None = None, store: Path | None = None
) -> ImageSource:
    """Open DATA with the common flags; files that an earlier run into `store` found bad are left out without reading all again."""
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
        _say(f"left out: {name}: {reason}")
    return source


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn plan DATA`."""
    settings, limit = _settings(args), resolve_limit(args.memory_limit)
    with _open(args, args.data, need_labels=True) as source:
        result = make_plan(source, settings, limit, None)
    _say(str(result))
    return result.to_dict()


def fit(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn fit DATA --model M.h5`."""
    settings, limit, model_path = _settings(args), resolve_limit(args.memory_limit), Path(args.model)
    check_output_file(model_path, "--model", args.data, args.test or args.data)
    store = Path(args.store) if args.store else model_path.with_name(model_path.name + ".store")
    seconds = None if args.search is None else parse_seconds(args.search)
    with MemoryMonitor(limit) as monitor, _open(args, args.data, need_labels=True, store=store) as source:
        test = _open(args, args.test, need_labels=True) if args.test else None
        found = None
        if seconds is not None:
            found = _search(args, source, limit, seconds, store, monitor)
            settings = found.settings
        result, _ = _fit(args, source, test, settings, limit, store, model_path, monitor)
        result["search"] = None
        if found is not None:
            result["search"] = found.result
        if found is not None and not found.result["reused"]:
            result["planned_peak_bytes"] = max(result["planned_peak_bytes"], found.result["planned_peak_bytes"])
    if not args.store:
        delete_store(store)
        result["store_bytes"] = None
    _say_result(result)
    return result


def _search(args: argparse.Namespace, source: ImageSource, limit: int, seconds: float, store: Path, monitor: MemoryMonitor) -> Search:
    """The best of what `--search` tries, its table said."""
    candidates = ladder(args.preset, **_parameters(args))
    found = stored_search(source, candidates, limit, seconds, Progress(1, monitor), monitor, store, args.resume)
    # the fit's stages have the same names
    monitor.stage_peaks.clear()
    monitor.stage_planned.clear()
    _say(str(found) if found.result["reused"] else found.verdict)
    return found


def _fit(
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
    model, report = fit_model(
        source, settings, store, limit, progress, monitor, getattr(args, "resume", False), test, getattr(args, "verify_data", False)
    )
    if model_path is not None:
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
    result = _result(
        **measured,
        n_train=source.n_samples,
        seconds=seconds,
        stage_seconds=report.stage_seconds,
        **_memory(monitor, report.plan),
        data_bytes=source.nbytes_,
        store_bytes=report.store_bytes,
        device=model.header["settings"]["device"],
        preset=settings.preset,
        seed=settings.seed,
        n_jobs=settings.n_jobs,
        resumed=report.resumed,
        model=None if model_path is None else str(model_path),
        reused=report.reused,
        skipped=[list(map(str, bad)) for bad in source.bad_files],
    )
    return result, model


def _memory(monitor: MemoryMonitor, plan: MemoryPlan) -> dict[str, Any]:
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


def _say_result(result: dict[str, Any]) -> None:
    if result["accuracy"] is not None and not isinstance(result["accuracy"], dict):
        _say(f"accuracy        {100 * result['accuracy']:.2f} % on {result['n_test']} images")
    if result["seconds"] is not None:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in (result["stage_seconds"] or {}).items())
        _say(f"seconds         {result['seconds']:.1f} ({stages})")
    sampled = "" if result["peak_exact"] else " (the largest sample)"
    limit, planned, data = (format_bytes(result[key]) for key in ("memory_limit_bytes", "planned_peak_bytes", "data_bytes"))
    _say(f"peak memory     {format_bytes(result['peak_rss_bytes'])}{sampled} of {limit} allowed, {planned} planned; data {data}")
    if result["model"]:
        _say(f"model           {result['model']}")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn evaluate M.h5 DATA`."""
    limit, n_jobs = resolve_limit(args.memory_limit), resolve_n_jobs(args.threads)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with MemoryMonitor(limit) as monitor:
        model = load_model(args.model, limit)
        with _open(args, args.data, True, model.reading_shape) as source:
            plan = plan_decisions(model, source, n_jobs, limit, args.device, evaluate_claims(source, len(model.classes_)))
            progress = Progress(1, monitor)
            measured = _evaluate(model, source, n_jobs, args.device, plan.chunk_size, plan.peak_bytes, progress, seconds, monitor)
            data_bytes = source.nbytes_
    header = model.header["settings"]
    result = _result(
        **measured,
        n_train=model.header["n_train"],
        seconds=time.perf_counter() - start,
        stage_seconds=seconds,
        **_memory(monitor, plan),
        data_bytes=data_bytes,
        device=resolve_device(args.device),
        preset=header["preset"],
        seed=header["seed"],
        n_jobs=n_jobs,
        model=args.model,
    )
    _say_result(result)
    if result["unknown"]:
        _say(f"  {result['unknown']:,} of {result['n_test']:,} images are of classes that the model does not know, and count as wrong")
    for name, recall in result["recall"].items():
        _say(f"  recall {name:<20} {'no images' if recall is None else f'{100 * recall:.2f} %'}")
    return result


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn predict M.h5 DATA`."""
    limit, n_jobs = resolve_limit(args.memory_limit), resolve_n_jobs(args.threads)
    output = Path(args.output) if args.output else None
    if output is not None:
        check_output_file(output, "--output", args.data, args.model)
    start = time.perf_counter()
    with MemoryMonitor(limit) as monitor:
        model = load_model(args.model, limit)
        with _open(args, args.data, False, model.reading_shape) as source:
            plan = plan_decisions(model, source, n_jobs, limit, args.device)
            with monitor.stage("predict", plan.peak_bytes):
                if output is not None:
                    with replacing(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                        _write_predictions(model, source, plan.chunk_size, n_jobs, args.device, monitor, file)
                else:
                    # with --json standard output belongs to the one object
                    out = sys.stderr if args.json else sys.stdout
                    _write_predictions(model, source, plan.chunk_size, n_jobs, args.device, monitor, out)
            n, data_bytes = source.n_samples, source.nbytes_
    return {
        "n_images": n,
        "seconds": time.perf_counter() - start,
        **_memory(monitor, plan),
        "data_bytes": data_bytes,
        "device": resolve_device(args.device),
        "n_jobs": n_jobs,
        "model": args.model,
        "output": args.output,
        "skipped": [list(map(str, bad)) for bad in source.bad_files],
    }


def _write_predictions(model: Model, source: ImageSource, chunk: int, n_jobs: int, device: str, monitor: MemoryMonitor, file: Any) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "path", "label", "score"])
    with Progress(1, monitor).bar("predict", source.n_samples) as update:
        for start, decisions in model.decisions(source, chunk, n_jobs, device, update, monitor):
            codes = model.labels_of(decisions)
            scores = np.abs(decisions) if decisions.ndim == 1 else decisions[np.arange(len(codes)), codes]
            for i, (code, score) in enumerate(zip(codes, scores), start=start):
                writer.writerow([i, source.name_of(i), model.classes_[code], f"{score:.6g}"])


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn demo`: the whole job on digits larger than the memory limit."""
    from streamcnn.demo import make_data
    from streamcnn.warmup import warm_up

    args.memory_limit = args.memory_limit or "512MiB"
    settings, limit = _settings(args), parse_bytes(args.memory_limit)
    folder = scratch_folder()
    try:
        warm = time.perf_counter()
        warm_up(settings)
        compiled = time.perf_counter()
        train_path, test_path = make_data(folder, args.images, settings.seed, Progress(1))
        made = time.perf_counter()
        with MemoryMonitor(limit) as monitor, open_images(train_path) as source, open_images(test_path) as test:
            result, _ = _fit(args, source, test, settings, limit, folder / "store", None, monitor)
            result["data_bytes"] = source.nbytes_ + test.nbytes_
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= {"compile_seconds": compiled - warm, "data_seconds": made - compiled}
    _say_result(result)
    _say(f"apart from that {result['compile_seconds']:.1f} s to compile kernels, {result['data_seconds']:.1f} s to make the data")
    return result


def reproduce(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn reproduce lee2017 FOLDER`; keys are those of `reproduce.lee2017`, with `--baseline` of `baseline.side_by_side`."""
    from streamcnn.baseline import side_by_side
    from streamcnn.reproduce import lee2017

    args.preset = args.preset or "lee2017"
    limit = resolve_limit(args.memory_limit)
    if args.seeds < 1:
        raise ParameterError(f"--seeds must be at least 1, got {args.seeds}")
    arguments = (args.folder, _settings(args), limit, args.seeds)
    result, table = side_by_side(*arguments, args.baseline) if args.baseline else lee2017(*arguments)
    _say(table)
    return _result(**{"baseline": None, "baseline_frozen": None} | result)


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn verify PATH`."""
    path, limit = Path(args.path), resolve_limit(args.memory_limit)
    store = FeatureStore(path) if path.is_dir() else None
    claims, model = ({}, path) if store is None else (store.verify_bytes(), path / "model.h5")
    if model.is_file():  # the arrays, and what is made of them
        claims = added(claims, {"model": 2 * model.stat().st_size})
    plan = _plan_reading(limit, claims)
    with MemoryMonitor(limit) as monitor, monitor.stage("verify", plan.peak_bytes):
        if store is not None:
            problems = store.verify(limit)
            if model.exists():
                try:
                    load_model(model, limit)
                except FileError as error:
                    problems.append(f"model.h5: {error}; {way_out('stage')}")
            shards = sum(len(store.shards(kind)) for kind in KINDS)
            result: dict[str, Any] = {"path": args.path, "kind": "store", "ok": not problems, "problems": problems, "shards": shards}
            checked = f"{shards} shards"
        else:
            load_model(path, limit)
            result = {"path": args.path, "kind": "model", "ok": True, "problems": [], "shards": None}
            checked = "model"
    result |= _memory(monitor, plan)
    if problems := result["problems"]:
        if args.json:
            sys.stdout.write(json.dumps(result) + "\n")
        raise FileError(f"{path} is damaged: " + "; ".join(problems))
    _say(f"{path}: {checked} checked, all well")
    return result


def report(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn report STORE`."""
    from streamcnn.drawing import require_matplotlib
    from streamcnn.report import build_report, reading_claims

    require_matplotlib()  # before the plan is made, whose first item is what the process holds
    start = time.perf_counter()
    path, limit, n_jobs = Path(args.store), resolve_limit(args.memory_limit), resolve_n_jobs(args.threads)
    output = Path(args.output) if args.output else Path(f"{path.resolve()}.html")
    check_output_file(output, "--output")
    store, tested = FeatureStore(path), None
    plan = _plan_reading(limit, reading_claims(store), "report")
    with MemoryMonitor(limit) as monitor:
        if args.test is not None:
            tested, plan = _test(args, store, plan.stage("report"), limit, n_jobs, monitor)
        with monitor.stage("report", plan.planned("report")):
            text, pictures, left_out = build_report(store, tested, args.test)
            with replacing(output) as temporary:
                temporary.write_text(text, encoding="utf-8")
    for note in left_out:
        _say(f"left out: {note}")
    _say(f"{output}: {len(pictures)} pictures, {format_bytes(output.stat().st_size)}")
    result = {"path": args.store, "output": str(output), "bytes": output.stat().st_size, "pictures": pictures, "left_out": left_out}
    result |= {name: None if tested is None else tested.measured[name] for name in ("accuracy", "n_test")}
    return result | {"seconds": time.perf_counter() - start} | _memory(monitor, plan)


def _test(
    args: argparse.Namespace, store: FeatureStore, after: StagePlan, limit: int, n_jobs: int, monitor: MemoryMonitor
) -> tuple[Tested, MemoryPlan]:
    """How the store's model does on `--test`, and the plan of that and of the stage `after` it, which the kernels stay loaded in."""
    if not (store.path / "model.h5").is_file():
        raise StoreError(f"{store.path} holds no finished model for --test: let the fit go on with --resume, or leave --test out")
    model = load_model(store.path / "model.h5", limit)
    with _open(args, args.test, True, model.reading_shape) as source:
        plan = plan_testing(model, source, n_jobs, limit, args.device)
        plan = replace(plan, stages=[replace(plan.stages[0], name="evaluate"), after])
        plan.check()
        with monitor.stage("evaluate", plan.planned("evaluate")), Progress(1, monitor).bar("evaluate", source.n_samples) as update:
            return run_testing(model, source, plan.chunk_size, n_jobs, args.device, update, monitor), plan


def _plan_reading(limit: int, claims: dict[str, int] | None = None, stage: str = "verify") -> MemoryPlan:
    """The plan of reading a store with these claims, or a small model; what is larger is refused when its size is seen."""
    reading = StagePlan(stage, added({"small files": 16 << 20}, claims or {}))
    plan = MemoryPlan(limit, {"already in use": resident_bytes()}, 1, [reading])
    plan.check()
    return plan


def info(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn info PATH`."""
    path, limit = Path(args.path), resolve_limit(args.memory_limit)
    _plan_reading(limit)
    if path.is_dir():
        store = FeatureStore(path)
        stages = [entry["stage"] for entry in store.entries if "stage" in entry]
        result: dict[str, Any] = {"kind": "store", "n_rows": store.n_rows, "n_features": store.n_features, "bytes": store.nbytes}
        result |= {"stages": stages, **{name: store.config.get(name) for name in ("parameters", "source", "bad_files", "versions")}}
    else:
        model = load_model(path, limit)
        result = {"kind": "model", "image_shape": list(model.image_shape), "classes": model.classes_.tolist(), **model.header}
        layers = [{"filters": list(f.shape), **i} for f, i in zip(model.network.filters, model.network.info)]
        result |= {"network": layers, "n_features": model.network.n_features, "bytes": path.stat().st_size}
        result["C"], result["gamma"] = model.svm.C_, model.svm.gamma_
    result["path"] = args.path
    for name, value in result.items():
        _say(f"{name:<14} {json.dumps(value, default=str)}")
    return result


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn bench NAME`; the object's keys are those of `bench.run_benchmarks`."""
    from streamcnn.bench import emulated, report, run_benchmarks

    for name in ("repeats", "shrink"):
        if getattr(args, name) < 1:
            raise ParameterError(f"--{name} must be at least 1, got {getattr(args, name)}")
    n_threads = resolve_n_jobs(args.threads)
    options = {"sizes": args.rows, "folders": args.images and [Path(folder) for folder in args.images]}
    options = {
        name: value for name, value in (options | {"alone": args.alone or None, "landmarks": args.landmarks}).items() if value is not None
    }
    allowed = (
        {"svm": {"sizes", "folders", "alone"}, "rbf": {"sizes", "folders", "alone", "landmarks"}, "pipeline": {"folders"}}.get(
            args.name, set()
        )
        if args.emulate is None
        else set()
    )
    if not options.keys() <= allowed:
        raise ParameterError(
            "--rows and --alone are for bench svm and rbf, --landmarks for bench rbf, --images for these and pipeline, without --emulate; "
            f"got them for bench {args.name}"
        )
    if args.emulate is None:
        result = run_benchmarks(args.name, n_threads, args.repeats, args.shrink, **options)
    else:
        result = emulated(args.emulate, args.name, n_threads, args.repeats, args.shrink)
    _say(report(result))
    return result


def warmup(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn warmup`; the object's keys are those of `warmup.compile_kernels`."""
    from streamcnn.warmup import compile_kernels

    result = compile_kernels()
    where = f"in {result['cache']}" if result["cache"] else "for this process only: no cache folder can be written; set NUMBA_CACHE_DIR"
    _say(f"{result['compiled']} kernels compiled and {result['cached']} found on disk in {result['seconds']:.1f} s, {where}")
    return result
