"""The command line as a user types it; where no process of its own is needed, through the same entry point."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from PIL import Image

from streamcnn import cli, kernels, load_model
from streamcnn.cli import main
from streamcnn.commandparts import RESULT_KEYS

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


def test_what_was_chosen_is_said(trained, tmp_path):
    """fit and info tell kernel, C and gamma, and the accuracy on the held-out images by which they were chosen; given ones have none."""
    folder, report, done = trained
    svm = load_model(folder / "m.h5").svm
    accuracy = max(svm.selection_.values())
    assert report["svm"] == {"kernel": "rbf", "C": svm.C_, "gamma": svm.gamma_, "held_out_accuracy": accuracy}
    line = f"rbf, C {svm.C_:g}, gamma {svm.gamma_:g}, chosen as they recognise {100 * accuracy:.2f} % of some training images held out"
    assert line in done.stderr
    described = run("info", folder / "m.h5", "--json")
    assert line in described.stderr
    assert "n_components   " in described.stderr
    assert max(map(len, described.stderr.splitlines())) < 160
    assert report["svm"].items() <= result(described).items()
    run("fit", folder / "train", "--model", tmp_path / "m.h5", "--kernel", "linear", "--C", "2", *FIT)
    given = json.loads(run("info", tmp_path / "m.h5", "--json").stdout, parse_constant=pytest.fail)
    assert (given["kernel"], given["C"], given["gamma"], given["held_out_accuracy"]) == ("linear", 2.0, None, None)


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
    assert "1 of 201 images are of classes that the model does not know" in run("evaluate", folder / "m.h5", tmp_path / "t").stderr


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


def test_verify_and_info_keep_the_limit(trained):
    """A limit below what the process holds is refused with the table; one that fits is reported with planned and measured peak."""
    folder, _, _ = trained
    for command in ("verify", "info"):
        assert "already in use" in run(command, folder / "m.h5", "--memory-limit", "10MiB", code=1).stderr
    report = result(run("verify", folder / "m.h5", "--memory-limit", "4GiB", "--json"))
    assert 0 < report["peak_rss_bytes"] <= report["planned_peak_bytes"] <= report["memory_limit_bytes"]


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
        (["plan", "{uneven}"], "1.png: is 6 x 8 pixels (height x width) where the first image is 8 x 8"),
        (["predict", "{model}", "{uneven}"], "1.png: is 6 x 8 pixels (height x width) where the first image is 8 x 8"),
        (["predict", "{model}", "{nan}", "--output", "{nan}"], "nan.npz, which is read: give another file name"),
        (["fit", "{nan}", "--model", "{nan}"], "nan.npz, which is read: give another file name"),
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
    assert text in lines[0]
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
        report = result(run(*fit, "--skip-bad"))
        assert report["n_train"] == 120
        assert [name for name, _ in report["skipped"]] == ["3/zz.png"]
        assert report["reused"] == (["filters", "extract", "pca", "project", "svm"] if again else [])


def test_usage_errors_are_one_line_with_an_example():
    """What is missing or unknown is named in a line, with an example that can be parsed where something is missing."""
    commands = next(action for action in cli.build_parser()._actions if action.dest == "command").choices
    for command in commands:
        done = run(command, "--colour", code=2).stderr
        assert done.count("\n") == 1
        needs = command not in ("demo", "warmup")
        assert ("the following arguments are required" if needs else "unrecognized arguments: --colour") in done
        assert f"for example: streamcnn {command} " in done or not needs
        if needs:
            cli.build_parser().parse_args(done.partition("for example: streamcnn ")[2].partition(";")[0].split())
    assert "required: --model; for example: streamcnn fit photos/ --model photos.h5;" in run("fit", "photos/", code=2).stderr
    assert "required: COMMAND; for example: streamcnn fit" in run(code=2).stderr


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
    resumed = result(spawn(*arguments, "--resume", "--json"))
    assert resumed["resumed"] is True
    for name, array in load_model(tmp_path / "whole.h5").to_arrays().items():
        np.testing.assert_array_equal(load_model(tmp_path / "m.h5").to_arrays()[name], array)
