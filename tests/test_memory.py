"""Sizes, claims, the monitor, what it draws, and how it holds a run to its plan."""

import re
import sys
import xml.etree.ElementTree as ET
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from streamcnn import ConvLayer, StreamCNNClassifier, open_images, tracing
from streamcnn.errors import MemoryBudgetError, ParameterError
from streamcnn.features import FeatureExtractor
from streamcnn.images import ArraySource
from streamcnn.kernels import get_kernels
from streamcnn.labels import encode_labels
from streamcnn.layers import resolve_layers
from streamcnn.memory import MemoryBudget, MemoryMonitor, format_bytes, parse_bytes, resident_bytes
from streamcnn.network import Network
from streamcnn.plan import plan
from streamcnn.store import FeatureStore

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 << 20), ("1GiB", 1 << 30), ("1GB", 10**9), (" 1.5 gib ", 3 << 29), ("2g", 2 << 30), ("4096", 4096), (4096, 4096)],
)
def test_sizes_are_understood(text, expected):
    """Sizes in powers of 1024 and of 1000, with and without space, are bytes."""
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["12 bananas", "", "GiB", "-1GiB", 0, -5, None, True, 1.5, "1e9"])
def test_other_sizes_are_refused(text):
    """What is no positive size is refused with the value and an example."""
    with pytest.raises(ParameterError, match="memory_limit must be a positive number of bytes or a size"):
        parse_bytes(text)


def test_format_bytes_reads_back():
    """What is shown is what was meant."""
    assert [format_bytes(n) for n in (10, 2048, 5 << 20, 3 << 30, 2 << 40)] == ["10 B", "2 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB"]


def test_budget_adds_claims_and_refuses_with_the_table():
    """Claims add up by name; one too many is refused, names every claim, and is not kept."""
    budget = MemoryBudget(resident_bytes() + (100 << 20))
    budget.claim("pixels", 30 << 20)
    budget.claim("pixels", 10 << 20)
    assert budget.claims["pixels"] == 40 << 20
    assert list(budget.claims)[0] == "already in use"
    with pytest.raises(MemoryBudgetError, match=r"too small[\s\S]*already in use[\s\S]*gram[\s\S]*pixels"):
        budget.claim("gram", 200 << 20)
    assert "gram" not in budget.claims
    budget.release("pixels")
    assert budget.free == pytest.approx(100 << 20, abs=1 << 20)


def test_monitor_sees_a_peak_that_is_gone_again_and_its_stage():
    """Memory touched and freed inside a stage is in the peak, in the stage's peak and in the trace."""
    with MemoryMonitor("4GiB", interval=0.005) as monitor:
        before = resident_bytes()
        with monitor.stage("big"):
            block = np.ones(80 << 20, np.uint8)
            monitor.sample()
            del block
    assert monitor.peak_bytes >= before + (75 << 20)
    assert monitor.stage_peaks["big"] >= before + (75 << 20)
    assert {stage for _, stage, _ in monitor.trace} == {"", "big"}


def test_monitor_writes_its_trace(tmp_path):
    """The trace is a CSV of seconds, stage and bytes."""
    with MemoryMonitor() as monitor:
        pass
    monitor.write_csv(tmp_path / "memory.csv")
    lines = (tmp_path / "memory.csv").read_text().splitlines()
    assert lines[0] == "seconds,stage,resident_bytes"
    assert len(lines) == len(monitor.trace) + 1
    assert int(lines[1].split(",")[2]) > 1 << 20


class LeakySource(ArraySource):
    """Images whose reading in large chunks makes somebody else in the process take `leak` bytes, once image `at` has been read."""

    def __init__(self, images, labels, leak, at):
        super().__init__(images, None, encode_labels(labels, len(images)))
        self.leak, self.at, self.leaked, self.chunks = leak, at, None, []

    def _fill(self, start, stop, out):
        super()._fill(start, stop, out)
        self.chunks.append(stop - start)
        if start >= self.at and self.leaked is None and stop - start > 100:
            self.leaked = np.ones(self.leak, np.uint8)


@pytest.fixture(scope="module")
def noisy():
    """9,000 images of 16 x 16, two classes; their features in float32 are three shards."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 9000)
    images = rng.integers(0, 200, (9000, 16, 16, 1)).astype(np.uint8) + (50 * labels[:, None, None, None]).astype(np.uint8)
    return images, labels


def fit_leaky(noisy, leak, limit, store=None, resume=False, at=6144):
    """Fit with somebody else taking `leak` bytes when image `at` is read; returns source, estimator, and its error."""
    source = LeakySource(*noisy, leak=leak, at=at)
    estimator = StreamCNNClassifier(memory_limit=limit, store=store, feature_dtype="float32", kernel="linear", C=0.1, random_state=0)
    try:
        return source, estimator.fit(source, resume=resume), None
    except MemoryBudgetError as error:
        return source, estimator, error


def arrays_of(estimator):
    """The model's arrays by name."""
    return estimator.model_.to_arrays()


@pytest.mark.skipif(sys.platform != "linux", reason="made for the kernel's own high-water mark")
def test_memory_that_somebody_else_takes_shrinks_the_chunks_and_changes_no_bit(noisy, caplog):
    """Above the stage's plan and below the limit: told, the smallest chunks from then on, the same model."""
    source, estimator, error = fit_leaky(noisy, 300 * MIB, 4096 * MIB)
    assert error is None
    assert "going on with the smallest chunks" in caplog.text
    extracting = source.chunks[source.chunks.index(1024) :]
    assert extracting[:3] == [1024] * 3
    assert extracting[-100:] == [1] * 100
    _, calm, _ = fit_leaky(noisy, 0, 4096 * MIB)
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(estimator).values(), arrays_of(calm).values()))


@pytest.mark.skipif(sys.platform != "linux", reason="made for the kernel's own high-water mark")
def test_at_98_percent_a_run_finishes_its_shard_and_stops_and_resumes(noisy, tmp_path):
    """What is finished is kept, the message says what to do, and the resumed model is the same."""
    limit = plan(noisy[0], noisy[1], memory_limit="8GiB", kernel="linear", feature_dtype="float32").peak_bytes + 200 * MIB
    source, _, error = fit_leaky(noisy, limit - resident_bytes(), limit, tmp_path / "store", at=3072)
    assert "nearly used up" in str(error)
    assert "raise memory_limit, and resume" in str(error)
    del source.leaked
    store = FeatureStore(tmp_path / "store")
    kept = [entry["rows"] for entry in store.shards("features")]
    assert kept in ([3072], [3072, 3072])  # images are read ahead: the leak came while the first or the second was written
    assert (tmp_path / "store" / "memory.csv").read_text().startswith("seconds,stage,resident_bytes")
    _, resumed, error = fit_leaky(noisy, 0, 2 * limit, tmp_path / "store", resume=True)
    assert error is None
    assert resumed.report_.resumed
    _, calm, _ = fit_leaky(noisy, 0, 2 * limit)
    assert all(np.array_equal(a, b) for a, b in zip(arrays_of(resumed).values(), arrays_of(calm).values()))


def test_features_that_are_not_kept_are_convolved_in_the_smallest_chunks_too(noisy):
    """The passes of PCA and SVM over images shrink as extraction does; the rows stay the same."""
    network = Network(resolve_layers([ConvLayer(4, 3, filters="random")], (16, 16, 1)), ())
    kernels = get_kernels("cpu")
    network.draw(noisy[0][:20], 0, 1, kernels)
    monitor = MemoryMonitor()
    extractor = FeatureExtractor(open_images(noisy[0][:300]), network, "float16", 256, 1, kernels, monitor)
    calm, tight = (np.empty((100, network.n_features), np.float32) for _ in range(2))
    extractor.read(50, 150, calm)
    assert extractor.chunk_size == 256
    monitor.tight = True
    extractor.read(50, 150, tight)
    assert extractor.chunk_size == 1
    np.testing.assert_array_equal(calm, tight)


def test_a_calm_run_is_neither_tightened_nor_stopped(noisy):
    """Neither action fires in a run that keeps to its plan, and every stage has a measured peak below the planned one."""
    with MemoryMonitor() as around:
        _, estimator, error = fit_leaky(noisy, 0, 1024 * MIB)
    assert error is None
    assert {"filters", "extract", "pca", "project", "svm"} <= set(around.stage_peaks)
    planned = estimator.report_.plan
    assert all(around.stage_peaks[s.name] <= planned.planned(s.name) for s in planned.stages if s.name in around.stage_peaks)
    assert estimator.peak_rss_bytes_ <= planned.peak_bytes <= 1024 * MIB


def made_trace():
    """A monitor with a trace of two stages, a peak of 300 MiB and a limit of 400."""
    monitor = MemoryMonitor("400MiB")
    monitor.trace = [(i / 100, "read" if i < 500 else "a<b", (300 if i == 700 else 100) * MIB) for i in range(1000)]
    monitor._peak = 300 * MIB
    return monitor


def test_the_svg_shows_stages_peak_and_limit():
    """Well-formed, self-contained, thinned to a few hundred points without losing the peak, names escaped."""
    picture = made_trace()._repr_html_()
    root = ET.fromstring(picture)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"read", "a<b", "peak 300 MiB", "limit 400 MiB"} <= set(texts)
    line = next(element for element in root.iter() if element.tag.endswith("polyline")).get("points").split()
    assert len(line) <= 400
    heights = [float(point.split(",")[1]) for point in line]
    # 184 pixels of height stand for 1.08 times the limit
    assert min(heights) == pytest.approx(184 * (1 - 300 / 432), abs=0.1)
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")


def test_plot_draws_into_given_axes():
    """`ax=` is used and returned, with trace, peak, limit and both stages."""
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib, extra `plot`, is not installed")
    ax = plt.figure().add_subplot()
    assert made_trace().plot(ax) is ax
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"resident", "peak", "limit", "read", "a<b"}
    plt.close("all")


def test_live_view_updates_one_output_in_a_notebook(monkeypatch):
    """In a kernel the same output is drawn anew while the block runs, at most once a second, and once at its end."""
    shown = []
    display = ModuleType("IPython.display")
    display.HTML = lambda text: text
    display.display = lambda value, display_id: SimpleNamespace(update=shown.append)
    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: SimpleNamespace(kernel=object())
    notebook.display = display
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(tracing, "time", clock)
    view = tracing.LiveView()
    for clock.now in (0.1, 0.2, 0.9, 1.2):
        view.update(made_trace())
    view.update(made_trace(), last=True)
    assert len(shown) == 3
    assert shown[0].startswith("<svg")
    with MemoryMonitor(live=True, interval=60):
        pass
    assert len(shown) == 4


def test_a_broken_live_view_does_not_end_the_watch(monkeypatch):
    """A notebook that fails to draw loses its picture; samples go on."""

    class Broken:
        def update(self, monitor, last=False):
            raise RuntimeError("no output area")

    monkeypatch.setattr(tracing, "LiveView", Broken)
    with MemoryMonitor(live=True, interval=0.005) as monitor:
        while len(monitor.trace) < 5:
            pass
    assert monitor._view is None
    assert len(monitor.trace) >= 5


def test_live_view_outside_a_notebook_does_nothing(monkeypatch):
    """Without IPython, or in its terminal, nothing is shown and nothing fails."""
    monkeypatch.setitem(sys.modules, "IPython", None)
    with MemoryMonitor(live=True) as monitor:
        pass
    assert monitor.peak_bytes > 0


@pytest.mark.parametrize("peak", [300, 990])
def test_the_words_at_peak_and_limit_do_not_lie_over_one_another(peak):
    """Text of 11 pixels stands above each line; where the peak is close to the limit, the peak's is below."""
    picture = tracing.svg(tracing.Trace([(0.0, "a", 100 << 20), (9.0, "a", peak << 20)], peak << 20, 1000 << 20))
    places = [float(re.search(rf'y="([\d.]+)" font-size="11">{word} ', picture)[1]) for word in ("peak", "limit")]
    assert places[0] - places[1] >= 11
