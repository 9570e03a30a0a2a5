"""Layers: shape arithmetic, filters as finally used, chunks to rows."""

import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conv_cases import TILES, bits, run
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcnn import features
from streamcnn.errors import DataError, FilterBankError, ParameterError
from streamcnn.filters import filter_similarity
from streamcnn.images import open_images
from streamcnn.kernels import ACTIVATIONS, POOLS, get_kernels
from streamcnn.layers import ConvLayer, layer_from_dict, resolve_layer, resolve_layers
from streamcnn.network import Network, round_features

CPU = get_kernels("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 12, 10, 1), dtype=np.uint8)
LAYERS = [
    ConvLayer(6, 3, filters="random", activation="split", pool_size=2),
    ConvLayer(4, 2, filters="random", activation="abs", pool="max"),
]


def drawn(layers=LAYERS, steps=(), images=IMAGES, seed=0, kernels=CPU):
    network = Network(resolve_layers(layers, images.shape[1:]), steps)
    network.draw(images, seed, 2, kernels)
    return network


def rows_of(network, images, chunk=16, threads=2, kernels=CPU):
    buffers = network.allocate(chunk, threads, kernels)
    return np.concatenate([network.transform(images[s : s + chunk], buffers, kernels).copy() for s in range(0, len(images), chunk)])


@pytest.mark.parametrize(
    ("layer", "in_shape", "kernel", "rows", "cols", "out_shape"),
    [
        (ConvLayer(8), (32, 32, 3), (5, 5), range(0, 29, 4), range(0, 29, 4), (7, 7, 8)),
        (ConvLayer(8, activation="split"), (64, 64, 1), (7, 7), range(0, 55, 9), range(0, 55, 9), (6, 6, 16)),
        (ConvLayer(8), (1, 10, 1), (1, 5), [0, 1], range(7), (1, 6, 8)),
        (ConvLayer(8), (1, 1, 1), (1, 1), [0, 1], [0, 1], (1, 1, 8)),
        (ConvLayer(8, 3, stride=2, padding=1, pool=None), (7, 5, 2), (3, 3), range(5), range(4), (4, 3, 8)),
        (ConvLayer(8, 5, pool_size=2), (96, 84, 1), (5, 5), range(0, 93, 2), range(0, 81, 2), (46, 40, 8)),
        (ConvLayer(8, (2, 3), pool_size=3), (9, 9, 1), (2, 3), [0, 3, 6], [0, 3, 6], (2, 2, 8)),
        (ConvLayer(8, 3, pool_grid=(2, 3)), (9, 10, 1), (3, 3), [0, 3, 7], [0, 2, 5, 8], (2, 3, 8)),
        (ConvLayer(8, pool_grid="auto"), (32, 32, 3), (5, 5), [0, 5, 11, 16, 22, 28], [0, 5, 11, 16, 22, 28], (5, 5, 8)),
        (ConvLayer(8, filters="patches", pool=None), (9, 9, 30), (3, 3), range(8), range(8), (7, 7, 8)),
        (ConvLayer(8, filters="patches", pool=None), (4, 4, 600), (1, 1), range(5), range(5), (4, 4, 8)),
        (ConvLayer(8, pool_grid="auto"), (7, 20, 1), (5, 5), range(4), [0, 3, 6, 9, 12, 16], (3, 5, 8)),
    ],
)
def test_sizes(layer, in_shape, kernel, rows, cols, out_shape):
    """Kernel, pooling windows and output of a layer, worked by hand; incomplete windows are dropped."""
    g = resolve_layer(layer, in_shape)
    assert (g.kernel, g.row_edges.tolist(), g.col_edges.tolist(), g.out_shape) == (kernel, list(rows), list(cols), out_shape)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (ConvLayer(4, 9), r"layer 1: kernel_size of 9 x 9 is larger than the 8 x 8 pixels"),
        (ConvLayer(4, 5, pool_size=5), r"pool_size of 5 is larger than the 4 x 4 map"),
        (ConvLayer(4, 5, pool_grid=(5, 1)), r"pool_grid of 5 x 1 is finer than the 4 x 4 map"),
        (ConvLayer(4, pool_grid="fine"), r"pool_grid must be a pair of positive whole numbers, \"auto\" or None, got 'fine'"),
        (ConvLayer(0), r"n_filters must be a whole number of at least 1, got 0"),
        (ConvLayer(4, "big"), r"kernel_size must be a positive whole number"),
        (ConvLayer(4, stride=0), r"stride must be"),
        (ConvLayer(4, activation="tanh"), r"activation must be one of relu, abs, clip, split, got 'tanh'"),
        (ConvLayer(4, filters="waves"), r"filters must be one of"),
        (ConvLayer(4, 9, padding=2, filters="patches"), r"kernel_size of 9 x 9 is larger than the 8 x 8 pixels"),
        (ConvLayer(4, pool="median"), r"pool must be one of"),
        (ConvLayer(4, gain=0), r"gain must be a positive number"),
        (ConvLayer(4, threshold=-1), r"threshold must be a non-negative number"),
        (ConvLayer(4, patch_norm=0), r'patch_norm must be a positive number, "auto" or None, got 0'),
        (ConvLayer(4, patch_norm=float("nan")), r'patch_norm must be a positive number, "auto" or None, got nan'),
        (ConvLayer(4, filters="patches", whitening=-0.1), r"whitening must be a positive number, got -0.1"),
        (ConvLayer(4, filters="patches", whitening=None), r"whitening must be a positive number, got None"),
        ("conv", r"layers must be a sequence of ConvLayer"),
    ],
)
def test_wrong_layers_are_refused(layer, text):
    """Each wrong value is named with its rule; explicit sizes larger than the image are errors."""
    with pytest.raises(ParameterError, match=text):
        resolve_layers([layer], (8, 8, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_threshold_holds_for_the_filters_as_applied(channels, caplog):
    """After zero mean, unit norm, scale and gain no two filters are more similar than allowed; info and log give the acceptance rate."""
    caplog.set_level("INFO", logger="streamcnn")
    images = np.random.default_rng(1).integers(0, 256, (20, 9, 9, channels), dtype=np.uint8)
    network = drawn([ConvLayer(12, 5, gain=2.7)], images=images)
    similarity = filter_similarity(network.filters[0])
    assert similarity[~np.eye(12, dtype=bool)].max() <= 0.10
    n_candidates = network.info[0]["n_candidates"]
    assert n_candidates > 12
    assert network.info[0]["acceptance_rate"] == 12 / n_candidates
    assert caplog.messages == [f"layer 1: kept 12 of {n_candidates} candidate filters ({1200 / n_candidates:.1f} %)"]


@pytest.mark.parametrize(("scale", "steps"), [(1, ()), (1e-3, ()), (1e4, ()), (1, ("standardize",))])
def test_responses_are_of_order_one_whatever_the_pixels(scale, steps):
    """The mean of |w * x| over the data is one in every layer."""
    images = (IMAGES * np.float32(scale)).astype(np.float32)
    network = drawn([ConvLayer(6, 3, filters="random", activation="abs", pool_grid=(1, 1))], steps, images)
    assert rows_of(network, images).mean() == pytest.approx(1, rel=1e-5)


def test_gain_multiplies_the_response():
    """Twice the gain is twice the response, and scale-free activations double with it."""
    one, two = (drawn([ConvLayer(6, 3, filters="random", gain=g)]) for g in (1.0, 2.0))
    np.testing.assert_allclose(rows_of(two, IMAGES), 2 * rows_of(one, IMAGES), rtol=1e-5, atol=1e-6)


def test_rows_agree_with_the_naive_machine():
    """The whole network on the CPU and in float64 loops: the same filters, rows within float32 rounding of sums of 10 terms."""
    network = drawn(steps=("standardize",))
    naive = get_kernels("naive")
    np.testing.assert_allclose(rows_of(network, IMAGES), rows_of(network, IMAGES, kernels=naive), rtol=1e-4, atol=1e-5)


def test_rows_are_height_width_channels():
    """A feature row is (height, width, channels) in C order."""
    network = drawn([ConvLayer(3, 3, filters="random", pool_size=2)])
    rows = rows_of(network, IMAGES[:1]).reshape(5, 4, 3)
    shifted = rows_of(network, np.roll(IMAGES[:1], 2, axis=1)).reshape(5, 4, 3)
    np.testing.assert_array_equal(shifted[1:, :, :], rows[:-1, :, :])


@given(chunk=st.integers(1, 45), threads=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_chunking_and_threads_never_change_a_bit(chunk, threads):
    """Any chunk size and thread count give the same bits."""
    network = drawn(steps=("standardize", "local_contrast"))
    np.testing.assert_array_equal(rows_of(network, IMAGES, chunk, threads), rows_of(network, IMAGES, 16, 2))


def layer_by_layer(network, images):
    """Rows by one call a layer, of images that lie as they are."""
    for g, filters in zip(network.geometry, network.filters):
        layer, edges = g.layer, (lambda _, g=g: g.row_edges, lambda _, g=g: g.col_edges)
        codes = {"activation": layer.activation, "threshold": layer.threshold, "pool": layer.pool or "mean", "edges": edges}
        images = run(CPU, images, filters, np.zeros(len(filters), np.float32), stride=layer.stride, padding=layer.padding, **codes)
    return images.reshape(len(images), -1)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: str(tile.dtype["accumulators"].shape))
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("pool", [*POOLS, None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_that_hand_on_interleaved_images_have_the_bits_of_each_by_itself(activation, pool, padding, tile):
    """Three layers in one buffer of the largest chunk, whatever it held: one image, a block, one less and more, and a ragged end."""
    lanes = tile.dtype["accumulators"].shape[2]
    kernels = of_tile(tile)
    options = {"filters": "random", "activation": activation, "pool": pool, "threshold": 0.2, "padding": padding}
    layers = [
        ConvLayer(5, 3, pool_size=2, **options),
        ConvLayer(6, 2, pool_grid=(3, 2), **options),
        ConvLayer(7, 2, pool_size=1, **options),
    ]
    images = np.resize(IMAGES, (2 * lanes + 3, *IMAGES.shape[1:]))
    network = drawn(layers)
    expected = layer_by_layer(network, images)
    buffers = network.allocate(len(images), 2, kernels)
    assert [b.ndim for b in buffers.values()] == [5, 5, 4, 2]
    for n in (1, lanes - 1, lanes, lanes + 1, len(images)):
        for buffer in buffers.values():
            buffer.fill(np.nan)
        rows = network.transform(images[-n:], buffers, kernels)
        assert np.array_equal(bits(rows), bits(expected[-n:])), n


def of_tile(tile):
    """The CPU's kernels with another tile."""
    return SimpleNamespace(**{name: partial(getattr(CPU, name), tile=tile) for name in ("conv_lanes", "conv_layer", "conv_scratch")})


def test_images_are_handed_on_interleaved_only_where_both_layers_gain():
    """Of 17 images in lanes of 16 a layer of 64 filters takes each by itself, one of 4 does not; of 32 both are interleaved."""
    network = Network(resolve_layers([ConvLayer(n, 3, pool=None) for n in (4, 64, 4)], (8, 7, 1)), ())

    def outputs(chunk):
        return list(network.buffer_shapes(chunk, 2, of_tile(TILES[0])).values())[:3]

    assert outputs(15) == [(15, 6, 5, 4), (15, 4, 3, 64), (15, 2, 1, 4)]
    assert outputs(17) == [(17, 6, 5, 4), (17, 4, 3, 64), (17, 2, 1, 4)]
    assert outputs(31) == [(31, 6, 5, 4), (31, 4, 3, 64), (31, 2, 1, 4)]
    assert outputs(32) == [(2, 6, 5, 4, 16), (2, 4, 3, 64, 16), (32, 2, 1, 4)]


def test_seed_decides_the_filters():
    """Equal seeds give equal filters, other seeds and other layers others."""
    a, b, c = drawn(), drawn(), drawn(seed=1)
    for x, y, z in zip(a.filters, b.filters, c.filters):
        np.testing.assert_array_equal(x, y)
        assert not np.array_equal(x, z)


def test_rule_is_dropped_with_a_warning_only_where_the_size_was_automatic():
    """Tiny images leave no dissimilar filters: with kernel_size="auto" a warning, with an explicit size an error."""
    images = np.ascontiguousarray(IMAGES[:, :2, :2])
    with pytest.warns(UserWarning, match="similarity rule is dropped"):
        assert len(drawn([ConvLayer(8)], images=images).filters[0]) == 8
    with pytest.raises(FilterBankError, match="layer 1: "):
        drawn([ConvLayer(8, 2)], images=images)


def test_network_is_rebuilt_from_its_description():
    """describe and to_arrays hold all that transform needs, through JSON."""
    import json

    network = drawn(steps=("standardize",))
    description = json.loads(json.dumps(network.describe()))
    again = Network.from_arrays(description, network.to_arrays())
    np.testing.assert_array_equal(rows_of(again, IMAGES), rows_of(network, IMAGES))
    assert layer_from_dict(description["layers"][0]) == LAYERS[0]
    with pytest.raises(DataError, match="the layer needs"):
        Network.from_arrays(description, {name: a[:1] for name, a in network.to_arrays().items()})


def test_values_beyond_float16_are_an_error_that_names_float32():
    """Rounding is part of the model; an overflow is not rounding."""
    out = np.empty(2, np.float16)
    round_features(np.array([1.0002, -65000], np.float32), out)
    assert out.tolist() == [1.0, -64992.0]
    with pytest.raises(DataError, match='feature_dtype="float32"'):
        round_features(np.array([1, 70000.0], np.float32), out)


def test_buffers_are_what_is_declared():
    """buffer_bytes is exactly what allocate takes."""
    network = drawn(steps=("standardize",))
    buffers = network.allocate(20, 2, CPU)
    assert {name: b.nbytes for name, b in buffers.items()} == network.buffer_bytes(20, 2, CPU)


def test_the_next_chunk_is_queued_before_the_last_one_is_waited_for(monkeypatch):
    """No chunk waits for whoever takes rows; rows taken stay as they are until the next step; buffers are enough for that."""
    network = drawn()
    events: list[tuple[str, int]] = []

    class Recording(features.ThreadPoolExecutor):
        def submit(self, *args):
            number = sum(kind == "submit" for kind, _ in events)
            events.append(("submit", number))
            future = super().submit(*args)
            wait = future.result

            def result(timeout=None):
                events.append(("wait", number))
                return wait(timeout)

            future.result = result
            return future

    monkeypatch.setattr(features, "ThreadPoolExecutor", Recording)
    extractor = features.FeatureExtractor(open_images(IMAGES), network, "float16", 8, 1, CPU)
    whole = rows_of(network, IMAGES).astype(np.float16)
    for first, rows in extractor.chunks((0, 40)):
        time.sleep(0.01)  # the next one is convolved meanwhile
        np.testing.assert_array_equal(rows, whole[first : first + len(rows)])
    order = [("submit", 0), *(event for i in range(1, 5) for event in (("submit", i), ("wait", i - 1))), ("wait", 4)]
    assert events == order
