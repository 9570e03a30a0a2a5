"""Filters made of the data: whitened windows ("patches") of a layer's input.

Coates, Lee & Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (AISTATS 2011), section 3: windows are taken
at random places, each is normalised for brightness and contrast, and all are whitened by ZCA. As filters serve windows themselves,
chosen at random, instead of centroids: with a soft threshold of both signs that is nearly as good (Coates & Ng, "The Importance of
Encoding Versus Training with Sparse Coding and Vector Quantization", ICML 2011).

Normalisation and whitening are folded into the filters, so that only the deviation of a window is left to its convolution. With a
window p of mean m and variance v, z = (p - m) / s, s = sqrt(v + patch_norm), mu the mean and Z = V diag(1 / sqrt(lambda + whitening)) V'
the whitening of all z, and a direction u of unit length, the response is

    u . Z (z - mu) = w . z - w . mu = ((w - mean(w)) . p) / s - w . mu    with w = Z u.

The mean of w is zero as it is: every z has mean zero, hence mu, all eigenvectors but those of eigenvalue zero, and u, which is one
Z (z - mu) brought to unit length. Without `patch_norm` z = p. Either way the filter is w, and the bias -w . mu.

These are blind to brightness. One more filter may see it: b = m / s, of mean mu_b and deviation s_b over all windows, gives the response
r (b - mu_b) / s_b, r the root mean square of the responses above, by equal weights r / (s_b size) and the bias -r mu_b / s_b.
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.linalg import eigh

from streamcnn.errors import FilterBankError
from streamcnn.rows import recut, row_hash, sample_rows
from streamcnn.threads import limit_blas

# windows that mean and covariance are taken from, or as many as there are
N_WINDOWS = 100_000
# windows of a block, in which all sums are taken
_BLOCK = 1024
# share of the contrast that normalisation leaves a window of: below this it is (nearly) constant
_FAINT = 0.01
# the same without normalisation, of its mean square: what rounding makes of a constant window
_ROUNDING = 1e-12
# of the root mean square of pixels over deviations: what rounding to float32 makes of windows that are equally bright
_FLOAT32 = 1e-6
# of the square of a window's length: what is left of its distance to the mean by rounding
_NO_DIRECTION = 1e-18
# of the median variance of windows: the largest is 15 to 22 times it in CIFAR-10, in colour and grey, 51 times in Extended Yale B
_OUTLYING = 100.0


def patch_bytes(filters_shape: tuple[int, int, int, int]) -> int:
    """Bytes that drawing filters of `filters_shape` holds at the most: blocks of windows, square matrices and filters, in float64."""
    n, kh, kw, channels = filters_shape
    size = kh * kw * channels
    return 8 * size * (12 * _BLOCK + 6 * size + 6 * n)


def draw_patches(
    maps: Iterable[np.ndarray],
    n_images: int,
    filters_shape: tuple[int, int, int, int],
    patch_norm: float | None,
    whitening: float,
    seed: int,
    fewer: bool = False,
    brightness: bool = False,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Filters of different windows, and their bias.

    Parameters
    ----------
    maps : iterable of ndarray of shape (m, height, width, channels), uint8 or float32
        The layer's input, in parts of any size, which may be overwritten by the next; read once.
    n_images : int
        In all parts.
    filters_shape : (n_filters, height, width, channels)
        Windows at most as large as the maps.
    patch_norm : float or None
    whitening : float
        What is added to the eigenvalues of the covariance.
    seed : int
        Decides which windows are taken, and which of these are filters; bits follow from it and the maps alone.
    fewer : bool
        Return fewer filters, perhaps none, where there are no more windows.
    brightness : bool
        The last filter is that of brightness; only with `patch_norm`.

    Returns
    -------
    filters : ndarray of shape `filters_shape`, float64
    bias : ndarray of shape (n_filters,), float64
    info : dict
        `n_windows`: that mean and covariance were taken from.

    Raises
    ------
    FilterBankError
        When there are fewer different windows that are not (nearly) constant, unless `fewer`.
    """
    n_filters, *kernel, _ = filters_shape
    size = prod(filters_shape[1:])
    brightness = brightness and patch_norm is not None
    n_filters -= brightness
    chosen, n_windows, bright = _Chosen(n_filters), 0, _Brightness()

    def normalised() -> Iterator[np.ndarray]:
        nonlocal n_windows
        for priorities, windows in _windows(maps, n_images, (kernel[0], kernel[1]), seed):
            contrast = windows.var(axis=1)
            faint = _ROUNDING * np.square(windows).mean(axis=1) if patch_norm is None else _FAINT * patch_norm
            chosen.offer(priorities, windows, contrast > faint)
            n_windows += len(windows)
            if brightness:
                bright.add(windows, contrast + patch_norm)
            yield _normalise(windows, patch_norm)

    block = np.empty((_BLOCK, size))
    total, squares = np.zeros(size), np.zeros((size, size))
    # one thread, so that filters never depend on how many cores there are
    with limit_blas(1):
        for _ in recut(normalised(), block):
            total += block.sum(axis=0)
            squares += block.T @ block
        mean = total / n_windows
        directions = _normalise(chosen.windows.reshape(-1, size), patch_norm)
        lengths = np.square(directions).sum(axis=1)
        directions -= mean
        # a window that is the mean of all, as when all images are one, has no direction
        directions = directions[np.square(directions).sum(axis=1) > _NO_DIRECTION * lengths]
        if len(directions) < n_filters and not fewer:
            faint = "" if patch_norm is None else f"; with patch_norm={patch_norm:g} variances up to {_FAINT * patch_norm:g} are none: "
            faint += "lower it, or scale small pixels up" if faint else ""
            besides = " and one for brightness" if brightness else ""
            raise FilterBankError(
                f"n_filters must be at most the {len(directions)} different windows of {kernel[0]} x {kernel[1]} that are not (nearly) "
                f"constant in the sample of {n_windows}{besides}, got {filters_shape[0]}: choose fewer filters, or give more images{faint}"
            )
        covariance = squares / n_windows - np.outer(mean, mean)
        whiten = _zca(covariance, whitening)
        directions = directions @ whiten
        directions /= np.sqrt(np.square(directions).sum(axis=1, keepdims=True))
        filters = directions @ whiten
        bias = -(filters @ mean)
        if brightness:
            size_of_others = np.sqrt(np.mean(np.sum(filters @ covariance * filters, axis=1))) if len(filters) else 1.0
            weight = size_of_others / bright.deviation if bright.varies else 0.0
            filters, bias = np.vstack([filters, np.full(size, weight / size)]), np.append(bias, -weight * bright.mean)
    return filters.reshape(-1, *filters_shape[1:]), bias, {"n_windows": n_windows}


def mean_variance(maps: Iterable[np.ndarray], n_images: int, kernel: tuple[int, int], seed: int) -> float:
    """Mean variance of windows of `kernel` rows and columns, in the squares of the maps' unit; arguments as in `draw_patches`.

    A variance counts as a hundred times the median at most, so that a few images in another unit do not blind the others; where that is
    zero (drawings of few lines) each counts as it is. What rounding makes of constant windows is none.
    """
    variances = []
    for _, windows in _windows(maps, n_images, kernel, seed):
        variance = windows.var(axis=1)
        variances.append(np.where(variance > _ROUNDING * np.square(windows).mean(axis=1), variance, 0.0))
    most = _OUTLYING * float(np.median(np.concatenate(variances))) or np.inf
    return sum(float(np.minimum(part, most).sum()) for part in variances) / sum(map(len, variances))


def _normalise(windows: np.ndarray, patch_norm: float | None) -> np.ndarray:
    """z of windows (m, size): see the head of this module."""
    if patch_norm is None:
        return windows
    centred = windows - windows.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + patch_norm)


def _zca(covariance: np.ndarray, whitening: float) -> np.ndarray:
    """V diag(1 / sqrt(lambda + whitening)) V' of a symmetric matrix, whose negative eigenvalues are rounding."""
    values, vectors = eigh(covariance)
    return (vectors / np.sqrt(np.maximum(values, 0) + whitening)) @ vectors.T


def _windows(maps: Iterable[np.ndarray], n_images: int, kernel: tuple[int, int], seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (priorities (m,) uint64, windows (m, size) float64), at most a block of one image at a time.

    Each image gives equally many, spread evenly; each window's priority is a hash of its number among all that there are.
    """
    number = 0
    for part in maps:
        for image in part:
            view = sliding_window_view(image, kernel, axis=(0, 1))
            rows, cols = view.shape[:2]
            n = min(rows * cols, -(-N_WINDOWS // n_images))
            places = sample_rows(rows * cols, n, int(row_hash(seed, number)[0]))
            priorities = row_hash(seed + 1, number * rows * cols + places)
            for start in range(0, n, _BLOCK):
                here = places[start : start + _BLOCK]
                # (m, channels, kh, kw) -> the filters' own order
                windows = view[here // cols, here % cols].transpose(0, 2, 3, 1)
                yield priorities[start : start + _BLOCK], windows.reshape(len(here), -1).astype(np.float64)
            number += 1


class _Brightness:
    """Mean and deviation of the brightness b of all windows: see the head of this module."""

    def __init__(self) -> None:
        self._n = 0
        # sums over the windows: b less that of the first one, its square, and the mean squared pixel over s^2
        self._first = self._total = self._squares = self._pixels = 0.0

    def add(self, windows: np.ndarray, squared: np.ndarray) -> None:
        """Take in windows (m, size) and s^2 (m,) of each."""
        b = windows.mean(axis=1) / np.sqrt(squared)
        if self._n == 0:
            self._first = b[0]  # near the mean, whose square would drown the deviation
        b -= self._first
        self._n += len(b)
        self._total += b.sum()
        self._squares += np.square(b).sum()
        self._pixels += (np.square(windows).mean(axis=1) / squared).sum()

    @property
    def mean(self) -> float:
        """mu_b."""
        return self._first + self._total / self._n

    @property
    def deviation(self) -> float:
        """s_b."""
        return np.sqrt(max(self._squares / self._n - (self._total / self._n) ** 2, 0.0))

    @property
    def varies(self) -> bool:
        """Whether the deviation is more than rounding."""
        return self.deviation > _FLOAT32 * np.sqrt(self._pixels / self._n)


class _Chosen:
    """Of all windows offered those with the smallest priorities, no two equal, in the order of their priorities."""

    def __init__(self, n: int):
        self._n = n
        self._priorities = np.empty(0, np.uint64)
        self.windows = np.empty((0, 0))

    def offer(self, priorities: np.ndarray, windows: np.ndarray, good: np.ndarray) -> None:
        """Take what belongs among the chosen of windows (m, size) that are `good` (m,)."""
        if self._n == 0:
            return
        if len(self._priorities) == self._n:
            good = good & (priorities < self._priorities[-1])
        if not good.any():
            return
        windows, priorities = windows[good], priorities[good]
        if len(self._priorities):
            windows, priorities = np.concatenate([self.windows, windows]), np.concatenate([self._priorities, priorities])
        order = np.argsort(priorities, kind="stable")
        windows, priorities = windows[order], priorities[order]
        # bytes of a row: a sort of numbers row by row takes longer. 0 + x makes one zero of two
        keys = np.ascontiguousarray(windows + 0.0).view(np.dtype((np.void, windows.shape[1] * 8))).reshape(-1)
        first = np.sort(np.unique(keys, return_index=True)[1])[: self._n]
        self.windows, self._priorities = windows[first], priorities[first]
