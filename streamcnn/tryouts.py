"""Commands that show what there is: the demo, the table of the paper, measurements, compiling; each returns its JSON object."""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from streamcnn.commandparts import result_of, say, settings_of, tell, tell_result
from streamcnn.commands import run_fit
from streamcnn.errors import ParameterError
from streamcnn.files import scratch_folder
from streamcnn.images import open_images
from streamcnn.memory import MemoryMonitor, parse_bytes, resolve_limit
from streamcnn.progress import Progress
from streamcnn.threads import resolve_n_jobs


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn demo`: the whole job on digits larger than the memory limit."""
    from streamcnn.demo import check_limit, make_data
    from streamcnn.warmup import warm_up

    args.memory_limit = args.memory_limit or "512MiB"
    settings, limit = settings_of(args), parse_bytes(args.memory_limit)
    folder = scratch_folder()
    try:
        warm = time.perf_counter()
        say("demo    : kernels are loaded, or compiled where this machine has none yet")
        warm_up(settings)
        compiled = time.perf_counter()
        check_limit(args.images, settings, limit)
        train_path, test_path = make_data(folder, args.images, settings.seed, Progress(1))
        made = time.perf_counter()
        with MemoryMonitor(limit) as monitor, open_images(train_path) as source, open_images(test_path) as test:
            result, _ = run_fit(args, source, test, settings, limit, folder / "store", None, monitor)
            result["data_bytes"] = source.nbytes_ + test.nbytes_
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= {"compile_seconds": compiled - warm, "data_seconds": made - compiled}
    tell_result(args, result)
    tell(args, f"apart from that {result['compile_seconds']:.1f} s to compile kernels, {result['data_seconds']:.1f} s to make the data")
    return result


def reproduce(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn reproduce lee2017 FOLDER`; keys are those of `reproduce.lee2017`, with `--baseline` of `baseline.side_by_side`."""
    from streamcnn.baseline import side_by_side
    from streamcnn.reproduce import lee2017

    args.preset = args.preset or "lee2017"
    limit = resolve_limit(args.memory_limit)
    if args.seeds < 1:
        raise ParameterError(f"--seeds must be at least 1, got {args.seeds}")
    arguments = (args.folder, settings_of(args), limit, args.seeds)
    result, table = side_by_side(*arguments, args.baseline) if args.baseline else lee2017(*arguments)
    tell(args, table)
    return result_of(**{"baseline": None, "baseline_frozen": None} | result)


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
    tell(args, report(result))
    return result


def warmup(args: argparse.Namespace) -> dict[str, Any]:
    """`streamcnn warmup`; the object's keys are those of `warmup.compile_kernels`."""
    from streamcnn.warmup import compile_kernels

    result = compile_kernels()
    where = f"in {result['cache']}" if result["cache"] else "for this process only: no cache folder can be written; set NUMBA_CACHE_DIR"
    tell(args, f"{result['compiled']} kernels compiled and {result['cached']} found on disk in {result['seconds']:.1f} s, {where}")
    return result
