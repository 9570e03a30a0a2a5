"""Strings of variable length in HDF5 files, read without the HDF5 library.

The library reads such strings from heaps whose objects it walks through by sizes that are in the file: of 10,000 damaged files two
kept it there for ever, in C, where nothing can stop it (HDF5 1.14 and 2.0). It also gives every label memory of its own, so one string
of a megabyte can be a million labels. Here sizes are looked at first, and a string is held once.

Source of the layout: HDF5 File Format Specification 3.0, III.E (global heap) and IV.A.2.d (variable-length data types): a value is the
length in bytes (4), the address of a heap collection (8) and the object's number in it (4).
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import h5py
import numpy as np

from streamcnn.errors import DataError, FileError

_VALUE = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
# number, references and padding that are passed over, bytes
_OBJECT = struct.Struct("<H6xQ")
_PIECE = 1 << 16
# HDF5 makes collections of 4 KiB, larger ones for longer strings
_MAX_COLLECTION, _HELD = 1 << 20, 1 << 23
# text of a piece, at up to 4 bytes a character
_MAX_TEXT = 1 << 28


def variable_strings(data: h5py.Dataset, path: Path, where: str) -> Iterator[np.ndarray]:
    """Values of a plain data set of UTF-8 strings of variable length, in pieces: object arrays (m,) of `str`.

    Raises
    ------
    FileError
        When the file is damaged, or stores the strings as this reader does not know: in a compact data set, packed by other filters than
        gzip and shuffle, or with addresses of other sizes than 8 bytes. `where` begins the message.
    DataError
        When a string is longer than a MiB, or no UTF-8.
    """
    if data.file.id.get_create_plist().get_sizes() != (8, 8):
        raise FileError(f"{where}: has addresses of other sizes than 8 bytes; write it again with h5py")
    with path.open("rb") as file:
        heap = _Heap(file, data.file.userblock_size, where)
        try:
            for values in _values(data, file, where):
                yield heap.texts(values)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: labels must be UTF-8 ({error})") from None


def _values(data: h5py.Dataset, file: IO[bytes], where: str) -> Iterator[np.ndarray]:
    """Lengths and places of the strings, as `_VALUE`, in pieces."""
    if data.chunks is not None:
        for start in range(0, len(data), data.chunks[0]):
            yield _chunk(data, start, where)[: len(data) - start]
        return
    offset = data.id.get_offset()
    if offset is None:
        raise FileError(f"{where}: has no strings stored, or stores them in its header; write it again with h5py")
    for start in range(0, len(data), _PIECE):
        n = min(_PIECE, len(data) - start)
        file.seek(offset + start * _VALUE.itemsize)
        raw = file.read(n * _VALUE.itemsize)
        if len(raw) < n * _VALUE.itemsize:
            raise FileError(f"{where}: is truncated")
        yield np.frombuffer(raw, _VALUE)


def _chunk(data: h5py.Dataset, start: int, where: str) -> np.ndarray:
    """The chunk that begins at row `start`, its filters undone."""
    size = data.chunks[0] * _VALUE.itemsize
    skipped, raw = data.id.read_direct_chunk((start, 0)[: data.ndim])
    properties = data.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if not set(filters) <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}:
        raise FileError(f"{where}: strings are packed by other filters than gzip and shuffle; write them without")
    for i, number in reversed(list(enumerate(filters))):
        if skipped >> i & 1:  # gzip is, where it makes a chunk no smaller
            continue
        if number == h5py.h5z.FILTER_FLETCHER32:
            raw = raw[:-4]
        elif number == h5py.h5z.FILTER_DEFLATE:
            try:
                raw = zlib.decompressobj().decompress(raw, size + 4)
            except zlib.error as error:
                raise FileError(f"{where}: cannot be unpacked ({error})") from None
        elif len(raw) == size:
            raw = np.frombuffer(raw, np.uint8).reshape(_VALUE.itemsize, -1).T.tobytes()
    if len(raw) != size:
        raise FileError(f"{where}: has a chunk of {len(raw)} bytes instead of {size}; restore the file from a copy")
    return np.frombuffer(raw, _VALUE)


class _Heap:
    """Objects of the file's global heap, a collection at a time."""

    def __init__(self, file: IO[bytes], base: int, where: str):
        self._file, self._base, self._where = file, base, where
        self._collections: dict[int, dict[int, bytes]] = {}
        self._held = 0

    def texts(self, values: np.ndarray) -> np.ndarray:
        """The strings of `values`; those that are one in the file are one in memory."""
        found, place = values, None
        if self._bytes(values) > _MAX_TEXT:
            found, place = np.unique(values, return_inverse=True)
        if self._bytes(found) > _MAX_TEXT:
            raise DataError(f"{self._where}: must have short strings, got {len(values)} of more than {_MAX_TEXT >> 20} MiB together")
        texts = np.empty(len(found), object)
        texts[:] = [self._text(length, address, number) for length, address, number in found.tolist()]
        return texts if place is None else texts[place]

    @staticmethod
    def _bytes(values: np.ndarray) -> int:
        return 4 * int(values["length"].sum(dtype=np.uint64))

    def _text(self, length: int, address: int, number: int) -> str:
        """The string of `length` bytes that is object `number` of the collection at `address`."""
        if length == 0:
            return ""
        objects = self._collections.get(address)
        if objects is None:
            objects = self._collections[address] = self._collection(address)
        found = objects.get(number)
        if found is None or len(found) < length:
            raise FileError(f"{self._where}: a string of {length} bytes is not where it should be; restore the file from a copy")
        return found[:length].decode("utf-8")

    def _collection(self, address: int) -> dict[int, bytes]:
        raw = b""
        if address < 1 << 62:
            self._file.seek(self._base + address)
            raw = self._file.read(16)
        size = int.from_bytes(raw[8:], "little")
        if raw[:5] != b"GCOL\1" or size < 16:
            raise FileError(f"{self._where}: has no strings at address {address}, where it says; restore the file from a copy")
        if size > _MAX_COLLECTION:
            raise DataError(f"{self._where}: must have short strings, got one in {size} bytes")
        if (held := self._held + size) > _HELD:
            self._collections.clear()
            held = size
        self._held = held
        body, objects, place = self._file.read(size - 16), {}, 0
        while place + 16 <= len(body):
            number, length = _OBJECT.unpack_from(body, place)
            if number == 0:  # what is free, up to the end
                break
            objects[number] = body[place + 16 : place + 16 + length]
            place += 16 + (length + 7 & -8)
        return objects
