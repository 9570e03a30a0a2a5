"""FeatureStore: a folder of immutable HDF5 shards and a manifest.

    config.json          parameters, one digest per stage, class names
    manifest.jsonl       one line per finished shard or stage, each with its own CRC
    features/00000.h5    `features` (n, d) and `labels` (n,), with checksums
    reduced/00000.h5     the same after PCA
    added/00000.h5       rows as the SVM gets them, of images added to a finished fit
    stages/pca.h5        arrays a finished stage has learnt
    checkpoints/pca/     state of a stage that is running, or was interrupted
    memory.csv, run.json memory and seconds of the last run, stage by stage, beside what was planned: see `runrecord`
    features.h5          written last: one virtual data set over all feature shards, for other programs

A shard is written under a temporary name, closed, flushed, renamed, and only then gets its manifest line; so whatever stops
the process, every shard in the manifest is complete. Each line of the manifest ends in a CRC, and a torn last line is dropped.

A store may come from a stranger: nothing in it is executed, its files are read as data, no name in it leads out of its folder (there
are no symbolic links inside), and what does not fit its checksums or makes no sense is a `StoreError`. Checksums and hashes find damage,
not forgery: who can write the shards can write the manifest too.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.drawing import facts_html
from streamcnn.errors import DataError, StoreError
from streamcnn.faults import step
from streamcnn.files import TEMPORARY_SUFFIX, FolderLock, flush_to_disk, fsync_folder, replacing, writing
from streamcnn.forking import tell_child
from streamcnn.h5files import creating
from streamcnn.manifest import KINDS, MAX_MANIFEST_BYTES, STAGE_ORDER, checked_config, config_text, duplicate, entry_of, line_of
from streamcnn.memory import format_bytes
from streamcnn.shardcheck import check_bytes, is_there, shard_errors
from streamcnn.shards import HDF5_CHUNK_BYTES, ShardWriter, StoredRows
from streamcnn.untrusted import H5_ERRORS, MAX_JSON_BYTES, check_regular, first_line, fits_json, open_h5, parse_json, read_small

FORMAT, FORMAT_VERSION = "streamcnn-store", 1


class FeatureStore:
    """A folder of feature rows larger than memory.

    A shard's hash is compared once, when an opened store first reads of it, HDF5's checksums at every read.

    Parameters
    ----------
    path : str or Path
        An existing store; `FeatureStore.create` makes one.
    durable : bool
        Whether what is written is flushed to disk before it counts; False for stores that nobody will miss.

    Attributes
    ----------
    path : Path
    config : dict
        What `config.json` holds.
    n_rows, n_features : int
        Of the feature shards.

    Raises
    ------
    StoreError
        When the folder is missing or is no store, or what it says of itself is damaged or made up.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> folder = tempfile.mkdtemp()
    >>> with FeatureStore.create(folder + "/store") as store:
    ...     store.append(np.ones((3, 2), np.float32), labels=[0, 1, 0])
    >>> [(x.shape, y.tolist()) for x, y in FeatureStore(folder + "/store").iter_batches(2)]
    [((2, 2), [0, 1]), ((1, 2), [0])]
    """

    def __init__(self, path: str | Path, durable: bool = True):
        self.path = Path(path)
        self.durable = durable
        self.checksums = True  # False only to measure what they cost
        self._lock = FolderLock(self.path)
        self._locked = self._in_parent = False
        if not self.path.is_dir():
            raise StoreError(f"{self.path}: no such folder")
        # shards that were written or compared with their hash here
        self._sound: set[str] = set()
        self._check_folder()
        self.config = self._read_config()
        self.entries = self._read_manifest()

    def _check_folder(self) -> None:
        """Refuse links inside, through which files elsewhere would be read, written or deleted."""
        try:
            for folder in (self.path, *(self.path / name for name in (*KINDS, "stages", "checkpoints")), *self.path.glob("checkpoints/*")):
                for entry in os.scandir(folder) if folder.is_dir() else ():
                    # a junction is Windows' link to a folder
                    if entry.is_symlink() or getattr(entry, "is_junction", bool)():
                        raise StoreError(f"{entry.path} is a symbolic link, which no store has inside: put the file or folder itself there")
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.path} cannot be read ({first_line(error)})") from error

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        try:
            config = parse_json(read_small(path, MAX_JSON_BYTES, StoreError))
            # before the checksum: of a version yet to come we do not know how it is made
            version = config["format_version"] if config["format"] == FORMAT else None
            if version == FORMAT_VERSION:
                config = checked_config(config)
        except (StoreError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} is no feature store: its config.json is missing or damaged ({first_line(error)})") from error
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise StoreError(f"{self.path} has store version {version}, this streamcnn reads up to {FORMAT_VERSION}: update streamcnn")
        return config

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any] | None = None, durable: bool = True) -> "FeatureStore":
        """Make an empty store in a new or empty folder, locked for this process.

        Raises
        ------
        StoreError
            When the folder holds anything already, but for what a process that died here at once has left.
        FileError
            When it cannot be written.
        """
        path = Path(path)
        _check_empty(path)
        with writing(path):
            step(f"make folder {path.name}")
            path.mkdir(parents=True, exist_ok=True)
        first = FolderLock(path)
        first.acquire()
        try:
            # another process may have made its store meanwhile
            _check_empty(path)
            base = {"format": FORMAT, "format_version": FORMAT_VERSION, "digests": {}}
            _write_config(path / "config.json", base | (config or {}), durable)
        finally:
            first.release()
        store = cls(path, durable)
        store.lock()
        return store

    def lock(self) -> None:
        """Take the store for this process, not for its forked children, and clear away what a killed one left half-written."""
        self._check_folder()
        if (lock := self._lock.path).exists():
            check_regular(lock, StoreError, links=False)
        self._lock.acquire()
        self._locked, self._in_parent = True, False
        tell_child(self)
        # another process may have had it until now
        self.config, self.entries = self._read_config(), self._read_manifest()
        for leftover in self.path.rglob(f"*{TEMPORARY_SUFFIX}"):
            if not leftover.is_dir():
                with writing(leftover):
                    leftover.unlink(missing_ok=True)

    def after_fork(self) -> None:
        """See `forking.tell_child`: the lock stays the parent's, and is free as soon as that lets go of it."""
        self._in_parent = self._in_parent or self._locked
        self._lock.release()

    def _check_process(self) -> None:
        if self._in_parent:
            raise StoreError(
                f"{self.path} is locked by the process that this one was forked from: open the store here, by FeatureStore(path), and lock "
                "it once that has closed it"
            )

    def close(self) -> None:
        """Release the lock, if held."""
        self._locked = False
        self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # -- manifest ---------------------------------------------------------------------------------------------------------
    def _read_manifest(self) -> list[dict[str, Any]]:
        path = self.path / "manifest.jsonl"
        if not path.exists():
            return []
        entries = []
        lines = read_small(path, MAX_MANIFEST_BYTES, StoreError).split(b"\n")
        for number, line in enumerate(lines):
            if not line:
                continue
            entry = entry_of(line)
            if entry is None:
                if number == len(lines) - 1:  # no newline after it: the process died while writing this line
                    break
                raise StoreError(f"{path}: line {number + 1} is damaged; remove that line to recompute what it described")
            entries.append(entry)
        if (twice := duplicate(entries)) is not None:
            raise StoreError(f"{path} describes {twice.get('file', twice.get('stage'))} twice; remove one of the lines")
        return entries

    def _record(self, entry: dict[str, Any]) -> None:
        self._check_process()
        path, line = self.path / "manifest.jsonl", line_of(entry)
        if not fits_json(line):
            raise StoreError(f"{path}: a line of {len(line)} bytes could not be read again; use fewer or shorter class names")
        good = b"".join(line_of(e) for e in self.entries)
        if path.exists() and path.stat().st_size != len(good):  # a torn line must not glue itself to the next
            self._rewrite_manifest()
        what = entry.get("file", entry.get("stage"))
        with writing(path):
            step(f"line for {what}")
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                if self.durable:
                    step(f"fsync line for {what}")
                    flush_to_disk(file.fileno())
            if self.durable and not self.entries:
                fsync_folder(self.path)
        self.entries.append(entry)

    def _rewrite_manifest(self) -> None:
        self._check_process()
        with replacing(self.path / "manifest.jsonl", self.durable) as temporary:
            temporary.write_bytes(b"".join(line_of(entry) for entry in self.entries))

    def update_config(self, **values: Any) -> None:
        """Replace entries of `config.json`, the whole file at once."""
        self._check_process()
        config = self.config | values
        if config != self.config:
            _write_config(self.path / "config.json", config, self.durable)
            self.config = config

    # -- stages -----------------------------------------------------------------------------------------------------------
    def finished(self, stage: str, digest: str) -> dict[str, Any] | None:
        """The manifest entry of a stage that was finished with this digest, else None."""
        return next((e for e in self.entries if e.get("stage") == stage and e["digest"] == digest), None)

    def finish(self, stage: str, digest: str, arrays: dict[str, np.ndarray] | None = None, **info: Any) -> None:
        """Record a stage as finished, with the arrays it has learnt."""
        self._check_process()
        if any(e.get("stage") == stage for e in self.entries):  # its file is about to be another
            self.entries = [e for e in self.entries if e.get("stage") != stage]
            self._rewrite_manifest()
        if arrays is not None:
            header = {"format": "streamcnn-stage", "format_version": 1, "stage": stage, "digest": digest}
            self._make_folder("stages")
            save_arrays(self.path / "stages" / f"{stage}.h5", arrays, header, self.durable)
        self._record({"stage": stage, "digest": digest, "arrays": arrays is not None, **info})

    def stage_arrays(self, stage: str, digest: str, memory_limit: int | None = None) -> dict[str, np.ndarray] | None:
        """Arrays of a finished stage, or None when they are missing, damaged or of another digest."""
        if self.finished(stage, digest) is None:
            return None
        try:
            arrays, header = load_arrays(self.path / "stages" / f"{stage}.h5", "streamcnn-stage", 1, memory_limit)
        except OSError:
            return None
        return arrays if header.get("digest") == digest else None

    def checkpoint_folder(self, stage: str) -> Path:
        """Where a stage keeps its state while it runs."""
        return self.path / "checkpoints" / stage

    def additions(self) -> list[dict[str, Any]]:
        """Manifest entries of the images added to a finished fit, one for each call, in order."""
        return [e for e in self.entries if e.get("stage", "").startswith("added")]

    def drop_added(self) -> None:
        """Drop all that was added to a finished fit."""
        left = [e for e in self.entries if e.get("kind") != "added" and not e.get("stage", "").startswith("added")]
        if len(left) < len(self.entries):
            self.entries = left
            self._rewrite_manifest()
        shutil.rmtree(self.path / "added", ignore_errors=True)

    # -- shards -----------------------------------------------------------------------------------------------------------
    def shards(self, kind: str, *digests: str) -> list[dict[str, Any]]:
        """Manifest entries of the finished shards of a kind, of any of the digests if some are given, in order of their rows."""
        found = [e for e in self.entries if e.get("kind") == kind and (not digests or e["digest"] in digests)]
        return sorted(found, key=lambda entry: entry["shard"])

    def begin(self, kind: str, *digests: str, check: Callable[[int], None] | None = None) -> set[int]:
        """Drop shards of other digests, and return the numbers of those that stay.

        With `check` damaged ones are dropped too, and it is called with 1 for each that was looked at; it may raise to end this.
        """
        self._check_process()
        self._make_folder(kind)
        found = self.shards(kind, *digests)
        if check is None:
            errors = [None if is_there(self.path / e["file"], e) else "missing" for e in found]
        else:
            errors = shard_errors(self.path, found, check)
        keep = [e for e, error in zip(found, errors) if error is None]
        kept = {id(e) for e in keep}
        stale = [e for e in self.shards(kind) if id(e) not in kept]
        if stale:
            self.entries = [e for e in self.entries if e.get("kind") != kind or id(e) in kept]
            self._rewrite_manifest()
            if kind == "features":
                (self.path / "features.h5").unlink(missing_ok=True)
        names = {e["file"] for e in keep}
        self._sound = {name for name in self._sound if not name.startswith(f"{kind}/") or name in names} | (names if check else set())
        for file in (self.path / kind).glob("*.h5"):
            if f"{kind}/{file.name}" not in names:
                with writing(file):
                    step(f"remove {file.name}")
                    file.unlink()
        return {e["shard"] for e in keep}

    def _make_folder(self, name: str) -> None:
        if (folder := self.path / name).is_dir():
            return
        with writing(folder):
            folder.mkdir()
            if self.durable:
                fsync_folder(self.path)

    @contextlib.contextmanager
    def writing(self, kind: str, shard: int, start: int, n_rows: int, n_features: int, dtype, digest: str) -> Iterator[ShardWriter]:
        """Write one shard: rows `start` to `start + n_rows`; it exists, with its manifest line, once the block has ended well.

        What the writer's `facts` hold by then goes into that line.
        """
        self._check_process()
        name = f"{kind}/{shard:05d}.h5"
        self._make_folder(kind)
        with replacing(self.path / name, self.durable) as temporary:
            with creating(temporary, chunk_cache=2 * HDF5_CHUNK_BYTES) as file:
                writer = ShardWriter(file, n_rows, n_features, dtype, self.checksums)
                yield writer
            if writer.filled != n_rows:
                raise StoreError(f"{self.path / name}: {writer.filled} of {n_rows} rows were written")
        self._sound.add(name)
        self._record(
            {"kind": kind, "shard": shard, "start": start, "rows": n_rows, "n_features": n_features, "file": name}
            | {
                "dtype": np.dtype(dtype).name,
                "sha256": writer.sha256,
                "bytes": (self.path / name).stat().st_size,
                "digest": digest,
            }
            | writer.facts
        )

    def append(self, features: np.ndarray, labels=None) -> None:
        """Add rows as one new shard.

        Parameters
        ----------
        features : ndarray of shape (m, n_features), float16 or float32
        labels : array-like of int of shape (m,) or None
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.dtype not in (np.float16, np.float32) or not len(features):
            raise DataError(f"features must be rows (m, n_features) of float16 or float32, got {features.shape} {features.dtype}")
        if not np.isfinite(features).all():
            raise DataError("features must be finite numbers, got NaN or infinity")
        if labels is not None and len(labels) != len(features):
            raise DataError(f"labels must be one per row: {len(features)} rows, {len(labels)} labels")
        there = self.shards("features")
        if there and there[0]["n_features"] != features.shape[1]:
            raise DataError(f"features must have {there[0]['n_features']} columns as the store has, got {features.shape[1]}")
        start = there[-1]["start"] + there[-1]["rows"] if there else 0
        number = there[-1]["shard"] + 1 if there else 0
        with self.writing(
            "features", number, start, len(features), features.shape[1], features.dtype, there[0]["digest"] if there else ""
        ) as writer:
            writer.write(features, None if labels is None else np.asarray(labels))

    def write_virtual(self) -> None:
        """Write `features.h5`: all feature shards as one virtual data set, for plain h5py and other programs."""
        shards = self.shards("features")
        if not shards:
            return
        self.rows_of(shards)  # refuses where some are missing
        with replacing(self.path / "features.h5", self.durable) as temporary, creating(temporary) as file:
            shape = (sum(e["rows"] for e in shards), shards[0]["n_features"])
            for name, full, dtype, fill in (("features", shape, shards[0]["dtype"], np.nan), ("labels", shape[:1], "<i8", -1)):
                layout = h5py.VirtualLayout(full, dtype)
                for e in shards:
                    layout[e["start"] : e["start"] + e["rows"]] = h5py.VirtualSource(e["file"], name, (e["rows"], *full[1:]))
                file.create_virtual_dataset(name, layout, fillvalue=fill)

    # -- reading ----------------------------------------------------------------------------------------------------------
    @property
    def n_rows(self) -> int:
        return sum(entry["rows"] for entry in self.shards("features"))

    @property
    def n_features(self) -> int:
        shards = self.shards("features")
        return shards[0]["n_features"] if shards else 0

    def rows(self, kind: str = "features") -> "StoredRows":
        """The rows of a kind, readable from any place.

        Raises
        ------
        StoreError
            When shards between them are missing.
        """
        return self.rows_of(self.shards(kind))

    def rows_of(self, shards: list[dict[str, Any]]) -> "StoredRows":
        """The rows of some shards, in order."""
        return StoredRows(self.path, shards, self._check_once)

    def _check_once(self, entry: dict[str, Any]) -> None:
        """Refuse a shard that is not what the manifest says; compared when it is first opened, so a pass over rows costs no second one.

        HDF5's fletcher32 alone takes 0000 and FFFF in a word of 16 bits for the same: a label 0 could become -1.
        """
        if entry["file"] not in self._sound:
            if (error := shard_errors(self.path, [entry])[0]) is not None:
                raise StoreError(f"{self.path / entry['file']} is damaged: {error}; {way_out(entry['kind'])}")
            self._sound.add(entry["file"])

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` (float32) with feature rows."""
        with self.rows() as rows:
            rows.read(start, stop, out)

    def iter_batches(self, batch_size: int, kind: str = "features") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (features float32 (m, d), label codes (m,)) in order; the feature array is reused from step to step."""
        with self.rows(kind) as rows:
            block = np.empty((min(batch_size, rows.n_rows), rows.n_features), np.float32)
            for start in range(0, rows.n_rows, batch_size):
                stop = min(start + batch_size, rows.n_rows)
                rows.read(start, stop, block)
                yield block[: stop - start], rows.read_labels(start, stop)

    # -- checking ---------------------------------------------------------------------------------------------------------
    def verify_bytes(self) -> dict[str, int]:
        """Name -> bytes that `verify` takes for shards at most, on top of what the process holds after this call."""
        return check_bytes([entry for kind in KINDS for entry in self.shards(kind)])

    def verify(self, memory_limit: int | None = None) -> list[str]:
        """Check every shard and stage file against checksums and hashes; returns one line per problem, none if all is well.

        Shards are read in pieces, on all threads; what a stage has learnt whole: a stage file that does not fit `memory_limit` (bytes of
        the whole process) is a `MemoryBudgetError`.
        """
        shards = [e for kind in KINDS for e in self.shards(kind)]
        found = zip(shards, shard_errors(self.path, shards))
        problems = [f"{e['file']}: {error}; {way_out(e['kind'])}" for e, error in found if error is not None]
        for kind in ("features", "reduced"):
            try:
                self.rows(kind)
            except StoreError as error:
                problems.append(str(error))
        for entry in self.entries:
            if "stage" in entry and entry.get("arrays", False) and self.stage_arrays(entry["stage"], entry["digest"], memory_limit) is None:
                problems.append(f"stages/{entry['stage']}.h5: missing or damaged; {way_out('stage')}")
        if (self.path / "features.h5").exists() and not self._virtual_is_whole():
            problems.append(f"features.h5: damaged; {way_out('features')}")
        return problems

    def _virtual_is_whole(self) -> bool:
        """Whether `features.h5` can be opened and is over all feature shards; streamcnn itself never reads it."""
        try:
            with open_h5(self.path / "features.h5", StoreError, links=False) as file:
                return {source.file_name for source in file["features"].virtual_sources()} == {e["file"] for e in self.shards("features")}
        except H5_ERRORS:
            return False

    def drop_checkpoints(self) -> None:
        """Remove what stages have kept while they ran."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the store."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def delete(self) -> None:
        """Remove the store's folder and all in it."""
        self._check_process()
        self.close()
        delete_store(self.path)

    def __repr__(self):
        return f"FeatureStore({str(self.path)!r}: {self.n_rows} rows of {self.n_features} features, {format_bytes(self.nbytes)})"

    def _repr_html_(self) -> str:
        digests = self.config["digests"]
        known = [name for name in STAGE_ORDER if name in digests]
        stages = [name for name in known if self.finished(name, digests[name]) is not None]
        return facts_html(
            {
                "store": self.path,
                "features": f"{self.n_rows:,} rows of {self.n_features:,}",
                "classes": len(self.config.get("classes", [])),
                "finished stages": ", ".join(stages) or "none",
                "unfinished stages": ", ".join(name for name in known if name not in stages) or "none",
                "added": f"{sum(call['rows'] for call in self.additions()):,} images",
                "on disk": format_bytes(self.nbytes),
            }
        )


def _check_empty(path: Path) -> None:
    """Refuse a path that is there already, but for a folder that holds nothing, or what systems and dead processes leave behind."""
    junk = ("Thumbs.db", "desktop.ini")

    def counts(file: Path) -> bool:
        return file.suffix != TEMPORARY_SUFFIX and not file.name.startswith(".") and file.name not in junk

    if path.exists() and (not path.is_dir() or any(map(counts, path.iterdir()))):
        raise StoreError(f"{path} is not an empty folder: choose another, or an existing store to reuse")


def delete_store(path: Path) -> None:
    """Remove a store; one that is left half-removed can still be opened."""
    if path.is_dir():
        for part in path.iterdir():
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def way_out(kind: str) -> str:
    """What puts a damaged part of a store right: shards of a kind, or stages."""
    if kind == "added":
        return "fit again, then add the images again"
    return "fit again with --resume to recompute it"


def _write_config(path: Path, config: dict[str, Any], durable: bool) -> None:
    text = config_text(config).encode()
    if not fits_json(text):
        raise StoreError(f"{path} cannot have {len(text)} bytes, which could not be read again: use fewer or shorter class names")
    with replacing(path, durable) as temporary:
        temporary.write_bytes(text)
