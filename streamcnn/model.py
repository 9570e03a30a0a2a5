"""The fitted model: predict in a stream, save, load. One HDF5 file of arrays with a JSON header, no pickle."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.decisions import to_codes
from streamcnn.drawing import facts_html
from streamcnn.errors import DataError, ModelError, warn
from streamcnn.features import FeatureExtractor
from streamcnn.files import check_replaceable
from streamcnn.images import ImageSource, check_alike, check_several, open_images
from streamcnn.kernels import get_kernels
from streamcnn.labels import codes_among, text_array, unknown_classes, unknown_note
from streamcnn.memory import MemoryMonitor, parse_bytes, resolve_limit
from streamcnn.network import Network
from streamcnn.pca import StreamingPCA
from streamcnn.plan import plan_prediction
from streamcnn.planning import MemoryPlan, StagePlan
from streamcnn.progress import Progress
from streamcnn.rows import recut
from streamcnn.sources import no_labels
from streamcnn.stages import PREDICT_BLOCK
from streamcnn.svm import StreamingSVC
from streamcnn.svmchecks import check_sample_weight
from streamcnn.threads import limit_blas, resolve_n_jobs

FORMAT, FORMAT_VERSION = "streamcnn-model", 1


class Model:
    """A trained classifier: network, PCA, SVM and class names.

    Attributes
    ----------
    network : Network
    pca : StreamingPCA or None
    svm : StreamingSVC
        Trained on class codes 0, 1, ...
    classes_ : ndarray of shape (n_classes,), int or str
    header : dict
        Parameters, pixel kind, versions: what `info` shows.
    planned : set
        Shapes of results of at most a block of images, with the limit, threads and device for which they were planned and fit.
    """

    def __init__(self, network: Network, pca: StreamingPCA | None, svm: StreamingSVC, classes: np.ndarray, header: dict[str, Any]):
        self.network, self.pca, self.svm, self.classes_, self.header = network, pca, svm, classes, header
        self.planned: set[tuple[Any, ...]] = set()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.image_shape

    @property
    def feature_dtype(self) -> str:
        return self.header["feature_dtype"]

    def check_source(self, source: ImageSource) -> None:
        """Refuse images of another shape or kind than trained on."""
        check_alike(source, self.image_shape, self.header["pixels"])

    def decisions(
        self,
        source: ImageSource,
        chunk_size: int = 256,
        n_jobs: int = 1,
        device: str = "auto",
        update: Callable[[int], None] | None = None,
        monitor: MemoryMonitor | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Decision values in row order, in bounded memory.

        Parameters
        ----------
        source : ImageSource
        chunk_size : int
            Images per kernel call; changes no bit of the result.
        update : callable, optional
            Called with the number of images just decided.
        monitor : MemoryMonitor, optional
            Once it is `tight`, chunks are single images.

        Yields
        ------
        (first row, decisions) : int, ndarray
            (m,) for two classes, positive for the second; (m, n_classes) for more.
        """
        from streamcnn.kernels.half import widen  # numba is loaded by those who convolve only

        self.check_source(source)
        extractor = FeatureExtractor(source, self.network, self.feature_dtype, chunk_size, n_jobs, get_kernels(device), monitor)
        block = np.empty((PREDICT_BLOCK, self.network.n_features), np.float32)
        # without PCA the SVM works on the features themselves
        rows = block if self.pca is None else np.empty((PREDICT_BLOCK, self.pca.n_components_), np.float32)
        for start, n_valid in recut((rows for _, rows in extractor.chunks((0, source.n_samples))), block, widen):
            # other threads take turns with each block, and none is kept waiting by who leaves off half-way. One BLAS thread: products of
            # so few rows are done before more have started, and these wait busily where the next images are being convolved. Measured on
            # two busy cores: 5,000 images by `fast` and an RBF SVM took 3.4 s instead of 20 s, and 1.8 s of the CPU instead of 11 s
            with limit_blas(1):
                if self.pca is not None:
                    self.pca.transform_block(block, rows)
                decisions = self.svm.decide_block(rows)[:n_valid]
                if not np.isfinite(decisions).all():
                    raise ModelError(
                        f"the model's decision on image {start} is no finite number: its coefficients are absurd; train it again"
                    )
            yield start, decisions
            if update is not None:
                update(n_valid)

    def labels_of(self, decisions: np.ndarray) -> np.ndarray:
        """Class codes of decision values."""
        return to_codes(decisions)

    def codes_of(self, source: ImageSource) -> np.ndarray:
        """The source's labels as class codes (n_samples,), -1 for a class that is not known.

        Classes are compared as text where one side has numbers and the other names, so that a folder `3` is the label 3.

        Raises
        ------
        DataError
            When it has no labels, or none of a known class.
        """
        if source.labels is None or source.classes_ is None:
            raise no_labels(source, "evaluating needs a folder with one subfolder per class, a file with labels, or an array and y")
        return codes_among(source.classes_, self.classes_)[source.labels]

    def codes_to_score(self, source: ImageSource) -> np.ndarray:
        """`codes_of`, with a warning of what no prediction can be right about."""
        codes = self.codes_of(source)
        assert source.labels is not None and source.classes_ is not None
        if unknown := unknown_classes(source.labels, source.classes_, codes):
            warn(unknown_note(unknown, len(codes)))
        return codes

    def collect(
        self,
        source: ImageSource,
        columns: tuple[int, ...],
        dtype: Any,
        take: Callable[[np.ndarray], np.ndarray],
        more: int = 0,
        memory_limit: int | str | None = None,
        n_jobs: int = 1,
        device: str = "auto",
    ) -> np.ndarray:
        """What `take` makes of the decisions, (n_samples, *columns) of `dtype`, in a stream under the limit of the whole process.

        `more` are bytes an image that the caller will hold besides.

        Raises
        ------
        MemoryBudgetError
            When a chunk of images and the result do not fit together.
        """
        shape = (source.n_samples, *columns)

        def fill(chunk_size: int, *watching) -> np.ndarray:
            out = np.empty(shape, dtype)
            for start, decisions in self.decisions(source, chunk_size, n_jobs, device, *watching):
                out[start : start + len(decisions)] = take(decisions)
            return out

        # a few images in memory are planned once: plan and monitor take longer than to predict them
        few = (*shape, memory_limit, n_jobs, device) if source.kind == "array" and source.n_samples <= PREDICT_BLOCK else None
        if few in self.planned:
            return fill(source.n_samples)
        limit = resolve_limit(memory_limit)
        result = {"result": math.prod(shape) * np.dtype(dtype).itemsize + more * source.n_samples}
        plan = plan_decisions(self, source, n_jobs, limit, device, result)
        if few is not None:
            self.planned.add(few)
        with (
            MemoryMonitor(limit) as monitor,
            monitor.stage("predict", plan.peak_bytes),
            Progress(0, monitor).bar("predict", source.n_samples) as update,
        ):
            return fill(plan.chunk_size, update, monitor)

    def predict(self, X: Any, memory_limit: int | str | None = None, n_jobs: int | None = None, device: str = "auto") -> np.ndarray:
        """Labels (n_samples,) of images.

        Parameters
        ----------
        X : path, array-like or ImageSource
            As `open_images` takes them: one image file, a folder, an array, ... Files are resized, and rows taken as images, where they
            were in training; else `open_images(path, image_shape=model.image_shape)` resizes files.
        memory_limit : int, str or None
            Of the whole process.
        n_jobs : int or None
            Threads; None for all cores.
        device : "auto", "cpu", "cuda" or "naive"
            What convolves, whatever it was in training; on another one the last bits of decisions may differ.

        Raises
        ------
        DataError
            For images of another shape or kind than trained on.
        MemoryBudgetError
            When a chunk of images and the result do not fit together.
        """
        source, itemsize = self._open(X, memory_limit), self.classes_.itemsize
        return self.classes_[self.collect(source, (), np.int32, self.labels_of, itemsize, memory_limit, resolve_n_jobs(n_jobs), device)]

    def decision_function(
        self, X: Any, memory_limit: int | str | None = None, n_jobs: int | None = None, device: str = "auto"
    ) -> np.ndarray:
        """Decision values: (n_samples,) for two classes, positive for the second; (n_samples, n_classes) for more. As `predict`."""
        n_classes = len(self.classes_)
        columns = () if n_classes == 2 else (n_classes,)
        source = self._open(X, memory_limit)
        return self.collect(source, columns, np.float64, lambda decisions: decisions, 0, memory_limit, resolve_n_jobs(n_jobs), device)

    def predict_proba(self, X: Any, memory_limit: int | str | None = None, n_jobs: int | None = None, device: str = "auto") -> np.ndarray:
        """Probabilities (n_samples, n_classes), of a model that was trained with `probability=True`. As `predict`.

        Raises
        ------
        ParameterError
            When it was not.
        """
        self.svm.check_probability()
        source, columns = self._open(X, memory_limit), (len(self.classes_),)
        return self.collect(source, columns, np.float64, self.svm.probabilities, 0, memory_limit, resolve_n_jobs(n_jobs), device)

    def score(
        self,
        X: Any,
        y: Any = None,
        memory_limit: int | str | None = None,
        n_jobs: int | None = None,
        sample_weight: Any = None,
        device: str = "auto",
    ) -> float:
        """Mean accuracy, weighed by `sample_weight` (n_samples,), on images with labels `y` (n_samples,), or with those that X carries.
        As `predict`. Images of classes that the model does not know count as wrong, with a warning.

        Raises
        ------
        DataError
            When there are no labels, or none of a class that is known, or for weights that are not one number of at least 0 an image.
        """
        source, weights = self._open(X, memory_limit, y), check_sample_weight(sample_weight)
        truth = self.codes_to_score(source)
        if weights is not None and len(weights) != len(truth):
            raise DataError(f"sample_weight must have a weight for each of {len(truth)} images, got {len(weights)}")
        right = self.collect(source, (), np.int32, self.labels_of, 0, memory_limit, resolve_n_jobs(n_jobs), device) == truth
        return float(np.average(right, weights=weights))

    @property
    def reading_shape(self) -> tuple[int, int, int] | None:
        """`image_shape` for `open_images`, where training gave one: files are resized to it, rows are images of it."""
        return self.image_shape if self.header.get("image_shape_given") else None

    def _open(self, X: Any, memory_limit: int | str | None, labels: Any = None) -> ImageSource:
        check_several(X, self.image_shape)
        limit = resolve_limit(memory_limit) if isinstance(X, (str, Path)) else None
        return open_images(X, labels, image_shape=self.reading_shape, memory_limit=limit)

    def facts(self) -> dict[str, Any]:
        """What there is to say about it, for people."""
        names, pca = [str(name) for name in self.classes_[:10].tolist()], self.pca
        more = f", ... ({len(self.classes_)} in all)" if len(self.classes_) > len(names) else ""
        return {
            "preset": self.header["settings"]["preset"],
            "classes": ", ".join(names) + more,
            "images": " x ".join(map(str, self.image_shape)),
            "trained on": f"{self.header['n_train']:,} images",
            "filters": ", then ".join(str(len(bank)) for bank in self.network.filters),
            "features": f"{self.network.n_features:,}" + ("" if pca is None else f", by PCA {pca.n_components_}"),
            "SVM": self.svm.kernel_,
        }

    def svm_facts(self) -> dict[str, Any]:
        """Of the SVM as JSON: kernel, C, gamma (None with the linear one), which of the two were chosen, and the accuracy on the training
        images that were held out to choose these, None where they were given or there were too few images to choose."""
        svm, gamma = self.svm, None if self.svm.kernel_ == "linear" else self.svm.gamma_
        tried = [pair if isinstance(pair, tuple) else (pair,) for pair in svm.selection_]
        chosen = [name for name, values in zip(("C", "gamma"), zip(*tried)) if len(set(values)) > 1]
        accuracy = svm.selection_.get(svm.C_ if gamma is None else (svm.C_, gamma))
        return {"kernel": svm.kernel_, "C": svm.C_, "gamma": gamma, "chosen": chosen, "held_out_accuracy": accuracy}

    def __repr__(self) -> str:
        return f"Model({', '.join(f'{name}: {value}' for name, value in self.facts().items())})"

    def _repr_html_(self) -> str:
        return facts_html(self.facts())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All arrays of the model by name."""
        parts = {"network": self.network.to_arrays(), "svm": self.svm.to_arrays()}
        if self.pca is not None:
            parts["pca"] = self.pca.to_arrays()
        return {f"{part}.{name}": np.asarray(a) for part, arrays in parts.items() for name, a in arrays.items()}

    def save(self, path: str | Path) -> None:
        """Write the model as one file, complete or not at all; a file that is there is replaced only if it is a model or empty.

        Raises
        ------
        FileError
            When there is another kind of file, or the system refuses to write.
        """
        check_replaceable(Path(path), "path", "streamcnn model")
        self.write(Path(path))

    def write(self, path: Path) -> None:
        """`save` in a store, whose own file may be damaged."""
        header = self.header | {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "classes": self.classes_.tolist(),
            "network": self.network.describe(),
        }
        save_arrays(path, self.to_arrays(), header)


def load_model(path: str | Path, memory_limit: int | str | None = None) -> Model:
    """Read a model file, which may come from a stranger.

    Nothing in it is executed, and nothing in it leads to another file. What is damaged, does not fit together or would fill the memory
    is refused here, decisions that are no finite numbers while predicting. The hash inside finds damage, not forgery: a model made to
    mislead is a valid file, so take models from whom you trust to have trained them.

    Parameters
    ----------
    path : str or Path
    memory_limit : int, str or None
        Of the whole process: a model that does not fit is refused before it is read. None is any size.

    Returns
    -------
    Model

    Raises
    ------
    FileError
        The file is missing.
    ModelError
        It is no model, damaged, or of a newer version.
    MemoryBudgetError
        It is larger than what the limit leaves.
    """
    path = Path(path)
    arrays, header = load_arrays(path, FORMAT, FORMAT_VERSION, None if memory_limit is None else parse_bytes(memory_limit))
    try:
        parts: dict[str, dict[str, np.ndarray]] = {"network": {}, "pca": {}, "svm": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = array
        network = Network.from_arrays(header.pop("network"), parts["network"])
        if not all(np.isfinite(array).all() for array in network.filters + network.biases):
            raise DataError("its filters are no finite numbers")
        pca = StreamingPCA.from_arrays(parts["pca"]) if parts["pca"] else None
        svm = StreamingSVC.from_arrays(parts["svm"])
        classes = _classes(header.pop("classes"))
        width = network.n_features if pca is None else pca.n_components_
        fits = pca is None or pca.n_features_in_ == network.n_features
        if len(classes) != len(svm.classes_) or svm.n_features_in_ != width or not fits:
            raise ModelError(f"{path} holds parts of different models: train it again")
        _check_header(header)
        return Model(network, pca, svm, classes, {k: v for k, v in header.items() if not k.startswith("format")})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path} lacks or misstates a part of the model ({error}): train it again") from error


def _classes(values: Any) -> np.ndarray:
    """Class names or numbers of a header as an array."""
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        classes = text_array(values, "class names")
    else:
        classes = np.asarray(values)
    if classes.ndim != 1 or classes.dtype.kind not in "iuU" or len(np.unique(classes)) != len(classes):
        raise DataError("its classes must be different names or whole numbers")
    return classes


def _check_header(header: dict[str, Any]) -> None:
    """Refuse a header without what is looked up in it later."""
    settings = header["settings"]
    if not isinstance(settings, dict) or not {"device", "preset", "seed"} <= settings.keys():
        raise DataError("its header is incomplete: settings")
    if header["pixels"] not in ("uint8", "float32") or header["feature_dtype"] not in ("float16", "float32"):
        raise DataError("its header is incomplete: pixels or feature_dtype")
    if type(header.get("image_shape_given", False)) is not bool:
        raise DataError("its header is not in order: image_shape_given")
    if type(header["n_train"]) is not int:
        raise DataError("its header is incomplete: n_train")


def plan_decisions(
    model: Model,
    source: ImageSource,
    n_jobs: int,
    limit: int,
    device: str = "auto",
    extra: dict[str, int] | None = None,
    after: StagePlan | None = None,
) -> MemoryPlan:
    """The plan of `Model.decisions` for this source; `extra` are claims of whoever takes the decisions, `after` is a later stage.

    Raises
    ------
    DataError
        For images of another shape or kind than trained on.
    MemoryBudgetError
        When not even one image at a time fits.
    """
    model.check_source(source)
    svm, k = model.svm, None if model.pca is None else model.pca.n_components_
    shapes = (k, svm.kernel_, len(model.classes_), svm.n_vectors)
    return plan_prediction(source, model.network, *shapes, model.feature_dtype, n_jobs, limit, get_kernels(device), extra, after)
