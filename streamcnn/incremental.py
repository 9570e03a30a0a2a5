"""Which rows make up each batch of `IncrementalPCA`, whose result depends on it."""

from collections.abc import Iterator

import numpy as np
from sklearn.decomposition import IncrementalPCA

from streamcnn.rowinput import Batches, check_finite
from streamcnn.rows import ArrayRows, Rows, recut

_STRIPE = 16
# what scikit-learn's `partial_fit` finds, and goes on from
_RESULTS = (
    "components_",
    "singular_values_",
    "mean_",
    "var_",
    "explained_variance_",
    "explained_variance_ratio_",
    "noise_variance_",
    "n_components_",
    "n_samples_seen_",
)


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


def arrays_of_incremental(pca: IncrementalPCA, n_batches: int) -> dict[str, np.ndarray]:
    """A fitted `IncrementalPCA` and how many batches it has seen, as arrays."""
    return {name: np.asarray(getattr(pca, name)) for name in _RESULTS} | {"n_batches": np.array(n_batches)}


def restore_incremental(pca: IncrementalPCA, arrays: dict[str, np.ndarray]) -> int:
    """Make `pca` what `arrays_of_incremental` had seen; returns the number of batches."""
    for name in _RESULTS:
        setattr(pca, name, arrays[name] if arrays[name].ndim else arrays[name].item())
    return int(arrays["n_batches"])
