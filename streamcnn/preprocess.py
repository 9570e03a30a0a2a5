"""Preprocessing of each image by itself, so that no statistic of the data set has to be gathered first.

`standardize` takes brightness and contrast of the whole image away; `log` turns a factor of illumination into an offset, which
a filter of zero mean does not see; `local_contrast` takes away brightness and contrast around every pixel.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from streamcnn.errors import DataError, ParameterError

PREPROCESS = ("standardize", "log", "local_contrast")
# about two facial features of a 48 pixel face, and a tenth of a grey level: below the noise of 8-bit pixels
WINDOW = 9
EPSILON = 0.1


def resolve_preprocess(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the steps, in order: `None` is no step, a string one.

    Raises
    ------
    ParameterError
        For an unknown name.
    """
    if value is None:
        return ()
    steps = (value,) if isinstance(value, str) else value
    if not isinstance(steps, (tuple, list)):
        raise ParameterError(f"preprocess must be None, a name or a sequence of names ({', '.join(PREPROCESS)}), got {value!r}")
    for step in steps:
        if step not in PREPROCESS:
            raise ParameterError(f"preprocess knows {', '.join(PREPROCESS)}, got {step!r}")
    return tuple(steps)


def scratch(steps: tuple[str, ...], image_shape: tuple[int, int, int], kernels: ModuleType) -> int:
    """float32 numbers of scratch per thread that `apply` needs."""
    return kernels.contrast_scratch(image_shape, WINDOW) if "local_contrast" in steps else 0


def apply(steps: tuple[str, ...], images: np.ndarray, scratch: np.ndarray, out: np.ndarray, kernels: ModuleType) -> None:
    """Run the steps over a chunk: the first from `images` to `out`, the others in place.

    Parameters
    ----------
    steps : tuple of str
        At least one.
    images : ndarray of shape (n, height, width, channels), uint8 or float32, C-contiguous
    scratch : ndarray of shape (n_threads, m), float32
        m is at least `scratch(...)`; its rows are the number of threads.
    out : ndarray of shape (n, height, width, channels), float32, C-contiguous
    kernels : module
        From `get_kernels`.

    Raises
    ------
    DataError
        When `log` meets a value below 0.
    """
    for step in steps:
        if step == "standardize":
            kernels.standardize(images, out, len(scratch))
        elif step == "log":
            if images.dtype != np.uint8 and images.size and images.min() < 0:
                raise DataError(
                    f'preprocess "log" needs pixels of at least 0, got {images.min()}: put it before the other steps, or leave it out'
                )
            kernels.log(images, out, len(scratch))
        else:
            kernels.local_contrast(images, WINDOW, EPSILON, scratch, out)
        images = out
