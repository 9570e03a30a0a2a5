"""What all pictures share: colours that colour-blind eyes tell apart, text, and the one place that asks for matplotlib."""

import html
from collections.abc import Iterable
from itertools import repeat
from typing import Any

from streamcnn.errors import NotInstalledError

# Okabe and Ito's palette, told apart by colour-blind eyes, on white and on black
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
LIMIT_COLOUR = COLOURS[5]
# amounts from dark blue to yellow; values on both sides of 0 from blue over white to red: both without red against green
AMOUNTS, SIGNED = "cividis", "RdBu_r"


def require_matplotlib() -> None:
    """Load matplotlib.

    Raises
    ------
    NotInstalledError
        When it is not there; with the command that installs it.
    """
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError as error:
        raise NotInstalledError("drawing needs matplotlib, which is not installed: pip install matplotlib") from error


def axes_of(ax: Any, size: tuple[float, float]) -> Any:
    """`ax`, or the axes of a new figure of `size` inches."""
    require_matplotlib()
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def printable(text: Any) -> str:
    """`text` as a picture or a page can show it: names of files may have line feeds, and letters that are no Unicode."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))


def facts_html(facts: dict[str, Any]) -> str:
    """Names and values as an HTML table, for notebooks."""
    return table_html(facts.items(), tags=("th", "td"))


def table_html(
    rows: Iterable[Iterable[Any]], head: Iterable[str] = (), tags: Iterable[str] = repeat("td"), left: Iterable[int] = (0, 1)
) -> str:
    """Rows of values as an HTML table, for notebooks, of which some push cells to the right that do not say otherwise, and some do not.

    `tags` are of the cells of a row; cells of the columns `left` stand to the left, the others, numbers, to the right.
    """
    left = set(left)

    def line(cells: Iterable[Any], tags: Iterable[str]) -> str:
        parts = []
        for column, (cell, tag) in enumerate(zip(cells, tags)):
            side = "text-align:left" if column in left else "text-align:right; white-space:nowrap"
            parts.append(f'<{tag} style="{side}">{html.escape(printable(cell))}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    head = list(head)
    top = f"<thead>{line(head, ['th'] * len(head))}</thead>" if head else ""
    return f"<table>{top}<tbody>{''.join(line(row, tags) for row in rows)}</tbody></table>"


__all__ = ["AMOUNTS", "COLOURS", "LIMIT_COLOUR", "SIGNED", "axes_of", "facts_html", "printable", "require_matplotlib", "table_html"]
