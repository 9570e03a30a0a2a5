"""Adding images to a finished fit: filters, PCA and row scaling stay, the new images' rows join the kept ones, the SVM is solved again.

The store of the fit is needed, whose reduced rows (without PCA: feature rows) are read again. New rows go into shards of their own
under `added/`. Each call is one entry of the manifest, written last, whose digest covers the digest of the model before it and the new
images: so a call that was interrupted, anywhere, is known when it is made again, and goes on with the shards it finds.
"""

import contextlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.calibration import check_counts
from streamcnn.checkpoint import with_checkpoint
from streamcnn.digests import digest_of, library_versions
from streamcnn.errors import DataError, NotKeptError, StoreError
from streamcnn.features import FeatureExtractor
from streamcnn.fitting import interrupted
from streamcnn.images import ImageSource
from streamcnn.kernels import get_kernels
from streamcnn.ladder import resolve_kernel
from streamcnn.memory import MemoryMonitor
from streamcnn.model import Model
from streamcnn.pipeline import Report, make_svm, planned_stage, reduced_rows, stage_checkpoint
from streamcnn.plan import plan_adding
from streamcnn.progress import CountedRows, Progress, interruptible
from streamcnn.runrecord import record_run
from streamcnn.shards import shard_rows
from streamcnn.sources import no_labels
from streamcnn.stages import Shapes
from streamcnn.store import FeatureStore
from streamcnn.svm import StreamingSVC
from streamcnn.threads import limit_blas

# raise when the code changes what it computes
_VERSION = 1
_PIECE = 1 << 16


def add_images(
    model: Model, source: ImageSource, store_path: Path | None, limit: int, progress: Progress, monitor: MemoryMonitor
) -> tuple[Model, Report]:
    """The model of all images of a fit and of calls before, and those of `source`.

    Parameters
    ----------
    model : Model
        Of the fit in the store, or of the last call.
    source : ImageSource
        With labels; classes may be new.
    store_path : Path or None
        The fit's store.
    limit : int
        Memory limit in bytes.
    progress : Progress
    monitor : MemoryMonitor
        Entered by the caller.

    Returns
    -------
    model, report : Model, Report
        A new model, also written to the store; `model` stays as it is.

    Raises
    ------
    NotKeptError
        Without a store.
    StoreError
        When it is in use, is no store, or holds another fit than the model's, or other additions.
    DataError
        For images of another kind or shape, or labels of another kind.
    MemoryBudgetError
        When the new images, or the SVM on all rows, do not fit the limit.
    """
    model.check_source(source)
    if store_path is None:
        raise no_store()
    if not (store_path / "config.json").exists():
        raise StoreError(f"store must be the folder in which the first fit kept its rows, {store_path} holds no store: fit into it again")
    with FeatureStore(store_path) as store:
        store.lock()
        addition, done = _Addition(model, source, store, limit, progress, monitor), False
        try:
            with interruptible():
                result = addition.run()
            done = True
            return result
        except KeyboardInterrupt:
            raise interrupted("addition", store.path) from None
        finally:
            with contextlib.suppress(OSError):
                digests = dict.fromkeys(("add", "svm", "save"), addition.digest)
                record_run(store, addition.plan, addition.report.stage_seconds, digests, source, monitor, done)


def no_store() -> NotKeptError:
    """What is wrong with `store=None`."""
    return NotKeptError(
        "store must be the folder in which the first fit kept the rows that partial_fit adds to, got None: fit with store=, then add images"
    )


class _Addition:
    """One call of `add_images`, with its store opened and locked."""

    def __init__(self, model: Model, source: ImageSource, store: FeatureStore, limit: int, progress: Progress, monitor: MemoryMonitor):
        self.model, self.source, self.store, self.progress, self.monitor = model, source, store, progress, monitor
        self.settings: dict[str, Any] = model.header["settings"]
        self.digest = digest_of(model.header["digest"], "added", _VERSION, source.fingerprint(), library_versions())
        # a call made again after it was recorded, its caller interrupted before having the result, is still the same one
        self.calls = [call for call in store.additions() if call["digest"] != self.digest]
        self._check_store()
        self._merge_classes()
        self.labels = self._all_labels()
        self.kernels = get_kernels(self.settings["device"])
        self.plan = plan_adding(source, model.network, self._shapes(), limit, store.path, self.kernels)
        self.report = Report(self.plan)

    def _check_store(self) -> None:
        """`before`, the shards of all rows before this call, once it is sure that they are those of the model."""
        store, header = self.store, self.model.header
        digests = store.config["digests"]
        head = self.calls[-1]["digest"] if self.calls else digests.get("svm")
        if head != header["digest"]:
            raise StoreError(
                f"store must hold the fit and the additions that this model was trained on, {store.path} holds others: repeat the call "
                "that was interrupted, or fit again, then add images"
            )
        kind, stage = ("features", "extract") if self.model.pca is None else ("reduced", "project")
        self.before = store.shards(kind, digests[stage])
        for call in self.calls:
            self.before += store.shards("added", call["digest"])
        self.n_before = sum(entry["rows"] for entry in self.before)
        if self.n_before != header["n_train"]:
            raise StoreError(
                f"store must keep the {header['n_train']} rows that the model was trained on, {store.path} has {self.n_before}: fit again"
                + (", with keep_features=True, as rows without PCA are features" if self.model.pca is None else "")
            )

    def _merge_classes(self) -> None:
        """`classes`, sorted, and `stored`, labels in the order of the store's codes, which only grows at its end."""
        if self.source.classes_ is None:
            raise no_labels(self.source)
        old, new = self.model.classes_, self.source.classes_
        dtype = np.promote_types(old.dtype, new.dtype)
        if (old.dtype.kind == "U") != (new.dtype.kind == "U") or dtype.kind == "f":
            kinds = ["names" if classes.dtype.kind == "U" else f"whole numbers ({classes.dtype})" for classes in (old, new)]
            raise DataError(f"labels must be {kinds[0]} as in the first fit, got {kinds[1]} such as {new[0]!r}: convert them")
        self.stored = self.store.config["classes"] + [label for call in self.calls for label in call["new_classes"]]
        there, self.new_labels = set(self.stored), new
        self.new_classes = [label for label in new.tolist() if label not in there]
        self.stored = self.stored + self.new_classes
        self.classes = np.sort(np.array(self.stored, dtype))

    def _all_labels(self) -> np.ndarray:
        """Places in `classes` of all rows, the new ones last: (n,) int32."""
        sorted_place = np.searchsorted(self.classes, np.array(self.stored, self.classes.dtype)).astype(np.int32)
        labels = np.empty(self.n_before + self.source.n_samples, np.int32)
        with self.store.rows_of(self.before) as rows:
            for start in range(0, self.n_before, _PIECE):
                stop = min(start + _PIECE, self.n_before)
                labels[start:stop] = sorted_place[rows.read_labels(start, stop)]
        labels[self.n_before :] = np.searchsorted(self.classes, self.new_labels.astype(self.classes.dtype))[self.source.labels]
        return labels

    def _shapes(self) -> Shapes:
        s, k, n = self.settings, None if self.model.pca is None else self.model.pca.n_components_, len(self.labels)
        kernel = resolve_kernel(s["kernel"], n, len(self.classes))
        counts = tuple(np.bincount(self.labels, minlength=len(self.classes)).tolist())
        if s["probability"]:
            check_counts(np.array(counts), self.classes)
        shape = (n, self.model.network.n_features, k, self.model.header["pca_solver"], kernel, counts, s["feature_dtype"])
        # reduced rows are computed from images at once: no features are kept beside them
        more = {name: s[name] for name in ("n_jobs", "n_landmarks", "probability")}
        return Shapes(*shape, keep_features=k is None, svc_cache_bytes=0, **more)

    def run(self) -> tuple[Model, Report]:
        """Write the new rows that are not there yet, train on all, save, record."""
        self._write_rows()
        svm = self._train()
        header = self.model.header | {"n_train": len(self.labels), "kernel": self.plan.kernel, "digest": self.digest}
        model = Model(self.model.network, self.model.pca, svm, self.classes, header | {"versions": library_versions()})
        with self.monitor.stage("save", self.plan.planned("save")):
            model.write(self.store.path / "model.h5")
        name = f"added-{len(self.calls):05d}"
        self.store.finish(name, self.digest, rows=self.source.n_samples, new_classes=self.new_classes)
        self.store.drop_checkpoints()
        self.report.store_bytes = self.store.nbytes
        return model, self.report

    def _write_rows(self) -> None:
        store, source, pca, n_jobs = self.store, self.source, self.model.pca, self.settings["n_jobs"]
        dtype = self.settings["feature_dtype"] if pca is None else "float32"
        width, n = self.plan.n_components, source.n_samples
        there = store.begin("added", *(call["digest"] for call in self.calls), self.digest)
        number = len(there & {entry["shard"] for entry in self.before if entry["kind"] == "added"})
        step = shard_rows(width, np.dtype(dtype).itemsize)
        self.report.resumed = len(there) > number
        # the codes of the store, which never change, not the sorted ones
        stored = {label: code for code, label in enumerate(self.stored)}
        codes = np.array([stored[label] for label in self.new_labels.tolist()])[source.labels]
        with (
            planned_stage("add", self.report, store, self.monitor),
            self.progress.bar("add", n, stops=False) as update,
            limit_blas(n_jobs),
        ):
            extractor = FeatureExtractor(
                source, self.model.network, self.model.feature_dtype, self.plan.chunk_size, n_jobs, self.kernels, self.monitor
            )
            for shard, start in enumerate(range(0, n, step), number):
                stop = min(start + step, n)
                if shard in there:
                    update(stop - start)
                    continue
                rows = extractor.chunks((start, stop)) if pca is None else reduced_rows(pca, extractor, start, stop)
                with closing(rows), store.writing("added", shard, self.n_before + start, stop - start, width, dtype, self.digest) as writer:
                    for first, block in rows:
                        writer.write(block, codes[first : first + len(block)])
                        update(len(block))
                self.progress.check()
            if pca is not None:
                pca.drop_projector()

    def _train(self) -> StreamingSVC:
        shards = self.before + self.store.shards("added", self.digest)
        with (
            planned_stage("svm", self.report, self.store, self.monitor),
            self.progress.bar("svm", None, "rows read", stops=False) as update,
            self.store.rows_of(shards) as rows,
        ):
            svm = make_svm(self.settings, self.plan, self.classes)
            known = np.searchsorted(self.classes, self.model.classes_.astype(self.classes.dtype))
            counted = CountedRows(rows, update)
            checkpoint = stage_checkpoint(self.store, "added", self.digest, counted, self.progress)
            with_checkpoint(checkpoint, lambda kept: svm.refit(counted, self.labels, self.model.svm, known, kept))
        return svm


__all__ = ["add_images"]
