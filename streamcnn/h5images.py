"""Images in HDF5 files: read slice by slice, and written block by block in bounded memory."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.arrayfiles import check_label_room, file_facts
from streamcnn.errors import DataError, FileError, StreamCNNError
from streamcnn.files import replacing
from streamcnn.h5files import NewFile, creating
from streamcnn.h5text import variable_strings
from streamcnn.labels import encode_labels, encode_pieces, label_values
from streamcnn.sources import PIECE_BYTES, ImageSource, check_finite, deliver, resolve_shape
from streamcnn.untrusted import BUILT_IN_FILTERS, H5_ERRORS, data_sets, first_line, has_name, open_h5, plain_dataset

_MIN_CACHE = 1 << 20
_MAX_CACHE = 32 << 20
_CACHE_SLOTS = 8191
_WRITE_CHUNK = 1 << 20
# labels read at a time, and the bytes that these may take
_LABELS, _LABEL_BYTES = 1 << 16, 1 << 26
# a chunk of labels is unpacked whole before the first one is known
_LABEL_CHUNK = 1 << 26


def _find(file: h5py.File, key: str, path: Path, argument: str) -> h5py.Dataset:
    """The data set `key` of numbers or strings, plain but for compression."""
    return plain_dataset(file, key, path, f"{argument} {key!r}", filters=BUILT_IN_FILTERS, text=True)


def _cache_bytes(data: h5py.Dataset) -> int:
    """Chunk cache: the chunks that one image touches, so that no chunk is unpacked twice while reading on.

    One chunk at least (a larger one than the cache is unpacked again for every read), at least 1 MiB, at most 32 MiB
    unless one chunk is larger. Data that is not chunked has no such cache.
    """
    if data.chunks is None:
        return 0
    chunk = math.prod(data.chunks) * data.dtype.itemsize
    across = math.prod(-(-size // step) for size, step in zip(data.shape[1:], data.chunks[1:]))
    return max(_MIN_CACHE, chunk, min(chunk * across, _MAX_CACHE))


class H5Source(ImageSource):
    """Images in a data set of an HDF5 file, which is never loaded whole.

    Parameters
    ----------
    path : Path
    images_key, labels_key : str or None
        Names inside the file, `images` and `labels` by default; nested names have slashes.
    image_shape : tuple or None
        See `resolve_shape`.
    labels : array-like or None
        Used instead of those in the file.
    need_labels : bool
        Whether to refuse a file without labels.
    memory_limit : int or None
        Bytes for the whole process, which has to have room for the labels.
    """

    kind = "h5"
    path: Path
    _file: Any = None
    _data: Any = None
    _buffer: np.ndarray | None = None

    def __init__(self, path: Path, images_key=None, labels_key=None, image_shape=None, labels=None, need_labels=False, memory_limit=None):
        self.path, self.key = path, images_key or "images"
        with open_h5(path) as file:
            data = _find(file, self.key, path, "images_key")
            shape, n_samples, encoded = resolve_shape(data.shape, image_shape), data.shape[0], None
            if labels is not None:
                encoded = encode_labels(labels, n_samples)
            elif labels_key is not None or has_name(file, "labels"):
                labels_key = labels_key or "labels"
                check_label_room(n_samples, path, memory_limit)
                where = f"{path}, key {labels_key}"
                encoded = encode_pieces(_read_labels(file, labels_key, path, n_samples), n_samples, where)
            elif need_labels:
                raise DataError(f"{path}: has no data set labels; give labels= or labels_key= one of {', '.join(data_sets(file))}")
            super().__init__(n_samples, shape, data.dtype, encoded)
            self._stored_shape = data.shape[1:]
            self._cache = _cache_bytes(data)
            self._filtered = data.id.get_create_plist().get_nfilters() > 0
            self._chunk_bytes = math.prod(data.chunks) * data.dtype.itemsize if data.chunks else 0

    @property
    def _piece_rows(self) -> int:
        return min(self.n_samples, max(1, PIECE_BYTES // (self.row_values * self.stored_dtype.itemsize)))

    @property
    def _direct(self) -> bool:
        # HDF5 itself turns the byte order round
        return self.stored_dtype.newbyteorder("=") == self.dtype

    def _open(self) -> h5py.Dataset:
        if self._data is None:
            self._file = open_h5(self.path)
            _find(self._file, self.key, self.path, "images_key")
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            if self._cache:
                # 0.75 is HDF5's default. Measured with 1.0: chunks read in part never left the cache, which grew by every one of them
                access.set_chunk_cache(_CACHE_SLOTS, self._cache, 0.75)
            try:
                self._data = h5py.Dataset(h5py.h5d.open(self._file.id, self.key.encode(), access))
            except H5_ERRORS as error:
                raise FileError(f"{self.path}, key {self.key}: cannot be opened ({first_line(error)})") from error
        return self._data

    def _read_slice(self, start: int, stop: int, out: np.ndarray) -> None:
        try:
            self._open().read_direct(out, np.s_[start:stop])
        except H5_ERRORS as error:
            if isinstance(error, (FileError, DataError)):
                raise
            where = f"{self.path}, key {self.key}"
            raise FileError(f"{where}: images {start} to {stop - 1} cannot be read ({first_line(error)})") from error

    def _fill(self, start, stop, out):
        out = out.reshape(stop - start, *self._stored_shape)
        if self._direct:
            if start < stop:
                self._read_slice(start, stop, out)
            if self.dtype.kind == "f":
                check_finite(out, out, start * self.row_values, self.row_values)
            return
        if self._buffer is None:
            self._buffer = np.empty((self._piece_rows, *self._stored_shape), self.stored_dtype.newbyteorder("="))
        for first in range(start, stop, len(self._buffer)):
            last = min(first + len(self._buffer), stop)
            stored, part = self._buffer[: last - first], out[first - start : last - start]
            self._read_slice(first, last, stored)
            deliver(stored, part)
            if self.stored_dtype.kind == "f":
                check_finite(stored, part, first * self.row_values, self.row_values)

    def _scratch(self, chunk_size):
        conversion = 0 if self._direct else self._piece_rows * self.row_values * self.stored_dtype.itemsize
        # a filtered chunk is unpacked beside the cache, from a packed copy of at most its size
        return {"conversion": conversion, "chunk cache": self._cache, "unpacking": 2 * self._chunk_bytes * self._filtered}

    def close(self):
        self._buffer = self._data = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_data": None, "_buffer": None}

    def _identity(self):
        return {**super()._identity(), **file_facts(self.path), "key": self.key.strip("/")}


def _read_labels(file: h5py.File, key: str, path: Path, n_samples: int) -> Iterator[np.ndarray]:
    """The labels in pieces."""
    data = _find(file, key, path, "labels_key")
    if data.shape not in ((n_samples,), (n_samples, 1)):
        raise DataError(f"{path}, key {key}: must hold one label for each of the {n_samples} images, got shape {data.shape}")
    if data.chunks is not None and math.prod(data.chunks) * data.dtype.itemsize > max(_LABEL_CHUNK, n_samples * data.dtype.itemsize):
        raise FileError(f"{path}, key {key}: labels must be stored in chunks of at most {_LABEL_CHUNK} bytes, got {data.chunks}")
    text = h5py.check_string_dtype(data.dtype)
    try:
        if text is not None and text.length is None:
            yield from variable_strings(data, path, f"{path}, key {key}")
            return
        values = data if text is None else data.asstr("utf-8")
        step = max(1, min(_LABELS, _LABEL_BYTES // data.dtype.itemsize))
        for start in range(0, n_samples, step):
            yield values[start : start + step]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, key {key}: labels must be UTF-8 ({error})") from None
    except H5_ERRORS as error:
        if isinstance(error, StreamCNNError):
            raise
        raise FileError(f"{path}, key {key}: cannot be read ({first_line(error)})") from error


def write_images_h5(
    path, blocks: Iterable[tuple], n_samples: int, image_shape: tuple[int, int, int], dtype=np.uint8, label_names=None
) -> None:
    """Write `images` (and `labels`) to a new HDF5 file, block by block; the file appears only when it is complete.

    Parameters
    ----------
    path : str or Path
    blocks : iterable of (images, labels, ...)
        images (m, height, width, channels) of `dtype`, labels (m,) integers or strings, or None in every block; more
        items are ignored.
    n_samples : int
        Images of all blocks together.
    image_shape : (height, width, channels)
    dtype : dtype
    label_names : sequence of str, optional
        What integer labels stand for, kept as `label_names`.

    Raises
    ------
    DataError
        When the blocks hold another number of images than `n_samples`, or of another shape.
    """
    path, dtype = Path(path), np.dtype(dtype)
    rows = min(n_samples, max(1, _WRITE_CHUNK // (math.prod(image_shape) * dtype.itemsize)))
    # the cache keeps the chunk that two blocks share until it is full
    with replacing(path) as temporary, creating(temporary, chunk_cache=4 * _WRITE_CHUNK) as file:
        images = file.create_dataset("images", (n_samples, *image_shape), dtype, chunks=(rows, *image_shape), fletcher32=True)
        _write_blocks(file, images, blocks)
        if label_names is not None:
            file.create_dataset("label_names", data=list(label_names), dtype=h5py.string_dtype())


def _write_blocks(file: NewFile, images: h5py.Dataset, blocks: Iterable[tuple]) -> None:
    done, n_samples, targets = 0, len(images), None
    for block, labels, *_ in blocks:
        stop = done + len(block)
        if stop > n_samples or block.shape[1:] != images.shape[1:]:
            raise DataError(
                f"blocks must hold {n_samples} images of shape {images.shape[1:]} in all, "
                f"got {stop} or more, the last block of shape {block.shape}"
            )
        if done and (labels is None) != (targets is None):
            raise DataError(f"blocks must have labels in every block or in none, the one at image {done} differs")
        images[done:stop] = block
        file.check()
        if labels is not None:
            values = label_values(labels)
            text = values.dtype.kind == "U"
            if targets is None:
                # checksums cover no variable-length strings: HDF5 keeps these elsewhere in the file
                kind, chunk = h5py.string_dtype() if text else values.dtype, (min(n_samples, 65536),)
                targets = file.create_dataset("labels", (n_samples,), kind, chunks=chunk, fletcher32=not text)
            targets[done:stop] = values.astype(object) if text else values
        done = stop
    if done != n_samples:
        raise DataError(f"blocks must hold {n_samples} images in all, got {done}")
