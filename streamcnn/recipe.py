"""The command and the Python code that repeat a fit, from what its store says: parameters, data, and how they were opened."""

import shlex
from dataclasses import fields
from typing import Any

from streamcnn.layers import ConvLayer, layer_from_dict
from streamcnn.presets import PRESETS, Settings

# parameter -> flag of the command line
_FLAGS = {"n_components": "--n-components", "pca_solver": "--pca-solver", "kernel": "--kernel", "n_landmarks": "--n-landmarks"}
_FLAGS |= {"C": "--C", "gamma": "--gamma", "class_weight": "--class-weight", "feature_dtype": "--feature-dtype"}
_FLAGS |= {"mirror": "--mirror", "keep_features": "--keep-features", "device": "--device", "n_jobs": "--threads", "seed": "--seed"}
# on these the bits depend, whatever their defaults are on another machine
_ALWAYS = ("device", "n_jobs", "seed")
_ONLY_PYTHON = ("layers", "preprocess")


def changed(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a store's configuration that are not what its preset gives, layers as `ConvLayer`; device, threads, seed always.

    Raises
    ------
    KeyError, TypeError, ValueError
        When they are of no store.
    """
    parameters = config["parameters"]
    usual = {f.name: f.default for f in fields(Settings) if f.name not in _ALWAYS} | PRESETS[parameters["preset"]]
    values = {name: value for name, value in parameters.items() if name != "preset"}
    values["layers"] = tuple(layer_from_dict(layer) for layer in values["layers"])
    values["preprocess"] = tuple(values["preprocess"])
    if isinstance(values["class_weight"], dict):  # JSON has made texts of labels that are numbers
        labels = {str(label): label for label in config["classes"]}
        values["class_weight"] = {labels[text]: weight for text, weight in values["class_weight"].items() if text in labels}
    return {name: value for name, value in values.items() if name not in usual or value != usual[name]}


def command_line(config: dict[str, Any], opened_with: dict[str, Any], limit: str | None) -> tuple[str | None, str]:
    """The command of a fit, and why it is none or not the whole.

    Parameters
    ----------
    config : dict
        `FeatureStore.config`.
    opened_with : dict
        `ImageSource.opened_with`.
    limit : str or None
        Memory limit, for people: it changes no bit.

    Returns
    -------
    command, note : str or None, str
    """
    different, path = changed(config), config.get("source", {}).get("path")
    if path is None:
        return None, "The images were given as arrays, which the command line has no name for."
    if missing := [name for name in _ONLY_PYTHON if name in different] + [name for name in ("labels", "rows") if name in opened_with]:
        return None, f"The command line has no flag for {' and '.join(missing)}: use Python."
    if isinstance(different.get("class_weight"), dict):
        return None, "The command line has no flag for the weight of single classes: use Python."
    words = ["streamcnn", "fit", path, "--model", "model.h5", "--preset", config["parameters"]["preset"]]
    for name, value in different.items():
        if name in _FLAGS and value != "auto":
            words += [_FLAGS[name], _word(name, value)]
    if different.get("probability"):
        words.append("--probability")
    if "image_shape" in opened_with:
        words += ["--image-size", "x".join(map(str, opened_with["image_shape"]))]
    for key in ("images_key", "labels_key"):
        if key in opened_with:
            words += ["--" + key.replace("_", "-"), str(opened_with[key])]
    if opened_with.get("on_error") == "skip":
        words.append("--skip-bad")
    return shlex.join(words + ([] if limit is None else ["--memory-limit", limit])), ""


def _word(name: str, value: Any) -> str:
    if name in ("keep_features", "mirror"):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def python_code(config: dict[str, Any], opened_with: dict[str, Any], limit: str | None) -> str:
    """The same in Python. Arguments as `command_line`."""
    arguments: dict[str, str] = {"preset": repr(config["parameters"]["preset"])}
    for name, value in changed(config).items():
        name = "random_state" if name == "seed" else name
        layers = "".join(f"        {_layer_code(layer)},\n" for layer in value) if name == "layers" else ""
        arguments[name] = f"[\n{layers}    ]" if name == "layers" else repr(value)
    if limit is not None:
        arguments["memory_limit"] = repr(limit)
    path, options = config.get("source", {}).get("path"), dict(opened_with)
    part, given_labels = options.pop("rows", False), options.pop("labels", False)
    lines = ["from streamcnn import " + ", ".join(["ConvLayer"] * ("layers" in arguments) + ["StreamCNNClassifier", "open_images"])]
    given = "images" if path is None else repr(path)
    labels = ", labels" if path is None or given_labels else ""
    if labels:
        names = "images, labels" if path is None else "labels"
        lines.append(f"{names} = ...  # as they were given")
    lines.append(f"source = open_images({given}{labels}{''.join(f', {name}={_code(value)}' for name, value in options.items())})")
    if part:
        lines[:1] += ["from streamcnn.subset import SubsetSource"]
        lines.append("source = SubsetSource(source, rows)  # as they were given")
    lines.append("classifier = StreamCNNClassifier(")
    lines += [f"    {name}={value}," for name, value in arguments.items()]
    return "\n".join([*lines, ")", "classifier.fit(source)", 'classifier.save("model.h5")'])


def _code(value: Any) -> str:
    # JSON has made lists of tuples
    return repr(tuple(value) if isinstance(value, list) else value)


def _layer_code(layer: ConvLayer) -> str:
    values = [(f, getattr(layer, f.name)) for f in fields(layer)]
    return f"ConvLayer({', '.join(f'{f.name}={value!r}' for f, value in values if value != f.default)})"


__all__ = ["changed", "command_line", "python_code"]
