"""What a search tries: presets and sizes, how each has fared and what it would take, and the table of that."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

from streamcnn.eigen import few_rows
from streamcnn.errors import ParameterError
from streamcnn.ladder import svm_work
from streamcnn.network import PATCH_IMAGES
from streamcnn.plan import Plan
from streamcnn.presets import PRESETS, Settings, resolve_settings
from streamcnn.randomized import PASSES, n_directions

_FAST = PRESETS["fast"]["layers"][0].n_filters
# (preset, sizes of its layer that are others, other parameters), in the order of what they cost. Natural things are their mirror images,
# digits and letters are not: patches are tried both ways. Not 200 of them: their 1,600 features are not yet wide to the SVM, which
# then took longer than with the 12,800 of 1,600
LADDER: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("fast", {}, {}),
    ("faces", {}, {}),
    ("fast", {"n_filters": 2 * _FAST}, {}),
    ("lee2017", {}, {}),
    ("patches", {"n_filters": 400}, {"mirror": False}),
    ("patches", {"n_filters": 400}, {"mirror": True}),
    ("fast", {"pool_grid": (12, 12)}, {}),
    ("fast", {"n_filters": 4 * _FAST}, {}),
    *(("patches", {"n_filters": n}, {"mirror": mirror}) for n in (800, 1600) for mirror in (False, True)),
)


@dataclass
class Trial:
    """A fit on a part of the data: its images, accuracy on those held out, seconds of each stage, and `stage_work` of so many images."""

    n_images: int
    n_held_out: int
    accuracy: float
    stage_seconds: dict[str, float]
    work: Callable[[int], dict[str, float]]

    @property
    def seconds(self) -> float:
        return sum(self.stage_seconds.values())

    def joined(self, other: "Trial") -> "Trial":
        """This one, with the images that another one of the same candidate held out, and its accuracy on all of them."""
        n = self.n_held_out + other.n_held_out
        return replace(self, n_held_out=n, accuracy=(self.accuracy * self.n_held_out + other.accuracy * other.n_held_out) / n)


def stage_work(settings: Settings, plan: Plan, n_classes: int, n_images: int) -> dict[str, float]:
    """How much each stage of a fit has to do, as `plan`, that of all images, says; each in a unit of its own.

    What does not grow with images counts in images that would take as long; measured on 800 to 10,000 images of CIFAR-10.
    """
    n, d, s = n_images, plan.n_features, settings
    k = plan.n_components if plan.pca_solver is None else min(plan.n_components, n)
    reduce: float = n
    if plan.keep_features and plan.pca_solver == "covariance":  # else convolving again takes most of it
        reduce = n**2 * (d / 2 + 20 * n) if n <= few_rows(d) else d**2 * (n / 2 + 1.5 * d)
    elif plan.keep_features and plan.pca_solver == "randomized":
        reduce = n + 2 * (PASSES + 1) * n_directions(d, k)
    drawn = 1000 + min(n, PATCH_IMAGES) if any(layer.filters == "patches" for layer in s.layers) else 1
    svm = svm_work(plan.kernel, n, k, n_classes, s.C == "auto", s.gamma == "auto", s.n_landmarks, s.probability)
    return {"filters": drawn, "extract": n, "pca": reduce, "project": n, "svm": svm}


@dataclass
class Candidate:
    """A preset and what is changed of it: `parameters` for people, `keywords` for `StreamCNNClassifier`; and what came of it, samples
    ascending, or why it is out."""

    preset: str
    parameters: dict[str, Any]
    keywords: dict[str, Any]
    settings: Settings
    trials: list[Trial] = field(default_factory=list)
    skipped: str | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """The larger the better: by the sample, then by the accuracy on it."""
        return len(self.trials), self.trials[-1].accuracy if self.trials else 0.0

    def expected_seconds(self, n_images: int) -> float:
        """Of a fit of so many images: each stage of the last trial takes longer as its work grows."""
        if not self.trials:
            return 0.0
        last = self.trials[-1]
        before, then = last.work(last.n_images), last.work(n_images)
        return sum(seconds * then[stage] / before[stage] for stage, seconds in last.stage_seconds.items())

    def rows(self) -> list[dict[str, Any]]:
        """One for each trial, and one for why it is out."""
        facts = ("n_images", "n_held_out", "accuracy", "seconds")
        head, empty = {"preset": self.preset, "parameters": self.parameters}, dict.fromkeys((*facts, "skipped"))
        rows = [head | empty | {name: getattr(trial, name) for name in facts} for trial in self.trials]
        return rows + ([head | empty | {"skipped": self.skipped}] if self.skipped is not None else [])


HEAD = f"{'preset':<8} {'changed':<30} {'images':>7} {'held out':>9} {'accuracy':>9} {'seconds':>8}"
# characters of a reason in the table; the JSON object has all of it
_REASON = 72
# two standard deviations of the accuracy on the held-out images, in points, above which a search says so
_LUCK = 3


@dataclass(repr=False)
class Search:
    """What was found; printing it shows what was tried.

    Attributes
    ----------
    settings : Settings
        Of the best.
    keywords : dict
        The same for the estimator: `StreamCNNClassifier(**found.keywords)`.
    result : dict
        As JSON: what was `chosen`, among how many it was `compared`, all that was `tried`, `seconds`, `planned_peak_bytes` (the largest)
        and `reused`.
    verdict : str
        What was chosen, in a sentence.
    """

    settings: Settings
    keywords: dict[str, Any]
    result: dict[str, Any]

    def __str__(self):
        return "\n".join([HEAD, *map(line, self.result["tried"]), self.verdict])

    __repr__ = __str__

    @property
    def verdict(self) -> str:
        chosen, n = self.result["chosen"], self.result["compared"]
        how = f"chosen of {n} tried" if n > 1 else "taken without comparison, as nothing else was tried"
        right, held = chosen["accuracy"], chosen["n_held_out"]
        said = f"{how}: {chosen['preset']} ({_changed(chosen)}), {100 * right:.2f} % of {held} held-out images"
        luck = 100 * luck_of(right, held)
        return f"{said}; of so few, differences below some {luck:.0f} points may be luck" if n > 1 and luck > _LUCK else said


def luck_of(accuracy: float, n_held_out: int) -> float:
    """Two standard deviations of an accuracy on so many images."""
    return 2 * sqrt(max(accuracy * (1 - accuracy), 1 / n_held_out) / n_held_out)


def _changed(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["parameters"].items()) or "as it is"


def line(row: dict[str, Any]) -> str:
    """A row of the table for people."""
    if row["skipped"] is None:
        rest = f"{row['n_images']:>7} {row['n_held_out']:>9} {100 * row['accuracy']:>7.2f} % {row['seconds']:>8.1f}"
    else:
        # not "left out": of those that went furthest one is chosen
        rest = f"({textwrap.shorten(row['skipped'], _REASON, placeholder=' ...')})"
    return f"{row['preset']:<8} {_changed(row):<30} {rest}"


def parse_seconds(text: int | float | str) -> float:
    """Seconds from a number or a text such as `"90s"`, `"15min"` or `"1.5h"`.

    Raises
    ------
    ParameterError
        When it is neither, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", str(text).strip())
    seconds = float(match[1]) * {"min": 60, "h": 3600}.get(match[2], 1) if match else 0.0
    if seconds <= 0:
        raise ParameterError(f'search must be a positive time such as "90s", "15min" or "1h", got {text!r}')
    return seconds


def ladder(preset: str | None = None, n_jobs: int = 1, seed: int = 0, **parameters: Any) -> list[Candidate]:
    """What is tried, the cheapest first: all presets or the sizes of one; `parameters` are the same in each, as `resolve_settings` takes
    them."""
    if preset is not None:
        resolve_settings(preset)  # refuses an unknown one
    given = {name: value for name, value in parameters.items() if value is not None}
    found: list[Candidate] = []
    for name, sizes, others in LADDER:
        if preset not in (None, name):
            continue
        layers = {"layers": tuple(replace(layer, **sizes) for layer in PRESETS[name]["layers"])} if sizes else {}
        keywords = {"preset": name, **layers, **others} | given
        settings = resolve_settings(n_jobs=n_jobs, seed=seed, **keywords)
        if all(settings != other.settings for other in found):  # `parameters` may take away what makes the difference
            changed = {} if "layers" in given else sizes
            changed = changed | {key: value for key, value in others.items() if key not in given}
            found.append(Candidate(name, changed, keywords, settings))
    return found
