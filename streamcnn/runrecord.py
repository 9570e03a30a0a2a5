"""What a store remembers of its runs, for people: nothing of it reaches a model, and a store without it is whole.

`run.json` has, for each stage, what was planned and what it took when it was last at work, and the last evaluation; `memory.csv` is the
memory trace of the last run. Both may come from a stranger: what is damaged or makes no sense is as if it were not there.
"""

import csv
import io
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamcnn.errors import StoreError
from streamcnn.files import replacing
from streamcnn.images import ImageSource
from streamcnn.manifest import STAGE_ORDER, checked_values, config_text, is_class_list
from streamcnn.memory import MemoryMonitor
from streamcnn.plan import Plan
from streamcnn.store import FeatureStore
from streamcnn.tracing import Trace
from streamcnn.untrusted import MAX_JSON_BYTES, fits_json, parse_json, read_small

_FILE, _TRACE, _FORMAT, _EVALUATE = "run.json", "memory.csv", "streamcnn-run", "evaluate"
# a monitor keeps 20,000 samples at most, in lines of some 30 bytes
_MAX_TRACE_BYTES = 4 << 20
# a confusion matrix of more classes takes longer to read than to compute again
_MOST_CLASSES = 500


def record_run(
    store: FeatureStore,
    plan: Plan,
    seconds: dict[str, float],
    digests: dict[str, str],
    source: ImageSource,
    monitor: MemoryMonitor,
    finished: bool,
) -> None:
    """Write `run.json` and `memory.csv` after a run, also after one that was stopped.

    Parameters
    ----------
    plan : Plan
    seconds : dict of str to float
        Of stages that were at work, 0.0 of those reused.
    digests : dict of str to str
        Of this run's stages; others are kept as long as the store's configuration has their digest.
    source : ImageSource
        What the run was given.
    monitor : MemoryMonitor
    finished : bool
        Whether the run came to its end.
    """
    monitor.write_csv(store.path / _TRACE)
    before = read_record(store.path) or {}
    now = store.config["digests"] | digests
    now |= dict.fromkeys(("save", _EVALUATE), now.get("svm"))  # of the model
    old = {name: stage for name, stage in before.get("stages", {}).items() if stage["digest"] == now.get(name)}
    stages = dict(old)
    for planned in plan.stages:
        name, measured = planned.name, monitor.stage_peaks.get(planned.name)
        if name == _EVALUATE or (measured is None and name in old):  # yet to come, or reused
            continue
        there = any(entry.get("stage") == name and entry["digest"] == now.get(name) for entry in store.entries)
        stages[name] = {
            "digest": now.get(name),
            "planned_bytes": plan.planned(name),
            "peak_bytes": measured,
            "seconds": seconds.get(name) if measured is not None else None,
            "claims": planned.claims,
            "passes": planned.passes,
            "disk_bytes": planned.disk_bytes,
            "finished": there or finished,
        }
        if name in old and not old[name]["finished"]:  # went on where it was stopped
            for key, both in (("seconds", sum), ("peak_bytes", max)):
                known = [stage[key] for stage in (old[name], stages[name]) if stage[key] is not None]
                stages[name][key] = both(known) if known else None
    record = {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": finished,
        "limit_bytes": plan.limit,
        "planned_bytes": plan.peak_bytes,
        "peak_bytes": monitor.peak_bytes,
        "peak_exact": monitor.exact,
        "tightened": monitor.tight,
        "chunk_size": plan.chunk_size,
        "base_claims": plan.base,
        "data_bytes": source.nbytes_,
        "opened_with": source.opened_with,
        "machine": {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        "stages": stages,
    }
    # what additions change is another model, which nobody has evaluated yet
    if (evaluation := before.get("evaluation")) is not None and evaluation["digest"] == now.get("svm"):
        record["evaluation"] = evaluation
    _write(store.path, record)


def record_evaluation(path: Path, digest: str, data: str, measured: dict[str, Any], seconds: float, monitor: MemoryMonitor) -> None:
    """Add to `run.json` what a model with this digest reached on the images in `data`.

    `measured` is what `evaluate` gives; `monitor` has watched it, after the run itself.
    """
    record = read_record(path)
    if record is None or len(measured["classes"]) > _MOST_CLASSES:
        return
    monitor.write_csv(path / _TRACE)
    kept = {name: measured[name] for name in ("accuracy", "n_test", "classes", "confusion", "unknown")}
    stage = {"digest": digest, "planned_bytes": monitor.stage_planned[_EVALUATE], "peak_bytes": monitor.stage_peaks[_EVALUATE]}
    stage |= {"seconds": seconds, "claims": {}, "passes": 1, "disk_bytes": 0, "finished": True}
    record["stages"] = record["stages"] | {_EVALUATE: stage}
    _write(path, record | {"peak_bytes": monitor.peak_bytes, "evaluation": kept | {"digest": digest, "data": data}})


def _write(path: Path, record: dict[str, Any]) -> None:
    text = config_text(record | {"format": _FORMAT, "format_version": 1}).encode()
    if fits_json(text):
        with replacing(path / _FILE, durable=False) as temporary:
            temporary.write_bytes(text)


def read_record(path: Path) -> dict[str, Any] | None:
    """What `run.json` of the store at `path` holds; None when it is missing, damaged or of a version yet to come."""
    try:
        record = parse_json(read_small(path / _FILE, MAX_JSON_BYTES, StoreError))
        if not isinstance(record, dict) or record.get("format") != _FORMAT or record.get("format_version") != 1:
            return None
        record = checked_values(record, _RULES)
        return record if _RULES.keys() - {"evaluation"} <= record.keys() else None
    except (StoreError, ValueError, TypeError, KeyError):
        return None


def ordered_stages(record: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """(name, stage) of a record in the order in which they run; none without a record."""
    stages = {} if record is None else record["stages"]
    order = {name: place for place, name in enumerate((*STAGE_ORDER, _EVALUATE))}
    return sorted(stages.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))


def read_trace(path: Path) -> Trace | None:
    """The memory trace of the last run into the store at `path`; None when there is none, or none that can be read."""
    try:
        lines = csv.reader(io.StringIO(read_small(path / _TRACE, _MAX_TRACE_BYTES, StoreError).decode()))
        if next(lines, None) != ["seconds", "stage", "resident_bytes"]:
            return None
        trace = [(float(seconds), stage, int(resident)) for seconds, stage, resident in lines]
    except (StoreError, ValueError, csv.Error):
        return None
    if not trace or not all(0 <= seconds < 1e12 and 0 <= resident < 1 << 60 for seconds, _, resident in trace):
        return None
    record = read_record(path) or {}
    return Trace(trace, record.get("peak_bytes") or max(resident for _, _, resident in trace), record.get("limit_bytes"))


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_claims(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_amount, value.values()))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _maybe(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _follows(rules: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value and rule(value[key]) for key, rule in rules.items())


_is_stage = _follows(
    {"digest": _maybe(_is_text), "finished": _is_flag, "claims": _is_claims}
    | dict.fromkeys(("planned_bytes", "passes", "disk_bytes"), _is_amount)
    | dict.fromkeys(("peak_bytes", "seconds"), _maybe(_is_amount))
)


_is_measured = _follows(
    {"digest": _is_text, "data": _is_text, "classes": is_class_list, "confusion": lambda value: isinstance(value, list)}
    | dict.fromkeys(("accuracy", "n_test", "unknown"), _is_amount)
)


def _is_evaluation(value: Any) -> bool:
    if not _is_measured(value) or not 2 <= len(value["classes"]) <= _MOST_CLASSES:
        return False
    rows, n = value["confusion"], len(value["classes"])
    return len(rows) == n and all(isinstance(row, list) and len(row) == n and all(map(_is_count, row)) for row in rows)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _is_opened_with(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(told, (str, bool, list)) for told in value.values())


_RULES: dict[str, Callable[[Any], bool]] = {
    "ended": _is_text,
    "finished": _is_flag,
    "peak_exact": _is_flag,
    "tightened": _is_flag,
    **dict.fromkeys(("limit_bytes", "planned_bytes", "peak_bytes", "chunk_size", "data_bytes"), _is_amount),
    "base_claims": _is_claims,
    "opened_with": _is_opened_with,
    "machine": lambda value: isinstance(value, dict),
    "stages": lambda value: isinstance(value, dict) and all(map(_is_stage, value.values())),
    "evaluation": _is_evaluation,
}

__all__ = ["ordered_stages", "read_record", "read_trace", "record_evaluation", "record_run"]
