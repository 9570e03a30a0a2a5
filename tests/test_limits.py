"""The memory limit holds: whole runs in fresh processes, watched from outside.

A sample of the combinations runs with the suite; `pytest -m large tests/test_limits.py` runs all of them inside memory groups of the
kernel where this machine lets us make one, and those of many gigabytes.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from limits import CGROUPS, MIB, Combination, combinations, command_of, make_data, make_images, prepare, sample, smallest_limit, watch

from streamcnn import load_model, plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches VmHWM from outside, which is Linux's own")
_group_numbers = itertools.count()


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Data of the combinations, made once."""
    return tmp_path_factory.mktemp("limits")


@pytest.fixture
def group():
    """A function that makes a memory group of so many bytes (control groups, version 1), or skips; they are removed at the end."""
    made = []

    def make(n_bytes):
        own = next((line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), None)
        folder = CGROUPS / (own or "").lstrip("/") / f"streamcnn-{os.getpid()}-{next(_group_numbers)}"
        try:
            folder.mkdir()
            (folder / "memory.limit_in_bytes").write_text(str(n_bytes))
        except OSError as error:
            pytest.skip(f"this machine lets us make no memory group ({error})")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        folder.rmdir()


def check(combination: Combination, folder: Path, work: Path, make_group=None):
    """Run one combination and hold it to its plan and its limit."""
    data = make_data(folder, combination.kind, combination.rows, combination.shape)
    prepare(combination, data, work)
    limit = smallest_limit(combination, data, work) if combination.limit == "smallest" else combination.limit * MIB
    done = watch(command_of(combination, data, work, limit), None if make_group is None else make_group(limit))
    assert done.code == 0, done.text
    peak, planned = max(done.peak, done.report["peak_rss_bytes"]), done.report["planned_peak_bytes"]
    assert peak <= planned <= limit
    assert not done.report.get("tightened")
    # where there is more than what the process holds anyway and 256 MiB, the plan is no padding
    if planned >= done.report["base_bytes"] + 256 * MIB:
        assert peak >= 0.6 * planned
    # the peak that the run itself reports is what was seen from outside, but for what comes before its monitor and between two looks
    assert done.report["peak_rss_bytes"] >= 0.9 * done.peak


@pytest.mark.parametrize("combination", sample(6), ids=str)
def test_no_run_passes_its_plan_or_its_limit(combination, data_folder, tmp_path):
    """Peak <= planned <= limit, seen from outside, in a fresh process; neither action of the monitor fires."""
    check(combination, data_folder, tmp_path)


@pytest.mark.large
@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_no_run_passes_its_limit_inside_a_kernel_group(combination, data_folder, tmp_path, group):
    """All of them, each inside a group in which the kernel kills what passes the limit."""
    check(combination, data_folder, tmp_path, group)


def test_a_refusal_comes_before_anything_is_written(data_folder, tmp_path):
    """A limit far too small: exit code 1, the table, and neither model nor store."""
    data = make_data(data_folder, "h5", 3000, (28, 28, 1))
    done = watch([sys.executable, "-m", "streamcnn", "fit", str(data), "--model", str(tmp_path / "m.h5"), "--memory-limit", "100MiB"])
    assert done.code == 1
    assert "already in use" in done.text
    assert "set memory_limit to at least" in done.text
    assert list(tmp_path.iterdir()) == []


def test_the_prefix_of_a_group_is_found(group):
    """Inside a group of 300 MiB nobody is told of more memory than that."""
    code = "from streamcnn.memory import default_limit, machine_bytes; print(machine_bytes(), default_limit())"
    folder = group(300 * MIB)
    command = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c", code]
    machine, default = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert machine == 300 * MIB
    assert default <= 150 * MIB


def write_rows(path: Path, rows: int, shape=(16, 16, 1)) -> Path:
    """`rows` images of 6 classes, the same block again and again, in bounded memory."""
    images, labels = make_images(10_000, shape)
    with h5py.File(path, "w") as file:
        out = file.create_dataset("images", (rows, *shape), "u1", chunks=(min(4096, rows), *shape))
        codes = file.create_dataset("labels", (rows,), "i8")
        for start in range(0, rows, len(images)):
            stop = min(start + len(images), rows)
            out[start:stop], codes[start:stop] = images[: stop - start], labels[: stop - start]
    return path


FEW_FEATURES = """
import json, sys
from streamcnn import ConvLayer, StreamCNNClassifier
path, limit, features, store, model = sys.argv[1:6]
layers = [ConvLayer(int(features) // 98, activation="split")]
classifier = StreamCNNClassifier(
    layers=layers, n_components=64, kernel="linear", C=0.1, memory_limit=limit, store=store, random_state=0, verbose=1
).fit(path)
classifier.save(model)
report = {"peak_rss_bytes": classifier.peak_rss_bytes_, "planned_peak_bytes": classifier.report_.plan.peak_bytes}
report |= {"store_bytes": classifier.report_.store_bytes, "stage_seconds": classifier.report_.stage_seconds}
report["chunk_size"] = classifier.report_.plan.chunk_size
print(json.dumps(report))
"""


def tell(text: str) -> None:
    """Figures of a large run, past pytest's capture."""
    sys.__stderr__.write(f"\n{text}\n")


def fit_few(path: Path, limit: str, work: Path, features: int = 980, group: Path | None = None):
    """Fit with about `features` features an image in a fresh process; the store is removed afterwards."""
    command = [sys.executable, "-c", FEW_FEATURES, str(path), limit, str(features), str(work / "store"), str(work / "m.h5")]
    done = watch(command, group)
    shutil.rmtree(work / "store", ignore_errors=True)
    assert done.code == 0, done.text
    return done


@pytest.mark.large
def test_a_million_images_take_hardly_more_memory_than_a_hundred_thousand(tmp_path):
    """Ten times the images, the same solver and limit: at most 1.05 times the peak."""
    peaks = [fit_few(write_rows(tmp_path / "d.h5", rows), "512MiB", tmp_path, 196).peak for rows in (100_000, 1_000_000)]
    tell(f"peaks {[round(peak / MIB) for peak in peaks]} MiB, ratio {peaks[1] / peaks[0]:.3f}")
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.fixture(scope="module")
def twenty_gigabytes(tmp_path_factory):
    """20 GiB of 96 x 96 colour images from STREAMCNN_LARGE, a file that `tools/make_dataset.py` made; without it from digits, grey."""
    if chosen := os.environ.get("STREAMCNN_LARGE"):
        yield Path(chosen)
        return
    path = tmp_path_factory.mktemp("large") / "big.h5"
    tool = Path(__file__).parent.parent / "tools" / "make_dataset.py"
    subprocess.run([sys.executable, str(tool), str(path), "--from", "digits", "--size", "96x96", "--bytes", "20GiB"], check=True)
    yield path
    path.unlink()


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_twenty_gigabytes_in_a_group_of_one(twenty_gigabytes, tmp_path, group):
    """At least 20 GiB trained under 1 GiB inside a kernel-enforced group of 1 GiB: finishes, is not killed, peak <= limit."""
    assert twenty_gigabytes.stat().st_size >= 20 << 30
    done = fit_few(twenty_gigabytes, "1GiB", tmp_path, group=group(1 << 30))
    tell(f"{done.report}, seen from outside {done.peak}")
    assert max(done.peak, done.report["peak_rss_bytes"]) <= done.report["planned_peak_bytes"] <= 1 << 30


@pytest.mark.large
@pytest.mark.timeout(3600)
def test_a_prefix_gives_the_same_bits_under_eight_gigabytes(twenty_gigabytes, tmp_path, group):
    """The first 50,000 images under 1 GiB in its group and under 8 GiB outside: byte-identical models."""
    with h5py.File(twenty_gigabytes) as file, h5py.File(tmp_path / "prefix.h5", "w") as prefix:
        rows = min(50_000, len(file["images"]))
        out = prefix.create_dataset("images", (rows, *file["images"].shape[1:]), "u1", chunks=file["images"].chunks)
        for start in range(0, rows, 1000):
            out[start : start + 1000] = file["images"][start : min(start + 1000, rows)]
        prefix["labels"] = file["labels"][:rows]
    files = []
    for name, limit, groups in (("small", "1GiB", group(1 << 30)), ("large", "8GiB", None)):
        (tmp_path / name).mkdir()
        fit_few(tmp_path / "prefix.h5", limit, tmp_path / name, group=groups)
        files.append((tmp_path / name / "m.h5").read_bytes())
    assert files[0] == files[1]


def test_the_same_bits_under_any_limit(tmp_path):
    """The smallest limit that does and 4 GiB choose other chunks, and give byte-identical models."""
    path = write_rows(tmp_path / "d.h5", 3000, (24, 24, 1))
    layers = ["--kernel", "linear", "--C", "0.1"]
    files = []
    made = [plan(path, memory_limit="4GiB", kernel="linear").chunk_size]
    smallest = smallest_limit(Combination("h5", 3000, (24, 24, 1), "fast", "fit", "smallest", tuple(layers)), path, tmp_path)
    for name, limit in (("small", smallest), ("large", 4096 * MIB)):
        command = ["fit", str(path), "--model", str(tmp_path / name), *layers, "--memory-limit", str(limit), "--json"]
        done = watch([sys.executable, "-m", "streamcnn", *command])
        assert done.code == 0, done.text
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert made == [1024]
    assert np.isfinite(load_model(tmp_path / "small").svm.coef_).all()
