"""Plans: what they name, how they choose, when they refuse, and what they say then."""

import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from streamcnn import ConvFeatures, ConvLayer, StreamCNNClassifier, digests, files, plan, stages
from streamcnn.digests import library_versions, stage_digests
from streamcnn.errors import MemoryBudgetError, ParameterError, StoreError
from streamcnn.images import open_images
from streamcnn.kernels import cpu
from streamcnn.ladder import svm_bytes
from streamcnn.plan import make_plan, resolve_components
from streamcnn.planning import CHUNK_SIZES, MemoryPlan, StagePlan, added, choose_chunk, reserve
from streamcnn.presets import resolve_settings

MIB = 1 << 20


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """This process holds 250 MiB and has compiled nothing yet, whatever other tests have left in it."""
    held = SimpleNamespace(bytes=250 * MIB)
    monkeypatch.setattr(stages, "resident_bytes", lambda: held.bytes)
    monkeypatch.setattr(cpu, "pending_bytes", lambda steps, patch_norm: 128 * MIB)
    return held


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3,000 images of 40 x 40 in an HDF5 file, four classes."""
    path = tmp_path_factory.mktemp("plan") / "d.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (3000, 40, 40), dtype=np.uint8)
        file["labels"] = np.arange(3000) % 4
    return path


def wide(rows, shape, classes=2):
    """Images that are never read, as large as wanted: only their shapes reach a plan."""
    return open_images(np.broadcast_to(np.uint8(0), (rows, *shape)), labels=np.arange(rows) % classes)


def test_a_plan_adds_up(data):
    """Each stage is what the process holds anyway, its claims, and the reserve; the peak is the largest of them."""
    made = plan(data, memory_limit="2GiB")
    assert [stage.name for stage in made.stages] == ["filters", "extract", "pca", "project", "svm", "save"]
    assert list(made.base)[:2] == ["already in use", "labels"]
    assert set(made.base) <= {"already in use", "labels", "compiled kernels", "libraries"}
    for stage in made.stages:
        held = sum(made.base.values()) + sum(stage.claims.values())
        assert made.planned(stage.name) == held + max(16 * MIB, held // 40)
    assert made.peak_bytes == max(made.planned(stage.name) for stage in made.stages) <= made.limit
    assert made.stage("extract").disk_bytes == 3000 * made.n_features * 2
    assert made.stage("project").disk_bytes == 3000 * made.n_components * 4
    assert made.disk_bytes == sum(stage.disk_bytes for stage in made.stages)


def test_what_a_source_holds_already_is_named_once(data):
    """Labels are resident when the plan is made: they are a claim of their own, and not part of `already in use` too."""
    source = wide(1_000_000, (8, 8))
    made = plan(source, memory_limit="4GiB")
    assert made.base["labels"] == source.labels.nbytes + source.classes_.nbytes
    assert all("labels" not in stage.claims for stage in made.stages)


def test_chunks_are_the_largest_below_four_fifths_of_the_limit(data):
    """One chunk larger would pass 80 %; more limit never means smaller chunks."""
    sizes = []
    for limit in (394, 420, 450, 600, 4096):
        made = choose_chunk(limit * MIB, 10**6, lambda chunk, limit=limit: made_up(limit, chunk))
        sizes.append(made.chunk_size)
        larger = made_up(limit, CHUNK_SIZES[max(0, CHUNK_SIZES.index(made.chunk_size) - 1)])
        assert made.peak_bytes <= 0.8 * made.limit or made.chunk_size == 1
        assert larger.peak_bytes > 0.8 * made.limit or made.chunk_size == 256
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == 256


@pytest.mark.parametrize(("image", "chunk"), [(MIB, 256), (MIB // 6, 256), (MIB // 10, 512), (MIB // 20, 1024)])
def test_memory_is_not_taken_only_because_it_is_there(image, chunk):
    """More than 256 images are a chunk where they take 64 MiB at most."""
    made = choose_chunk(2**40, 10**6, lambda chunk: made_up(2**20, chunk, image))
    assert made.chunk_size == chunk


def made_up(limit, chunk, image=MIB):
    """A plan that holds 300 MiB and so much an image."""
    return MemoryPlan(limit * MIB, {"already in use": 300 * MIB}, chunk, [StagePlan("extract", {"pixels": chunk * image})])


def test_chunks_take_seconds_and_not_minutes():
    """Photos with 2,000 filters go one by one, however much memory there is; small images and few filters in chunks as ever."""
    chunks = [plan(wide(2000, shape), memory_limit="64GiB", preset=preset).chunk_size for shape, preset in CHUNKED]
    assert chunks == [1, 256, 1024]


CHUNKED = [((480, 640, 3), "patches"), ((480, 640, 3), "fast"), ((32, 32, 3), "patches")]


def test_a_stage_that_needs_more_whatever_the_chunk_makes_no_chunk_smaller():
    """PCA above 80 % of the limit: chunks are as large as keeps the other stages below it."""
    limit = 500

    def build(chunk):
        stages = [StagePlan("extract", {"pixels": chunk * MIB}), StagePlan("pca", {"Gram matrix": 120 * MIB})]
        return MemoryPlan(limit * MIB, {"already in use": 300 * MIB}, chunk, stages)

    made = choose_chunk(limit * MIB, 10**6, build)
    assert made.planned("pca") > 0.8 * made.limit
    assert made.chunk_size == 64
    assert made.planned("extract") <= made.planned("pca") == made.peak_bytes


def test_the_smallest_chunks_may_take_all_of_the_limit():
    """Between 80 and 100 % only the smallest chunk is left; beyond, the plan is refused."""
    tight = choose_chunk(320 * MIB, 1000, lambda chunk: made_up(320, chunk))
    assert tight.chunk_size == 1
    assert 0.8 * tight.limit < tight.peak_bytes <= tight.limit
    with pytest.raises(
        MemoryBudgetError, match=r"too small: set memory_limit to at least 320MiB \(--memory-limit\), as stage extract needs that"
    ):
        choose_chunk(316 * MIB, 1000, lambda chunk: made_up(316, chunk))


def test_a_run_that_takes_all_of_its_plan_stays_below_98_percent():
    """The reserve keeps a run that is planned to the limit away from the point at which it stops by itself."""
    for held in (50 * MIB, 300 * MIB, 784 * MIB, 5000 * MIB):
        limit = held + reserve(held)
        assert held < 0.98 * limit


@pytest.mark.parametrize("parameters", [{}, {"kernel": "linear"}, {"preset": "lee2017"}, {"keep_features": False}, {"n_components": None}])
def test_the_limit_a_refusal_names_is_enough_and_hardly_too_much(data, parameters):
    """Refused with the table; with the limit it names the plan fits, with 20 MiB less it does not."""
    with pytest.raises(MemoryBudgetError, match=r"already in use[\s\S]*reserve[\s\S]*total") as refused:
        plan(data, memory_limit="20MiB", **parameters)
    named = int(re.search(r"set memory_limit to at least (\d+)MiB", str(refused.value))[1])
    made = plan(data, memory_limit=f"{named}MiB", **parameters)
    assert made.peak_bytes <= made.limit
    with pytest.raises(MemoryBudgetError):
        plan(data, memory_limit=f"{named - 20}MiB", **parameters)


def test_refusals_name_what_would_lower_the_need():
    """Too wide for a Gram matrix: randomized; too many rows for an RBF SVM: linear; too wide a plane: components. What is advised fits."""
    layers = [ConvLayer(32, 3, filters="random", activation="split", pool=None)]
    with pytest.raises(MemoryBudgetError, match=r'stage pca[\s\S]*Gram matrix[\s\S]*try pca_solver="randomized"'):
        plan(wide(20_001, (12, 12)), memory_limit="600MiB", layers=layers, pca_solver="covariance", n_components=10)
    with pytest.raises(MemoryBudgetError, match=r'stage svm .* try kernel="linear"'):
        plan(wide(20_000, (12, 12)), memory_limit="600MiB", layers=[ConvLayer(64, 5, filters="random", pool_size=2)], n_components=900)
    with pytest.raises(MemoryBudgetError, match=r"stage svm .* try n_components=256 \(--n-components 256\)"):
        plan(wide(10_000, (32, 32)), memory_limit="1200MiB", preset="patches")
    made = plan(wide(10_000, (32, 32)), memory_limit="1200MiB", preset="patches", n_components=256)
    assert made.peak_bytes <= 1200 * MIB and len(pickle.dumps(made)) < 20_000  # without the images
    with pytest.raises(MemoryBudgetError) as refused:  # with components it would need a PCA, and more
        plan(wide(30_000, (12, 12)), memory_limit="700MiB", layers=layers, n_components=None)
    assert "try" not in str(refused.value)


def test_wide_rows_are_read_more_often(data):
    """Quasi-Newton steps take more passes than Newton's, and one for the products of features."""
    layer = ConvLayer(64, 3, filters="random", pool_size=6)
    narrow, broad = (
        plan(data, memory_limit="8GiB", layers=layer, kernel="linear", n_components=n, pca_solver="randomized", keep_features=True)
        for n in (8, None)
    )
    assert broad.n_components > 2048
    assert broad.stage("svm").passes >= narrow.stage("svm").passes + 20


def test_what_only_some_runs_depend_on_changes_no_digest_of_others(monkeypatch):
    """SciPy draws patches, and the solver of wide rows has a version of its own: digests of runs without them stay."""

    def of(filters, n_components, n_rows):
        layer = ConvLayer(300, 3, filters=filters, pool=None)
        settings = resolve_settings("fast", layers=layer, kernel="linear", n_components=n_components)
        with open_images(np.zeros((4, 6, 6), np.uint8), [0, 1, 0, 1]) as source:
            return stage_digests("data", settings, make_plan(source, settings, 8 << 30, None), n_rows)

    kinds = [("random", 2, 5000), ("random", None, 5000), ("patches", 2, 5000), ("random", None, 4), ("random", 2, 4)]
    before = [of(*kind) for kind in kinds]
    versions = library_versions()
    with monkeypatch.context() as patched:
        patched.setattr(digests, "library_versions", lambda: versions | {"scipy": "0"})
        assert [of(*kind)["filters"] == old["filters"] for kind, old in zip(kinds, before)] == [True, True, False, True, True]
    monkeypatch.setattr(digests, "WIDE_VERSION", 0)
    assert [of(*kind)["svm"] == old["svm"] for kind, old in zip(kinds, before)] == [True, False, True, False, True]
    # few wide rows have a solver of their own, few narrow ones do not
    assert before[1]["svm"] != before[3]["svm"] and before[0]["svm"] == before[4]["svm"]


def test_a_process_that_holds_most_of_the_limit_is_told_so(data, held):
    """What is held is said, and nothing is advised that would lower only the rest."""
    held.bytes = 950 * MIB
    with pytest.raises(MemoryBudgetError, match=r"already in use +[\d.]+ (MiB|GiB)[\s\S]*") as refused:
        plan(data, memory_limit="600MiB")
    assert "950.0 MiB are in use already" in str(refused.value)
    assert "; or try" not in str(refused.value)


def test_nothing_is_written_when_a_plan_is_refused(data, tmp_path):
    """No store, no temporary folder, no model."""
    with pytest.raises(MemoryBudgetError):
        StreamCNNClassifier(memory_limit="20MiB", store=tmp_path / "store").fit(data)
    assert list(tmp_path.iterdir()) == []


def test_thousands_of_classes_are_planned_and_fit_a_gibibyte():
    """5,000 classes: planes solved in groups whose Hessians fill 64 MiB, and a confusion matrix, counted."""
    made = plan(wide(200_000, (20, 20), classes=5000), memory_limit="1GiB")
    assert made.kernel == "linear"
    assert made.stage("svm").claims["Hessians"] <= 64 * MIB
    assert made.stage("svm").claims["planes"] >= 8 * 5000 * 257
    assert made.peak_bytes <= 1024 * MIB


def test_libsvms_cache_is_what_a_pair_of_classes_can_fill():
    """One pair is solved at a time: 4 bytes for each product of its rows, never more than the cache."""
    assert svm_bytes("rbf", 20, [600, 300, 100])["kernel cache"] == 4 * 900**2
    assert svm_bytes("rbf", 20, [9000, 9000], cache_bytes=50 * MIB)["kernel cache"] == 50 * MIB


def test_the_svms_cache_grows_with_the_limit_and_never_past_it():
    """At least 16 MiB, and a plan that fits stays below 80 % of its limit."""
    source = wide(16_000, (28, 28))
    caches = [plan(source, memory_limit=limit, kernel="rbf").svc_cache_bytes for limit in ("600MiB", "700MiB", "4GiB")]
    assert caches == sorted(caches)
    assert caches[0] >= 16 * MIB
    assert caches[-1] > caches[0]
    made = plan(source, memory_limit="700MiB", kernel="rbf")
    assert made.peak_bytes <= 0.8 * made.limit + MIB


def test_features_that_are_not_kept_cost_passes_over_the_images(data):
    """Without kept features there is no extraction and no disk for it, and PCA holds the buffers of convolution."""
    kept, again = (plan(data, memory_limit="2GiB", keep_features=keep) for keep in (True, False))
    assert "extract" not in [stage.name for stage in again.stages]
    assert again.disk_bytes < kept.disk_bytes - 3000 * kept.n_features
    assert {"pixels", "layer 1 output"} <= set(again.stage("pca").claims) - set(kept.stage("pca").claims)
    assert "computed again in each pass" in str(again)
    assert "kept on disk" in str(kept)


def test_features_are_not_kept_where_the_disk_is_too_small(data, monkeypatch):
    """`auto` keeps them when they fit with a tenth to spare; asked to keep them all the same, the disk is named with a table."""
    made = plan(data, memory_limit="2GiB")
    free = SimpleNamespace(free=made.disk_bytes, total=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    assert not plan(data, memory_limit="2GiB").keep_features
    free.free = made.disk_bytes - 1
    with pytest.raises(StoreError, match=r"free and the store needs[\s\S]*keep_features=False[\s\S]*extract[\s\S]*project"):
        plan(data, memory_limit="2GiB", keep_features=True)
    free.free = int(1.2 * made.disk_bytes)
    assert plan(data, memory_limit="2GiB").keep_features


def test_a_disk_that_fills_up_stops_the_run_before_the_stage(data, tmp_path, monkeypatch):
    """Free space is looked at again when a stage begins; what is finished stays."""
    real, calls = shutil.disk_usage, []

    def shrinking(folder):
        calls.append(folder)
        return SimpleNamespace(free=0, total=1 << 40) if (tmp_path / "store" / "stages" / "pca.h5").exists() else real(folder)

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    with pytest.raises(StoreError, match="free and the store needs"):
        StreamCNNClassifier(memory_limit="2GiB", store=tmp_path / "store", kernel="linear", C=0.1, random_state=0).fit(data)
    assert (tmp_path / "store" / "features" / "00000.h5").exists()
    assert not list((tmp_path / "store" / "reduced").iterdir())
    monkeypatch.undo()
    resumed = StreamCNNClassifier(memory_limit="2GiB", store=tmp_path / "store", kernel="linear", C=0.1, random_state=0).fit(
        data, resume=True
    )
    assert {"filters", "extract", "pca"} <= set(resumed.report_.reused)


def test_the_table_for_people_and_for_notebooks(data):
    """Every stage with memory, disk, passes and its largest buffers; the HTML is a table of the same cells."""
    made = plan(data, memory_limit="2GiB")
    text, page = str(made), made._repr_html_()
    for stage in made.stages:
        assert re.search(rf"^{stage.name} ", text, re.MULTILINE)
        assert f">{stage.name}</td>" in page
    assert "planned peak" in text
    assert f"{made.chunk_size} images a chunk" in page
    assert page.count("<tr>") == 1 + len(made.stages)
    # a notebook would push all of it to the right; and what a prompt shows is the table too
    assert page.count('<td style="text-align:left">') == 2 * len(made.stages) and repr(made) == text
    assert page.count('<td style="text-align:right; white-space:nowrap">') == 3 * len(made.stages)


def test_the_result_of_transform_and_of_predicting_is_planned(data):
    """An array of features or of decisions that does not fit is refused before anything is computed."""
    features = ConvFeatures([ConvLayer(8, 5, filters="random", pool=None)], memory_limit="1GiB", random_state=0).fit(wide(100, (40, 40)))
    with pytest.raises(MemoryBudgetError, match=r"stage transform[\s\S]*largest of its own buffers is feature rows"):
        features.transform(wide(100_000, (40, 40)))
    assert features.transform(wide(50, (40, 40))).shape == (50, 36 * 36 * 8)
    classifier = StreamCNNClassifier(memory_limit="1GiB", kernel="linear", C=0.1, random_state=0).fit(data)
    with pytest.raises(MemoryBudgetError, match=r"stage predict[\s\S]*largest of its own buffers is result"):
        classifier.decision_function(wide(40_000_000, (40, 40)))


def test_the_sample_of_images_that_filters_are_scaled_on_is_planned():
    """`ConvFeatures.fit` reads at least 16 images of any size: what does not fit is refused before they are read."""
    with pytest.raises(MemoryBudgetError, match=r"stage filters[\s\S]*buffers is sample of images\n"):
        ConvFeatures([ConvLayer(4, 3, filters="random")], memory_limit="600MiB").fit(wide(20, (5000, 5000)))


def test_the_disk_looked_at_is_the_disk_written_to(data, monkeypatch, tmp_path):
    """A first choice that cannot be written is passed over by plan and run alike."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(files, "scratch_parents", lambda: [tmp_path / "file" / "x", Path("/proc/nothing"), tmp_path / "good"])
    seen = []
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: seen.append(folder) or real(folder))
    plan(data, memory_limit="2GiB")
    assert seen[-1] == tmp_path
    assert files.scratch_folder().parent == tmp_path / "good"


def test_added_claims_of_one_name_add_up():
    """Two parts that call a buffer the same do not hide each other."""
    assert added({"HDF5": 1, "x": 2}, {"HDF5": 3}, {"none": 0}) == {"HDF5": 4, "x": 2}


def test_unknown_parameters_are_refused(data):
    """As `fit` refuses them."""
    with pytest.raises(ParameterError, match="preset must be one of"):
        plan(data, preset="fastest")
    with pytest.raises(ParameterError, match="parameters must be those of StreamCNNClassifier, got n_component: "):
        plan(data, n_component=3)
    assert plan(data, random_state=3, verbose=1).peak_bytes > 0


def test_automatic_components_are_those_with_variance():
    """n images about their mean span n - 1 directions: the last eigenvalue would be rounding, and costs a slower solver."""
    assert [resolve_components("auto", n, 2400) for n in (1, 2, 200, 257, 300)] == [1, 1, 199, 256, 256]
    assert resolve_components("auto", 300, 12) == 12 and resolve_components(200, 200, 2400) == 200
