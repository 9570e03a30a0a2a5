"""What every image source offers, how stored pixels become delivered pixels, and the source over arrays in memory."""

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.drawing import facts_html
from streamcnn.errors import DataError, ParameterError, warn
from streamcnn.forking import ThreadLock, tell_child
from streamcnn.labels import labels_digest
from streamcnn.memory import format_bytes
from streamcnn.slicing import Pieced

PIECE_BYTES = 4 << 20
"""Largest conversion buffer, unless one image alone is larger and its source cannot be read in parts."""


def delivered_dtype(stored: Any) -> np.dtype:
    """Type in which pixels stored as `stored` are delivered: uint8 for bool and uint8, float32 for every other real type.

    Raises
    ------
    DataError
        For complex numbers, objects, strings and records.
    """
    stored = np.dtype(stored)
    if stored.kind == "b" or (stored.kind == "u" and stored.itemsize == 1):
        return np.dtype(np.uint8)
    if stored.kind in "iuf":
        return np.dtype(np.float32)
    if stored.kind == "c":
        raise DataError(f"Complex data not supported: images must be real numbers, got type {stored}")
    raise DataError(f"images must be real numbers, got type {stored}: convert them first, e.g. images.astype('float32')")


def deliver(stored: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` (delivered type) from `stored` of the same shape: uint16 divided by 257, everything else as it is."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, stored, casting="unsafe")
    if stored.dtype.kind == "u" and stored.dtype.itemsize == 2:
        np.divide(out, np.float32(257), out=out)


def check_finite(stored: np.ndarray, out: np.ndarray, first_value: int, row_values: int) -> None:
    """Refuse NaN, infinity and what float32 cannot hold in `out` (float32), delivered from `stored` (same shape).

    `first_value` is the place of the first value in the whole data, `row_values` the values of an image: they give the
    row to name. The least and the largest value show any of the three without a mask as large as the data.
    """
    if not out.size or (np.isfinite(out.min()) and np.isfinite(out.max())):
        return
    first = int(np.flatnonzero(~np.isfinite(out))[0])
    value = stored[np.unravel_index(first, stored.shape)]
    row = (first_value + first) // row_values
    if np.isnan(value):
        raise DataError(f"images must be finite: image {row} contains NaN; repair or leave out such images")
    if np.isinf(value):
        raise DataError(f"images must be finite: image {row} contains infinity; repair or leave out such images")
    raise DataError(f"images must fit float32: image {row} contains {value}, outside float32's range; rescale the images")


def resolve_shape(shape: tuple[int, ...], image_shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """(height, width, channels) of the images in an array of `shape`.

    4-D as it is, 3-D one channel, 2-D rows by `image_shape` ((H, W) or (H, W, C)), without it (1, n_features, 1).

    Raises
    ------
    DataError
        When there is no image, the number of axes is another, or `image_shape` does not agree.
    """
    if len(shape) not in (2, 3, 4):
        raise DataError(f"images must have 2 axes (n, features), 3 (n, height, width) or 4 (n, height, width, channels), got shape {shape}")
    if 0 in shape:
        raise DataError(f"images must hold at least one image of at least one pixel, got shape {shape}")
    asked = check_image_shape(image_shape)
    if len(shape) == 2:
        found = (*asked, 1)[:3] if asked else (1, shape[1], 1)
        if math.prod(found) != shape[1]:
            raise DataError(f"image_shape {asked} needs rows of {math.prod(found)} values, got rows of {shape[1]}")
    else:
        found = (*shape[1:], 1)[:3]
        if asked and asked != found[: len(asked)]:
            raise DataError(
                f"image_shape is {asked} but the array holds images of shape {found}, and only files are resized: leave image_shape out, "
                "or for a model trained with it resize the images"
            )
    height, width, channels = (int(size) for size in found)
    if len(shape) == 4 and height in (1, 3) and min(width, channels) > 4:
        warn(
            f"images of shape {found} are read as {height} x {width} pixels of {channels} channels; if they are of {height} channels, as "
            "PyTorch orders them, give images.transpose(0, 2, 3, 1)"
        )
    return height, width, channels


def check_image_shape(image_shape) -> tuple[int, ...] | None:
    """`image_shape` as a tuple of two or three positive whole numbers, or None, which `"auto"` is too."""
    if image_shape is None or (isinstance(image_shape, str) and image_shape == "auto"):
        return None
    try:
        shape = tuple(image_shape)
        valid = len(shape) in (2, 3) and all(int(size) == size and size >= 1 for size in shape)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ParameterError(f'image_shape must be (height, width), (height, width, channels) or "auto", got {image_shape!r}')
    return tuple(int(size) for size in shape)


def no_labels(
    source: "ImageSource",
    way: str = "give a folder with one subfolder per class, a file with labels, or the labels argument",
    what: str = "labels are missing",
) -> DataError:
    """The error for a source without labels that should have some: of which file or folder, and the usual reason for a folder."""
    where = "" if source.path is None else f"{source.path}: "
    flat = ", as no image lies in a subfolder (perhaps the path is one level too deep)" if source.kind == "folder" else ""
    return DataError(f"{where}{what}{flat}: {way}")


class ImageSource:
    """Images that are read chunk by chunk, as often as wanted, with labels if there are any.

    Several threads may read, one after another. A source can be pickled, and used after a fork; file handles and buffers are dropped and
    come back at the next read.

    Parameters
    ----------
    n_samples : int
    image_shape : (height, width, channels)
    stored_dtype : dtype
        Type of the pixels as stored.
    labels : (codes, classes) from `encode_labels`, or None

    Attributes
    ----------
    dtype : dtype
        Type of the delivered pixels, uint8 or float32.
    labels : int32 (n_samples,) or None
        Codes: positions in `classes_`.
    classes_ : ndarray (n_classes,) of str or integers, sorted, or None
    bad_files : list of (relative path, reason)
        Files of a folder that were left out.
    nbytes_ : int
        Bytes of all pixels, decoded, in the type they are stored in.
    n_images_read : int
        Images whose pixels have been read so far.
    n_jobs : int
        Threads that decode image files, 1 until somebody sets it; they change no pixel.
    opened_with : dict
        What `open_images` was told besides the data, as JSON; `labels` is True where they were given apart.
    """

    kind = "images"
    path: Path | None = None

    def __init__(self, n_samples: int, image_shape: tuple[int, int, int], stored_dtype, labels=None):
        self.n_samples = int(n_samples)
        self.image_shape = image_shape
        self.stored_dtype = np.dtype(stored_dtype)
        self.dtype = delivered_dtype(stored_dtype)
        self.labels: np.ndarray | None = None
        self.classes_: np.ndarray | None = None
        if labels is not None:
            self.labels, self.classes_ = labels
        self.bad_files: list[tuple[str, str]] = []
        self.n_images_read = 0
        self.n_jobs = 1
        self.opened_with: dict[str, Any] = {}
        self._labels_digest = labels_digest(*labels) if labels is not None else None
        self._reading = ThreadLock()
        tell_child(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        tell_child(self)

    def after_fork(self) -> None:
        """See `forking.tell_child`."""
        self._reading = ThreadLock()
        self.close()

    @property
    def reading_shape(self) -> tuple[int, int, int] | None:
        """`image_shape` for `open_images`, to open others as these were: where files were resized, or rows given a shape."""
        return self.image_shape if "image_shape" in self.opened_with else None

    @property
    def row_values(self) -> int:
        """Pixels times channels of one image."""
        return math.prod(self.image_shape)

    @property
    def nbytes_(self) -> int:
        return self.n_samples * self.row_values * self.stored_dtype.itemsize

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out[:stop - start]` with images `start` to `stop`.

        Parameters
        ----------
        out : ndarray (at least stop - start, height, width, channels) of `dtype`, C order

        Raises
        ------
        DataError
            For NaN, infinity or a value outside float32's range.
        FileError
            When a file cannot be read; it is named.
        """
        if not 0 <= start <= stop <= self.n_samples:
            raise ParameterError(f"rows must lie within 0 to {self.n_samples}, got {start} to {stop}")
        if out.dtype != self.dtype or out.shape[1:] != self.image_shape or len(out) < stop - start or not out.flags.c_contiguous:
            raise ParameterError(
                f"out must be a C-ordered {self.dtype} array (>= {stop - start}, {', '.join(map(str, self.image_shape))}), "
                f"got {out.dtype} {out.shape}"
            )
        with self._reading:  # one file with one place, one buffer for conversion
            self._fill(int(start), int(stop), out[: stop - start])
            self.n_images_read += int(stop - start)

    def read_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Fill `out[:len(rows)]` with the images of `rows` (sorted 1-D integers); neighbours are read together."""
        rows = np.asarray(rows)
        if len(rows) > 1 and not (np.diff(rows) >= 0).all():
            raise ParameterError("rows must be sorted, so that a stream is read forward only")
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)]):
            if first < last:
                self.read(int(rows[first]), int(rows[last - 1]) + 1, out[first:last])

    def iter_chunks(self, chunk_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield (images, label codes or None); images are a view of one buffer that the next step overwrites."""
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, np.integer)) or chunk_size < 1:
            raise ParameterError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
        buffer = np.empty((min(int(chunk_size), self.n_samples), *self.image_shape), self.dtype)
        for start in range(0, self.n_samples, len(buffer)):
            stop = min(start + len(buffer), self.n_samples)
            self.read(start, stop, buffer)
            yield buffer[: stop - start], None if self.labels is None else self.labels[start:stop]

    def fingerprint(self) -> str:
        """Hex SHA-256 that identifies the data; from files no pixel is read, and their folder's name does not matter."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def scratch_bytes(self, chunk_size: int) -> dict[str, int]:
        """Name -> bytes that the source itself holds while it delivers chunks of `chunk_size` images."""
        held = {} if self.labels is None or self.classes_ is None else {"labels": self.labels.nbytes + self.classes_.nbytes}
        return {**held, **{name: int(size) for name, size in self._scratch(chunk_size).items() if size}}

    def name_of(self, row: int) -> str:
        """Relative path of an image in a folder, with forward slashes; '' for other sources."""
        return ""

    def describe(self) -> dict[str, Any]:
        """Plain facts: kind, n_samples, image_shape, dtype, n_classes, path."""
        return {
            "kind": self.kind,
            "n_samples": self.n_samples,
            "image_shape": self.image_shape,
            "dtype": str(self.dtype),
            "n_classes": None if self.classes_ is None else len(self.classes_),
            "path": None if self.path is None else str(self.path),
        }

    def check(self) -> None:
        """Refuse what is known already to fail when it is read, before an hour's work.

        Raises
        ------
        DataError
            For image files of several sizes; of more than 2,000 files as far as 64 of them tell.
        """

    def close(self) -> None:
        """Let go of file handles and buffers; a later read takes them again."""

    def _fill(self, start: int, stop: int, out: np.ndarray) -> None:
        raise NotImplementedError

    def _scratch(self, chunk_size: int) -> dict[str, int]:
        return {}

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "n_samples": self.n_samples,
            "image_shape": self.image_shape,
            "dtype": self.stored_dtype.str,
            "labels": self._labels_digest,
        }

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={value!r}" for name, value in self.describe().items() if value is not None)
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        shape, labels = " x ".join(map(str, self.image_shape)), "none" if self.classes_ is None else f"of {len(self.classes_)} classes"
        shown = {"images": f"{self.n_samples:,} of {shape}", "pixels": f"{self.stored_dtype}, {format_bytes(self.nbytes_)} in all"}
        shown |= {"labels": labels, "kind": self.kind, "path": str(self.path), "left out": f"{len(self.bad_files)} files"}
        left = {"path": self.path is None, "left out": not self.bad_files}
        return facts_html({name: value for name, value in shown.items() if not left.get(name)})


def mapped_bytes(array: np.ndarray) -> int:
    """Bytes of the file that `array` maps, of which every page read stays resident; 0 where it is plain memory.

    Whole maps in C order never come here: they are read as files (`arrayfiles.FlatFileSource`). This is for slices with steps and the like.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and isinstance(base.base, mmap.mmap):
            return len(base.base)
        base = base.base
    return len(base) if isinstance(base, mmap.mmap) else 0


class ArraySource(ImageSource):
    """Images in an array, or in anything with `shape`, `dtype` and slicing along the first axis (h5py, zarr, dask, xarray).

    A NumPy array is converted straight into the caller's buffer. Anything else is asked for slices of at most
    `PIECE_BYTES` (one image, or one of its chunks, at least), which it allocates.
    """

    kind = "array"

    def __init__(self, data, image_shape: tuple[int, ...] | None = None, labels=None):
        shape = resolve_shape(tuple(data.shape), image_shape)
        super().__init__(data.shape[0], shape, data.dtype, labels)
        self._data = data if isinstance(data, np.ndarray) else Pieced(data, PIECE_BYTES)

    def _pieces(self, start: int, stop: int) -> Iterable[tuple[int, np.ndarray]]:
        """(first row, stored pixels) of neighbouring slices."""
        return self._data.pieces(start, stop) if isinstance(self._data, Pieced) else [(start, self._data[start:stop])]

    def _fill(self, start, stop, out):
        for first, stored in self._pieces(start, stop):
            # the caller's buffer takes the array's shape: the other way round would copy arrays that are not in C order
            part = out[first - start : first - start + len(stored)].reshape(stored.shape)
            deliver(stored, part)
            if self.stored_dtype.kind == "f":
                check_finite(stored, part, first * self.row_values, self.row_values)

    def _scratch(self, chunk_size):
        if isinstance(self._data, np.ndarray):
            return {"mapped pages": mapped_bytes(self._data)}
        return self._data.claims(min(chunk_size, self.n_samples))

    def close(self):
        if isinstance(self._data, Pieced):
            self._data.close()

    def _identity(self):
        digest = hashlib.sha256()
        step = max(1, PIECE_BYTES // (self.row_values * self.stored_dtype.itemsize))
        for first in range(0, self.n_samples, step):
            for _, piece in self._pieces(first, min(first + step, self.n_samples)):
                digest.update(memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
        return {**super()._identity(), "content": digest.hexdigest()}
