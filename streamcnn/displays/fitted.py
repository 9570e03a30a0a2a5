"""Pictures of what a fit has learnt: filters, their similarities, the variance that PCA captures."""

import math
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from streamcnn.displays.base import Display, Store
from streamcnn.drawing import AMOUNTS, COLOURS, LIMIT_COLOUR, SIGNED
from streamcnn.errors import DataError, ParameterError, StoreError
from streamcnn.filters import filter_similarity, similarity_bytes
from streamcnn.layers import ConvLayer
from streamcnn.model import Model
from streamcnn.network import Network
from streamcnn.pca import StreamingPCA
from streamcnn.store import FeatureStore

# a bank of more filters is drawn in part: nobody tells more of them apart, and of similarities there are as many as pairs
MOST_FILTERS = 64
# similarities of larger filters are not computed for a picture
SIMILARITY_BYTES = 64 << 20


def network_of(thing: Any) -> Network:
    """The network of an estimator, a model, a store or its folder.

    Raises
    ------
    StoreError
        When the store has no finished filters.
    """
    if isinstance(thing, Model):
        return thing.network
    if hasattr(thing, "fit"):
        check_is_fitted(thing)
        return thing.network_ if hasattr(thing, "network_") else thing.model_.network
    entry, arrays = _stage(thing, "filters")
    return Network.from_arrays(entry["network"], arrays)


def pca_of(thing: Any) -> StreamingPCA:
    """The PCA of an estimator, a model, a store or its folder.

    Raises
    ------
    DataError
        When the model has none.
    StoreError
        When the store has no finished PCA.
    """
    if isinstance(thing, StreamingPCA):
        return thing
    if isinstance(thing, Model) or hasattr(thing, "fit"):
        if not isinstance(thing, Model):
            check_is_fitted(thing)
        pca = thing.pca if isinstance(thing, Model) else thing.model_.pca
        if pca is None:
            raise DataError("the model has no PCA to draw, as n_components was None")
        return pca
    return StreamingPCA.from_arrays(_stage(thing, "pca")[1])


def _stage(store: Any, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    digest = store.config["digests"].get(name, "")
    entry, arrays = store.finished(name, digest), store.stage_arrays(name, digest)
    if entry is None or arrays is None:
        raise StoreError(f"{store.path} holds no finished stage {name}: let the fit go on with --resume")
    return entry, arrays


class _NetworkDisplay(Display):
    """A picture of one layer's filters."""

    def __init__(self, filters, layer: int = 1):
        self.filters, self.layer = np.asarray(filters), layer

    @classmethod
    def of_network(cls, network: Network, layer: int = 1, ax=None):
        """Of a network; `layer` counts from 1."""
        if not 1 <= layer <= len(network.filters):
            raise ParameterError(f"layer must be from 1 to {len(network.filters)}, the number of layers, got {layer!r}")
        return cls(network.filters[layer - 1], layer, **cls._rule(network.geometry[layer - 1].layer)).plot(ax)

    @classmethod
    def _rule(cls, layer: ConvLayer) -> dict[str, Any]:
        """What else `__init__` takes of a layer."""
        return {}

    @classmethod
    def from_estimator(cls, estimator, layer: int = 1, *, ax=None):
        """Of a fitted estimator; `layer` counts from 1."""
        return cls.of_network(network_of(estimator), layer, ax)

    @classmethod
    def from_model(cls, model: Model, layer: int = 1, *, ax=None):
        """Of a model; `layer` counts from 1."""
        return cls.of_network(network_of(model), layer, ax)

    @classmethod
    def from_store(cls, store: Store, layer: int = 1, *, ax=None):
        """Of a store, whose fit may still be under way; `layer` counts from 1."""
        return cls.of_network(network_of(store), layer, ax)


class FilterBankDisplay(_NetworkDisplay):
    """The filters of a layer, the channels of each side by side: red is positive, blue negative, white zero.

    One scale for all, which ends where 99 of 100 coefficients are within it.

    Parameters
    ----------
    filters : array (n_filters, height, width, channels)
    layer : int
        Its number, for the title.
    """

    def _draw(self, ax):
        n, height, width, channels = self.filters.shape
        bank = self.filters[:MOST_FILTERS, :, :, :MOST_FILTERS]
        # by the largest of all, most filters would be pale
        largest = float(np.quantile(np.abs(bank), 0.99)) or 1.0
        picture = ax.imshow(_montage(bank), cmap=SIGNED, vmin=-largest, vmax=largest, interpolation="none")
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
        deep = f" x {channels} channels" if channels > 1 else ""
        part = "" if bank.shape == self.filters.shape else ", in part"
        ax.set_title(f"layer {self.layer}: {n} filters of {height} x {width}{deep}{part}")
        ax.figure.colorbar(picture, ax=ax, shrink=0.8, label="coefficient", extend="both")


def _montage(bank: np.ndarray) -> np.ndarray:
    """Filters (n, height, width, channels) as one picture, about twice as wide as high, NaN between them."""
    n, height, width, channels = bank.shape
    # one pixel between channels, two between filters
    strip = np.full((n, height + 2, channels * (width + 1) + 1), np.nan)
    for channel in range(channels):
        strip[:, :height, channel * (width + 1) : channel * (width + 1) + width] = bank[..., channel]
    columns = min(n, max(1, round(math.sqrt(2 * n * strip.shape[1] / strip.shape[2]))))
    rows = -(-n // columns)
    cells = np.full((rows * columns, *strip.shape[1:]), np.nan)
    cells[:n] = strip
    picture = cells.reshape(rows, columns, *strip.shape[1:]).transpose(0, 2, 1, 3).reshape(rows * strip.shape[1], -1)
    return picture[:-2, :-2]


class SimilarityDisplay(_NetworkDisplay):
    """Similarity of each filter of a layer to each other one, eq. (2) of Lee & Lee (2017).

    Parameters
    ----------
    filters : array (n_filters, height, width, channels)
    layer : int
        Its number, for the title.
    similarity : str
        See `filter_similarity`.
    max_similarity : float or None
        The bank's rule, marked in the colour bar; None where every filter was kept.

    Attributes
    ----------
    values_ : ndarray (n, n)
        Of the filters drawn, NaN on the diagonal.
    """

    size = (6.0, 4.5)

    def __init__(self, filters, layer: int = 1, similarity: str = "peak", max_similarity: float | None = None):
        super().__init__(filters, layer)
        self.similarity, self.max_similarity = similarity, max_similarity

    @classmethod
    def _rule(cls, layer):
        rule = layer.max_similarity if layer.filters == "discriminating" else None
        return {"similarity": layer.similarity, "max_similarity": rule}

    def _draw(self, ax):
        bank = self.filters[:MOST_FILTERS]
        if similarity_bytes(bank.shape) > SIMILARITY_BYTES:
            raise DataError(f"filters of {' x '.join(map(str, bank.shape[1:]))} are too large to be compared in a picture")
        self.values_ = filter_similarity(bank, None, self.similarity)
        # of a filter to itself it says nothing about the bank, and would rule the colours
        np.fill_diagonal(self.values_, np.nan)
        largest = float(np.nanmax(self.values_)) if len(bank) > 1 else 0.0
        top = max(largest, self.max_similarity or 0.0) or 1.0
        picture = ax.imshow(self.values_, cmap=AMOUNTS, vmin=0, vmax=top, interpolation="none")
        bar = ax.figure.colorbar(picture, ax=ax, label=f'similarity, "{self.similarity}"')
        rule = ""
        if self.max_similarity is not None:
            bar.ax.axhline(self.max_similarity, color=LIMIT_COLOUR, linewidth=3)
            rule = f", at most {self.max_similarity:g} allowed"
        part = "" if len(bank) == len(self.filters) else f"the first {len(bank)} filters, "
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="filter", ylabel="filter", title=f"layer {self.layer}: {part}largest {largest:.3f}{rule}")


class SpectrumDisplay(Display):
    """Share of the variance that each component of the PCA captures.

    Parameters
    ----------
    ratio : array (n_components,)
        `explained_variance_ratio_`.
    """

    size = (6.0, 3.2)

    def __init__(self, ratio):
        self.ratio = np.asarray(ratio)

    @classmethod
    def from_estimator(cls, estimator, *, ax=None):
        """Of a fitted `StreamCNNClassifier` or `StreamingPCA`."""
        return cls(pca_of(estimator).explained_variance_ratio_).plot(ax)

    @classmethod
    def from_model(cls, model: Model, *, ax=None):
        """Of a model."""
        return cls(pca_of(model).explained_variance_ratio_).plot(ax)

    @classmethod
    def from_store(cls, store: Store, *, ax=None):
        """Of a store."""
        return cls(pca_of(store).explained_variance_ratio_).plot(ax)

    def _draw(self, ax):
        numbers, captured = np.arange(1, len(self.ratio) + 1), np.cumsum(self.ratio)
        total = captured[-1] if len(captured) else 0.0
        ax.semilogy(numbers, np.where(self.ratio > 0, self.ratio, np.nan), color=COLOURS[4], linewidth=2)
        for share in (0.5, 0.9, 0.99):
            if total >= share:
                first = int(np.searchsorted(captured, share)) + 1
                ax.axvline(first, color="0.5", linestyle=":", linewidth=1)
                ax.text(first, 0.98, f" {100 * share:.0f} %", transform=ax.get_xaxis_transform(), va="top", fontsize="small")
        title = f"{len(self.ratio)} components capture {100 * total:.1f} % of the variance"
        ax.set(xlabel="component", ylabel="share of the variance", title=title)


__all__ = ["FilterBankDisplay", "SimilarityDisplay", "SpectrumDisplay", "network_of", "pca_of"]
