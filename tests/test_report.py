"""`streamcnn report`: one page that needs nothing else, says what is measured, leaves out what is not there, and shows text as text."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamcnn import ConvLayer, FeatureStore, StreamCNNClassifier, load_model, open_images
from streamcnn.cli import main
from streamcnn.filters import similarity_bytes
from streamcnn.manifest import config_text
from streamcnn.memory import format_bytes
from streamcnn.recipe import command_line, python_code
from streamcnn.report import reading_claims
from streamcnn.runrecord import ordered_stages, read_record, read_trace
from streamcnn.subset import SubsetSource

LAYERS = [ConvLayer(4, 3, filters="random", pool_size=2), ConvLayer(3, 2, filters="random")]
FAST = {"layers": LAYERS, "kernel": "linear", "C": 0.1, "n_components": 6, "random_state": 0}
HOSTILE = '<img src=x onerror="alert(1)"> & $x^{$'
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
drawing = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib, extra `plot`, is not installed: nothing can be drawn")


def run(*arguments, code=0):
    """Run the command line; returns standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        returned = main([str(argument) for argument in arguments])
    assert returned == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def run_code(code, folder, **names):
    """Run Python code as a script that knows these names."""
    (folder / "script.py").write_text(code)
    runpy.run_path(str(folder / "script.py"), names)


class Page(HTMLParser):
    """A page's tags, attributes that load something, and text; fails where tags are not closed in order."""

    EMPTY = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text, self.open = {}, [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """A store fitted on files whose class names are hostile, a tree of test images, and the estimator."""
    folder = tmp_path_factory.mktemp("report")
    images, labels = digits
    names = np.array([HOSTILE, "plain", "été"])[labels % 3]
    for row in range(400, 500):
        # no file system takes all of these letters in a name
        path = folder / "test" / ("other" if labels[row] % 3 == 2 else "plain")
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row, :, :, 0]).save(path / f"{row}.png")
    estimator = StreamCNNClassifier(**FAST, store=folder / "store", memory_limit="4GiB").fit(images[:300], names[:300])
    np.savez(folder / "test.npz", images=images[300:500], labels=names[300:500])
    return folder, estimator


@pytest.fixture(scope="module")
def reported(made):
    """The report of that store with test images: the JSON object and the page."""
    folder, _ = made
    out, err = run("report", folder / "store", "--test", folder / "test.npz", "--memory-limit", "4GiB", "--json")
    assert "report  : starts" in err and f"report  : {len(json.loads(out)['pictures'])} pictures in" in err
    return json.loads(out), (folder / "store.html").read_text(encoding="utf-8"), err


@drawing
def test_the_page_is_whole_and_needs_nothing_else(made, reported):
    """All pictures inline, tags closed, no script, nothing loaded but data in the page itself, and a policy that says so."""
    result, text, _ = reported
    page = Page(text)
    expected = ["memory", "seconds", "filters of layer 1", "similarity in layer 1", "filters of layer 2", "similarity in layer 2"]
    assert result["pictures"] == [*expected, "spectrum", "confusion", "most confused", "most certain"]
    assert page.tags["svg"] == page.tags["figure"] == len(result["pictures"])
    assert result["left_out"] == []
    assert result["output"] == f"{made[0] / 'store.html'}"
    assert result["bytes"] == len(text.encode())
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "form", "img", "base"}
    assert page.loads
    assert all(re.match(r"data:image/png;base64,|#", value) for value in page.loads)
    assert "://" not in text
    assert "default-src 'none'" in text
    # ids that pictures refer to are there once
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.loads if value.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


@drawing
def test_times_and_shapes_are_as_people_write_them(reported):
    """When the last run ended is told like the time of the report, in UTC; the shape of images has no brackets."""
    text = Page(reported[1]).text
    assert re.search(r"Report of \d{4}-\d\d-\d\d \d\d:\d\d UTC\. Last run ended \d{4}-\d\d-\d\d \d\d:\d\d UTC\.", text)
    assert re.search(r"image shape\s*\d+ x \d+ x 1\D", text)


@drawing
def test_what_files_say_is_text(reported):
    """A class name that is markup, and to matplotlib a formula, appears as it is, in pictures shortened."""
    _, text, _ = reported
    page = Page(text)
    assert HOSTILE in page.text
    assert "<img" not in text
    assert f"{HOSTILE[:6]}…{HOSTILE[-7:]}" in page.text
    assert "été" in page.text


@drawing
def test_the_figures_are_those_of_the_run(made, reported):
    """Accuracy, seconds, planned and measured peak of every stage, and the limit: as the estimator and the store have them."""
    folder, estimator = made
    result, text, _ = reported
    with np.load(folder / "test.npz") as data:
        accuracy = estimator.score(data["images"], data["labels"])
    assert result["accuracy"] == accuracy
    assert result["n_test"] == 200
    cells = re.sub(r"<[^>]*>", "|", text)
    assert f"{100 * accuracy:.2f} %" in cells
    record, plan = read_record(folder / "store"), estimator.report_.plan
    assert (record["limit_bytes"], record["planned_bytes"]) == (4 << 30, plan.peak_bytes)
    assert record["peak_bytes"] == estimator.peak_rss_bytes_
    stages = ordered_stages(record)
    assert [name for name, _ in stages] == ["filters", "extract", "pca", "project", "svm", "save"]
    for name, stage in stages:
        assert stage["planned_bytes"] == plan.planned(name) >= stage["peak_bytes"] > 0
        assert stage["seconds"] == estimator.report_.stage_seconds.get(name)
        assert stage["claims"] == plan.stage(name).claims
        spent = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
        assert f"|{name}||{spent}||{format_bytes(stage['planned_bytes'])}||{format_bytes(stage['peak_bytes'])}|" in cells
    assert result["peak_rss_bytes"] <= result["planned_peak_bytes"] <= result["memory_limit_bytes"] == 4 << 30
    assert set(result["stage_peak_bytes"]) == {"evaluate", "report"}
    drawing = sum(reading_claims(FeatureStore(folder / "store")).values())
    assert result["stage_planned_bytes"]["report"] > result["base_bytes"] + drawing


@drawing
def test_what_is_not_there_is_left_out_and_named(tmp_path):
    """A store of the first version remembers no run and has no test images: its filters and spectrum are drawn, the rest is named."""
    shutil.copytree(Path(__file__).parent / "archive/v1/store", tmp_path / "old")
    out, err = run("report", tmp_path / "old", "--output", tmp_path / "old page.html", "--json")
    result = json.loads(out)
    assert result["pictures"] == ["filters of layer 1", "similarity in layer 1", "spectrum"]
    assert result["accuracy"] is result["n_test"] is None
    for missing in ("remembers no run", "no memory trace", "no seconds of stages", "give them with --test"):
        assert [note for note in result["left_out"] if missing in note]
        assert missing in Page((tmp_path / "old page.html").read_text(encoding="utf-8")).text
    assert err.count("left out: ") == len(result["left_out"])
    assert "holds no finished model for --test" in run("report", tmp_path / "old", "--test", tmp_path, code=1)[1]
    # not a fit at all
    with FeatureStore.create(tmp_path / "rows") as store:
        store.append(np.ones((5, 3), np.float32))
    run("report", tmp_path / "rows")
    assert "Rows that were written without a fit." in (tmp_path / "rows.html").read_text(encoding="utf-8")


@drawing
def test_an_unfinished_fit_has_a_report(tmp_path, digits, monkeypatch):
    """Interrupted in the SVM: what was done is measured, what is to come is planned, and how to go on is said."""
    from streamcnn import StreamingSVC

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(StreamingSVC, "fit", interrupt)
    classifier = StreamCNNClassifier(**FAST, store=tmp_path / "s")
    with pytest.raises(KeyboardInterrupt, match=r"keeps what is finished, and with resume=True \(--resume\) the same call goes on"):
        classifier.fit(digits[0][:200], digits[1][:200])
    stages = dict(ordered_stages(read_record(tmp_path / "s")))
    assert [name for name, stage in stages.items() if stage["finished"]] == ["filters", "extract", "pca", "project"]
    assert stages["svm"]["seconds"] > 0
    assert stages["save"]["peak_bytes"] is None
    run("report", tmp_path / "s")
    text = Page((tmp_path / "s.html").read_text(encoding="utf-8")).text
    assert "A fit that is not finished: the same command with --resume goes on from here." in text
    assert "not run yet" in text
    before = stages["svm"]["seconds"]
    monkeypatch.undo()
    finished = classifier.fit(digits[0][:200], digits[1][:200], resume=True)
    stages = dict(ordered_stages(read_record(tmp_path / "s")))
    assert all(stage["finished"] for stage in stages.values())
    # both parts of the stage that was interrupted count
    assert stages["svm"]["seconds"] == before + finished.report_.stage_seconds["svm"]
    with pytest.raises(KeyboardInterrupt, match=r"nothing is kept: with a folder for its store \(store=\) it could be resumed"):
        monkeypatch.setattr(StreamingSVC, "fit", interrupt)
        StreamCNNClassifier(**FAST).fit(digits[0][:200], digits[1][:200])


def test_reused_stages_keep_their_figures_and_additions_are_told(made, tmp_path, digits):
    """Another C: only the SVM's figures are new; images added: stages add and svm; a new fit without them: add is gone."""
    folder, _ = made
    shutil.copytree(folder / "store", tmp_path / "s")
    names = np.array([HOSTILE, "plain", "été"])[digits[1] % 3]
    before = dict(ordered_stages(read_record(tmp_path / "s")))
    classifier = StreamCNNClassifier(**FAST | {"C": 3.0}, store=tmp_path / "s").fit(digits[0][:300], names[:300])
    now = dict(ordered_stages(read_record(tmp_path / "s")))
    assert {name for name in before if now[name] != before[name]} == {"svm", "save"}
    classifier.partial_fit(digits[0][300:400], names[300:400])
    added = dict(ordered_stages(read_record(tmp_path / "s")))
    assert list(added) == ["filters", "extract", "pca", "project", "svm", "add", "save"]
    assert {name for name in now if now[name] != added[name]} == {"svm", "save"}
    assert added["add"]["seconds"] == classifier.report_.stage_seconds["add"]
    classifier.fit(digits[0][:300], names[:300])
    assert "add" not in read_record(tmp_path / "s")["stages"]
    page = FeatureStore(tmp_path / "s")._repr_html_()
    assert re.search(r"<th[^>]*>features</th><td[^>]*>300 rows of 12</td>", page)
    assert re.search(r"<th[^>]*>finished stages</th><td[^>]*>filters, extract, pca, project, svm</td>", page)
    assert re.search(r"<th[^>]*>unfinished stages</th><td[^>]*>none</td>", page)


@drawing
def test_an_evaluation_is_remembered_with_the_model_it_was_of(tmp_path, digits):
    """`fit --store --test`: the confusion matrix needs no images; another C is another model, whose accuracy nobody knows."""
    np.savez(tmp_path / "a.npz", images=digits[0][:200], labels=digits[1][:200])
    np.savez(tmp_path / "b.npz", images=digits[0][200:300], labels=digits[1][200:300])
    fit = ["fit", tmp_path / "a.npz", "--store", tmp_path / "s", "--model", tmp_path / "m.h5", "--json", "--kernel", "linear"]
    fit += ["--n-components", 8, "--memory-limit", "4GiB", "--threads", 1]
    result = json.loads(run(*fit, "--C", 0.1, "--test", tmp_path / "b.npz")[0])
    kept = read_record(tmp_path / "s")["evaluation"]
    assert (kept["accuracy"], kept["confusion"], kept["data"]) == (result["accuracy"], result["confusion"], str(tmp_path / "b.npz"))
    out, _ = run("report", tmp_path / "s", "--json")
    assert "confusion" in json.loads(out)["pictures"]
    assert ["confusion matrix" in note for note in json.loads(out)["left_out"]] == [False]
    assert dict(ordered_stages(read_record(tmp_path / "s")))["evaluate"]["seconds"] == result["stage_seconds"]["evaluate"]
    run(*fit, "--C", 0.1)
    assert read_record(tmp_path / "s")["evaluation"] == kept
    run(*fit, "--C", 5)
    assert "evaluation" not in read_record(tmp_path / "s")


def test_the_recipe_repeats_the_fit_to_the_bit(tmp_path, digits):
    """The command and the Python code that a store gives make the same arrays, from flags that are not the preset's."""
    np.savez(tmp_path / "it's data.npz", pixels=digits[0][:200].reshape(200, 64), names=digits[1][:200])
    options = ["--images-key", "pixels", "--labels-key", "names", "--image-size", "8x8", "--kernel", "linear", "--C", "0.3", "--seed", 7]
    options += ["--n-components", 10, "--feature-dtype", "float32", "--class-weight", "balanced", "--probability", "--threads", 1]
    run("fit", tmp_path / "it's data.npz", "--store", tmp_path / "s", "--model", tmp_path / "m.h5", *options)
    config, opened_with = FeatureStore(tmp_path / "s").config, read_record(tmp_path / "s")["opened_with"]
    command, note = command_line(config, opened_with, "2GiB")
    assert note == ""
    words = shlex.split(command)
    assert words[:2] == ["streamcnn", "fit"]
    with contextlib.chdir(tmp_path):
        assert main(words[1:]) == 0
    expected = load_model(tmp_path / "m.h5").to_arrays()
    for name, array in load_model(tmp_path / "model.h5").to_arrays().items():
        np.testing.assert_array_equal(array, expected[name])
    (tmp_path / "model.h5").unlink()
    with contextlib.chdir(tmp_path):
        run_code(python_code(config, opened_with, "2GiB"), tmp_path)
    for name, array in load_model(tmp_path / "model.h5").to_arrays().items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_fit_of_a_part_of_a_folder_remembers_how_its_files_were_read(tmp_path, digits):
    """The model of a part resizes as the folder was, and its store says in Python how it was made: the command line takes no rows."""
    for row in range(60):
        path = tmp_path / "t" / str(digits[1][row] % 2) / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[0][row, :, :, 0]).save(path)
    source = open_images(tmp_path / "t", image_shape=(12, 12))
    options = {"kernel": "linear", "C": 1.0, "random_state": 0, "memory_limit": "2GiB"}
    fitted = StreamCNNClassifier(**options, store=tmp_path / "s").fit(SubsetSource(source, range(0, 60, 2)))
    assert fitted.model_.reading_shape == (12, 12, 1) and len(fitted.predict(tmp_path / "t")) == 60
    config, opened_with = FeatureStore(tmp_path / "s").config, read_record(tmp_path / "s")["opened_with"]
    assert command_line(config, opened_with, None) == (None, "The command line has no flag for rows: use Python.")
    with contextlib.chdir(tmp_path):
        run_code(python_code(config, opened_with, None), tmp_path, rows=np.arange(0, 60, 2))
    again = load_model(tmp_path / "model.h5")
    assert (again.decision_function(tmp_path / "t") == fitted.decision_function(tmp_path / "t")).all()


def test_what_no_flag_says_is_said_in_python(digits, tmp_path):
    """Arrays, layers and weights of single classes have no flag; the Python code with them makes the same model."""
    images, labels = digits[0][:200], digits[1][:200]
    options = FAST | {"class_weight": {0: 2.0, 3: 0.5}, "preprocess": "standardize"}
    fitted = StreamCNNClassifier(**options, store=tmp_path / "s").fit(images, labels)
    config = FeatureStore(tmp_path / "s").config
    assert command_line(config, {"labels": True}, None) == (
        None,
        "The images were given as arrays, which the command line has no name for.",
    )
    in_files = config | {"source": {"path": "x"}}
    assert command_line(in_files, {}, None)[1] == "The command line has no flag for layers and preprocess: use Python."
    code = python_code(config, {"labels": True}, None)
    assert "images, labels = ...  # as they were given" in code
    with contextlib.chdir(tmp_path):
        run_code(code.replace("images, labels = ...", ""), tmp_path, images=images, labels=labels)
    for name, array in load_model(tmp_path / "model.h5").to_arrays().items():
        np.testing.assert_array_equal(array, fitted.model_.to_arrays()[name])


def test_a_record_that_is_damaged_or_made_up_is_as_if_it_were_not_there(made, tmp_path):
    """Wrong checksum, kinds, sizes, versions, no file at all: no error, no model changes, and nothing is done again."""
    folder, estimator = made
    path = tmp_path / "s"
    shutil.copytree(folder / "store", path)
    good = (path / "run.json").read_text()
    record = json.loads(good)
    assert read_record(path) is not None
    bad = [
        good.replace('"chunk_size": ', '"chunk_size": 1'),
        good[:-20],
        "[]",
        "{}",
        "null",
        '{"format": "streamcnn-run", "format_version": 1}',
    ]
    forged = [
        {"stages": []},
        {"stages": {"pca": {}}},
        {"limit_bytes": "1"},
        {"peak_bytes": -1},
        {"opened_with": {"a": {}}},
        {"format_version": 2},
    ]
    forged += [
        {"evaluation": {"digest": "", "data": "", "accuracy": 1, "n_test": 1, "unknown": 0, "classes": [0, 1], "confusion": wrong}}
        for wrong in ([[1, 2]], [[1, 2], [3]], [[1, 2], [3, -4]], [[1, 2], [3, 4.5]])
    ]
    forged += [{"machine": 3}, {"tightened": "yes"}, {"base_claims": {"a": "b"}}]
    for text in [*bad, *(config_text({k: v for k, v in record.items() if k != "crc"} | values) for values in forged)]:
        (path / "run.json").write_text(text)
        assert read_record(path) is None, text[:300]
    for text in (
        "",
        "seconds,stage\n",
        "seconds,stage,resident_bytes\n",
        "seconds,stage,resident_bytes\n1,a,-5\n",
        "\0\n",
        "seconds,stage,resident_bytes\nnan,a,5\n",
        "seconds,stage,resident_bytes\n1,a\n",
    ):
        (path / "memory.csv").write_text(text)
        assert read_trace(path) is None
    images = np.load(folder / "test.npz")["images"]
    decisions = estimator.decision_function(images)
    again = StreamCNNClassifier(**FAST, store=path)
    with np.load(folder / "test.npz") as data:
        again.fit(data["images"], data["labels"])
    assert read_record(path) is not None
    assert not np.array_equal(again.decision_function(images), decisions)  # trained on other images: the store went on working


def test_without_matplotlib_one_sentence_says_how_to_get_it(made, monkeypatch, tmp_path):
    """Exit code 1, no traceback, no file."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    _, err = run("report", made[0] / "store", "--output", tmp_path / "r.html", code=1)
    assert err == "streamcnn: drawing needs matplotlib, which is not installed: pip install matplotlib\n"
    assert not (tmp_path / "r.html").exists()


def test_what_drawing_takes_is_declared_from_the_store(made, tmp_path):
    """Similarities from the shapes of the filters drawn, the confusion matrix from the classes; never more than is ever drawn."""
    claims = reading_claims(FeatureStore(made[0] / "store"))
    assert claims["similarities"] == max(similarity_bytes((4, 3, 3, 1)), similarity_bytes((3, 2, 2, 4)))
    assert claims["confusion matrix"] == 256 * 3**2
    shutil.copytree(made[0] / "store", tmp_path / "s")
    (tmp_path / "s/stages/filters.h5").write_bytes(bytes(2 << 20))
    claims = reading_claims(FeatureStore(tmp_path / "s"))
    assert (claims["similarities"], claims["finished stages"]) == (64 << 20, 4 << 20)
    (tmp_path / "s/stages/filters.h5").unlink()
    assert reading_claims(FeatureStore(tmp_path / "s"))["similarities"] == 0


@drawing
def test_the_limit_that_a_refusal_names_is_enough_with_test_images_too(made, tmp_path):
    """Tests and pictures are planned together: the limit named does, where one after the other was refused before."""
    report = ["report", made[0] / "store", "--test", made[0] / "test.npz", "--output", tmp_path / "r.html", "--memory-limit"]
    _, err = run(*report, "20MiB", code=1)
    named = int(re.search(r"set memory_limit to at least (\d+)MiB", err)[1])
    run(*report, f"{named + 8}MiB")  # this process holds a little more by now


@drawing
def test_bad_input_is_one_line(made, tmp_path):
    """No store, an output in no folder, a limit that is too small, test images of another shape or without known classes."""
    folder, _ = made
    np.savez(tmp_path / "wide.npz", images=np.zeros((6, 8, 9), np.uint8), labels=["plain", "x"] * 3)
    np.savez(tmp_path / "unknown.npz", images=np.zeros((6, 8, 8), np.uint8), labels=["a", "b"] * 3)
    for arguments, text in (
        ([tmp_path / "none"], "no such folder"),
        ([folder / "store", "--output", tmp_path / "none" / "r.html"], "does not exist; create it first"),
        ([folder / "store", "--output", tmp_path / "wide.npz"], "which is no HTML page and so is not replaced"),
        ([folder / "store", "--memory-limit", "10MiB"], "stage report needs"),
        ([folder / "store", "--test", tmp_path / "wide.npz"], "images must be 8 x 8 x 1"),
        ([folder / "store", "--test", tmp_path / "unknown.npz"], "no class of these images is one the model knows"),
    ):
        _, err = run("report", *arguments, *(["--output", tmp_path / "r.html"] if "--output" not in arguments else []), code=1)
        assert text in err
        assert err.count("streamcnn: ") == 1
    assert not (tmp_path / "r.html").exists()


@drawing
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: how a browser lays the page out is not looked at")
def test_a_browser_shows_it_without_overflow_or_complaint(reported, tmp_path):
    """At desktop and phone width nothing is wider than the window, and the console stays empty."""
    text = reported[1]
    frames = "".join(f'<iframe width="{width}" height="900"></iframe>' for width in (1280, 390))
    script = """
    const frames = [...document.querySelectorAll("iframe")];
    Promise.all(frames.map(f => new Promise(done => { f.onload = done; f.srcdoc = text; }))).then(() => {
      document.title = JSON.stringify(frames.map(f => {
        const page = f.contentDocument, width = page.documentElement.clientWidth;
        const beyond = e => !e.closest(".wide, pre, svg") && e.getBoundingClientRect().right > width + 1;
        const wide = [...page.querySelectorAll("body *")].filter(beyond);
        return [page.documentElement.scrollWidth <= width, wide.length, page.querySelectorAll("svg").length];
      }));
    });
    """
    script = "const text = " + json.dumps(text).replace("</", "<\\/") + ";" + script
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frames}<script>{script}</script>", encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    options += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    assert json.loads(title[1]) == [[True, 0, 10], [True, 0, 10]]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
