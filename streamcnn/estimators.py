"""scikit-learn faces of the pipeline: `StreamCNNClassifier` and `ConvFeatures`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from streamcnn.adding import add_images, no_store
from streamcnn.availability import Needs, check_probability
from streamcnn.convfeatures import ConvFeatures, ImageInput, resolve_seed
from streamcnn.errors import DataError
from streamcnn.fitting import fit_model
from streamcnn.labels import decoded, label_values
from streamcnn.memory import MemoryMonitor, resolve_limit
from streamcnn.nystroem import LANDMARKS
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import Progress
from streamcnn.store import FeatureStore
from streamcnn.threads import resolve_n_jobs
from streamcnn.tracing import Trace


def _has_store(estimator) -> None:
    """After `fit` the rows are there only where a store keeps them."""
    if estimator.store is None and vars(estimator).get("_by_fit", False):
        raise no_store()


class StreamCNNClassifier(ImageInput, ClassifierMixin, BaseEstimator):
    """Random convolution filters, PCA and an SVM, trained on images that need not fit in memory.

    Parameters
    ----------
    preset : "fast", "faces", "patches" or "lee2017"
        Values for every parameter left at its default.
    layers : sequence of ConvLayer or None
        Stacked: each works on what the one before gives. None for the preset's, as with the other parameters.
    preprocess : str, sequence of str or None
        `"standardize"`, `"log"`, `"smooth"`, `"local_contrast"`, applied to each image in that order.
    mirror : bool or None
        Whether an image and its mirror image are to be the same, as a cat's are and a letter's are not; convolves twice. See
        `streamcnn.network.Network`. None for the preset's.
    n_components : int, "auto" or None
        Width after PCA; None leaves PCA away. `"auto"` is the preset's, 256 at most.
    pca_solver : "auto", "covariance", "randomized" or "incremental"
        See `StreamingPCA`.
    kernel : "auto", "linear", "rbf" or "nystroem"
        Of the SVM, see `StreamingSVC`. `"auto"` is the preset's; where that is `"auto"` too, rbf up to 20,000 images and 100 classes,
        else linear.
    C, gamma : float or "auto"
        `"auto"` is the preset's, which may be a choice on held-out training rows. They refer to rows that are scaled so that their mean
        squared length is one. `gamma` may also be `"scale"`, with scikit-learn's meaning.
    class_weight : "balanced", dict or None
        Weight of each class by its label; `"balanced"` gives each class the same in sum.
    n_landmarks : int
        Of the RBF kernel beyond 20,000 images, see `StreamingSVC`.
    probability : bool
        Whether to hold out images for `predict_proba`; the SVM is then trained twice.
    memory_limit : int, str or None
        Bytes or a size such as `"2GiB"` for the resident memory of the whole process; None for half the machine.
        Of each process: a search with `n_jobs=2` in processes may take it twice over, beside what the parent holds, so divide by jobs.
        Jobs in threads share one process and one limit, and each counts what the others hold as in use already.
    feature_dtype : "float16" or "float32"
        Rounding of feature rows; part of the model.
    keep_features : bool or "auto"
        Whether feature rows stay on disk during the fit, or are computed again in each pass.
    store : path or None
        Folder for features and finished stages, reused by a later fit, and needed by `partial_fit`; None for a temporary one.
        One fit at a time may use it, so leave it away in searches that run in parallel.
    device : "auto", "cpu", "cuda" or "naive"
        What convolves; `"auto"` is a CUDA device where there is one, else the CPU. `"naive"` is the slow reference.
    image_shape : tuple or None
        (height, width) or (height, width, channels) of images given as 2-D rows, or to resize image files to. Rows without it
        are images of shape (1, n_features, 1); files without it are resized where they are of several sizes, as
        `open_images(path, image_shape="auto")` does.
    n_jobs : int or None
        Threads; None for all cores.
    random_state : int, generator or None
        Seed of filters and of every choice of rows; None draws one, which `model_.header` has.
    verbose : int
        1 shows a progress bar per stage, 2 in a notebook also the memory trace, live.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels, sorted.
    n_features_in_ : int
        Values of an image.
    model_ : Model
        Network, PCA and SVM: see `streamcnn.model.Model`.
    report_ : Report
        Plan, seconds per stage, what was reused: see `streamcnn.pipeline.Report`.
    n_jobs_, n_components_, kernel_, pca_solver_, C_, gamma_, device_, memory_limit_, image_shape_ :
        As resolved in `fit`.
    peak_rss_bytes_ : int
        Peak resident memory of the process during `fit`.
    peak_exact_ : bool
        Whether that is the system's own high-water mark, or the largest sample.

    Notes
    -----
    Memory is the plan's (`streamcnn.plan`), independent of the number of images but for 16 bytes a label; time grows linearly with
    them. Method: Lee & Lee, "A Study On Memory Optimization for Applying Deep Learning to PC" (2017).

    Cross-validation and searches of scikit-learn pick the images of each fold by index, which makes a copy of them in memory, whatever X
    is; without them, arrays that slice (HDF5, zarr, dask, xarray) are read chunk by chunk.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> images, labels = load_digits(return_X_y=True)
    >>> images = images.reshape(-1, 8, 8)
    >>> classifier = StreamCNNClassifier(random_state=0).fit(images[:1200], labels[:1200])
    >>> classifier.score(images[1200:], labels[1200:]) > 0.9
    True
    """

    def __init__(
        self,
        preset="fast",
        layers=None,
        preprocess=None,
        mirror=None,
        n_components="auto",
        pca_solver="auto",
        kernel="auto",
        C="auto",
        gamma="auto",
        class_weight=None,
        n_landmarks=LANDMARKS,
        probability=False,
        memory_limit=None,
        feature_dtype="float16",
        keep_features="auto",
        store=None,
        device="auto",
        image_shape=None,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.preset = preset
        self.layers = layers
        self.preprocess = preprocess
        self.mirror = mirror
        self.n_components = n_components
        self.pca_solver = pca_solver
        self.kernel = kernel
        self.C = C
        self.gamma = gamma
        self.class_weight = class_weight
        self.n_landmarks = n_landmarks
        self.probability = probability
        self.memory_limit = memory_limit
        self.feature_dtype = feature_dtype
        self.keep_features = keep_features
        self.store = store
        self.device = device
        self.image_shape = image_shape
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def _settings(self, resume: bool = False) -> Settings:
        names = ("layers", "preprocess", "mirror", "n_components", "pca_solver", "kernel", "C", "gamma", "class_weight", "n_landmarks")
        values = {name: getattr(self, name) for name in (*names, "probability", "feature_dtype", "keep_features", "device")}
        seed = self._seed_of_store() if resume and self.random_state is None else None
        seed = resolve_seed(self.random_state) if seed is None else seed
        return resolve_settings(self.preset, n_jobs=resolve_n_jobs(self.n_jobs), seed=seed, **values)

    def _seed_of_store(self) -> int | None:
        """The seed that was drawn for the fit in `store`, where there is one."""
        if self.store is None or not (Path(self.store) / "config.json").exists():
            return None
        return FeatureStore(self.store).config.get("parameters", {}).get("seed")

    def fit(self, X, y=None, resume=False, verify_data=False):
        """Train on images.

        Parameters
        ----------
        X : array of shape (n_samples, height, width[, channels]) or (n_samples, n_features), ImageSource, or path
            See `open_images` for what a path may be.
        y : array-like of shape (n_samples,) or None
            Labels, where X does not carry them.
        resume : bool
            Continue the interrupted fit in `store`: finished shards are checked against their hashes, bad ones made again; refuses other
            data (by size and time of change, or content of arrays) or extraction parameters. The model has the same bits as without the
            interruption.
        verify_data : bool
            Read the images of finished shards again, and refuse when they are not those that were read before.

        Returns
        -------
        self

        Raises
        ------
        StreamCNNError
            One sentence about what is wrong: parameters, data, or a memory limit that is too small.
        """
        settings = self._settings(resume)
        self._train(X, y, None, True, partial(fit_model, settings=settings, resume=resume, verify_data=verify_data))
        self._by_fit = True
        return self

    @Needs(_has_store)
    def partial_fit(self, X, y=None, classes=None):
        """Add images, of known classes or new ones, to what the classifier was trained on; unfitted, this is `fit`.

        Filters, PCA and the scaling of rows stay as the first fit made them; so do C, gamma and landmarks as long as the number of rows
        leads to the same kernel. The new images become rows beside those kept in `store`, and the SVM is solved again on all of them, a
        linear one from where it was: to its tolerance the model of a training on all rows.

        Parameters
        ----------
        X, y
            As in `fit`: the new images alone. They may be of a single class.
        classes : array-like or None
            Labels that `y` may have in this call; None for any.

        Returns
        -------
        self

        Raises
        ------
        NotKeptError
            Without `store`.
        StoreError
            When it is in use, or does not hold the rows this classifier was trained on.
        StreamCNNError
            As `fit`. The classifier is then what it was before.

        Notes
        -----
        A call that was interrupted is made again with the same images: its finished rows are used, and none is added twice. A pickled
        classifier goes on where it was as long as its store is in the same place; a model file does not know its store. A `fit` into
        the store drops what was added.
        """
        if hasattr(self, "model_"):
            return self._train(X, y, classes, False, partial(add_images, self.model_))
        settings = self._settings()
        return self._train(X, y, classes, True, partial(fit_model, settings=settings))

    def _train(self, X, y, classes, reset: bool, run: Callable):
        """Open the images, let `run` make a model and a report of them, and publish those."""
        limit, store = resolve_limit(self.memory_limit), None if self.store is None else Path(self.store)
        if y is None and self._is_rows(X):
            raise ValueError("requires y to be passed, but the target y is None")
        if y is not None:
            y = column_or_1d(decoded(y), warn=True)
            check_classification_targets(y)
        with MemoryMonitor(limit, live=self.verbose > 1) as monitor:
            source = self._open(X, y, reset)
            if classes is not None and source.classes_ is not None:
                outside = set(source.classes_.tolist()).difference(label_values(classes, "classes").tolist())
                if outside:
                    raise DataError(f"labels must be among classes, got {min(outside)!r}: add it to classes, or leave such images out")
            self.model_, self.report_ = run(
                source=source, store_path=store, limit=limit, progress=Progress(self.verbose, monitor), monitor=monitor
            )
        self.peak_rss_bytes_, self.peak_exact_ = monitor.peak_bytes, monitor.exact
        self.report_.trace = Trace(monitor.trace, monitor.peak_bytes, monitor.limit)
        self._publish(limit)
        return self

    def _publish(self, limit: int) -> None:
        model, plan = self.model_, self.report_.plan
        self.classes_, self.image_shape_ = model.classes_, model.image_shape
        self.n_jobs_, self.memory_limit_ = model.header["settings"]["n_jobs"], limit
        self.device_ = model.header["settings"]["device"]
        self.n_components_, self.pca_solver_, self.kernel_ = plan.n_components, plan.pca_solver, plan.kernel
        self.C_, self.gamma_ = model.svm.C_, model.svm.gamma_

    def _decide(self, X, columns: tuple[int, ...], dtype, take: Callable[[np.ndarray], np.ndarray], more: int = 0) -> np.ndarray:
        """See `Model.collect`."""
        source = self._open(X, None, reset=False)
        return self.model_.collect(source, columns, dtype, take, more, self.memory_limit, self.n_jobs_, self.device_)

    def decision_function(self, X):
        """How much each class is favoured.

        Parameters
        ----------
        X
            As in `fit`: images of the size and kind of pixels that it got.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes), float64
            For two classes positive where the second is favoured; for more the largest wins.

        Raises
        ------
        MemoryBudgetError
            When a chunk of images and the result do not fit `memory_limit` together.
        """
        check_is_fitted(self)
        n_classes = len(self.classes_)
        return self._decide(X, () if n_classes == 2 else (n_classes,), np.float64, lambda decisions: decisions)

    def predict(self, X):
        """Label of each image; of the decisions only the winners are kept. Errors as `decision_function`.

        Parameters
        ----------
        X
            As in `fit`: images of the size and kind of pixels that it got.

        Returns
        -------
        ndarray of shape (n_samples,)
            Of `classes_`.
        """
        check_is_fitted(self)
        return self.classes_[self._decide(X, (), np.int32, self.model_.labels_of, self.classes_.itemsize)]

    @Needs(check_probability)
    def predict_proba(self, X):
        """Probabilities of the classes, where `probability` is True. Errors as `decision_function`.

        Parameters
        ----------
        X
            As in `fit`: images of the size and kind of pixels that it got.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64
            In the order of `classes_`; each row adds up to 1.
        """
        check_is_fitted(self)
        return self._decide(X, (len(self.classes_),), np.float64, self.model_.svm.probabilities)

    def score(self, X, y=None, sample_weight=None):
        """Mean accuracy on labelled images.

        Parameters
        ----------
        X
            As in `fit`.
        y : array-like of shape (n_samples,) or None
            May be left away where X carries labels; those of classes that are not known count as wrong, with a warning.
        sample_weight : array-like of shape (n_samples,) or None

        Returns
        -------
        float
        """
        if y is not None:
            return super().score(X, decoded(y), sample_weight)
        check_is_fitted(self)
        source = self._open(X, None, reset=False)
        right = self._decide(source, (), np.int32, self.model_.labels_of) == self.model_.codes_to_score(source)
        return float(np.average(right, weights=sample_weight))

    def save(self, path) -> None:
        """Write the model as one file that `load_model` and the command line read.

        Parameters
        ----------
        path : str or Path

        Raises
        ------
        FileError
            When it cannot be written.
        """
        check_is_fitted(self)
        self.model_.save(path)


__all__ = ["ConvFeatures", "StreamCNNClassifier"]
