"""Accuracy of presets and sizes against learning time and peak memory: `tools/bench.py frontier`.

Each cell is a fit in a fresh process, whose line is appended to `frontier.csv`; what has a line there is not run again, so that it may be
stopped at any time. `python tools/frontier.py digits 0` measures a single cell and prints it.
"""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from streamcnn import ConvLayer, StreamCNNClassifier, StreamCNNError, open_images
from streamcnn.candidates import Candidate, ladder
from streamcnn.datasets import digits_split, extended_yale_b

ROWS, PICTURE = Path(__file__).with_name("frontier.csv"), Path(__file__).parent.parent / "docs" / "frontier.png"
LIMIT = "2GiB"
DATA = {"digits": "digits, 8 x 8", "cifar10": "CIFAR-10", "yale": "Extended Yale B"}
COLUMNS = ("data", "preset", "changed", "accuracy", "seconds", "peak_bytes", "n_train", "n_test", "threads", "reason")
# of Okabe & Ito's colours for the colour-blind those that are seen on white and on black; the shapes tell as much
_STYLE = {"fast": ("#0072B2", "o"), "faces": ("#D55E00", "^"), "patches": ("#009E73", "s"), "lee2017": ("#CC79A7", "D")}
_INK = "#767676"


def cells() -> list[Candidate]:
    """What a search tries, patches with mirror images alone, as the preset has them; and filters that are not made of the data."""
    return [c for c in ladder() if c.parameters.get("mirror", True)] + ladder("fast", layers=ConvLayer(24, activation="split"))


def changed(candidate: Candidate) -> str:
    """What is changed of the preset, in a few words."""
    grid, layer = candidate.parameters.get("pool_grid"), candidate.settings.layers[0]
    kind = "patches" if candidate.preset == "patches" else "filters"
    if candidate.preset == "fast" and layer.filters != "patches":
        kind = "random filters"
    return f"{grid[0]} x {grid[1]} cells" if grid else f"{layer.n_filters} {kind}"


def open_data(name: str, folder: str | None) -> tuple[Any, list[Any]]:
    """Training images, and the sets to test on, whose accuracies are averaged."""
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels, train = (images.reshape(-1, 8, 8) * 15).astype("uint8"), digits_split(0)
        return open_images(pixels[train], labels[train]), [open_images(pixels[~train], labels[~train])]
    if folder is None:
        raise SystemExit(f"{name} is read from the folder that STREAMCNN_DATA names, which is not set")
    if name == "yale":
        subsets = extended_yale_b(Path(folder) / "CroppedYale")
        return subsets[1], [subsets[number] for number in (2, 3, 4, 5)]
    return open_images(Path(folder) / "cifar10" / "train"), [open_images(Path(folder) / "cifar10" / "test")]


def measure(name: str, number: int) -> dict[str, Any]:
    """The line of one cell, of this process."""
    candidate = cells()[number]
    line = dict.fromkeys(COLUMNS, "") | {"data": name, "preset": candidate.preset, "changed": changed(candidate)}
    train, tests = open_data(name, os.environ.get("STREAMCNN_DATA"))
    classifier = StreamCNNClassifier(**candidate.keywords | {"memory_limit": LIMIT, "random_state": 0})
    try:
        classifier.fit(train)
    except StreamCNNError as error:  # too small an image, or too large a machine: a finding too
        return line | {"reason": str(error).splitlines()[0]}
    accuracy = sum(classifier.score(test) for test in tests) / len(tests)
    seconds = sum(classifier.report_.stage_seconds.values())
    sizes = {"n_train": train.n_samples, "n_test": sum(test.n_samples for test in tests), "threads": classifier.n_jobs_}
    return line | {"accuracy": accuracy, "seconds": seconds, "peak_bytes": classifier.peak_rss_bytes_} | sizes


def measured() -> list[dict[str, str]]:
    """All lines there are."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def collect(names: list[str]) -> None:
    """Measure and append what has no line yet."""
    for name in names:
        for number, candidate in enumerate(cells()):
            key = (name, candidate.preset, changed(candidate))
            if any((line["data"], line["preset"], line["changed"]) == key for line in measured()):
                continue
            done = subprocess.run([sys.executable, __file__, name, str(number)], check=True, stdout=subprocess.PIPE, text=True)
            new = not ROWS.exists()
            with ROWS.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(json.loads(done.stdout.splitlines()[-1]))


def draw(lines: list[dict[str, str]]) -> None:
    """The picture: a column for each data set; what nothing beats in both is joined by a line."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    names = [name for name in DATA if any(line["data"] == name and line["accuracy"] for line in lines)]
    settings: Any = {"text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _INK}
    with plt.rc_context(settings | {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        named: list[tuple[Any, list[tuple[tuple[float, float], str]]]] = []
        figure, axes = plt.subplots(2, len(names), figsize=(3.6 * len(names), 5.6), squeeze=False, sharey="col", layout="constrained")
        for column, name in enumerate(names):
            points = [line for line in lines if line["data"] == name and line["accuracy"]]
            for row, (key, unit, label) in enumerate((("seconds", 1, "learning, s"), ("peak_bytes", 2**20, "peak memory, MiB"))):
                ax = axes[row][column]
                at = [(float(p[key]) / unit, 100 * float(p["accuracy"])) for p in points]
                best = sorted((x, y) for x, y in at if not any(u <= x and v >= y and (u, v) != (x, y) for u, v in at))
                ax.plot(*zip(*best), color=_INK, linewidth=0.8, zorder=1)
                for preset, (colour, marker) in _STYLE.items():
                    chosen = [(place, p) for place, p in zip(at, points) if p["preset"] == preset]
                    if chosen:
                        ax.scatter(*zip(*(place for place, _ in chosen)), c=colour, marker=marker, s=36, label=preset, zorder=2)
                named.append((ax, [(place, p["changed"].rsplit(" ", 1)[0]) for place, p in zip(at, points)]))
                ax.set_xscale("log" if key == "seconds" else "linear")
                ax.margins(0.18, 0.12)
                ax.set_xlabel(label)
                ax.grid(color=_INK, alpha=0.25, linewidth=0.5)
            axes[0][column].set_title(DATA[name])
            axes[0][column].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes[0][column].xaxis.set_major_formatter("{x:g}")
            axes[0][column].xaxis.set_minor_formatter(NullFormatter())
        axes[0][0].set_ylabel("test accuracy, %")
        axes[1][0].set_ylabel("test accuracy, %")
        handles = {text: handle for ax in axes.flat for handle, text in zip(*ax.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
        figure.draw_without_rendering()  # where things stand is known from here on
        for ax, texts in named:
            _name(ax, texts)
        PICTURE.parent.mkdir(exist_ok=True)
        figure.savefig(file := io.BytesIO(), dpi=110, transparent=True)
        plt.close(figure)
    Image.open(file).quantize(64).save(PICTURE)  # a third of the bytes


def _name(ax: Any, points: list[tuple[tuple[float, float], str]]) -> None:
    """A text beside each point, on the side on which it covers least of the points and of the texts before it."""
    from matplotlib.transforms import Bbox

    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in (ax.transData.transform(place) for place, _ in points)]
    for place, text in sorted(points):
        tried: list[tuple[float, int, Any, Any]] = []
        for x, y, align in ((5, 4, "left"), (5, -9, "left"), (-5, 4, "right"), (-5, -9, "right"), (0, 9, "center"), (0, -14, "center")):
            label = ax.annotate(text, place, xytext=(x, y), textcoords="offset points", fontsize=7, ha=align)
            box = label.get_window_extent()
            covered = sum(both.width * both.height for other in taken if (both := Bbox.intersection(box, other)) is not None)
            tried.append((covered, len(tried), label, box))
        best = min(tried, key=lambda each: each[:2])
        taken.append(best[3])
        for _, number, label, _ in tried:
            if number != best[1]:
                label.remove()


def table() -> str:
    """Measure what is left, for which there are data, draw the picture, and return it with the table of the figures."""
    collect([name for name in DATA if name == "digits" or os.environ.get("STREAMCNN_DATA")])
    lines = measured()
    draw(lines)
    names = [name for name in DATA if any(line["data"] == name for line in lines)]
    found = {(line["data"], line["preset"], line["changed"]): line for line in lines}
    text = ["![test accuracy against learning time and peak memory](docs/frontier.png)", ""]
    text += [f"| preset | | {' | '.join(DATA[name] for name in names)} |", "|---" * (2 + len(names)) + "|"]
    for candidate in cells():
        row = [found.get((name, candidate.preset, changed(candidate))) for name in names]
        text.append(f"| `{candidate.preset}` | {changed(candidate)} | {' | '.join(map(_cell, row))} |")
    return "\n".join(text)


def _cell(line: dict[str, str] | None) -> str:
    if line is None or not line["accuracy"]:
        return "" if line is None else "-"
    return f"{100 * float(line['accuracy']):.2f} %, {float(line['seconds']):.1f} s, {float(line['peak_bytes']) / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]))) + "\n")
