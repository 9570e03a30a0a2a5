"""The paper's rivals: `reproduce lee2017 --baseline`."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from streamcnn import baseline, cnn, reproduce
from streamcnn.cli import main
from streamcnn.commandparts import RESULT_KEYS
from streamcnn.errors import StreamCNNError
from streamcnn.images import open_images
from streamcnn.kernels import get_kernels
from streamcnn.layers import resolve_layers
from streamcnn.network import Network
from streamcnn.pipeline import draw_filters
from streamcnn.presets import resolve_settings

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="the rivals are trained in PyTorch, which is not installed")

SETTINGS = resolve_settings("lee2017", n_jobs=1, device="cpu")


@pytest.fixture(autouse=True)
def gradients():
    """PyTorch as it starts: other tests let it be timed without them."""
    if torch is not None:
        torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def subsets(tmp_path_factory):
    """Five made-up subsets of three persons, 24 x 24: 8 images each to train on, 2 each in darker light in every other."""
    root, rng = tmp_path_factory.mktemp("yale"), np.random.default_rng(0)
    faces = rng.integers(60, 200, (3, 6, 6)).repeat(4, 1).repeat(4, 2)
    for subset in range(1, 6):
        for person, face in enumerate(faces):
            folder = root / str(subset) / f"yaleB0{person + 1}"
            folder.mkdir(parents=True)
            for number in range(8 if subset == 1 else 2):
                image = face * rng.uniform(0.5, 1.2) / subset + rng.normal(0, 3, face.shape)
                Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{number}.pgm")
    return {subset: open_images(root / str(subset), need_labels=True) for subset in range(1, 6)}


@pytest.fixture(scope="module")
def files(subsets, tmp_path_factory):
    """What the processes of the rivals read."""
    folder = tmp_path_factory.mktemp("files")
    baseline.write_images(subsets, folder / "images.npz")
    baseline.write_seed(subsets[1], SETTINGS, folder / "seed.npz")
    return folder


def refused(capsys, *arguments, code=1):
    """What `reproduce` says instead of running."""
    assert main(["reproduce", "lee2017", "nowhere", *arguments]) == code
    return capsys.readouterr().err


def test_unknown_baselines_are_refused(capsys):
    """A name that is none of ours is one sentence with those there are, before any folder is looked at."""
    assert refused(capsys, "--baseline", "cnn", "svm") == "streamcnn: --baseline must be cnn or frozen, got 'svm'\n"


def test_without_pytorch_the_way_to_it_is_named(capsys, monkeypatch):
    """One sentence: which flag, what is missing, how to install it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    said = refused(capsys, "--baseline", "cnn", "--baseline", "frozen")
    assert said == ("streamcnn: --baseline cnn frozen needs PyTorch, which is not installed: pip install torch, or leave --baseline out\n")


def test_a_process_that_fails_is_one_sentence(tmp_path):
    """System, seed, exit code and the reason that the process gave; a traceback's last line where it is no error of ours."""
    with pytest.raises(StreamCNNError, match=r"^streamcnn with seed 7 failed with exit code 1: .*nowhere: no such folder$"):
        baseline._ours(tmp_path / "nowhere", replace(SETTINGS, seed=7), 1 << 30)
    with pytest.raises(
        StreamCNNError, match=r"^back-propagated CNN with seed 3 failed with exit code 1: FileNotFoundError: .*images.npz'$"
    ):
        baseline._rival(tmp_path, "cnn", 1, 3)


def test_held_out_images_are_of_every_class_of_subset_1_and_follow_the_seed(subsets, files, tmp_path):
    """A fifth of each person's training images, one at least; what the files hold are subset 1's pixels; another seed, others."""
    with np.load(files / "images.npz") as images, np.load(files / "seed.npz") as first:
        for subset, source in subsets.items():
            pixels = np.empty((source.n_samples, *source.image_shape), np.uint8)
            source.read(0, source.n_samples, pixels)
            np.testing.assert_array_equal(images[f"images_{subset}"], pixels)
            np.testing.assert_array_equal(images[f"labels_{subset}"], source.labels)
        held_out = first["held_out"]
        assert len(held_out) == subsets[1].n_samples
        # 8 // 5
        assert np.bincount(subsets[1].labels[held_out]).tolist() == [1, 1, 1]
    baseline.write_seed(subsets[1], replace(SETTINGS, seed=1), tmp_path / "other.npz")
    with np.load(tmp_path / "other.npz") as other:
        assert (other["held_out"] != held_out).any()


@needs_torch
@pytest.mark.parametrize("system", ["cnn", "frozen"])
def test_training_never_sees_the_test_subsets(system, files, tmp_path):
    """With noise instead of subsets 2 to 5 the same epochs and held-out losses come out, to the last bit: only `accuracy` differs."""
    with np.load(files / "images.npz") as arrays:
        images = dict(arrays)
    rng = np.random.default_rng(1)
    noise = {name: rng.integers(0, 256, a.shape).astype(a.dtype) for name, a in images.items() if name in ("images_2", "images_3")}
    np.savez(tmp_path / "noise.npz", **images | noise)
    (true, false) = (cnn.run(path, files / "seed.npz", system, 1, 5) for path in (files / "images.npz", tmp_path / "noise.npz"))
    for name in ("epochs", "best_epoch", "held_out_loss", "held_out_accuracy"):
        assert true[name] == false[name]
    assert (true["accuracy"]["4"], true["accuracy"]["5"]) == (false["accuracy"]["4"], false["accuracy"]["5"])
    assert true["accuracy"]["2"] == 1 > false["accuracy"]["2"]
    assert true["held_out_accuracy"] == 1 and true["best_epoch"] <= true["epochs"] < cnn.MOST_EPOCHS
    assert 0 < true["best_seconds"] <= true["train_seconds"] == true["stage_seconds"]["prepare"] + true["stage_seconds"]["train"]


def tiny_problem(seed=0):
    """Three classes of 30 rows around their means, 6 held out: a linear model, inputs, labels, held-out mask."""
    torch.manual_seed(seed)
    labels = torch.arange(30) % 3
    inputs = torch.randn(30, 5) + torch.eye(5)[labels]
    return torch.nn.Linear(5, 3), inputs, labels, torch.arange(30) < 6


@needs_torch
def test_training_keeps_the_weights_of_the_best_held_out_loss(monkeypatch):
    """It stops after `PATIENCE` epochs without improvement, and the model left has the loss that is reported."""
    monkeypatch.setattr(cnn, "LEARNING_RATE", 0.3)
    model, inputs, labels, held_out = tiny_problem()
    found = cnn.train(torch, model, inputs, labels, held_out)
    assert found["best_epoch"] < found["epochs"] < cnn.MOST_EPOCHS
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(model(inputs[held_out]), labels[held_out]))
    assert loss == found["held_out_loss"]


@needs_torch
def test_no_step_sees_held_out_images(monkeypatch):
    """Other held-out images and labels leave the weights of an epoch as they are."""
    monkeypatch.setattr(cnn, "MOST_EPOCHS", 1)
    weights = []
    for change in (False, True):
        model, inputs, labels, held_out = tiny_problem()
        if change:
            inputs[held_out], labels[held_out] = -inputs[held_out], (labels[held_out] + 1) % 3
        cnn.train(torch, model, inputs, labels, held_out)
        weights.append(model.weight.detach().numpy().copy())
    np.testing.assert_array_equal(*weights)


@needs_torch
def test_frozen_features_are_those_of_our_own_network(subsets):
    """The rival with our filters begins where our PCA does: the same rows, up to the order in which float32 is summed."""
    network = Network(resolve_layers(SETTINGS.layers, subsets[1].image_shape), SETTINGS.preprocess)
    kernels = get_kernels("cpu")
    draw_filters(network, subsets[1], SETTINGS, kernels)
    images = np.empty((24, 24, 24, 1), np.uint8)
    subsets[1].read(0, 24, images)
    expected = network.transform(images, network.allocate(24, 1, kernels), kernels)
    found = cnn.frozen_features(torch, cnn.standardized(torch, images), network.filters, [2, 2])
    # values up to 1; sums of 400 products in another order: 400 * 2**-24 times responses of order 3 would be 7e-5
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@needs_torch
def test_both_rivals_stand_beside_ours(subsets, monkeypatch, capsys):
    """`--baseline cnn frozen --seeds 2 --json`: agreed keys for all three, means of the seeds, ratios, a line for each in the table."""
    monkeypatch.setattr(baseline, "extended_yale_b", lambda folder: subsets)
    monkeypatch.setattr(reproduce, "extended_yale_b", lambda folder: subsets)
    monkeypatch.setattr(
        baseline, "_ours", lambda folder, settings, limit: reproduce.lee2017(folder, settings, limit, 1)[0] | {"peak_rss_bytes": 100 << 20}
    )
    began = []
    real = baseline._rival

    # one in a process of its own, as always; the others in this one, to save seconds
    def rival(scratch, name, n_threads, seed):
        began.append((name, seed))
        if len(began) == 1:
            return real(scratch, name, n_threads, seed)
        run = cnn.run(scratch / "images.npz", scratch / "seed.npz", name, n_threads, seed)
        return run | {"seconds": 1.5, "planned_peak_bytes": None, "peak_rss_bytes": 10 * len(began) << 20}

    monkeypatch.setattr(baseline, "_rival", rival)
    arguments = ["--seeds", "2", "--seed", "3", "--threads", "1", "--memory-limit", "2GiB", "--baseline", "cnn", "frozen", "cnn", "--json"]
    assert main(["reproduce", "lee2017", "folder", *arguments]) == 0
    printed = capsys.readouterr()
    ours = json.loads(printed.out)
    rivals = {"cnn": ours.pop("baseline"), "frozen": ours.pop("baseline_frozen")}
    assert began == [("cnn", 3), ("frozen", 3), ("cnn", 4), ("frozen", 4)]
    assert rivals["frozen"]["peak_rss_bytes"] == 40 << 20 and rivals["frozen"]["times_the_memory"] == pytest.approx(0.4)
    for name, result in rivals.items():
        assert set(ours) < set(result)
        assert set(RESULT_KEYS) <= set(result)
        assert (result["preset"], result["seed"], result["seeds"], result["n_train"], result["n_test"]) == (name, 3, 2, 24, 24)
        assert result["accuracy"]["2"] == pytest.approx(np.mean([a["2"] for a in result["accuracy_per_seed"]]))
        assert len(result["epochs_per_seed"]) == len(result["accuracy_per_seed"]) == 2
        assert result["times_as_long"] == pytest.approx(result["train_seconds"] / ours["train_seconds"])
        assert result["best_seconds"] <= result["train_seconds"]
        assert f"\n{baseline.BASELINES[name]}, 2 seeds " in printed.err
    assert rivals["cnn"]["peak_rss_bytes"] > 100 << 20  # of a process with PyTorch in it
    assert "filters" in rivals["frozen"]["stage_seconds"] and "filters" not in rivals["cnn"]["stage_seconds"]
    assert (ours["preset"], ours["seed"], ours["seeds"]) == ("lee2017", 3, 2)
