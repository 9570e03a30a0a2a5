"""What all displays share."""

from pathlib import Path
from typing import Any

from streamcnn.drawing import axes_of
from streamcnn.store import FeatureStore

Store = FeatureStore | str | Path


class Display:
    """What all displays share; `plot` calls `_draw` of each.

    Attributes
    ----------
    size : (float, float)
        Width and height of a figure of its own, in inches.
    ax_, figure_ :
        Where it was drawn.
    """

    size = (6.0, 4.0)

    def plot(self, ax=None):
        """Draw into `ax`, by default into a new figure, and return self."""
        self.ax_ = axes_of(ax, self.size)
        self.figure_ = self.ax_.figure
        self._draw(self.ax_)
        return self

    def _draw(self, ax: Any) -> None:
        raise NotImplementedError


def path_of(store: Store) -> Path:
    """Folder of a store."""
    return store.path if isinstance(store, FeatureStore) else Path(store)


__all__ = ["Display", "Store", "path_of"]
