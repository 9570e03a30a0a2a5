"""Writes `tests/archive/v<N>/`: a tiny store and model as this version writes them, and beside them what reading them has to give.

Run once for each version of the formats, when it is released; files that are there already are never written again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from streamcnn import ConvLayer, FeatureStore, StreamCNNClassifier, load_model
from streamcnn.arrays import load_arrays
from streamcnn.images import open_images
from streamcnn.model import FORMAT_VERSION as MODEL_VERSION
from streamcnn.store import FORMAT_VERSION as STORE_VERSION
from streamcnn.store import KINDS

CLASSES = np.array(["circle", "été", "square"])


def make_images() -> tuple[np.ndarray, np.ndarray]:
    """24 images uint8 (24, 8, 8, 1) of three noisy patterns, and their labels; sorted by nothing."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 3, 24)
    patterns = rng.integers(40, 215, (3, 8, 8, 1))
    return np.clip(patterns[codes] + rng.integers(-40, 40, (24, 8, 8, 1)), 0, 255).astype(np.uint8), CLASSES[codes]


def expected(folder: Path, images: np.ndarray) -> dict:
    """What reading the files of `folder` gives, as JSON."""
    store, model = FeatureStore(folder / "store"), load_model(folder / "model.h5")
    found: dict = {"store_version": STORE_VERSION, "model_version": MODEL_VERSION, "images": images.tolist(), "rows": {}, "labels": {}}
    for kind in KINDS:
        for rows, labels in store.iter_batches(1 << 20, kind):
            found["rows"][kind], found["labels"][kind] = rows.astype(np.float64).tolist(), labels.tolist()
    found["manifest"] = store.entries
    found["stages"] = {
        name: {key: array.tolist() for key, array in load_arrays(folder / f"store/stages/{name}.h5", "streamcnn-stage", 1)[0].items()}
        for name in ("filters", "pca", "svm")
    }
    decisions = np.concatenate([values for _, values in model.decisions(open_images(images), device="cpu")])
    found["decisions"], found["classes"] = decisions.tolist(), model.classes_.tolist()
    found["predictions"] = model.classes_[model.labels_of(decisions)].tolist()
    return found


def main() -> int:
    """Make the folder; the exit code is 1 where it is there already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, default=Path(__file__).parent.parent / "tests" / "archive")
    folder = parser.parse_args().archive / f"v{max(STORE_VERSION, MODEL_VERSION)}"
    if folder.exists():
        sys.stderr.write(f"{folder} is there already, and archived files are never written again\n")
        return 1
    images, labels = make_images()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / folder.name
        layers = [ConvLayer(3, 3, filters="random", activation="split", pool_grid=(2, 2))]
        parameters = {"layers": layers, "n_components": 4, "kernel": "linear", "C": 1.0, "device": "cpu", "n_jobs": 1, "random_state": 0}
        StreamCNNClassifier(store=made / "store", **parameters).fit(images, labels)
        (made / "store/model.h5").rename(made / "model.h5")
        for name in (".lock", "memory.csv"):
            (made / "store" / name).unlink(missing_ok=True)
        text = json.dumps(expected(made, images), ensure_ascii=False, sort_keys=True)
        (made / "expected.json").write_text(text, encoding="utf-8")
        shutil.copytree(made, folder)
    sys.stdout.write(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file())} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
