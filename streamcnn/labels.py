"""Labels of any accepted kind -> integer codes and the sorted values they stand for."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from streamcnn.errors import DataError

_PIECE = 1 << 16
# strings lie in NumPy padded to the longest one: a single label of a megabyte would make 65,536 of them 256 GiB
_MOST_TEXT = 1 << 28


def label_values(values, source: str = "labels") -> np.ndarray:
    """Labels as a 1-D array of native integers or of `str`.

    Parameters
    ----------
    values : array-like (n,) or (n, 1)
        Integers of any type, bool (as 0/1), floats that are whole numbers, `str` or UTF-8 bytes.
    source : str
        What to call them in an error.

    Returns
    -------
    ndarray (n,), an integer type or 'U'

    Raises
    ------
    DataError
        For any other shape or kind of value.
    """
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(f"{source} must be one value per image (n,) or (n, 1), got shape {array.shape}")
    if array.dtype.kind == "O":
        array = _from_objects(array, source)
    kind = array.dtype.kind
    if kind == "S":
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{source} given as bytes must be UTF-8: {error}") from None
    if kind == "T":  # NumPy's variable-width strings: no HDF5, no hash of fixed width
        return array.astype("U")
    if kind == "U":
        return array
    if kind == "b":
        return array.astype(np.int64)
    if kind in "iu":
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if kind == "f":
        # beyond 2**53 a float no longer holds every whole number, so such a "label" is a rounded one
        odd = ~(np.isfinite(array) & (np.abs(array) <= 2.0**53) & (array == np.round(array)))
        if odd.any():
            raise DataError(f"Unknown label type: {source} must be whole numbers or strings, got {array[odd][0]}")
        return array.astype(np.int64)
    raise DataError(f"Unknown label type: {source} must be whole numbers or strings, got type {array.dtype}")


def decoded(values):
    """`values` with UTF-8 bytes, which is how HDF5 hands over strings, made `str`; anything else as it is.

    scikit-learn refuses bytes as labels.
    """
    if isinstance(values, (list, tuple)):
        return label_values(values) if values and isinstance(values[0], bytes) else values
    if getattr(values, "dtype", None) is None:
        return values
    array = np.asarray(values)
    objects = array.dtype.kind == "O" and array.size and isinstance(array.flat[0], bytes)
    return label_values(array) if array.dtype.kind == "S" or objects else values


def _from_objects(array: np.ndarray, source: str) -> np.ndarray:
    """An object array whose values share one kind (as pandas gives them) -> an array of that kind."""
    if len(array) and all(isinstance(value, str) for value in array):
        return text_array(array.tolist(), source)
    for kinds, dtype in (((bytes,), "S"), ((bool, np.bool_), bool), ((int, np.integer), None)):
        if len(array) and all(isinstance(value, kinds) for value in array):
            return np.array(array.tolist(), dtype=dtype)
    names = sorted({type(value).__name__ for value in array})
    raise DataError(f"Unknown label type: {source} must be all whole numbers or all strings, got {', '.join(names)}")


def text_array(values: list[str], source: str = "labels") -> np.ndarray:
    """Strings as an array of 'U'.

    Raises
    ------
    DataError
        When padding all of them to the longest would take more than 256 MiB.
    """
    longest = max(map(len, values), default=0)
    if 4 * longest * len(values) > _MOST_TEXT:
        raise DataError(f"{source} must be short, but among {len(values)} of them one has {longest} characters: shorten it")
    return np.array(values, dtype="U")


def encode_labels(values, n_samples: int, source: str = "labels") -> tuple[np.ndarray, np.ndarray]:
    """Codes and sorted unique values of `values`.

    Returns
    -------
    codes : int32 (n_samples,)
        Position of each label in `classes`.
    classes : ndarray (n_classes,), an integer type or 'U'

    Raises
    ------
    DataError
        When their number is not `n_samples` or their kind is not accepted.
    """
    values = label_values(values, source)
    if len(values) != n_samples:
        raise DataError(f"{source} must have one value for each of the {n_samples} images, got {len(values)}")
    return encode_pieces((values[start : start + _PIECE] for start in range(0, n_samples, _PIECE)), n_samples, source)


def encode_pieces(pieces: Iterable, n_samples: int, source: str = "labels") -> tuple[np.ndarray, np.ndarray]:
    """`encode_labels` of labels that arrive in pieces of `n_samples` in all.

    A sort of all labels with 8 bytes of position each, or a string for each, would be the largest thing in memory for many images.
    """
    codes, done = np.empty(n_samples, np.int32), 0
    # classes in the order in which they appear
    seen: dict[Any, int] = {}
    dtype = np.dtype(np.int64)
    for piece in pieces:
        values = label_values(piece, source)
        if seen and (values.dtype.kind == "U") != (dtype.kind == "U"):
            raise DataError(f"Unknown label type: {source} must be all whole numbers or all strings, got both")
        dtype = np.promote_types(dtype, values.dtype) if seen else values.dtype
        unique, inverse = np.unique(values, return_inverse=True)
        try:
            found = unique.tolist()
        except ValueError as error:  # numbers in the place of characters
            raise DataError(f"{source} must be text of Unicode characters ({error})") from None
        places = np.array([seen.setdefault(value, len(seen)) for value in found], np.int32)
        codes[done : done + len(values)] = places[inverse.reshape(-1)]
        done += len(values)
    classes = text_array(list(seen), source) if dtype.kind == "U" else np.array(list(seen), dtype)
    order = np.argsort(classes)
    sorted_place = np.empty(len(order), np.int32)
    sorted_place[order] = np.arange(len(order))
    for start in range(0, n_samples, _PIECE):
        codes[start : start + _PIECE] = sorted_place[codes[start : start + _PIECE]]
    return codes, classes[order]


def codes_among(classes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Place of each of `classes` among those a model knows, int32, -1 for one that it does not.

    Raises
    ------
    DataError
        When it knows none.
    """
    same_kind = (classes.dtype.kind == "U") == (known.dtype.kind == "U")
    key: Callable[[Any], Any] = (lambda value: value) if same_kind else str
    places = {key(value): code for code, value in enumerate(known.tolist())}
    codes = np.array([places.get(key(value), -1) for value in classes.tolist()], np.int32)
    if (codes < 0).all():
        raise DataError(f"no class of these images is one the model knows: it was trained on {some_of(known.tolist())}")
    return codes


def unknown_classes(labels: np.ndarray, classes: np.ndarray, known: np.ndarray) -> dict[str, int]:
    """Class -> number of images, of those whose code in `known` (n_samples,) is negative."""
    counts = np.zeros(len(classes), np.int64)
    for start in range(0, len(labels), _PIECE):
        piece = slice(start, start + _PIECE)
        counts += np.bincount(labels[piece][known[piece] < 0], minlength=len(classes))
    return {str(name): count for name, count in zip(classes.tolist(), counts.tolist()) if count}


def unknown_note(unknown: dict[str, int], n_samples: int) -> str:
    """What is said of `unknown_classes`, the largest by name."""
    largest = sorted(unknown.items(), key=lambda item: -item[1])
    some = some_of([f"{name} {count:,}" for name, count in largest])
    return (
        f"{sum(unknown.values()):,} of {n_samples:,} images are of classes that the model does not know ({some}), and count as wrong: "
        "leave them out, or train it with them too"
    )


def some_of(names: Sequence[Any], most: int = 5) -> str:
    """The first of them, for people."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def labels_digest(codes: np.ndarray, classes: np.ndarray) -> str:
    """Hex SHA-256 of the labels, the same on every machine."""
    digest = hashlib.sha256(json.dumps(classes.tolist()).encode())
    for start in range(0, len(codes), _PIECE):
        digest.update(memoryview(np.ascontiguousarray(codes[start : start + _PIECE], dtype="<i8")).cast("B"))
    return digest.hexdigest()
