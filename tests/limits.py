"""Runs of streamcnn in fresh processes under a limit, watched from outside; used by `test_limits.py`."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Combination:
    """One run: data, what is run on it, under which limit (MiB, or "smallest" feasible)."""

    kind: str
    rows: int
    shape: tuple[int, int, int]
    preset: str
    stage: str
    limit: int | str
    options: tuple[str, ...] = ()

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        return "-".join([self.kind, str(self.rows), shape, self.preset, self.stage, str(self.limit), *self.options]).replace("--", "")


def combinations() -> list[Combination]:
    """All combinations, in an order that does not change."""
    found = []
    quick = ("--kernel=linear", "--C=0.1")
    small, grey, colour, large = (3000, (28, 28, 1)), (6000, (64, 64, 1)), (8000, (32, 32, 3)), (200, (300, 400, 3))
    for kind in ("h5", "npz", "npy", "folder", "array"):
        for stage in ("fit", "resume", "predict"):
            if (kind, stage) == ("array", "resume"):
                continue
            found += [Combination(kind, *small, "fast", stage, limit) for limit in ("smallest", 640)]
            found.append(Combination(kind, *colour, "fast", stage, 512 if kind == "array" else "smallest", quick))
    for stage in ("fit", "resume", "predict"):
        found += [Combination("h5", *grey, "lee2017", stage, limit, quick) for limit in ("smallest", 1024)]
        found += [Combination("h5", 2000, (48, 48, 1), "lee2017", stage, limit) for limit in ("smallest", 4096)]
        found += [Combination("folder", *large, "fast", stage, limit) for limit in ("smallest", 1024)]
    for limit in ("smallest", 512, 4096):
        found.append(Combination("h5", *colour, "fast", "fit", limit, ("--keep-features=no", *quick)))
        found.append(Combination("h5", *colour, "fast", "fit", limit, ("--feature-dtype=float32", *quick)))
    found.append(Combination("h5", *grey, "fast", "fit", "smallest", ("--n-components=none", *quick)))
    for kind in ("h5", "npy", "folder"):
        found.append(Combination(kind, *small, "fast", "evaluate", "smallest", quick))
    for dtype in ("float32", "uint16"):
        found += [Combination(f"h5:{dtype}", *small, "fast", stage, "smallest", quick) for stage in ("fit", "predict")]
    found.append(Combination("h5:classes", 3000, (12, 12, 1), "fast", "fit", "smallest", ("--n-components=32", *quick)))
    found.append(Combination("h5:classes", 3000, (12, 12, 1), "fast", "evaluate", "smallest", ("--n-components=32", *quick)))
    found.append(Combination("h5", *small, "fast", "fit", "smallest", ("--n-components=4", *quick)))
    found.append(Combination("h5", *small, "fast", "fit", "smallest", ("--n-components=400", "--pca-solver=incremental", *quick)))
    found.append(Combination("h5", *colour, "fast", "fit", "smallest", ("--n-components=none", "--keep-features=no", *quick)))
    marks = ("--kernel=nystroem", "--n-landmarks=600", "--C=1", "--gamma=1")
    found += [Combination("h5", *small, "fast", stage, "smallest", marks) for stage in ("fit", "evaluate")]
    found += [Combination("array", *small, "fast", "transform", limit) for limit in (512, 1024)]
    found.append(Combination("folder", 300, (300, 400, 3), "fast", "fit", "smallest", ("--image-size=64x64",)))
    return found


def sample(n: int, seed: int = 0) -> list[Combination]:
    """`n` of them, at least one of each stage and kind while `n` allows."""
    everything = combinations()
    random.Random(seed).shuffle(everything)
    chosen: list[Combination] = []
    for key in (lambda c: (c.stage,), lambda c: (c.kind,), lambda c: (c.limit == "smallest",), lambda c: (c.preset,)):
        for combination in everything:
            if len(chosen) < n and key(combination) not in {key(c) for c in chosen}:
                chosen.append(combination)
    return (chosen + [c for c in everything if c not in chosen])[:n]


def make_images(rows: int, shape: tuple[int, int, int], n_classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 of some classes, one pattern each under noise; sorted by class, as folders are."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(60, 200, (n_classes, *shape))
    labels = np.sort(rng.integers(0, n_classes, rows))
    images = np.empty((rows, *shape), np.uint8)
    for start in range(0, rows, 256):
        part = labels[start : start + 256]
        images[start : start + 256] = np.clip(patterns[part] + rng.integers(-60, 60, (len(part), *shape)), 0, 255)
    return images, labels


def make_data(folder: Path, kind: str, rows: int, shape: tuple[int, int, int]) -> Path:
    """The data of a combination as files, made once a folder."""
    kind, _, variant = kind.partition(":")
    path = folder / f"{kind}{variant}-{rows}-{'x'.join(map(str, shape))}"
    path = path if kind == "folder" else path.with_suffix(".npy" if kind == "array" else f".{kind}")
    if path.exists():
        return path
    images, labels = make_images(rows, shape, 1000 if variant == "classes" else 6)
    if variant in ("float32", "uint16"):
        images = images.astype(variant) * (100 if variant == "uint16" else 1)
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=images, chunks=(min(rows, max(1, MIB // images[0].nbytes)), *shape))
            file["labels"] = labels
    elif kind == "npz":
        np.savez(path, images=images, labels=labels)
    elif kind == "folder":
        for row, (image, label) in enumerate(zip(images, labels)):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0] if shape[2] == 1 else image).save(path / str(label) / f"{row:06d}.{'png' if row % 2 else 'bmp'}")
    else:
        np.save(path, images)
        np.save(path.with_name(f"{path.stem}_labels.npy"), labels)
    return path


@dataclass
class Outcome:
    """What a child did: exit code, its JSON, what it wrote for people, and the highest high-water mark seen from outside."""

    code: int
    report: dict
    text: str
    peak: int


def watch(command: list[str], group: Path | None = None, env: dict | None = None) -> Outcome:
    """Run a command; its VmHWM is read every 5 ms (it starts afresh with every stage). With `group` inside that control group."""
    if group is not None:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}) as child:
        peak, done = 0, threading.Event()

        def poll() -> None:
            nonlocal peak
            while not done.is_set():
                try:
                    text = Path(f"/proc/{child.pid}/status").read_text()
                    peak = max(peak, 1024 * int(text.split("VmHWM:")[1].split()[0]))
                except (OSError, IndexError):
                    pass
                time.sleep(0.005)

        thread = threading.Thread(target=poll)
        thread.start()
        out, err = child.communicate()
        done.set()
        thread.join()
    lines = out.strip().splitlines()
    return Outcome(child.returncode, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}, err, peak)


_ARRAY_CHILD = """
import json, sys
import numpy as np
from streamcnn import StreamCNNClassifier
path, preset, limit, stage, kernel = sys.argv[1:6]
images, labels = np.load(path), np.load(path.replace(".npy", "_labels.npy"))
model = StreamCNNClassifier(preset=preset, kernel=kernel, memory_limit=int(limit), random_state=0).fit(images, labels)
report = {"peak_rss_bytes": model.peak_rss_bytes_, "planned_peak_bytes": model.report_.plan.peak_bytes, "memory_limit_bytes": int(limit)}
report["base_bytes"] = model.report_.plan.base_bytes
if stage == "predict":
    report["accuracy"] = model.score(images, labels)
print(json.dumps(report))
"""

_TRANSFORM_CHILD = """
import json, sys
import numpy as np
from streamcnn import ConvFeatures, ConvLayer, MemoryMonitor, StreamCNNError
path, preset, limit, stage, kernel = sys.argv[1:6]
images = np.load(path)
features = ConvFeatures([ConvLayer(16, 5, filters="random")], memory_limit=int(limit), random_state=0)
try:
    with MemoryMonitor(limit) as monitor:
        rows = features.fit(images).transform(images)
except StreamCNNError as error:
    sys.exit(f"{error}")
report = {"peak_rss_bytes": monitor.peak_bytes, "planned_peak_bytes": max(monitor.stage_planned.values() or [int(limit)])}
print(json.dumps(report | {"memory_limit_bytes": int(limit), "base_bytes": int(limit), "rows": len(rows)}))
"""


def command_of(c: Combination, data: Path, work: Path, limit: int) -> list[str]:
    """The command line of a combination under `limit` bytes."""
    if c.kind == "array":
        child = _TRANSFORM_CHILD if c.stage == "transform" else _ARRAY_CHILD
        kernel = "linear" if "--kernel=linear" in c.options else "auto"
        return [sys.executable, "-c", child, str(data), c.preset, str(limit), c.stage, kernel]
    base = [sys.executable, "-m", "streamcnn"]
    common = ["--memory-limit", str(limit), "--json"]
    if c.stage == "predict":
        return [*base, "predict", str(work / "model.h5"), str(data), "--output", str(work / "p.csv"), *common]
    if c.stage == "evaluate":
        return [*base, "evaluate", str(work / "model.h5"), str(data), *common]
    fit = [*base, "fit", str(data), "--model", str(work / "m.h5"), "--store", str(work / "store"), "--preset", c.preset, *c.options]
    return [*fit, *(["--resume"] if c.stage == "resume" else []), *common]


def prepare(c: Combination, data: Path, work: Path) -> None:
    """What must be there before the run: a model to predict with, or a store whose run stopped after its first shard."""
    if c.kind == "array" or c.stage == "fit":
        return
    done = watch(command_of(Combination(c.kind, c.rows, c.shape, c.preset, "fit", 4096, c.options), data, work, 4096 * MIB))
    assert done.code == 0, done.text
    if c.stage in ("predict", "evaluate"):
        (work / "m.h5").rename(work / "model.h5")
        return
    (work / "m.h5").unlink()
    manifest = work / "store" / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    # its last line torn, as a process killed while writing leaves it
    manifest.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])


def smallest_limit(c: Combination, data: Path, work: Path) -> int:
    """Bytes of the smallest limit, as the refusal of a far too small one names it."""
    refused = watch(command_of(c, data, work, MIB))
    assert refused.code == 1, refused.text
    assert not (work / "m.h5").exists()
    return MIB * int(refused.text.split("set memory_limit to at least ")[1].split("MiB")[0])
