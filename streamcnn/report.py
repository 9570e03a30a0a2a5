"""`streamcnn report`: what a store holds and remembers, as one HTML page that needs nothing else.

What the store does not hold is left out and named, never made up; everything taken from its files is text, whatever it looks like.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from streamcnn.digests import library_versions
from streamcnn.displays import (
    ConfusionDisplay,
    FilterBankDisplay,
    ImagesDisplay,
    MemoryDisplay,
    SimilarityDisplay,
    SpectrumDisplay,
    StageTimeDisplay,
)
from streamcnn.displays.base import Display
from streamcnn.displays.fitted import MOST_FILTERS, SIMILARITY_BYTES, network_of
from streamcnn.errors import StreamCNNError
from streamcnn.evaluate import Tested
from streamcnn.filters import similarity_bytes
from streamcnn.memory import format_bytes
from streamcnn.network import Network
from streamcnn.page import Markup, abreast, bar, cards, code, details, figure, page, section, table
from streamcnn.recipe import changed, command_line, python_code
from streamcnn.runrecord import ordered_stages, read_record
from streamcnn.store import FeatureStore

# measured: 30 to 38 MiB for stores of one and two layers with 10 to 40 classes, and 245 bytes for each pair of 500 classes; matplotlib
# itself is loaded before
_DRAWING_BYTES, _PAIR_BYTES = 48 << 20, 256
_MOST_CLASSES, _MOST_LINES = 500, 10
# read before a plan is made
_SMALL_FILE = 1 << 20


def reading_claims(store: FeatureStore) -> dict[str, int]:
    """Name -> bytes that `build_report` takes at most, on top of what the process holds with matplotlib loaded."""
    files = [store.path / "stages" / f"{name}.h5" for name in ("filters", "pca")]
    drawing = {"pictures": _DRAWING_BYTES, "similarities": _similarity_bytes(store)}
    n_classes = len(store.config.get("classes", [])) + sum(len(call["new_classes"]) for call in store.additions())
    # of stages the arrays, and what is made of them
    stages = 2 * max(file.stat().st_size if file.is_file() else 0 for file in files)
    return drawing | {"confusion matrix": _PAIR_BYTES * min(n_classes, _MOST_CLASSES) ** 2, "finished stages": stages}


def _similarity_bytes(store: FeatureStore) -> int:
    """Bytes that comparing the filters drawn takes; of a store of unusual size, which is not read yet, the most there may be."""
    file = store.path / "stages" / "filters.h5"
    if file.is_file() and file.stat().st_size > _SMALL_FILE:
        return SIMILARITY_BYTES
    try:
        banks = network_of(store).filters
    except StreamCNNError:
        return 0
    return min(SIMILARITY_BYTES, max(similarity_bytes(bank[:MOST_FILTERS].shape) for bank in banks))


def build_report(
    store: FeatureStore, tested: Tested | None = None, tested_on: str | None = None, update: Callable[[int], None] = lambda n: None
) -> tuple[str, list[str], list[str]]:
    """The page, the names of its pictures, and a sentence for each thing that is left out.

    Parameters
    ----------
    store : FeatureStore
    tested : Tested or None
        How its model does on test images.
    tested_on : str or None
        Where these are.
    update : callable
        Called with the number of pictures just drawn.
    """
    return _Report(store, tested, tested_on, update).build()


class _Report:
    def __init__(self, store: FeatureStore, tested: Tested | None, tested_on: str | None, update: Callable[[int], None]):
        self.store, self.config, self.tested, self.update = store, store.config, tested, update
        self.record = read_record(store.path)
        self.names: list[str] = []
        self.left_out: list[str] = []
        remembered = (self.record or {}).get("evaluation")
        self.evaluation, self.tested_on = remembered, remembered and remembered["data"]
        if tested is not None:
            self.evaluation, self.tested_on = tested.measured, tested_on

    def build(self) -> tuple[str, list[str], list[str]]:
        name = self.store.path.resolve().name
        parts = [Markup("<header>"), *self._head(name), Markup("</header>")]
        parts += [self._stages(), self._pictures(), self._classes(), self._recipe(), self._parameters(), self._data(), self._versions()]
        if self.left_out:
            parts.append(section("Not in this report", *self.left_out))
        return page(f"streamcnn: {name}", *parts), self.names, self.left_out

    def _head(self, name: str) -> list[Markup]:
        record, source = self.record or {}, self.config.get("source", {})
        state = "A finished fit."
        if "parameters" not in self.config:
            state = "Rows that were written without a fit."
        elif self.store.finished("svm", self.config["digests"].get("svm", "")) is None:
            state = "A fit that is not finished: the same command with --resume goes on from here."
        made = f"Report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
        if record:
            made += f" Last run ended {record['ended'][:16].replace('T', ' ')} UTC."
        facts: list[tuple[str, Any]] = []
        if self.evaluation is not None:
            facts.append((f"accuracy on {self.evaluation['n_test']:,} images", f"{100 * self.evaluation['accuracy']:.2f} %"))
        n_images, added = source.get("n_samples"), self.store.additions()
        n_images = (n_images if type(n_images) is int else self.store.n_rows) + sum(call["rows"] for call in added)
        classes = len(self.config.get("classes", [])) + sum(len(call["new_classes"]) for call in added)
        facts += [("training images", f"{n_images:,}"), ("classes", classes)]
        seconds = [stage["seconds"] for name, stage in ordered_stages(self.record) if stage["seconds"] is not None and name != "evaluate"]
        if seconds:
            facts.append(("training", f"{sum(seconds):.1f} s"))
        if record:
            facts += [("images of the last run" if added else "images, decoded", format_bytes(record["data_bytes"]))]
            facts += [("peak memory", format_bytes(record["peak_bytes"])), ("memory limit", format_bytes(record["limit_bytes"]))]
        facts.append(("store on disk", format_bytes(self.store.nbytes)))
        head = section(f"streamcnn: {name}", state, made, cards(facts))
        return [Markup(head.replace("<h2>", "<h1>").replace("</h2>", "</h1>"))]

    def _stages(self) -> Markup:
        if self.record is None:
            return section("Plan and measurements", self._leave_out("Plan, seconds and memory of the stages: this store remembers no run."))
        record, rows, claims = self.record, [], []
        for name, stage in ordered_stages(record):
            planned, peak, spent = stage["planned_bytes"], stage["peak_bytes"], stage["seconds"]
            share = "" if peak is None else f"{100 * peak / max(planned, 1):.0f} %"
            filled = "" if peak is None else bar(peak / max(record["limit_bytes"], 1))
            cells = [name, "" if spent is None else f"{spent:.1f}", format_bytes(planned)]
            cells.append(format_bytes(peak) if peak is not None else "not measured" if stage["finished"] else "not run yet")
            rows.append([*cells, share, filled, stage["passes"], format_bytes(stage["disk_bytes"])])
            largest = sorted(stage["claims"].items(), key=lambda item: -item[1])
            claims.append([name, ", ".join(f"{what} {format_bytes(size)}" for what, size in largest)])
        head = ["stage", "seconds", "planned", "measured", "of plan", "of limit", "passes", "disk"]
        kind = "the system's own mark" if record["peak_exact"] else "the largest sample"
        peak, planned, limit = (format_bytes(record[name]) for name in ("peak_bytes", "planned_bytes", "limit_bytes"))
        text = (
            f"The process held {peak} at most ({kind}), planned were {planned}, the limit was {limit}: Python and libraries included. "
            f"{record['chunk_size']} images were convolved at a time. What a later run reused has the figures of the run that made it."
        )
        tight = "A stage held more than planned, so the smallest chunks were used from then on." if record["tightened"] else ""
        base = ", ".join(f"{what} {format_bytes(size)}" for what, size in record["base_claims"].items())
        buffers = details("Every buffer by name", table([["always", base], *claims], long=(1,)))
        return section("Plan and measurements", text, tight, table(rows, head, numbers=(1, 2, 3, 4, 6, 7)), buffers)

    def _pictures(self) -> Markup:
        store, figures = self.store, []
        add = self._picture
        caption = "Resident memory of the process over time: stages shaded, the limit dashed. Of the last run into the store."
        figures.append(add("memory", caption, MemoryDisplay, lambda ax: MemoryDisplay.from_store(store, ax=ax)))
        caption = "Seconds of each stage."
        figures.append(add("seconds", caption, StageTimeDisplay, lambda ax: StageTimeDisplay.from_store(store, ax=ax)))
        try:
            figures += self._layers(network_of(store))
        except StreamCNNError as error:
            self._leave_out(f"Filters and their similarities: {error}.")
        if self.config.get("parameters", {}).get("n_components", "auto") is not None:
            caption = "Variance that each component of the PCA captures; dotted: where so much of all is reached."
            figures.append(add("spectrum", caption, SpectrumDisplay, lambda ax: SpectrumDisplay.from_store(store, ax=ax)))
        if self.evaluation is not None and len(self.evaluation["classes"]) > _MOST_CLASSES:
            self._leave_out(f"The confusion matrix: of more than {_MOST_CLASSES} classes nothing can be seen in it.")
        elif (measured := self.evaluation) is not None:
            display = ConfusionDisplay(measured["confusion"], measured["classes"])
            figures.append(add("confusion", "Test images of each class, by what they were taken for.", ConfusionDisplay, display.plot))
        if self.tested is None:
            missing = "The most confused and the most certain images" + (" and the confusion matrix" if self.evaluation is None else "")
            self._leave_out(f"{missing}: the store holds no test images; give them with --test.")
        else:
            groups = [("confused", self.tested.confused), ("certain", self.tested.certain)]
            for kind, examples in [group for group in groups if group[1]]:
                what = "wrong by the largest margin: class → taken for" if kind == "confused" else "right by the largest margin"
                display_of = ImagesDisplay(examples, f"most {kind} images")
                figures.append(add(f"most {kind}", f"Test images that are {what}.", ImagesDisplay, display_of.plot))
        return section("Pictures", abreast(filter(None, figures)))

    def _layers(self, network: Network) -> list[Markup | None]:
        figures = []
        for layer in range(1, len(network.filters) + 1):
            for name, display, caption in (
                ("filters of", FilterBankDisplay, "Filters of layer {}, as applied: red is positive, blue negative."),
                ("similarity in", SimilarityDisplay, "Similarity of each two filters of layer {}, eq. (2) of Lee & Lee (2017)."),
            ):
                draw = partial(display.of_network, network, layer)
                figures.append(self._picture(f"{name} layer {layer}", caption.format(layer), display, draw))
        return figures

    def _picture(self, name: str, caption: str, display: type[Display], draw: Callable[[Any], Any]) -> Markup | None:
        try:
            made = figure(name, caption, draw, display.size)
        except StreamCNNError as error:
            self._leave_out(f"Picture of {name}: {error}.")
            return None
        self.names.append(name)
        self.update(1)
        return made

    def _leave_out(self, note: str) -> str:
        self.left_out.append(note)
        return note

    def _classes(self) -> Markup:
        if self.evaluation is None:
            return Markup()
        counts, classes = np.asarray(self.evaluation["confusion"]), self.evaluation["classes"]
        of_class, hits = counts.sum(axis=1), np.diag(counts)
        order = sorted(np.flatnonzero(of_class).tolist(), key=lambda i: (hits[i] / of_class[i], i))[:_MOST_LINES]
        worst = [[classes[i], f"{100 * hits[i] / of_class[i]:.1f} %", f"{hits[i]:,} of {of_class[i]:,}"] for i in order]
        wrong = [(-int(counts[i, j]), i, j) for i, j in zip(*np.nonzero(counts)) if i != j]
        pairs = [[classes[i], classes[j], -n] for n, i, j in sorted(wrong)[:_MOST_LINES]]
        unknown = f"{self.evaluation['unknown']:,} images are of classes the model does not know; they count as wrong."
        tables = [table(worst, ["class", "recall", "images"], numbers=(1, 2), title="The lowest recall")]
        if pairs:
            tables.append(table(pairs, ["class", "taken for", "images"], numbers=(2,), title="The most frequent errors"))
        text = f"On {self.evaluation['n_test']:,} test images, {self.tested_on}." + ("" if pairs else " There is no error.")
        return section("Classes", text, unknown if self.evaluation["unknown"] else "", abreast(tables))

    def _recipe(self) -> Markup:
        record = self.record or {}
        opened_with, limit = record.get("opened_with", {}), record.get("limit_bytes")
        # whole MiB where it is: the limit changes no bit
        text = None if limit is None else f"{limit >> 20}MiB"
        try:
            command, note = command_line(self.config, opened_with, text)
            snippet = python_code(self.config, opened_with, text)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return section("Do it again", self._leave_out(f"How to repeat it: the store's parameters are of no version known ({error})."))
        path = "Paths are as they were given. The same data, seed, threads, device and library versions give the same bits."
        return section("Do it again", path, code(command) if command else "", note, code(snippet))

    def _parameters(self) -> Markup:
        parameters = self.config.get("parameters")
        if not parameters:
            return section("Parameters", self._leave_out("Parameters: this store was not made by a fit."))
        try:
            different = changed(self.config)
        except (KeyError, TypeError, ValueError, AttributeError):
            different = {}
        of = {name: "" if name in different else "default" for name in parameters}
        rows = [[name, of[name], value] for name, value in sorted(parameters.items()) if name != "layers"]
        layers = parameters.get("layers")
        for number, layer in enumerate(layers if isinstance(layers, list) else [], start=1):
            facts = ", ".join(f"{key}={value!r}" for key, value in layer.items()) if isinstance(layer, dict) else layer
            rows.append([f"layer {number}", of["layers"], facts])
        return section("Parameters", table(rows, ["parameter", "", "value"], long=(2,)))

    def _data(self) -> Markup:
        facts = {name.replace("_", " "): value for name, value in self.config.get("source", {}).items() if value is not None}
        rows = [[name, " x ".join(map(str, value)) if isinstance(value, list) else value] for name, value in facts.items()]
        rows += [[f"added {number}", f"{call['rows']:,} images"] for number, call in enumerate(self.store.additions(), start=1)]
        rows += [["features", f"{self.store.n_rows:,} rows of {self.store.n_features:,}"]] if self.store.n_rows else []
        bad = self.config.get("bad_files", [])
        left = details(f"{len(bad)} files were left out", table(bad[:1000], ["file", "reason"], long=(1,))) if bad else ""
        return section("Data", table(rows, long=(1,)), left)

    def _versions(self) -> Markup:
        used, now = self.config.get("versions", {}), library_versions()
        names = [*now, *sorted(used.keys() - now.keys())]
        rows = [[name, used.get(name, ""), now.get(name, "")] for name in names]
        machine = [[what, value, ""] for what, value in (self.record or {}).get("machine", {}).items()]
        return section("Versions", table([*rows, *machine], ["", "fit", "this report"]))


__all__ = ["build_report", "reading_claims"]
