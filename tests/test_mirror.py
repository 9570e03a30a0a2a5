"""Rows that are the mean of an image's and its mirror image's, and the preset that uses them."""

import numpy as np
import pytest
from conv_cases import bits
from sklearn.svm import LinearSVC
from test_network import CPU, IMAGES, LAYERS, rows_of

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, load_model
from streamcnn.cli import main
from streamcnn.errors import ParameterError, StoreError
from streamcnn.kernels import get_kernels
from streamcnn.layers import resolve_layers
from streamcnn.network import Network
from streamcnn.presets import resolve_settings

FLIPPED = np.ascontiguousarray(IMAGES[:, :, ::-1])


def drawn(layers, mirror, steps=(), seed=0):
    network = Network(resolve_layers(layers, IMAGES.shape[1:]), steps, mirror=mirror)
    network.draw(IMAGES, seed, 2, CPU)
    return network


@pytest.mark.parametrize("steps", [(), ("standardize",)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rows_are_the_mean_of_both(dtype, steps):
    """Rows are half the sum of plain rows of an image and of its mirror image, and both have the same, whatever chunks they come in."""
    plain, network = drawn(LAYERS, False, steps), drawn(LAYERS, True, steps)
    images, flipped = IMAGES.astype(dtype), FLIPPED.astype(dtype)
    expected = (rows_of(plain, images) + rows_of(plain, flipped)) * np.float32(0.5)
    np.testing.assert_array_equal(bits(rows_of(network, images)), bits(expected))
    np.testing.assert_array_equal(bits(rows_of(network, flipped, chunk=7)), bits(expected))


def test_devices_agree():
    """The reference makes the same rows, to the rounding of float32 sums of 9 and 24 products."""
    network = drawn(LAYERS, True)
    expected = rows_of(network, IMAGES[:5], kernels=get_kernels("naive"))
    np.testing.assert_allclose(rows_of(network, IMAGES[:5]), expected, atol=2e-5 * np.abs(expected).max())


def test_a_linear_svm_is_that_of_all_images_and_their_mirror_images():
    """With a bank that holds each filter's mirror image: the same decisions as training on twice the images, at twice the C."""
    half = drawn([ConvLayer(3, 3, filters="random", activation="split", pool_grid=(2, 2))], False).filters[0]
    layer = ConvLayer(6, 3, filters="random", activation="split", pool_grid=(2, 2))
    networks = [drawn([layer], mirror) for mirror in (False, True)]
    for network in networks:
        network.filters = [np.concatenate([half, half[:, :, ::-1]])]
    y = np.random.default_rng(1).integers(0, 2, 40)
    plain, flipped, mirrored = rows_of(networks[0], IMAGES), rows_of(networks[0], FLIPPED), rows_of(networks[1], IMAGES)
    exact = {"dual": False, "tol": 1e-10, "max_iter": 100_000}
    twice = LinearSVC(C=0.01, **exact).fit(np.concatenate([plain, flipped]), np.tile(y, 2))
    once = LinearSVC(C=0.02, **exact).fit(mirrored, y)
    # on 10 x 8 conv maps the two halves of the grid are mirror images
    np.testing.assert_allclose(once.decision_function(mirrored), twice.decision_function(plain), atol=1e-5)
    # two rows of each image are two constraints where one row is one: without the symmetry they would differ
    assert np.abs(LinearSVC(C=0.02, **exact).fit(plain, y).decision_function(plain) - twice.decision_function(plain)).max() > 1e-3


def test_a_model_keeps_it(tmp_path):
    """Saved, loaded and resumed with it; another value is another extraction, and rows without it have the digest that they had."""
    y = np.arange(40) % 2
    make = {"layers": LAYERS, "C": 1.0, "kernel": "linear", "n_components": None, "random_state": 0, "store": tmp_path / "store"}
    first = StreamCNNClassifier(mirror=True, **make).fit(IMAGES, y)
    first.save(tmp_path / "m.h5")
    loaded = load_model(tmp_path / "m.h5")
    np.testing.assert_array_equal(
        loaded.network.transform(IMAGES, loaded.network.allocate(40, 1, CPU), CPU), rows_of(first.model_.network, FLIPPED)
    )
    with pytest.raises(StoreError, match="was made with mirror=True, not False"):
        StreamCNNClassifier(mirror=False, **make).fit(IMAGES, y, resume=True)
    assert "mirror" not in resolve_settings("fast").describe()
    assert "mirror" not in drawn(LAYERS, False).describe()


@pytest.mark.parametrize("preset", ["fast", "faces", "patches", "lee2017"])
def test_left_alone_it_is_the_presets(preset, tmp_path):
    """None in Python and no flag on the command line are the preset's own choice, a flag overrides it."""
    np.savez(tmp_path / "d.npz", X=np.zeros((20, 16, 16), np.uint8), y=np.arange(20) % 2)
    for value in (None, "auto"):
        assert resolve_settings(preset, mirror=value).mirror == (preset == "patches")
    for flag in ([], ["--mirror", "yes"], ["--mirror", "no"]):
        assert main(["plan", str(tmp_path / "d.npz"), "--preset", preset, "--memory-limit", "8GiB", *flag]) == 0


def test_a_wrong_value_is_refused():
    """Anything but True, False and None."""
    with pytest.raises(ParameterError, match="mirror must be True, False or None"):
        ConvFeatures(mirror="yes").fit(IMAGES)


def test_patches_sees_no_difference_between_left_and_right():
    """The preset at few filters: shapes in colour, half of them trained on facing left only, are known facing right."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(0, 256, (4, 4, 4, 3))
    images = rng.integers(0, 40, (200, 16, 16, 3))
    y = np.arange(200) % 4
    for i, shape in enumerate(y):
        a, b = rng.integers(0, 5, 2)
        images[i, a : a + 12, b : b + 12] += np.kron(shapes[shape], np.ones((3, 3, 1), int)) * 4 // 5
    images = np.clip(images, 0, 255).astype(np.uint8)
    layer = ConvLayer(40, 5, filters="patches", patch_norm=100.0, whitening=1.0, activation="split", threshold=0.5, pool_grid=(2, 2))
    classifier = StreamCNNClassifier(preset="patches", layers=(layer,), random_state=0).fit(images[:150], y[:150])
    assert classifier.score(images[150:], y[150:]) >= 0.95
    assert classifier.score(images[150:, :, ::-1], y[150:]) == classifier.score(images[150:], y[150:])
