"""Images in `.npy` files, memory-mapped files and `.npz` members, read as bytes into reused buffers.

Pages of a memory map that are touched count as this process's memory, bytes that are read do not: so maps are read as files.
"""

import io
import math
import mmap
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from streamcnn.errors import DataError, FileError, MemoryBudgetError
from streamcnn.labels import encode_labels
from streamcnn.sources import PIECE_BYTES, ImageSource, check_finite, deliver, resolve_shape
from streamcnn.system import resident_bytes
from streamcnn.untrusted import check_regular, first_line

_UNZIP_BYTES = 1 << 20
# a limit that far down is refused by the plan, with its table
_SMALL_LABELS = 1 << 20
# NumPy's own limit for headers of files that are not trusted
_MAX_HEADER = 10_000
_HEADERS: dict[tuple[int, int], tuple[int, Callable]] = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}
# zlib makes at most 1,032 bytes of one
_MAX_RATIO = 1032
# all that reading a damaged archive raises: encrypted members are a RuntimeError, others need what is not implemented
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, RuntimeError, struct.error, UnicodeDecodeError)
# the header is a Python literal, which NumPy's parser may fail on in all these ways
_HEADER_ERRORS = (ValueError, SyntaxError, tokenize.TokenError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


def read_npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, offset of the first value) of a `.npy` stream in C order.

    Raises
    ------
    FileError
        When it is no `.npy` stream.
    DataError
        For Fortran order and object types.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the format is for records")
        n_bytes, read_header = _HEADERS[version]
        length = file.read(n_bytes)
        # NumPy would read what is promised, up to 4 GiB, before it refuses
        if int.from_bytes(length, "little") > _MAX_HEADER:
            raise ValueError(f"its header is longer than {_MAX_HEADER} bytes")
        header = file.read(int.from_bytes(length, "little"))
        shape, fortran, dtype = read_header(io.BytesIO(length + header))
        offset = 8 + n_bytes + len(header)
        if any(type(side) is not int or not 0 <= side < 1 << 62 for side in shape):
            raise ValueError(f"its shape is {shape}")
    except (*_ZIP_ERRORS, *_HEADER_ERRORS) as error:
        raise FileError(f"{where}: not a .npy file ({first_line(error)})") from None
    if dtype.hasobject:
        raise DataError(f"{where}: holds Python objects, which are never loaded; save numbers or strings instead")
    if fortran and len(shape) > 1:
        raise DataError(f"{where}: is in Fortran order; save numpy.ascontiguousarray(images) instead")
    return shape, dtype, offset


class _ByteSource(ImageSource):
    """Images that lie one after another in a stream of bytes."""

    _buffer: np.ndarray | None = None

    def _read_bytes(self, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` of the pixels."""
        raise NotImplementedError

    @property
    def _direct(self) -> bool:
        return self.stored_dtype == self.dtype or self.stored_dtype.kind == "b"

    @property
    def _piece_values(self) -> int:
        return min(PIECE_BYTES // self.stored_dtype.itemsize, self.n_samples * self.row_values)

    def _fill(self, start, stop, out):
        values, item = out.reshape(-1), self.stored_dtype.itemsize
        first = start * self.row_values
        if self._direct:
            self._read_bytes(first * item, memoryview(values.view(np.uint8)))
            if self.stored_dtype.kind == "b":
                np.minimum(values, 1, out=values)
            if self.dtype.kind == "f":
                check_finite(values, values, first, self.row_values)
            return
        if self._buffer is None:
            self._buffer = np.empty(self._piece_values, self.stored_dtype)
        for done in range(0, len(values), len(self._buffer)):
            part = values[done : done + len(self._buffer)]
            stored = self._buffer[: len(part)]
            self._read_bytes((first + done) * item, memoryview(stored.view(np.uint8)))
            deliver(stored, part)
            if self.stored_dtype.kind == "f":
                check_finite(stored, part, first + done, self.row_values)

    def _scratch(self, chunk_size):
        return {} if self._direct else {"conversion": self._piece_values * self.stored_dtype.itemsize}

    def close(self):
        self._buffer = None

    def __getstate__(self):
        return {**self.__dict__, "_buffer": None}


class FlatFileSource(_ByteSource):
    """Images that lie in a file from byte `offset` on, in C order: a `.npy` file or a memory-mapped one."""

    path: Path
    _file: Any = None

    def __init__(self, path: Path, shape, dtype, offset: int, *, kind: str, image_shape=None, labels=None):
        super().__init__(shape[0], resolve_shape(shape, image_shape), dtype, labels)
        self.path, self.kind, self.offset = path, kind, offset
        missing = offset + self.nbytes_ - path.stat().st_size
        if missing > 0:
            raise FileError(f"{path}: is truncated, {missing} bytes of the pixels are missing")

    def _read_bytes(self, offset, view):
        try:
            if self._file is None:
                self._file = self.path.open("rb", buffering=0)
            self._file.seek(self.offset + offset)
            read_fully(self._file, view, str(self.path))
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self.path}: cannot be read ({first_line(error)})") from error

    def close(self):
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self):
        return {**super().__getstate__(), "_file": None}

    def _identity(self):
        return {**super()._identity(), **file_facts(self.path), "offset": self.offset}


def read_fully(file, view: memoryview, where: str) -> None:
    """Fill `view` from `file.readinto`, which may give less than asked for.

    Raises
    ------
    FileError
        When the file ends before.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise FileError(f"{where}: is truncated, it ends {len(view) - done} bytes too early")
        done += count


def file_facts(path: Path) -> dict[str, int]:
    """Size and time of change of a file: what stands for its content in a fingerprint."""
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({first_line(error)})") from error
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def memmap_origin(array: np.ndarray) -> tuple[Path, int] | None:
    """(file, byte offset) where the values of `array` lie, when it is a C-ordered view of a memory-mapped file.

    None for other arrays, for copy-on-write maps (the file does not have their changes) and for files that are gone.
    """
    if not array.flags.c_contiguous:
        return None
    root: Any = array
    while isinstance(root, np.ndarray) and not isinstance(root.base, mmap.mmap):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or root.mode == "c":
        return None
    path = Path(os.fspath(root.filename))
    offset = root.offset + array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    if not path.is_file() or path.stat().st_size < offset + array.nbytes:
        return None
    root.flush()
    return path, offset


def check_label_room(n_samples: int, path: Path, memory_limit: int | None) -> None:
    """Refuse more labels than fit the memory limit (bytes of the process; None: any); they are all held, 4 bytes each."""
    if memory_limit is not None and (needed := 4 * n_samples) > max(_SMALL_LABELS, memory_limit - resident_bytes()):
        raise MemoryBudgetError(
            f"memory_limit of {memory_limit >> 20} MiB is too small for the labels of the {n_samples} images in {path}, which take "
            f"{needed >> 20} MiB: raise memory_limit, or use fewer images"
        )


def open_npy(path: Path, labels, image_shape, need_labels: bool, memory_limit: int | None = None) -> FlatFileSource:
    """A `.npy` file; without `labels` those of a sibling `<stem>_labels.npy` if there is one."""
    with path.open("rb") as file:
        shape, dtype, offset = read_npy_header(file, str(path))
    resolve_shape(shape, image_shape)
    n_samples = shape[0]
    sibling = path.with_name(f"{path.stem}_labels.npy")
    source = "labels"
    if labels is None and sibling.is_file():
        source = str(sibling)
        check_label_room(n_samples, path, memory_limit)
        with sibling.open("rb") as file:
            labels = read_labels_stream(file, source, n_samples, check_regular(sibling))
    elif labels is None and need_labels:
        raise DataError(f"{path}: has no labels; give labels=, or save them beside it as {sibling.name}")
    encoded = None if labels is None else encode_labels(labels, n_samples, source)
    return FlatFileSource(path, shape, dtype, offset, kind="npy", image_shape=image_shape, labels=encoded)


def read_labels_stream(file: IO[bytes], where: str, n_samples: int, size: int) -> np.ndarray:
    """Labels from a `.npy` stream of `size` bytes; number and size are checked before they are read, so a false header costs no memory."""
    shape, dtype, offset = read_npy_header(file, where)
    if shape not in ((n_samples,), (n_samples, 1)):
        raise DataError(f"{where}: must hold one label for each of the {n_samples} images, got shape {shape}")
    if dtype.kind not in "biufSU" or not 0 < n_samples * dtype.itemsize <= size - offset:
        raise DataError(f"{where}: must hold {n_samples} whole numbers or strings, got {size - offset} bytes of type {dtype}")
    values = np.empty(shape, dtype)
    read_fully(file, memoryview(values.reshape(-1).view(np.uint8)), where)
    # the checksum of a zip member is compared only at its end
    file.read(1)
    return values


class NpzSource(_ByteSource):
    """A member of a `.npz` file, unpacked in a stream: reading forward goes on, reading backward starts again."""

    kind = "npz"
    path: Path
    _zip: Any = None
    _member: Any = None
    _at = 0

    def __init__(self, path: Path, key: str, shape, dtype, offset: int, image_shape=None, labels=None):
        super().__init__(shape[0], resolve_shape(shape, image_shape), dtype, labels)
        self.path, self.key, self.offset = path, key, offset

    def _read_bytes(self, offset, view):
        where = f"{self.path}, member {self.key}"
        try:
            target = self.offset + offset
            if self._member is None or target < self._at:
                self.close_member()
                self._zip = zipfile.ZipFile(self.path)
                self._member, self._at = self._zip.open(f"{self.key}.npy"), 0
            while self._at < target:
                skipped = len(self._member.read(min(_UNZIP_BYTES, target - self._at)))
                if not skipped:
                    raise FileError(f"{where}: is truncated")
                self._at += skipped
            for done in range(0, len(view), _UNZIP_BYTES):
                piece = view[done : done + _UNZIP_BYTES]
                read_fully(self._member, piece, where)
                self._at += len(piece)
            if self._at == self.offset + self.nbytes_:
                self._member.read(1)  # the member's checksum is compared only at its end
        except _ZIP_ERRORS as error:
            self.close_member()
            if isinstance(error, FileError):
                raise
            raise FileError(f"{where}: cannot be read ({first_line(error)})") from error

    def close_member(self) -> None:
        """Close the stream, so that the next read starts it again."""
        if self._zip is not None:
            if self._member is not None:
                self._member.close()
            self._zip.close()
        self._zip = self._member = None

    def close(self):
        super().close()
        self.close_member()

    def _scratch(self, chunk_size):
        # compressed input, unpacked output and the copy handed over, each of one step
        return {**super()._scratch(chunk_size), "unzip": 3 * _UNZIP_BYTES}

    def __getstate__(self):
        return {**super().__getstate__(), "_zip": None, "_member": None, "_at": 0}

    def _identity(self):
        return {**super()._identity(), **file_facts(self.path), "key": self.key}


def open_npz(path: Path, labels, images_key, labels_key, image_shape, need_labels: bool, memory_limit: int | None = None) -> NpzSource:
    """A `.npz` file with `images` and `labels`, or `X` and `y`, or the members named."""
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            images_key = _choose(images_key, ("images", "X"), keys, path, "images_key")
            if images_key is None:
                raise FileError(f"{path}: has no member images or X; give images_key= one of {_some(keys)}")
            size = _member_size(archive, images_key, path)
            with archive.open(f"{images_key}.npy") as member:
                shape, dtype, offset = read_npy_header(member, f"{path}, member {images_key}")
            resolve_shape(shape, image_shape)
            n_samples = shape[0]
            declared = math.prod(shape) * dtype.itemsize
            if size - offset != declared:
                raise FileError(f"{path}, member {images_key}: its header promises {declared} bytes, {size - offset} are stored")
            source = "labels"
            if labels is None:
                labels_key = _choose(labels_key, ("labels", "y"), keys, path, "labels_key")
                if labels_key is None and need_labels:
                    raise DataError(f"{path}: has no member labels or y; give labels= or labels_key= one of {_some(keys)}")
                if labels_key is not None:
                    source = f"{path}, member {labels_key}"
                    check_label_room(n_samples, path, memory_limit)
                    size = _member_size(archive, labels_key, path)
                    with archive.open(f"{labels_key}.npy") as member:
                        labels = read_labels_stream(member, source, n_samples, size)
    except _ZIP_ERRORS as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: not a readable .npz file ({first_line(error)})") from None
    encoded = None if labels is None else encode_labels(labels, n_samples, source)
    return NpzSource(path, images_key, shape, dtype, offset, image_shape, encoded)


def _member_size(archive: zipfile.ZipFile, key: str, path: Path) -> int:
    """Bytes of a member, unpacked: what the archive says of it can be true only within what is in the file."""
    member, size = archive.getinfo(f"{key}.npy"), path.stat().st_size
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileError(f"{path}, member {key}: must be stored or deflated, as numpy writes it, got method {member.compress_type}")
    most = member.compress_size * (1 if member.compress_type == zipfile.ZIP_STORED else _MAX_RATIO)
    if member.file_size > most or member.compress_size > size:
        raise FileError(f"{path}, member {key}: declares {member.file_size} bytes, which {member.compress_size} of the file cannot be")
    return member.file_size


def _some(keys: list[str]) -> str:
    """The first names of an archive, for errors."""
    return ", ".join(name[:100] for name in keys[:20]) or "(none there)"


def _choose(key: str | None, usual: tuple[str, ...], keys: list[str], path: Path, argument: str) -> str | None:
    """`key`, which must be there, or the first usual one that is there."""
    if key is None:
        return next((name for name in usual if name in keys), None)
    if key not in keys:
        raise FileError(f"{path}: {argument} is {key!r} but the file holds {_some(keys)}")
    return key
