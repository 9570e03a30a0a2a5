"""What people see while a run goes on: nothing, plain lines, or bars."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from streamcnn import ConvLayer, MemoryMonitor, StreamCNNClassifier, progress
from streamcnn.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_there_are_plain_lines(clock, capsys):
    """At the start, after two seconds, then every ten, and at the end: how much of how many, speed, time left, memory against limit."""
    monitor = MemoryMonitor("1GiB")
    monitor.trace = [(0.0, "extract", 300 << 20)]
    with Progress(1, monitor).bar("extract", 50_000) as update:
        for clock.now, n in ((101.0, 1000), (102.0, 9000), (105.0, 5000), (111.9, 5000), (112.0, 4000), (113.0, 26_000)):
            update(n)
    assert capsys.readouterr().err.split("\n") == [
        "extract : starts, 50,000 images",
        "extract : 10,000 of 50,000 images, 5,000 a second, 8 s left, memory 300.0 MiB/1.0 GiB",
        "extract : 24,000 of 50,000 images, 2,000 a second, 13 s left, memory 300.0 MiB/1.0 GiB",
        "extract : 50,000 images in 13.0 s, 3,846 a second, memory 300.0 MiB/1.0 GiB",
        "",
    ]


def test_one_image_is_no_images(clock, capsys):
    """A single thing is said in the singular."""
    with Progress(1).bar("predict", 1) as update:
        clock.now = 100.5
        update(1)
    assert capsys.readouterr().err.split("\n")[:2] == ["predict : starts, 1 image", "predict : 1 image in 0.5 s"]


def test_the_whole_at_once_is_one_line(clock, capsys):
    """What comes to its end in one long step has no line of progress just before its last one, and no speed: compiling may be in it."""
    with Progress(1).bar("filters", 48, "filters") as update:
        clock.now = 120.0
        update(48)
    assert capsys.readouterr().err.split("\n")[:2] == ["filters : starts, 48 filters", "filters : 48 filters in 20.0 s"]


def test_a_speed_is_told_where_it_says_something(clock, capsys):
    """Below 10 a second it has a decimal; what takes less than a tenth of a second has none."""
    with Progress(1).bar("extract", 9) as update:
        for clock.now, n in ((102.5, 1), (104.0, 8)):
            update(n)
    with Progress(1).bar("project", 2000, "rows") as update:
        for clock.now in (104.04, 104.09):
            update(1000)
    assert capsys.readouterr().err.split("\n") == [
        "extract : starts, 9 images",
        "extract : 1 of 9 images, 0.4 a second, 20 s left",
        "extract : 9 images in 4.0 s, 2.2 a second",
        "project : starts, 2,000 rows",
        "project : 2,000 rows in 0.1 s",
        "",
    ]


def test_a_randomized_pca_has_no_total(digits, capfd):
    """It may end before its last planned pass, so there is no total that it would never reach."""
    layers = [ConvLayer(3, 3, filters="random", pool_size=2)]
    options = {"layers": layers, "kernel": "linear", "C": 0.1, "n_components": 8, "random_state": 0, "verbose": 1}
    StreamCNNClassifier(**options, pca_solver="randomized").fit(digits[0][:200], digits[1][:200])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pca ")]
    assert lines[0] == "pca     : starts"
    assert " rows read in " in lines[-1]


def test_a_bar_that_is_left_early_says_how_far_it_came(clock, capsys):
    """An interruption leaves a line with what was done; where the whole is not known there is no time left."""
    with pytest.raises(KeyboardInterrupt), Progress(1).bar("pca", 900, "rows") as update:
        clock.now = 101.0
        update(300)
        raise KeyboardInterrupt
    with Progress(1).bar("svm", None, "rows read") as update:
        for clock.now, n in ((103.0, 200), (104.0, 400)):
            update(n)
    assert capsys.readouterr().err.split("\n") == [
        "pca     : starts, 900 rows",
        "pca     : stopped after 300 of 900 rows, 1.0 s",
        "svm     : starts",
        "svm     : 200 rows read, 100 a second",
        "svm     : 600 rows read in 3.0 s, 200 a second",
        "",
    ]


@pytest.fixture
def in_notebook(monkeypatch):
    """IPython as a kernel has it; `get_ipython` may be set to something else."""
    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    return notebook


def test_a_notebook_gets_a_bar_that_moves(in_notebook):
    """In a kernel it is tqdm's bar, though standard error is no terminal."""
    from tqdm.auto import tqdm

    with progress._new_bar("extract", 10, "images") as bar:
        assert isinstance(bar, tqdm)
    in_notebook.get_ipython = lambda: SimpleNamespace()  # IPython in a terminal
    with progress._new_bar("extract", 10, "images") as bar:
        assert not isinstance(bar, tqdm)


def test_a_notebook_shows_nothing_in_red(in_notebook, capsys):
    """What people are told goes to standard output there, the bar without ipywidgets too: standard error looks like a mistake."""
    Progress(1).say("150 images")
    with progress._new_bar("extract", 10, "images") as bar:
        bar.update(10)
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("150 images\n") and "10.0/10.0" in out
    in_notebook.get_ipython = lambda: None
    Progress(1).say("150 images")
    assert capsys.readouterr() == ("", "150 images\n")


def test_a_silent_fit_is_silent_and_a_talking_one_begins_at_once(digits, capfd):
    """verbose=0 writes nothing; verbose=1 says what it is about to do before the first stage, and has a line for each stage with a bar."""
    images, labels = digits[0][:200], digits[1][:200]
    layers = [ConvLayer(3, 3, filters="random", pool_size=2)]
    options = {"layers": layers, "kernel": "linear", "C": 0.1, "n_components": 8, "random_state": 0}
    quiet = StreamCNNClassifier(**options).fit(images, labels)
    quiet.predict(images)
    assert capfd.readouterr() == ("", "")
    StreamCNNClassifier(**options, verbose=1).fit(images, labels)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("200 images of 8 x 8 x 1; 27 features an image")
    assert "planned peak" in err.splitlines()[0]
    assert [line.split()[0] for line in err.splitlines()[1:] if " in " in line] == ["filters", "extract", "pca", "project", "svm"]
    # many times each, as the SVM makes passes over them
    assert " rows read in " in err.splitlines()[-1]
    assert "\r" not in err
