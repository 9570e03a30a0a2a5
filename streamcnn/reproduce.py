"""`streamcnn reproduce lee2017`: the paper's experiment on Extended Yale B, beside the paper's own figures."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.datasets import extended_yale_b
from streamcnn.evaluate import evaluate
from streamcnn.fitting import fit_model
from streamcnn.memory import MemoryMonitor, format_bytes
from streamcnn.model import plan_decisions
from streamcnn.presets import Settings
from streamcnn.progress import Progress
from streamcnn.stages import evaluate_claims
from streamcnn.warmup import warm_up

# Lee & Lee 2017, tables 2 and 3: recognition in percent on subsets 2 and 3, learning time in seconds, memory in KB
PAPER = {
    "paper, proposed": ({"2": 99.78, "3": 98.02}, 1856, 942_552),
    "paper, back-propagated CNN": ({"2": 100.0, "3": 98.97}, 13_456, 1_206_736),
}
SUBSETS = ("2", "3", "4", "5")


def lee2017(folder: str | Path, settings: Settings, limit: int, n_seeds: int) -> tuple[dict[str, Any], str]:
    """Train on subset 1, evaluate on subsets 2 to 5, for `n_seeds` seeds from `settings.seed` on.

    Parameters
    ----------
    folder : str or Path
        The cropped Extended Yale Face Database B, see `datasets.extended_yale_b`.
    settings : Settings
        `presets.resolve_settings("lee2017")`, say.
    limit : int
        Of the process, in bytes.
    n_seeds : int

    Returns
    -------
    result : dict
        The common keys; `accuracy` maps subset -> fraction (the mean over seeds), `accuracy_std` its standard deviation,
        `accuracy_per_seed` a list of such maps.
    table : str
        The same beside the paper's figures.
    """
    subsets = {str(number): source for number, source in extended_yale_b(folder).items()}
    warm_up(settings)  # libraries and compiled kernels are loaded before the clock runs, as the rivals' are
    runs = []
    start = time.perf_counter()
    with MemoryMonitor(limit) as monitor:
        progress = Progress(1, monitor)
        for seed in range(settings.seed, settings.seed + n_seeds):
            seeded = replace(settings, seed=seed)
            model, report = fit_model(subsets["1"], seeded, None, limit, progress, monitor)
            planned, accuracy = report.plan.peak_bytes, {}
            for name in SUBSETS:
                source = subsets[name]
                plan = plan_decisions(model, source, settings.n_jobs, limit, settings.device, evaluate_claims(source, len(model.classes_)))
                planned = max(planned, plan.peak_bytes)
                with monitor.stage("evaluate", plan.peak_bytes), progress.bar("evaluate", source.n_samples) as update:
                    measured = evaluate(model, source, plan.chunk_size, settings.n_jobs, settings.device, update, monitor)
                accuracy[name] = measured["accuracy"]
            runs.append(
                {
                    "accuracy": accuracy,
                    "stage_seconds": report.stage_seconds,
                    "train_seconds": sum(report.stage_seconds.values()),
                    "planned_peak_bytes": planned,
                }
            )
    result = combined(runs) | {
        "n_train": subsets["1"].n_samples,
        "n_test": sum(subsets[name].n_samples for name in SUBSETS),
        "seconds": time.perf_counter() - start,
        "memory_limit_bytes": limit,
        "peak_rss_bytes": monitor.peak_bytes,
        "peak_exact": monitor.exact,
        "data_bytes": sum(subset.nbytes_ for subset in subsets.values()),
        "device": model.header["settings"]["device"],
        "preset": settings.preset,
        "seed": settings.seed,
        "seeds": n_seeds,
        "n_jobs": settings.n_jobs,
        "resumed": False,
    }
    return result, table({f"streamcnn {settings.preset}": result})


def combined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs with several seeds: `accuracy` (mean), `accuracy_std` and `accuracy_per_seed`, `train_seconds` (mean), `stage_seconds` (sum)
    and `planned_peak_bytes` (maximum, None where nothing is planned)."""
    values = {name: [run["accuracy"][name] for run in runs] for name in SUBSETS}
    planned = [run["planned_peak_bytes"] for run in runs]
    return {
        "accuracy": {name: float(np.mean(of_subset)) for name, of_subset in values.items()},
        "accuracy_std": {name: float(np.std(of_subset)) for name, of_subset in values.items()},
        "accuracy_per_seed": [run["accuracy"] for run in runs],
        "train_seconds": float(np.mean([run["train_seconds"] for run in runs])),
        "stage_seconds": {stage: sum(run["stage_seconds"][stage] for run in runs) for stage in runs[0]["stage_seconds"]},
        "planned_peak_bytes": None if None in planned else max(planned),
    }


def table(systems: dict[str, dict[str, Any]]) -> str:
    """Results by the name of the system, beside the paper's figures."""
    results = {f"{who}, {r['seeds']} seed{'s' * (r['seeds'] > 1)}": r for who, r in systems.items()}
    width = max(map(len, [*results, *PAPER]))
    names = " ".join(f"{'subset ' + name:>16}" for name in SUBSETS)
    lines = [f"{'recognition, %':<{width}} {names} {'learning':>10} {'memory':>12}"]
    for who, r in results.items():
        shares = " ".join(f"{100 * r['accuracy'][name]:9.2f} ± {100 * r['accuracy_std'][name]:4.2f}" for name in SUBSETS)
        lines.append(f"{who:<{width}} {shares} {r['train_seconds']:8.1f} s {format_bytes(r['peak_rss_bytes']):>12}")
    for who, (accuracy, seconds, kilobytes) in PAPER.items():
        theirs = " ".join(f"{accuracy[name]:>16.2f}" if name in accuracy else f"{'-':>16}" for name in SUBSETS)
        lines.append(f"{who:<{width}} {theirs} {seconds:>8,} s {format_bytes(1024 * kilobytes):>12}")
    return "\n".join(lines)
