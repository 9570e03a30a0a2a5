"""Convolution layers and their shape arithmetic: kernel and pooling sizes for the images at hand."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from streamcnn.errors import ParameterError
from streamcnn.kernels import ACTIVATIONS, POOLS

# pooling windows along the longer side at most, for each word that `pool_size` may be
AUTO_WINDOWS = {"auto": 7, "fine": 48}
# rows and columns at most where `pool_grid` is "auto"
AUTO_GRID = 5
# numbers of a window where `kernel_size` is "auto": whitening takes memory with their square and time with their cube
LARGEST_PATCH = 512


@dataclass(frozen=True)
class ConvLayer:
    """One layer: convolution by random filters or data patches, activation, pooling.

    With `r = gain * (w * x) + bias` and `t = threshold` the activations are: relu `max(r - t, 0)`; abs `max(|r| - t, 0)`;
    clip `min(max(r, -1), 1)`; split the channels `max(r - t, 0)` of all filters, then `max(-r - t, 0)` of all.
    Filters and bias, which patches alone have, are scaled in `fit` so that the mean of `|r|` over the data is one for a `gain` of one;
    `gain` and `threshold` are in that unit.

    Parameters
    ----------
    n_filters : int
        How many; with `"split"` the layer has twice as many channels.
    kernel_size : int, (int, int) or "auto"
        `"auto"` is 7 for images of at least 48 pixels a side, else 5, or the image's side where that is smaller; patches of many channels
        are smaller, so that a window has at most 512 numbers if it can.
    stride, padding : int
        The same in both directions; padding is with zeros.
    filters : "discriminating", "random" or "patches"
        `"discriminating"` keeps a drawn filter only if its similarity, eq. (2) of Lee & Lee 2017, to every filter kept before
        is at most `max_similarity`; `"random"` keeps every one. `"patches"` are whitened windows of the layer's input (Coates, Lee & Ng
        2011, see `streamcnn.patches`), different ones; the rule of similarity is not applied to them.
    max_similarity : float
        Of `"discriminating"` filters, from 0 to 1.
    similarity : "peak", "l1", "l2" or "signed"
        See `filter_similarity`.
    gain : float
        What the mean size of a response is scaled to.
    activation : "relu", "abs", "clip" or "split"
        See above.
    threshold : float
        What a response has to exceed; `clip` has none.
    pool : "mean", "max" or None
        What is taken of the responses in a window; None leaves them as they are.
    pool_size : int, "auto" or "fine"
        Side of the square windows, which do not overlap; incomplete windows are dropped. `"auto"` makes at most 7 windows
        along the longer side, `"fine"` at most 48: for images that all show the same thing in the same place, such as faces.
    pool_grid : (int, int), "auto" or None
        Pool to so many rows and columns instead; cell i covers rows floor(i*H/R) to floor((i+1)*H/R). `"auto"` is 5 x 5, or as many
        rows and columns as there are.
    patch_norm : float, "auto" or None
        Contrast normalisation, for filters of every kind: w * x of a window is divided by sqrt(v + patch_norm), v the variance of all
        the window's numbers; for patches the windows that they are drawn from are normalised so too. In squares of the layer's input: 10
        is usual for bytes. `"auto"` is a tenth of the mean v over the sample that filters are scaled on, whatever the range of pixels;
        filters of a single row or column, and images without any contrast, are not normalised, as brightness may be all there is.
    whitening : float
        For patches only: what is added to the eigenvalues of the covariance of the windows, normalised where `patch_norm` says so,
        before they are whitened. The less, the more the filters look for fine detail.
    brightness : bool
        For patches with `patch_norm` only, which looks away from it: the last of these filters is the mean of a window, which is divided
        by the same deviation as the others' responses, and brought to their mean and spread.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from streamcnn import ConvFeatures, ConvLayer
    >>> layers = [ConvLayer(8, 3, max_similarity=0.2, pool=None), ConvLayer(16, 3, activation="split", pool_grid=(2, 2))]
    >>> ConvFeatures(layers, random_state=0).fit_transform(load_digits().images).shape  # 2 x 2 cells of 2 x 16 channels
    (1797, 128)
    """

    n_filters: int
    kernel_size: Any = "auto"
    stride: int = 1
    padding: int = 0
    filters: str = "discriminating"
    max_similarity: float | None = 0.10
    similarity: str = "peak"
    gain: float = 1.0
    activation: str = "relu"
    threshold: float = 0.0
    pool: str | None = "mean"
    pool_size: Any = "auto"
    pool_grid: tuple[int, int] | str | None = None
    patch_norm: float | str | None = None
    whitening: float = 0.1
    brightness: bool = False

    def check(self) -> None:
        """Refuse values that no image could make right."""
        for name, lowest in (("n_filters", 1), ("stride", 1), ("padding", 0)):
            value = getattr(self, name)
            if not is_int(value) or value < lowest:
                raise ParameterError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
        kernel = self.kernel_size
        if kernel != "auto" and not (is_int(kernel) and kernel > 0) and not _is_int_pair(kernel):
            raise ParameterError(f'kernel_size must be a positive whole number, a pair of them or "auto", got {kernel!r}')
        if self.pool_size is not None and self.pool_size not in AUTO_WINDOWS and not (is_int(self.pool_size) and self.pool_size > 0):
            raise ParameterError(f'pool_size must be a positive whole number, "auto" or "fine", got {self.pool_size!r}')
        if (
            self.pool_grid is not None
            and not (isinstance(self.pool_grid, str) and self.pool_grid == "auto")
            and not _is_int_pair(self.pool_grid)
        ):
            raise ParameterError(f'pool_grid must be a pair of positive whole numbers, "auto" or None, got {self.pool_grid!r}')
        for name, allowed in (("filters", ("discriminating", "random", "patches")), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ParameterError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.pool is not None and self.pool not in POOLS:
            raise ParameterError(f"pool must be one of {', '.join(POOLS)} or None, got {self.pool!r}")
        if not isinstance(self.brightness, bool):
            raise ParameterError(f"brightness must be True or False, got {self.brightness!r}")
        for name in ("gain", "threshold", "whitening", "patch_norm"):
            value, least = getattr(self, name), "non-negative" if name == "threshold" else "positive"
            if name == "patch_norm" and (value is None or value == "auto"):
                continue
            if not _is_number(value) or value < 0 or (value == 0 and least == "positive"):
                choice = ', "auto" or None' if name == "patch_norm" else ""
                raise ParameterError(f"{name} must be a {least} number{choice}, got {value!r}")


def is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _is_int_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(is_int(v) and v > 0 for v in value)


@dataclass(frozen=True)
class Geometry:
    """Sizes of one layer, resolved for one image shape: everything but the filters' coefficients."""

    layer: ConvLayer
    in_shape: tuple[int, int, int]
    kernel: tuple[int, int]
    row_edges: np.ndarray
    col_edges: np.ndarray

    @property
    def filters_shape(self) -> tuple[int, int, int, int]:
        return (self.layer.n_filters, *self.kernel, self.in_shape[2])

    @property
    def multiply_adds(self) -> int:
        """Of the convolution of one image."""
        sides = (side + 2 * self.layer.padding for side in self.in_shape[:2])
        return prod(self.filters_shape) * prod((side - k) // self.layer.stride + 1 for side, k in zip(sides, self.kernel))

    @property
    def out_shape(self) -> tuple[int, int, int]:
        channels = self.layer.n_filters * (2 if self.layer.activation == "split" else 1)
        return (len(self.row_edges) - 1, len(self.col_edges) - 1, channels)


def resolve_layer(layer: ConvLayer, in_shape: tuple[int, int, int]) -> Geometry:
    """Kernel and pooling sizes for images of `in_shape` (height, width, channels).

    Raises
    ------
    ParameterError
        When an explicit size is larger than the image allows; automatic sizes shrink to what it allows.
    """
    layer.check()
    height, width = (side + 2 * layer.padding for side in in_shape[:2])
    # patches are windows of the images, not of what pads them
    highest, widest = in_shape[:2] if layer.filters == "patches" else (height, width)
    if layer.kernel_size == "auto":
        side = 7 if min(in_shape[:2]) >= 48 else 5
        while layer.filters == "patches" and side > 1 and side * side * in_shape[2] > LARGEST_PATCH:
            side -= 2
        kernel = (min(side, highest), min(side, widest))
    else:
        kernel = tuple(layer.kernel_size) if isinstance(layer.kernel_size, (tuple, list)) else (layer.kernel_size,) * 2
        if kernel[0] > highest or kernel[1] > widest:
            raise ParameterError(
                f"kernel_size of {kernel[0]} x {kernel[1]} is larger than the {highest} x {widest} pixels the layer gets: "
                f'choose at most {min(highest, widest)}, "auto", or preset "fast", which takes images of any size'
            )
    maps = [(side - k) // layer.stride + 1 for side, k in zip((height, width), kernel)]
    return Geometry(layer, in_shape, kernel, *_pool_edges(layer, *maps))


def _pool_edges(layer: ConvLayer, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """First conv row (column) of each pooling window, and the end of the last."""
    if layer.pool is None:
        return np.arange(rows + 1), np.arange(cols + 1)
    if layer.pool_grid is not None:
        grid = (min(AUTO_GRID, rows), min(AUTO_GRID, cols)) if isinstance(layer.pool_grid, str) else layer.pool_grid
        if grid[0] > rows or grid[1] > cols:
            raise ParameterError(
                f"pool_grid of {grid[0]} x {grid[1]} is finer than the {rows} x {cols} map it pools: choose at most that, larger images, "
                'or preset "fast", which takes images of any size'
            )
        return np.arange(grid[0] + 1) * rows // grid[0], np.arange(grid[1] + 1) * cols // grid[1]
    if layer.pool_size in AUTO_WINDOWS:
        side = -(-max(rows, cols) // AUTO_WINDOWS[layer.pool_size])
        size = (min(side, rows), min(side, cols))
    else:
        side = 1 if layer.pool_size is None else layer.pool_size
        size = (side, side)
        if side > rows or side > cols:
            raise ParameterError(f'pool_size of {side} is larger than the {rows} x {cols} map it pools: choose at most that, or "auto"')
    return np.arange(rows // size[0] + 1) * size[0], np.arange(cols // size[1] + 1) * size[1]


def resolve_layers(layers: Iterable[ConvLayer], image_shape: tuple[int, int, int]) -> list[Geometry]:
    """Geometry of stacked layers; each works on the output of the one before."""
    resolved: list[Geometry] = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, ConvLayer):
            raise ParameterError(f"layers must be a sequence of ConvLayer, got {layer!r} at place {number}")
        try:
            resolved.append(resolve_layer(layer, resolved[-1].out_shape if resolved else image_shape))
        except ParameterError as error:
            raise ParameterError(f"layer {number + 1}: {error}") from None
    if not resolved:
        raise ParameterError("layers must hold at least one ConvLayer, got none")
    return resolved


def layer_to_dict(layer: ConvLayer) -> dict[str, Any]:
    """A ConvLayer as JSON. `whitening` and `brightness` only where they count: digests of the other layers are older than they are."""
    values = asdict(layer)
    if layer.filters != "patches":
        del values["whitening"]
    if layer.filters != "patches" or not layer.brightness:
        del values["brightness"]
    return values


def layer_from_dict(values: dict[str, Any]) -> ConvLayer:
    """A ConvLayer from JSON, where pairs have become lists."""
    pairs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return ConvLayer(**pairs)
