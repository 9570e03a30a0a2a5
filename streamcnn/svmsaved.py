"""A fitted `StreamingSVC` as arrays without objects, and back."""

from collections.abc import Callable
from typing import Any

import numpy as np

from streamcnn.decisions import Machine
from streamcnn.errors import DataError
from streamcnn.ladder import KERNELS
from streamcnn.linear import LinearMachine
from streamcnn.nystroem import NystroemMachine
from streamcnn.rbf import RbfMachine

# arrays of the machine of each kernel, as public attributes
ARRAYS = {
    "linear": ("coef_", "intercept_"),
    "rbf": ("support_vectors_", "dual_coef_", "intercept_", "n_support_"),
    "nystroem": ("landmarks_", "dual_coef_", "intercept_"),
}


def arrays_of(svc) -> dict[str, np.ndarray]:
    """What `StreamingSVC.to_arrays` gives."""
    # a linear kernel has no gamma: 0 in the file, where NaN would make equal models compare as different
    tried = [(*(key if isinstance(key, tuple) else (key, 0.0)), value) for key, value in svc.selection_.items()]
    arrays = {name: getattr(svc, name) for name in ARRAYS[svc.kernel_]}
    if hasattr(svc, "slope_"):
        arrays["slope_"] = np.array(svc.slope_)
    return arrays | {
        "classes_": svc.classes_,
        "n_iter_": svc.n_iter_,
        "chosen": np.array([svc.C_, np.nan_to_num(svc.gamma_), svc.scale_]),
        "selection_": np.array(tried, np.float64).reshape(-1, 3),
        "header": np.array([KERNELS.index(svc.kernel_), svc.n_features_in_, svc.n_jobs_], np.int64),
    }


def restore(cls, arrays) -> tuple[Any, Machine, float | None]:
    """A `cls` with everything that `arrays_of` described but its machine and slope, and these.

    Raises
    ------
    DataError
        When arrays are missing or do not fit together.
    """
    try:
        code, d, n_jobs = (int(value) for value in np.asarray(arrays["header"]).reshape(3))
        if min(code, d, n_jobs) < 0:
            raise IndexError
        kernel, classes, intercept = KERNELS[code], np.asarray(arrays["classes_"]), np.asarray(arrays["intercept_"], np.float64)
        C, gamma, scale = (float(value) for value in np.asarray(arrays["chosen"]).reshape(3))
        gamma = float("nan") if kernel == "linear" else gamma
        n = len(classes)
        # built once the arrays are known to fit
        build: tuple[Callable[..., Machine], tuple]
        if kernel == "linear":
            coef = np.asarray(arrays["coef_"], np.float64)
            fits = coef.shape == (1 if n == 2 else n, d) and intercept.shape == (len(coef),)
            build = LinearMachine, (coef, intercept)
        elif kernel == "nystroem":
            vectors, dual = np.asarray(arrays["landmarks_"], np.float64), np.asarray(arrays["dual_coef_"], np.float64)
            fits = vectors.ndim == 2 and vectors.shape[1] == d and dual.shape == (1 if n == 2 else n, len(vectors))
            fits = fits and intercept.shape == (len(dual),)
            build = NystroemMachine, (gamma, scale, vectors, dual, intercept)
        else:
            vectors, dual = np.asarray(arrays["support_vectors_"], np.float64), np.asarray(arrays["dual_coef_"], np.float64)
            n_support = np.asarray(arrays["n_support_"], np.int64)
            fits = vectors.shape == (n_support.sum(), d) and dual.shape == (n - 1, len(vectors)) and len(n_support) == n
            fits = fits and intercept.shape == (n * (n - 1) // 2,) and bool((n_support >= 0).all())
            build = RbfMachine, (gamma, scale, vectors, dual, intercept, n_support)
        tried = np.asarray(arrays["selection_"], np.float64).reshape(-1, 3).tolist()
        n_iter = np.asarray(arrays["n_iter_"])
        slope = float(np.asarray(arrays["slope_"]).reshape(())) if "slope_" in arrays else None
    except KeyError as error:
        raise DataError(f"a saved StreamingSVC must hold the array {error}; save it again") from None
    except (IndexError, TypeError, ValueError):  # an unknown kernel, other numbers of values or axes
        raise DataError("a saved StreamingSVC has arrays that are none of its own; save it again") from None
    if not fits or classes.ndim != 1 or n < 2 or kernel == "auto":
        raise DataError("a saved StreamingSVC has arrays that do not fit together; save it again")
    # NaN would be a class of its own to argmax, always the same one
    learnt = [part for part in build[1] if not isinstance(part, np.ndarray) or part.dtype.kind == "f"]
    if not all(np.isfinite(part).all() for part in learnt) or not scale > 0 or not C > 0 or (kernel != "linear" and not gamma > 0):
        raise DataError("a saved StreamingSVC has coefficients that are no finite numbers; train it again")
    if slope is not None and not np.isfinite(slope):
        raise DataError("a saved StreamingSVC has a slope that is no finite number; train it again")
    svc = cls(kernel=kernel, C=C, gamma="auto" if kernel == "linear" else gamma, probability=slope is not None, n_jobs=n_jobs)
    svc.classes_, svc.kernel_, svc.scale_, svc.C_, svc.gamma_ = classes, kernel, scale, C, gamma
    svc.n_features_in_, svc.n_jobs_, svc.n_iter_ = d, n_jobs, n_iter
    svc.selection_ = {(c if kernel == "linear" else (c, g)): accuracy for c, g, accuracy in tried}
    return svc, build[0](*build[1]), slope
