"""One shard: rows and labels in an HDF5 file that is written once and then only read."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.errors import StoreError
from streamcnn.faults import step
from streamcnn.files import replacing
from streamcnn.forking import ThreadLock, tell_child
from streamcnn.h5files import NewFile, creating
from streamcnn.untrusted import H5_ERRORS, OWN_FILTERS, open_h5, plain_dataset

HDF5_CHUNK_BYTES = 1 << 18
_SHARD_BYTES = 1 << 25
# labels of a chunk: 64 KiB. One chunk for all was unpacked and packed again by every write once it passed the cache
_LABEL_CHUNK = 1 << 13


def shard_rows(n_features: int, itemsize: int) -> int:
    """Rows of a shard: a multiple of 1,024 that makes it about 32 MiB; follows the row's size alone."""
    return max(1, _SHARD_BYTES // (1024 * n_features * itemsize)) * 1024


def hdf5_chunk_rows(n_features: int, itemsize: int) -> int:
    """Rows of an HDF5 chunk: about 256 KiB."""
    return max(1, HDF5_CHUNK_BYTES // (n_features * itemsize))


def chunk_shapes(n_rows: int, n_features: int, itemsize: int) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes of the HDF5 chunks of `features` and of `labels`. They are part of the format: `shardcheck` accepts no others."""
    return (min(n_rows, hdf5_chunk_rows(n_features, itemsize)), n_features), (min(n_rows, _LABEL_CHUNK),)


def stored_dataset(file: h5py.File, path: Path, entry: dict[str, Any], name: str) -> h5py.Dataset:
    """`features` or `labels` of an opened shard, as `ShardWriter` stores them and the manifest's `entry` says.

    Raises
    ------
    StoreError
        When it is of another shape or type, lies elsewhere, or is stored in other pieces or through other filters.
    """
    item = plain_dataset(file, name, path, name, StoreError)
    shape = (entry["rows"], entry["n_features"]) if name == "features" else (entry["rows"],)
    dtype = np.dtype(entry["dtype"] if name == "features" else "<i8")
    if item.shape != shape or item.dtype != dtype:
        raise StoreError(f"{path}: {name} is not an array {shape} of {dtype}, as the manifest says")
    chunks = dict(zip(("features", "labels"), chunk_shapes(entry["rows"], entry["n_features"], np.dtype(entry["dtype"]).itemsize)))
    if item.chunks != chunks[name] or item.id.get_create_plist().get_nfilters() != len(OWN_FILTERS):
        raise StoreError(f"{path}: {name} is in pieces of {item.chunks} or without checksums, as no streamcnn stores it")
    return item


def rows_hash(features: str, labels: str) -> str:
    """The hash of a shard in the manifest, from the hexadecimal SHA-256 of its feature rows and of its label codes."""
    return hashlib.sha256((features + labels).encode()).hexdigest()


def open_shard_bytes(n_features: int, itemsize: int) -> int:
    """Bytes that HDF5 holds for one open shard: its chunk caches and one chunk in its filter pipeline, and metadata."""
    return 4 * max(HDF5_CHUNK_BYTES, n_features * itemsize) + (1 << 20)


class ShardWriter:
    """Rows of one shard in the making; see `FeatureStore.writing`.

    Chunks of features go to the file whole, with a checksum that is computed here: HDF5's own, and its chunk cache, took two thirds
    of the processor time of writing (313 MB: 0.26 s, of which the copies into the system's page cache are 0.08 s). Without `checksums`,
    which is for measuring what they cost, there is no hash either, and no reader accepts the shard.
    """

    def __init__(self, file: NewFile, n_rows: int, n_features: int, dtype, checksums: bool = True):
        self._file = file
        chunks, label_chunks = chunk_shapes(n_rows, n_features, np.dtype(dtype).itemsize)
        self._features = file.create_dataset("features", (n_rows, n_features), dtype, chunks=chunks, fletcher32=checksums, fillvalue=np.nan)
        self._labels = file.create_dataset("labels", (n_rows,), "<i8", chunks=label_chunks, fletcher32=checksums, fillvalue=-1)
        self._checksums = checksums
        self._hash = hashlib.sha256()
        self._label_hash = hashlib.sha256()
        # one chunk as it lies in the file: rows, then checksum
        n_bytes = chunks[0] * n_features * np.dtype(dtype).itemsize
        self._stored = np.empty(n_bytes + 4 * checksums, np.uint8)
        self._chunk = self._stored[:n_bytes].view(dtype).reshape(chunks)
        self.filled = 0
        self.facts: dict[str, Any] = {}

    def write(self, features: np.ndarray, labels: np.ndarray | None) -> None:
        """Append rows (m, n_features) of the shard's dtype and their label codes (m,), -1 where there are none."""
        stop, n_rows, size = self.filled + len(features), len(self._labels), len(self._chunk)
        if stop > n_rows or features.dtype != self._chunk.dtype or features.shape[1:] != self._chunk.shape[1:]:
            raise StoreError(
                f"features must be at most {n_rows - self.filled} more rows of {self._chunk.shape[1]} {self._chunk.dtype} numbers, "
                f"got {features.shape} {features.dtype}: give each shard its own rows"
            )
        codes = np.full(len(features), -1, "<i8") if labels is None else np.ascontiguousarray(labels, "<i8")
        self._labels[self.filled : stop] = codes
        if self._checksums:
            self._label_hash.update(codes.view(np.uint8).data)
        done = 0
        while done < len(features):
            at = self.filled % size
            n = min(size - at, len(features) - done)
            self._chunk[at : at + n] = features[done : done + n]
            done, self.filled = done + n, self.filled + n
            if at + n == size or self.filled == n_rows:
                self._write_chunk(at + n)

    def _write_chunk(self, n_valid: int) -> None:
        """The chunk that ends at row `filled`, of which the last one may be filled in part."""
        from streamcnn.kernels.checksum import fletcher32  # numba is loaded by those who write or read rows only

        self._chunk[n_valid:] = np.nan
        if self._checksums:
            self._hash.update(self._chunk[:n_valid].view(np.uint8).data)
            self._stored[-4:] = np.array([fletcher32(self._stored[:-4])], "<u4").view(np.uint8)
        step("write chunk of shard")
        self._features.id.write_direct_chunk((self.filled - n_valid, 0), self._stored)
        self._file.check()

    @property
    def sha256(self) -> str:
        return rows_hash(self._hash.hexdigest(), self._label_hash.hexdigest())


class StoredRows:
    """Rows in shards, read from any place and by any thread; one shard is open at a time. See `rows.Rows`.

    Parameters
    ----------
    folder : Path
        The store.
    shards : list of dict
        Entries of its manifest, in order of their rows.
    check : callable, optional
        Called with an entry before its file is opened; raises when the file is not to be trusted.

    Raises
    ------
    StoreError
        When shards are missing between them, or they do not have rows of one kind.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]], check: Callable[[dict[str, Any]], None] | None = None):
        self._folder, self._shards, self._check = folder, shards, check
        self.n_rows = 0
        for entry in shards:
            if entry["start"] != self.n_rows:
                raise StoreError(
                    f"{folder / entry['file']} must start at row {self.n_rows}, where the shard before it ends, but the manifest says "
                    f"{entry['start']}: fit again with --resume to recompute what is missing"
                )
            if any(entry[key] != shards[0][key] for key in ("n_features", "dtype")):
                raise StoreError(f"{folder / entry['file']} has rows of another width or type than {shards[0]['file']}: fit afresh")
            self.n_rows += entry["rows"]
        self._starts = np.array([e["start"] for e in shards], np.int64)
        self.n_features = shards[0]["n_features"] if shards else 0
        self._file: h5py.File | None = None
        self._open_name = ""
        # data sets of the open file that have been looked at
        self._items: dict[str, h5py.Dataset] = {}
        self._buffer = np.empty(0, np.float16)
        self._reading = ThreadLock()
        tell_child(self)

    def after_fork(self) -> None:
        """See `forking.tell_child`."""
        self._reading = ThreadLock()
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Close the shard that is open."""
        if self._file is not None:
            self._items.clear()
            self._file.close()
            self._file, self._open_name = None, ""

    def _dataset(self, entry: dict[str, Any], name: str) -> h5py.Dataset:
        path = self._folder / entry["file"]
        if entry["file"] != self._open_name:
            self.close()
            if self._check is not None:
                self._check(entry)
            self._file = open_h5(path, StoreError, links=False, rdcc_nbytes=2 * HDF5_CHUNK_BYTES)
            self._open_name = entry["file"]
        if name in self._items:
            return self._items[name]
        assert self._file is not None
        item = stored_dataset(self._file, path, entry, name)
        self._items[name] = item
        return item

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[dict[str, Any], int, int, int]]:
        """Shards that hold rows `start` to `stop`, with the first and last row inside each and the place in the output."""
        number, place = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while place < stop - start:
            entry = self._shards[number]
            first = start + place - entry["start"]
            last = min(entry["rows"], stop - entry["start"])
            yield entry, first, last, place
            place, number = place + last - first, number + 1

    def raw(self, name: str, start: int, stop: int) -> np.ndarray:
        """A copy of `features` or `labels` as stored."""
        entries = list(self._pieces(start, stop))
        try:
            with self._reading:
                return np.concatenate([self._dataset(entry, name)[first:last] for entry, first, last, _ in entries])
        except StoreError:
            raise
        except H5_ERRORS as error:
            raise StoreError(f"{self._folder / entries[0][0]['file']}: {name} cannot be read ({error})") from error

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` (float32 (m, n_features)) with rows `start` to `stop`."""
        with self._reading:  # one file, one buffer
            self._read(start, stop, out)

    def _read(self, start: int, stop: int, out: np.ndarray) -> None:
        from streamcnn.kernels.half import widen  # numba is loaded by those who read rows only

        for entry, first, last, place in self._pieces(start, stop):
            n = last - first
            target = out[place : place + n]
            try:
                item = self._dataset(entry, "features")
                if item.dtype == out.dtype and target.flags.c_contiguous:
                    item.read_direct(target, np.s_[first:last])
                    continue
                # HDF5's own conversion of float16 is slower by far
                if self._buffer.size < n * self.n_features or self._buffer.dtype != item.dtype:
                    self._buffer = np.empty(n * self.n_features, item.dtype)
                half = self._buffer[: n * self.n_features].reshape(n, self.n_features)
                item.read_direct(half, np.s_[first:last])
                widen(half, target)
            except StoreError:
                raise
            except H5_ERRORS as error:
                raise StoreError(f"{self._folder / entry['file']}: features cannot be read ({error})") from error

    def read_labels(self, start: int, stop: int) -> np.ndarray:
        """Label codes (m,) int64 of rows `start` to `stop`."""
        return self.raw("labels", start, stop)


def write_virtual(path: Path, shards: list[dict[str, Any]], durable: bool) -> None:
    """Write a file whose `features` and `labels` are those of all `shards`, entries of the manifest of its folder: no row is copied."""
    with replacing(path, durable) as temporary, creating(temporary) as file:
        shape = (sum(e["rows"] for e in shards), shards[0]["n_features"])
        for name, full, dtype, fill in (("features", shape, shards[0]["dtype"], np.nan), ("labels", shape[:1], "<i8", -1)):
            layout = h5py.VirtualLayout(full, dtype)
            for e in shards:
                layout[e["start"] : e["start"] + e["rows"]] = h5py.VirtualSource(e["file"], name, (e["rows"], *full[1:]))
            file.create_virtual_dataset(name, layout, fillvalue=fill)


def virtual_is_whole(path: Path, shards: list[dict[str, Any]]) -> bool:
    """Whether what `write_virtual` wrote can be opened and is over all of `shards`; streamcnn itself never reads it."""
    try:
        with open_h5(path, StoreError, links=False) as file:
            return {source.file_name for source in file["features"].virtual_sources()} == {e["file"] for e in shards}
    except H5_ERRORS:
        return False
