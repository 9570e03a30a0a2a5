"""Image sources: `open_images` for arrays, HDF5, `.npy`, `.npz` and image files, and checks of what users give it."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn.arrayfiles import FlatFileSource, memmap_origin, open_npy, open_npz
from streamcnn.errors import DataError, FileError, ParameterError, warn
from streamcnn.folderimages import SMALL_DECODING, FolderSource
from streamcnn.h5images import H5Source, write_images_h5
from streamcnn.imagefiles import EXTENSIONS, NO_CAPS, Caps, is_image_name, list_images, listing_of_file
from streamcnn.labels import encode_labels
from streamcnn.slicing import check_known, is_sliced
from streamcnn.sources import ArraySource, ImageSource, check_image_shape, no_labels
from streamcnn.system import resident_bytes
from streamcnn.untrusted import check_regular

__all__ = ["ArraySource", "FlatFileSource", "FolderSource", "H5Source", "ImageSource", "open_images", "write_images_h5"]

_H5_SUFFIXES = (".h5", ".hdf5")
# of images that rows may be: shorter rows are hardly images
_SMALLEST_SIDE = 8


def open_images(
    data: Any,
    labels: Any = None,
    *,
    images_key: str | None = None,
    labels_key: str | None = None,
    image_shape: tuple[int, ...] | str | None = None,
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
    image_shape : (height, width), (height, width, channels) or "auto", optional
        For rows: their shape. For image files: the size to bring every file to; without it a file of another size than the first is an
        error. With `"auto"`, as `fit` opens what it is given, it is one only where most files have one size: see `FolderSource`.
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
        shape = check_image_shape(image_shape) or (source.image_shape[:2] if isinstance(source, FolderSource) and source.resizes else ())
        told = {"labels": labels is not None, "images_key": images_key, "labels_key": labels_key, "image_shape": list(shape)}
        source.opened_with = {name: value for name, value in told.items() if value} | ({"on_error": "skip"} if on_error == "skip" else {})
    if need_labels and source.labels is None:
        way = "give one label per image, a folder per class, or a file that holds labels"
        raise no_labels(source, way, "labels are needed, and there are none")
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


def check_alike(source: ImageSource, image_shape: tuple[int, int, int], pixels: str) -> None:
    """Refuse images of another shape, or another dtype of pixels, than those trained on.

    Raises
    ------
    DataError
    """
    if tuple(source.image_shape) != image_shape:
        shapes = [" x ".join(map(str, shape)) for shape in (image_shape, source.image_shape)]
        size = image_shape[: 2 if source.image_shape[2] == image_shape[2] else 3]
        raise DataError(
            f"images must be {shapes[0]} (height x width x channels) as in training, got {shapes[1]}; image files are brought to that "
            f"by image_shape={size} (--image-size {'x'.join(map(str, size))})"
        )
    if source.dtype.name != pixels:
        raise DataError(f"pixels must be {pixels} as in training, got {source.dtype.name}: convert the images the same way")
    source.check()


def warn_of_rows(source: ImageSource) -> None:
    """Say that rows as long as square images, grey or in colour, are taken as one line of pixels, unless an `image_shape` was given."""
    height, width, channels = source.image_shape
    if height != 1 or channels != 1 or source.reading_shape is not None:
        return
    for colours in (1, 3):
        side = math.isqrt(width // colours)
        if side >= _SMALLEST_SIDE and colours * side**2 == width:
            shape = (side, side) if colours == 1 else (side, side, colours)
            planes = f"; where each colour has a plane of its own, images are rows.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1)"
            warn(
                f"rows of {width} values are taken as images of 1 x {width} pixels; if they are of {side} x {side}, give "
                f"image_shape={shape} (--image-size {'x'.join(map(str, shape))}){planes if colours > 1 else ''}"
            )


def decoding_caps(memory_limit: int | None) -> Caps:
    """What a file may take under a limit in bytes: what is left of it now, but never less than 16 MiB, so that a limit which is far too
    small is refused by the plan, with its table."""
    if memory_limit is None:
        return NO_CAPS
    return Caps(decode_bytes=max(SMALL_DECODING, memory_limit - resident_bytes()))


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
