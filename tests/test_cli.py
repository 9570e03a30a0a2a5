"""The command line as a user types it; where no process of its own is needed, through the same entry point."""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from streamcnn import FeatureStore, cli, kernels, load_model
from streamcnn.cli import main
from streamcnn.commandparts import RESULT_KEYS, class_counts, svm_line

FIT = ["--memory-limit", "1GiB", "--seed", "3"]


def run(*arguments, code=0):
    """Run streamcnn's entry point; returns what it printed, and checks the exit code and that there is no traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            returned = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            returned = exit_.code
    assert returned == code, err.getvalue()
    return subprocess.CompletedProcess(arguments, returned, out.getvalue(), err.getvalue())


def spawn(*arguments, code=0):
    """Run the real program in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "streamcnn", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def result(done):
    """The one JSON object on standard output."""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A tree of digits, a test tree, and a model fitted on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    images, labels = digits
    for name, rows in (("train", range(400)), ("test", range(400, 600))):
        for row in rows:
            (folder / name / str(labels[row])).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row, :, :, 0]).save(folder / name / str(labels[row]) / f"{row:04d}.png")
    done = spawn("fit", folder / "train", "--model", folder / "m.h5", "--test", folder / "test", *FIT, "--json")
    return folder, result(done), done


def test_fit_reports_every_key(trained):
    """fit --json prints every agreed key, keeps no store, and people see bars and the peak."""
    folder, report, done = trained
    assert set(RESULT_KEYS) <= set(report)
    assert report["accuracy"] > 0.85
    assert (report["n_train"], report["n_test"], report["preset"], report["seed"]) == (400, 200, "fast", 3)
    assert report["peak_rss_bytes"] <= report["planned_peak_bytes"] <= report["memory_limit_bytes"] == 1 << 30
    assert report["data_bytes"] == 400 * 64
    assert set(report["stage_seconds"]) == {"filters", "extract", "pca", "project", "svm", "evaluate"}
    assert report["store_bytes"] is None
    assert sorted(p.name for p in folder.iterdir()) == ["m.h5", "test", "train"]
    assert "extract" in done.stderr
    assert "peak memory" in done.stderr


def photos(folder, digits, rows):
    """Digits as photos of many sizes, a folder a class."""
    sizes = np.random.default_rng(7).integers(20, 70, (len(rows), 2))
    for row, size in zip(rows, sizes):
        path = folder / str(digits[1][row]) / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[0][row, :, :, 0]).resize(tuple(map(int, size))).save(path)
    return folder


def test_photos_of_several_sizes_need_no_parameter(digits, tmp_path):
    """plan, fit --test, evaluate and predict bring images of any size to one, as --image-size does; it is said and kept in the model."""
    train, test = photos(tmp_path / "train", digits, range(150)), photos(tmp_path / "test", digits, range(150, 250))
    planned = result(run("plan", train, "--memory-limit", "1GiB", "--json"))
    done = run("fit", train, "--model", tmp_path / "m.h5", "--test", test, *FIT, "--json")
    height, width, channels = load_model(tmp_path / "m.h5").image_shape
    assert height == width < 45 and channels == 1 and planned["source"]["image_shape"] == [height, width, 1]
    said = f"several sizes, so all are stretched to {height} x {width} pixels; image_shape=(height, width) (--image-size HxW) sets another"
    assert done.stderr.count(said) == 1
    accuracy = result(done)["accuracy"]
    assert accuracy > 0.7
    assert result(run("evaluate", tmp_path / "m.h5", test, "--json"))["accuracy"] == accuracy
    run("fit", train, "--model", tmp_path / "told.h5", "--image-size", f"{height}x{width}", *FIT)
    assert (tmp_path / "told.h5").read_bytes() == (tmp_path / "m.h5").read_bytes()
    classes = [line.split(",")[2] for line in run("predict", tmp_path / "m.h5", test).stdout.splitlines()[1:]]
    right = [label == path.split("/")[0] for label, path in zip(classes, (name for name in named(test)))]
    assert np.mean(right) == accuracy


def named(tree):
    """Paths of the images of a tree in the order they are read."""
    return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.png"))


@pytest.mark.parametrize(
    ("shape", "dtype", "names", "text"),
    [
        ((7, 9), np.uint8, [0, 1], "images must be 8 x 8 x 1 .* got 7 x 9 x 1"),
        ((8, 8), np.float32, [0, 1], "pixels must be uint8 as in training, got float32"),
        ((8, 8), np.uint8, [7, 8], "no class of these images is one the model knows: it was trained on 0, 1"),
    ],
)
def test_test_images_that_cannot_be_tested_on_are_refused_before_training(digits, tmp_path, shape, dtype, names, text):
    """fit --test: images of another size or kind, or of no known class, are one line, before a stage runs or a file is written."""
    np.savez(tmp_path / "d.npz", images=digits[0][:60], labels=digits[1][:60] % 2)
    np.savez(tmp_path / "t.npz", images=np.zeros((4, *shape), dtype), labels=np.resize(names, 4))
    done = run("fit", tmp_path / "d.npz", "--test", tmp_path / "t.npz", "--model", tmp_path / "m.h5", *FIT, code=1)
    assert re.search(text, done.stderr) and "filters" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "t.npz"]


@pytest.mark.skipif(os.name == "nt", reason="the shell's way to close a file is POSIX's")
def test_a_closed_standard_output_is_as_if_nobody_looked(trained):
    """Commands whose standard output is closed end as well as without."""
    folder, _, _ = trained
    command = f"exec {shlex.quote(sys.executable)} -m streamcnn info {shlex.quote(str(folder / 'm.h5'))} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_was_chosen_is_said(trained, tmp_path):
    """fit and info tell kernel, C and gamma, and the accuracy on the held-out images by which they were chosen; given ones have none."""
    folder, report, done = trained
    svm = load_model(folder / "m.h5").svm
    accuracy = max(svm.selection_.values())
    assert report["svm"] == {"kernel": "rbf", "C": svm.C_, "gamma": svm.gamma_, "chosen": ["C", "gamma"], "held_out_accuracy": accuracy}
    recognised = f"as they recognise {100 * accuracy:.2f} % of some training images held out"
    line = f"rbf, C {svm.C_:g}, gamma {svm.gamma_:g}; C and gamma chosen, {recognised}"
    assert line in done.stderr
    described = run("info", folder / "m.h5", "--json")
    assert line in described.stderr
    assert "n_components   " in described.stderr
    assert max(map(len, described.stderr.splitlines())) < 160
    assert report["svm"].items() <= result(described).items()
    run("fit", folder / "train", "--model", tmp_path / "m.h5", "--kernel", "linear", "--C", "2", *FIT)
    given = json.loads(run("info", tmp_path / "m.h5", "--json").stdout, parse_constant=pytest.fail)
    assert (given["kernel"], given["C"], given["gamma"], given["held_out_accuracy"]) == ("linear", 2.0, None, None)
    assert given["chosen"] == []
    facts = {"kernel": "rbf", "C": 3.0, "gamma": 1.0, "chosen": ["gamma"], "held_out_accuracy": 0.9123}
    assert svm_line(facts) == "rbf, C 3, gamma 1; gamma chosen, as it recognises 91.23 % of some training images held out"


def test_predict_and_evaluate_agree_with_fit_to_the_last_label(trained, tmp_path):
    """The saved model predicts exactly what fit --test counted."""
    folder, report, _ = trained
    evaluated = result(run("evaluate", folder / "m.h5", folder / "test", "--json"))
    assert evaluated["accuracy"] == report["accuracy"]
    assert evaluated["confusion"] == report["confusion"]
    run("predict", folder / "m.h5", folder / "test", "--output", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "path", "label", "score"]
    assert [int(row["index"]) for row in rows] == list(range(200))
    assert np.mean([row["path"].split("/")[0] == row["label"] for row in rows]) == report["accuracy"]


def test_images_of_unknown_classes_are_counted_aloud(trained, tmp_path, digits):
    """They count as wrong, and a line says how many there are."""
    folder, _, _ = trained
    shutil.copytree(folder / "test", tmp_path / "t")
    (tmp_path / "t" / "eleven").mkdir()
    Image.fromarray(digits[0][0, :, :, 0]).save(tmp_path / "t" / "eleven" / "1.png")
    line = "1 of 201 images are of classes that the model does not know (eleven 1), and count as wrong"
    assert line in run("evaluate", folder / "m.h5", tmp_path / "t").stdout


def test_predict_runs_on_the_device_asked_for(trained, tmp_path, monkeypatch):
    """The naive machine gives the same labels, and an absent one is an error."""
    folder, _, _ = trained
    for name in ("cpu", "naive"):
        run("predict", folder / "m.h5", folder / "test" / "7", "--device", name, "--output", tmp_path / name)
    labels = [[line.split(",")[2] for line in (tmp_path / name).read_text().splitlines()] for name in ("cpu", "naive")]
    assert labels[0] == labels[1]
    monkeypatch.setattr(kernels, "cuda_problem", lambda: "no CUDA device was found")
    assert 'device "cuda" is not there' in run("predict", folder / "m.h5", folder / "test", "--device", "cuda", code=1).stderr


def test_probabilities_are_scores(trained, tmp_path):
    """fit --probability makes the scores of predict the probabilities that Python gives; without it they are decisions, and it says so."""
    folder, _, _ = trained
    run("fit", folder / "train", "--model", tmp_path / "m.h5", "--probability", *FIT)
    for model, kind in ((tmp_path / "m.h5", "probability"), (folder / "m.h5", "decision")):
        done = result(run("predict", model, folder / "test", "--output", tmp_path / "p.csv", "--json"))
        assert done["score"] == kind
        with (tmp_path / "p.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["index", "path", "label", "score"]
        loaded = load_model(model)
        values = loaded.predict_proba(folder / "test") if kind == "probability" else loaded.decision_function(folder / "test")
        np.testing.assert_allclose([float(row["score"]) for row in rows], values.max(axis=1), rtol=1e-5)
        assert [row["label"] for row in rows] == loaded.classes_[values.argmax(axis=1)].tolist()


def test_predict_takes_one_image_a_flat_folder_and_arrays(trained, tmp_path, digits):
    """All three give the label the tree gave, on standard output as CSV."""
    folder, _, _ = trained
    image = sorted((folder / "test" / "7").iterdir())[0]
    row = int(image.stem)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / image.name).write_bytes(image.read_bytes())
    np.save(tmp_path / "a.npy", digits[0][row : row + 1])
    lines = [run("predict", folder / "m.h5", data).stdout.splitlines() for data in (image, tmp_path / "flat", tmp_path / "a.npy")]
    assert {line[0] for line in lines} == {"index,path,label,score"}
    assert len({tuple(line[1].split(",")[2:]) for line in lines}) == 1


def test_the_same_rows_give_the_identical_model_from_any_container(trained, tmp_path):
    """Tree, HDF5, npz and npy of the same rows in the same order: the same arrays."""
    folder, _, _ = trained
    files = sorted((folder / "train").rglob("*.png"), key=lambda p: (p.parent.name, p.name))
    images = np.stack([np.asarray(Image.open(p)) for p in files])[..., None]
    labels = np.array([int(p.parent.name) for p in files])
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    np.savez(tmp_path / "d.npz", X=images, y=labels)
    np.save(tmp_path / "d.npy", images)
    np.save(tmp_path / "d_labels.npy", labels)
    expected = load_model(folder / "m.h5").to_arrays()
    for name in ("d.h5", "d.npz", "d.npy"):
        run("fit", tmp_path / name, "--model", tmp_path / "m.h5", *FIT)
        arrays = load_model(tmp_path / "m.h5").to_arrays()
        assert arrays.keys() == expected.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[key])


def test_store_is_kept_verified_described_and_reused(trained, tmp_path):
    """--store keeps the work; verify, info and a second fit read it."""
    folder, _, _ = trained
    fit = ["fit", folder / "train", "--store", tmp_path / "s", *FIT, "--json"]
    first = result(run(*fit, "--model", tmp_path / "a.h5"))
    second = result(run(*fit, "--model", tmp_path / "b.h5", "--C", "3"))
    assert first["store_bytes"] > 0
    assert (first["resumed"], second["resumed"]) == (False, True)
    assert second["reused"] == ["filters", "extract", "pca", "project"]
    assert second["svm"]["chosen"] == ["gamma"]
    assert result(run("verify", tmp_path / "s", "--json"))["ok"] is True
    assert result(run("verify", tmp_path / "a.h5", "--json"))["ok"] is True
    info = result(run("info", tmp_path / "s", "--json"))
    assert (info["n_rows"], info["stages"]) == (400, ["filters", "extract", "pca", "project", "svm"])
    assert result(run("info", tmp_path / "a.h5", "--json"))["image_shape"] == [8, 8, 1]
    assert (tmp_path / "s" / "memory.csv").read_text().startswith("seconds,stage,resident_bytes")
    with h5py.File(tmp_path / "s" / "features.h5") as file:
        assert file["features"].shape[0] == 400
    shard = tmp_path / "s" / "features" / "00000.h5"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "features/00000.h5" in run("verify", tmp_path / "s", code=1).stderr


def test_resume_leaves_a_finished_model_as_it_is(trained, tmp_path):
    """Without a store --resume says that the model is finished, tests it if asked, and writes nothing; with other parameters it fits."""
    folder, first, _ = trained
    model = tmp_path / "m.h5"
    shutil.copy(folder / "m.h5", model)
    before = model.stat()
    fit = ["fit", folder / "train", "--model", model, *FIT, "--resume", "--json"]
    for more, accuracy in (([], None), (["--test", folder / "test"], first["accuracy"])):
        done = run(*fit, *more)
        assert "m.h5 is finished: made of the same data and parameters" in done.stderr
        assert " ()" not in done.stderr
        again = result(done)
        assert set(RESULT_KEYS) <= set(again)
        assert (again["resumed"], again["accuracy"], again["svm"]) == (True, accuracy, first["svm"])
        assert list(again["stage_seconds"]) == (["evaluate"] if more else [])
        assert (model.stat().st_mtime_ns, model.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    other = result(run(*fit, "--C", "3"))
    assert "svm" in other["stage_seconds"]
    assert load_model(model).svm.C_ == 3
    assert list(tmp_path.iterdir()) == [model]


def test_verify_and_info_keep_the_limit(trained):
    """A limit below what the process holds is refused with the table; one that fits is reported with planned and measured peak."""
    folder, _, _ = trained
    for command in ("verify", "info"):
        assert "already in use" in run(command, folder / "m.h5", "--memory-limit", "10MiB", code=1).stderr
    report = result(run("verify", folder / "m.h5", "--memory-limit", "4GiB", "--json"))
    assert 0 < report["peak_rss_bytes"] <= report["planned_peak_bytes"] <= report["memory_limit_bytes"]


def test_results_go_to_standard_output(trained, tmp_path):
    """What a command is asked for can be piped; with --json it is told on standard error, beside the one object. Notices are no result."""
    folder, _, _ = trained
    commands = {
        ("plan", folder / "train", *FIT): "planned peak",
        ("evaluate", folder / "m.h5", folder / "test"): "  recall 7 ",
        ("info", folder / "m.h5"): "SVM            rbf",
        ("verify", folder / "m.h5"): "model checked, all well",
        ("predict", folder / "m.h5", folder / "test" / "7", "--output", tmp_path / "p.csv"): "p.csv: 20 images of ",
        ("fit", folder / "train", "--model", tmp_path / "m.h5", *FIT): "peak memory",
    }
    for words, text in commands.items():
        plain, machine = run(*words), run(*words, "--json")
        assert text in plain.stdout and text not in plain.stderr
        assert text in machine.stderr
        assert isinstance(result(machine), dict)
    assert "extract : starts" in plain.stderr


def into(output, *arguments):
    """Run the real program with a standard output that it fills before it writes, as is usual; returns exit code and what it complains."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "streamcnn", *map(str, arguments)]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=usual)
    return done.returncode, done.stderr


def test_a_reader_that_has_gone_is_no_complaint(trained):
    """`| head` closes the pipe: nothing is said of it, also not while Python ends."""
    folder, _, _ = trained
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert into(writing, "info", folder / "m.h5") == (1, "")
    finally:
        os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_behind_standard_output_is_a_line(trained):
    """No traceback, and no complaint while Python ends."""
    folder, _, _ = trained
    with Path("/dev/full").open("w") as full:
        code, said = into(full, "info", folder / "m.h5")
    assert (code, said) == (1, "streamcnn: standard output cannot be written (its disk is full): make room there\n")


def test_what_is_going_to_be_learnt_is_said_before_it(trained, tmp_path):
    """fit and plan name the classes with their numbers of images, of many classes the first, and warn of rows that may be images."""
    folder, _, _ = trained
    counts = [len(list((folder / "train" / str(digit)).iterdir())) for digit in range(10)]
    line = ", ".join(f"{digit} {counts[digit]}" for digit in range(6)) + ", and 4 more, 39 images each"
    for words in (["plan", folder / "train"], ["fit", folder / "train", "--model", tmp_path / "m.h5"]):
        assert run(*words, *FIT).stderr.startswith(f"10 classes: {line}\n")
    np.savez(tmp_path / "rows.npz", images=np.zeros((30, 64), np.uint8), labels=[0, 1, 2] * 10)
    assert "rows of 64 values are taken as images of 1 x 64 pixels" in run("plan", tmp_path / "rows.npz", *FIT).stderr


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "1 class: a 3"),
        ([1] * 7, "7 classes: a 1, b 1, c 1, d 1, e 1, f 1, g 1"),
        ([2000] * 8, "f 2,000, and 2 more, 2,000 images each"),
    ],
)
def test_classes_are_counted_in_a_line(numbers, text):
    """All of up to seven classes, of more the first six and the range of the others."""
    assert class_counts(np.array(list("abcdefgh")[: len(numbers)]), np.array(numbers)).endswith(text)


def test_a_store_is_described_to_people(trained, tmp_path):
    """info of a store: lines, no JSON, with what differs from the preset, and finished and unfinished stages."""
    folder, _, _ = trained
    run("fit", folder / "train", "--model", tmp_path / "m.h5", "--store", tmp_path / "s", "--C", "3", *FIT)
    lines = run("info", tmp_path / "s").stdout.splitlines()
    said = {line[:14].strip(): line[15:] for line in lines}
    assert (said["kind"], said["data"], said["images"]) == ("store", str(folder / "train"), "400 of 8 x 8 x 1")
    assert said["classes"] == "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert said["finished"] == "filters, extract (1 shard), pca, project (1 shard), svm"
    assert said["preset"].startswith("fast, ") and "C 3.0" in said["preset"] and "seed 3" in said["preset"]
    assert said["features"].startswith("400 rows of ") and said["size"].endswith("MiB")
    assert "unfinished" not in said and not any("{" in line for line in lines)
    with FeatureStore.create(tmp_path / "odd", {"source": {"n_samples": "many", "image_shape": 3}, "parameters": {"preset": []}}) as store:
        store.append(np.ones((3, 2), np.float32))
        store.update_config(bad_files=[[f"{i}.png", "torn"] for i in range(12)])
    said = run("info", tmp_path / "odd").stdout
    assert re.search(r"features +3 rows of 2\nfinished +nothing\nunfinished +extract \(1 shard\)\n", said)
    assert "12 files: 0.png, 1.png, 2.png" in said and "9.png, ..." in said and "preset" not in said


def test_work_that_is_dropped_is_said(trained, tmp_path):
    """A fit into the store of another says which finished stages go, and which parameters are others; the same one reuses all."""
    folder, _, _ = trained
    fit = ["fit", folder / "train", "--model", tmp_path / "m.h5", "--store", tmp_path / "s", "--seed", "3"]
    run(*fit, "--kernel", "linear", "--C", "1")
    other = "of other data or parameters (changed since its last fit:"
    assert f"{tmp_path / 's'} has svm {other} C): dropped" in run(*fit, "--kernel", "linear", "--C", "2").stderr
    said = run(*fit, "--kernel", "linear", "--C", "2", "--n-components", "none").stderr
    assert f"{tmp_path / 's'} has svm {other} n_components): dropped" in said  # the stages it leaves out stay
    said = run(*fit, "--kernel", "linear", "--C", "2", "--n-components", "9", "--image-size", "9x9").stderr
    assert f"{tmp_path / 's'} has filters, extract, pca, project, svm (2 shards) {other} n_components, data): dropped" in said


def test_other_things_than_a_model_or_a_store_are_named(trained, tmp_path):
    """A CSV, a folder and a store in place of a model, and a model in place of a store: what it is, and what is wanted."""
    folder, _, _ = trained
    (tmp_path / "labels.csv").write_text("index,path\n")
    for words in (
        ["predict", tmp_path / "labels.csv", folder / "test"],
        ["info", tmp_path / "labels.csv"],
        ["verify", tmp_path / "labels.csv"],
    ):
        assert "labels.csv is a .csv file, not a model: give the file of fit --model" in run(*words, code=1).stderr
    assert "test is a folder, not a model: give the file" in run("predict", folder / "test", folder / "m.h5", code=1).stderr
    (tmp_path / "s").mkdir()
    shutil.copy(folder / "m.h5", tmp_path / "s" / "model.h5")
    assert f"not a model: give {tmp_path / 's' / 'model.h5'}" in run("evaluate", tmp_path / "s", folder / "test", code=1).stderr
    done = run("report", folder / "m.h5", code=1).stderr
    assert "m.h5 is an HDF5 file, perhaps a model, not the folder of a store: give what fit --store has made" in done


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no folder names that are no text")
def test_paths_that_are_no_text_are_written_as_escapes(trained, tmp_path):
    """The same to a file as to standard output, and in what is said of classes."""
    folder, _, _ = trained
    odd = tmp_path / os.fsdecode(b"flat\xff")
    odd.mkdir()
    shutil.copy(next((folder / "test" / "7").iterdir()), odd / "1.png")
    lines = spawn("predict", folder / "m.h5", tmp_path).stdout
    run("predict", folder / "m.h5", tmp_path, "--output", folder / "odd.csv")
    assert (folder / "odd.csv").read_text() == lines
    assert lines.splitlines()[1].startswith(r"0,flat\udcff/1.png,7,")


def test_on_a_terminal_the_csv_has_no_bar_through_it(trained, monkeypatch):
    """Where the CSV is seen, its lines are the progress; in a pipe there are lines on standard error."""
    folder, _, _ = trained
    predict = ["predict", folder / "m.h5", folder / "test" / "7"]
    assert "predict : starts" in run(*predict).stderr

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    done = run(*predict)
    assert done.stderr == ""
    assert done.stdout.startswith("index,path,label,score\n")


def test_demo_refuses_a_limit_before_it_makes_its_data(monkeypatch):
    """A gigabyte of images is not made for a fit that cannot run."""
    monkeypatch.setattr("streamcnn.demo.make_data", lambda *arguments: pytest.fail("data were made"))
    monkeypatch.setattr("streamcnn.warmup.warm_up", lambda settings: None)
    assert "memory_limit of 100.0 MiB is too small" in run("demo", "--memory-limit", "100MiB", code=1).stderr


def test_plan_runs_nothing_and_shows_the_table(trained):
    """plan prints stages, chunk size and peak, and refuses a limit that cannot hold with the smallest that would."""
    folder, _, _ = trained
    plan = result(run("plan", folder / "train", *FIT, "--json"))
    assert [stage["name"] for stage in plan["stages"]] == ["filters", "extract", "pca", "project", "svm", "save"]
    assert plan["planned_peak_bytes"] <= plan["memory_limit_bytes"]
    refused = run("plan", folder / "train", "--memory-limit", "100MiB", code=1).stderr
    assert "memory_limit of 100.0 MiB is too small" in refused
    assert "already in use" in refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fit", "{none}", "--model", "{out}"], "no such file or folder"),
        (["fit", "{empty}", "--model", "{out}"], "no image"),
        (["fit", "{one}", "--model", "{out}"], "at least 2 classes are needed"),
        (["fit", "{textpng}", "--model", "{out}"], "fake.png"),
        (["fit", "{cut}", "--model", "{out}"], "cut.jpg"),
        (["fit", "{nan}", "--model", "{out}"], "NaN"),
        (["fit", "{short}", "--model", "{out}"], "labels"),
        (["fit", "{train}", "--model", "{out}", "--n-components", "5000"], "n_components must be at most"),
        (["fit", "{train}", "--model", "{out}", "--preset", "best"], "preset must be one of faces, fast, lee2017, patches, got 'best'"),
        (["fit", "{train}", "--model", "{out}", "--preset", "lee2017"], "layer 2: kernel_size of 5 x 5 is larger than the 2 x 2"),
        (["fit", "{train}", "--model", "{out}", "--memory-limit", "12 bananas"], "memory_limit must be a positive number"),
        (["fit", "{train}", "--model", "{nodir}/m.h5"], "does not exist; create it first"),
        (["predict", "{text}", "{train}"], "is not a streamcnn-model file"),
        (["predict", "{model}", "{wide}"], "images must be 8 x 8 x 1"),
        (["evaluate", "{model}", "{none}"], "no such file or folder"),
        (["plan", "{uneven}"], "1.png: is 6 x 8 pixels (height x width) where the others are 8 x 8"),
        (["predict", "{model}", "{uneven}"], "1.png: is 6 x 8 pixels (height x width) where the others are 8 x 8"),
        (["predict", "{model}", "{nan}", "--output", "{nan}"], "nan.npz, which is read: give another file name"),
        (["fit", "{nan}", "--model", "{nan}"], "nan.npz, which is read: give another file name"),
        (
            ["fit", "{train}", "--model", "{cut}/a/0.png"],
            "must not be {cut}/a/0.png, which is no streamcnn model and so is not replaced",
        ),
        (["predict", "{model}", "{train}", "--output", "{nan}"], "which is no CSV of predict and so is not replaced: give another"),
        (["verify", "{none}"], "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(trained, tmp_path, arguments, text):
    """Each kind of bad input: exit code 1, one line that says what is wrong, no model, no store, no temporary file."""
    folder, _, _ = trained
    data = tmp_path / "data"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8))
    for tree, classes in (("one", ["a"]), ("textpng", ["a", "b"]), ("cut", ["a", "b"]), ("uneven", ["a", "b"])):
        for name in classes:
            (data / tree / name).mkdir(parents=True)
            for i in range(3):
                image.save(data / tree / name / f"{i}.png")
    image.crop((0, 0, 8, 6)).save(data / "uneven" / "a" / "1.png")
    (data / "empty").mkdir()
    (data / "textpng" / "b" / "fake.png").write_text("I am no image")
    image.save(data / "whole.jpg")
    whole = (data / "whole.jpg").read_bytes()
    (data / "cut" / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    pixels = np.zeros((6, 8, 8), np.float32)
    pixels[4, 2, 2] = np.nan
    np.savez(data / "nan.npz", images=pixels, labels=[0, 1] * 3)
    np.savez(data / "short.npz", images=np.zeros((6, 8, 8), np.uint8), labels=[0, 1])
    np.savez(data / "wide.npz", images=np.zeros((6, 8, 9), np.uint8), labels=[0, 1] * 3)
    (data / "text.h5").write_text("hello")
    (tmp_path / "out").mkdir()
    places = {name: data / name for name in ("none", "empty", "one", "textpng", "cut", "uneven")}
    places |= {"nan": data / "nan.npz", "short": data / "short.npz", "wide": data / "wide.npz", "text": data / "text.h5"}
    places |= {"train": folder / "train", "model": folder / "m.h5", "out": tmp_path / "out" / "m.h5", "nodir": tmp_path / "nowhere"}
    done = run(*[argument.format(**places) for argument in arguments], code=1)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("streamcnn: ")]
    assert len(lines) == 1
    assert text.format(**places) in lines[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_files_can_be_skipped(tmp_path, digits):
    """--skip-bad leaves unreadable files out, up to 1 %, and lists them."""
    images, labels = digits
    for row in range(120):
        (tmp_path / "t" / str(labels[row])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[row, :, :, 0]).save(tmp_path / "t" / str(labels[row]) / f"{row}.png")
    (tmp_path / "t" / "3" / "zz.png").write_text("no image")
    fit = ["fit", tmp_path / "t", "--model", tmp_path / "m.h5", "--store", tmp_path / "s", *FIT, "--json"]
    assert "zz.png" in run(*fit, code=1).stderr
    for again in (False, True):
        done = run(*fit, "--skip-bad")
        assert ("--skip-bad reads every file" in done.stderr) == (not again)
        report = result(done)
        assert report["n_train"] == 120
        assert [name for name, _ in report["skipped"]] == ["3/zz.png"]
        assert report["reused"] == (["filters", "extract", "pca", "project", "svm"] if again else [])


def test_usage_errors_are_one_line_with_an_example():
    """What is missing or unknown is named in a line, with an example that can be parsed where something is missing."""
    commands = next(action for action in cli.build_parser()._actions if action.dest == "command").choices
    for command in commands:
        assert (
            run(command, "--colour", code=2).stderr
            == f"streamcnn {command}: unknown flag --colour; all options: streamcnn {command} --help\n"
        )
        needs = command not in ("demo", "warmup")
        done = run(command, *([] if needs else ["more"]), code=2).stderr
        assert done.count("\n") == 1
        assert (
            "the following arguments are required" if needs else f"unrecognized arguments: more; all options: streamcnn {command} --help"
        ) in done
        assert f"for example: streamcnn {command} " in done or not needs
        if needs:
            cli.build_parser().parse_args(done.partition("for example: streamcnn ")[2].partition(";")[0].split())
    assert "required: --model; for example: streamcnn fit photos/ --model photos.h5;" in run("fit", "photos/", code=2).stderr
    assert "required: COMMAND; for example: streamcnn fit" in run(code=2).stderr


def test_an_unknown_flag_is_named_first_with_the_nearest():
    """It may be what is missing, misspelt; flags before the command, and values that look like flags, are none of it."""
    for flag, near in (("--modle", "--model"), ("--memory_limit=1GiB", "--memory-limit"), ("--mem", "--memory-limit"), ("-C", "--C")):
        done = run("fit", "photos", flag, "x", code=2).stderr
        assert f"streamcnn fit: unknown flag {flag.partition('=')[0]}, perhaps {near} is meant; all options: streamcnn fit --help" in done
    assert run("--json", "plan", "x", code=2).stderr.startswith("streamcnn: unknown flag --json;")
    assert "no such file or folder" in run("plan", "--", "--colour", code=1).stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["plan", "x", "--image-size", "96"], "argument --image-size: must look like 96x96 or 96x96x3, got '96'"),
        (["plan", "x", "--C", "abc"], "argument --C: must be a positive number or auto, got 'abc'"),
        (["plan", "x", "--gamma", "-1"], "argument --gamma: must be a positive number or auto or scale, got '-1'"),
        (["plan", "x", "--n-components", "0"], "argument --n-components: must be a positive whole number"),
        (["plan", "x", "--seed", "-1"], "argument --seed: must be a whole number from 0 to 2**32 - 1, got '-1'"),
        (["predict", "m.h5", "x", "--output", ""], "argument --output: must be the name of a file or folder, got ''"),
        (["demo", "--images", "4"], "argument --images: must be a whole number of at least 100, got '4'"),
        (["plan", ""], "argument data: must be the name of a file or folder, got ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_make_no_sense_are_wrong_usage(words, text):
    """Exit code 2, before anything is opened."""
    assert text in run(*words, code=2).stderr


def test_usage_errors_are_exit_code_2(trained, tmp_path):
    """Unknown commands, missing arguments and shortened flags are usage errors."""
    folder, _, _ = trained
    for arguments in (["fit"], ["dance"], ["fit", folder / "train", "--mod", "x.h5"], []):
        run(*arguments, code=2)
    assert spawn("--version").stdout.startswith("streamcnn ")
    spawn("fit", tmp_path / "none", "--model", tmp_path / "m.h5", code=1)


@pytest.mark.skipif(os.name == "nt", reason="a Windows console interrupt reaches the whole process group, the test included")
def test_interrupted_fit_resumes_to_the_same_bits(tmp_path):
    """Ctrl-C leaves exit code 130 and a store; --resume finishes with the model of an uninterrupted run."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["images"] = rng.integers(0, 256, (30_000, 24, 24, 1), dtype=np.uint8)
        file["labels"] = np.arange(30_000) % 2
    fit = ["fit", tmp_path / "d.h5", "--kernel", "linear", "--C", "0.1", *FIT]
    run(*fit, "--model", tmp_path / "whole.h5")
    arguments = [*fit, "--model", tmp_path / "m.h5"]
    child = subprocess.Popen([sys.executable, "-m", "streamcnn", *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    shards = tmp_path / "m.h5.store" / "features"
    deadline = time.monotonic() + 120
    while not list(shards.glob("0*.h5")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "with resume=True (--resume) the same call goes on from there" in errors
    assert not list((tmp_path / "m.h5.store").rglob("*.tmp"))
    assert not (tmp_path / "m.h5").exists()
    done = spawn(*arguments, "--resume", "--json")
    assert re.search(r"extract : goes on from \d+ shards? of an interrupted fit", done.stderr)
    assert result(done)["resumed"] is True
    for name, array in load_model(tmp_path / "whole.h5").to_arrays().items():
        np.testing.assert_array_equal(load_model(tmp_path / "m.h5").to_arrays()[name], array)
