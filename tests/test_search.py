"""The search of presets and sizes: what it tries, what it takes for how long, what it keeps."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_cli import result, run

from streamcnn import ConvLayer, FeatureStore, StreamCNNClassifier, candidates, cli, commandparts, commands, load_model, open_images, search
from streamcnn.candidates import Candidate, Trial, ladder, parse_seconds
from streamcnn.errors import DataError, MemoryBudgetError, ParameterError
from streamcnn.layers import layer_to_dict
from streamcnn.memory import MemoryMonitor
from streamcnn.progress import Progress
from streamcnn.subset import SubsetSource

SMALL = (("fast", {"n_filters": 1, "kernel_size": 8}, {}), ("fast", {"n_filters": 8}, {}), ("lee2017", {}, {}))
"""A ladder of seconds; digits are too small for its last rung."""


@pytest.fixture
def some(digits):
    """300 digits as a source."""
    return open_images(digits[0][:300], digits[1][:300])


@pytest.fixture
def faked(monkeypatch):
    """A search in which trials and time are made up: a function of (n, seconds, {name: (accuracy, seconds of 1,000 images)}).

    Returns the search and, in order, which candidate was tried on how many images.
    """

    def go(n, seconds, facts, unfit=(), loading=0.0):
        clock, tried = [0.0], []

        def try_(settings, source, train, held, *rest):
            if settings.preset in unfit:
                raise MemoryBudgetError("memory_limit is too small")
            tried.append((settings.preset, train.n_samples))
            accuracy, cost = facts[settings.preset]
            took = cost * train.n_samples / 1000
            clock[0] += took
            return Trial(train.n_samples, held.n_samples, accuracy, {"extract": took, "svm": 0.0}, False), 7

        def load(settings, *rest):
            clock[0] += loading
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


def test_times(some):
    """A time is a number of seconds or has a unit, and anything else is refused with what it should be."""
    assert [parse_seconds(text) for text in (90, "90", "90s", "15min", "1.5h", " 2 min ")] == [90, 90, 90, 900, 5400, 120]
    for wrong in ("0s", "-1", "soon", "5 days", "", None):
        with pytest.raises(ParameterError, match='must be a positive time such as "90s"'):
            parse_seconds(wrong)


def test_expected_seconds():
    """A fit of all images is expected on the line through two trials, convolving's slope at the least, an exact RBF SVM's square on top."""

    def of(*trials):
        return Candidate("fast", {}, {}, None, [Trial(n, 0, 0.5, stages, rbf) for n, stages, rbf in trials]).expected_seconds(10_000)

    assert of() == 0
    # 5 s whatever the number of images, and 1 s for each 1,000
    assert of((1000, {"extract": 1.0, "svm": 5.0}, False)) == 15
    assert of((1000, {"extract": 1.0, "svm": 5.0}, False), (4000, {"extract": 4.0, "svm": 11.0}, False)) == 15 + 6 * 3
    # noise made the second SVM quicker: not less than the convolution
    assert of((1000, {"extract": 1.0, "svm": 9.0}, False), (4000, {"extract": 4.0, "svm": 5.0}, False)) == 9 + 6
    assert of((1000, {"extract": 1.0, "svm": 0.5}, True)) == 10 + 50
    assert of((1000, {"extract": 1.0, "svm": 0.5}, True), (2000, {"extract": 2.0, "svm": 2.0}, True)) == 10 + 50


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
    assert len(tried) == 2
    assert found.settings.preset == "a"


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
    assert tried == [("a", 2400)]
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
    report = result(run(*fit))
    assert not report["search"]["reused"]
    assert report["search"]["seconds"] > 0
    assert report["peak_rss_bytes"] <= report["planned_peak_bytes"] <= 1 << 30
    assert result(run(*fit[:-2]))["search"] is None
