"""Accuracy, recall per class and confusion of a model on labelled images, in a stream."""

from collections.abc import Callable
from typing import Any

import numpy as np

from streamcnn.errors import DataError
from streamcnn.images import ImageSource
from streamcnn.memory import MemoryMonitor
from streamcnn.model import Model


def label_codes(model: Model, source: ImageSource) -> np.ndarray:
    """The source's labels as the model's class codes, -1 for a class the model does not know.

    Classes are compared as text where one side has numbers and the other names, so that a folder `3` is the label 3.
    """
    if source.labels is None or source.classes_ is None:
        raise DataError("labels are missing: evaluating needs a folder with one subfolder per class, or a file with labels")
    same_kind = (source.classes_.dtype.kind == "U") == (model.classes_.dtype.kind == "U")
    key: Callable[[Any], Any] = (lambda value: value) if same_kind else str
    known = {key(value): code for code, value in enumerate(model.classes_.tolist())}
    codes = np.array([known.get(key(value), -1) for value in source.classes_.tolist()], np.int32)
    if (codes < 0).all():
        raise DataError(f"no class of these images is one the model knows: it was trained on {list(model.classes_[:5])}...")
    return codes[source.labels]


def evaluate(
    model: Model,
    source: ImageSource,
    chunk_size: int = 256,
    n_jobs: int = 1,
    device: str = "auto",
    update: Callable[[int], None] | None = None,
    monitor: MemoryMonitor | None = None,
) -> dict[str, Any]:
    """Compare predictions with labels.

    Returns
    -------
    dict
        `accuracy` (fraction; images of unknown classes count as wrong), `n_test`, `recall` (class -> fraction, None without
        images), `classes`, `confusion` (n_classes, n_classes) counts with true classes as rows, `unknown` images whose class the
        model does not know.
    """
    truth = label_codes(model, source)
    n = len(model.classes_)
    confusion = np.zeros((n, n), np.int64)
    for start, decisions in model.decisions(source, chunk_size, n_jobs, device, update, monitor):
        true, predicted = truth[start : start + len(decisions)], model.labels_of(decisions)
        np.add.at(confusion, (true[true >= 0], predicted[true >= 0]), 1)
    per_class = confusion.sum(axis=1)
    hits = np.diag(confusion)
    return {
        "accuracy": float(hits.sum() / len(truth)),
        "n_test": len(truth),
        "recall": {str(c): (float(h / m) if m else None) for c, h, m in zip(model.classes_.tolist(), hits, per_class)},
        "classes": model.classes_.tolist(),
        "confusion": confusion.tolist(),
        "unknown": int((truth < 0).sum()),
    }
