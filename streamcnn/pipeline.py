"""The run: filters, extract, PCA, project, SVM. Each stage is finished once and reused as long as its digest matches."""

import json
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamcnn.checkpoint import Checkpoint, FileCheckpoint, with_checkpoint
from streamcnn.digests import check_resume, digest_of, library_versions, stage_digests
from streamcnn.errors import ParameterError, StoreError
from streamcnn.features import DataHash, FeatureExtractor
from streamcnn.images import ImageSource
from streamcnn.kernels import get_kernels
from streamcnn.memory import MemoryMonitor, format_bytes
from streamcnn.network import Network
from streamcnn.pca import StreamingPCA
from streamcnn.plan import Plan, check_disk
from streamcnn.presets import Settings
from streamcnn.progress import CountedRows, Progress, counted
from streamcnn.rows import Rows, block_rows, iter_blocks, sample_rows
from streamcnn.shards import shard_rows
from streamcnn.stages import calibration_rows
from streamcnn.store import FeatureStore
from streamcnn.svm import StreamingSVC
from streamcnn.system import trim_heap
from streamcnn.threads import limit_blas
from streamcnn.tracing import Trace

# kind of shards -> the stage that makes them
_STAGES = {"features": "extract", "reduced": "project"}


def _stage_of(entry: dict[str, Any]) -> str:
    """The stage that an entry of the manifest is of."""
    return _STAGES.get(entry["kind"], "add") if "kind" in entry else entry["stage"]


@dataclass(repr=False)
class Report:
    """What a run did and took; printing it shows that and the plan.

    Attributes
    ----------
    plan : Plan
        What was planned.
    stage_seconds : dict of str to float
        Of each stage, 0.0 of those reused.
    reused : list of str
        Stages that were finished before with the same data and parameters.
    resumed : bool
        Whether finished work was gone on from.
    store_bytes : int
        Of the store on disk, 0 where it was a temporary one.
    trace : Trace or None
        Resident memory over time, where the caller keeps that.
    """

    plan: Plan
    stage_seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    resumed: bool = False
    store_bytes: int = 0
    trace: Trace | None = None

    def __str__(self):
        took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stage_seconds.items() if name not in self.reused)
        lines = [f"seconds    {took or 'none'}"]
        if self.reused:
            lines.append(f"reused     {', '.join(self.reused)}")
        if self.store_bytes:
            lines.append(f"store      {format_bytes(self.store_bytes)}")
        return "\n".join([*lines, str(self.plan)])

    __repr__ = __str__


class Run:
    """One fit over an opened source into an opened, locked store.

    Parameters
    ----------
    source : ImageSource
    settings : Settings
    store : FeatureStore
    plan : Plan
    progress : Progress
    monitor : MemoryMonitor
        Entered by the caller.
    resume : bool
        Check the hashes of finished shards and refuse other data or parameters.
    verify_data : bool
        Read the images of finished shards again, and refuse when they are others.
    """

    def __init__(
        self,
        source: ImageSource,
        settings: Settings,
        store: FeatureStore,
        plan: Plan,
        progress: Progress,
        monitor: MemoryMonitor,
        resume: bool = False,
        verify_data: bool = False,
    ):
        if verify_data and not plan.keep_features:
            raise ParameterError(
                "verify_data must be False where features are not kept (keep_features), as no shards are made of the images; leave it away"
            )
        self.verify_data = verify_data
        self.source, self.settings, self.store = source, settings, store
        self.plan, self.progress, self.monitor, self.check_shards = plan, progress, monitor, resume
        self.kernels = get_kernels(settings.device)
        self.report = Report(plan)
        fingerprint = source.fingerprint()
        if resume:
            check_resume(store, source, settings, fingerprint)
        self.digests = stage_digests(fingerprint, settings, plan, source.n_samples)
        assert source.classes_ is not None and source.labels is not None
        self.labels, self.classes = source.labels, source.classes_
        self.report.resumed = any(entry.get("stage") != "search" for entry in store.entries)
        # a fit is of its own images alone, and the classes and digests below are what additions refer to
        if store.additions():
            progress.say(f"images added to the fit in {store.path} are dropped: add them again after this one")
        store.drop_added()
        self._say_dropped(fingerprint)
        store.update_config(
            parameters=settings.describe(),
            source=source.describe(),
            fingerprint=fingerprint,
            digests=self.digests,
            classes=self.classes.tolist(),
            bad_files=[list(map(str, bad)) for bad in source.bad_files],
            versions=library_versions(),
        )

    def run(self) -> tuple[Network, StreamingPCA | None, StreamingSVC]:
        """All stages in order."""
        network = self._filters()
        if self.plan.keep_features:
            self.extract(network)
        # what it keeps of the images (a chunk, a cache of HDF5) is in no plan of the stages that read none; it is taken again where needed
        self.source.close()
        pca = self._reduce(network) if self.plan.pca_solver else None
        svm = self._train(network)
        if self.plan.keep_features:
            with self.monitor.stage("save", self.plan.planned("save")):
                self.store.write_virtual()
        self.store.drop_checkpoints()
        self.report.store_bytes = self.store.nbytes
        return network, pca, svm

    def _stage(self, name: str) -> AbstractContextManager[None]:
        self.progress.check()
        return planned_stage(name, self.report, self.store, self.monitor)

    def _reuse(self, name: str) -> dict[str, np.ndarray] | None:
        """Arrays of a stage already finished, said aloud."""
        arrays = self.store.stage_arrays(name, self.digests[name])
        if arrays is not None:
            self._say_reused(name)
        return arrays

    def _say_reused(self, name: str) -> None:
        self.report.reused.append(name)
        self.report.stage_seconds[name] = 0.0
        self.progress.say(f"{name:<8}: finished before with the same data and parameters, reused")

    def _say_dropped(self, fingerprint: str) -> None:
        """Say which work in the store is of other data or parameters, and so is about to be dropped: it may have cost hours."""
        left_out = ("extract",) * (not self.plan.keep_features) + ("pca", "project") * (not self.plan.pca_solver)
        stages = [name for name in self.digests if name not in left_out]
        stale = [e for e in self.store.entries if _stage_of(e) in stages and e["digest"] != self.digests[_stage_of(e)]]
        if not stale:
            return
        config, now = self.store.config, json.loads(json.dumps(self.settings.describe()))
        before = config.get("parameters", now)
        changed = [name for name in now | before if name != "keep_features" and before.get(name) != now.get(name)]
        changed += ["data"] * (config.get("fingerprint") != fingerprint) + ["versions"] * (config.get("versions") != library_versions())
        # of the store's last fit: where that was stopped early, what is dropped may be older
        since = f" (changed since its last fit: {', '.join(changed)})" if changed else ""
        names = ", ".join(name for name in stages if any(_stage_of(entry) == name for entry in stale))
        shards = f" ({counted(n, 'shards')})" if (n := sum("kind" in entry for entry in stale)) else ""
        self.progress.say(f"{self.store.path} has {names}{shards} of other data or parameters{since}: dropped, and done again")

    def _filters(self) -> Network:
        network = Network(self.plan.geometry, self.settings.preprocess, mirror=self.settings.mirror)
        if (arrays := self._reuse("filters")) is not None:
            entry = self.store.finished("filters", self.digests["filters"])
            assert entry is not None
            return Network.from_arrays(entry["network"], arrays)
        n_filters = sum(geometry.layer.n_filters for geometry in self.plan.geometry)
        with self._stage("filters"), self.progress.bar("filters", n_filters, "filters", stops=False) as update:
            draw_filters(network, self.source, self.settings, self.kernels)
            self.store.finish("filters", self.digests["filters"], network.to_arrays(), network=network.describe())
            update(n_filters)
        return network

    def _extractor(self, network: Network, data_hash: DataHash | None = None) -> FeatureExtractor:
        s = self.settings
        return FeatureExtractor(
            self.source, network, s.feature_dtype, self.plan.chunk_size, s.n_jobs, self.kernels, self.monitor, data_hash
        )

    def extract(self, network: Network) -> None:
        """Write the feature shards that are not there yet."""
        digest, n, d = self.digests["extract"], self.source.n_samples, network.n_features
        there = self._begin("features", digest)
        if self.verify_data:
            self._verify_data()
        if self.store.finished("extract", digest) and len(there) == self._n_shards(d, np.dtype(self.settings.feature_dtype).itemsize):
            self._say_reused("extract")
            return
        with self._stage("extract"), self.progress.bar("extract", n, stops=False) as update:
            dtype = self.settings.feature_dtype
            rows = shard_rows(d, np.dtype(dtype).itemsize)
            shards = {shard: (start, min(start + rows, n)) for shard, start in enumerate(range(0, n, rows))}
            missing = {shard: span for shard, span in shards.items() if shard not in there}
            update(n - sum(stop - start for start, stop in missing.values()))
            # one stream over all of them: a shard is closed and flushed while the next one's first images are convolved
            data_hash = DataHash(rows)
            stream = self._extractor(network, data_hash).chunks(*missing.values())
            with closing(stream):
                for shard, (start, stop) in missing.items():
                    with self.store.writing("features", shard, start, stop - start, d, dtype, digest) as writer:
                        while writer.filled < stop - start:
                            first, features = next(stream)
                            writer.write(features, self.labels[first : first + len(features)])
                            update(len(features))
                        writer.facts["data_sha256"] = data_hash.take(shard)
                    self.progress.check()
            data = digest_of([entry.get("data_sha256") for entry in self.store.shards("features")])
            self.store.finish("extract", digest, data_sha256=data)

    def _verify_data(self) -> None:
        """Refuse images that are not those the finished shards were made of."""
        source, done = self.source, self.store.shards("features")
        size = min(self.plan.chunk_size, source.n_samples)
        pixels = np.empty((size, *source.image_shape), source.dtype)
        with self._stage("extract"), self.progress.bar("verify", sum(entry["rows"] for entry in done)) as update:
            for entry in done:
                start, stop = entry["start"], entry["start"] + entry["rows"]
                data_hash = DataHash(stop)
                for first in range(start, stop, size):
                    last = min(first + size, stop)
                    source.read(first, last, pixels)
                    data_hash.add(0, pixels[: last - first])
                    update(last - first)
                if (known := entry.get("data_sha256")) is None:
                    raise StoreError(f"{self.store.path} was made before images had digests there: leave verify_data away, or fit afresh")
                if data_hash.take(0) != known:
                    raise StoreError(
                        f"{self.store.path} was made from other images than numbers {start} to {stop - 1} are now: restore them, or fit "
                        "afresh into another store"
                    )

    def _begin(self, kind: str, digest: str) -> set[int]:
        """Numbers of the shards that are there already; on resume each is compared with its hash."""
        found = self.store.shards(kind, digest)
        if found and self.store.finished(_STAGES[kind], digest) is None:
            self.progress.say(f"{_STAGES[kind]:<8}: goes on from {counted(len(found), 'shards')} of an interrupted fit")
        if not self.check_shards or not found:
            return self.store.begin(kind, digest)
        with self.progress.bar("check", len(found), "shards") as update:
            return self.store.begin(kind, digest, check=update)

    def _n_shards(self, width: int, itemsize: int) -> int:
        return -(-self.source.n_samples // shard_rows(width, itemsize))

    def _feature_rows(self, network: Network) -> Rows:
        return self.store.rows("features") if self.plan.keep_features else self._extractor(network)

    def _reduce(self, network: Network) -> StreamingPCA:
        plan, n = self.plan, self.source.n_samples
        if (arrays := self._reuse("pca")) is not None:
            pca = StreamingPCA.from_arrays(arrays)
        else:
            # the passes that are planned for a randomized one are the most it may make
            total = None if plan.pca_solver == "randomized" else n * plan.stage("pca").passes
            unit = "rows" if total else "rows read"
            with self._stage("pca"), self.progress.bar("pca", total, unit, stops=False) as update:
                pca = StreamingPCA(plan.n_components, solver=plan.pca_solver, n_jobs=self.settings.n_jobs, random_state=self.settings.seed)
                features = CountedRows(self._feature_rows(network), update)
                checkpoint = stage_checkpoint(self.store, "pca", self.digests["pca"], features, self.progress)
                with_checkpoint(checkpoint, lambda kept: pca.fit(features, checkpoint=kept))
                arrays = pca.to_arrays()
                self.store.finish("pca", self.digests["pca"], arrays)
                checkpoint.remove()
                # the fitted one holds its d x d matrix of moments, which no later stage has claimed
                pca = StreamingPCA.from_arrays(arrays)
        digest, k = self.digests["project"], plan.n_components
        there = self._begin("reduced", digest)
        if self.store.finished("project", digest) and len(there) == self._n_shards(k, 4):
            self._say_reused("project")
            return pca
        with self._stage("project"), self.progress.bar("project", n, "rows", stops=False) as update, limit_blas(self.settings.n_jobs):
            source_rows = self._feature_rows(network)
            rows = shard_rows(k, 4)  # a multiple of every block's rows, so blocks never straddle shards
            for shard, start in enumerate(range(0, n, rows)):
                stop = min(start + rows, n)
                if shard in there:
                    update(stop - start)
                    continue
                with self.store.writing("reduced", shard, start, stop - start, k, "float32", digest) as writer:
                    for first, reduced in reduced_rows(pca, source_rows, start, stop):
                        writer.write(reduced, self.labels[first : first + len(reduced)])
                        update(len(reduced))
                self.progress.check()
            self.store.finish("project", digest)
        pca.drop_projector()
        return pca

    def _train(self, network: Network) -> StreamingSVC:
        s = self.settings
        if (arrays := self._reuse("svm")) is not None:
            return StreamingSVC.from_arrays(arrays)
        self.progress.say(f"{'svm':<8}: learns from {counted(self.source.n_samples, 'rows')}, each of which it may read many times")
        with self._stage("svm"), self.progress.bar("svm", None, "rows read", stops=False) as update:
            rows = CountedRows(self.store.rows("reduced") if self.plan.pca_solver else self._feature_rows(network), update)
            svm = make_svm(s.describe(), self.plan, self.classes)
            checkpoint = stage_checkpoint(self.store, "svm", self.digests["svm"], rows, self.progress)
            with_checkpoint(checkpoint, lambda kept: svm.fit(rows, self.labels, checkpoint=kept))
            self.store.finish("svm", self.digests["svm"], svm.to_arrays())
            checkpoint.remove()
        return svm


@contextmanager
def planned_stage(name: str, report: Report, store: FeatureStore, monitor: MemoryMonitor) -> Iterator[None]:
    """A stage of `report.plan`: its disk is looked at before, its memory watched, its seconds reported, also of one that fails."""
    start = time.perf_counter()
    check_disk(report.plan, store.path, name)
    try:
        with monitor.stage(name, report.plan.planned(name)):
            yield
        trim_heap()
    finally:
        report.stage_seconds[name] = report.stage_seconds.get(name, 0.0) + time.perf_counter() - start


def stage_checkpoint(store: FeatureStore, stage: str, digest: str, rows: CountedRows, progress: Progress) -> Checkpoint:
    """Where a stage keeps its state; a temporary store, which nobody can resume, keeps none."""
    if not store.durable:
        return Checkpoint(progress.check)
    return FileCheckpoint(store.checkpoint_folder(stage), digest, rows, progress.check)


def make_svm(settings: dict[str, Any], plan: Plan, classes: np.ndarray) -> StreamingSVC:
    """The SVM of described settings, which gets class codes for labels."""
    weight = settings["class_weight"]
    if isinstance(weight, dict):
        codes = {label: code for code, label in enumerate(classes.tolist())}
        weight = {codes[label]: value for label, value in weight.items() if label in codes}
    return StreamingSVC(
        kernel=plan.kernel,
        # 800 digits of 16,000 features, which planes separate, took 139 passes
        max_iter=400,
        C=settings["C"],
        gamma=settings["gamma"],
        class_weight=weight,
        n_landmarks=settings["n_landmarks"],
        probability=settings["probability"],
        cache_size=plan.svc_cache_bytes / (1 << 20),
        n_jobs=settings["n_jobs"],
        random_state=settings["seed"],
    )


def reduced_rows(pca: StreamingPCA, rows: Rows, start: int, stop: int) -> Generator[tuple[int, np.ndarray], None, None]:
    """Yield (first row, reduced rows (m, n_components) float32, overwritten by the next) of rows `start` to `stop`."""
    block = np.empty((block_rows(rows.n_features), rows.n_features), np.float32)
    reduced = np.empty((len(block), pca.n_components_), np.float32)
    for first, n_valid in iter_blocks(_Window(rows, start, stop), block):
        yield start + first, pca.transform_block(block, reduced)[:n_valid]


def draw_filters(network: Network, source: ImageSource, settings: Settings, kernels) -> None:
    """Draw a network's filters and scale them on a sample of the source's images."""
    rows = sample_rows(source.n_samples, calibration_rows(source, network), settings.seed)
    sample = np.empty((len(rows), *source.image_shape), source.dtype)
    source.read_rows(rows, sample)
    network.draw(sample, settings.seed, settings.n_jobs, kernels)


class _Window:
    """Rows `start` to `stop` of other rows."""

    def __init__(self, rows: Rows, start: int, stop: int):
        self._rows, self._start = rows, start
        self.n_rows, self.n_features = stop - start, rows.n_features

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        self._rows.read(self._start + start, self._start + stop, out)
