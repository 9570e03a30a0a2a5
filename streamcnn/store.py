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
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.drawing import facts_html
from streamcnn.errors import DataError, StoreError
from streamcnn.faults import step
from streamcnn.files import FolderLock, replacing, writing
from streamcnn.h5files import creating
from streamcnn.manifest import KINDS, STAGE_ORDER, Manifest, checked_config, write_config
from streamcnn.memory import format_bytes
from streamcnn.shardcheck import check_bytes, is_there, shard_errors
from streamcnn.shards import HDF5_CHUNK_BYTES, ShardWriter, StoredRows, virtual_is_whole, write_virtual
from streamcnn.storefolder import StoreFolder, check_empty
from streamcnn.untrusted import MAX_JSON_BYTES, first_line, parse_json, read_small

FORMAT, FORMAT_VERSION = "streamcnn-store", 1


class FeatureStore(StoreFolder):
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
        super().__init__(path, durable)
        self.checksums = True  # False only to measure what they cost
        # shards that were written or compared with their hash here
        self._sound: set[str] = set()
        self._read()

    def _read(self) -> None:
        self.config = self._read_config()
        self._manifest = Manifest(self.path, self.durable)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the manifest holds, not to be changed."""
        return self._manifest.entries

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        try:
            config = parse_json(read_small(path, MAX_JSON_BYTES, StoreError))
            # before the checksum: of a version yet to come we do not know how it is made
            version = config["format_version"] if config["format"] == FORMAT else None
            if version == FORMAT_VERSION:
                config = checked_config(config)
        except (StoreError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.path} is no feature store: its config.json is missing or damaged ({first_line(error)}); "
                "a store is the folder that fit --store (store=) has made"
            ) from error
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
        check_empty(path)
        with writing(path):
            step(f"make folder {path.name}")
            path.mkdir(parents=True, exist_ok=True)
        first = FolderLock(path)
        first.acquire()
        try:
            # another process may have made its store meanwhile
            check_empty(path)
            base = {"format": FORMAT, "format_version": FORMAT_VERSION, "digests": {}}
            write_config(path / "config.json", base | (config or {}), durable)
        finally:
            first.release()
        store = cls(path, durable)
        store.lock()
        return store

    def lock(self) -> None:
        """Take the store for this process, not for its forked children, and clear away what a killed one left half-written."""
        super().lock()
        self._read()  # another process may have had it until now
        self._remove_leftovers()

    def update_config(self, **values: Any) -> None:
        """Replace entries of `config.json`, the whole file at once."""
        self._check_process()
        config = self.config | values
        if config != self.config:
            write_config(self.path / "config.json", config, self.durable)
            self.config = config

    # -- stages -----------------------------------------------------------------------------------------------------------
    def finished(self, stage: str, digest: str) -> dict[str, Any] | None:
        """The manifest entry of a stage that was finished with this digest, else None."""
        return next((e for e in self.entries if e.get("stage") == stage and e["digest"] == digest), None)

    def finish(self, stage: str, digest: str, arrays: dict[str, np.ndarray] | None = None, **info: Any) -> None:
        """Record a stage as finished, with the arrays it has learnt."""
        self._check_process()
        self._manifest.drop(lambda entry: entry.get("stage") == stage)  # its file is about to be another
        if arrays is not None:
            header = {"format": "streamcnn-stage", "format_version": 1, "stage": stage, "digest": digest}
            self._make_folder("stages")
            save_arrays(self.path / "stages" / f"{stage}.h5", arrays, header, self.durable)
        self._manifest.add({"stage": stage, "digest": digest, "arrays": arrays is not None, **info})

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
        self._check_process()
        self._manifest.drop(lambda entry: entry.get("kind") == "added" or entry.get("stage", "").startswith("added"))
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
        if self._manifest.drop(lambda entry: entry.get("kind") == kind and id(entry) not in kept) and kind == "features":
            (self.path / "features.h5").unlink(missing_ok=True)
        names = {e["file"] for e in keep}
        self._sound = {name for name in self._sound if not name.startswith(f"{kind}/") or name in names} | (names if check else set())
        for file in (self.path / kind).glob("*.h5"):
            if f"{kind}/{file.name}" not in names:
                with writing(file):
                    step(f"remove {file.name}")
                    file.unlink()
        return {e["shard"] for e in keep}

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
            self._check_process()  # a child forked in the meantime leaves the same block
        self._sound.add(name)
        self._manifest.add(
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
        if shards := self.shards("features"):
            self.rows_of(shards)  # refuses where some are missing
            write_virtual(self.path / "features.h5", shards, self.durable)

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
        if (virtual := self.path / "features.h5").exists() and not virtual_is_whole(virtual, self.shards("features")):
            problems.append(f"features.h5: damaged; {way_out('features')}")
        return problems

    def drop_checkpoints(self) -> None:
        """Remove what stages have kept while they ran."""
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

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


def way_out(kind: str) -> str:
    """What puts a damaged part of a store right: shards of a kind, or stages."""
    if kind == "added":
        return "fit again, then add the images again"
    return "fit again with --resume to recompute it"
