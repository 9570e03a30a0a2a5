"""Features of random convolution filters as a scikit-learn transformer, and what it shares with the classifier: images and seeds."""

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from streamcnn.errors import ParameterError
from streamcnn.features import FeatureExtractor
from streamcnn.images import ImageSource, check_no_paths, check_several, open_images, warn_of_rows
from streamcnn.kernels import get_kernels, resolve_device
from streamcnn.layers import resolve_layers
from streamcnn.memory import MemoryMonitor, resolve_limit
from streamcnn.network import Network
from streamcnn.pipeline import draw_filters
from streamcnn.plan import plan_drawing, plan_transform
from streamcnn.presets import resolve_settings
from streamcnn.rowinput import check_rows
from streamcnn.threads import resolve_n_jobs


def resolve_seed(random_state: Any) -> int:
    """A seed of 32 bits from an int, None, or a NumPy generator."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**32))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if isinstance(random_state, (int, np.integer)) and 0 <= random_state < 2**32:
        return int(random_state)
    raise ParameterError(f"random_state must be a whole number from 0 to 2**32 - 1, a generator or None, got {random_state!r}")


class ImageInput:
    """Turns what `fit` and `predict` are given into an image source."""

    def _is_rows(self, X: Any) -> bool:
        """Whether X is a matrix of rows in scikit-learn's sense rather than images, a source or a path."""
        return not isinstance(X, (str, Path, ImageSource)) and len(getattr(X, "shape", np.shape(X) if isinstance(X, list) else ())) < 3

    def _open(self, X: Any, y: Any, reset: bool) -> ImageSource:
        check_no_paths(X)
        if not reset:
            check_several(X, self.image_shape_)  # type: ignore[attr-defined]
        if self._is_rows(X):
            X = check_rows(self, X, reset)
        limit = resolve_limit(self.memory_limit) if isinstance(X, (str, Path)) else None  # type: ignore[attr-defined]
        given: Any = self.image_shape if reset else self._reading_shape  # type: ignore[attr-defined, has-type]
        shape = "auto" if reset and given is None else given
        source = open_images(X, y, image_shape=shape, memory_limit=limit)
        if reset and not self._is_rows(X):
            self.n_features_in_ = int(np.prod(source.image_shape))
            vars(self).pop("feature_names_in_", None)
        if reset:
            self._reading_shape = source.reading_shape
            warn_of_rows(source)
        return source


class ConvFeatures(ImageInput, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Features of random convolution filters: `fit` draws and scales the filters, `transform` gives float32 rows.

    Parameters
    ----------
    layers : sequence of ConvLayer or None
        None for the preset's.
    preset : "fast", "faces", "patches" or "lee2017"
        Whose layers and preprocessing to take.
    preprocess, mirror, feature_dtype, memory_limit, device, image_shape, n_jobs, random_state
        As in `StreamCNNClassifier`. The result of `transform` counts: what does not fit is refused before anything is computed.

    Attributes
    ----------
    network_ : Network
        Layers with their filters.
    n_features_in_ : int
        Values of an image.
    image_shape_ : (height, width, channels)
    n_jobs_ : int
    device_ : str

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from streamcnn import ConvLayer
    >>> images = load_digits().images
    >>> ConvFeatures([ConvLayer(8, 3, filters="random", pool_size=2)], random_state=0).fit_transform(images).shape
    (1797, 72)
    """

    def __init__(
        self,
        layers=None,
        preset="fast",
        preprocess=None,
        mirror=None,
        feature_dtype="float16",
        memory_limit=None,
        device="auto",
        image_shape=None,
        n_jobs=None,
        random_state=None,
    ):
        self.layers = layers
        self.preset = preset
        self.preprocess = preprocess
        self.mirror = mirror
        self.feature_dtype = feature_dtype
        self.memory_limit = memory_limit
        self.device = device
        self.image_shape = image_shape
        self.n_jobs = n_jobs
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def fit(self, X, y=None):
        """Draw the filters and scale them on a sample of X.

        Parameters
        ----------
        X : array of shape (n_samples, height, width[, channels]) or (n_samples, n_features), ImageSource, or path
        y : ignored

        Returns
        -------
        self
        """
        settings = resolve_settings(
            self.preset,
            n_jobs=resolve_n_jobs(self.n_jobs),
            seed=resolve_seed(self.random_state),
            layers=self.layers,
            preprocess=self.preprocess,
            mirror=self.mirror,
            feature_dtype=self.feature_dtype,
            device=self.device,
        )
        source = self._open(X, None, reset=True)
        network = Network(resolve_layers(settings.layers, source.image_shape), settings.preprocess, mirror=settings.mirror)
        limit, kernels = resolve_limit(self.memory_limit), get_kernels(settings.device)
        plan = plan_drawing(source, network, settings.n_jobs, limit, kernels)
        with MemoryMonitor(limit) as monitor, monitor.stage("filters", plan.peak_bytes):
            draw_filters(network, source, settings, kernels)
        self.network_, self.image_shape_, self.n_jobs_ = network, network.image_shape, settings.n_jobs
        self.device_ = resolve_device(self.device)
        self._n_features_out = network.n_features
        return self

    def transform(self, X):
        """Feature rows of images.

        Parameters
        ----------
        X
            As in `fit`: images of the same size.

        Returns
        -------
        ndarray of shape (n_samples, n_features_out), float32
            Rounded to `feature_dtype`; in the order (height, width, channels) of the last layer's maps.

        Raises
        ------
        MemoryBudgetError
            When a chunk of images and the result do not fit `memory_limit` together.
        """
        from streamcnn.kernels.half import widen  # numba is loaded by those who convolve only

        check_is_fitted(self)
        limit, source, kernels = resolve_limit(self.memory_limit), self._open(X, None, reset=False), get_kernels(self.device_)
        plan = plan_transform(source, self.network_, self.feature_dtype, self.n_jobs_, limit, kernels)
        with MemoryMonitor(limit) as monitor, monitor.stage("transform", plan.peak_bytes):
            extractor = FeatureExtractor(source, self.network_, self.feature_dtype, plan.chunk_size, self.n_jobs_, kernels, monitor)
            out = np.empty((source.n_samples, extractor.n_features), np.float32)
            for first, rows in extractor.chunks((0, source.n_samples)):
                widen(rows, out[first : first + len(rows)])
                monitor.check()
        return out
