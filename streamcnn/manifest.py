"""What a store says of itself: lines of `manifest.jsonl` and `config.json`, written with checksums and taken for true only in parts.

A line is the JSON object of one shard or stage, sorted by key, whose last key is the CRC of all before it. `config.json` has the CRC of
its other values under `crc` (stores of before have none).
"""

import json
import re
import zlib
from collections.abc import Callable
from typing import Any

from streamcnn.untrusted import parse_json

KINDS = ("features", "reduced", "added")
STAGE_ORDER = ("filters", "extract", "pca", "project", "svm", "add", "save")
"""In which stages run; files of JSON have them in the order of the alphabet."""
MAX_MANIFEST_BYTES = 1 << 26
"""Bytes of a manifest that is read; lines of shards are about 350 bytes, so these are 190,000 shards or 6 TB."""
_STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_ROWS = 1 << 48


def line_of(entry: dict[str, Any]) -> bytes:
    """The line of an entry, newline included."""
    body = json.dumps({k: v for k, v in entry.items() if k != "crc"}, sort_keys=True).encode()
    return body[:-1] + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


def entry_of(line: bytes) -> dict[str, Any] | None:
    """The entry of a manifest line without its newline, or None when it is torn, damaged or says what no store says.

    A file of an entry is one of the store's own: `kind/number.h5`, or `stages/name.h5` for a name without slashes.
    """
    try:
        entry = parse_json(line)
        if line_of(entry) != line + b"\n":
            return None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return entry if _is_stage(entry) or _is_shard(entry) else None


def _is_stage(entry: dict[str, Any]) -> bool:
    name, has_arrays = entry.get("stage"), entry.get("arrays", False)
    if not isinstance(name, str) or _STAGE_NAME.fullmatch(name) is None or not isinstance(has_arrays, bool):
        return False
    if not isinstance(entry.get("digest"), str) or "kind" in entry or "file" in entry:
        return False
    if name.startswith("added"):
        return type(entry.get("rows")) is int and entry["rows"] > 0 and is_class_list(entry.get("new_classes"))
    return name != "filters" or isinstance(entry.get("network"), dict)


def _is_shard(entry: dict[str, Any]) -> bool:
    kind, dtype, hashed, digest = (entry.get(key) for key in ("kind", "dtype", "sha256", "digest"))
    if kind not in KINDS or dtype not in ("float16", "float32") or not isinstance(hashed, str) or not isinstance(digest, str):
        return False
    lowest = {"shard": 0, "start": 0, "rows": 1, "n_features": 1, "bytes": 1}
    if any(type(entry.get(key)) is not int or not least <= entry[key] < _MAX_ROWS for key, least in lowest.items()):
        return False
    # nothing is compressed: a file smaller than its rows is a trap that would fill the memory
    row_bytes = entry["n_features"] * (2 if dtype == "float16" else 4) + 8
    fits = entry["rows"] * row_bytes <= entry["bytes"]
    return fits and _HEX.fullmatch(hashed) is not None and entry.get("file") == f"{kind}/{entry['shard']:05d}.h5"


def duplicate(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """An entry of a shard or stage that an entry before it describes too, or None."""
    seen = set()
    for entry in entries:
        key = entry.get("file"), entry.get("stage")
        if key in seen:
            return entry
        seen.add(key)
    return None


def config_text(config: dict[str, Any]) -> str:
    """What `config.json` (or `run.json`) holds, for people and with a checksum."""
    # as it will be read: keys that are numbers become strings, which sort otherwise
    config = json.loads(json.dumps(config))
    # names of folders that are no text are written as escapes
    plain = any("\udc80" <= letter <= "\udcff" for letter in json.dumps(config, ensure_ascii=False))
    return json.dumps(config | {"crc": _config_crc(config)}, indent=1, sort_keys=True, ensure_ascii=plain)


def _config_crc(config: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a parsed `config.json`, its checksum left out.

    Raises
    ------
    ValueError
        When its checksum is wrong, or a value that streamcnn reads is of another kind than it writes.
    """
    # the name of the checksum may be what is damaged
    return checked_values(config, _CONFIG, may_lack_crc=config.keys() <= _BEFORE_CRC)


def checked_values(values: dict[str, Any], rules: dict[str, Callable[[Any], bool]], may_lack_crc: bool = False) -> dict[str, Any]:
    """What `config_text` made a text of, its checksum left out; each value for which there is a rule follows it, or it is a ValueError."""
    crc = values.pop("crc", None)
    if crc is None and not may_lack_crc:
        raise ValueError("its checksum is missing")
    if crc is not None and crc != _config_crc(values):
        raise ValueError("its checksum does not match")
    for key, is_good in rules.items():
        if key in values and not is_good(values[key]):
            raise ValueError(f"{key} is of another kind than any store has")
    return values


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def is_class_list(values: Any) -> bool:
    whole = isinstance(values, list) and all(type(value) is int and abs(value) < 1 << 64 for value in values)
    return (whole or _texts(values)) and len(set(values)) == len(values)


_CONFIG: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: isinstance(value, str),
    "digests": lambda value: isinstance(value, dict) and _texts(list(value.values())),
    "parameters": lambda value: isinstance(value, dict),
    "source": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
    "fingerprint": lambda value: value is None or isinstance(value, str),
    "classes": is_class_list,
    "bad_files": lambda value: isinstance(value, list) and all(_texts(bad) and len(bad) == 2 for bad in value),
}

_BEFORE_CRC = {"format_version", *_CONFIG}

__all__ = [
    "KINDS",
    "MAX_MANIFEST_BYTES",
    "STAGE_ORDER",
    "checked_config",
    "checked_values",
    "config_text",
    "duplicate",
    "entry_of",
    "is_class_list",
    "line_of",
]
