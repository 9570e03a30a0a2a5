"""A memory trace as a picture: by matplotlib, as SVG for notebooks, and live while a fit runs."""

import html
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from streamcnn.drawing import COLOURS, LIMIT_COLOUR, axes_of, printable

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 220, 4, 36
_MIB = 1 << 20


@dataclass
class Trace:
    """What a memory monitor has seen, kept: its samples (seconds, stage, bytes), its peak and its limit in bytes."""

    trace: list[tuple[float, str, int]]
    peak_bytes: int
    limit: int | None = None

    def plot(self, ax=None):
        """Draw it by matplotlib (extra `plot`); returns the axes."""
        return plot(self, ax)

    def _repr_html_(self) -> str:
        return svg(self)


def notebook_kernel() -> bool:
    """Whether this code runs in a notebook, whose output takes HTML and is no terminal."""
    # only a notebook has loaded it by now, and to load it takes half a second
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def stages_of(trace: list[tuple[float, str, int]]) -> list[tuple[str, float, float]]:
    """(stage, first second, last second) of neighbouring samples of one stage, those without a stage left out."""
    spans = []
    for stage, samples in groupby(trace, key=lambda sample: sample[1]):
        times = [seconds for seconds, _, _ in samples]
        if stage:
            spans.append((stage, times[0], times[-1]))
    return spans


def thin(trace: list[tuple[float, str, int]], most: int = 400) -> list[tuple[float, int]]:
    """At most `most` (seconds, bytes) of a trace, each the highest sample of its stretch, so that no peak is lost."""
    step = -(-len(trace) // most) if trace else 1
    return [max(((s, b) for s, _, b in trace[i : i + step]), key=lambda pair: pair[1]) for i in range(0, len(trace), step)]


def svg(monitor: Any) -> str:
    """The trace as an SVG picture; text takes the colour of the page around it, light or dark."""
    trace = list(monitor.trace)
    if not trace:
        return "<p>no samples yet: enter the monitor with a <code>with</code> statement</p>"
    end = max(trace[-1][0], 1e-3)
    peak = monitor.peak_bytes
    top = 1.08 * max(peak, monitor.limit or 0)

    def x(seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 8) * seconds / end

    def y(n_bytes: float) -> float:
        return (_HEIGHT - _BOTTOM) * (1 - n_bytes / top)

    parts: list[str] = []
    colours: dict[str, str] = {}
    for stage, first, last in stages_of(trace):
        colour = colours.setdefault(stage, COLOURS[len(colours) % len(COLOURS)])
        box = f'x="{x(first):.1f}" width="{max(x(last) - x(first), 1):.1f}" y="0" height="{_HEIGHT - _BOTTOM}"'
        parts.append(f'<rect {box} fill="{colour}" opacity="0.18"/>')
        if x(last) - x(first) > 7 * len(stage):  # names of short stages would lie over one another
            parts.append(f'<text x="{x(first) + 3:.1f}" y="{_HEIGHT - _BOTTOM - 5}" font-size="11">{html.escape(stage)}</text>')
    line = " ".join(f"{x(seconds):.1f},{y(n):.1f}" for seconds, n in thin(trace))
    parts.append(f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>')
    marks = [(peak, f"peak {peak / _MIB:.0f} MiB")]
    if monitor.limit:
        marks.append((monitor.limit, f"limit {monitor.limit / _MIB:.0f} MiB"))
        at = f'x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(monitor.limit):.1f}" y2="{y(monitor.limit):.1f}"'
        parts.append(f'<line {at} stroke="{LIMIT_COLOUR}" stroke-width="1.5" stroke-dasharray="6 4"/>')
    for n, text in marks:
        # above its line; that of a peak close to the limit would lie over the limit's
        close = n == peak and monitor.limit and abs(y(n) - y(monitor.limit)) < 14
        parts.append(f'<text x="{_LEFT + 4}" y="{y(n) + 14 if close else max(y(n) - 4, 11):.1f}" font-size="11">{text}</text>')
    parts.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 12}" font-size="11" text-anchor="end">{end:.1f} s</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 12}" font-size="11">resident memory now {trace[-1][2] / _MIB:.0f} MiB</text>')
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="max-width:{_WIDTH}px;width:100%" fill="currentColor" font-family="sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="memory trace" {box}>{"".join(parts)}</svg>'


def plot(monitor: Any, ax=None):
    """The trace by matplotlib: resident MiB over seconds, stages shaded, the limit dashed.

    Parameters
    ----------
    monitor : MemoryMonitor or Trace
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes
    """
    ax, trace = axes_of(ax, (8, 3)), list(monitor.trace)
    colours: dict[str, str] = {}
    for stage, first, last in stages_of(trace):
        new = stage not in colours
        colour = colours.setdefault(stage, COLOURS[len(colours) % len(COLOURS)])
        ax.axvspan(first, last, color=colour, alpha=0.2, linewidth=0, label=printable(stage) if new else None)
    ax.plot([seconds for seconds, _, _ in trace], [n / _MIB for _, _, n in trace], color="C0", linewidth=1.2, label="resident")
    ax.axhline(monitor.peak_bytes / _MIB, color="0.5", linestyle=":", linewidth=1, label="peak")
    if monitor.limit:
        ax.axhline(monitor.limit / _MIB, color=LIMIT_COLOUR, linestyle="--", linewidth=1.2, label="limit")
    ax.set(xlabel="seconds", ylabel="resident memory, MiB", ylim=(0, None))
    legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize="small", ncols=4)
    for text in legend.get_texts():
        text.set_parse_math(False)  # between two dollars the name of a stage would be a formula
    return ax


class LiveView:
    """The SVG trace in a notebook's output, drawn anew once a second; without IPython, or outside a notebook, nothing."""

    def __init__(self, seconds: float = 1.0):
        self._seconds, self._next, self._handle = seconds, 0.0, None
        if notebook_kernel():
            from IPython.display import HTML, display

            self._html = HTML
            self._handle = display(HTML("<p>memory trace</p>"), display_id=True)

    def update(self, monitor: Any, last: bool = False) -> None:
        """Draw, unless the last drawing is younger than a second."""
        now = time.monotonic()
        if self._handle is not None and (last or now >= self._next):
            self._handle.update(self._html(svg(monitor)))
            self._next = now + self._seconds
