"""Pictures of how a model does on labelled images: confusion of classes, the most confused and the most certain images."""

from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from streamcnn.displays.base import Display, Store, path_of
from streamcnn.drawing import AMOUNTS, printable
from streamcnn.errors import NotKeptError, ParameterError
from streamcnn.evaluate import Example, Tested, plan_testing, run_testing
from streamcnn.images import open_images
from streamcnn.memory import MemoryMonitor, resolve_limit
from streamcnn.model import Model
from streamcnn.runrecord import read_record
from streamcnn.threads import resolve_n_jobs

# names of more classes would lie over one another, and so would counts in the fields
_MOST_NAMES, _MOST_COUNTS = 60, 12
_NAME_LENGTH = 14


def short(name: Any) -> str:
    """A class name that fits beside a picture: names that are long often begin alike, and end so too."""
    text = printable(name)
    return text if len(text) <= _NAME_LENGTH else f"{text[: _NAME_LENGTH // 2 - 1]}…{text[-(_NAME_LENGTH // 2) :]}"


def tested_on(model: Model, X, y=None, memory_limit=None, n_jobs: int | None = None) -> Tested:
    """How a model does on labelled images, in a stream under the limit.

    Parameters
    ----------
    model : Model
    X, y
        As `open_images` takes them.
    memory_limit : int, str or None
        Of the whole process.
    n_jobs : int or None
        Threads; None for all cores.

    Raises
    ------
    MemoryBudgetError
        When a single image at a time does not fit.
    """
    limit, n_jobs = resolve_limit(memory_limit), resolve_n_jobs(n_jobs)
    source = open_images(X, y, image_shape=model.reading_shape, memory_limit=limit)
    plan = plan_testing(model, source, n_jobs, limit)
    with MemoryMonitor(limit) as monitor, monitor.stage("evaluate", plan.peak_bytes):
        return run_testing(model, source, plan.chunk_size, n_jobs, monitor=monitor)


class _ResultDisplay(Display):
    @classmethod
    def _of(cls, tested: Tested, ax: Any, **options: Any):
        raise NotImplementedError

    @classmethod
    def from_estimator(cls, estimator, X, y=None, *, ax=None, **options):
        """Of a fitted `StreamCNNClassifier` on labelled images, in a stream under its memory limit.

        Parameters
        ----------
        estimator : StreamCNNClassifier
        X, y
            Labelled images, as its `score` takes them.
        ax : matplotlib axes, optional
        **options
            For `ImagesDisplay` `kind`: `"confused"`, wrong with the largest margin, or `"certain"`, right with the largest margin.
        """
        check_is_fitted(estimator)
        source = estimator._open(X, y, reset=False)
        return cls._of(tested_on(estimator.model_, source, None, estimator.memory_limit, estimator.n_jobs_), ax, **options)

    @classmethod
    def from_model(cls, model: Model, X, y=None, *, memory_limit=None, ax=None, **options):
        """Of a model on labelled images, in a stream under the limit.

        Parameters
        ----------
        model : Model
            See `load_model`.
        X, y
            Labelled images, as `open_images` takes them.
        memory_limit : int, str or None
            Of the whole process.
        ax : matplotlib axes, optional
        **options
            As in `from_estimator`.
        """
        return cls._of(tested_on(model, X, y, memory_limit), ax, **options)


class ConfusionDisplay(_ResultDisplay):
    """Images of each class by the class they were taken for: scikit-learn's `ConfusionMatrixDisplay`, kept readable for many classes.

    Parameters
    ----------
    confusion : array (n_classes, n_classes) of int
        True classes are rows.
    classes : sequence of str or int
    """

    size = (6.0, 5.0)

    def __init__(self, confusion, classes):
        self.confusion, self.classes = np.asarray(confusion), list(classes)

    @classmethod
    def _of(cls, tested, ax, **options):
        return cls(tested.measured["confusion"], tested.measured["classes"], **options).plot(ax)

    @classmethod
    def from_store(cls, store: Store, *, ax=None):
        """Of the last evaluation that a store remembers, that of `fit --store --test`."""
        path = path_of(store)
        evaluation = (read_record(path) or {}).get("evaluation")
        if evaluation is None:
            raise NotKeptError(f"{path} remembers no evaluation: fit with --test, or draw from_model(load_model(...), test images)")
        return cls(evaluation["confusion"], evaluation["classes"]).plot(ax)

    def _draw(self, ax):
        from sklearn.metrics import ConfusionMatrixDisplay

        n = len(self.classes)
        names = [short(name) for name in self.classes] if n <= _MOST_NAMES else None
        display = ConfusionMatrixDisplay(self.confusion, display_labels=names)
        display.plot(include_values=n <= _MOST_COUNTS, cmap=AMOUNTS, ax=ax, xticks_rotation="vertical", im_kw={"interpolation": "none"})
        # errors are looked for: a field of zeros hides them
        for text in () if display.text_ is None else display.text_.flat:
            if text.get_text() == "0":
                text.set_text("")
        # between two dollars a name would be a formula
        for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            text.set(parse_math=False, fontsize="small" if n <= _MOST_COUNTS else "xx-small")
        hits = int(np.trace(self.confusion))
        ax.set(xlabel="taken for", ylabel="class", title=f"{hits} of {int(self.confusion.sum())} right")


class ImagesDisplay(_ResultDisplay):
    """Images with their class and what they were taken for.

    Parameters
    ----------
    examples : sequence of Example
        See `evaluate.run_testing`.
    title : str

    See Also
    --------
    ConfusionDisplay : How many of each class, instead of which.
    """

    size = (6.0, 5.0)
    _most_columns = 4

    def __init__(self, examples: list[Example], title: str = ""):
        self.examples, self.title = list(examples), title

    @classmethod
    def _of(cls, tested, ax, kind: str = "confused", **options):
        """`kind` is "confused", wrong with the largest margin, or "certain", right with the largest margin."""
        if kind not in ("confused", "certain"):
            raise ParameterError(f'kind must be "confused" or "certain", got {kind!r}')
        examples = tested.confused if kind == "confused" else tested.certain
        return cls(examples, f"most {kind} images", **options).plot(ax)

    def _draw(self, ax):
        shown, columns = self.examples, max(1, min(self._most_columns, len(self.examples)))
        shapes = [example.picture.shape[:2] for example in shown] or [(1, 1)]
        # the longer side is 1; below each picture there is room for two lines
        side, across = max(map(max, shapes)), 1.15
        down = max(height for height, _ in shapes) / side + 0.5
        high = max((float(example.picture.max()) for example in shown), default=1.0) or 1.0
        low = min((float(example.picture.min()) for example in shown), default=0.0)
        low = min(low, 0.0)  # pixels of 0 are black, as in a viewer
        for place, example in enumerate(shown):
            top, left = place // columns * down, place % columns * across
            height, width = (sides / side for sides in example.picture.shape[:2])
            left += (1 - width) / 2
            grey = np.clip((example.picture - low) / (high - low), 0, 1)
            ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(left, left + width, top + height, top), interpolation="none")
            lines = short(example.true) if example.true == example.predicted else f"{short(example.true)}\n→ {short(example.predicted)}"
            ax.text(left + width / 2, top + height + 0.05, lines, ha="center", va="top", fontsize="small", parse_math=False)
        rows = max(1, -(-len(shown) // columns))
        ax.set(xlim=(0, columns * across - 0.15), ylim=(rows * down - 0.05, 0), xticks=[], yticks=[], title=self.title)
        ax.set_frame_on(False)
        ax.set_aspect("equal")


__all__ = ["ConfusionDisplay", "ImagesDisplay", "short", "tested_on"]
