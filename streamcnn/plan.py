"""What a fit will take before it runs: bytes of every stage, disk, passes over the data, and the chunk size that fits.

Everything here follows from shapes and the limit. The chunk size is the only thing the limit decides: it changes how the work is
cut, never its result.
"""

import html
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.errors import DataError, MemoryBudgetError, ParameterError, StoreError
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import get_kernels
from streamcnn.memory import claims_table, format_bytes, resident_bytes, resolve_limit
from streamcnn.network import CALIBRATION_BYTES, Geometry, Network, resolve_layers
from streamcnn.pca import pca_bytes, resolve_solver
from streamcnn.presets import Settings, resolve_settings
from streamcnn.rows import block_rows
from streamcnn.shards import open_shard_bytes
from streamcnn.svm import resolve_kernel, svm_bytes
from streamcnn.threads import resolve_n_jobs

# numba, scikit-learn, HDF5 and BLAS work space, measured once all of them have been used (Linux, 2 threads); a process that holds
# more already counts as it is
LIBRARY_BYTES = 320 << 20
CHUNK_SIZES = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
COMFORT = 0.8


@dataclass
class StagePlan:
    """One stage: its buffers in bytes, how often it reads the images or rows, and what it writes to disk."""

    name: str
    claims: dict[str, int]
    passes: int = 1
    disk_bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self.claims.values())


@dataclass
class Plan:
    """The plan of a fit; printing it shows the table.

    Attributes
    ----------
    stages : list of StagePlan
    limit, base_bytes, peak_bytes, disk_bytes : int
        Bytes: the limit, what the process holds besides the stages' buffers, the planned peak, the disk needed.
    chunk_size : int
        Images per kernel call.
    n_features, n_components : int
        Width of a feature row, and of a reduced one.
    pca_solver, kernel : str
        As resolved from the data's shape.
    keep_features : bool
    """

    limit: int
    base_bytes: int
    chunk_size: int
    stages: list[StagePlan]
    n_features: int
    n_components: int
    pca_solver: str | None
    kernel: str
    keep_features: bool
    svc_cache_bytes: int
    geometry: list[Geometry] = field(repr=False)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return self.base_bytes + max(stage.total for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        stages = [
            {"name": s.name, "bytes": s.total, "claims": s.claims, "passes": s.passes, "disk_bytes": s.disk_bytes} for s in self.stages
        ]
        names = ("chunk_size", "n_features", "n_components", "pca_solver", "kernel", "keep_features", "source")
        sizes = {"memory_limit_bytes": self.limit, "already_in_use_bytes": self.base_bytes, "planned_peak_bytes": self.peak_bytes}
        return sizes | {"disk_bytes": self.disk_bytes, "stages": stages} | {name: getattr(self, name) for name in names}

    def __str__(self):
        lines = [f"{'stage':<10} {'memory':>10} {'disk':>10} {'passes':>7}  largest buffers"]
        for s in self.stages:
            largest = sorted(s.claims.items(), key=lambda item: -item[1])[:3]
            text = ", ".join(f"{name} {format_bytes(n)}" for name, n in largest)
            lines.append(f"{s.name:<10} {format_bytes(s.total):>10} {format_bytes(s.disk_bytes):>10} {s.passes:>7}  {text}")
        kept = "kept on disk" if self.keep_features else "computed again in each pass"
        solver = f"{self.pca_solver} PCA to {self.n_components}, " if self.pca_solver else ""
        lines += [
            f"{self.n_features} features an image ({kept}), {solver}{self.kernel} SVM, {self.chunk_size} images a chunk",
            f"already in use {format_bytes(self.base_bytes)}, planned peak {format_bytes(self.peak_bytes)} of {format_bytes(self.limit)}; "
            f"disk {format_bytes(self.disk_bytes)}",
        ]
        return "\n".join(lines)

    def _repr_html_(self):
        return f"<pre>{html.escape(str(self))}</pre>"


def plan(
    data, labels=None, *, memory_limit: int | str | None = None, preset: str = "fast", store: str | Path | None = None, **parameters: Any
) -> Plan:
    """What `fit` on this data would take; nothing is run or written.

    Parameters
    ----------
    data, labels
        As `open_images` takes them.
    memory_limit : int, str or None
        Bytes or a size such as `"1GiB"`; None for `memory.default_limit()`.
    preset : str
    store : path or None
        Where the store would be: its disk is looked at.
    **parameters
        Of `StreamCNNClassifier`.

    Returns
    -------
    Plan

    Raises
    ------
    MemoryBudgetError
        When the smallest chunk does not fit; with the itemised table and the smallest limit that would do.
    """
    n_jobs = resolve_n_jobs(parameters.pop("n_jobs", None))
    settings = resolve_settings(preset, n_jobs=n_jobs, **parameters)
    with open_images(data, labels) as source:
        return make_plan(source, settings, resolve_limit(memory_limit), None if store is None else Path(store))


def check_labels(source: ImageSource) -> int:
    """Number of classes; refuses a source without labels or with one class."""
    if source.labels is None or source.classes_ is None:
        raise DataError("labels are missing: give a folder with one subfolder per class, a file with labels, or the labels argument")
    if len(source.classes_) < 2:
        only = source.classes_[0] if len(source.classes_) else None
        raise DataError(f"at least 2 classes are needed to train a classifier, got 1 class ({only!r}): add images of another class")
    return len(source.classes_)


def resolve_components(n_components: Any, n_rows: int, n_features: int) -> int | None:
    """Components kept: at most what rows and features allow; None for no PCA."""
    most = min(n_rows, n_features)
    if n_components is None:
        return None
    if n_components == "auto":
        return min(256, most)
    if n_components > most:
        raise ParameterError(
            f"n_components must be at most min(images, features) = min({n_rows}, {n_features}) = {most}, got {n_components}: "
            f'lower it, or use "auto"'
        )
    return int(n_components)


def make_plan(source: ImageSource, settings: Settings, limit: int, store: Path | None) -> Plan:
    """The plan for an opened source; see `plan`."""
    n_classes = check_labels(source)
    geometry = resolve_layers(settings.layers, source.image_shape)
    network, kernels = Network(geometry, settings.preprocess), get_kernels(settings.device)
    n, d = source.n_samples, network.n_features
    k = resolve_components(settings.n_components, n, d)
    solver = None if k is None else resolve_solver(settings.pca_solver, d)
    kernel = resolve_kernel(settings.kernel, n, n_classes)
    itemsize = np.dtype(settings.feature_dtype).itemsize
    keep = _keep_features(settings.keep_features, n * d * itemsize, n * (k or 0) * 4, store)
    base = max(resident_bytes(), LIBRARY_BYTES)
    # kernel cache of the exact RBF SVM: a third of what is left; it changes speed only
    cache = int(min(512 << 20, max(16 << 20, (limit - base) // 3)))
    fixed = {"labels": 2 * source.labels.nbytes}  # type: ignore[union-attr]

    def stages(chunk: int) -> list[StagePlan]:
        images = image_claims(source, network, chunk, settings.feature_dtype, settings.n_jobs, kernels)
        block = {"feature block": block_rows(d) * d * 4}
        reading = {"stored block": block_rows(d) * d * itemsize, "HDF5": open_shard_bytes(d, itemsize)} if keep else images
        sample = {"sample of images": calibration_rows(source) * image_bytes(source)}
        result = [StagePlan("filters", fixed | sample | images, 1)]
        if keep:
            writing = {"HDF5": open_shard_bytes(d, itemsize)}
            result.append(StagePlan("extract", fixed | images | writing, 1, n * d * itemsize))
        width, rows_claims = d, reading
        if k is not None and solver is not None:
            result.append(StagePlan("pca", fixed | block | reading | pca_bytes(solver, d, k, n)))
            projecting = {"components": 2 * k * d * 8, "reduced block": block_rows(d) * k * 8, "HDF5 reduced": open_shard_bytes(k, 4)}
            result.append(StagePlan("project", fixed | block | reading | projecting, 1, n * k * 4))
            width, rows_claims = k, {"HDF5": open_shard_bytes(k, 4)}
        result.append(StagePlan("svm", fixed | rows_claims | svm_bytes(kernel, n, width, n_classes, cache_bytes=cache)))
        return result

    sizes = [c for c in CHUNK_SIZES if c < 2 * n]
    chosen = sizes[-1]
    for chunk in sizes:
        peak = base + max(stage.total for stage in stages(chunk))
        if peak <= COMFORT * limit:
            chosen = chunk
            break
    result = Plan(limit, base, chosen, stages(chosen), d, k or d, solver, kernel, keep, cache, geometry, source.describe())
    if result.peak_bytes > limit:
        _refuse(result)
    return result


def _refuse(refused: Plan) -> None:
    worst = max(refused.stages, key=lambda stage: stage.total)
    largest = max(worst.claims, key=lambda name: worst.claims[name])
    ways = {
        "pca": 'pca_solver="incremental", a larger pool_size or fewer filters',
        "svm": 'kernel="linear" or a smaller n_components',
    }
    way = ways.get(worst.name, "smaller images, fewer filters or a larger stride")
    raise MemoryBudgetError(
        f"memory_limit of {format_bytes(refused.limit)} is too small: stage {worst.name} needs {format_bytes(refused.peak_bytes)} even "
        f"with the smallest chunk, most of it for {largest}; set memory_limit to at least {-(-refused.peak_bytes // (1 << 20))}MiB, or try "
        f"{way}\n" + claims_table({"already in use, libraries": refused.base_bytes} | worst.claims)
    )


def image_bytes(source: ImageSource) -> int:
    """Bytes of one image as delivered."""
    return int(np.prod(source.image_shape)) * source.dtype.itemsize


def calibration_rows(source: ImageSource) -> int:
    """Images in the sample on which filters are scaled: 16 to 256, about 16 MiB; follows shapes alone."""
    return min(source.n_samples, max(16, min(256, CALIBRATION_BYTES // image_bytes(source))))


def image_claims(source: ImageSource, network: Network, chunk: int, dtype: str, n_jobs: int, kernels) -> dict[str, int]:
    """Bytes to read a chunk of images and turn it into rounded feature rows."""
    claims = {"pixels": chunk * image_bytes(source)} | source.scratch_bytes(chunk)
    claims |= network.buffer_bytes(chunk, n_jobs, kernels)
    # float16 rows, and numpy's mask of their finite values
    return claims | {"rounded rows": chunk * network.n_features * (np.dtype(dtype).itemsize + 1)}


def _keep_features(wish: Any, feature_bytes: int, reduced_bytes: int, store: Path | None) -> bool:
    """Whether feature rows stay on disk: as asked, or when they fit there with a tenth to spare; refuses too small a disk."""
    folder = store or Path(os.environ.get("STREAMCNN_TMPDIR") or Path.home())
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if store is not None and store.is_dir():  # what is there already is reused or replaced
        free += sum(file.stat().st_size for file in store.rglob("*.h5"))
    keep = bool(wish) if wish != "auto" else 1.1 * (feature_bytes + reduced_bytes) < free
    needed = reduced_bytes + (feature_bytes if keep else 0)
    if needed > free:
        raise StoreError(
            f"{folder} has {format_bytes(free)} free and the store needs {format_bytes(needed)}: free some, choose another store, or set "
            "keep_features=False"
        )
    return keep
