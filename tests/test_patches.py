"""Filters that are whitened windows of the data: the folding, the choice of windows, the network and the fit around them."""

import json
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from conv_cases import make, run
from sklearn.datasets import load_digits

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, load_model, network, patches
from streamcnn.errors import DataError, FilterBankError, ModelError, ParameterError, StoreError
from streamcnn.images import open_images
from streamcnn.kernels import cpu, naive
from streamcnn.layers import layer_from_dict, layer_to_dict, resolve_layers
from streamcnn.network import Network
from streamcnn.patches import draw_patches
from streamcnn.presets import PRESETS
from streamcnn.stages import calibration_rows

RNG = np.random.default_rng(0)
# neighbours that resemble each other, so that there is something to whiten
IMAGES = RNG.integers(0, 100, (30, 12, 11, 2)).cumsum(axis=1).astype(np.uint8)
LAYER = ConvLayer(16, 5, filters="patches", patch_norm=10.0, activation="split", threshold=0.25, pool_grid=(2, 2))


def draw(images=IMAGES, n_filters=8, kernel=(4, 3), patch_norm=10.0, whitening=0.1, seed=3, part=7, **options):
    parts = (images[start : start + part] for start in range(0, len(images), part))
    return draw_patches(parts, len(images), (n_filters, *kernel, images.shape[3]), patch_norm, whitening, seed, **options)


def all_windows(images, kernel):
    """Every window (n, rows, cols, size), float64."""
    view = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), kernel, axis=(1, 2))
    return view.transpose(0, 1, 2, 4, 5, 3).reshape(*view.shape[:3], -1)


@pytest.mark.parametrize("patch_norm", [10.0, None])
def test_convolution_is_what_whitened_windows_say(patch_norm):
    """Each filter is one window of the data; with its bias it answers a window p as u . Z (z - mu) does, all written down in float64."""
    filters, bias, info = draw(patch_norm=patch_norm)
    if patch_norm is not None:  # brightness is nothing to them
        assert np.abs(filters.sum(axis=(1, 2, 3))).max() < 1e-12 * np.abs(filters).max()
    windows = all_windows(IMAGES, (4, 3))
    z = windows
    if patch_norm is not None:
        z = (windows - windows.mean(axis=-1, keepdims=True)) / np.sqrt(windows.var(axis=-1, keepdims=True) + patch_norm)
    rows = z.reshape(-1, 24)
    assert info == {"n_windows": len(rows)} and len(rows) == 30 * 9 * 9  # few enough that all are taken
    mu = rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))
    zca = vectors @ np.diag(1 / np.sqrt(values + 0.1)) @ vectors.T
    whitened = (z - mu) @ zca
    unit = (whitened / np.sqrt((whitened**2).sum(axis=-1, keepdims=True))).reshape(-1, 24)
    # which window is it? the one whose direction, folded, is the filter
    folded = unit @ zca
    if patch_norm is not None:
        folded = folded - folded.mean(axis=1, keepdims=True)
    distance = np.abs(folded[:, None] - filters.reshape(8, 24)).max(axis=2)
    # condition of the covariance and of sums of 24 and 2,430 terms in float64: below 1e-9
    assert (distance.min(axis=0) < 1e-9 * np.abs(folded).max()).all()
    chosen = distance.argmin(axis=0)
    assert len(set(chosen)) == 8
    expected = whitened[:3] @ unit[chosen].T
    layer = {"activation": "split", "patch_norm": patch_norm}
    out = run(naive, IMAGES[:3], filters.astype(np.float32), bias.astype(np.float32), **layer)
    # filters, bias and result rounded to float32: 24 products of pixels below 256, or of them over their deviation
    bound = 2.0**-23 * (np.abs(windows[:3]) @ np.abs(filters.reshape(8, 24)).T + np.abs(bias))
    if patch_norm is not None:
        bound /= np.minimum(1, np.sqrt(windows[:3].var(axis=-1, keepdims=True) + patch_norm))
    assert (np.abs(out[..., :8] - out[..., 8:] - expected) <= bound).all()
    assert np.abs(expected).max() > 1e3 * np.median(bound)


def test_the_filter_of_brightness():
    """It comes last: a window's mean over its deviation, of mean 0 and of the others' size over all windows; only with `patch_norm`."""
    filters, bias, _ = draw(brightness=True)
    for a, b in zip(draw(n_filters=7), (filters[:-1], bias[:-1])):
        assert np.array_equal(a, b)
    windows = all_windows(IMAGES, (4, 3)).reshape(-1, 24)
    deviation = np.sqrt(windows.var(axis=1) + 10)
    b = windows.mean(axis=1) / deviation
    responses = windows @ filters.reshape(8, 24).T / deviation[:, None] + bias
    size = np.sqrt(np.square(responses[:, :-1]).mean())
    # float64 sums of 2,430 terms
    np.testing.assert_allclose(responses[:, -1], size * (b - b.mean()) / b.std(), rtol=0, atol=1e-9)
    for a, b in zip(draw(patch_norm=None)[:2], draw(patch_norm=None, brightness=True)[:2]):
        assert np.array_equal(a, b)
    alone = draw(n_filters=1, brightness=True)
    assert alone[0].shape == (1, 4, 3, 2) and np.ptp(alone[0]) == 0 and alone[1] < 0
    images = np.zeros((5, 6, 6, 1), np.uint8)
    images[:, 2, 3] = 200
    with pytest.raises(FilterBankError, match=r"at most the 9 different .* of 80 and one for brightness, got 11: choose fewer"):
        draw(images, 11, (3, 3), brightness=True)


def test_all_windows_equally_bright_make_no_noise_of_it():
    """Where brightness does not vary its filter answers nothing, instead of rounding."""
    image = np.tile(RNG.permutation(9).reshape(3, 3), (4, 4)).astype(np.uint8)[None, :, :, None]  # each window has all nine values
    for values in (image, image * np.float32(0.1), (image - np.float32(4)) * np.float32(0.1) + np.float32(1e-8)):
        filters, bias, _ = draw(values, 5, (3, 3), patch_norm=0.1, brightness=True)
        assert filters[:-1].any() and not filters[-1].any() and bias[-1] == 0


def test_little_regularisation_whitens():
    """With hardly anything added to the eigenvalues the responses to unit directions have the covariance of the directions."""
    filters, bias, _ = draw(whitening=1e-9, patch_norm=None)
    responses = all_windows(IMAGES, (4, 3)).reshape(-1, 24) @ filters.reshape(8, 24).T + bias
    np.testing.assert_allclose(responses.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(responses.var(axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("part", [1, 5, 30])
def test_parts_and_seeds(part, monkeypatch):
    """How the images arrive changes no bit, of windows drawn at random too; the seed changes the filters."""
    for n_windows, drawn_from in ((100_000, 30 * 9 * 9), (200, 30 * 7)):
        monkeypatch.setattr(patches, "N_WINDOWS", n_windows)
        expected, found, other = draw(brightness=True), draw(part=part, brightness=True), draw(seed=4, brightness=True)
        assert expected[2]["n_windows"] == drawn_from
        for a, b, c in zip(expected[:2], found[:2], other[:2]):
            assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_blocks_of_windows_beyond_the_first_count(monkeypatch):
    """Sums over many blocks, the last one not full, are those over a single one, to their rounding."""
    expected = draw(whitening=1.0)
    monkeypatch.setattr(patches, "_BLOCK", 64)
    for a, b in zip(expected[:2], draw(whitening=1.0)[:2]):
        # sums of 2,430 terms in another order
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_filters_are_different_windows_that_are_not_constant():
    """As many filters as there are different windows with contrast, and not one more."""
    images = np.zeros((5, 6, 6, 1), np.uint8)
    images[:, 2, 3] = 200  # in nine different places of a window of 3 x 3, or in none
    images[4, 5, 0] = 1  # too faint for a normalisation by 10: variance 8 / 81
    filters, bias, _ = draw(images, 9, (3, 3))
    assert np.isfinite(filters).all() and np.isfinite(bias).all()
    assert len(np.unique(filters.round(9), axis=0)) == 9
    with pytest.raises(FilterBankError, match=r"n_filters must be at most the 9 different windows of 3 x 3 .* of 80, got 10: choose fewer"):
        draw(images, 10, (3, 3))
    # without normalisation any contrast will do
    assert draw(images, 10, (3, 3), patch_norm=None)[0].shape == (10, 3, 3, 1)
    with pytest.raises(FilterBankError, match="at most the 10 different"):
        draw(images, 11, (3, 3), patch_norm=None)


def test_pixels_too_small_for_the_norm_are_told_so():
    """Floats from 0 to 1 are all too faint for a norm made for bytes: the error says so, and what to do."""
    small = (RNG.integers(0, 256, (5, 6, 6, 1)) / 255).astype(np.float32)
    with pytest.raises(FilterBankError, match="with patch_norm=100 variances up to 1 are none: lower it, or scale small pixels up"):
        draw(small, 3, (3, 3), patch_norm=100.0)
    with pytest.raises(FilterBankError, match=r"or give more images$"):
        draw(0 * small, 3, (3, 3), patch_norm=None)


def test_every_image_gives_windows_of_other_places(monkeypatch):
    """Of 30 equal images, one window each, come many different ones."""
    monkeypatch.setattr(patches, "N_WINDOWS", 30)
    filters, _, info = draw(np.repeat(IMAGES[:1], 30, axis=0), 15)
    assert info["n_windows"] == 30 and len(np.unique(filters.round(9), axis=0)) == 15


def test_drawing_holds_what_is_declared():
    """Few wide windows, many filters and large square matrices: the peak of Python's and numpy's allocations is within `patch_bytes`."""
    images = RNG.integers(0, 256, (40, 20, 20, 8)).astype(np.float32)
    for n_filters, kernel in ((2000, (3, 3)), (5, (8, 8)), (3, (1, 1))):
        tracemalloc.start()
        draw(images, n_filters, kernel, brightness=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # and what hashes of windows, objects and views take
        assert peak <= patches.patch_bytes((n_filters, *kernel, 8)) + (1 << 20)


# --- the network -----------------------------------------------------------------------------------------------------------------


def drawn(layers, images=IMAGES, seed=0, n_threads=2, steps=()):
    made = Network(resolve_layers(layers, images.shape[1:]), steps)
    made.draw(images, seed, n_threads, cpu)
    return made


def rows_of(made, images):
    return made.transform(images, made.allocate(len(images), 2, cpu), cpu).copy()


STACKED = [ConvLayer(4, 3, filters="random"), ConvLayer(6, 3, filters="patches", patch_norm=0.01, whitening=0.3)]


def test_threads_and_chunks_do_not_reach_the_filters(monkeypatch):
    """Patches of maps, and what is drawn above them, have the same bits for any number of threads, and the same windows for any chunk."""
    layers = [*STACKED, ConvLayer(3, 1, filters="random", patch_norm=1.0)]

    def arrays(n_threads):
        made = drawn(layers, n_threads=n_threads, steps=("standardize",))
        assert made.info[1]["n_windows"] == 30 * 3 * 2
        return made.filters + made.biases

    expected = arrays(2)
    assert [array.any() for array in expected] == [True, True, True, False, True, False]
    for a, b in zip(expected, arrays(1)):
        assert np.array_equal(a, b)
    monkeypatch.setattr(network, "DRAW_CHUNK", 7)
    # the scale is a mean of sums of other images: the last bits of float64, so perhaps of float32
    for a, b in zip(expected, arrays(2)):
        np.testing.assert_allclose(a, b, rtol=2.0**-22, atol=0)


def test_mean_response_is_the_gain():
    """Bias and normalisation included; with more images than `SCALE_IMAGES` over every so many of them."""
    layer = ConvLayer(8, 3, filters="patches", patch_norm=10.0, gain=2.0, activation="abs", pool_grid=(1, 1))
    assert rows_of(drawn([layer]), IMAGES).mean() == pytest.approx(2, rel=1e-5)
    many = np.resize(IMAGES, (600, 12, 11, 2))
    assert rows_of(drawn([layer], many), many[::3]).mean() == pytest.approx(2, rel=1e-5)


def test_large_images_with_many_filters_are_scaled_on_fewer(monkeypatch):
    """No more images than take half a minute, but `DRAW_CHUNK`; the mean response on these is the gain."""
    layer = ConvLayer(8, 3, filters="patches", patch_norm=10.0, activation="abs", pool_grid=(1, 1))
    many = np.resize(IMAGES, (600, 12, 11, 2))
    work = 8 * 3 * 3 * 2 * 10 * 9  # filters, windows, places
    for images, step in ((100, 6), (1, 38)):
        monkeypatch.setattr(network, "_SCALE_WORK", images * work)
        made = drawn([layer], many)
        assert made.multiply_adds == work
        assert rows_of(made, many[::step]).mean() == pytest.approx(1, rel=1e-5)


def test_bias_is_saved_for_patches_alone():
    """A network with patches is rebuilt from JSON and arrays; a missing, a wrong and a superfluous bias are refused."""
    layers = [STACKED[0], STACKED[1]]
    made = drawn(layers)
    arrays, description = made.to_arrays(), json.loads(json.dumps(made.describe()))
    assert list(arrays) == ["filters_1", "filters_2", "bias_2"]
    again = Network.from_arrays(description, arrays)
    assert np.array_equal(rows_of(again, IMAGES), rows_of(made, IMAGES))
    without = {name: array for name, array in arrays.items() if name != "bias_2"}
    for wrong in (without, arrays | {"bias_2": arrays["bias_2"][:-1]}, arrays | {"bias_1": np.zeros(4, np.float32)}):
        with pytest.raises(DataError, match="train it again"):
            Network.from_arrays(description, wrong)


def test_whitening_is_described_for_patches_alone():
    """Layers without patches have the JSON, and so the digests, that they had before there was `whitening`; JSON without it is read."""
    plain = layer_to_dict(ConvLayer(4, 3))
    assert layer_from_dict(plain) == ConvLayer(4, 3)
    assert list(plain) == [field.name for field in fields(ConvLayer) if field.name not in ("whitening", "brightness")]
    described = layer_to_dict(STACKED[1])
    assert described["whitening"] == 0.3 and "brightness" not in described
    assert layer_from_dict(json.loads(json.dumps(described))) == STACKED[1]
    bright = replace(STACKED[1], brightness=True)
    assert layer_to_dict(bright)["brightness"] is True and layer_from_dict(layer_to_dict(bright)) == bright
    with pytest.raises(ParameterError, match="brightness must be True or False, got 1"):
        ConvLayer(4, 3, brightness=1).check()


def test_patches_are_drawn_from_more_images():
    """Up to 4,096 images and 16 MiB for patches, 256 as ever for others."""
    source = open_images(np.zeros((5000, 8, 8, 1), np.uint8))
    for layers, expected in (([ConvLayer(4, 3)], 256), ([ConvLayer(4, 3), LAYER], 4096)):
        made = Network(resolve_layers([layer if layer is not LAYER else STACKED[1] for layer in layers], (8, 8, 1)), ())
        assert calibration_rows(source, made) == expected
    large = open_images(np.zeros((5000, 128, 128, 1), np.uint8))
    assert calibration_rows(large, Network(resolve_layers([LAYER], (128, 128, 1)), ())) == 1024


def test_errors_name_the_layer():
    """Too few windows for the second layer."""
    layer = ConvLayer(1000, 3, filters="patches", patch_norm=0.01)
    with pytest.raises(FilterBankError, match="layer 2: n_filters must be at most the"):
        drawn([STACKED[0], layer])


def test_of_automatic_size_few_windows_are_joined_by_random_filters():
    """Where a layer of automatic size finds fewer windows than filters, all are among the filters and random ones follow; it is said."""
    images = np.zeros((5, 6, 6, 1), np.uint8)
    images[:, 2, 3] = 200  # 4 windows of 5 x 5, all with it
    layer = replace(LAYER, kernel_size="auto", n_filters=7)
    with pytest.warns(UserWarning, match="layer 1: images have 4 different windows of 5 x 5 .* the other 3 are drawn at random"):
        made = drawn([layer], images)
    alone = drawn([replace(layer, n_filters=4)], images)
    ratio = made.filters[0][:4] / alone.filters[0]
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)  # all filters have one scale
    assert len(np.unique(made.filters[0].round(6), axis=0)) == 7
    assert made.biases[0][:4].any() and not made.biases[0][4:].any()
    with pytest.warns(UserWarning, match="have 0 different windows .* of them: all are drawn at random"):
        assert np.isfinite(rows_of(drawn([layer], 0 * images), images)).all()


def test_images_without_contrast_keep_their_brightness():
    """Where no window has contrast nothing is normalised: rounding is not blown up, and other greys have other features."""
    images = np.repeat(np.array([10, 200, 10], np.uint8), 64).reshape(3, 8, 8, 1)
    with pytest.warns(UserWarning, match="have 0 different windows"):
        made = drawn([replace(LAYER, kernel_size="auto", patch_norm="auto")], images)
    assert made.geometry[0].layer.patch_norm is None and made.info[0]["n_random"] == 16
    rows = rows_of(made, images)
    assert np.array_equal(rows[0], rows[2]) and np.abs(rows[0] - rows[1]).max() > 1
    reference = made.transform(images, made.allocate(3, 1, naive), naive)
    np.testing.assert_allclose(rows, reference, rtol=0, atol=1e-4)


def test_equal_images_leave_no_windows():
    """A window that is the mean of all windows has no direction: it makes no filter, and no NaN."""
    images = np.repeat(RNG.integers(0, 256, (1, 3, 3, 1), dtype=np.uint8), 4, axis=0)
    assert len(draw_patches([images], 4, (5, 3, 3, 1), 10.0, 0.1, 0, fewer=True)[0]) == 0
    with pytest.raises(FilterBankError, match="at most the 0 different windows"):
        draw_patches([images], 4, (1, 3, 3, 1), 10.0, 0.1, 0)


def test_a_few_images_in_another_unit_do_not_blind_the_others():
    """The mean variance of windows hardly moves when one image in twenty is a thousand times as large; without any contrast it is zero."""
    images = RNG.normal(size=(40, 12, 12, 1)).astype(np.float32)
    odd = images.copy()
    odd[:2] *= 1000
    usual, mixed = (patches.mean_variance([maps], 40, (5, 5), 0) for maps in (images, odd))
    assert 0.9 < usual < 1.1 and usual < mixed < 10 * usual
    assert patches.mean_variance([np.full((4, 8, 8, 1), 0.1, np.float32)], 4, (5, 5), 0) == 0


def test_rows_of_numbers_keep_their_brightness():
    """Images of a single row are not normalised for contrast by "auto": two that differ by a constant have other features."""
    images = RNG.normal(size=(60, 1, 12, 1)).astype(np.float32)
    made = drawn([replace(LAYER, kernel_size="auto", patch_norm="auto", pool_grid="auto", n_filters=6)], images)
    assert made.geometry[0].layer.patch_norm is None
    assert np.abs(rows_of(made, images) - rows_of(made, images + np.float32(3))).max() > 0.1
    # in any unit
    other = drawn([replace(LAYER, kernel_size="auto", patch_norm="auto", pool_grid="auto", n_filters=6)], images * np.float32(1024))
    np.testing.assert_allclose(rows_of(made, images), rows_of(other, images * np.float32(1024)), rtol=0, atol=1e-4)


# --- the fit ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Images of 8 x 8 bytes and their labels."""
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * 15).astype(np.uint8), labels


def test_fit_with_patches_is_kept_resumed_and_saved(digits, tmp_path):
    """A fit into a store recognises digits, resumes to the same model, refuses other patches, and predicts the same from its file."""
    images, labels = digits
    options = {"layers": (LAYER,), "random_state": 0, "store": tmp_path / "store", "kernel": "linear", "C": 1.0}
    first = StreamCNNClassifier(**options).fit(images[:1000], labels[:1000])
    assert first.score(images[1000:], labels[1000:]) > 0.93
    again = StreamCNNClassifier(**options).fit(images[:1000], labels[:1000], resume=True)
    expected = first.decision_function(images[1000:])
    assert np.array_equal(again.decision_function(images[1000:]), expected)
    first.save(tmp_path / "m.h5")
    assert load_model(tmp_path / "m.h5").network.biases[0].any()
    loaded = np.concatenate([d for _, d in load_model(tmp_path / "m.h5").decisions(open_images(images[1000:]), device="cpu")])
    assert np.array_equal(loaded, expected)
    other = ConvLayer(**{**layer_to_dict(LAYER), "whitening": 0.2})
    with pytest.raises(StoreError, match="was made with layers="):
        StreamCNNClassifier(**(options | {"layers": (other,)})).fit(images[:1000], labels[:1000], resume=True)
    model = load_model(tmp_path / "m.h5")
    model.network.biases[0][3] = np.nan
    model.save(tmp_path / "bad.h5")
    with pytest.raises(ModelError, match="no finite numbers"):
        load_model(tmp_path / "bad.h5")


def test_the_default_tells_classes_apart_that_differ_in_brightness_alone():
    """Noise that is a little brighter in one class; filters of normalised windows alone cannot see it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    images = (rng.integers(0, 200, (600, 16, 16)) + 50 * labels[:, None, None]).astype(np.uint8)
    layer = PRESETS["fast"]["layers"][0]
    found = {}
    for brightness in (True, False):
        classifier = StreamCNNClassifier(layers=[replace(layer, brightness=brightness)], random_state=0)
        found[brightness] = classifier.fit(images[:300], labels[:300]).score(images[300:], labels[300:])
    assert layer.brightness and found[True] > 0.98 and found[False] < 0.7


def test_limits_change_no_bit(digits):
    """Features under a small limit, one image after the other, on one thread, are those without."""
    images, _ = digits
    features = [ConvFeatures([LAYER], memory_limit=limit, n_jobs=n, random_state=0) for limit, n in (("4GiB", 2), ("1GiB", 1))]
    first, second = (f.fit(images[:700]).transform(images[700:800]) for f in features)
    assert first.any() and np.array_equal(first, second)


def test_naive_and_cpu_have_the_same_features(digits):
    """The reference with the filters of the CPU: within float32 rounding of responses of order one, then pooled."""
    images, _ = digits
    made = drawn([LAYER], images[:64, :, :, None])
    few = images[:4, :, :, None]
    slow = made.transform(few, made.allocate(4, 2, naive), naive)
    np.testing.assert_allclose(rows_of(made, few), slow, rtol=0, atol=1e-5)


def test_contrast_normalisation_serves_random_filters():
    """Random filters with `patch_norm` answer an image of half the contrast, and another brightness, hardly any differently."""
    images = make(20, (12, 12, 1), 1, (1, 1))[0]
    made = drawn([ConvLayer(5, 5, filters="random", patch_norm=1e-3, pool_grid=(2, 2))], images)
    # the filters have sum zero
    np.testing.assert_allclose(rows_of(made, images), rows_of(made, images // 2 + 60), rtol=0, atol=0.05)


@pytest.mark.parametrize("factor", [1, 255, 1e-3])
def test_automatic_norm_follows_the_range_of_the_pixels(factor):
    """ "auto" is a tenth of the mean variance of windows, a number in what is saved; rows stay the same for pixels times any factor."""
    images = np.random.default_rng(0).uniform(0, 1, (12, 9, 8, 1)).astype(np.float32)
    layer = replace(LAYER, patch_norm="auto", n_filters=6)
    plain, times = (Network(resolve_layers([layer], (9, 8, 1)), ()) for _ in range(2))
    scaled = images * np.float32(factor)
    plain.draw(images, 0, 1, cpu)
    times.draw(scaled, 0, 1, cpu)
    variances = all_windows(scaled, (5, 5)).var(axis=-1)
    found = times.describe()["layers"][0]["patch_norm"]
    # all windows of so few images are in the sample
    np.testing.assert_allclose(found, 0.1 * variances.mean(), rtol=1e-9)
    rows = [n.transform(x, n.allocate(12, 1, cpu), cpu).copy() for n, x in ((plain, images), (times, scaled))]
    with pytest.raises(DataError, match='patch_norm of a saved network must be a number or None, got "auto"'):
        Network.from_arrays(plain.describe() | {"layers": [layer_to_dict(layer)]}, plain.to_arrays())
    # products with a factor are rounded once more, and windows of the same priority chosen alike
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-4)
