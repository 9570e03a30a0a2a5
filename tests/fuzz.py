"""Mutated files of every kind that streamcnn reads, each in a process that may die: `python tests/fuzz.py --cases 10000`.

Case i of a seed is always the same file. Allowed is the right result or an error of ours; within 5 seconds and 256 MiB; nothing is
written outside the folder. What right is:

- stores, stages and models: bit for bit what was written, or fewer rows where the manifest ends early (they are computed again). Cases
  called `forged` have valid checksums on changed contents: there any finite result is right, as checksums are no signatures.
- `.npz`, which has checksums: the pixels that were written
- other images: finite pixels of the shape that was declared
"""

import argparse
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
from mutations import edit_json, mutate, mutate_metadata
from PIL import Image

from streamcnn import FeatureStore, StreamCNNError, load_model
from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.images import open_images, write_images_h5
from streamcnn.manifest import config_text, line_of
from streamcnn.system import resident_bytes

SECONDS, MEMORY = 5.0, 256 << 20
ARCHIVED_MODEL = Path(__file__).parent / "archive" / "v1" / "model.h5"
EXTRACT, PROJECT = "e" * 64, "d" * 64
PICTURES = {
    "png": {}, "pgm": {}, "bmp": {}, "jpg": {"quality": 80}, "tif": {"compression": "tiff_lzw"}, "webp": {"lossless": True},
}  # fmt: skip


# -- what is mutated ----------------------------------------------------------------------------------------------------------------
def make_seeds(folder: Path) -> None:
    """Two stores of equal shape and other rows, two models, and two of every kind of image file: in `folder/0` and `folder/1`."""
    for number in (0, 1):
        rng = np.random.default_rng(number)
        here = folder / str(number)
        _make_store(here / "store", rng, str(number))
        arrays, header = load_arrays(ARCHIVED_MODEL, "streamcnn-model", 1)
        header["classes"] = [name + "!" * number for name in header["classes"]]
        save_arrays(here / "model.h5", arrays, header, durable=False)
        images = rng.integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)
        labels = np.arange(10) % 3
        np.save(here / "images.npy", images)
        np.save(here / "images_labels.npy", labels)
        np.savez(here / "stored.npz", images=images, labels=labels)
        np.savez_compressed(here / "deflated.npz", images=images.astype(np.uint16) * 200, labels=np.array(list("abcabcabca")))
        write_images_h5(here / "new.h5", [(images, labels)], 10, (8, 8, 1))
        with h5py.File(here / "old.h5", "w", libver="earliest") as file:
            file.create_dataset("images", data=images.astype(np.float32), chunks=(3, 8, 8, 1), compression="gzip", shuffle=True)
            file["labels"] = ["a", "bb", "c", "a", "bb", "c", "a", "bb", "c", "a"]
        with h5py.File(here / "plain.h5", "w", libver="earliest") as file:
            file["images"], file["labels"] = images, labels
        for suffix, options in PICTURES.items():
            Image.fromarray(rng.integers(0, 256, (24, 20) if suffix == "pgm" else (24, 20, 3)).astype(np.uint8)).save(
                here / f"picture.{suffix}", **options
            )
        deep = Image.fromarray(rng.integers(0, 1 << 16, (24, 20)).astype(np.uint16))
        deep.save(here / "deep.png")
        deep.save(here / "deep.tif")
        Image.fromarray(rng.integers(0, 256, (24, 20, 3)).astype(np.uint8)).save(here / "progressive.jpg", progressive=True)


def _make_store(path: Path, rng, digit: str) -> None:
    values = {"classes": ["a", "b", "c"], "digests": {"extract": EXTRACT, "project": PROJECT}, "fingerprint": "f" * 64}
    with FeatureStore.create(path, values | {"bad_files": [["x.png", "is text"]], "parameters": {"seed": 0}}, durable=False) as store:
        for shard in range(3):
            with store.writing("features", shard, 20 * shard, 20, 12, "float16", EXTRACT) as writer:
                writer.write(np.maximum(rng.normal(size=(20, 12)), 0).astype(np.float16), rng.integers(0, 3, 20))
        store.finish("extract", EXTRACT)
        store.finish("pca", digit * 64, {"mean_": rng.normal(size=12), "components_": rng.normal(size=(4, 12))})
        for shard in range(2):
            with store.writing("reduced", shard, 30 * shard, 30, 4, "float32", PROJECT) as writer:
                writer.write(np.round(rng.normal(size=(30, 4))).astype(np.float32), rng.integers(0, 3, 30))
        store.finish("project", PROJECT)
        store.write_virtual()


# -- what is right ------------------------------------------------------------------------------------------------------------------
class WrongError(Exception):
    """A result that is neither right nor an error of ours."""


def _demand(right: bool, what: str) -> None:
    if not right:
        raise WrongError(what)


def read_rows(store: FeatureStore, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows and labels of a kind."""
    parts = [(rows.copy(), labels) for rows, labels in store.iter_batches(7, kind)]
    return (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])) if parts else (np.zeros((0, 0)), np.zeros(0))


@functools.cache
def _right_store(seeds: Path) -> dict:
    store = FeatureStore(seeds / "0/store")
    return {"config": store.config, "pca": store.stage_arrays("pca", "0" * 64)} | {k: read_rows(store, k) for k in ("features", "reduced")}


def check_store(path: Path, seeds: Path, forged: bool, write: bool) -> None:
    """Reads all of a store, and with `write` takes it as a resumed run does."""
    right = _right_store(seeds)
    store, refused = FeatureStore(path), None
    _demand(forged or store.config == right["config"], "another config.json was taken for true")
    for kind in ("features", "reduced"):
        try:
            rows, labels = read_rows(store, kind)
        except StreamCNNError as error:
            refused = error
            continue
        same = np.array_equal(rows, right[kind][0][: len(rows)]) and np.array_equal(labels, right[kind][1][: len(labels)])
        _demand(not len(rows) or (same and len(rows) == len(labels)), f"other {kind} were read")
    arrays = store.stage_arrays("pca", "0" * 64)
    if arrays is not None and not forged:
        _demand(all(np.array_equal(arrays[name], right["pca"][name]) for name in right["pca"]), "other arrays of a stage were read")
    _demand(refused is None or bool(store.verify()), "verify finds nothing in a store whose rows are refused")
    if write:
        with store:
            store.lock()
            store.begin("features", EXTRACT, check=lambda n: None)
            store.update_config(note=1)
            store.finish("pca", "d" * 64, {"mean_": np.zeros(3)})
            store.write_virtual()
    if refused is not None:
        raise refused


@functools.cache
def _images() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)


def _decide(path: Path) -> tuple[list, np.ndarray]:
    model = load_model(path, resident_bytes() + MEMORY // 2)
    return model.classes_.tolist(), np.concatenate([d for _, d in model.decisions(open_images(_images()), device="cpu")])


@functools.cache
def _right_decisions(seeds: Path) -> tuple[list, np.ndarray]:
    return _decide(seeds / "0/model.h5")


def check_model(path: Path, seeds: Path, forged: bool) -> None:
    """Loads a model and predicts."""
    classes, decisions = _decide(path)
    _demand(bool(np.isfinite(decisions).all()), "decisions that are no numbers")
    right = _right_decisions(seeds)
    _demand(forged or (classes == right[0] and np.array_equal(decisions, right[1])), "other predictions")


@functools.cache
def _right_pixels(path: Path) -> bytes:
    with open_images(path) as source:
        return b"".join(pixels.tobytes() for pixels, _ in source.iter_chunks(4))


def check_images(path: Path, seeds: Path) -> None:
    """Opens images and reads them all, in chunks as a plan under the limit would allow."""
    limit = resident_bytes() + MEMORY // 2
    with open_images(path, memory_limit=limit) as source:
        image = source.row_values * source.dtype.itemsize
        if image + sum(source.scratch_bytes(1).values()) > MEMORY // 4:
            return  # the plan refuses
        pixels, n = [], 0
        for chunk, _ in source.iter_chunks(max(1, min(source.n_samples, (4 << 20) // image))):
            _demand(
                bool(np.isfinite(chunk).all()) and chunk.shape[1:] == source.image_shape, "pixels that are not finite or of another shape"
            )
            n += len(chunk)
            pixels.append(chunk.tobytes() if path.suffix == ".npz" else b"")
        _demand(n == source.n_samples, "another number of images")
    if path.suffix == ".npz":
        allowed = [_right_pixels(seeds / number / path.name) for number in "01"]
        _demand(b"".join(pixels) in allowed, "other pixels than the archive's checksum says")


# -- cases --------------------------------------------------------------------------------------------------------------------------
STORE_FILES = (
    *(f"{folder}.h5" for folder in ("features/00000", "features/00001", "features/00002", "reduced/00001", "stages/pca", "features")),
    *("manifest.jsonl", "config.json"),
)
STORE_PARTS = ("manifest lines", "forged manifest", "config values", "forged config", "swapped shards", "metadata of a store")
IMAGE_FILES = (
    *("images.npy", "images_labels.npy", "stored.npz", "deflated.npz", "new.h5", "old.h5", "plain.h5"),
    *("deep.png", "deep.tif", "progressive.jpg", *(f"picture.{suffix}" for suffix in PICTURES)),
)
MODEL_PARTS = ("model.h5", "model.h5", "forged header", "forged arrays", "metadata of a model")
IMAGE_PARTS = ("zip members", "metadata of images", *IMAGE_FILES)
TARGETS = (*(f"store/{name}" for name in STORE_FILES), *STORE_PARTS, *MODEL_PARTS, *IMAGE_PARTS)


def run_case(number: int, seed: int, seeds: Path, folder: Path) -> str:
    """Makes case `number` in `folder` and judges what streamcnn does: "right", or the name of the error it raises."""
    rng = np.random.default_rng([seed, number])
    target = TARGETS[number % len(TARGETS)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mine, other = seeds / "0", seeds / "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if target.startswith("store/") or target in STORE_PARTS:
                shutil.copytree(mine / "store", folder / "store")
                _spoil_store(folder / "store", other / "store", target, rng)
                check_store(folder / "store", seeds, target.startswith("forged"), write=bool(rng.integers(3) == 0))
            elif target in MODEL_PARTS:
                _spoil_model(mine, other, folder, target, rng)
                check_model(folder / "model.h5", seeds, target.startswith("forged"))
            else:
                check_images(_spoil_images(mine, other, folder, target, rng), seeds)
    except StreamCNNError as error:
        _demand(bool(str(error)) and "\n" not in str(error).strip(), f"an error of more than one line: {error}")
        return type(error).__name__
    return "right"


def _spoil_store(store: Path, other: Path, target: str, rng) -> None:
    if target == "metadata of a store":
        path = store / str(rng.choice(["features/00001.h5", "reduced/00000.h5", "stages/pca.h5"]))
        path.write_bytes(mutate_metadata(path.read_bytes(), rng))
    elif target == "swapped shards":
        for name in rng.choice(["features/00000.h5", "features/00001.h5", "reduced/00000.h5"], int(rng.integers(1, 3)), replace=False):
            source = store / "features/00002.h5" if rng.integers(3) == 0 and name.startswith("features") else other / name
            shutil.copy(source, store / name)
    elif target.endswith("config") or target == "config values":
        config = json.loads((store / "config.json").read_text())
        crc, config = config.pop("crc"), edit_json({k: v for k, v in config.items() if k != "crc"}, rng)
        text = config_text(config) if target.startswith("forged") else json.dumps(config | {"crc": crc})
        (store / "config.json").write_text(text)
    elif "manifest" in target and not target.startswith("store/"):
        lines = (store / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        at = int(rng.integers(len(lines)))
        entry = json.loads(lines[at])
        changed = edit_json({k: v for k, v in entry.items() if k != "crc"}, rng)
        action = int(rng.integers(5))
        if target == "forged manifest" and action:
            lines[at] = line_of(changed)
        elif action == 0:
            lines.insert(int(rng.integers(len(lines))), lines.pop(at) if rng.integers(2) else lines[at])
        elif action == 1:
            del lines[at]
        else:
            lines[at] = json.dumps(changed | {"crc": entry["crc"]}).encode() + b"\n"
        (store / "manifest.jsonl").write_bytes(b"".join(lines))
    else:
        path = store / target.removeprefix("store/")
        path.write_bytes(mutate(path.read_bytes(), (other / target.removeprefix("store/")).read_bytes(), rng))


def _spoil_model(mine: Path, other: Path, folder: Path, target: str, rng) -> None:
    if target == "model.h5":
        (folder / "model.h5").write_bytes(mutate((mine / "model.h5").read_bytes(), (other / "model.h5").read_bytes(), rng))
        return
    if target == "metadata of a model":
        (folder / "model.h5").write_bytes(mutate_metadata((mine / "model.h5").read_bytes(), rng))
        return
    arrays, header = load_arrays(mine / "model.h5", "streamcnn-model", 1)
    if target == "forged header":
        for _ in range(int(rng.integers(1, 3))):
            header = edit_json(header, rng) or header
    else:
        name = sorted(arrays)[int(rng.integers(len(arrays)))]
        array = arrays[name]
        odd = {
            0: lambda: array[:-1] if array.ndim else array.reshape(1),
            1: lambda: array.astype(np.float64) * np.nan,
            2: lambda: array.astype(np.float64) * 1e300,
            3: lambda: -array,
            4: lambda: array.astype("<i2"),
            5: lambda: np.zeros((0, 3)),
            6: lambda: array[None],
            7: lambda: np.where(rng.integers(0, 2, array.shape), np.float32(np.inf), array),
            8: lambda: np.full_like(array, 127),
        }
        arrays[name] = odd[int(rng.integers(len(odd)))]()
        if rng.integers(8) == 0:
            del arrays[name]
    save_arrays(folder / "model.h5", arrays, header if isinstance(header, dict) else {}, durable=False)


def _spoil_images(mine: Path, other: Path, folder: Path, target: str, rng) -> Path:
    if target == "zip members":
        return _spoil_members(mine, folder / "stored.npz", rng)
    if target == "metadata of images":
        (folder / "new.h5").write_bytes(mutate_metadata((mine / "new.h5").read_bytes(), rng))
        return folder / "new.h5"
    name = "images.npy" if target == "images_labels.npy" else target
    if target == "images_labels.npy":
        shutil.copy(mine / "images.npy", folder / "images.npy")
    (folder / target).write_bytes(mutate((mine / target).read_bytes(), (other / target).read_bytes(), rng))
    return folder / name


def _spoil_members(mine: Path, path: Path, rng) -> Path:
    """An archive with valid checksums whose members are of another method, twice there, of odd names, or promise another shape."""
    with zipfile.ZipFile(mine / "stored.npz") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members.items():
            method = int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
            odd = str(rng.choice([name, name, name, f"../{name}", f"/{name}", name.upper()]))
            if rng.integers(3) == 0:
                shape = str(rng.choice(["(10, 8, 8, 9)", "(-1, 8, 8, 1)", "(10**9,8,8,1)", "(10, 8, 8)", "True", "(10, 8, 8.0, 1)", "()"]))
                content = content.replace(b"(10, 8, 8, 1)", shape.encode().ljust(13)[:13])
            for _ in range(int(rng.choice([1, 1, 2]))):
                archive.writestr(zipfile.ZipInfo(odd), content, method)
    if rng.integers(2):
        path.write_bytes(mutate(path.read_bytes(), path.read_bytes(), rng))
    return path


# -- workers ------------------------------------------------------------------------------------------------------------------------
def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def _snapshot(root: Path) -> list:
    found = [(str(p.relative_to(root)), p.stat().st_size) for p in sorted(root.rglob("*")) if "case" not in p.relative_to(root).parts[:1]]
    return [entry for entry in found if not entry[0].startswith("log")]


def work(cases: range, seed: int, seeds: Path, root: Path) -> None:
    """Runs cases one after another; a line before each and one after go to standard output."""
    for name in ("cwd", "outside"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "outside/secret").write_text("secret")
    os.chdir(root / "cwd")
    linux = sys.platform == "linux"
    # numba, BLAS and the right results are no case's memory or seconds
    _right_store(seeds), _right_decisions(seeds)
    before = _snapshot(root)
    for number in cases:
        sys.stdout.write(f"start {number}\n")
        sys.stdout.flush()
        if linux:
            _reset_peak()
        held, start = resident_bytes(), time.perf_counter()
        try:
            outcome = run_case(number, seed, seeds, root / "case")
        except BaseException as error:  # an error that is not ours is what is looked for
            outcome = f"FINDING {type(error).__name__}: {error}"
        seconds, used = time.perf_counter() - start, _peak() - held if linux else 0
        if seconds > SECONDS:
            outcome = f"FINDING took {seconds:.1f} s ({outcome})"
        if used > MEMORY:
            outcome = f"FINDING held {used >> 20} MiB ({outcome})"
        if (after := _snapshot(root)) != before:
            outcome, before = f"FINDING wrote outside its folder ({outcome})", after
        sys.stdout.write(f"done {number} {json.dumps(outcome)}\n")
        sys.stdout.flush()


def fuzz(cases: range, seed: int, folder: Path, workers: int = 2) -> dict[int, str]:
    """Outcome of each case, run in `workers` processes; one that dies or hangs is a finding, and a new one goes on after it."""
    seeds = folder / "seeds"
    make_seeds(seeds)
    outcomes: dict[int, str] = {}
    running = {w: _start(list(cases)[w::workers], seed, seeds, folder / f"worker{w}", w) for w in range(workers)}
    while running:
        time.sleep(0.05)
        for w, worker in list(running.items()):
            _take(worker, outcomes)
            left = [number for number in worker["cases"] if number not in outcomes]
            dead, silent = worker["process"].poll() is not None, time.monotonic() - worker["since"] > 4 * SECONDS
            if left and not dead and not silent:
                continue
            worker["process"].kill()
            worker["process"].wait()
            worker["log"].close()
            del running[w]
            if left:
                at = left[0]
                why = "hung" if silent and not dead else f"the process died, code {worker['process'].returncode}"
                outcomes[at] = f"FINDING {why}: {Path(worker['errors']).read_text()[-500:]}"
                if left[1:]:
                    running[w] = _start(left[1:], seed, seeds, folder / f"worker{w}", w)
    return outcomes


def _start(cases: list[int], seed: int, seeds: Path, root: Path, worker: int) -> dict:
    root.mkdir(parents=True, exist_ok=True)
    log, errors = root / "log.out", root / "log.err"
    command = [sys.executable, __file__, "--worker", json.dumps([cases, seed, str(seeds), str(root)])]
    with log.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    return {"process": process, "log": log.open(), "errors": errors, "cases": cases, "since": time.monotonic() + 60}


def _take(worker: dict, outcomes: dict[int, str]) -> None:
    """Outcomes written since the last look; a line still being written is left for the next."""
    while True:
        place = worker["log"].tell()
        line = worker["log"].readline()
        if not line.endswith("\n"):
            worker["log"].seek(place)
            return
        worker["since"] = time.monotonic()
        word, number, *rest = line.split(" ", 2)
        if word == "done":
            outcomes[int(number)] = json.loads(rest[0])


def summary(outcomes: dict[int, str]) -> str:
    """How many cases came out how, by what was mutated; findings in full."""
    out = io.StringIO()
    by_target: dict[str, Counter] = {}
    for number, outcome in sorted(outcomes.items()):
        kind = "FINDING" if outcome.startswith("FINDING") else "right" if outcome == "right" else "refused"
        by_target.setdefault(TARGETS[number % len(TARGETS)], Counter())[kind] += 1
    for target, counts in sorted(by_target.items()):
        out.write(f"{target:<26}{counts['right']:>6} right {counts['refused']:>6} refused {counts['FINDING']:>6} findings\n")
    total = sum(by_target.values(), Counter())
    out.write(f"{len(outcomes)} cases: {total['right']} right, {total['refused']} refused, {total['FINDING']} findings\n")
    for number, outcome in sorted(outcomes.items()):
        if outcome.startswith("FINDING"):
            out.write(f"case {number} ({TARGETS[number % len(TARGETS)]}): {outcome}\n")
    return out.getvalue()


def main() -> int:
    """Command line; the exit code is 1 when there are findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        cases, seed, seeds, root = json.loads(args.worker)
        work(cases, seed, Path(seeds), Path(root))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(range(args.first, args.first + args.cases), args.seed, Path(folder), args.workers)
    text = summary(outcomes)
    sys.stdout.write(text)
    return int("FINDING" in "".join(outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
