"""Image sources: `open_images` for arrays, HDF5, `.npy`, `.npz` and folders; the source over image files."""

import math
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.arrayfiles import FlatFileSource, memmap_origin, open_npy, open_npz
from streamcnn.errors import DataError, FileError, ParameterError, warn
from streamcnn.h5images import H5Source, write_images_h5
from streamcnn.imagefiles import (
    EXTENSIONS,
    NO_CAPS,
    REPAIR,
    Caps,
    Decoder,
    Header,
    Listing,
    is_image_name,
    list_images,
    listing_of_file,
    read_decode_bytes,
    read_header,
    read_size,
)
from streamcnn.labels import encode_labels
from streamcnn.slicing import check_known, is_sliced
from streamcnn.sources import ArraySource, ImageSource, check_finite, check_image_shape
from streamcnn.system import resident_bytes
from streamcnn.untrusted import check_regular

__all__ = ["ArraySource", "FlatFileSource", "FolderSource", "H5Source", "ImageSource", "open_images", "write_images_h5"]

_PROBED = 64
_H5_SUFFIXES = (".h5", ".hdf5")
# bytes a pixel of the costliest mode; where that is little for every file, their headers need not be read for it
_COSTLIEST_MODE, _SMALL_DECODING = 32, 16 << 20
# files whose sizes are all asked before anything runs: 0.4 s for 2,000 small JPEG files, 0.2 s for PNG
_CHECKED = 2_000
# of images that rows may be: shorter rows are hardly images
_SMALLEST_SIDE = 8
# bad files that even a small folder may have
_FEW_BAD = 3
_STORED = {8: np.uint8, 16: np.uint16, 32: np.float32}


class FolderSource(ImageSource):
    """Images in files, decoded one at a time.

    Size comes from the first file; colour and bits from up to 64 files spread evenly over the listing. With `image_shape`
    every file is resized. Then, and for large images, every header is read once: it takes the costliest file to say what
    decoding will hold.

    Parameters
    ----------
    root : Path
    listing : Listing
    image_shape : (height, width) or (height, width, 1 or 3), or None
        With channels, colour files may become grey.
    labels : array-like (files of the listing,), or None
        Instead of the folders' names.
    on_error : "raise" or "skip"
        "skip" decodes every file once now and leaves out those that fail: at most 1 % of them, or up to 3 that are fewer than half.
    known_bad : iterable of (relative path, reason), or None
        `bad_files` of an earlier run: exactly these are left out, and nothing is decoded now.
    caps : Caps
        What a file may take.
    """

    kind = "folder"

    def __init__(
        self,
        root: Path,
        listing: Listing,
        image_shape: tuple[int, ...] | None = None,
        labels=None,
        on_error: str = "raise",
        known_bad: Iterable[tuple[str, str]] | None = None,
        caps: Caps = NO_CAPS,
    ):
        self.path = self._root = root
        self._digest = listing.digest
        known = None if known_bad is None else dict(known_bad)
        bad = known or {}
        asked = check_image_shape(image_shape)
        caps = replace(caps, resized=asked is not None)
        if asked and asked[2:] not in ((), (1,), (3,)):
            raise ParameterError(f"image_shape for image files must have 1 or 3 channels, got {asked}")
        tolerated = set(listing.names) if on_error == "skip" else set(bad)
        headers = self._probe(listing.names, tolerated, caps)
        first = headers[min(headers)]
        height, width = asked[:2] if asked else (first.height, first.width)
        channels = asked[2] if asked and len(asked) == 3 else (3 if any(header.colour for header in headers.values()) else 1)
        bits = max(header.bits for header in headers.values())
        self._decoder = Decoder(height, width, channels, bits, asked is not None, asked is not None and len(asked) == 3, caps)
        # in larger folders only where the probe shows that they differ; those left out as bad may be of any size
        uneven = len(listing.names) <= _CHECKED or any((h.height, h.width) != (height, width) for h in headers.values())
        self._sizes_unknown = uneven and not (asked or tolerated)
        self._decoding = _COSTLIEST_MODE * height * width
        if asked or self._decoding > _SMALL_DECODING:
            self._decoding = self._costliest_file(listing.names, tolerated, caps)

        encoded = self._encode(listing, labels)
        super().__init__(len(listing.names), (height, width, channels), _STORED[bits], encoded)
        if labels is None:
            self._labels_digest = None  # the digest of the listing has the class folders' names
        self._names = listing.names
        if known is None and on_error == "skip":
            bad = self._find_bad()
        self._leave_out(bad)

    def _probe(self, names: list[str], tolerated: set[str], caps: Caps) -> dict[int, Header]:
        """Headers by row, of up to 64 files spread evenly.

        Files known as bad are asked too, and may fail, so that a run that is told of them decides as the run that found them.
        """
        headers: dict[int, Header] = {}
        failure: Exception | None = None
        spread = _spread(len(names))
        for row in spread:
            try:
                headers[row] = read_header(self._root / names[row], caps)
            except (FileError, DataError) as error:
                failure = error
                if names[row] not in tolerated:
                    raise
        if not headers:
            raise DataError(f"{self._root}: none of {len(spread)} files asked of {len(names)} can be read, the last reason: {failure}")
        return headers

    def _costliest_file(self, names: list[str], tolerated: set[str], caps: Caps) -> int:
        """Bytes that decoding the costliest file holds."""
        costliest = 0
        for name in names:
            try:
                costliest = max(costliest, read_decode_bytes(self._root / name, caps))
            except (FileError, DataError):
                if name not in tolerated:
                    raise
        return costliest

    def _encode(self, listing: Listing, labels):
        if labels is not None:
            return encode_labels(labels, len(listing.names))
        if listing.classes is None or listing.codes is None:
            return None
        return listing.codes, np.array(listing.classes)

    def _find_bad(self) -> dict[str, str]:
        image = np.empty(self.image_shape, self.dtype)
        bad = {}
        for row, name in enumerate(self._names):
            try:
                self._decode(row, image)
            except (FileError, DataError) as error:
                bad[name] = str(error).removeprefix(f"{self._root / name}: ").removesuffix(REPAIR)
        self.n_images_read += len(self._names)
        n = len(self._names)
        if len(bad) > max(n // 100, min(_FEW_BAD, (n - 1) // 2)):
            name, reason = next(iter(bad.items()))
            raise DataError(
                f'on_error="skip" (--skip-bad) leaves out at most 1 % of the files, or up to {_FEW_BAD} that are fewer than half, but '
                f"{len(bad)} of {n} in {self._root} cannot be used, the first: {name}: {reason}"
            )
        return bad

    def _leave_out(self, bad: dict[str, str]) -> None:
        kept = [row for row, name in enumerate(self._names) if name not in bad]
        if not kept:
            raise DataError(f"{self._root}: all {len(self._names)} files are in known_bad; leave known_bad out")
        if len(kept) < len(self._names):
            self.bad_files = [(name, bad[name]) for name in self._names if name in bad]
            self._names = [self._names[row] for row in kept]
            self.n_samples = len(kept)
            if self.labels is not None and self.classes_ is not None:
                # a class may have lost its only file
                left, codes = np.unique(self.labels[kept], return_inverse=True)
                self.labels, self.classes_ = codes.reshape(-1).astype(np.int32), self.classes_[left]
        self._names_bytes = sys.getsizeof(self._names) + sum(map(sys.getsizeof, self._names))

    def _decode(self, row: int, out: np.ndarray) -> None:
        path = self._root / self._names[row]
        self._decoder.into(path, out)
        if self._decoder.bits == 32:
            try:
                check_finite(out, out, row * self.row_values, self.row_values)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None

    def _fill(self, start, stop, out):
        n_threads = min(self.n_jobs, stop - start)
        if n_threads <= 1:
            for row in range(start, stop):
                self._decode(row, out[row - start])
            return
        # Pillow decodes without the interpreter's lock; the first file that fails, in order of rows, is the one that is named
        with ThreadPoolExecutor(n_threads) as pool:
            for _ in pool.map(lambda row: self._decode(row, out[row - start]), range(start, stop)):
                pass

    def name_of(self, row):
        return self._names[row]

    def _scratch(self, chunk_size):
        # on the way to the final size Pillow may hold a picture of up to four times its sides
        height, width, _ = self.image_shape
        resizing = 64 * height * width if self._decoder.resize else 0
        return {"names": self._names_bytes, "decoded file": (self._decoding + resizing) * max(1, min(self.n_jobs, chunk_size))}

    def check(self) -> None:
        if not self._sizes_unknown:
            return
        decoder = self._decoder
        for path in (self._root / name for name in self._names):
            size, expected = read_size(path, decoder.caps), (decoder.width, decoder.height)
            if size != expected and size[::-1] == expected:  # perhaps a PNG that is turned, which decoding tells
                header = read_header(path, decoder.caps)
                size = header.width, header.height
            if size != expected:
                raise decoder.wrong_size(path, size)
        self._sizes_unknown = False

    def _identity(self):
        # not the number of samples: which files are bad does not change what the folder is
        facts = {**super()._identity(), "listing": self._digest, "image_shape": self.image_shape}
        return {name: value for name, value in facts.items() if name != "n_samples"}


def _spread(n_files: int) -> list[int]:
    """Up to 64 rows spread evenly over `n_files`, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, n_files - 1, min(n_files, _PROBED)).tolist()})


def open_images(
    data: Any,
    labels: Any = None,
    *,
    images_key: str | None = None,
    labels_key: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    on_error: str = "raise",
    known_bad: Iterable[tuple[str, str]] | None = None,
    need_labels: bool = False,
    memory_limit: int | None = None,
) -> ImageSource:
    """Open images for reading chunk by chunk.

    Parameters
    ----------
    data : path, array-like or ImageSource
        A class-per-folder tree or flat folder of images, one image file, an `.h5` or `.hdf5`, `.npz` or `.npy` file; an
        array (n, height, width, channels), (n, height, width) or rows (n, features), in memory, memory-mapped, or anything
        with shape, dtype and slicing (zarr, dask, xarray); a source is returned as it is.
    labels : array-like (n,), optional
        Integers, whole floats or strings; used instead of those stored with the images.
    images_key, labels_key : str, optional
        Names inside an HDF5 or `.npz` file; by default `images` and `labels` (`.npz` also `X` and `y`).
    image_shape : (height, width) or (height, width, channels), optional
        For rows: their shape. For image files: the size to bring every file to.
    on_error : "raise" or "skip"
        What to do with a file of a folder that cannot be read.
    known_bad : iterable of (relative path, reason), optional
        `bad_files` of an earlier run, to be left out again without looking for others.
    need_labels : bool
        Whether images without labels are an error.
    memory_limit : int, optional
        Bytes for the whole process: an image file whose decoding would pass what is left of them is refused before it is decoded, and
        labels before they are read.

    Returns
    -------
    ImageSource

    Raises
    ------
    FileError
        When a file or folder is missing, unreadable or not what its name says.
    DataError
        When pixels or labels have the wrong shape, type or number.
    ParameterError
        For a wrong `on_error` or `image_shape`.
    MemoryBudgetError
        For an image file, or labels, too large for `memory_limit`.

    Examples
    --------
    >>> import numpy as np
    >>> from streamcnn.images import open_images
    >>> open_images(np.zeros((5, 8, 8), np.uint8), labels=list("abbab")).classes_.tolist()
    ['a', 'b']
    """
    if on_error not in ("raise", "skip"):
        raise ParameterError(f'on_error must be "raise" or "skip", got {on_error!r}')
    if isinstance(data, (str, Path)):
        options = (image_shape, on_error, known_bad, memory_limit)
        source = _open_path(Path(data), labels, images_key, labels_key, options, need_labels)
    elif isinstance(data, ImageSource):
        if labels is not None:
            raise ParameterError("labels cannot be given beside an image source; open the images with them: open_images(data, labels)")
        source = data
    else:
        source = _open_array(data, labels, image_shape)
    if source is not data:
        shape = None if image_shape is None else [int(side) for side in image_shape]
        told = {"labels": labels is not None, "images_key": images_key, "labels_key": labels_key, "image_shape": shape}
        source.opened_with = {name: value for name, value in told.items() if value} | ({"on_error": "skip"} if on_error == "skip" else {})
    if need_labels and source.labels is None:
        raise DataError("labels are needed, and there are none: give one label per image, a folder per class, or a file that holds labels")
    return source


def check_no_paths(X: Any) -> None:
    """Refuse a list of files: what is opened is an array, or one path.

    Raises
    ------
    DataError
    """
    if isinstance(X, (list, tuple)) and X and isinstance(X[0], (str, Path)):
        raise DataError(
            f"images must be an array, a folder or one file, got a list of paths, the first {str(X[0])!r}: give their folder, with a "
            "subfolder for each class where there are labels, or read them into an array"
        )


def check_several(X: Any, image_shape: tuple[int, int, int]) -> None:
    """Refuse one image of `image_shape` without the axis of images, whose rows would be taken for images.

    Raises
    ------
    DataError
    """
    shape = tuple(getattr(X, "shape", ()))
    if image_shape[0] > 1 and (shape == image_shape or (*shape, 1) == image_shape):
        raise DataError(f"images must have an axis of images before the others, got one image of shape {shape}: give X[np.newaxis]")


def warn_of_rows(source: ImageSource) -> None:
    """Say that rows whose length is a square number are taken as one line of pixels each, unless an `image_shape` was given."""
    height, width, channels = source.image_shape
    side = math.isqrt(width)
    if height == channels == 1 and side >= _SMALLEST_SIDE and side**2 == width and "image_shape" not in source.opened_with:
        warn(
            f"rows of {width} values are taken as images of 1 x {width} pixels; if they are of {side} x {side}, give "
            f"image_shape=({side}, {side}) (--image-size {side}x{side})"
        )


def decoding_caps(memory_limit: int | None) -> Caps:
    """What a file may take under a limit in bytes: what is left of it now, but never less than 16 MiB, so that a limit which is far too
    small is refused by the plan, with its table."""
    if memory_limit is None:
        return NO_CAPS
    return Caps(decode_bytes=max(_SMALL_DECODING, memory_limit - resident_bytes()))


def _open_path(path: Path, labels, images_key, labels_key, options, need_labels: bool) -> ImageSource:
    image_shape, on_error, known_bad, memory_limit = options
    caps = decoding_caps(memory_limit)
    try:
        if not path.exists():
            raise FileError(f"{path}: no such file or folder")
        if not path.is_dir():
            check_regular(path)
        if path.is_dir():
            return FolderSource(path, list_images(path), image_shape, labels, on_error, known_bad, caps)
        suffix = path.suffix.lower()
        if suffix in _H5_SUFFIXES:
            return H5Source(path, images_key, labels_key, image_shape, labels, need_labels, memory_limit)
        if suffix == ".npz":
            return open_npz(path, labels, images_key, labels_key, image_shape, need_labels, memory_limit)
        if suffix == ".npy":
            return open_npy(path, labels, image_shape, need_labels, memory_limit)
        if is_image_name(path.name):
            return FolderSource(path.parent, listing_of_file(path), image_shape, labels, caps=caps)
    except DataError as error:
        raise error if str(error).startswith(str(path)) else DataError(f"{path}: {error}") from None
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    raise FileError(f"{path}: not a supported kind of file; supported are folders, .h5, .hdf5, .npz, .npy and {' '.join(EXTENSIONS)}")


def _open_array(data: Any, labels, image_shape) -> ImageSource:
    if hasattr(data, "tocsr"):
        raise DataError("images must be a dense array, got a sparse matrix; give images.toarray()")
    check_no_paths(data)
    if is_sliced(data):
        check_known(data, "images")
    elif not isinstance(data, np.ndarray):
        try:
            data = np.asarray(data)
        except ValueError as error:
            raise DataError(f"images must be an array whose images have one shape ({str(error).splitlines()[0]})") from None
    encoded = None
    if labels is not None:
        if len(data.shape) == 0:
            raise DataError("images must be an array of at least 2 axes, got a single value")
        encoded = encode_labels(labels, data.shape[0])
    if isinstance(data, h5py.Dataset) and data.file.mode == "r" and data.file.driver in ("sec2", "stdio", "windows"):
        # a file that nobody writes is identified by its time of change: no pass over its pixels for the fingerprint
        return H5Source(Path(data.file.filename), data.name, None, image_shape, labels)
    origin = memmap_origin(data) if isinstance(data, np.ndarray) else None
    if origin is not None:
        path, offset = origin
        return FlatFileSource(path, data.shape, data.dtype, offset, kind="memmap", image_shape=image_shape, labels=encoded)
    return ArraySource(data, image_shape, encoded)
