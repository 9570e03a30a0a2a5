"""Draws the README's picture from a real run: the data of `streamcnn demo` fitted under its limit, memory sampled all the while.

python tools/picture.py      a minute, and 2 GB of disk for the time being
"""

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from streamcnn.demo import make_data
from streamcnn.drawing import COLOURS, LIMIT_COLOUR
from streamcnn.progress import Progress
from streamcnn.runrecord import read_trace
from streamcnn.tracing import Trace, stages_of, thin

PICTURE = Path(__file__).parent.parent / "docs" / "memory.png"
LIMIT, N_IMAGES = "512MiB", 262_144
# what goes in and what comes out of the stages that take long enough to be labelled
FLOW = {
    "extract": "images → filters\n→ features on disk",
    "pca": "features → PCA",
    "project": "→ 256\nnumbers",
    "svm": "→ SVM\n→ model",
}
_INK = "#767676"  # seen on white and on black
_MIB = 1 << 20


def measure(folder: Path) -> tuple[Trace, int]:
    """The memory trace of a fit in a fresh process, and the bytes of its data; kernels are compiled beforehand."""
    subprocess.run([sys.executable, "-m", "streamcnn", "warmup"], check=True)
    train, _ = make_data(folder, N_IMAGES, 0, Progress(1))
    command = [sys.executable, "-m", "streamcnn", "fit", str(train), "--model", str(folder / "m.h5"), "--store", str(folder / "store")]
    done = subprocess.run([*command, "--memory-limit", LIMIT, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    trace = read_trace(folder / "store")
    assert trace is not None
    return trace, json.loads(done.stdout)["data_bytes"]


def draw(trace: Trace, data_bytes: int, path: Path) -> None:
    """Size of the data, limit and memory over time, stages shaded."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    assert trace.limit is not None
    limit, peak, data = (n / _MIB for n in (trace.limit, trace.peak_bytes, data_bytes))
    settings: Any = {"text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _INK}
    with plt.rc_context(settings | {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, ax = plt.subplots(figsize=(7.2, 3.3), layout="constrained")
        end = trace.trace[-1][0]
        shown = [span for span in stages_of(trace.trace) if span[0] in FLOW]
        for (stage, first, last), colour in zip(shown, COLOURS):
            ax.axvspan(first, last, color=colour, alpha=0.15, linewidth=0)
            ax.text((first + last) / 2, 12, FLOW[stage], ha="center", va="bottom", fontsize=8)
        ax.axhline(data, color=_INK, linewidth=1.2, linestyle=":")
        ax.text(0.3, data, f"the images: {data:,.0f} MiB", va="bottom")
        ax.axhline(limit, color=LIMIT_COLOUR, linewidth=1.5, linestyle="--")
        ax.text(0.3, limit, f"the limit you set: {limit:,.0f} MiB", va="bottom", color=LIMIT_COLOUR)
        seconds, held = zip(*thin(trace.trace))
        ax.plot(seconds, [n / _MIB for n in held], color=COLOURS[0], linewidth=1.8)
        ax.text(end, peak, f"memory of the process, {peak:,.0f} MiB at most", va="bottom", ha="right", color=COLOURS[0])
        ax.set(xlabel="seconds", ylabel="MiB", xlim=(0, end), ylim=(0, 1.12 * max(data, limit)))
        figure.savefig(file := io.BytesIO(), dpi=150, transparent=True)
        plt.close(figure)
    path.parent.mkdir(exist_ok=True)
    Image.open(file).quantize(64).save(path)  # a third of the bytes


def main() -> None:
    """Measure and draw."""
    with tempfile.TemporaryDirectory() as folder:
        draw(*measure(Path(folder)), PICTURE)


if __name__ == "__main__":
    main()
