"""Parts of a self-contained HTML page: tables, pictures as inline SVG, and the frame. Every text that comes in is escaped here.

There is no script, no font and no picture from elsewhere, and the page's own policy forbids them. Light and dark follow the reader's
system: pictures are drawn with a stand-in for the colour of text, which becomes the page's.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from streamcnn.drawing import printable, require_matplotlib

# inches; text of 10 points is then still 9 pixels high on a phone 390 pixels wide
_WIDTH = 5.1
# a colour nobody draws with
_TEXT_COLOUR = "#0a0b0c"
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa; --bar: #56b4e9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --text: #e6e9ed; --soft: #9aa5b1; --line: #333b45; --box: #1d232a; --bar: #0072b2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1rem 1.2rem 3rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; } p { margin: 0.4rem 0; }
.soft, figcaption, th { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 0.7rem; margin-top: 1rem; }
.card { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem 0.7rem; }
.card b { display: block; font-size: 1.15rem; font-weight: 600; }
.abreast { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 620px; margin: 0 auto; }
figcaption { font-size: 0.85rem; margin-top: 0.3rem; }
.wide, pre { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.92rem; overflow-wrap: normal; }
caption { text-align: left; padding: 0.4rem 0; }
th, td { text-align: left; padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td { white-space: nowrap; } th { font-weight: 500; } .number { text-align: right; }
td.long { min-width: 14rem; white-space: normal; overflow-wrap: anywhere; }
.bar { width: 7rem; height: 0.8rem; margin-top: 0.3rem; background: var(--line); border-radius: 3px; }
.bar i { display: block; height: 100%; background: var(--bar); border-radius: 3px; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 0.7rem; font-size: 0.85rem; }
details { margin: 0.5rem 0; } summary { cursor: pointer; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """HTML that is not to be escaped again."""


def escaped(value: Any) -> str:
    """`value` as HTML; `Markup` is HTML already."""
    return value if isinstance(value, Markup) else html.escape(printable(value))


def bar(share: float) -> Markup:
    """A bar of which `share`, 0 to 1, is filled."""
    return Markup(f'<div class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></div>')


def table(
    rows: Iterable[Iterable[Any]], head: Iterable[str] = (), numbers: Iterable[int] = (), long: Iterable[int] = (), title: str = ""
) -> Markup:
    """A table in a box that scrolls sideways where it is too wide; columns `numbers` stand to the right, `long` ones are wrapped.

    Without a head the first cell of each row heads it.
    """
    caption = f"<caption>{escaped(title)}</caption>" if title else ""
    kinds = {**dict.fromkeys(numbers, ' class="number"'), **dict.fromkeys(long, ' class="long"')}

    def line(cells: Iterable[Any], tag: Callable[[int], str]) -> str:
        parts = (f"<{tag(i)}{kinds.get(i, '')}>{escaped(cell)}</{tag(i)}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(parts)}</tr>"

    head = list(head)
    top = line(head, lambda i: "th") if head else ""
    body = "".join(line(cells, lambda i: "td" if i or head else "th") for cells in rows)
    return Markup(f'<div class="wide"><table>{caption}{top}{body}</table></div>')


def cards(facts: Iterable[tuple[str, Any]]) -> Markup:
    """The few figures that matter most: (what, how much)."""
    parts = (f'<div class="card"><span class="soft">{escaped(what)}</span><b>{escaped(value)}</b></div>' for what, value in facts)
    return Markup(f'<div class="cards">{"".join(parts)}</div>')


def code(text: str) -> Markup:
    """Text to be copied, as it is."""
    lines = (escaped(line) for line in text.split("\n"))
    return Markup("<pre>" + "\n".join(lines) + "</pre>")


def details(summary: str, inner: Markup) -> Markup:
    """What is folded away."""
    return Markup(f"<details><summary>{escaped(summary)}</summary>{inner}</details>")


def section(title: str, *parts: Any) -> Markup:
    """A heading and what is below it; plain texts become paragraphs."""
    inner = "".join(part if isinstance(part, Markup) else f"<p>{escaped(part)}</p>" for part in parts if part)
    return Markup(f"<section><h2>{escaped(title)}</h2>{inner}</section>")


def abreast(parts: Iterable[Markup]) -> Markup:
    """Pictures or tables side by side where there is room."""
    return Markup(f'<div class="abreast">{"".join(parts)}</div>')


def figure(name: str, caption: str, draw: Callable[[Any], Any], size: tuple[float, float]) -> Markup:
    """What `draw` draws into axes of the shape of `size` inches, as inline SVG.

    Parameters
    ----------
    name : str
        Made part of the SVG's ids, which have to differ between the pictures of a page.
    caption : str
    draw : callable
        Takes matplotlib axes.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    # no window system is asked for a figure that pyplot does not know
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {**dict.fromkeys(parts, _TEXT_COLOUR), "axes.titlesize": "medium", "legend.framealpha": 0.0}
    with matplotlib.rc_context(), io.StringIO() as file:
        matplotlib.rcdefaults()  # not the reader's own style
        matplotlib.rcParams.update(settings | {"svg.fonttype": "none", "svg.hashsalt": name})
        picture = Figure(figsize=(_WIDTH, size[1] * _WIDTH / size[0]), layout="constrained")
        axes = picture.subplots()
        axes.set_facecolor("none")
        draw(axes)
        with warnings.catch_warnings():  # a reader's fonts may well have the letters that are missing here
            warnings.filterwarnings("ignore", message="Glyph")
            picture.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = file.getvalue()
    text = text[text.index("<svg") :]
    opening = re.search(r'viewBox="[^"]*"', text)
    assert opening is not None
    text = f'<svg role="img" aria-label="{escaped(caption)}" {opening[0]}>' + text[text.index(">") + 1 :]
    # groups are never referred to, and their names are those of the next picture too
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace(_TEXT_COLOUR, "currentColor")
    return Markup(f"<figure>{text}<figcaption>{escaped(caption)}</figcaption></figure>")


def page(title: str, *parts: Markup) -> str:
    """The whole document."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


__all__ = ["Markup", "abreast", "bar", "cards", "code", "details", "escaped", "figure", "page", "section", "table"]
