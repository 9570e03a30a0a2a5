"""The search of presets and sizes: what it tries, what it takes for how long, what it keeps."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import result, run

from streamcnn import ConvLayer, FeatureStore, StreamCNNClassifier, candidates, cli, commandparts, commands, load_model, open_images, search
from streamcnn.candidates import Candidate, Trial, ladder, parse_seconds, stage_work
from streamcnn.errors import DataError, MemoryBudgetError, ParameterError
from streamcnn.layers import layer_to_dict
from streamcnn.memory import MemoryMonitor
from streamcnn.presets import resolve_settings
from streamcnn.progress import Progress
from streamcnn.selection import stratified_sample
from streamcnn.subset import SubsetSource

SMALL = (("fast", {"n_filters": 1, "kernel_size": 8}, {}), ("fast", {"n_filters": 8}, {}), ("lee2017", {}, {}))
"""A ladder of seconds; digits are too small for its last rung."""


@pytest.fixture
def some(digits):
    """300 digits as a source."""
    return open_images(digits[0][:300], digits[1][:300])


@pytest.fixture
def faked(monkeypatch):
    """A search in which trials and time are made up: a function of (n, seconds, {name: (accuracy, seconds of 1,000 images)}); of several
    accuracies each is that of a further split, the last one of all further ones.

    Returns the search and, in order, which candidate was tried on how many images; `held` has the rows that each trial held out,
    `loaded` the candidates whose kernels were loaded.
    """

    def go(n, seconds, facts, unfit=(), loading=0.0):
        go.held, go.loaded = [], []
        clock, tried, done, largest = [0.0], [], {}, min(n, 16_000) * 4 // 5

        def try_(settings, source, train, held, *rest):
            if settings.preset in unfit:
                raise MemoryBudgetError("memory_limit is too small")
            tried.append((settings.preset, train.n_samples))
            accuracy, cost = facts[settings.preset]
            done[settings.preset] = before = done.get(settings.preset, -1) + (train.n_samples == largest)
            took = cost * train.n_samples / 1000
            clock[0] += took
            go.held.append(held._rows.tolist())
            accuracy = accuracy[max(0, min(before, len(accuracy) - 1))] if isinstance(accuracy, tuple) else accuracy
            return Trial(train.n_samples, held.n_samples, accuracy, {"extract": took}, lambda n: {"extract": n}), 7

        def load(settings, *rest):
            clock[0] += loading
            go.loaded.append(settings.preset)
            return loading

        monkeypatch.setattr(search, "_try", try_)
        monkeypatch.setattr(search, "_load_kernels", load)

        def perf_counter():
            clock[0] += 1e-6
            return clock[0]

        monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=perf_counter))
        monkeypatch.setattr(search, "make_plan", lambda *a: None)
        source = open_images(np.zeros((n, 2, 2), np.uint8), np.arange(n) % 2)
        names = [Candidate(name, {}, {}, SimpleNamespace(preset=name, seed=0)) for name in facts]
        found = search.search_settings(source, names, 1 << 40, seconds, Progress(0), MemoryMonitor(), None)
        return found, tried

    return go


def test_a_subset_is_the_rows_of_its_source(digits):
    """Images, labels and names of a subset are those of its rows, its classes only those they have, and other rows are other data."""
    images, labels = digits
    source, rows = open_images(images, labels), np.array([0, 1, 2, 10, 500, 1796])
    part = SubsetSource(source, rows)
    for chunk in (1, 4, 6):
        assert (np.concatenate([pixels.copy() for pixels, _ in part.iter_chunks(chunk)]) == images[rows]).all()
    assert (part.classes_[part.labels] == labels[rows]).all()
    assert part.classes_.tolist() == sorted(set(labels[rows].tolist()))
    assert part.fingerprint() == SubsetSource(source, rows).fingerprint()
    zeros = [np.flatnonzero(labels == 0)[[0, row]] for row in (1, 2)]  # equally many, of equal labels
    assert len({SubsetSource(source, rows).fingerprint() for rows in zeros}) == 2
    for wrong in ([1, 0], [1, 1], [-1, 2], [5, 1797], [], [0.5], [[1, 2]], labels == 3):
        with pytest.raises(ParameterError, match=r"rows must be ascending row numbers from 0 to 1796, none twice, got "):
            SubsetSource(source, wrong)


def test_times(some):
    """A time is a number of seconds or has a unit, and anything else is refused with what it should be."""
    assert [parse_seconds(text) for text in (90, "90", "90s", "15min", "1.5h", " 2 min ")] == [90, 90, 90, 900, 5400, 120]
    for wrong in ("0s", "-1", "soon", "5 days", "", None):
        with pytest.raises(ParameterError, match='must be a positive time such as "90s"'):
            parse_seconds(wrong)


def planned(kernel="linear", width=256, features=2400, solver="covariance", keep=True):
    """What `stage_work` looks at of a plan."""
    return SimpleNamespace(kernel=kernel, n_features=features, n_components=width, pca_solver=solver, keep_features=keep)


@pytest.mark.parametrize(
    ("preset", "parameters", "plan", "trials"),
    [
        # one thread, 2,400 features, 256 components
        (
            "fast",
            {},
            planned("rbf"),
            {800: (0.7, 0.08, 1.2, 0.03, 0.43), 4000: (1.3, 0.32, 1.3, 0.09, 12.6), 10000: (2.0, 1.2, 2.7, 0.34, 27.4)},
        ),
        ("fast", {}, planned(), {800: (0.5, 0.07, 1.1, 0.03, 0.3), 4000: (1.1, 0.32, 1.4, 0.1, 0.5), 10000: (1.5, 0.77, 1.9, 0.23, 1.1)}),
        (
            *("fast", {}, planned("nystroem")),
            {800: (0.58, 0.07, 1.2, 0.03, 1.8), 4000: (1.1, 0.32, 1.1, 0.08, 9.3), 10000: (1.1, 0.78, 2.1, 0.2, 16.4)},
        ),
        (
            *("patches", {"n_filters": 400, "mirror": False}, planned(width=3200, features=3200, solver=None)),
            {800: (0.47, 0.41, None, None, 1.3), 4000: (1.2, 2.0, None, None, 2.9), 10000: (1.4, 4.6, None, None, 6.2)},
        ),
        (
            *("fast", {"n_filters": 192}, planned("rbf", features=9600, solver="randomized")),
            {800: (0.42, 0.25, 1.6, 0.1, 0.53), 4000: (1.1, 1.1, 5.6, 0.35, 9.2), 10000: (1.1, 2.7, 8.4, 0.93, 16.4)},
        ),
        (
            *("lee2017", {}, planned("rbf", features=800, solver="incremental")),
            {800: (0.05, 0.05, 0.2, 0.01, 0.07), 4000: (0.05, 0.21, 1.2, 0.04, 2.2), 10000: (0.06, 0.54, 3.1, 0.08, 13.0)},
        ),
    ],
    ids=lambda value: getattr(value, "kernel", None),
)
def test_expected_seconds(preset, parameters, plan, trials):
    """From the stages' seconds on 800 and on 4,000 images of CIFAR-10 those on 10,000 follow within a factor of 2, and of 1.4."""
    (settings,) = [c.settings for c in ladder(preset) if c.parameters == parameters]
    candidate, n_classes = Candidate(preset, parameters, {}, settings), 10
    assert candidate.expected_seconds(10_000) == 0
    stages = ("filters", "extract", "pca", "project", "svm")
    measured = {n: {stage: s for stage, s in zip(stages, seconds) if s is not None} for n, seconds in trials.items()}
    took = sum(measured.pop(10_000).values())
    for (n, seconds), factor in zip(measured.items(), (2.0, 1.4)):
        candidate.trials.append(Trial(n, 0, 0.5, seconds, partial(stage_work, settings, plan, n_classes)))
        assert took / factor < candidate.expected_seconds(10_000) < took * factor
        assert candidate.expected_seconds(n) == pytest.approx(sum(seconds.values()))


def test_work_grows_as_the_stages_do():
    """Convolving and projecting with the images, and so does PCA where each pass convolves again; an exact RBF SVM with their square, but
    for choosing C and gamma, which is done on a sample; landmarks with the images, once these are more than the landmarks."""

    def grown(before, then, plan, preset="fast", **parameters):
        first, second = (stage_work(resolve_settings(preset, **parameters), plan, 10, n) for n in (before, then))
        return {stage: second[stage] / first[stage] for stage in first}

    for plan in (planned(), planned("rbf"), planned("nystroem", keep=False)):
        found = grown(5000, 20_000, plan)
        assert found["extract"] == found["project"] == 4 and found["filters"] == 1
    for solver in ("covariance", "randomized"):
        assert grown(5000, 20_000, planned(solver=solver, keep=False))["pca"] == 4
        assert 1 < grown(5000, 20_000, planned(solver=solver))["pca"] < 3
    assert grown(1000, 20_000, planned("rbf"), C=1.0, gamma=1.0)["svm"] == 400
    assert 80 < grown(1000, 20_000, planned("rbf"))["svm"] < 100
    assert 10 < grown(10_000, 500_000, planned("nystroem"))["svm"] < 50
    assert 25 < grown(10_000, 500_000, planned("nystroem"), C=1.0, gamma=1.0)["svm"] < 50
    # wide rows, then as before with the products of their features
    assert 2 < grown(2000, 10_000, planned(width=3200, features=3200, solver=None), "patches")["svm"] < 4
    # 2,048 landmarks are not yet there
    assert grown(500, 1000, planned("nystroem"), C=1.0, gamma=1.0)["svm"] > 4


def test_the_ladder_has_every_preset_and_keeps_what_is_asked_for():
    """Each preset is tried, patches with and without mirror images; parameters given are in all, and what they make equal is tried once."""
    rungs = ladder(None, 2, 5)
    assert [c.preset for c in rungs if not c.parameters] == ["fast", "faces", "lee2017"]
    assert {(c.settings.layers[0].n_filters, c.settings.mirror) for c in rungs if c.preset == "patches"} == {
        (n, mirror) for n in (400, 800, 1600) for mirror in (False, True)
    }
    assert {(c.settings.n_jobs, c.settings.seed) for c in rungs} == {(2, 5)}
    assert {c.settings.C for c in ladder(C=7.0)} == {7.0}
    assert {c.preset for c in ladder("patches")} == {"patches"}
    assert len(ladder("fast", layers=ConvLayer(3))) == 1
    assert [c.parameters for c in ladder("patches", mirror=True)] == [{"n_filters": n} for n in (400, 800, 1600)]
    arguments = cli.build_parser().parse_args(["fit", "d", "--model", "m.h5", "--preset", "patches"])
    mirrored = [c.settings.mirror for c in ladder("patches", **commandparts.parameters_of(arguments))]
    assert mirrored == [False, True, False, True, False, True]
    with pytest.raises(ParameterError, match="preset must be one of"):
        ladder("slow")


def test_loading_kernels_takes_no_time_from_trials(faked):
    """Where each candidate's kernels take as long as all the time there is, as many are tried as where they take none."""
    facts = {"a": (0.5, 1), "b": (0.9, 1)}
    found, tried = faked(20_000, 1000, facts, loading=1000)
    assert tried == faked(20_000, 1000, facts)[1] and found.result["seconds"] < 1000


@pytest.mark.parametrize("preset", ["fast", "faces", "lee2017"])
def test_kernels_are_loaded_by_a_fit_that_takes_little_else(preset, some, monkeypatch):
    """One filter, normalised where the candidate's are, behind its preprocessing; its seconds are told, its errors not; none is made where
    the kernels are there already."""
    clock, fitted, asked, pending = [10.0], [], [], [1]

    def fit(source, settings, *rest):
        clock[0] += 7
        fitted.append(settings)
        raise DataError("this is for the trial to say")

    def kernels_of(device):
        return SimpleNamespace(pending_bytes=lambda preprocess, normed: asked.append((preprocess, normed)) or pending[0])

    monkeypatch.setattr(search, "fit_model", fit)
    monkeypatch.setattr(search, "get_kernels", kernels_of)
    monkeypatch.setattr(search, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    settings = resolve_settings(preset)
    assert search._load_kernels(settings, some, 1 << 30, MemoryMonitor()) == 7
    normed = preset == "fast"
    assert asked == [(settings.preprocess, normed)]
    (layer,) = fitted[0].layers
    assert (layer.n_filters, layer.patch_norm is not None, fitted[0].preprocess) == (1, normed, settings.preprocess)
    pending[0] = 0
    assert search._load_kernels(settings, some, 1 << 30, MemoryMonitor()) == 0 and len(fitted) == 1


def test_halving(faked):
    """All are tried on a small sample, the better half on four times as many images, and so on; the best of the last sample is kept."""
    found, tried = faked(20_000, 1e6, {"a": (0.5, 1), "b": (0.9, 1), "c": (0.7, 1), "d": (0.8, 1)})
    assert tried == [("a", 800), ("b", 800), ("c", 800), ("d", 800), ("b", 3200), ("d", 3200), ("b", 12800)]
    assert found.settings.preset == "b"
    assert found.result["chosen"] == {"preset": "b", "parameters": {}, "accuracy": 0.9, "n_held_out": 3200}
    assert found.verdict == "chosen of 4 tried: b (as it is), 90.00 % of 3200 held-out images"
    assert [row["n_images"] for row in found.result["tried"] if row["preset"] == "b"] == [800, 3200, 12800]
    few = replace(found, result=found.result | {"chosen": found.result["chosen"] | {"n_held_out": 100}})
    assert few.verdict.endswith("90.00 % of 100 held-out images; of so few, differences below some 6 points may be luck")
    assert found.result["planned_peak_bytes"] == 7


def test_of_equals_the_cheaper_is_kept(faked):
    """Of two with the same accuracy the one that comes first, as the cheaper do, is kept, in every round."""
    found, tried = faked(20_000, 1e6, {"a": (0.9, 1), "b": (0.9, 2), "c": (0.9, 3)})
    assert found.settings.preset == "a"
    assert tried[3:] == [("a", 3200), ("b", 3200), ("a", 12800)]
    found, tried = faked(2000, 1e6, {"a": (0.9, 1), "b": (0.9, 2)})
    assert tried == [("a", 1600), ("b", 1600)] * 5
    assert found.settings.preset == "a"


def test_what_luck_may_have_ordered_is_compared_on_further_images(faked):
    """In the time that is left those close to the best are tried with other fifths held out, the same ones for each and in every search,
    and the mean decides; the table has all images held out. What falls behind is not tried further, and never kept."""
    # of 400 images 3 points may be luck, of 800 2.2: b is then ahead for good
    facts = {"a": ((0.9, 0.82), 1), "b": (0.89, 1), "c": (0.8, 1), "d": ((0.88, 0.84, 1.0), 1)}
    found, tried = faked(2000, 1e6, facts)
    held = list(faked.held)
    assert [name for name, _ in tried] == ["a", "b", "c", "d", "a", "b", "d"]
    assert found.result["chosen"] == {"preset": "b", "parameters": {}, "accuracy": 0.89, "n_held_out": 800}
    rows = {row["preset"]: (row["n_held_out"], round(row["accuracy"], 4)) for row in found.result["tried"]}
    assert rows == {"a": (800, 0.86), "b": (800, 0.89), "c": (400, 0.8), "d": (800, 0.86)}
    assert held[0] == held[1] != held[4] == held[5]
    assert faked(2000, 1e6, facts)[1] == tried and faked.held == held
    # 3.2 s of 10 for both on a fifth: time for two more; for one more where they take 4.8 s, and for none in 6 s
    assert len(faked(2000, 20, {"a": (0.9, 1), "b": (0.89, 1)})[1]) == 6
    assert len(faked(2000, 20, {"a": (0.9, 2), "b": (0.89, 1)})[1]) == 4
    assert len(faked(2000, 12, {"a": (0.9, 1), "b": (0.89, 1)})[1]) == 2
    # only what went furthest
    assert len(faked(20_000, 1e6, {"a": (0.9, 1), "b": (0.89, 1)})[1]) == 4


def test_what_would_not_end_in_time_is_left_out(faked):
    """Half of the time is for the fit of all images; the best candidate is not kept when its fit is expected to take longer."""
    # 1,000 s for 20,000 images against 500 s; the quick one takes 20 s
    found, _ = faked(20_000, 1000, {"quick": (0.5, 1), "good": (0.9, 50)})
    assert found.settings.preset == "quick"
    (left_out,) = [row for row in found.result["tried"] if row["skipped"]]
    assert left_out["skipped"] == "a fit of all 20000 images would take about 1000 s"


def test_the_search_ends_in_time(faked):
    """No trial starts that would end after its sample's share of half the time, but for the first; at worst the quickest is kept."""
    found, tried = faked(3000, 10, {"a": (0.5, 1), "b": (0.6, 1), "c": (0.7, 1), "d": (0.8, 1), "e": (0.9, 1)})
    # 2.4 s each, of 5 s: nothing is known of the third, but that it takes as long as the first
    assert [name for name, _ in tried] == ["a", "b"]
    assert [row["skipped"] for row in found.result["tried"] if row["preset"] == "c"] == ["no time left to try it on 2400 images"]
    assert found.settings.preset == "b"
    found, tried = faked(3000, 1e-7, {"a": (0.5, 1), "b": (0.6, 1)})
    assert tried == [("a", 2400)] and not faked.loaded
    assert found.settings.preset == "a"
    assert found.verdict == "taken without comparison, as nothing else was tried: a (as it is), 50.00 % of 600 held-out images"


def test_what_does_not_fit_is_skipped_and_said_so(faked):
    """A candidate that the memory limit refuses is left out with the reason; when all are refused the search is, by that error."""
    found, _ = faked(2000, 1e6, {"a": (0.5, 1), "b": (0.9, 1)}, unfit=("b",))
    assert found.settings.preset == "a"
    assert [row["skipped"] for row in found.result["tried"]] == [None, "memory_limit is too small"]
    with pytest.raises(MemoryBudgetError, match="too small"):
        faked(2000, 1e6, {"a": (0.5, 1)}, unfit=("a",))


def test_a_long_reason_is_one_short_line_of_the_table():
    """The table shortens it, the JSON object has all of it."""
    row = Candidate("a", {}, {}, None, [], "too " + "large " * 50).rows()[0]
    assert len(candidates.line(row)) < 140
    assert candidates.line(row).endswith(" ...)")
    assert len(row["skipped"]) > 300


def test_all_images_are_planned_first(some, monkeypatch):
    """Settings whose plan passes the limit for all images are not tried, even where a sample would fit; with the plan's reason."""

    def make_plan(source, settings, *rest):
        if source is some and settings.layers[0].n_filters == 8:
            raise MemoryBudgetError("too much for all images")
        return planned(source, settings, *rest)

    planned = search.make_plan
    monkeypatch.setattr(candidates, "LADDER", SMALL[:2])
    monkeypatch.setattr(search, "make_plan", make_plan)
    with MemoryMonitor() as monitor:
        found = search.search_settings(some, ladder(n_jobs=1), 1 << 40, 600, Progress(0), monitor)
    assert [row["skipped"] for row in found.result["tried"]] == [None, "too much for all images"]


def test_a_trial_is_the_fit_of_its_rows(some, digits, monkeypatch):
    """The accuracy of a trial is that of the classifier on the same rows; a search made twice finds the same; too small images are said."""
    monkeypatch.setattr(candidates, "LADDER", SMALL)
    found, again = (search.search(*(part[:300] for part in digits), random_state=4, seconds="1h", n_jobs=1) for _ in range(2))
    rows, held_out = search.stratified_sample(some.labels, 10, 4, 300, least=5)
    assert 50 <= held_out.sum() <= 60  # a fifth of each class, rounded down
    images, labels = digits
    classifier = StreamCNNClassifier(**found.keywords).fit(images[rows[~held_out]], labels[rows[~held_out]])
    accuracy = classifier.score(images[rows[held_out]], labels[rows[held_out]])
    assert found.result["chosen"] == {"preset": "fast", "parameters": {"n_filters": 8}, "accuracy": accuracy, "n_held_out": held_out.sum()}
    without_time = [[{**row, "seconds": 0} for row in f.result["tried"]] for f in (found, again)]
    assert without_time[0] == without_time[1]
    assert "kernel_size of 5 x 5 is larger" in str(found).splitlines()[-2]


def test_too_few_images():
    """Where no image of two classes can be held out the search is refused."""
    with pytest.raises(DataError, match="needs 2 classes of 2 images at least, got 3 images"):
        search.search(np.zeros((3, 8, 8), np.uint8), [0, 1, 1])


def test_fit_searches_once(digits, tmp_path, monkeypatch):
    """fit --search fits what it found; interrupted after the search, the same command goes on without a second one, and other data or a
    made-up store are searched afresh."""
    monkeypatch.setattr(candidates, "LADDER", SMALL)
    np.savez(tmp_path / "d.npz", images=digits[0][:300], labels=digits[1][:300])
    fit = ["fit", tmp_path / "d.npz", "--model", tmp_path / "m.h5", "--store", tmp_path / "store", "--threads", "1", "--json"]
    fit += ["--memory-limit", "1GiB", "--search", "10min"]
    with monkeypatch.context() as patched:
        patched.setattr(commands, "fit_model", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt("stopped")))
        assert "n_filters 8" in run(*fit, code=130).stderr
    with monkeypatch.context() as patched:
        patched.setattr(search, "search_settings", lambda *a: pytest.fail("searched again"))
        done = run(*fit, "--resume")
    report = result(done)
    assert report["search"]["reused"]
    assert "finished before" in done.stderr
    assert " planned; data " in done.stderr
    assert report["search"]["chosen"]["parameters"] == {"n_filters": 8}
    assert {"preset", "parameters", "n_images", "n_held_out", "accuracy", "seconds", "skipped"} == set(report["search"]["tried"][0])
    assert not report["resumed"]
    (chosen,) = [c for c in ladder(n_jobs=1) if c.parameters == {"n_filters": 8}]
    model = load_model(tmp_path / "m.h5")
    assert model.header["settings"]["layers"] == [json.loads(json.dumps(layer_to_dict(layer))) for layer in chosen.settings.layers]
    # stages too are those of the first
    assert set(result(run(*fit))["reused"]) == {"filters", "extract", "pca", "project", "svm"}
    with FeatureStore(tmp_path / "store") as store:
        store.lock()
        entry = next(e for e in store.entries if e.get("stage") == "search")
        store.finish("search", entry["digest"], number=99, result={})
    done = run(*fit)
    report = result(done)
    assert not report["search"]["reused"]
    assert " planned (search included); data " in done.stderr
    assert report["search"]["seconds"] > 0
    assert report["peak_rss_bytes"] <= report["planned_peak_bytes"] <= 1 << 30
    assert result(run(*fit[:-2]))["search"] is None


def test_the_fifths_held_out_have_no_image_in_common():
    """The five fifths of one sample are disjoint, of each class equally many, and of a class of two images only two of them have one."""
    codes = np.repeat([0, 1, 2], [500, 100, 2])
    parts = [stratified_sample(codes, 3, 7, 300, least=5, fifth=fifth) for fifth in range(5)]
    rows = parts[0][0]
    assert all((of == rows).all() for of, _ in parts)
    held = np.sum([held_out for _, held_out in parts], axis=0)
    assert held.max() == 1
    assert [np.bincount(codes[rows[held_out]], minlength=3).tolist() for _, held_out in parts] == [[49, 9, i < 2] for i in range(5)]
