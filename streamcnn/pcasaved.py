"""A fitted StreamingPCA as arrays without objects, and back."""

from typing import Any

import numpy as np

from streamcnn.errors import DataError
from streamcnn.incremental import RESULTS
from streamcnn.pcaplan import SOLVERS


def arrays_of(pca) -> dict[str, np.ndarray]:
    """What `transform` of a fitted StreamingPCA needs."""
    flags = [SOLVERS.index(pca.solver_), int(bool(pca.whiten)), pca.n_samples_seen_, pca.n_jobs_]
    return {name: np.asarray(getattr(pca, name)) for name in RESULTS} | {"header": np.array(flags, np.int64)}


def restore(cls, arrays) -> Any:
    """An instance of `cls`, StreamingPCA, from what `arrays_of` gave.

    Raises
    ------
    DataError
        When arrays are missing or do not fit together.
    """
    missing = [name for name in (*RESULTS, "header") if name not in arrays]
    if missing:
        raise DataError(f"a saved StreamingPCA must hold {', '.join(missing)}, got only {', '.join(sorted(arrays))}")
    try:
        solver, whiten, n_seen, n_jobs = (int(value) for value in np.asarray(arrays["header"]).reshape(4))
        components = np.asarray(arrays["components_"], np.float64)
        k, d = components.shape
        noise = float(np.asarray(arrays["noise_variance_"]).reshape(()))
    except (TypeError, ValueError):
        raise DataError("a saved StreamingPCA has arrays that are none of its own; save it again") from None
    widths = {"mean_": d, "var_": d, "explained_variance_": k, "explained_variance_ratio_": k, "singular_values_": k}
    if any(np.shape(arrays[name]) != (width,) for name, width in widths.items()) or not 0 < solver < len(SOLVERS):
        raise DataError("a saved StreamingPCA has arrays that do not fit together; save it again")
    needed = ("components_", "mean_", "explained_variance_") if whiten else ("components_", "mean_")
    if not all(np.isfinite(arrays[name]).all() for name in needed) or (whiten and (np.asarray(arrays["explained_variance_"]) < 0).any()):
        raise DataError("a saved StreamingPCA has components that are no finite numbers; train it again")
    pca = cls(n_components=k, solver=SOLVERS[solver], whiten=bool(whiten), n_jobs=n_jobs)
    pca.components_ = components
    for name in widths:
        setattr(pca, name, np.asarray(arrays[name], np.float64))
    pca.noise_variance_, pca.n_components_ = noise, k
    pca.n_features_in_, pca.n_samples_seen_, pca.solver_, pca.n_jobs_ = d, n_seen, SOLVERS[solver], n_jobs
    pca._projector = None
    return pca
