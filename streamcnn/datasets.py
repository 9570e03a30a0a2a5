"""Data sets for demonstrations, tests and the paper's experiment: digits, a digit stream of any length, Extended Yale B."""

import math
import re
from pathlib import Path

import numpy as np

from streamcnn.errors import DataError, FileError, ParameterError
from streamcnn.imagefiles import Listing, list_images
from streamcnn.images import FolderSource
from streamcnn.variations import Variations, check_whole, hash_counters, seed_key


def load_digits_images(size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled digits, enlarged.

    Parameters
    ----------
    size : int
        Side in pixels.

    Returns
    -------
    images : uint8 (1797, size, size, 1)
        Bilinear between pixel centres (edges repeated) from 8 x 8; 0 to 16 become 0 to 255.
    labels : int64 (1797,)
    """
    check_whole("size", size, 1)
    digits, labels = _digits()
    place = np.clip((np.arange(size) + 0.5) * (8 / size) - 0.5, 0, 7)
    low = np.minimum(place.astype(int), 6)
    part = (place - low).astype(np.float32)
    tall = digits[:, low] * (1 - part)[:, None] + digits[:, low + 1] * part[:, None]
    images = np.empty((len(digits), size, size, 1), np.uint8)
    for row, image in enumerate(tall):
        images[row, :, :, 0] = np.rint(image[:, low] * (1 - part) + image[:, low + 1] * part)
    return images, labels


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits (1797, 8, 8) float32 from 0 to 255, and labels int64."""
    from sklearn.datasets import load_digits  # a second of import that other sources need not pay

    bunch = load_digits()
    return bunch.images.astype(np.float32) * np.float32(255 / 16), bunch.target.astype(np.int64)


def digits_split(seed: int = 0) -> np.ndarray:
    """Which of the 1797 digits are for training: bool (1797,), 80 % of each class, drawn by a hash of (seed, row)."""
    labels = _digits()[1]
    draws = hash_counters(seed_key(seed), np.arange(len(labels)))
    train = np.zeros(len(labels), bool)
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        train[rows[np.argsort(draws[rows], kind="stable")][: round(0.8 * len(rows))]] = True
    return train


class EnlargedDigits(Variations):
    """Digits enlarged and distorted, as many as wanted, computed when they are read.

    Row r is a pure function of (seed, r): which original, how it is turned (up to 12 degrees), scaled (0.85 to 1.15) and moved
    (up to 10 %), and its noise. So any chunk of any range has the same pixels, and a longer stream starts with a shorter one.

    Parameters
    ----------
    n_samples : int
    size : int
        Side in pixels.
    seed : int
    originals : array of int, optional
        Rows of the 1797 digits to draw from, all by default; see `digits_split`.

    Attributes
    ----------
    original_index : int64 (n_samples,)
        Row of the digit that each image was made from.
    """

    kind = "digits"

    def __init__(self, n_samples: int, size: int = 64, seed: int = 0, originals=None):
        check_whole("size", size, 1)
        digits, digit_labels = _digits()
        allowed = np.arange(len(digits)) if originals is None else np.asarray(originals, dtype=np.int64)
        if allowed.ndim != 1 or not len(allowed) or allowed.min() < 0 or allowed.max() >= len(digits):
            raise ParameterError(f"originals must be rows of the digits, 0 to {len(digits) - 1}, at least one")
        self.size = int(size)
        super().__init__(np.pad(digits, ((0, 0), (1, 1), (1, 1))), digit_labels, n_samples, (size, size, 1), seed, allowed)

    def _vary(self, keys, originals, out, n_threads):
        from streamcnn.kernels.warp import warp  # numba is loaded by those who draw digits only

        warp(self._pictures, keys, originals, out[:, :, :, 0], n_threads)


def enlarged_digits(n_samples: int, size: int = 64, seed: int = 0, originals=None) -> EnlargedDigits:
    """A stream of `n_samples` distorted digits of size x size; see `EnlargedDigits`."""
    return EnlargedDigits(n_samples, size, seed, originals)


_YALE_NAME = re.compile(r"yaleB(?P<person>\d\d)_P\d\dA(?P<azimuth>[+-]\d{3})E(?P<elevation>[+-]\d{2})\.pgm")
_YALE_PERSONS = [f"yaleB{number:02d}" for number in range(1, 40) if number != 14]
_YALE_LIMITS = (12.0, 25.0, 52.0, 77.0)
YALE_SIZES = {1: 263, 2: 456, 3: 455, 4: 526, 5: 714}


def yale_subset(azimuth: float, elevation: float) -> int:
    """Subset 1 to 5 of Extended Yale B by the angle between light and camera axis, arccos(cos A cos E), in degrees.

    Up to 12, 25, 52 and 77 degrees, and the rest. The literature's third limit is 50, but its 455 images include A +-35 E +40
    at 51.1 degrees. The tolerance of 1e-6 is for A +-25 E 0, which plain floating point puts above 25.
    """
    cosine = math.cos(math.radians(azimuth)) * math.cos(math.radians(elevation))
    angle = math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
    return 1 + sum(angle > limit + 1e-6 for limit in _YALE_LIMITS)


def extended_yale_b(folder, image_size: tuple[int, int] = (96, 84)) -> dict[int, FolderSource]:
    """The five subsets of the cropped Extended Yale Face Database B.

    Parameters
    ----------
    folder : str or Path
        As distributed: yaleB01 to yaleB39 without 14, PGM files of 192 x 168. `*_Ambient.pgm`, `.info` and `.bad` are left aside.
    image_size : (height, width)
        Every image is resized to it; the original size halved is the mean of 2 x 2 pixels.

    Returns
    -------
    dict of int -> FolderSource
        Subset 1 to 5; labels are the names of the 38 persons' folders.

    Raises
    ------
    FileError
        When the folder is missing.
    DataError
        When a subset has another number of images than 263, 456, 455, 526, 714.

    References
    ----------
    Georghiades, Belhumeur, Kriegman, PAMI 2001; Lee, Ho, Kriegman, PAMI 2005.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileError(f"{root}: no such folder")
    if len(tuple(image_size)) != 2:
        raise ParameterError(f"image_size must be (height, width), got {image_size!r}")
    names: dict[int, list[str]] = {subset: [] for subset in YALE_SIZES}
    for name in list_images(root).names:
        person, _, file = name.partition("/")
        match = _YALE_NAME.fullmatch(file)
        if match and person in _YALE_PERSONS and person == f"yaleB{match['person']}":
            names[yale_subset(float(match["azimuth"]), float(match["elevation"]))].append(name)
    for subset, size in YALE_SIZES.items():
        if len(names[subset]) != size:
            raise DataError(
                f"{root}: subset {subset} must have {size} images, found {len(names[subset])}; "
                "give the standard cropped folder (yaleB01 to yaleB39), complete"
            )
    sources = {}
    for subset in YALE_SIZES:
        persons = [name.partition("/")[0] for name in names[subset]]
        classes = sorted(set(persons))
        if classes != _YALE_PERSONS:
            raise DataError(f"{root}: subset {subset} must have images of all 38 persons, found {len(classes)}")
        codes = np.array([classes.index(person) for person in persons], np.int32)
        sources[subset] = FolderSource(root, Listing.of(root, names[subset], classes, codes), (*image_size, 1))
    return sources
