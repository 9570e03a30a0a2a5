"""Preprocessing of each image by itself, so that no statistic of the data set has to be gathered first.

`standardize` takes brightness and contrast of the whole image away; `log` turns a factor of illumination into an offset, which
a filter of zero mean does not see; `smooth` averages noise away, which the logarithm of dark pixels is full of; `local_contrast`
takes away brightness and contrast around every pixel.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from streamcnn.errors import DataError, ParameterError

PREPROCESS = ("standardize", "log", "smooth", "local_contrast")
# of a logarithm a contrast of 10 %; of pixels a tenth of a grey level: below their noise
EPSILON = 0.1


def contrast_window(image_shape: tuple[int, ...]) -> int:
    """Side of the box of `local_contrast`: a tenth of the image's shorter side, 9 at least; odd. Of 96 x 84 pixels 9, of 192 x 168 17."""
    return 2 * max(4, min(image_shape[:2]) // 21) + 1


def smooth_window(image_shape: tuple[int, ...]) -> int:
    """Side of the box of `smooth`, a quarter of the reach of `contrast_window`: 3 up to 167 pixels, then 5 and so on."""
    return 2 * (contrast_window(image_shape) // 8) + 1


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
    windows = {"local_contrast": contrast_window(image_shape), "smooth": smooth_window(image_shape)}
    return max((kernels.contrast_scratch(image_shape, windows[step]) for step in steps if step in windows), default=0)


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
        elif step == "smooth":
            kernels.smooth(images, smooth_window(images.shape[1:]), scratch, out)
        else:
            kernels.local_contrast(images, contrast_window(images.shape[1:]), EPSILON, scratch, out)
        images = out
