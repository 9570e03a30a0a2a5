"""The notebooks: each runs as it is in a fresh kernel, and what is shipped is what came out."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="nbclient, extra `test`, is not installed: notebooks are not run")
pytest.importorskip("ipykernel", reason="ipykernel, extra `test`, is not installed: notebooks are not run")
pytest.importorskip("matplotlib", reason="matplotlib, extra `plot`, is not installed: notebooks are not run")

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import run_notebooks

# what the cells have computed, looked at in the kernel after the last one
CHECKS = {
    "01_quickstart": """
        assert accuracy > 0.96 and same and not Path(scratch.name).exists()
        assert classifier.peak_rss_bytes_ < classifier.memory_limit_ == 1 << 30""",
    "02_larger_than_ram": """
        assert parse_bytes(DATA) > parse_bytes(LIMIT) == classifier.memory_limit_ > classifier.peak_rss_bytes_
        assert accuracy > 0.85 and same_bits and second.report_.reused == ["filters", "extract", "pca", "project"]
        n_images = classifier.model_.header["n_train"]
        assert sentence.startswith("the fit was interrupted; second.store keeps what is finished, and with resume=True")
        assert 0 < rows_kept < n_images == parse_bytes(DATA) // (2 * SIDE**2) and not scratch.exists()""",
    "03_paper": """
        assert abs(similarity - sums.max()) < 1e-6
        values = display.values_[~np.isnan(display.values_)]
        assert len(values) == 16 * 15 and values.max() <= 0.1
        # README: 100.00 +- 0.00 and 99.89 +- 0.15 % over ten seeds
        assert accuracy[2] > (0.995 if FACES else 0.8) and accuracy[3] > (0.99 if FACES else 0.2), accuracy""",
    "04_your_own_images": """
        assert accuracy > 0.95 and not Path(scratch.name).exists()
        assert found.result["chosen"]["accuracy"] > 0.9 and len(found.result["tried"]) >= 10
        truth = dict(zip([f"{i:04d}.png" for i in range(len(names))], names))
        assert len(result) == 12 and (result["label"] == result["file"].map(truth)).mean() > 0.9""",
    "05_under_the_hood": """
        assert accuracy > 0.9 and shapes == [(300, 2400), (300, 2400), (200, 2400)] and not Path(scratch.name).exists()
        assert frame.shape == (800, 5) and first.shape == (2, 4) and first.dtype == np.float16
        assert list(named.fit_transform(images[:3]).columns[:2]) == ["convfeatures0", "convfeatures1"]""",
    "06_what_the_ten_percent_rule_does": "assert len(runs) > 1000",
}
BOOKS = sorted(run_notebooks.NOTEBOOKS.glob("*.ipynb"))


def test_every_notebook_is_checked():
    """A notebook without checks of what it computes would only be run."""
    assert [book.stem for book in BOOKS] == sorted(CHECKS)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_is_and_leaves_nothing_behind(path, tmp_path, monkeypatch):
    """In a fresh kernel: the cells compute what they should, show no error, warning or place of the machine, and no file stays."""
    scratch, folder = tmp_path / "scratch", tmp_path / "folder"
    scratch.mkdir()
    folder.mkdir()
    for name in ("STREAMCNN_TMPDIR", "TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(scratch))
    more = "\n".join(line.strip() for line in CHECKS[path.stem].splitlines())
    book = run_notebooks.execute(path, folder, more)
    assert {file.name for file in folder.iterdir()} == {"filter_study.csv"}
    assert [file.name for file in scratch.iterdir() if file.name.startswith(("tmp", "streamcnn"))] == []
    run_notebooks.nbformat.write(book, tmp_path / path.name)
    assert run_notebooks.problems(tmp_path / path.name) == []


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_is_shipped_was_executed_and_is_fit_to_be_seen(path):
    """Saved from top to bottom, with its pictures, small, and without errors, warnings or places of a machine."""
    assert run_notebooks.problems(path) == []
    outputs = [output for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= (0 if path.stem == "05_under_the_hood" else 1)
    assert len(outputs) >= 5


def test_links_between_notebooks_lead_somewhere():
    """Files that texts refer to are there."""
    for path in BOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^):]+)\)", text):
            assert (path.parent / target).exists(), f"{path.name} refers to {target}"


def test_what_is_wrong_with_a_saved_notebook_is_said(tmp_path):
    """A cell not run, one run out of order, a warning, an error, a place of the machine, too many bytes: a sentence each."""

    def saved(*outputs, count=1):
        cell = {"cell_type": "code", "execution_count": count, "metadata": {}, "source": "", "outputs": list(outputs)}
        (tmp_path / "book.ipynb").write_text(json.dumps({"cells": [cell]}))
        return run_notebooks.problems(tmp_path / "book.ipynb")

    def text(words, name="stdout"):
        return {"output_type": "stream", "name": name, "text": words}

    assert saved(text("all well: 3 of 4\n")) == []
    for count in (None, 2):
        assert "was not executed" in saved(count=count)[0]
    assert "shows an error or a warning" in saved(text("a.py:3: UserWarning: so"))[0]
    assert "shows an error or a warning" in saved(text("so", "stderr"))[0]
    assert "shows an error or a warning" in saved({"output_type": "error", "traceback": ["so"]})[0]
    for place in ("/home/me/a", r"C:\Users\me", "/Users/me", "/tmp/tmpa1/b"):
        assert "names a place of this machine" in saved(text(f"in {place}"))[0]
    assert "more than" in saved(text("a" * run_notebooks.LARGEST_BYTES))[0]


INTERRUPTED = """
import numpy as np
from streamcnn import ConvLayer, StreamCNNClassifier
images, labels = np.random.default_rng(0).integers(0, 128, (8000, 64, 64), np.uint8), np.arange(8000) % 2
images[labels == 1, :, :32] += 100
options = {"layers": ConvLayer(16, 7, filters="random", pool_size=8), "kernel": "linear", "C": 0.1, "n_components": 8, "random_state": 0}
StreamCNNClassifier(**options, store="a.store", verbose=1).fit(images, labels)
"""


def test_the_stop_button_leaves_a_store_that_goes_on(tmp_path):
    """Interrupting a real kernel once shows one sentence that says how to resume, no traceback; the same call with resume=True goes on."""
    from jupyter_client.manager import start_new_kernel

    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), env=environment)
    try:
        said, errors, message = [], [], client.execute(INTERRUPTED)
        stopped = False
        while True:
            got = client.get_iopub_msg(timeout=60)
            if got["parent_header"].get("msg_id") != message:
                continue
            kind, content = got["msg_type"], got["content"]
            if kind == "stream":
                said.append((content["name"], content["text"]))
                if not stopped and "extract" in content["text"]:
                    manager.interrupt_kernel()
                    stopped = True
            elif kind == "error":
                errors.append(content)
            elif kind == "status" and content["execution_state"] == "idle":
                break
        assert stopped and len(errors) == 1
        way = "with resume=True (--resume) the same call goes on from there"
        assert errors[0]["traceback"] == [f"the fit was interrupted; a.store keeps what is finished, and {way}"]
        assert {name for name, _ in said} == {"stdout"}
        assert "stopping where nothing is lost" in "".join(text for _, text in said)
        resumed = INTERRUPTED.partition("StreamCNNClassifier(**")[0] + (
            "a = StreamCNNClassifier(**options, store='a.store').fit(images, labels, resume=True)\n"
            "b = StreamCNNClassifier(**options).fit(images, labels)\n"
            "one, other = a.model_.to_arrays(), b.model_.to_arrays()\n"
            "assert a.report_.resumed and all(one[name].tobytes() == other[name].tobytes() for name in one)\n"
        )
        reply = client.execute_interactive(resumed, timeout=120, store_history=False, output_hook=lambda got: None)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
