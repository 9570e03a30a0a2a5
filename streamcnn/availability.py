"""Methods that an estimator has only with the parameters they need."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from streamcnn.errors import NotKeptError


class Needs:
    """A method that is gone where `check` raises an AttributeError, as scikit-learn has methods go that parameters make impossible.

    To use it then is that error, `hasattr` is False. (scikit-learn's own `available_if` would hide the sentence behind one of its own.)
    """

    def __init__(self, check: Callable[[Any], Any]):
        self._check = check

    def __call__(self, method: Callable[..., Any]) -> "Needs":
        self._method = method
        return self

    def __get__(self, estimator, owner=None):
        if estimator is None:
            return self._method
        self._check(estimator)
        return MethodType(self._method, estimator)


def check_probability(estimator) -> None:
    """Refuse `predict_proba` of an estimator without `probability`.

    Raises
    ------
    NotKeptError
    """
    if not estimator.probability:
        raise NotKeptError("predict_proba needs probability=True in fit: set_params(probability=True), then fit again")
