"""Errors a user can act on.

Each is one sentence: which argument, which rule, which value, which way out. Every class also derives from the built-in
exception that plain Python or scikit-learn code would expect (`ValueError`, `OSError`, `MemoryError`, `RuntimeError`).
"""

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn as of the line that the call came from, outside this package, scikit-learn and joblib, through which cross-validation calls."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("streamcnn", "sklearn", "joblib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class StreamCNNError(Exception):
    """Base of all errors that streamcnn raises on purpose."""


class ParameterError(StreamCNNError, ValueError):
    """A parameter breaks its rule."""


class DataError(StreamCNNError, ValueError):
    """Images, labels or features have the wrong shape, type or content."""


class FileError(StreamCNNError, OSError):
    """A file or folder is missing, unreadable or not what it should be."""


class StoreError(FileError):
    """A feature store cannot be used as asked."""


class ModelError(FileError):
    """A model file cannot be used as asked."""


class FilterBankError(StreamCNNError, ValueError):
    """A filter bank cannot be filled under its similarity rule."""


class NotKeptError(StreamCNNError, AttributeError):
    """A method needs what the fit did not keep: the estimator does not have it."""


class DeviceError(StreamCNNError, RuntimeError):
    """The device asked for is not there."""


class MemoryBudgetError(StreamCNNError, MemoryError):
    """The job does not fit under the memory limit."""


class NotInstalledError(StreamCNNError, ImportError):
    """An optional library is needed and not installed."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or the stop button of a notebook, has ended a run where nothing is lost; no error, so not a `StreamCNNError`."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence that says how to go on, which would stand below a screen of calls."""
        return [str(self)]
