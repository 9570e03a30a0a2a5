"""What a fit or a prediction will take before it runs: bytes of every stage, disk, passes over the data, and the chunk size that fits.

Everything here follows from shapes and the limit. The limit decides the chunk size and the size of the SVM's cache alone: they change
how the work is cut, never its result.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.calibration import check_counts
from streamcnn.errors import DataError, ParameterError, StoreError, StreamCNNError
from streamcnn.files import existing, scratch_parent
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import get_kernels
from streamcnn.ladder import resolve_kernel
from streamcnn.layers import Geometry, resolve_layers
from streamcnn.memory import claims_table, format_bytes, resolve_limit
from streamcnn.network import Network
from streamcnn.pcaplan import resolve_solver
from streamcnn.planning import COMFORT, MemoryPlan, StagePlan, added, choose_chunk
from streamcnn.presets import Settings, resolve_settings
from streamcnn.sources import no_labels
from streamcnn.stages import (
    Shapes,
    base_claims,
    drawing_claims,
    evaluate_claims,
    fit_stages,
    fitted_bytes,
    image_claims,
    largest_chunk,
    predict_claims,
)
from streamcnn.threads import resolve_n_jobs

# libsvm's kernel cache, which changes speed only; how much it does was not measured. An easy problem leaves it unfilled, so a larger
# one would make the plan say far more than a run takes
_SMALLEST_CACHE, _LARGEST_CACHE = 16 << 20, 100 << 20


@dataclass(repr=False)
class Plan(MemoryPlan):
    """The plan of a fit; printing it shows the table.

    Attributes
    ----------
    n_features, n_components : int
        Width of a feature row, and of a reduced one.
    pca_solver, kernel : str
        As resolved from the data's shape.
    keep_features : bool
        Whether features stay on disk, or are computed again in every pass.
    svc_cache_bytes : int
        libsvm's kernel cache.
    limit : int
        Bytes.
    base, base_bytes : dict of str to int, int
        What is held in every stage by name, and its sum in bytes; the first is what the process held when the plan was made.
    chunk_size : int
        Images per kernel call.
    stages : list of StagePlan
    peak_bytes, disk_bytes : int
        Planned peak of resident memory of the process; what all stages write to disk.
    """

    n_features: int = 0
    n_components: int = 0
    pca_solver: str | None = None
    kernel: str = "linear"
    keep_features: bool = True
    svc_cache_bytes: int = _SMALLEST_CACHE
    geometry: list[Geometry] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    advise: Callable[[], str] | None = field(default=None, compare=False)

    def _way(self) -> str:
        return "" if self.advise is None else self.advise()

    def notes(self) -> list[str]:
        kept = "kept on disk" if self.keep_features else "computed again in each pass"
        solver = f"{self.pca_solver} PCA to {self.n_components}, " if self.pca_solver else ""
        return [f"{self.n_features} features an image ({kept}), {solver}{self.kernel} SVM", *super().notes()]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        names = ("n_features", "n_components", "pca_solver", "kernel", "keep_features", "source")
        return super().to_dict() | {name: getattr(self, name) for name in names}


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
        See `StreamCNNClassifier`.
    store : path or None
        Where the store would be: its disk is looked at.
    **parameters
        Of `StreamCNNClassifier`; `random_state` and `verbose` change nothing.

    Returns
    -------
    Plan

    Raises
    ------
    MemoryBudgetError
        When the smallest chunk does not fit; with the itemised table and the smallest limit that would do.
    StoreError
        When the disk has too little room.

    Examples
    --------
    >>> import numpy as np
    >>> from streamcnn import plan
    >>> images, labels = np.zeros((1000, 32, 32), np.uint8), np.arange(1000) % 2
    >>> made = plan(images, labels, memory_limit="2GiB")
    >>> made.peak_bytes < 2 << 30, made.kernel, [stage.name for stage in made.stages]
    (True, 'rbf', ['filters', 'extract', 'pca', 'project', 'svm', 'save'])
    """
    n_jobs, limit = resolve_n_jobs(parameters.pop("n_jobs", None)), resolve_limit(memory_limit)
    image_shape = parameters.pop("image_shape", None)
    for name in ("random_state", "verbose"):
        parameters.pop(name, None)
    if unknown := parameters.keys() - {each.name for each in fields(Settings)}:
        raise ParameterError(f"parameters must be those of StreamCNNClassifier, got {min(unknown)}: is it spelt right?")
    settings = resolve_settings(preset, n_jobs=n_jobs, **parameters)
    shape = "auto" if image_shape is None else image_shape
    with open_images(data, labels, image_shape=shape, memory_limit=limit) as source:
        return make_plan(source, settings, limit, None if store is None else Path(store))


def check_labels(source: ImageSource) -> int:
    """Number of classes; refuses a source without labels or with one class."""
    if source.labels is None or source.classes_ is None:
        raise no_labels(source)
    if len(source.classes_) < 2:
        only = next(iter(source.classes_.tolist()), None)
        raise DataError(f"at least 2 classes are needed to train a classifier, got 1 class ({only!r}): add images of another class")
    return len(source.classes_)


def resolve_components(n_components: Any, n_rows: int, n_features: int) -> int | None:
    """Components kept: at most what rows and features allow, of which "auto" leaves out the one without variance; None for no PCA."""
    most = min(n_rows, n_features)
    if n_components is None:
        return None
    if n_components == "auto":
        # n centred rows span n - 1 directions
        return min(256, max(1, n_rows - 1), n_features)
    if n_components > most:
        raise ParameterError(
            f"n_components must be at most min(images, features) = min({n_rows}, {n_features}) = {most}, got {n_components}: "
            f'lower it, or use "auto"'
        )
    return int(n_components)


# changes of a fit that make it smaller, the first of them that does is advised: what is asked, what is told
_SMALLER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"pca_solver": "randomized"}, 'pca_solver="randomized" (--pca-solver randomized)'),
    ({"kernel": "linear"}, 'kernel="linear" (--kernel linear)'),
    ({"n_components": 256}, "n_components=256 (--n-components 256)"),
    ({"n_components": 64}, "n_components=64 (--n-components 64)"),
    ({"n_jobs": 1}, "n_jobs=1 (--threads 1)"),
    ({"n_components": 64, "kernel": "linear"}, 'n_components=64 and kernel="linear" (--n-components 64 --kernel linear)'),
)


def _smaller(source: ImageSource, settings: Settings, limit: int, store: Path | None, test: ImageSource | None) -> str:
    """What would make a fit fit that does not, tried by planning it; empty where none of `_SMALLER` would."""
    for changes, text in _SMALLER:
        with contextlib.suppress(StreamCNNError):
            make_plan(source, replace(settings, **changes), limit, store, test, advised=False)
            return f"try {text}"
    return ""


def make_plan(
    source: ImageSource, settings: Settings, limit: int, store: Path | None, test: ImageSource | None = None, advised: bool = True
) -> Plan:
    """The plan for an opened source, and for evaluating on `test` afterwards; a refusal is `advised` of what would fit. See `plan`."""
    n_classes = check_labels(source)
    source.check()
    geometry = resolve_layers(settings.layers, source.image_shape)
    network, kernels = Network(geometry, settings.preprocess, mirror=settings.mirror), get_kernels(settings.device)
    n, d = source.n_samples, network.n_features
    k = resolve_components(settings.n_components, n, d)
    kernel = resolve_kernel(settings.kernel, n, n_classes)
    counts = tuple(np.bincount(source.labels, minlength=n_classes).tolist())  # type: ignore[arg-type]
    if settings.probability:  # before any image is convolved
        check_counts(np.array(counts), source.classes_)  # type: ignore[arg-type]
    solver = None if k is None else resolve_solver(settings.pca_solver, d, k)
    base = base_claims(source, network, settings.n_jobs, kernels)

    def build(chunk: int, keep: bool, cache: int) -> Plan:
        s = settings
        shapes = Shapes(n, d, k, solver, kernel, counts, s.feature_dtype, keep, s.n_jobs, cache, s.n_landmarks, s.probability)
        stages = fit_stages(source, network, shapes, chunk, kernels)
        if test is not None:
            claims = _predicting(test, network, chunk, s.feature_dtype, s.n_jobs, kernels, k, kernel, n_classes, shapes.n_vectors)
            stages.append(StagePlan("evaluate", added(claims, evaluate_claims(test, n_classes), {"model": fitted_bytes(network, shapes)})))
        return Plan(limit, base, chunk, stages, d, k or d, solver, kernel, keep, cache, geometry, source.describe(), advise)

    advise = partial(_smaller, source, settings, limit, store, test) if advised else None
    keep = _keep_features(settings.keep_features, build(1, True, _SMALLEST_CACHE), build(1, False, _SMALLEST_CACHE), store)
    # with what it could advise a plan would hold the images, and be pickled with them
    return replace(_roomiest(limit, largest_chunk(source, network), lambda chunk, cache: build(chunk, keep, cache)), advise=None)


def _roomiest(limit: int, largest: int, build: Callable[[int, int], Plan]) -> Plan:
    """The plan of the largest chunk that fits, and with it of the largest cache of the SVM."""
    chosen = choose_chunk(limit, largest, lambda chunk: build(chunk, _SMALLEST_CACHE))
    room = int(COMFORT * limit) - chosen.planned("svm") + _SMALLEST_CACHE
    return build(chosen.chunk_size, max(_SMALLEST_CACHE, min(_LARGEST_CACHE, room)))


def plan_adding(source: ImageSource, network: Network, shapes: Shapes, limit: int, store: Path, kernels) -> Plan:
    """The plan of adding a source's images to a finished fit; `shapes` are of all rows, the new ones included.

    Raises
    ------
    MemoryBudgetError
        When not even one image at a time fits, or the SVM does not.
    StoreError
        When the disk has too little room.
    """
    base, d, k = base_claims(source, network, shapes.n_jobs, kernels), network.n_features, shapes.n_components
    # without PCA new features are written as a fit writes them, else they are reduced at once
    writing, itemsize = ("extract", shapes.itemsize) if k is None else ("project", 4)

    def build(chunk: int, cache: int) -> Plan:
        named = {stage.name: stage for stage in fit_stages(source, network, replace(shapes, svc_cache_bytes=cache), chunk, kernels)}
        add = StagePlan("add", named[writing].claims, 1, source.n_samples * shapes.reduced * itemsize)
        stages, solver = [add, replace(named["svm"], disk_bytes=0), named["save"]], shapes.pca_solver
        return Plan(limit, base, chunk, stages, d, k or d, solver, shapes.kernel, k is None, cache, network.geometry, source.describe())

    made = _roomiest(limit, largest_chunk(source, network), build)
    check_disk(made, store)
    return made


def plan_prediction(
    source: ImageSource,
    network: Network,
    n_components: int | None,
    kernel: str,
    n_classes: int,
    n_support: int,
    dtype: str,
    n_jobs: int,
    limit: int,
    kernels,
    extra: dict[str, int] | None = None,
    after: StagePlan | None = None,
) -> MemoryPlan:
    """The plan of predicting with a fitted model, which is in memory already, and of the stage `after`, which the kernels stay loaded in.

    `extra` are claims of whoever takes the decisions.

    Raises
    ------
    MemoryBudgetError
        When not even one image at a time fits.
    """
    base = base_claims(source, network, n_jobs, kernels)

    def build(chunk: int) -> MemoryPlan:
        claims = _predicting(source, network, chunk, dtype, n_jobs, kernels, n_components, kernel, n_classes, n_support)
        return MemoryPlan(limit, base, chunk, [StagePlan("predict", added(claims, extra or {})), *([after] if after else [])])

    return choose_chunk(limit, largest_chunk(source, network), build)


def plan_drawing(source: ImageSource, network: Network, n_jobs: int, limit: int, kernels) -> MemoryPlan:
    """The plan of drawing filters alone.

    Raises
    ------
    MemoryBudgetError
        When the sample of images does not fit.
    """
    stage = StagePlan("filters", drawing_claims(source, network, n_jobs, kernels))
    made = MemoryPlan(limit, base_claims(source, network, n_jobs, kernels), 1, [stage])
    made.check()
    return made


def plan_transform(source: ImageSource, network: Network, dtype: str, n_jobs: int, limit: int, kernels) -> MemoryPlan:
    """The plan of turning a source into an array of feature rows.

    Raises
    ------
    MemoryBudgetError
        When a single image at a time does not fit beside the array.
    """
    base = base_claims(source, network, n_jobs, kernels)

    def build(chunk: int) -> MemoryPlan:
        claims = image_claims(source, network, chunk, dtype, n_jobs, kernels)
        result = {"feature rows": 4 * source.n_samples * network.n_features}
        return MemoryPlan(limit, base, chunk, [StagePlan("transform", added(claims, result))])

    return choose_chunk(limit, largest_chunk(source, network), build)


def _predicting(source, network, chunk, dtype, n_jobs, kernels, n_components, kernel, n_classes, n_support) -> dict[str, int]:
    images = image_claims(source, network, chunk, dtype, n_jobs, kernels)
    return added(images, predict_claims(network, n_components, kernel, n_classes, n_support))


def _keep_features(wish: Any, keeping: Plan, not_keeping: Plan, store: Path | None) -> bool:
    """Whether feature rows stay on disk: as asked, or when they fit there with a tenth to spare; refuses too small a disk."""
    # once there are shards it stays as it is: on a disk that is nearly full, all passes would convolve again beside them
    begun = store is not None and any((store / "features").glob("*.h5"))
    keep = bool(wish) if wish != "auto" else (1.0 if begun else 1.1) * keeping.disk_bytes < free_disk(store, _WRITTEN)
    check_disk(keeping if keep else not_keeping, store)
    return keep


_WRITTEN = {"extract": ["features/*.h5"], "project": ["reduced/*.h5"], "save": ["*.h5"]}


def free_disk(store: Path | None, stages: Iterable[str]) -> int:
    """Bytes that these stages may fill at this path, what they wrote there before included; None is a temporary store."""
    folder = scratch_parent() if store is None else store
    # reused or replaced
    patterns = [pattern for stage in stages for pattern in (*_WRITTEN.get(stage, ()), f"stages/{stage}.h5")]
    there = 0 if store is None else sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))
    return shutil.disk_usage(existing(folder)).free + there


def check_disk(plan: Plan, store: Path | None, stage: str | None = None) -> None:
    """Refuse a plan whose store, from `stage` on, does not fit its disk.

    Raises
    ------
    StoreError
        With the itemised table.
    """
    names = [s.name for s in plan.stages]
    left = plan.stages[names.index(stage) if stage else 0 :]
    free, needed = free_disk(store, (s.name for s in left)), sum(s.disk_bytes for s in left)
    if needed <= free:
        return
    where = "the folder for temporary stores" if store is None else store
    way = "keep_features=False (--keep-features no)" if plan.keep_features else "another preset (--preset)"
    raise StoreError(
        f"{where} has {format_bytes(free)} free and the store needs {format_bytes(needed)}: free some, choose another store, or "
        f"try {way}\n" + claims_table({s.name: s.disk_bytes for s in left if s.disk_bytes})
    )
