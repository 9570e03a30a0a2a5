"""Accuracy, recall per class and confusion of a model on labelled images, in a stream; and the images it is surest and most wrong about."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamcnn.images import ImageSource
from streamcnn.labels import unknown_classes
from streamcnn.memory import MemoryMonitor
from streamcnn.model import Model, plan_decisions
from streamcnn.planning import MemoryPlan, StagePlan, added
from streamcnn.stages import evaluate_claims, image_bytes

N_EXAMPLES = 12
_PICTURE_SIDE = 96


def evaluate(
    model: Model,
    source: ImageSource,
    chunk_size: int = 256,
    n_jobs: int = 1,
    device: str = "auto",
    update: Callable[[int], None] | None = None,
    monitor: MemoryMonitor | None = None,
    look: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Compare predictions with labels; `look`, if given, is called with (first row, decisions, codes of their labels) of each block.

    Returns
    -------
    dict
        `accuracy` (fraction; images of unknown classes count as wrong), `n_test`, `recall` (class -> fraction, None without
        images), `classes`, `confusion` (n_classes, n_classes) counts with true classes as rows, `unknown` images whose class the
        model does not know, `unknown_classes` (class -> number of them).
    """
    truth = model.codes_of(source)
    n = len(model.classes_)
    confusion = np.zeros((n, n), np.int64)
    for start, decisions in model.decisions(source, chunk_size, n_jobs, device, update, monitor):
        true, predicted = truth[start : start + len(decisions)], model.labels_of(decisions)
        np.add.at(confusion, (true[true >= 0], predicted[true >= 0]), 1)
        if look is not None:
            look(start, decisions, true)
    per_class = confusion.sum(axis=1)
    hits = np.diag(confusion)
    assert source.labels is not None and source.classes_ is not None
    unknown = unknown_classes(source.labels, source.classes_, truth)
    return {
        "accuracy": float(hits.sum() / len(truth)),
        "n_test": len(truth),
        "recall": {str(c): (float(h / m) if m else None) for c, h, m in zip(model.classes_.tolist(), hits, per_class)},
        "classes": model.classes_.tolist(),
        "confusion": confusion.tolist(),
        "unknown": sum(unknown.values()),
        "unknown_classes": unknown,
    }


@dataclass
class Example:
    """A test image: its row and file, its class, what it was taken for, by which margin; `picture` has at most 96 pixels a side."""

    row: int
    name: str
    true: Any
    predicted: Any
    margin: float
    picture: np.ndarray


@dataclass
class Tested:
    """What `evaluate` measures, and up to 12 examples each: wrong by the largest margin, and right by the largest margin."""

    measured: dict[str, Any]
    confused: list[Example]
    certain: list[Example]


def plan_testing(
    model: Model, source: ImageSource, n_jobs: int, limit: int, device: str = "auto", after: StagePlan | None = None
) -> MemoryPlan:
    """The plan of `run_testing`, and of a later stage.

    Raises
    ------
    MemoryBudgetError
        When not even one image at a time fits.
    """
    # one whole image, its part that is cut to blocks of pixels, and their sums
    examples = {"examples": 3 * image_bytes(source) + 2 * N_EXAMPLES * 8 * _PICTURE_SIDE**2 * 3}
    return plan_decisions(model, source, n_jobs, limit, device, added(evaluate_claims(source, len(model.classes_)), examples), after)


def run_testing(
    model: Model,
    source: ImageSource,
    chunk_size: int = 256,
    n_jobs: int = 1,
    device: str = "auto",
    update: Callable[[int], None] | None = None,
    monitor: MemoryMonitor | None = None,
) -> Tested:
    """`evaluate`, and examples. The margin is the decision for the class taken minus that for the true one, or for the next best."""
    found: dict[bool, list[tuple[float, int, int, int]]] = {True: [], False: []}

    def look(start: int, decisions: np.ndarray, true: np.ndarray) -> None:
        # two classes have one decision, positive for the second
        scores = np.stack([-decisions, decisions], axis=1) / 2 if decisions.ndim == 1 else decisions
        rows, predicted = np.arange(len(scores)), model.labels_of(decisions)
        known = true >= 0
        rivals = np.where(np.arange(scores.shape[1]) == predicted[:, None], -np.inf, scores).argmax(axis=1)
        rivals = np.where(known & (true != predicted), true, rivals)
        margins = scores[rows, predicted] - scores[rows, rivals]
        for right, chosen in ((True, known & (true == predicted)), (False, known & (true != predicted))):
            new = [(-float(margins[i]), start + int(i), int(true[i]), int(predicted[i])) for i in np.flatnonzero(chosen)]
            found[right] = sorted(found[right] + new)[:N_EXAMPLES]

    measured = evaluate(model, source, chunk_size, n_jobs, device, update, monitor, look)
    certain, confused = ([_example(model, source, *which) for which in found[right]] for right in (True, False))
    return Tested(measured, confused, certain)


def _example(model: Model, source: ImageSource, minus_margin: float, row: int, true: int, predicted: int) -> Example:
    image = np.empty((1, *source.image_shape), source.dtype)
    source.read(row, row + 1, image)
    step = -(-max(source.image_shape[:2]) // _PICTURE_SIDE)
    height, width = (max(1, side // step) for side in source.image_shape[:2])
    down, right = (min(step, side) for side in source.image_shape[:2])
    blocks = image[0, : height * down, : width * right].reshape(height, down, width, right, -1)
    picture = blocks.mean(axis=(1, 3))
    # other numbers of channels are no colours
    picture = picture if picture.shape[2] == 3 else picture.mean(axis=2)
    classes = model.classes_.tolist()
    return Example(row, source.name_of(row), classes[true], classes[predicted], -minus_margin, picture)
