"""The rivals in the paper's table, trained in PyTorch by a process of their own.

`python streamcnn/cnn.py DATA.npz SEED.npz SYSTEM THREADS SEED` is run by its path and imports nothing of the package, which would load
what PyTorch does not need (SciPy, scikit-learn, h5py: 140 MiB) and so speak against the rival. `streamcnn.baseline` writes the files,
starts it and reads the JSON object it prints.
"""

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# What the paper leaves open. Any network recognises the held-out images of subset 1 as they are, with a loss that says little. So the
# choice was made by them under made-up light: pixels times exp(s (x cos t + y sin t - 1)), x and y from -1 to 1, t at random, s = 1, 2,
# 3; seed 0, and the last ones also seed 1. Recognised, in percent: ReLU and max pooling 36 / 13 / 8, tanh and mean pooling 95 / 69 / 39,
# clipping with batch normalisation 98 / 97 / 95. (Of subset 3, printed beside it, 54, 96 and 99 to 100.) Dropout, light varied in
# training, 128 hidden units and a hidden layer of tanh gained nothing. Learning rates of 1e-3 and 2e-3 stop sooner on some seeds and are
# up to 4 points worse; 3e-4 takes longer for a loss of 0.019 instead of 0.022 and the same images; batches of 32 are as quick an image,
# and learn in more epochs.
HIDDEN = 256
BATCH_SIZE = 16
LEARNING_RATE = 5e-4
# epochs without an improvement of the held-out loss, in nats, by more than IMPROVEMENT. Ten took twice the epochs for a loss of 0.014
# instead of 0.022, and for no image more
PATIENCE, IMPROVEMENT = 5, 1e-3
MOST_EPOCHS = 200


def standardized(torch: Any, images: np.ndarray) -> Any:
    """Images uint8 (n, height, width, channels) as float32 (n, channels, height, width), each of mean 0 and deviation 1."""
    pixels = torch.from_numpy(images).to(torch.float32).permute(0, 3, 1, 2).contiguous()
    mean = pixels.mean((1, 2, 3), keepdim=True)
    # one grey level at least: an image of one value has no deviation
    deviation = pixels.std((1, 2, 3), keepdim=True, unbiased=False).clamp_min(1.0)
    return (pixels - mean) / deviation


def trainable_layers(torch: Any, shapes: list[tuple[int, ...]], pools: list[int]) -> list[Any]:
    """The layers of preset `lee2017`, to be trained: convolution, responses brought to order one, clipped to -1..1, pooled by their mean.

    What the preset does by a scale, batch normalisation does here. Each of `shapes` is (n_filters, height, width, channels); initial
    weights are PyTorch's.
    """
    nn, layers = torch.nn, []
    for (n_filters, height, width, channels), pool in zip(shapes, pools):
        convolution = nn.Conv2d(channels, n_filters, (height, width), bias=False)  # the normalisation has one
        layers += [convolution, nn.BatchNorm2d(n_filters), nn.Hardtanh(), nn.AvgPool2d(pool)]
    return layers


def frozen_features(torch: Any, pixels: Any, filters: list[np.ndarray], pools: list[int]) -> Any:
    """What the layers of preset `lee2017` make of standardised images: (n, height, width, channels) as rows, float32.

    Each filter is (n_filters, height, width, channels) and applied as it is; responses are clipped to -1..1 and pooled by their mean.
    """
    functional, rows = torch.nn.functional, []
    weights = [torch.from_numpy(bank).permute(0, 3, 1, 2) for bank in filters]
    with torch.no_grad():
        for x in pixels.split(BATCH_SIZE):
            for weight, pool in zip(weights, pools):
                x = functional.avg_pool2d(functional.hardtanh(functional.conv2d(x, weight)), pool)
            rows.append(x.permute(0, 2, 3, 1).flatten(1))
    return torch.cat(rows)


def neural_network(torch: Any, n_inputs: int, n_classes: int) -> list[Any]:
    """The fully connected network behind the layers: one hidden layer, clipped as the layers before it are."""
    return [torch.nn.Linear(n_inputs, HIDDEN), torch.nn.Hardtanh(), torch.nn.Linear(HIDDEN, n_classes)]


def outputs(torch: Any, model: Any, inputs: Any) -> Any:
    """Outputs (n, n_classes) of a model for training images or others, by batches: it takes no more memory than a step of training."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in inputs.split(BATCH_SIZE)])


def train(torch: Any, model: Any, inputs: Any, labels: Any, held_out: Any) -> dict[str, Any]:
    """Adam on cross-entropy by mini-batches, until it improves no more on held-out images; leaves the model with its best weights.

    Parameters
    ----------
    inputs : tensor (n, ...), float32
        Of training images only.
    labels : tensor (n,), int64
    held_out : tensor (n,), bool
        Images that no step sees; their loss decides when to stop and which weights are best.

    Returns
    -------
    dict
        `epochs` trained, `best_epoch` (from 1), `best_seconds` from the start to its end, `held_out_loss` in nats and
        `held_out_accuracy` then.
    """
    start, lowest, since = time.perf_counter(), float("inf"), 0
    best: dict[str, Any] = {}
    cross_entropy, weights = torch.nn.functional.cross_entropy, model.state_dict()
    # fused: 2 ms a step instead of 5. Channels last was no faster (1.8 ms an image and step, batches of 16 to 64 alike)
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    rows, (unseen, truth) = torch.nonzero(~held_out)[:, 0], (inputs[held_out], labels[held_out])
    epoch = 0
    while epoch < MOST_EPOCHS and since < PATIENCE:
        epoch += 1
        model.train()
        for batch in rows[torch.randperm(len(rows))].split(BATCH_SIZE):
            optimiser.zero_grad()
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimiser.step()
        found = outputs(torch, model, unseen)
        loss = float(cross_entropy(found, truth))
        since += 1
        if not best or loss < lowest - IMPROVEMENT:
            lowest, since = loss, 0
        if not best or loss < best["held_out_loss"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            accuracy = float((found.argmax(1) == truth).float().mean())
            seconds = time.perf_counter() - start
            best = {"best_epoch": epoch, "best_seconds": seconds, "held_out_loss": loss, "held_out_accuracy": accuracy}
    model.load_state_dict(weights)
    return best | {"epochs": epoch}


def run(data: Path, seeded: Path, system: str, n_threads: int, seed: int) -> dict[str, Any]:
    """Train one system for one seed, then try it on the test subsets, which nothing before has read.

    Parameters
    ----------
    data : Path
        `.npz` of `images_S` uint8 (n, height, width, channels) and `labels_S` int (n,), S from 1, the training images, to 5.
    seeded : Path
        `.npz` of `held_out` bool (n,), `pools` int (layers,), and `filters_1`, `filters_2`, ...: of "cnn" only their shapes count.
    system : "cnn" or "frozen"

    Returns
    -------
    dict
        What `train` gives, `accuracy` (subset -> fraction), `train_seconds` (all since the images are in memory), `stage_seconds`,
        `peak_rss_bytes` of the process and `peak_exact`.
    """
    with np.load(data) as arrays, np.load(seeded) as choices:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(n_threads)
        torch.manual_seed(seed)
        images, labels = arrays["images_1"], torch.from_numpy(arrays["labels_1"].astype(np.int64))
        held_out, pools = torch.from_numpy(choices["held_out"]), choices["pools"].tolist()
        filters = [choices[f"filters_{number}"] for number in range(1, len(pools) + 1)]
        clock = [time.perf_counter()]
        n_classes, nn = int(labels.max()) + 1, torch.nn

        def inputs(images: np.ndarray) -> Any:
            pixels = standardized(torch, images)
            return frozen_features(torch, pixels, filters, pools) if system == "frozen" else pixels

        training = inputs(images)
        clock.append(time.perf_counter())
        layers: list[Any] = []
        if system == "cnn":
            layers = [*trainable_layers(torch, [bank.shape for bank in filters], pools), nn.Flatten()]
        with torch.no_grad():
            n_inputs = nn.Sequential(*layers)(training[:1]).shape[1]
        model = nn.Sequential(*layers, *neural_network(torch, n_inputs, n_classes))
        result = train(torch, model, training, labels, held_out)
        clock.append(time.perf_counter())
        accuracy = {}
        for subset in sorted({name.partition("_")[2] for name in arrays.files} - {"1"}):
            images, truth = arrays[f"images_{subset}"], torch.from_numpy(arrays[f"labels_{subset}"])
            right = 0
            for first in range(0, len(images), BATCH_SIZE):
                part = slice(first, first + BATCH_SIZE)
                right += int((outputs(torch, model, inputs(images[part])).argmax(1) == truth[part]).sum())
            accuracy[subset] = right / len(images)
        clock.append(time.perf_counter())
    stages = {name: after - before for name, before, after in zip(("prepare", "train", "evaluate"), clock, clock[1:])}
    system_memory = _by_path("system")
    peak = system_memory.peak_resident_bytes()
    return result | {
        "best_seconds": stages["prepare"] + result["best_seconds"],
        "accuracy": accuracy,
        "train_seconds": stages["prepare"] + stages["train"],
        "stage_seconds": stages,
        "peak_rss_bytes": system_memory.resident_bytes() if peak is None else peak,
        "peak_exact": peak is not None,
    }


def _by_path(name: str) -> Any:
    """A module of the package that imports none of its others, without the package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    data, seeded, system, n_threads, seed = sys.argv[1:]
    sys.stdout.write(json.dumps(run(Path(data), Path(seeded), system, int(n_threads), int(seed))) + "\n")
