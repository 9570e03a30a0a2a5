"""Reading what a stranger may have made: regular files, JSON of a bounded size, and plain HDF5 data sets.

A plain data set lies in the file that was opened, at its name and not behind a link, holds numbers (or, where allowed, strings), stores
about what it declares, and passes through no filter that would load a plugin.
"""

import contextlib
import json
import math
import stat
from pathlib import Path
from typing import Any

import h5py

from streamcnn.errors import DataError, FileError
from streamcnn.h5layout import chunk_axes_fault, chunk_size_fault

MAX_JSON_BYTES = 1 << 24
"""Longest JSON text that is parsed."""
# a list that is empty takes 64 bytes where its text takes 3: this many values are about 100 MiB
_MAX_JSON_VALUES = 1 << 20
OWN_FILTERS = frozenset({h5py.h5z.FILTER_FLETCHER32})
"""Filters of the files that streamcnn writes."""
BUILT_IN_FILTERS = frozenset(range(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SCALEOFFSET + 1)) | {h5py.h5z.FILTER_LZF}
"""Filters that come with HDF5 and h5py."""
# zlib makes at most 1,032 bytes of one; a little more is given to small data sets that were never written to
_MAX_RATIO, _UNWRITTEN = 1032, 1 << 20
# all that h5py raises on damaged files
H5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def first_line(error: BaseException) -> str:
    """The reason in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_regular(path: Path, error: type[FileError] = FileError, links: bool = True) -> int:
    """Size of a regular file in bytes; a pipe or a device would be waited for, for ever.

    Raises
    ------
    FileError
        `error`, when there is no such file, or it is a folder, pipe or device, or (without `links`) a symbolic link.
    """
    try:
        status = path.stat() if links else path.lstat()
    except (OSError, ValueError) as reason:
        missing = isinstance(reason, FileNotFoundError)
        raise error(f"{path}: no such file" if missing else f"{path}: cannot be read ({first_line(reason)})") from None
    if stat.S_ISLNK(status.st_mode):
        raise error(f"{path} is a symbolic link, which no streamcnn store has inside: put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} must be a regular file, got a folder, pipe or device: give a file")
    return status.st_size


def read_small(path: Path, most: int, error: type[FileError]) -> bytes:
    """The bytes of a regular file inside a store, which may have `most` of them.

    Raises
    ------
    FileError
        `error`, also for a longer file, of which nothing is read.
    """
    size = check_regular(path, error, links=False)
    if size > most:
        raise error(f"{path} must have at most {most} bytes, has {size}: it was not written by streamcnn")
    try:
        return path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read ({first_line(reason)})") from None


def fits_json(raw: bytes) -> bool:
    """Whether `parse_json` takes a text of this size."""
    return len(raw) <= MAX_JSON_BYTES and sum(map(raw.count, (b",", b"[", b"{"))) <= _MAX_JSON_VALUES


def parse_json(raw: bytes) -> Any:
    """The value of a UTF-8 JSON text.

    Raises
    ------
    ValueError
        When it is no JSON, too long, too deep, or has more values than memory should be spent on; also for NaN and infinity, which no
        JSON has.
    """
    if not fits_json(raw):
        raise ValueError(f"a JSON text of {len(raw)} bytes holds too much")
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("a JSON text is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def open_h5(path: Path, error: type[FileError] = FileError, links: bool = True, **access: Any) -> h5py.File:
    """An HDF5 file opened for reading; network drives often cannot lock, which a reader can do without.

    Raises
    ------
    FileError
        `error`, when it is no regular file or no HDF5 file.
    """
    check_regular(path, error, links)
    try:
        return h5py.File(path, "r", locking="best-effort", **access)
    except H5_ERRORS as reason:
        raise error(f"{path}: not a readable HDF5 file ({first_line(reason)})") from None


def plain_dataset(
    file: h5py.File,
    key: str,
    path: Path,
    name: str,
    error: type[FileError] = FileError,
    filters: frozenset[int] = OWN_FILTERS,
    text: bool = False,
) -> h5py.Dataset:
    """The data set `key`, its values stored in this very file.

    Links and external storage are refused because a crafted file could otherwise make us read any file of the machine; shapes that
    the file cannot fill because they would fill the memory.

    Parameters
    ----------
    file : h5py.File
    key : str
        Nested names have slashes.
    path : Path
        Of `file`, for errors.
    name : str
        What to call the data set in errors.
    error : type
        `FileError` or a child.
    filters : frozenset of int
        HDF5's numbers of filters allowed; `OWN_FILTERS` compress nothing, so what is declared must be stored.
    text : bool
        Whether strings are allowed: then it is somebody's data, and a wrong type is a `DataError`.

    Raises
    ------
    FileError
        `error`, for anything else than a plain data set.
    DataError
        With `text`, when it holds neither numbers nor strings.
    """
    try:
        return _plain_dataset(file, key, path, name, error, filters, text)
    except (FileError, DataError):
        raise
    except H5_ERRORS as reason:
        raise error(f"{path}: {name} is damaged ({first_line(reason)}); restore the file from a copy") from None


def _plain_dataset(file, key, path, name, error, filters, text) -> h5py.Dataset:
    group: Any = file
    for part in key.strip("/").split("/"):
        # `part in group` would follow an external link to find out
        there = part and isinstance(group, h5py.Group) and group.id.links.exists(part.encode())
        link = group.get(part, getlink=True) if there else None
        if link is None:
            raise error(f"{path}: {name} is not there; the file holds {', '.join(data_sets(file)) or 'no data sets'}")
        if not isinstance(link, h5py.HardLink):
            raise error(f"{path}: {name} leads elsewhere by a link; copy the data into the file")
        if (fault := chunk_axes_fault(file, group, part, path)) is not None:
            raise error(f"{path}: {name} {fault}; restore the file from a copy")
        group = group[part]
    if not isinstance(group, h5py.Dataset):
        raise error(f"{path}: {name} is a group; the file holds {', '.join(data_sets(file))}")
    if group.is_virtual or group.external:
        raise error(f"{path}: {name} keeps its values in other files; copy the data into the file")
    kind = group.dtype.kind if h5py.check_string_dtype(group.dtype) is None else "S"
    if group.shape is None or kind not in ("biufcS" if text else "biuf"):
        kind_error = DataError if text else error
        raise kind_error(f"{path}: {name} must hold numbers{' or strings' if text else ''}, got type {group.dtype}")
    _check_storage(group, path, name, error, filters)
    return group


def _check_storage(data: h5py.Dataset, path: Path, name: str, error: type[FileError], filters: frozenset[int]) -> None:
    properties = data.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        if (number := properties.get_filter(i)[0]) not in filters:
            raise error(f"{path}: {name} is stored through filter {number}, which is not allowed; write it without, or with gzip")
    # Python's numbers: shapes that overflow 64 bits are among what is refused
    declared, stored, size = math.prod(data.shape) * data.dtype.itemsize, data.id.get_storage_size(), path.stat().st_size
    most = max(4096, size) if filters == OWN_FILTERS else _MAX_RATIO * stored + _UNWRITTEN
    if declared > most or stored > size:
        raise error(f"{path}: {name} declares {declared} bytes, the file of {size} stores {stored}: it is truncated or a trap")
    if (fault := chunk_size_fault(data)) is not None:
        raise error(f"{path}: {name} {fault}; restore the file from a copy")
    if filters == OWN_FILTERS and data.chunks is not None and any(step > side for step, side in zip(data.chunks, data.shape)):
        raise error(f"{path}: {name} is stored in pieces {data.chunks} larger than its shape {data.shape}: it was not written by streamcnn")


def has_name(file: h5py.File, name: str) -> bool:
    """Whether there is something of this name below the root, whatever it is and wherever it leads."""
    with contextlib.suppress(*H5_ERRORS):
        return bool(file.id.links.exists(name.encode()))
    return False


def data_sets(file: h5py.File, most: int = 20) -> list[str]:
    """Names of the first data sets of the file."""
    found: list[str] = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found.append(name)
        return True if len(found) >= most else None

    with contextlib.suppress(*H5_ERRORS):  # of a damaged file, what was found so far is named
        file.visititems(visit)
    return found
