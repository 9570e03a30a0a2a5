"""What the filters of the preset `fast` give and do not: the rivals it was chosen against, on kinds of images that have nothing in common.

STREAMCNN_DATA=... python tools/bench.py defaults    five minutes; without the variable no photos and no faces

Each set is split at random into training and test images, twice. Of CIFAR-10 its training images alone are read.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from streamcnn import ConvLayer, StreamCNNClassifier, open_images
from streamcnn.datasets import extended_yale_b, load_digits_images
from streamcnn.presets import PRESETS
from streamcnn.selection import stratified_sample

SEEDS = (0, 1)
_LAYER: ConvLayer = PRESETS["fast"]["layers"][0]
RIVALS = {
    "`fast`": _LAYER,
    "without its filter of brightness": replace(_LAYER, brightness=False),
    "windows as they are, not normalised": replace(_LAYER, brightness=False, patch_norm=None, whitening=1.0),
    "24 random filters, 10 % rule, 7 x 7 cells": ConvLayer(24, activation="split"),
}
Set = tuple[np.ndarray, np.ndarray, int]
"""Images, labels, and how many of them to train on."""


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def digits() -> Set:
    """scikit-learn's digits of 8 x 8 pixels."""
    return *load_digits_images(8), 1000


def moved_digits() -> Set:
    """Digits of 16 x 16 pixels anywhere on 28 x 28."""
    (images, labels), rng, n = load_digits_images(16), np.random.default_rng(3), 3000
    rows, out = rng.integers(0, len(images), n), np.zeros((n, 28, 28, 1), np.uint8)
    for place, row in zip(out, rows):
        top, left = rng.integers(0, 13, 2)
        place[top : top + 16, left : left + 16] = images[row]
    return out, labels[rows], 1500


def textures() -> Set:
    """Blurred noise in four directions and two widths, in any light."""
    rng, n = np.random.default_rng(0), 1200
    labels, out = np.arange(n) % 8, np.empty((n, 32, 32, 1))
    for image, label in zip(out, labels):
        noise = ndimage.gaussian_filter(rng.normal(size=(48, 48)), ((0.6, 2.5), (1.0, 4.0))[label // 4])
        grain = ndimage.rotate(noise, 45 * (label % 4) + 5 * rng.normal(), reshape=False, mode="grid-wrap")[8:40, 8:40]
        light, contrast = rng.uniform(70, 180), rng.uniform(8, 45)
        image[:, :, 0] = light + contrast * (grain - grain.mean()) / grain.std() + 6 * rng.normal(size=grain.shape)
    return _bytes(out), labels, 600


def brighter_noise() -> Set:
    """Noise of deviation 30, in each of four classes brighter by 8."""
    rng, n = np.random.default_rng(1), 1200
    labels = rng.integers(0, 4, n)
    return _bytes(110 + 8 * labels[:, None, None, None] + 30 * rng.normal(size=(n, 28, 28, 1))), labels, 600


def greys() -> Set:
    """Plain areas of five greys, 40 apart, with deviations of 8 from image to image and 2 from pixel to pixel."""
    rng, n = np.random.default_rng(2), 1000
    labels = rng.integers(0, 5, n)
    levels = 40 + 40 * labels + 8 * rng.normal(size=n)
    return _bytes(levels[:, None, None, None] + 2 * rng.normal(size=(n, 28, 28, 1))), labels, 500


def photos(folder: Path) -> Set:
    """5,000 training images of CIFAR-10."""
    source = open_images(folder / "cifar10" / "train")
    assert source.labels is not None
    rows, _ = stratified_sample(source.labels, 10, 0, 5000)
    out = np.empty((len(rows), *source.image_shape), np.uint8)
    for place, row in zip(out, rows):
        source.read(int(row), int(row) + 1, place[None])
    return out, source.labels[rows], 3000


def faces(folder: Path) -> Set:
    """All of Extended Yale B, light from anywhere."""
    images, labels = [], []
    for source in extended_yale_b(folder / "CroppedYale").values():
        images.append(np.empty((source.n_samples, *source.image_shape), np.uint8))
        source.read(0, source.n_samples, images[-1])
        labels.append(np.asarray(source.labels))
    return np.concatenate(images), np.concatenate(labels), 800


def sets() -> Iterator[tuple[str, Callable[[], Set]]]:
    """What there are data for."""
    yield from (("digits", digits), ("digits moved about", moved_digits), ("textures", textures))
    yield from (("brighter noise", brighter_noise), ("plain greys", greys))
    if folder := os.environ.get("STREAMCNN_DATA"):
        yield "photos (CIFAR-10)", lambda: photos(Path(folder))
        yield "faces, any light", lambda: faces(Path(folder))


def accuracy(layer: ConvLayer, images: np.ndarray, labels: np.ndarray, n_train: int) -> float:
    """Of the preset with this layer, in percent: mean over the splits."""
    found = []
    for seed in SEEDS:
        rows = np.random.default_rng(seed).permutation(len(images))
        train, test = rows[:n_train], rows[n_train:]
        classifier = StreamCNNClassifier(layers=[layer], random_state=seed).fit(images[train], labels[train])
        found.append(100 * classifier.score(images[test], labels[test]))
    return float(np.mean(found))


def table() -> str:
    """A line for each set, a column for each rival."""
    lines = [f"| accuracy on held-out images, % | {' | '.join(RIVALS)} |", "|---" * (1 + len(RIVALS)) + "|"]
    for name, make in sets():
        images, labels, n_train = make()
        cells = (f"{accuracy(layer, images, labels, n_train):.1f}" for layer in RIVALS.values())
        lines.append(f"| {name}, {n_train:,} to train on | {' | '.join(cells)} |")
    return "\n".join(lines)
