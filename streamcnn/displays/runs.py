"""Pictures of how a fit went: memory over time, seconds of each stage."""

from sklearn.utils.validation import check_is_fitted

from streamcnn.displays.base import Display, Store, path_of
from streamcnn.drawing import COLOURS, printable
from streamcnn.errors import NotKeptError
from streamcnn.runrecord import ordered_stages, read_record, read_trace


class MemoryDisplay(Display):
    """Resident memory of a run over time, with its stages, its peak and its limit; see `MemoryMonitor.plot` for a run of your own.

    Parameters
    ----------
    trace : Trace or MemoryMonitor
    """

    size = (6.0, 3.6)

    def __init__(self, trace):
        self.trace = trace

    @classmethod
    def from_estimator(cls, estimator, *, ax=None):
        """Of the last `fit` or `partial_fit` of a `StreamCNNClassifier`."""
        check_is_fitted(estimator)
        return cls(estimator.report_.trace).plot(ax)

    @classmethod
    def from_store(cls, store: Store, *, ax=None):
        """Of the last run into a store."""
        path = path_of(store)
        if (trace := read_trace(path)) is None:
            raise NotKeptError(f"{path} has no memory trace: it is written at the end of each fit into the store")
        return cls(trace).plot(ax)

    def _draw(self, ax):
        self.trace.plot(ax)


class StageTimeDisplay(Display):
    """Seconds of each stage.

    Parameters
    ----------
    seconds : dict of str to float
    """

    size = (6.0, 2.6)

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    @classmethod
    def from_estimator(cls, estimator, *, ax=None):
        """Of the last `fit` or `partial_fit` of a `StreamCNNClassifier`; a stage that was reused took none."""
        check_is_fitted(estimator)
        return cls(estimator.report_.stage_seconds).plot(ax)

    @classmethod
    def from_store(cls, store: Store, *, ax=None):
        """Of a store: each stage when it was last at work."""
        path = path_of(store)
        seconds = {name: stage["seconds"] for name, stage in ordered_stages(read_record(path)) if stage["seconds"] is not None}
        if not seconds:
            raise NotKeptError(f"{path} has no seconds of stages: they are written at the end of each fit into the store")
        return cls(seconds).plot(ax)

    def _draw(self, ax):
        names, seconds = list(self.seconds), list(self.seconds.values())
        bars = ax.barh(range(len(names)), seconds, color=COLOURS[4])
        ax.set_yticks(range(len(names)), [printable(name) for name in names], parse_math=False)
        ax.bar_label(bars, [f"{value:.1f} s" for value in seconds], padding=4)
        ax.invert_yaxis()
        ax.set(xlabel="seconds", title=f"{sum(seconds):.1f} s in all", xlim=(0, 1.15 * max(seconds, default=0) or 1))


__all__ = ["MemoryDisplay", "StageTimeDisplay"]
