"""Trying presets and sizes on a sample of the training data; what recognises its held-out part best is kept.

The sample is stratified by label, chosen by a hash of seed and row number, and a fifth of it is held out. Candidates are dropped by
successive halving (Jamieson & Talwalkar 2016): all are tried on a small sample, which tells what they take, and on one four times as
large; the better half of them on the next, and so on. In the time that is left those that luck may have put in this order are tried on
the largest sample with other fifths held out. Of the time given, half is for all that and half for the fit of the best on all images: a
candidate that is expected to take longer for it is left out, as is one that does not fit the memory limit, or whose sizes the images do
not allow. What is tried depends on the time, and so on the machine and its load; what comes of each trial does not.
"""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sklearn.exceptions import ConvergenceWarning

from streamcnn.candidates import HEAD, Candidate, Search, Trial, ladder, line, luck_of, parse_seconds, stage_work
from streamcnn.convfeatures import resolve_seed
from streamcnn.digests import check_same_data, digest_of
from streamcnn.errors import DataError, FilterBankError, MemoryBudgetError, ParameterError, StoreError, StreamCNNError
from streamcnn.evaluate import evaluate
from streamcnn.fitting import fit_model, interrupted
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import get_kernels
from streamcnn.layers import ConvLayer
from streamcnn.memory import MemoryMonitor, resolve_limit
from streamcnn.plan import check_labels, make_plan
from streamcnn.presets import Settings
from streamcnn.progress import Progress
from streamcnn.selection import stratified_sample
from streamcnn.stages import any_normed
from streamcnn.store import FeatureStore
from streamcnn.subset import SubsetSource
from streamcnn.threads import resolve_n_jobs
from streamcnn.untrusted import first_line

SHARE = 0.5
"""Of the time given, what the search may use."""
# images of the samples
_SMALLEST, _LARGEST, _FACTOR = 1_000, 16_000, 4
# of a class in a sample, as far as there are: with fewer none could be held out
_LEAST = 5
# of the largest sample, each held out once where there is time
_FIFTHS = 5


def search_settings(
    source: ImageSource,
    candidates: list[Candidate],
    limit: int,
    seconds: float,
    progress: Progress,
    monitor: MemoryMonitor,
    store_path: Path | None = None,
) -> Search:
    """Try candidates, each within `limit` bytes of the process; see the head of this module.

    Parameters
    ----------
    source : ImageSource
        The training data, with labels.
    candidates : list of Candidate
        The cheapest first; of equals the first is kept.
    limit : int
    seconds : float
        For this and for the fit of what is chosen; compiling or loading kernels is not counted. The first candidate is tried even where
        they are too few.
    progress : Progress
        Told of every trial.
    monitor : MemoryMonitor
        Entered by the caller.
    store_path : Path or None
        Where the fit will be: its disk is looked at.

    Raises
    ------
    DataError
        When the data have too few images of each class.
    StreamCNNError
        That of the first candidate, when none can be tried.
    """
    start, n, seed = time.perf_counter(), source.n_samples, candidates[0].settings.seed
    largest, trials = min(n, _LARGEST), _Trials(source, limit, progress, monitor, store_path)
    sizes = [size for size in (largest // _FACTOR**2, largest // _FACTOR) if size >= _SMALLEST] + [largest]
    going, last_took = candidates, 0.0
    progress.say(HEAD)
    for number, size in enumerate(sizes):
        train, held = _samples(source, size, seed)
        # most are tried on the first sample: each has half of what is left, the last one all of it
        now, end = time.perf_counter(), start + SHARE * seconds
        end -= max(0.0, end - now) / 2 * (number + 1 < len(sizes))
        for candidate in sorted(going, key=lambda c: c.rank, reverse=True):
            is_first = candidate is candidates[0] and number == 0
            if time.perf_counter() < end:  # on a fresh machine compiling would leave no time to try
                loading = _load_kernels(candidate.settings, train, limit, monitor)
                start, end = start + loading, end + loading
            # of one never tried: what the last one took, as they come in the order of what they cost
            expected = candidate.expected_seconds(train.n_samples) if candidate.trials else last_took
            if time.perf_counter() + expected >= end and not is_first:
                trials.skip(candidate, f"no time left to try it on {train.n_samples} images")
            elif (trial := trials.make(candidate, train, held)) is not None:
                candidate.trials.append(trial)
                last_took = trial.seconds
                progress.say(line(candidate.rows()[-1]))
                if (expected := candidate.expected_seconds(n)) > (1 - SHARE) * seconds:
                    trials.skip(candidate, f"a fit of all {n} images would take about {expected:.0f} s")
        going = [candidate for candidate in going if candidate.skipped is None]
        better = sorted(going, key=lambda c: c.rank, reverse=True)[: -(-len(going) // 2)]
        going = [candidate for candidate in going if any(candidate is other for other in better)]
    rivals = [candidate for candidate in candidates if len(candidate.trials) == len(sizes)]
    for fifth in range(1, _FIFTHS):
        rivals = _within_luck(rivals)
        if len(rivals) < 2 or time.perf_counter() + sum(rival.trials[-1].seconds for rival in rivals) >= start + SHARE * seconds:
            break
        train, held = _samples(source, largest, seed, fifth)
        for candidate in rivals:
            if (trial := trials.make(candidate, train, held)) is not None:
                candidate.trials[-1] = candidate.trials[-1].joined(trial)
                progress.say(line(candidate.rows()[-1]))
    chosen = _best(source, candidates, limit, seconds - (time.perf_counter() - start), progress, store_path)
    if chosen is None:
        raise trials.errors[0]
    used = time.perf_counter() - start
    last = chosen.trials[-1]
    head = {"preset": chosen.preset, "parameters": chosen.parameters, "accuracy": last.accuracy, "n_held_out": last.n_held_out}
    result: dict[str, Any] = {"chosen": head, "compared": sum(bool(candidate.trials) for candidate in candidates)}
    result |= {"seconds": used, "planned_peak_bytes": trials.planned, "reused": False}
    result["tried"] = [row for candidate in candidates for row in candidate.rows()]
    return Search(chosen.settings, chosen.keywords, result)


def _samples(source: ImageSource, size: int, seed: int, fifth: int = 0) -> tuple[SubsetSource, SubsetSource]:
    """Images to fit and images held out, a fifth of a sample of about `size`."""
    n_classes = check_labels(source)
    rows, held_out = stratified_sample(source.labels, n_classes, seed, size, least=_LEAST, fifth=fifth)  # type: ignore[arg-type]
    train, held = SubsetSource(source, rows[~held_out]), SubsetSource(source, rows[held_out])
    if train.classes_ is None or len(train.classes_) < 2:
        raise DataError(
            f"to hold images out, a search needs 2 classes of 2 images at least, got {source.n_samples} images: choose a preset"
        )
    return train, held


def _within_luck(candidates: list[Candidate]) -> list[Candidate]:
    """Those that fit, and that the best of them is ahead of by no more than luck may be."""
    left = [candidate for candidate in candidates if candidate.skipped is None]
    best = max((candidate.trials[-1] for candidate in left), key=lambda trial: trial.accuracy, default=None)
    return [c for c in left if best is not None and c.trials[-1].accuracy >= best.accuracy - luck_of(best.accuracy, best.n_held_out)]


@dataclass
class _Trials:
    """Makes trials, and notes why none can be made of a candidate."""

    source: ImageSource
    limit: int
    progress: Progress
    monitor: MemoryMonitor
    store_path: Path | None
    planned: int = 0
    errors: list[StreamCNNError] = field(default_factory=list)

    def make(self, candidate: Candidate, train: SubsetSource, held: SubsetSource) -> Trial | None:
        """A trial; None where the candidate is refused, which leaves it out."""
        try:
            trial, peak = _try(candidate.settings, self.source, train, held, self.limit, self.monitor, self.store_path)
        except (ParameterError, DataError, FilterBankError, MemoryBudgetError, StoreError) as error:
            if self.monitor.near_limit:
                raise
            self.errors.append(error)
            self.skip(candidate, first_line(error))
            return None
        self.planned = max(self.planned, peak)
        return trial

    def skip(self, candidate: Candidate, why: str) -> None:
        """Leave a candidate out, and say so."""
        candidate.skipped = why
        self.progress.say(line(candidate.rows()[-1]))


def _try(
    settings: Settings,
    source: ImageSource,
    train: SubsetSource,
    held: SubsetSource,
    limit: int,
    monitor: MemoryMonitor,
    store_path: Path | None,
) -> tuple[Trial, int]:
    """A trial as the fit of all images would be, with its planned peak in bytes; refuses what that could not be."""
    full = make_plan(source, settings, limit, store_path)
    # by their own number of rows they would get another kernel than all images
    changed: dict[str, Any] = {"kernel": full.kernel, "keep_features": full.keep_features}
    if full.pca_solver is not None:
        changed |= {"pca_solver": full.pca_solver, "n_components": min(full.n_components, train.n_samples)}
    progress = Progress(0, monitor)
    with _quiet():
        model, report = fit_model(train, replace(settings, **changed), None, limit, progress, monitor, test=held)
    plan = report.plan
    with monitor.stage("evaluate", plan.planned("evaluate")), progress.bar("evaluate", held.n_samples) as update:
        accuracy = evaluate(model, held, plan.chunk_size, settings.n_jobs, settings.device, update, monitor)["accuracy"]
    work = partial(stage_work, settings, full, check_labels(source))
    return Trial(train.n_samples, held.n_samples, accuracy, report.stage_seconds, work), plan.peak_bytes


def _load_kernels(settings: Settings, train: SubsetSource, limit: int, monitor: MemoryMonitor) -> float:
    """Seconds to compile or load a candidate's kernels, if no other has used them: by a fit that takes little else."""
    start, normed = time.perf_counter(), any_normed(settings.layers)
    if get_kernels(settings.device).pending_bytes(settings.preprocess, normed):
        small = replace(settings, layers=(ConvLayer(1, patch_norm=1.0 if normed else None),), n_components=None, kernel="linear", C=1.0)
        with _quiet(), suppress(StreamCNNError):  # the trial itself says what is wrong
            fit_model(train, small, None, limit, Progress(0, monitor), monitor)
    return time.perf_counter() - start


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is said of a fit that is for comparison only: on few rows many an SVM takes more passes than it may."""
    logger = logging.getLogger("streamcnn")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        logger.setLevel(max(level, logging.WARNING))
        try:
            yield
        finally:
            logger.setLevel(level)


def _best(
    source: ImageSource, candidates: list[Candidate], limit: int, seconds: float, progress: Progress, store_path: Path | None
) -> Candidate | None:
    """The best of those tried whose fit is expected to end in time, else the quickest; None when none was tried or none fits now."""
    n, ranked = source.n_samples, sorted((c for c in candidates if c.trials), key=lambda c: c.rank, reverse=True)
    slow = [c for c in ranked if c.expected_seconds(n) > seconds]
    if ranked and len(slow) == len(ranked):
        progress.say(f"no fit of all {n} images is expected to end in the {max(seconds, 0):.0f} s left: the quickest is taken")
    for candidate in [c for c in ranked if c not in slow] + sorted(slow, key=lambda c: c.expected_seconds(n)):
        try:
            make_plan(source, candidate.settings, limit, store_path)  # this process may hold more by now
        except (MemoryBudgetError, StoreError) as error:
            candidate.skipped = first_line(error)
        else:
            return candidate
    return None


def stored_search(
    source: ImageSource,
    candidates: list[Candidate],
    limit: int,
    seconds: float,
    progress: Progress,
    monitor: MemoryMonitor,
    store_path: Path,
    resume: bool = False,
) -> Search:
    """`search_settings`, which a store keeps as a finished stage: the same search of the same data is not made again there.

    Raises
    ------
    StoreError
        With `resume`, when the store was made from other data.
    """
    fingerprint, existed, fresh = source.fingerprint(), store_path.exists(), not (store_path / "config.json").exists()
    digest = digest_of(fingerprint, "search", seconds, [candidate.settings.describe() for candidate in candidates])
    with FeatureStore.create(store_path) if fresh else FeatureStore(store_path) as store:
        if not fresh:
            store.lock()
        if resume:
            check_same_data(store, source, fingerprint)
        if (found := _found_before(store.finished("search", digest), candidates)) is not None:
            progress.say("search  : finished before with the same data and time, reused")
            return found
        try:
            found = search_settings(source, candidates, limit, seconds, progress, monitor, store_path)
        except BaseException as error:
            if fresh and not existed:
                store.delete()
            if isinstance(error, KeyboardInterrupt):
                raise interrupted("search", None) from None
            raise
        number = next(i for i, candidate in enumerate(candidates) if candidate.settings == found.settings)
        store.finish("search", digest, number=number, result=found.result)
        return found


def _found_before(entry: dict[str, Any] | None, candidates: list[Candidate]) -> Search | None:
    """A search as a store keeps it; None where it keeps none, or one that makes no sense, as stores may come from strangers."""
    try:
        chosen, result = candidates[entry["number"]], entry["result"] | {"reused": True}  # type: ignore[index]
        found = Search(chosen.settings, chosen.keywords, result)
        return found if str(found) else None
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return None


def search(
    data, labels=None, *, seconds: float | str = "15min", preset: str | None = None, memory_limit: int | str | None = None, **parameters
) -> Search:
    """The preset and sizes that recognise held-out images of these training data best; nothing is written.

    Parameters
    ----------
    data, labels
        As `open_images` takes them.
    seconds : float or str
        For the search and a fit of all images afterwards, such as `"15min"`.
    memory_limit : int, str or None
        Of the process, for the search and the fit; None for `memory.default_limit()`.
    preset : str or None
        Try the sizes of one preset only.
    **parameters
        Of `StreamCNNClassifier`; the same in all that is tried.

    Returns
    -------
    Search
        Printing it shows what was tried; `StreamCNNClassifier(**found.keywords)` has what was found.

    Raises
    ------
    DataError
        When there are too few images of each class to hold some out.
    StreamCNNError
        That of the first candidate, when none can be tried.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from streamcnn.search import search
    >>> X, y = load_digits(return_X_y=True)
    >>> found = search(X[:400].reshape(-1, 8, 8), y[:400], seconds=1, memory_limit="4GiB", random_state=0)
    >>> found.result["chosen"]["accuracy"] > 0.8
    True
    """
    limit, n_jobs = resolve_limit(memory_limit), resolve_n_jobs(parameters.pop("n_jobs", None))
    image_shape, seed = parameters.pop("image_shape", None), resolve_seed(parameters.pop("random_state", None))
    verbose, candidates = parameters.pop("verbose", 0), ladder(preset, n_jobs, seed, **parameters)
    opening: dict[str, Any] = {"image_shape": "auto" if image_shape is None else image_shape, "need_labels": True, "memory_limit": limit}
    with MemoryMonitor(limit) as monitor, open_images(data, labels, **opening) as source:
        found = search_settings(source, candidates, limit, parse_seconds(seconds), Progress(verbose, monitor), monitor)
    found.keywords |= {"memory_limit": memory_limit, "image_shape": image_shape, "n_jobs": n_jobs, "random_state": seed, "verbose": verbose}
    return found
