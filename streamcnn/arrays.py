"""One HDF5 file of named arrays with a JSON header: how models and the state of finished stages are kept.

Nothing in such a file is ever executed, and nothing in it may point elsewhere: the loader takes only plain data sets of plain
numbers directly below the root, of a size that the file really holds, and compares a hash of all of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.errors import FileError, MemoryBudgetError, ModelError
from streamcnn.faults import step
from streamcnn.files import replacing
from streamcnn.h5files import creating
from streamcnn.memory import format_bytes
from streamcnn.system import resident_bytes

_MAX_BYTES = 1 << 40
_MAX_HEADER = 1 << 26
_SMALL_FILE = 16 << 20


def array_hash(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes of the arrays, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, np.ndarray], header: dict[str, Any], durable: bool = True) -> None:
    """Write arrays and header as one file, complete or not at all.

    Parameters
    ----------
    path : Path
    arrays : dict of str to ndarray
        Numbers of any fixed-size type; names without `/`.
    header : dict
        Anything JSON holds; must have `format` and `format_version`.
    durable : bool
        Flush to disk before the file takes its name.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    text = json.dumps(header | {"sha256": array_hash(arrays)}, sort_keys=True)
    with replacing(path, durable) as temporary, creating(temporary) as file:
        # a data set, not an attribute: attributes end at 64 KiB, which a thousand class names pass
        file.create_dataset("json", data=np.frombuffer(text.encode(), np.uint8), chunks=(len(text.encode()),), fletcher32=True)
        for name, array in arrays.items():
            # fletcher32 needs chunks, and chunks need elements and axes; the hash covers the rest
            chunks = _chunks(array) if array.size and array.ndim else None
            step(f"write {name} of {path.name}")
            file.create_dataset(name, data=array, chunks=chunks, fletcher32=chunks is not None)
            file.check()


def _chunks(array: np.ndarray) -> tuple[int, ...]:
    rows = max(1, (1 << 20) // max(1, array.nbytes // array.shape[0]))
    return (min(rows, array.shape[0]), *array.shape[1:])


def load_arrays(
    path: Path, format_name: str, newest_version: int, memory_limit: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_arrays` wrote, trusting nothing.

    Parameters
    ----------
    path : Path
    format_name : str
    newest_version : int
    memory_limit : int or None
        Bytes for the whole process, which then has to have room for the file.

    Returns
    -------
    arrays, header : dict, dict

    Raises
    ------
    FileError
        The file is missing.
    ModelError
        The file is damaged, of another kind or version, or holds anything but plain arrays.
    MemoryBudgetError
        The file is larger than what the limit leaves.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    size, held = path.stat().st_size, resident_bytes()
    # a small file never matters: a limit that far down is refused by the plan of what follows, with its table
    if memory_limit is not None and size > _SMALL_FILE and held + size > memory_limit:
        raise MemoryBudgetError(
            f"memory_limit of {format_bytes(memory_limit)} is too small to load {path}: it holds {format_bytes(size)}, and this process "
            f"already has {format_bytes(held)} in use; set memory_limit to at least {((held + size) >> 20) + 4}MiB"
        )
    try:
        with h5py.File(path, "r") as file:
            arrays = {name: _read_plain(file, name, path) for name in _plain_names(file, path)}
    except ModelError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a {format_name} file, or it is damaged ({_first_line(error)}); write it again") from error
    header = _parse_header(arrays.pop("json", None))
    if header is None or header.get("format") != format_name:
        raise ModelError(f"{path} is not a {format_name} file: its header is missing or names another format")
    if not isinstance(header.get("format_version"), int) or header["format_version"] > newest_version:
        raise ModelError(
            f"{path} has format version {header.get('format_version')}, this streamcnn reads up to {newest_version}: update streamcnn"
        )
    if header.pop("sha256", None) != array_hash(arrays):
        raise ModelError(f"{path} is damaged: its contents do not match their hash; restore it from a copy or write it again")
    return arrays, header


def _plain_names(file: h5py.File, path: Path) -> list[str]:
    names = []
    for name in file:
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ModelError(f"{path} holds a link ({name}), which no streamcnn file has: refused")
        names.append(name)
    return names


def _read_plain(file: h5py.File, name: str, path: Path) -> np.ndarray:
    item = file[name]
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "biuf" or item.is_virtual or item.external:
        raise ModelError(f"{path} holds {name}, which is no plain array of numbers stored in the file itself: refused")
    limit = _MAX_HEADER if name == "json" else _MAX_BYTES
    # what is declared must be stored: no compression is used, so a larger shape is a trap that would fill the memory
    if item.nbytes > limit or item.nbytes > max(4096, path.stat().st_size):
        raise ModelError(f"{path} declares {item.nbytes} bytes for {name}, more than the file holds: refused")
    for i in range(item.id.get_create_plist().get_nfilters()):
        if item.id.get_create_plist().get_filter(i)[0] != h5py.h5z.FILTER_FLETCHER32:
            raise ModelError(f"{path} stores {name} through a filter that no streamcnn file uses: refused")
    return item[()] if item.ndim else np.asarray(item[()])


def _parse_header(raw: np.ndarray | None) -> dict[str, Any] | None:
    try:
        header = json.loads(raw.tobytes()) if raw is not None else None
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
