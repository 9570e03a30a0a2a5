"""PCA by scikit-learn's `IncrementalPCA`, and which rows make up each of its batches, as its result depends on that."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.decomposition import IncrementalPCA

from streamcnn.rowinput import Batches, check_finite
from streamcnn.rows import ArrayRows, Rows, recut

_STRIPE = 16
# what fitting a PCA finds, by scikit-learn's names
RESULTS = (
    "components_",
    "mean_",
    "var_",
    "explained_variance_",
    "explained_variance_ratio_",
    "singular_values_",
    "noise_variance_",
    "n_components_",
)
# and what scikit-learn's goes on from
_STATE = (*RESULTS, "n_samples_seen_")


def default_batch_size(n_components: int) -> int:
    """Rows of a batch of `IncrementalPCA`."""
    return max(256, 3 * n_components)


def incremental_batches(n_rows: int, n_components: int, batch_size: int | None) -> tuple[int, int]:
    """How `n_rows` are dealt to the batches of `IncrementalPCA`.

    Returns
    -------
    n_batches, stripe : int
        Batch j takes stripes j, j + n_batches, ... of `stripe` consecutive rows: every batch spans the whole source.
    """
    size = max(batch_size or default_batch_size(n_components), n_components, 2)
    n_batches = -(-n_rows // size)
    while True:
        stripe = max(1, min(_STRIPE, n_rows // (4 * n_batches)))
        smallest = (n_rows // stripe // n_batches) * stripe
        if n_batches == 1 or smallest >= max(n_components, 2):
            return n_batches, stripe
        n_batches -= 1


def iter_incremental(source: Rows | Batches, n_components: int, batch_size: int | None, first: int = 0) -> Iterator[np.ndarray]:
    """Yield float64 batches (rows, n_features) in one buffer, to be overwritten by whoever takes them.

    Arrays and `Rows` are dealt by stripes, and the first batch is number `first`; `Batches`, whose number of rows is not known, are
    recut in their own order and the last one may be small.
    """
    d = source.n_features
    if isinstance(source, Batches):
        batch = np.empty((max(batch_size or default_batch_size(n_components), n_components), d))
        for start, n_valid in recut(source, batch):
            check_finite(batch[:n_valid], start)
            yield batch[:n_valid]
        return
    n_batches, stripe = incremental_batches(source.n_rows, n_components, batch_size)
    starts = range(0, source.n_rows, stripe)
    batch = np.empty((len(starts[::n_batches]) * stripe, d))
    # arrays convert themselves to whatever they fill; other sources fill float32
    rows = None if isinstance(source, ArrayRows) else np.empty((stripe, d), np.float32)
    for number in range(first, n_batches):
        filled = 0
        for start in starts[number::n_batches]:
            stop = min(start + stripe, source.n_rows)
            place = batch[filled : filled + stop - start]
            if rows is None:
                source.read(start, stop, place)
            else:
                source.read(start, stop, rows)
                place[:] = rows[: stop - start]
            check_finite(place, start)
            filled += stop - start
        yield batch[:filled]


class Incremental:
    """scikit-learn's `IncrementalPCA`, batch by batch.

    Attributes
    ----------
    n : int
        Rows seen.
    n_batches : int
    """

    def __init__(self) -> None:
        self.n = self.n_batches = 0
        self._pca = IncrementalPCA()

    def add(self, batch: np.ndarray, n_components: int) -> None:
        """Take in float64 rows (m, d), which are overwritten; the first batch fixes how many components there are."""
        self._pca.n_components = int(getattr(self._pca, "n_components_", n_components))
        with np.errstate(divide="ignore", invalid="ignore"):
            self._pca.partial_fit(batch, check_input=False)
        # scikit-learn keeps a view, and with it all right singular vectors of the batch
        self._pca.components_ = self._pca.components_.copy()
        self.n, self.n_batches = int(self._pca.n_samples_seen_), self.n_batches + 1

    def results(self) -> dict[str, Any]:
        """`RESULTS` of all rows seen, by name; not copied."""
        found = {name: getattr(self._pca, name) for name in RESULTS}
        return found | {"explained_variance_ratio_": np.nan_to_num(found["explained_variance_ratio_"], nan=0.0, posinf=0.0)}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything, as arrays; not copied."""
        return {name: np.asarray(getattr(self._pca, name)) for name in _STATE} | {"n_batches": np.array(self.n_batches)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Incremental":
        """What `to_arrays` gave, in the memory of `arrays`."""
        made = cls()
        for name in _STATE:
            setattr(made._pca, name, arrays[name] if arrays[name].ndim else arrays[name].item())
        made.n, made.n_batches = int(arrays["n_samples_seen_"]), int(arrays["n_batches"])
        return made
