"""Whether shards hold what was written into them: structure, checksums and hash, in plain reads of their files.

HDF5 says where the chunks of a shard lie; their bytes are then read as a file, outside its lock and filters. A gigabyte in the
page cache took 2.5 s piece by piece through HDF5, and 0.41 s so, on two cores, most of it SHA-256 (1.8 GB/s a core). What is not stored
as `ShardWriter` stores it is refused, so what is checked here is what HDF5 would read.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.arrayfiles import read_fully
from streamcnn.errors import StoreError
from streamcnn.shards import chunk_shapes, open_shard_bytes, rows_hash, stored_dataset
from streamcnn.threads import resolve_n_jobs, share
from streamcnn.untrusted import H5_ERRORS, check_regular, first_line, open_h5

# two for each core, as they wait for the disk in turn. More than 8 would read no faster from any disk, and each takes memory
_THREADS = 8
# shards that the system is asked for before their turn: 1 GB from a disk of 2 GB/s took 0.62 s instead of 0.74 s
_AHEAD = 4


def shard_errors(folder: Path, entries: list[dict[str, Any]], checked: Callable[[int], None] = lambda n: None) -> list[str | None]:
    """What is wrong with each shard, None where all is well; in bounded memory, see `check_bytes`.

    Parameters
    ----------
    folder : Path
        Of the store.
    entries : list of dict
        Of its manifest.
    checked : callable
        Called with 1 after each shard, on any thread; what it raises ends the check.
    """
    errors: list[str | None] = [None] * len(entries)

    def check(number: int) -> None:
        entry = entries[number]
        for coming in entries[number + _AHEAD if number else 0 : number + _AHEAD + 1]:
            if is_there(folder / coming["file"], coming):  # a pipe would be waited for
                _announce(folder / coming["file"])
        try:
            _check(folder / entry["file"], entry)
        except H5_ERRORS as error:
            errors[number] = first_line(error).removeprefix(f"{folder / entry['file']}: ")
        checked(1)

    share(check, range(len(entries)), _n_threads(entries))
    return errors


def check_bytes(entries: list[dict[str, Any]]) -> dict[str, int]:
    """Name -> bytes that `shard_errors` takes at most."""
    from streamcnn.kernels import checksum, jit

    sizes = [(entry["n_features"], np.dtype(entry["dtype"]).itemsize) for entry in entries]
    each = max((open_shard_bytes(*size) for size in sizes), default=0)
    return {"pieces of a shard": _n_threads(entries) * each, "compiled kernels": jit.pending_bytes(checksum.KERNELS)}


def is_there(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the shard's file is there and of the size it was written with."""
    try:
        return check_regular(path, StoreError, links=False) == entry["bytes"]
    except StoreError:
        return False


def _n_threads(entries: list[dict[str, Any]]) -> int:
    return max(1, min(2 * resolve_n_jobs(None), len(entries), _THREADS))


def _announce(path: Path) -> None:
    """Have the system read a file into its cache, where it takes such requests."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _check(path: Path, entry: dict[str, Any]) -> None:
    """Raise a `ValueError`, or what reading raises, unless all is well."""
    if not is_there(path, entry):
        raise ValueError("missing or of another size")
    n_rows, width, dtype = entry["rows"], entry["n_features"], np.dtype(entry["dtype"])
    shapes = chunk_shapes(n_rows, width, dtype.itemsize)
    with open_h5(path, StoreError, links=False) as file:
        places = [_places(stored_dataset(file, path, entry, name), name) for name in ("features", "labels")]
    hashes = []
    with path.open("rb", buffering=0) as file:
        for name, offsets, shape, itemsize in zip(("features", "labels"), places, shapes, (dtype.itemsize, 8)):
            digest, row_bytes, left = hashlib.sha256(), int(np.prod(shape[1:])) * itemsize, n_rows
            for chunk in _chunks(file, name, offsets, shape[0] * row_bytes):
                digest.update(chunk[: left * row_bytes].data)
                left -= shape[0]
            hashes.append(digest.hexdigest())
    if rows_hash(*hashes) != entry["sha256"]:
        raise ValueError("contents do not match their hash")
    # HDF5 itself refuses what lies beyond the end that the file declares, though the bytes are there: it reads the last chunks
    with open_h5(path, StoreError, links=False) as file:
        for name, offsets, shape in zip(("features", "labels"), places, shapes):
            file[name][int(offsets.argmax()) * shape[0]]


def _places(item: h5py.Dataset, name: str) -> np.ndarray:
    """Where the chunks of a data set begin in the file, in order of their rows: int64."""
    shape, chunks = item.shape, item.chunks
    places = np.empty(-(-shape[0] // chunks[0]), np.int64)
    stored = int(np.prod(chunks)) * item.dtype.itemsize + 4
    for number in range(len(places)):
        info = item.id.get_chunk_info_by_coord((number * chunks[0], *(0,) * (len(shape) - 1)))
        if info.size != stored or info.filter_mask:
            raise ValueError(f"{name}: the chunk of row {number * chunks[0]} is missing, of another size or without checksum")
        places[number] = info.byte_offset
    return places


def _chunks(file: Any, name: str, offsets: np.ndarray, n_bytes: int) -> Iterator[np.ndarray]:
    """The chunks that begin at `offsets`, each of `n_bytes` and its checksum; the array is overwritten by the next."""
    from streamcnn.kernels.checksum import fletcher32  # numba is loaded by those who check or read rows only

    stored = np.empty(n_bytes + 4, np.uint8)
    for number, offset in enumerate(offsets.tolist()):
        file.seek(offset)
        read_fully(file, stored.data, name)
        if fletcher32(stored[:-4]) != int.from_bytes(stored[-4:].tobytes(), "little"):
            raise ValueError(f"{name}: chunk {number} does not match its checksum")
        yield stored[:-4]
