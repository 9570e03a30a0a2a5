"""Commands about a finished store or model: check, describe and report; each returns its JSON object."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamcnn.commandparts import check_store, memory_facts, open_data, open_model, say, svm_line, tell
from streamcnn.errors import FileError, StoreError
from streamcnn.evaluate import Tested, plan_testing, run_testing
from streamcnn.files import check_output_file, replacing
from streamcnn.labels import some_of
from streamcnn.memory import MemoryMonitor, format_bytes, resolve_limit
from streamcnn.model import Model, load_model
from streamcnn.planning import MemoryPlan, StagePlan, added
from streamcnn.progress import Progress, counted
from streamcnn.recipe import changed
from streamcnn.store import KINDS, FeatureStore, way_out
from streamcnn.system import resident_bytes
from streamcnn.threads import resolve_n_jobs

_MOST_NAMES = 10


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn verify PATH`."""
    path, limit = Path(args.path), resolve_limit(args.memory_limit)
    store = FeatureStore(path) if path.is_dir() else None
    claims, model = ({}, path) if store is None else (store.verify_bytes(), path / "model.h5")
    if model.is_file():  # the arrays, and what is made of them
        claims = added(claims, {"model": 2 * model.stat().st_size})
    plan = _plan_reading(limit, claims)
    plan.check()
    with MemoryMonitor(limit) as monitor, monitor.stage("verify", plan.peak_bytes):
        if store is not None:
            say(f"checks {format_bytes(store.nbytes)} in {path}")
            problems = store.verify(limit)
            if model.exists():
                try:
                    load_model(model, limit)
                except FileError as error:
                    problems.append(f"model.h5: {error}; {way_out('stage')}")
            shards = sum(len(store.shards(kind)) for kind in KINDS)
            result: dict[str, Any] = {"path": args.path, "kind": "store", "ok": not problems, "problems": problems, "shards": shards}
            checked = counted(shards, "shards")
        else:
            open_model(path, limit)
            result = {"path": args.path, "kind": "model", "ok": True, "problems": [], "shards": None}
            checked = "model"
    result |= memory_facts(monitor, plan)
    if problems := result["problems"]:
        if args.json:
            sys.stdout.write(json.dumps(result) + "\n")
        raise FileError(f"{path} is damaged: " + "; ".join(problems))
    tell(args, f"{path}: {checked} checked, all well")
    return result


def report(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn report STORE`."""
    from streamcnn.drawing import require_matplotlib
    from streamcnn.report import build_report, reading_claims

    check_store(Path(args.store))
    require_matplotlib()  # before the plan is made, whose first item is what the process holds
    start = time.perf_counter()
    path, limit, n_jobs = Path(args.store), resolve_limit(args.memory_limit), resolve_n_jobs(args.threads)
    output = Path(f"{path.resolve()}.html") if args.output is None else Path(args.output)
    check_output_file(output, "--output", "HTML page")
    store, tested = FeatureStore(path), None
    plan = _plan_reading(limit, reading_claims(store), "report")
    with MemoryMonitor(limit) as monitor:
        if args.test is None:
            plan.check()
        else:  # both together: to name a limit for each in turn would be a refusal after the other
            tested, plan = _test(args, store, plan.stage("report"), limit, n_jobs, monitor)
        bar = Progress(1, monitor).bar("report", None, "pictures")  # drawing them takes seconds
        with monitor.stage("report", plan.planned("report")), bar as update:
            text, pictures, left_out = build_report(store, tested, args.test, update)
            with replacing(output) as temporary:
                temporary.write_text(text, encoding="utf-8")
    for note in left_out:
        say(f"left out: {note}")
    tell(args, f"{output}: {len(pictures)} pictures, {format_bytes(output.stat().st_size)}")
    result = {"path": args.store, "output": str(output), "bytes": output.stat().st_size, "pictures": pictures, "left_out": left_out}
    result |= {name: None if tested is None else tested.measured[name] for name in ("accuracy", "n_test")}
    return result | {"seconds": time.perf_counter() - start} | memory_facts(monitor, plan)


def _test(
    args: argparse.Namespace, store: FeatureStore, after: StagePlan, limit: int, n_jobs: int, monitor: MemoryMonitor
) -> tuple[Tested, MemoryPlan]:
    """How the store's model does on `--test`, and the plan of that and of the stage `after` it."""
    if not (store.path / "model.h5").is_file():
        raise StoreError(f"{store.path} holds no finished model for --test: let the fit go on with --resume, or leave --test out")
    model = load_model(store.path / "model.h5", limit)
    with open_data(args, args.test, True, model.reading_shape) as source:
        plan = plan_testing(model, source, n_jobs, limit, args.device, after)
        plan = replace(plan, stages=[replace(plan.stages[0], name="evaluate"), after])
        with monitor.stage("evaluate", plan.planned("evaluate")), Progress(1, monitor).bar("evaluate", source.n_samples) as update:
            return run_testing(model, source, plan.chunk_size, n_jobs, args.device, update, monitor), plan


def _plan_reading(limit: int, claims: dict[str, int] | None = None, stage: str = "verify") -> MemoryPlan:
    """The plan of reading a store with these claims, or a small model; what is larger is refused when its size is seen."""
    reading = StagePlan(stage, added({"small files": 16 << 20}, claims or {}))
    return MemoryPlan(limit, {"already in use": resident_bytes()}, 1, [reading])


def info(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn info PATH`."""
    path, limit = Path(args.path), resolve_limit(args.memory_limit)
    _plan_reading(limit).check()
    if path.is_dir():
        store = FeatureStore(path)
        stages = [entry["stage"] for entry in store.entries if "stage" in entry]
        result: dict[str, Any] = {"kind": "store", "n_rows": store.n_rows, "n_features": store.n_features, "bytes": store.nbytes}
        result |= {"stages": stages, **{name: store.config.get(name) for name in ("parameters", "source", "bad_files", "versions")}}
        lines = _store_lines(store, result)
    else:
        model = open_model(path, limit)
        result = {"kind": "model", "image_shape": list(model.image_shape), "classes": model.classes_.tolist(), **model.header}
        layers = [{"filters": list(f.shape), **i} for f, i in zip(model.network.filters, model.network.info)]
        result |= {"network": layers, "n_features": model.network.n_features, "bytes": path.stat().st_size}
        result |= model.svm_facts()
        result["n_components"] = None if model.pca is None else model.pca.n_components_
        lines = _model_lines(model, result)
    result["path"] = args.path
    lines |= {"versions": _listed(result.get("versions")), "size": format_bytes(result["bytes"]), "path": args.path}
    tell(args, "\n".join(f"{name:<14} {text}" for name, text in lines.items() if text))
    return result


def _store_lines(store: FeatureStore, result: dict[str, Any]) -> dict[str, str]:
    """What `info` says of a store to people."""
    config, source, stages = store.config, store.config.get("source", {}), result["stages"]
    shards = {stage: n for stage, kind in (("extract", "features"), ("project", "reduced")) if (n := len(store.shards(kind)))}
    named = {stage: stage + (f" ({counted(shards[stage], 'shards')})" if stage in shards else "") for stage in [*stages, *shards]}
    classes, bad = [str(name) for name in config.get("classes", [])], config.get("bad_files", [])
    n_images, shape = source.get("n_samples"), source.get("image_shape")
    return {
        "kind": "store",
        "data": str(source.get("path") or "arrays") if source else "",
        # of a store that somebody made up it may be anything
        "images": f"{n_images:,} of {' x '.join(map(str, shape))}" if isinstance(n_images, int) and isinstance(shape, list) else "",
        "classes": f"{len(classes):,}: {some_of(classes, _MOST_NAMES)}" if classes else "",
        "left out": f"{counted(len(bad), 'files')}: {some_of([name for name, _ in bad], _MOST_NAMES)}" if bad else "",
        "features": f"{store.n_rows:,} rows of {store.n_features:,}",
        "finished": ", ".join(named[stage] for stage in stages) or "nothing",
        "unfinished": ", ".join(text for stage, text in named.items() if stage not in stages),
        "added": counted(sum(call["rows"] for call in store.additions()), "images") if store.additions() else "",
        "preset": _preset(config),
    }


def _preset(config: dict[str, Any]) -> str:
    """The preset and what differs from it; nothing of a store that no fit has made."""
    try:
        different = changed(config)
        if "layers" in different:
            different["layers"] = "others"
        return config["parameters"]["preset"] + "".join(f", {name} {value}" for name, value in different.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


def _listed(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def _model_lines(model: Model, result: dict[str, Any]) -> dict[str, Any]:
    """What `info` says of a model to people; all of it is in the JSON object."""
    settings, components = model.header["settings"], result["n_components"]
    lines = {"kind": "model"} | model.facts() | {"SVM": svm_line(model.svm_facts())}
    lines |= {"n_components": "none, without PCA" if components is None else str(components)}
    lines |= {name: str(settings[name]) for name in ("seed", "device", "n_jobs") if name in settings}
    lines |= {"pixels": f"{result['pixels']}, features {result['feature_dtype']}"}
    return lines
