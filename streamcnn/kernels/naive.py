"""The kernels once more in float64 with numpy alone: the reference that the fast ones are held to. See the package.

Slow on purpose: every formula as it is written down, one image and one row or cell at a time.
"""

from itertools import pairwise

import numpy as np

from streamcnn.kernels import ACTIVATIONS, POOLS

__all__ = [
    "WRITES_HALF",
    "contrast_scratch",
    "conv_lanes",
    "conv_layer",
    "conv_scratch",
    "local_contrast",
    "log",
    "pending_bytes",
    "smooth",
    "standardize",
]

WRITES_HALF = False


def conv_scratch(image_shape, filters_shape, out_shape, padding: int, patch_norm: float | None = None) -> int:
    """No scratch: the reference allocates what it needs for one image."""
    return 0


def conv_lanes(n: int, n_filters: int) -> int:
    """1: images lie as they are; see the package."""
    return 1


@np.errstate(invalid="ignore", over="ignore")  # inf - inf is NaN here as everywhere, without a warning
def conv_layer(
    images, filters, bias, stride, padding, activation, threshold, pool, row_edges, col_edges, scratch, out, patch_norm=None
) -> None:
    """Convolution, activation and pooling of every image; see the package."""
    n_rows, n_cols = filters.shape[1:3]
    weights, t = filters.astype(np.float64), float(threshold)
    for image, result in zip(images, out):
        padded = np.pad(image.astype(np.float64), ((padding, padding), (padding, padding), (0, 0)))
        responses = np.empty((row_edges[-1], col_edges[-1], len(filters)))
        for y in range(row_edges[-1]):
            for x in range(col_edges[-1]):
                window = padded[y * stride : y * stride + n_rows, x * stride : x * stride + n_cols]
                deviation = 1.0 if patch_norm is None else np.sqrt(window.var() + patch_norm)
                responses[y, x] = (weights * window).sum(axis=(1, 2, 3)) / deviation + bias
        activated = _activate(responses, activation, t)
        for i, (top, bottom) in enumerate(pairwise(row_edges)):
            for j, (left, right) in enumerate(pairwise(col_edges)):
                cell = activated[top:bottom, left:right]
                result[i, j] = cell.mean(axis=(0, 1)) if pool == POOLS["mean"] else cell.max(axis=(0, 1))


def _activate(r: np.ndarray, activation: int, t: float) -> np.ndarray:
    if activation == ACTIVATIONS["relu"]:
        return np.maximum(r - t, 0)
    if activation == ACTIVATIONS["abs"]:
        return np.maximum(np.abs(r) - t, 0)
    if activation == ACTIVATIONS["clip"]:
        return np.minimum(np.maximum(r, -1), 1)
    return np.concatenate([np.maximum(r - t, 0), np.maximum(-r - t, 0)], axis=-1)


def standardize(images, out, n_threads: int = 1) -> None:
    """(x - mean) / deviation of each image; see the package."""
    for image, result in zip(images, out):
        x = image.astype(np.float64)
        deviation = x.std()
        result[...] = (x - x.mean()) / deviation if deviation != 0 else 0


def log(images, out, n_threads: int = 1) -> None:
    """log(1 + x); see the package."""
    for image, result in zip(images, out):
        result[...] = np.log1p(image.astype(np.float64))


def contrast_scratch(image_shape, window: int) -> int:
    """No scratch: the reference allocates what it needs for one image."""
    return 0


def local_contrast(images, window: int, epsilon: float, scratch, out) -> None:
    """(x - local mean) / (local deviation + epsilon); see the package."""
    half = window // 2
    for image, result in zip(images, out):
        x = image.astype(np.float64)
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                box = x[max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1]
                result[i, j] = (x[i, j] - box.mean(axis=(0, 1))) / (box.std(axis=(0, 1)) + epsilon)


def smooth(images, window: int, scratch, out) -> None:
    """Local mean; see the package."""
    half = window // 2
    for image, result in zip(images, out):
        x = image.astype(np.float64)
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                result[i, j] = x[max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1].mean(axis=(0, 1))


def pending_bytes(steps: tuple[str, ...], patch_norm: bool = False) -> int:
    """What float16 conversion and checksums, the compiled kernels beside this reference, will add; see the package."""
    from streamcnn.kernels import checksum, half, jit

    return jit.pending_bytes([*half.KERNELS, *checksum.KERNELS])
