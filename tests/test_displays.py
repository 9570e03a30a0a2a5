"""Displays draw what they say, from an estimator, a model and a store alike."""

import io

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

pytest.importorskip("matplotlib", reason="matplotlib, extra `plot`, is not installed: nothing can be drawn")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, filter_similarity, load_model
from streamcnn.displays import (
    ConfusionDisplay,
    FilterBankDisplay,
    ImagesDisplay,
    MemoryDisplay,
    SimilarityDisplay,
    SpectrumDisplay,
    StageTimeDisplay,
)
from streamcnn.displays.fitted import _montage
from streamcnn.displays.results import short
from streamcnn.errors import DataError, NotKeptError, ParameterError, StoreError
from streamcnn.evaluate import N_EXAMPLES, Example, run_testing
from streamcnn.images import open_images

LAYERS = [ConvLayer(6, 3, filters="random", pool_size=2), ConvLayer(4, 2, max_similarity=0.5)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, digits):
    """A classifier of two layers, its store, and images to test it on."""
    store = tmp_path_factory.mktemp("displays") / "store"
    images, labels = digits
    names = np.array([f"${label}^{{$" for label in range(10)])[labels]
    options = {"layers": LAYERS, "kernel": "linear", "C": 0.1, "n_components": 12, "random_state": 0, "store": store}
    return StreamCNNClassifier(**options).fit(images[:500], names[:500]), store, images[500:900], names[500:900]


@pytest.fixture
def ax():
    """Axes that pyplot does not know."""
    return Figure().subplots()


def drawn(display, ax):
    """Draw the whole figure, which is when matplotlib reads texts; gives the display back."""
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    display.figure_.savefig(io.BytesIO(), format="svg")
    return display


def test_a_bank_is_laid_out_channel_beside_channel():
    """Each coefficient is at its place, with one empty pixel between channels and two between filters."""
    bank = np.arange(1.0, 25.0).reshape(3, 2, 2, 2)
    picture = _montage(bank)
    columns = (picture.shape[1] + 2) // 7
    for n in range(3):
        row, column = divmod(n, columns)
        for channel in range(2):
            top, left = row * 4, column * 7 + channel * 3
            np.testing.assert_array_equal(picture[top : top + 2, left : left + 2], bank[n, :, :, channel])
    assert np.isfinite(picture).sum() == bank.size


@pytest.mark.parametrize("layer", [1, 2])
def test_filters_are_those_of_the_model_from_wherever_they_come(fitted, ax, layer):
    """Estimator, model and store give the same bank, centred at 0 on a scale of both signs that a few large coefficients do not rule."""
    classifier, store, *_ = fitted
    bank = classifier.model_.network.filters[layer - 1]
    for display in (
        FilterBankDisplay.from_estimator(classifier, layer, ax=Figure().subplots()),
        FilterBankDisplay.from_model(classifier.model_, layer, ax=Figure().subplots()),
        FilterBankDisplay.from_store(store, layer, ax=ax),
    ):
        np.testing.assert_array_equal(display.filters, bank)
    low, high = drawn(display, ax).ax_.images[0].get_clim()
    assert low == -high == -np.quantile(np.abs(bank), 0.99)
    assert f"layer {layer}: {len(bank)} filters of" in ax.get_title()


def test_filters_of_a_transformer_are_drawn(digits, ax):
    """`ConvFeatures` has filters too, and no PCA."""
    features = ConvFeatures([ConvLayer(3, 3, filters="random")], random_state=0).fit(digits[0][:50])
    np.testing.assert_array_equal(FilterBankDisplay.from_estimator(features, ax=ax).filters, features.network_.filters[0])


def test_similarities_are_eq_2_with_the_layers_own_rule(fitted, ax):
    """Values off the diagonal are `filter_similarity`'s; the rule is the layer's, and none where every filter was kept."""
    classifier, store, *_ = fitted
    bank = classifier.model_.network.filters[1]
    display = drawn(SimilarityDisplay.from_store(store, 2, ax=ax), ax)
    expected = filter_similarity(bank)
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_array_equal(display.values_, expected)
    assert display.max_similarity == 0.5
    assert f"largest {np.nanmax(expected):.3f}, at most 0.5 allowed" in ax.get_title()
    assert SimilarityDisplay.from_store(store, 1, ax=Figure().subplots()).max_similarity is None
    with pytest.raises(DataError, match="filters of 99 x 99 x 1 are too large"):
        SimilarityDisplay(np.ones((2, 99, 99, 1))).plot(ax)


def test_the_spectrum_is_the_pcas(fitted, ax):
    """The line is the ratio of explained variance, and the title sums it up."""
    classifier, store, *_ = fitted
    ratio = classifier.model_.pca.explained_variance_ratio_
    for display in (SpectrumDisplay.from_estimator(classifier, ax=Figure().subplots()), SpectrumDisplay.from_store(store, ax=ax)):
        np.testing.assert_array_equal(display.ratio, ratio)
    np.testing.assert_array_equal(drawn(display, ax).ax_.lines[0].get_ydata(), ratio)
    assert ax.get_title() == f"12 components capture {100 * ratio.sum():.1f} % of the variance"
    # a file may say anything
    for made_up in ([], [np.nan, np.inf], [-1.0, 0.0]):
        drawn(SpectrumDisplay(made_up).plot(ax), ax)


def test_memory_and_seconds_are_the_last_runs(fitted, ax):
    """The estimator's report and the store's record tell the same: every stage in order, seconds, trace, peak and limit."""
    classifier, store, *_ = fitted
    report = classifier.report_
    mine = StageTimeDisplay.from_estimator(classifier, ax=Figure().subplots())
    kept = drawn(StageTimeDisplay.from_store(store, ax=ax), ax)
    assert mine.seconds == kept.seconds == report.stage_seconds
    assert list(kept.seconds) == ["filters", "extract", "pca", "project", "svm"]
    assert [bar.get_width() for bar in ax.patches] == list(report.stage_seconds.values())
    trace = MemoryDisplay.from_store(store, ax=Figure().subplots()).trace
    assert (trace.peak_bytes, trace.limit) == (classifier.peak_rss_bytes_, classifier.memory_limit_)
    assert [sample[1:] for sample in trace.trace] == [sample[1:] for sample in report.trace.trace[: len(trace.trace)]]
    axes = Figure().subplots()
    assert drawn(MemoryDisplay.from_estimator(classifier, ax=axes), axes).trace is report.trace


def test_long_names_keep_both_ends():
    """What differs between long names is seldom in their middle; letters that cannot be shown are replaced."""
    assert short("person number 17") == "person…mber 17"
    assert short("14 letters, ok") == "14 letters, ok"
    assert short(7) == "7"
    assert short("a\nb\udc80") == "a\ufffdb\ufffd"


def test_names_are_text_and_no_formula(fitted, ax):
    """Class names and stages with dollars and braces are drawn as they are, where matplotlib would look for mathematics."""
    classifier, _, images, names = fitted
    display = drawn(ConfusionDisplay.from_estimator(classifier, images, names, ax=ax), ax)
    assert [text.get_text() for text in ax.get_xticklabels()] == classifier.classes_.tolist()
    truth = np.array(display.confusion)
    predicted = classifier.predict(images)
    assert truth.sum() == len(images)
    assert np.trace(truth) == (predicted == names).sum()
    assert truth[3, 5] == ((names == classifier.classes_[3]) & (predicted == classifier.classes_[5])).sum()
    assert (truth == 0).any()
    assert [text.get_text() for text in ax.texts] == [str(count) if count else "" for count in truth.flat]
    axes = Figure().subplots()
    drawn(StageTimeDisplay({"$x^{$": 1.0}).plot(axes), axes)
    trace = classifier.report_.trace
    axes = Figure().subplots()
    drawn(MemoryDisplay(type(trace)([(0.0, "$a_{$", 1 << 20), (1.0, "$a_{$", 1 << 20)], 1 << 20, None)).plot(axes), axes)


@pytest.mark.parametrize("n_classes", [2, 10])
def test_examples_are_the_surest_errors_and_hits(digits, n_classes, ax):
    """Against margins of all decisions: the largest first, wrong ones against their class, right ones against the next best."""
    images, labels = digits
    labels = labels % 2 if n_classes == 2 else labels
    options = {"layers": LAYERS, "kernel": "linear", "C": 0.1, "n_components": 6, "random_state": 0}
    classifier = StreamCNNClassifier(**options).fit(images[:300], labels[:300])
    tested = run_testing(classifier.model_, open_images(images[300:900], labels[300:900]), 64)
    scores = classifier.decision_function(images[300:900])
    scores = np.stack([-scores, scores], 1) / 2 if n_classes == 2 else scores
    truth = labels[300:900]
    taken = scores.argmax(axis=1)
    assert tested.measured["accuracy"] == (taken == truth).mean()
    rows = np.arange(600)
    others = scores.copy()
    others[rows, taken] = -np.inf
    for examples, right, rival in ((tested.confused, False, scores[rows, truth]), (tested.certain, True, others.max(axis=1))):
        margins = np.where((taken == truth) == right, scores[rows, taken] - rival, -np.inf)
        expected = np.argsort(-margins, kind="stable")[:N_EXAMPLES]
        assert [example.row for example in examples] == expected.tolist()
        assert [example.margin for example in examples] == margins[expected].tolist()
        assert [(e.true, e.predicted) for e in examples] == list(zip(truth[expected].tolist(), taken[expected].tolist()))
        np.testing.assert_array_equal(examples[0].picture, images[300 + expected[0], :, :, 0])
    display = drawn(ImagesDisplay(tested.confused, "most confused").plot(ax), ax)
    assert len(display.ax_.images) == len(tested.confused)


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_few_examples_take_the_room_of_those_there_are(n, ax):
    """Up to four stand abreast; the axes are as wide as the first line of them, so that the title stands above."""
    examples = [Example(row, f"{row}.png", "a", "b", 1.0, np.zeros((4, 4))) for row in range(n)]
    drawn(ImagesDisplay(examples, "most confused").plot(ax), ax)
    assert ax.get_xlim() == (0, pytest.approx(min(max(n, 1), 4) * 1.15 - 0.15))


def test_large_pictures_are_means_of_blocks(fitted):
    """200 x 100 pixels become 66 x 33 means of 3 x 3; three channels stay colours, others become grey."""
    from streamcnn.evaluate import _example

    model = fitted[0].model_
    pixels = np.random.default_rng(0).integers(0, 256, (2, 200, 100, 3), dtype=np.uint8)
    picture = _example(model, open_images(pixels), -1.5, 1, 2, 3).picture
    expected = pixels[1, :198, :99].reshape(66, 3, 33, 3, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(picture, expected)
    grey = _example(model, open_images(pixels[..., :2]), -1.5, 1, 2, 3).picture
    np.testing.assert_allclose(grey, expected[..., :2].mean(axis=2), rtol=1e-12)
    assert _example(model, open_images(pixels[:, :1, :, :1]), 0.0, 0, 0, 0).picture.shape == (1, 50)


def test_without_axes_a_figure_is_made_and_drawing_again_goes_elsewhere(fitted, ax):
    """As scikit-learn's displays: `plot` may be called again, with other axes."""
    display = SpectrumDisplay.from_model(fitted[0].model_)
    assert display.figure_ is plt.gcf()
    assert display.plot(ax) is display
    assert display.ax_ is ax
    plt.close("all")


def test_what_cannot_be_drawn_is_an_error(fitted, tmp_path, digits, ax):
    """One sentence each: a layer that is not there, nothing fitted, no PCA, no evaluation, no trace, no stage, another kind."""
    classifier, store, images, names = fitted
    with pytest.raises(ParameterError, match="layer must be from 1 to 2, the number of layers, got 3"):
        FilterBankDisplay.from_store(store, 3, ax=ax)
    for display in (FilterBankDisplay, SpectrumDisplay, MemoryDisplay):
        with pytest.raises(NotFittedError):
            display.from_estimator(StreamCNNClassifier(), ax=ax)
    with pytest.raises(NotKeptError, match="remembers no evaluation: fit with --test"):
        ConfusionDisplay.from_store(store, ax=ax)
    with pytest.raises(ParameterError, match='kind must be "confused" or "certain", got \'best\''):
        ImagesDisplay.from_estimator(classifier, images, names, kind="best", ax=ax)
    options = {"layers": LAYERS[:1], "kernel": "linear", "C": 0.1, "n_components": None, "random_state": 0, "store": tmp_path / "s"}
    bare = StreamCNNClassifier(**options).fit(digits[0][:60], digits[1][:60])
    with pytest.raises(DataError, match="has no PCA to draw"):
        SpectrumDisplay.from_estimator(bare, ax=ax)
    with pytest.raises(StoreError, match="holds no finished stage pca"):
        SpectrumDisplay.from_store(tmp_path / "s", ax=ax)
    for name in ("memory.csv", "run.json"):
        (tmp_path / "s" / name).unlink()
    with pytest.raises(NotKeptError, match="has no memory trace"):
        MemoryDisplay.from_store(tmp_path / "s", ax=ax)
    with pytest.raises(NotKeptError, match="has no seconds of stages"):
        StageTimeDisplay.from_store(tmp_path / "s", ax=ax)
    assert load_model(tmp_path / "s" / "model.h5").pca is None
