"""What each stage of a run depends on, as one digest a stage; and what a resumed run refuses.

The digest of a stage covers the data, the parameters and the code version it depends on, and the digest of the stage before.
Limits and chunk sizes are in none: they change how, never what.
"""

import hashlib
import json
from importlib.metadata import version
from typing import Any

from streamcnn.errors import StoreError
from streamcnn.images import ImageSource
from streamcnn.plan import Plan
from streamcnn.presets import Settings
from streamcnn.store import FeatureStore
from streamcnn.wide import linear_method

# raise one when the code of that stage changes what it computes
STAGE_VERSIONS = {"filters": 1, "extract": 1, "pca": 2, "project": 1, "svm": 3}
WIDE_VERSION = 1  # of the linear SVMs of wide rows, besides
SVM = ("C", "gamma", "class_weight", "n_landmarks", "probability")
EXTRACTION = ("layers", "preprocess", "mirror", "seed", "device", "feature_dtype")


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of what reaches the model's numbers."""
    return {name: version(name) for name in ("streamcnn", "numpy", "scipy", "numba", "scikit-learn", "h5py")}


def stage_digests(fingerprint: str, settings: Settings, plan: Plan, n_rows: int) -> dict[str, str]:
    """Digest of each stage of a fit of so many images; equal digests mean equal results."""
    s, versions = settings.describe(), library_versions()
    digests, before = {}, fingerprint
    # what only some runs depend on is in the digests of those alone: the others' are older
    mirror = ["mirror"] if settings.mirror else []
    patches = [versions["scipy"]] if any(layer.filters == "patches" for layer in settings.layers) else []
    method = linear_method(n_rows, plan.n_components) if plan.kernel == "linear" else "newton"
    wide = [] if method == "newton" else [method, WIDE_VERSION]
    depends = {
        "filters": [s["layers"], s["preprocess"], s["seed"], s["device"], versions["numpy"], versions["numba"], *mirror, *patches],
        "extract": [s["feature_dtype"]],
        "pca": [plan.pca_solver, plan.n_components, s["n_jobs"], versions["scipy"], versions["scikit-learn"]],
        "project": [],
        "svm": [plan.kernel, *(s[name] for name in SVM), s["n_jobs"], versions["scikit-learn"], *wide],
    }
    for stage, parameters in depends.items():
        before = digests[stage] = digest_of(before, stage, STAGE_VERSIONS[stage], parameters)
    return digests


def check_same_data(store: FeatureStore, source: ImageSource, fingerprint: str) -> None:
    """Refuse to resume with other data, or with images read in another size."""
    before, now = store.config.get("source", {}).get("image_shape"), source.describe()["image_shape"]
    if isinstance(before, list) and before != list(now):
        raise StoreError(
            f"{store.path} was made from images of {' x '.join(map(str, before))}, not {' x '.join(map(str, now))}: "
            "resume with the same data and image_shape (--image-size), or fit afresh"
        )
    if store.config.get("fingerprint") not in (None, fingerprint):
        raise StoreError(f"{store.path} was made from other data (size, time or labels differ): resume with the same, or fit afresh")


def check_resume(store: FeatureStore, source: ImageSource, settings: Settings, fingerprint: str) -> None:
    """Refuse to resume with other data or other extraction parameters, naming the difference."""
    check_same_data(store, source, fingerprint)
    now = json.loads(json.dumps(settings.describe()))
    before = store.config.get("parameters", now)
    for name in EXTRACTION:
        then, wanted = before.get(name, False), now.get(name, False)
        if then != wanted:
            raise StoreError(f"{store.path} was made with {name}={then!r}, not {wanted!r}: resume with the same, or fit afresh")
