"""From images to a fitted model: plan, run, save, and what is left when that is stopped."""

import contextlib
from dataclasses import replace
from pathlib import Path

from streamcnn.digests import library_versions, stage_digests
from streamcnn.errors import FileError, Interrupted, ParameterError
from streamcnn.files import scratch_folder
from streamcnn.images import ImageSource
from streamcnn.kernels import resolve_device
from streamcnn.memory import MemoryMonitor
from streamcnn.model import Model, load_model
from streamcnn.pipeline import Report, Run
from streamcnn.plan import make_plan
from streamcnn.presets import Settings
from streamcnn.progress import Progress, interruptible
from streamcnn.runrecord import record_run
from streamcnn.store import FeatureStore


def fit_model(
    source: ImageSource,
    settings: Settings,
    store_path: Path | None,
    limit: int,
    progress: Progress,
    monitor: MemoryMonitor,
    resume: bool = False,
    test: ImageSource | None = None,
    verify_data: bool = False,
) -> tuple[Model, Report]:
    """Plan, then run into the store at `store_path`, or into a temporary one that is removed at the end.

    A store made here is removed again when it fails before anything in it is worth keeping; once a stage or shard is finished it
    stays, whatever stops the run, and the same call continues from there.

    Parameters
    ----------
    source : ImageSource
        With labels.
    settings : Settings
    store_path : Path or None
    limit : int
        Memory limit in bytes.
    progress : Progress
    monitor : MemoryMonitor
        Entered by the caller.
    resume : bool
        Check finished shards against their hashes, and refuse other data or parameters.
    test : ImageSource or None
        Images the caller will evaluate the model on: their stage is part of the plan.
    verify_data : bool
        Read the images of finished shards again, and refuse when they are not those that were read before.

    Returns
    -------
    model, report : Model, Report
    """
    settings = replace(settings, device=resolve_device(settings.device))
    plan = make_plan(source, settings, limit, store_path, test)
    # before the first image is read: drawing filters may have to compile kernels
    shape, notes = " x ".join(map(str, source.image_shape)), plan.notes()
    progress.say(f"{source.n_samples:,} images of {shape}; {notes[0]}; {notes[-1]}")
    temporary = store_path is None
    if resume and temporary:
        raise ParameterError("resume=True needs the store of the fit that was interrupted: give it as store=")
    path = scratch_folder() if store_path is None else store_path
    fresh, existed = not (path / "config.json").exists(), path.exists()
    if resume and fresh:
        progress.say(f"{path} holds nothing to resume: starts from the beginning")
    store = FeatureStore.create(path, durable=not temporary) if fresh else FeatureStore(path)
    if not fresh:
        store.lock()
    run, done = None, False
    try:
        with interruptible():
            run = Run(source, settings, store, plan, progress, monitor, resume and not fresh, verify_data)
            parts = run.run()
            header = {
                "settings": settings.describe(),
                "pixels": source.dtype.name,
                "feature_dtype": settings.feature_dtype,
                "n_train": source.n_samples,
                "pca_solver": plan.pca_solver,
                "kernel": plan.kernel,
                "digest": run.digests["svm"],
                "versions": library_versions(),
            }
            if source.reading_shape is not None:
                header["image_shape_given"] = True
            model = Model(*parts, run.classes, header)
            if not temporary:
                with monitor.stage("save", plan.planned("save")):
                    model.write(store.path / "model.h5")
                run.report.store_bytes = store.nbytes
        done = True
        return model, run.report
    except BaseException as error:
        nothing = fresh and not existed and not store.entries
        if nothing:
            store.delete()
        if isinstance(error, KeyboardInterrupt):
            raise interrupted("fit", None if temporary or nothing else path, temporary) from None
        raise
    finally:
        if not temporary and run is not None and store.path.is_dir():  # also of a run that was stopped; a full disk must not hide why
            with contextlib.suppress(OSError):
                record_run(store, plan, run.report.stage_seconds, run.digests, source, monitor, done)
        store.close()
        if temporary:
            store.delete()


def finished_model(
    path: Path, source: ImageSource, settings: Settings, limit: int, test: ImageSource | None
) -> tuple[Model, Report] | None:
    """The model at `path` if a fit of these images with these settings would make the same one, else None; as `fit_model`."""
    settings = replace(settings, device=resolve_device(settings.device))
    plan = make_plan(source, settings, limit, None, test)
    with contextlib.suppress(FileError):  # no model, or a damaged one
        model = load_model(path, limit)
        if model.header.get("digest") == stage_digests(source.fingerprint(), settings, plan, source.n_samples)["svm"]:
            return model, Report(plan, resumed=True)
    return None


def interrupted(what: str, kept: Path | None, temporary: bool = False) -> Interrupted:
    """The end of a fit or an addition by Ctrl-C, with what can be done next."""
    if kept is None:
        way = ": with a folder for its store (store=) it could be resumed" if temporary else ""
        return Interrupted(f"the {what} was interrupted; nothing is kept{way}")
    way = "with resume=True (--resume) the same call goes on from there" if what == "fit" else "the same call goes on from there"
    return Interrupted(f"the {what} was interrupted; {kept} keeps what is finished, and {way}")
