"""Presets, and the parameters of a fit with everything that can be settled before the data are seen."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from streamcnn.errors import ParameterError
from streamcnn.kernels import DEVICES
from streamcnn.ladder import KERNELS, check_class_weight, check_landmarks, check_probability
from streamcnn.layers import ConvLayer, layer_to_dict
from streamcnn.nystroem import LANDMARKS
from streamcnn.pcaplan import SOLVERS as PCA_SOLVERS
from streamcnn.preprocess import resolve_preprocess

FEATURE_DTYPES = ("float16", "float32")

PRESETS: dict[str, dict[str, Any]] = {
    # One layer and PCA are two passes over the data. Both signs of a response carry information, and keeping them apart lets a linear
    # classifier follow edges of either polarity. docs/presets.md: what filters made of the data give.
    "fast": {
        "layers": (
            ConvLayer(
                *(48, "auto"), filters="patches", patch_norm="auto", brightness=True, activation="split", threshold=0.5, pool_grid="auto"
            ),
        ),
        "preprocess": (),
        "n_components": "auto",
        "pca_solver": "auto",
        "kernel": "auto",
        "C": "auto",
        "gamma": "auto",
    },
    # The logarithm turns illumination into an offset, smoothing averages the noise that it raises in the dark, local contrast removes
    # the offset and, run twice, what shadow edges leave around them. docs/presets.md: what each choice was measured on and gives.
    "faces": {
        "layers": (ConvLayer(12, 5, activation="split", threshold=1.0, pool="mean", pool_size="fine"),),
        "preprocess": ("log", "smooth", "local_contrast", "local_contrast"),
        "n_components": "auto",
        "pca_solver": "auto",
        "kernel": "linear",
        "C": 0.3,
        "gamma": "auto",
    },
    # Coates & Ng 2011 (Encoding Versus Training): whitened patches, both signs above a threshold, quadrants; the sizes are what
    # 2 GiB allow. docs/presets.md: what each choice gives.
    "patches": {
        "layers": (
            ConvLayer(
                *(2000, "auto"), filters="patches", patch_norm="auto", whitening=1.0, activation="split", threshold=0.5, pool_grid=(2, 2)
            ),
        ),
        "preprocess": (),
        "mirror": True,
        "n_components": None,
        "pca_solver": "auto",
        "kernel": "linear",
        "C": 300.0,
        "gamma": "auto",
    },
    # Lee & Lee 2017, section 4. The paper gives two convolution and sub-sampling layers, filters of at most 10 % similarity,
    # PCA and a non-linear SVM; sizes, preprocessing and SVM parameters it leaves open are chosen as docs/paper.md explains.
    "lee2017": {
        "layers": (
            ConvLayer(16, 5, activation="clip", gain=3.0, pool="mean", pool_size=2),
            ConvLayer(32, 5, activation="clip", gain=3.0, pool="mean", pool_size=2),
        ),
        "preprocess": ("standardize",),
        "n_components": "auto",
        "pca_solver": "incremental",
        "kernel": "rbf",
        "C": 100.0,
        "gamma": 0.1,
    },
}


@dataclass(frozen=True)
class Settings:
    """Everything that reaches the model's numbers, apart from the data; `limit`-like parameters are not among them."""

    preset: str
    layers: tuple[ConvLayer, ...]
    preprocess: tuple[str, ...]
    n_components: Any
    pca_solver: str
    kernel: str
    C: Any
    gamma: Any
    class_weight: Any = None
    n_landmarks: int = LANDMARKS
    probability: bool = False
    feature_dtype: str = "float16"
    mirror: bool = False
    keep_features: Any = "auto"
    device: str = "auto"
    n_jobs: int = 1
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        if not self.mirror and not PRESETS[self.preset].get("mirror"):  # digests and stores are older than it is
            del values["mirror"]
        return values | {"layers": [layer_to_dict(layer) for layer in self.layers]}


def resolve_settings(preset: str = "fast", n_jobs: int = 1, seed: int = 0, **overrides: Any) -> Settings:
    """Preset plus explicit parameters, each checked.

    `None` and `"auto"` leave a parameter to the preset, except that `n_components=None` means no PCA.

    Raises
    ------
    ParameterError
        For an unknown preset or a value outside its rule.
    """
    if preset not in PRESETS:
        raise ParameterError(f"preset must be one of {', '.join(sorted(PRESETS))}, got {preset!r}")
    values = {"mirror": False} | PRESETS[preset]
    for name, value in overrides.items():
        explicit = value is not None and not (isinstance(value, str) and value == "auto")
        if explicit or name not in values or (name == "n_components" and value is None):
            values[name] = value
    # numpy's scalars, as a grid search gives them, are no JSON
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    values = {name: value for name, value in values.items() if value is not None or name in ("n_components", "class_weight")}
    if isinstance(values["layers"], ConvLayer):
        values["layers"] = (values["layers"],)
    if not isinstance(values["layers"], Sequence):
        raise ParameterError(f"layers must be a sequence of ConvLayer, got {values['layers']!r}")
    values["layers"] = tuple(values["layers"])
    for layer in values["layers"]:
        if not isinstance(layer, ConvLayer):
            raise ParameterError(f"layers must be a sequence of ConvLayer, got {layer!r}")
        layer.check()
    values["preprocess"] = resolve_preprocess(values.get("preprocess"))
    for name, allowed in (("pca_solver", PCA_SOLVERS), ("kernel", KERNELS), ("device", DEVICES), ("feature_dtype", FEATURE_DTYPES)):
        if name in values and values[name] not in allowed:
            raise ParameterError(f"{name} must be one of {', '.join(allowed)}, got {values[name]!r}")
    if values["mirror"] not in (True, False):
        raise ParameterError(f"mirror must be True, False or None (the preset's), got {values['mirror']!r}")
    if values.get("keep_features", "auto") not in (True, False, "auto"):
        raise ParameterError(f'keep_features must be True, False or "auto", got {values["keep_features"]!r}')
    values["C"] = _number("C", values["C"], ("auto",))
    values["gamma"] = _number("gamma", values["gamma"], ("auto", "scale"))
    values["class_weight"] = check_class_weight(values.get("class_weight"))
    check_probability(values.get("probability", False))
    check_landmarks(values.get("n_landmarks", LANDMARKS))
    k = values["n_components"]
    if k is not None and k != "auto" and (isinstance(k, bool) or not hasattr(k, "__index__") or k < 1):
        raise ParameterError(f'n_components must be a positive whole number, "auto" or None, got {k!r}')
    return Settings(preset, n_jobs=n_jobs, seed=seed, **values)


def _number(name: str, value: Any, words: tuple[str, ...]) -> Any:
    """`value`, a word or a positive float."""
    if isinstance(value, str):
        good = value in words
    else:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    if not good:
        choices = " or ".join(f'"{w}"' for w in words)
        raise ParameterError(f"{name} must be a positive number, {choices}, got {value!r}")
    return value if isinstance(value, str) else float(value)
