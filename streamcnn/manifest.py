"""What a store says of itself: lines of `manifest.jsonl` and `config.json`, written with checksums and taken for true only in parts.

A line is the JSON object of one shard or stage, sorted by key, whose last key is the CRC of all before it. `config.json` has the CRC of
its other values under `crc` (stores of before have none).
"""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamcnn.errors import StoreError
from streamcnn.faults import step
from streamcnn.files import flush_to_disk, fsync_folder, replacing, writing
from streamcnn.untrusted import fits_json, parse_json, read_small

KINDS = ("features", "reduced", "added")
STAGE_ORDER = ("filters", "extract", "pca", "project", "svm", "add", "save")
"""In which stages run; files of JSON have them in the order of the alphabet."""
# of a manifest that is read; lines of shards are about 350 bytes, so these are 190,000 shards or 6 TB
_MAX_BYTES = 1 << 26
_STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_ROWS = 1 << 48


class Manifest:
    """Entries of the finished shards and stages of a store, and the file that has a line of each.

    Parameters
    ----------
    folder : Path
        Of the store.
    durable : bool
        Flush to disk what is written.

    Attributes
    ----------
    entries : list of dict

    Raises
    ------
    StoreError
        When the file is damaged. A torn last line is dropped, and written over by the next entry.
    """

    def __init__(self, folder: Path, durable: bool):
        self.folder, self.durable, self._path = folder, durable, folder / "manifest.jsonl"
        self.entries: list[dict[str, Any]] = self._read() if self._path.exists() else []

    def _read(self) -> list[dict[str, Any]]:
        entries = []
        lines = read_small(self._path, _MAX_BYTES, StoreError).split(b"\n")
        for number, line in enumerate(lines):
            if not line:
                continue
            entry = entry_of(line)
            if entry is None:
                if number == len(lines) - 1:  # no newline after it: the process died while writing this line
                    break
                raise StoreError(f"{self._path}: line {number + 1} is damaged; remove that line to recompute what it described")
            entries.append(entry)
        if (twice := _duplicate(entries)) is not None:
            raise StoreError(f"{self._path} describes {twice.get('file', twice.get('stage'))} twice; remove one of the lines")
        return entries

    def add(self, entry: dict[str, Any]) -> None:
        """Append the line of an entry, which counts once this has returned."""
        line = line_of(entry)
        if not fits_json(line):
            raise StoreError(f"{self._path}: a line of {len(line)} bytes could not be read again; use fewer or shorter class names")
        good = b"".join(line_of(e) for e in self.entries)
        if self._path.exists() and self._path.stat().st_size != len(good):  # a torn line must not glue itself to the next
            self._rewrite()
        what = entry.get("file", entry.get("stage"))
        with writing(self._path):
            step(f"line for {what}")
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                if self.durable:
                    step(f"fsync line for {what}")
                    flush_to_disk(file.fileno())
            if self.durable and not self.entries:
                fsync_folder(self.folder)
        self.entries.append(entry)

    def drop(self, stale: Callable[[dict[str, Any]], bool]) -> bool:
        """Remove the entries that are `stale`, the whole file at once; whether there were any."""
        left = [entry for entry in self.entries if not stale(entry)]
        if len(left) == len(self.entries):
            return False
        self.entries = left
        self._rewrite()
        return True

    def _rewrite(self) -> None:
        with replacing(self._path, self.durable) as temporary:
            temporary.write_bytes(b"".join(line_of(entry) for entry in self.entries))


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


def _duplicate(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
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


def write_config(path: Path, config: dict[str, Any], durable: bool) -> None:
    """Replace `config.json`, the whole file at once."""
    text = config_text(config).encode()
    if not fits_json(text):
        raise StoreError(f"{path} cannot have {len(text)} bytes, which could not be read again: use fewer or shorter class names")
    with replacing(path, durable) as temporary:
        temporary.write_bytes(text)


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
    "STAGE_ORDER",
    "Manifest",
    "checked_config",
    "checked_values",
    "config_text",
    "entry_of",
    "is_class_list",
    "line_of",
    "write_config",
]
