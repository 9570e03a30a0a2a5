"""Bytes, passes and disk of every stage, from shapes alone: each buffer is named here before anything runs.

All of it is for one process: workers are threads, which share its memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from streamcnn.filters import selection_bytes
from streamcnn.images import ImageSource
from streamcnn.ladder import decision_bytes, fitted_svm_bytes, svm_bytes, svm_passes
from streamcnn.layers import ConvLayer
from streamcnn.network import CALIBRATION_BYTES, DRAW_CHUNK, PATCH_IMAGES, SCALE_IMAGES, Network
from streamcnn.patches import patch_bytes
from streamcnn.pcaplan import pca_bytes, pca_passes
from streamcnn.planning import StagePlan, added
from streamcnn.rows import block_rows
from streamcnn.selection import most_landmarks
from streamcnn.shards import open_shard_bytes, shard_rows
from streamcnn.system import resident_bytes

# rows per matrix product when predicting: the same for one image and for a million, so that a prediction never depends on its
# neighbours, and small, so that one image is quick
PREDICT_BLOCK = 16
# what a source holds from the moment it is open, and so is resident already
_HELD = ("labels", "names", "originals")
# measured: BLAS work space and the modules that scikit-learn and SciPy load on first use; each BLAS thread has its own
_LIBRARY_BYTES, _THREAD_BYTES = 12 << 20, 6 << 20
# multiplications with additions of a chunk: some seconds, after which there is something to tell, and Ctrl-C is heard
_CHUNK_WORK = 1 << 38
# of a shard in the virtual data sets of features and labels, until their file is closed (measured: 18 to 19 KB, 1,000 and 10,000 shards)
_VIRTUAL_BYTES = 20 << 10


# HDF5's cache and its copy of a chunk while a checkpoint is written, at most 1 MiB each, and what else it holds. The disk for it is not
# asked for: where there is none, the run goes on without
_CHECKPOINT = {"HDF5 checkpoint": 3 << 20}


@dataclass(frozen=True)
class Shapes:
    """Everything the bytes of a run follow from, besides the chunk size."""

    n_rows: int
    n_features: int
    n_components: int | None
    pca_solver: str | None
    kernel: str
    class_counts: tuple[int, ...]
    feature_dtype: str
    keep_features: bool
    n_jobs: int
    svc_cache_bytes: int
    n_landmarks: int
    probability: bool

    @property
    def itemsize(self) -> int:
        """Bytes of a stored feature."""
        return np.dtype(self.feature_dtype).itemsize

    @property
    def reduced(self) -> int:
        """Width of the rows the SVM gets."""
        return self.n_features if self.n_components is None else self.n_components

    @property
    def n_vectors(self) -> int:
        """Support vectors or landmarks at most."""
        return most_landmarks(self.n_landmarks, self.n_rows, len(self.class_counts)) if self.kernel == "nystroem" else self.n_rows

    @property
    def feature_bytes(self) -> int:
        """Disk for feature shards."""
        return self.n_rows * self.n_features * self.itemsize

    @property
    def reduced_bytes(self) -> int:
        """Disk for reduced shards."""
        return 0 if self.n_components is None else self.n_rows * self.n_components * 4


def base_claims(source: ImageSource, network: Network, n_jobs: int, kernels) -> dict[str, int]:
    """What the process holds whatever the stage: the first claim is what it held on entry."""
    held = {name: size for name, size in source.scratch_bytes(1).items() if name in _HELD}
    loading = kernels.pending_bytes(network.steps, any_normed(g.layer for g in network.geometry))
    return added(
        {"already in use": max(0, resident_bytes() - sum(held.values()))},
        held,
        {"compiled kernels": loading, "libraries": _LIBRARY_BYTES + n_jobs * _THREAD_BYTES},
    )


def any_normed(layers: Iterable[ConvLayer]) -> bool:
    """Whether a layer normalises its windows, for which there are kernels of their own."""
    return any(layer.patch_norm is not None for layer in layers)


def image_bytes(source: ImageSource) -> int:
    """Bytes of one image as delivered."""
    return source.row_values * source.dtype.itemsize


def calibration_rows(source: ImageSource, network: Network) -> int:
    """Images in the sample on which filters are scaled, and drawn where they are patches; follows shapes and layers alone.

    16 to 256, to 4,096 for patches, and about 16 MiB.
    """
    most = PATCH_IMAGES if any(g.layer.filters == "patches" for g in network.geometry) else SCALE_IMAGES
    return min(source.n_samples, max(16, min(most, CALIBRATION_BYTES // image_bytes(source))))


def image_claims(source: ImageSource, network: Network, chunk: int, dtype: str, n_jobs: int, kernels) -> dict[str, int]:
    """Bytes to read a chunk of images and turn it into rounded feature rows."""
    chunk, source.n_jobs = min(chunk, source.n_samples), n_jobs
    # while one chunk is convolved, the next is read and the last one taken
    turns = 2 if chunk < source.n_samples else 1
    reading = {name: size for name, size in source.scratch_bytes(chunk).items() if name not in _HELD}
    rounded = {"rounded rows": turns * chunk * network.n_features * np.dtype(dtype).itemsize}
    if dtype != "float16":  # numpy's mask of finite values; float16 is checked while it is rounded
        rounded["rounded rows"] += chunk * network.n_features
    return added({"pixels": turns * chunk * image_bytes(source)}, reading, network.buffer_bytes(chunk, n_jobs, kernels), rounded)


def largest_chunk(source: ImageSource, network: Network) -> int:
    """Images of a chunk at most, whatever the memory: all, or as many as take some seconds."""
    return min(source.n_samples, max(1, _CHUNK_WORK // network.multiply_adds))


def fit_stages(source: ImageSource, network: Network, shapes: Shapes, chunk: int, kernels) -> list[StagePlan]:
    """The stages of a fit with chunks of `chunk` images, in order."""
    s, d, k = shapes, shapes.n_features, shapes.n_components
    images = image_claims(source, network, chunk, s.feature_dtype, s.n_jobs, kernels)
    reading = {"stored rows": block_rows(d) * d * s.itemsize, "HDF5 features": open_shard_bytes(d, s.itemsize)}
    if not s.keep_features:
        reading = images
    result = [StagePlan("filters", drawing_claims(source, network, s.n_jobs, kernels))]
    if s.keep_features:
        writing = {"HDF5 features": open_shard_bytes(d, s.itemsize), "label codes": 16 * chunk}
        result.append(StagePlan("extract", added(images, writing), 1, s.feature_bytes))
    if k is not None and s.pca_solver is not None:
        claims = pca_bytes(s.pca_solver, d, k, s.n_rows, n_jobs=s.n_jobs)
        result.append(StagePlan("pca", added(reading, claims, _CHECKPOINT), pca_passes(s.pca_solver, d, k), fitted_pca_bytes(d, k)))
        blocks = {"row block": block_rows(d) * d * 4, "reduced block": block_rows(d) * k * 4, "components": 12 * k * d + 32 * d}
        result.append(StagePlan("project", added(reading, blocks, {"HDF5 reduced": open_shard_bytes(k, 4)}), 1, s.reduced_bytes))
        reading = {"HDF5 reduced": open_shard_bytes(k, 4), "components": 8 * k * d}
    svm = svm_bytes(
        s.kernel,
        s.reduced,
        s.class_counts,
        cache_bytes=s.svc_cache_bytes,
        n_jobs=s.n_jobs,
        n_landmarks=s.n_landmarks,
        probability=s.probability,
    )
    learnt = fitted_svm_bytes(s.kernel, s.reduced, len(s.class_counts), s.n_vectors)
    result.append(StagePlan("svm", added(reading, svm, _CHECKPOINT), svm_passes(s.kernel, s.n_rows, s.reduced, s.probability), learnt))
    model = fitted_bytes(network, s)
    shards = -(-s.n_rows // shard_rows(d, s.itemsize)) if s.keep_features else 0
    result.append(StagePlan("save", added({"model": model, "virtual data set": _VIRTUAL_BYTES * shards, "HDF5 model": 4 << 20}), 0, model))
    return result


def drawing_claims(source: ImageSource, network: Network, n_jobs: int, kernels) -> dict[str, int]:
    """Bytes to draw the filters and scale them on a sample of images."""
    sample, source.n_jobs = calibration_rows(source, network), n_jobs
    scratch = {name: size for name, size in source.scratch_bytes(sample).items() if name not in _HELD}
    bank = max((patch_bytes if g.layer.filters == "patches" else selection_bytes)(g.filters_shape) for g in network.geometry)
    probing = sum(network.buffer_bytes(min(DRAW_CHUNK, sample), n_jobs, kernels).values())
    # windows are drawn from what the layers below make of the sample, whose buffers are held meanwhile
    drawing = bank + probing if any(g.layer.filters == "patches" for g in network.geometry) else bank
    return added({"sample of images": sample * image_bytes(source), "filter bank": max(drawing, 2 * probing)}, scratch)


def fitted_pca_bytes(n_features: int, n_components: int) -> int:
    """Bytes of a fitted PCA's arrays."""
    return 8 * n_components * (n_features + 3) + 16 * n_features


def fitted_bytes(network: Network, shapes: Shapes) -> int:
    """Bytes of a fitted model's arrays, at the most."""
    s, n_classes = shapes, len(shapes.class_counts)
    filters = sum(4 * (int(np.prod(g.filters_shape)) + g.layer.n_filters) for g in network.geometry)
    components = 0 if s.n_components is None else fitted_pca_bytes(s.n_features, s.n_components)
    return filters + components + fitted_svm_bytes(s.kernel, s.reduced, n_classes, s.n_vectors)


def predict_claims(network: Network, n_components: int | None, kernel: str, n_classes: int, n_support: int) -> dict[str, int]:
    """Bytes that predicting holds besides the model, images and features: blocks, the projection in float32, decisions."""
    d = network.n_features
    width = d if n_components is None else n_components
    blocks = {"feature block": 4 * PREDICT_BLOCK * d}
    if n_components is not None:
        blocks |= {"reduced block": 4 * PREDICT_BLOCK * width, "projection": 12 * width * d + 16 * d}
    return added(blocks, {"decisions": decision_bytes(kernel, width, n_classes, n_support) + 16 * PREDICT_BLOCK * n_classes})


def evaluate_claims(source: ImageSource, n_classes: int) -> dict[str, int]:
    """Bytes to compare predictions with labels: the labels in the model's codes, and counts as array, as lists and as JSON."""
    return {"labels": 12 * source.n_samples, "confusion matrix": 24 * n_classes * n_classes}
