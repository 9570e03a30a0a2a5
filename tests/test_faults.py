"""A run that dies, is interrupted or finds the disk full leaves a store that opens and goes on to the same model."""

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from children import Child, make_images

from streamcnn import StreamCNNClassifier, cli, faults
from streamcnn.checkpoint import FileCheckpoint
from streamcnn.errors import ParameterError, StoreError
from streamcnn.faults import EXIT_CODE
from streamcnn.progress import interruptible
from streamcnn.store import KINDS, FeatureStore
from streamcnn.storefolder import delete_store

N_IMAGES = 2500
VARIANTS = {
    "covariance and linear": ("--kernel=linear",),
    "randomized and nystroem": (
        "--pca-solver=randomized",
        "--n-components=24",
        "--kernel=nystroem",
        "--n-landmarks=60",
        "--C=1",
        "--gamma=1",
    ),
    "incremental and rbf": ("--pca-solver=incremental", "--n-components=16", "--kernel=rbf", "--C=10", "--gamma=1"),
    "features not kept": ("--keep-features=no", "--kernel=linear", "--C=100", "--n-components=16"),
}


def steps_of(log: Path) -> list[str]:
    """Names of the steps that a run has logged."""
    return [line.partition(" ")[2] for line in log.read_text().splitlines()]


def n_shards(steps: list[str]) -> int:
    """How many shards these steps have finished."""
    return sum(step.startswith(("line for features/", "line for reduced/")) for step in steps)


class Reference:
    """A run that nothing happened to: its steps, its model, and the hash of each shard."""

    def __init__(self, folder: Path, variant: str):
        self.folder, self.options = folder, VARIANTS[variant]
        self.data = make_images(folder / "data.h5", N_IMAGES)
        log = folder / "steps.txt"
        child = self.run(folder, fault="list@1", log=log)
        assert child.wait() == 0, child.text
        self.steps = steps_of(log)
        self.model = (folder / "model.h5").read_bytes()
        with FeatureStore(folder / "store") as store:
            self.hashes = {(kind, e["shard"]): e["sha256"] for kind in KINDS for e in store.shards(kind)}

    def run(self, folder: Path, *more: str, **options) -> Child:
        """Fit in `folder`, from its store if there is one: always the same command."""
        arguments = ["fit", self.data, "--model", folder / "model.h5", "--store", folder / "store", "--threads", "1", "--json", "--resume"]
        return Child([*arguments, *self.options, *more], folder, **options)

    def check_store(self, folder: Path) -> int:
        """The store opens, and all that it says it has is right; returns its number of shards."""
        if not (folder / "store" / "config.json").exists():
            return 0
        with FeatureStore(folder / "store") as store:
            assert store.verify() == []
            shards = {(kind, e["shard"]): e["sha256"] for kind in KINDS for e in store.shards(kind)}
        assert shards.items() <= self.hashes.items()
        return len(shards)

    def check_finished(self, folder: Path, n_before: int) -> None:
        """Going on ends in the same model, nothing finished is done again, and nothing is left lying about."""
        log = folder / "resumed.txt"
        log.unlink(missing_ok=True)
        child = self.run(folder, fault="list@1", log=log)
        assert child.wait() == 0, child.text
        assert (folder / "model.h5").read_bytes() == self.model
        assert n_shards(steps_of(log)) == len(self.hashes) - n_before
        assert self.check_store(folder) == len(self.hashes)
        assert not [file for file in (folder / "store").rglob("*") if file.suffix == ".tmp" or "checkpoints" in file.parts]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    made: dict[str, Reference] = {}

    def get(variant: str) -> Reference:
        if variant not in made:
            made[variant] = Reference(tmp_path_factory.mktemp("reference"), variant)
        return made[variant]

    return get


def kill_once(reference: Reference, folder: Path, number: int) -> None:
    """Let a run die at a step; then everything but that step's shard is there, and it goes on to the same model."""
    child = reference.run(folder, fault=f"exit@{number}")
    assert child.wait() == EXIT_CODE, child.text
    n_before = reference.check_store(folder)
    # the step of the line itself is over when the next one begins
    assert n_before == n_shards(reference.steps[: number - 1])
    reference.check_finished(folder, n_before)
    shutil.rmtree(folder)


def spread(n_steps: int, n: int, seed: int = 0) -> list[int]:
    """`n` of the steps 1 to `n_steps`, drawn from `n` equal parts."""
    rng = random.Random(seed)
    cuts = [round(i * n_steps / n) for i in range(n + 1)]
    return [rng.randint(first + 1, last) for first, last in zip(cuts, cuts[1:])]


def interrupt_once(reference: Reference, folder: Path, number: int, twice: bool) -> None:
    """Ctrl-C at a step: the shard is finished; twice: it is not; a clean end, and the run goes on to the same model."""
    child = reference.run(folder, fault=f"interrupt{'2' if twice else ''}@{number}")
    assert child.wait() == 130, child.text
    assert "Traceback" not in child.text
    assert "interrupted" in child.text
    n_before = reference.check_store(folder)
    if not twice:
        shard_steps = ("write chunk", "write 0", "fsync 0", "rename 0", "fsync folder features", "fsync folder reduced")
        in_shard = reference.steps[number - 1].startswith(shard_steps)
        assert n_before == n_shards(reference.steps[:number]) + in_shard
    reference.check_finished(folder, n_before)
    shutil.rmtree(folder)


def fill_disk(reference: Reference, folder: Path, **fault) -> None:
    """A disk that is full: one clear sentence, and with room again the run goes on to the same model."""
    child = reference.run(folder, **fault)
    assert child.wait() == 1, child.text
    assert "Traceback" not in child.text
    last = child.text.strip().splitlines()[-1]
    assert "cannot be written (No space left on device)" in last or "cannot be written (File too large)" in last
    assert "make room on the disk" in last
    reference.check_finished(folder, reference.check_store(folder))
    shutil.rmtree(folder)


def folders(tmp_path: Path, positions) -> list[tuple[int, Path]]:
    """Positions, each with a new folder."""
    for position in positions:
        (tmp_path / str(position)).mkdir()
    return [(position, tmp_path / str(position)) for position in positions]


@pytest.mark.parametrize(("variant", "n"), [(name, 5 if number == 0 else 3) for number, name in enumerate(VARIANTS)])
def test_a_run_killed_at_a_step_goes_on_to_the_same_model(variant, n, reference, tmp_path):
    # a sample of `test_each_step_killed_once`
    chosen = reference(variant)
    for number, folder in folders(tmp_path, spread(len(chosen.steps), n)):
        kill_once(chosen, folder, number)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_ctrl_c_ends_the_run_where_it_can_go_on(twice, reference, tmp_path):
    # a sample of `test_ctrl_c_at_200_positions`
    chosen = reference("covariance and linear")
    for number, folder in folders(tmp_path, spread(len(chosen.steps), 4, seed=1)):
        interrupt_once(chosen, folder, number, twice)


def test_a_full_disk_is_one_sentence_and_no_loss(reference, tmp_path):
    # a sample of `test_a_disk_full_at_200_positions`
    chosen = reference("covariance and linear")
    for number, folder in folders(tmp_path, spread(len(chosen.steps), 4, seed=2)):
        fill_disk(chosen, folder, fault=f"full@{number}")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
def test_a_limit_of_the_system_on_files_is_met_as_a_full_disk(reference, tmp_path):
    # in the config, a shard of features, the state of the PCA
    chosen = reference("covariance and linear")
    for limit, folder in folders(tmp_path, [2_000, 100_000, 160_000]):
        fill_disk(chosen, folder, file_limit=limit)


def test_a_checkpoint_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    # the folder is a file
    (tmp_path / "checkpoints").write_text("")
    checkpoint = FileCheckpoint(tmp_path / "checkpoints" / "pca", "digest", stop=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamcnn.checkpoint.STATE_SECONDS", 0)
        checkpoint.keep(lambda: {"n": np.array(1)})
    assert "a checkpoint was not kept" in caplog.text
    assert checkpoint.left() is None


def test_a_folder_that_vanishes_is_named(reference, tmp_path):
    # the store is moved away in the middle of the features, of the PCA, of the SVM; moved back, it goes on
    chosen = reference("covariance and linear")
    steps = [chosen.steps.index(name) + 1 for name in ("fsync line for features/00001.h5", "write step-00000.h5")]
    for number, folder in folders(tmp_path, steps):
        child = chosen.run(folder, fault=f"vanish@{number}")
        assert child.wait() == 1, child.text
        assert "Traceback" not in child.text
        assert str(folder / "store") in (last := child.text.strip().splitlines()[-1])
        assert "its folder is gone" in last or "no such file" in last
        shutil.rmtree(folder / "store", ignore_errors=True)
        (folder / "moved away").rename(folder / "store")
        chosen.check_finished(folder, chosen.check_store(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows marks files, not folders, as read-only")
@pytest.mark.parametrize("place", ["", "store", "store/features"], ids=["store to be made", "store", "features"])
def test_a_read_only_folder_is_named(place, reference, tmp_path):
    chosen = reference("covariance and linear")
    (folder := tmp_path / "run").mkdir()
    if place:
        assert chosen.run(folder, fault="exit@30").wait() == EXIT_CODE
    (folder / place).chmod(0o555)
    try:
        arguments = ["fit", chosen.data, "--model", tmp_path / "model.h5", "--store", folder / "store", "--threads", "1", *chosen.options]
        child = Child(arguments, tmp_path, nobody=True)
        assert child.wait() == 1, child.text
    finally:
        (folder / place).chmod(0o777)
    assert "Traceback" not in child.text
    last = child.text.strip().splitlines()[-1]
    assert str(folder / place) in last
    assert "Permission denied" in last
    assert "writable" in last


def test_a_damaged_shard_is_made_again_on_resume_and_named_by_verify(reference, tmp_path):
    chosen = reference("covariance and linear")
    assert chosen.run(tmp_path).wait() == 0
    shard = tmp_path / "store" / "features" / "00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with FeatureStore(tmp_path / "store") as store:
        assert [problem.split(":")[0] for problem in store.verify()] == ["features/00001.h5"]
    chosen.check_finished(tmp_path, len(chosen.hashes) - 1)


def test_verify_data_reads_the_images_again(reference, tmp_path):
    # the file keeps size and time, so that nothing but its pixels tells
    chosen = reference("covariance and linear")
    folder = tmp_path / "run"
    folder.mkdir()
    copied = Path(shutil.copy2(chosen.data, tmp_path / "data.h5"))
    arguments = ["fit", copied, "--model", folder / "model.h5", "--store", folder / "store", "--threads", "1", *chosen.options]
    n_steps = chosen.steps.index("line for features/00002.h5") + 1
    assert Child(arguments, folder, fault=f"exit@{n_steps}").wait() == EXIT_CODE
    child = Child([*arguments, "--resume", "--verify-data"], folder)
    assert child.wait() == 0, child.text
    facts = copied.stat()
    with h5py.File(copied, "r+") as file:
        file["images"][1500] += 1
    os.utime(copied, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert copied.stat().st_size == facts.st_size
    child = Child([*arguments, "--resume", "--verify-data"], folder)
    assert child.wait() == 1
    assert "other images than numbers 1024 to 2047 are now" in child.text
    assert Child([*arguments, "--resume"], folder).wait() == 0  # trusts size and time


def test_a_store_in_use_is_refused_and_a_dead_process_leaves_no_obstacle(reference, tmp_path):
    chosen = reference("covariance and linear")
    with FeatureStore.create(tmp_path / "store"):
        child = chosen.run(tmp_path)
        assert child.wait() == 1
        assert "in use by another process" in child.text
    shutil.rmtree(tmp_path / "store")
    child = chosen.run(tmp_path)
    while not (tmp_path / "store" / "config.json").exists():
        time.sleep(0.001)
    child.process.kill()
    child.process.join()
    chosen.check_finished(tmp_path, chosen.check_store(tmp_path))


@pytest.mark.parametrize("text", ["exit@", "explode@3", "exit"])
def test_a_fault_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="STREAMCNN_FAULT must be one of exit, full, interrupt, interrupt2, list, then @ and a number"):
        faults.inject(text)


@pytest.mark.large
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_killed_once(variant, reference, tmp_path):
    # every write, flush, rename and line of the manifest; where solvers make hundreds of passes, each name's first step and last
    chosen = reference(variant)
    numbers = range(1, len(chosen.steps) + 1)
    if len(numbers) > 400:
        names = [re.sub(r"\.\d+\.tmp", "", step) for step in chosen.steps]
        numbers = sorted({names.index(name) + 1 for name in names} | {len(names) - names[::-1].index(name) for name in names})
    for number, folder in folders(tmp_path, numbers):
        kill_once(chosen, folder, number)
    print(f"\n{variant}: killed at {len(numbers)} of {len(chosen.steps)} steps, same model each time")  # noqa: T201


@pytest.mark.large
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_ctrl_c_at_200_positions(twice, reference, tmp_path):
    chosen = reference("covariance and linear")
    for number, folder in folders(tmp_path, spread(len(chosen.steps), 200)):
        interrupt_once(chosen, folder, number, twice)


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_a_disk_full_at_200_positions(reference, tmp_path):
    chosen = reference("covariance and linear")
    for number, folder in folders(tmp_path, spread(len(chosen.steps), 200)):
        fill_disk(chosen, folder, fault=f"full@{number}")


def small_images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (240, 8, 8), np.uint8), np.arange(240) % 12


def test_a_fit_without_seed_resumes_with_the_seed_of_its_store(tmp_path):
    # each fit without random_state draws one
    images, labels = small_images()
    classifier = StreamCNNClassifier(store=tmp_path / "store", kernel="linear", n_jobs=1)
    first = classifier.fit(images, labels).model_.to_arrays()
    again = classifier.fit(images, labels, resume=True)
    assert again.report_.reused == ["filters", "extract", "pca", "project", "svm"]
    assert all(np.array_equal(array, first[name], equal_nan=True) for name, array in again.model_.to_arrays().items())


def test_a_store_opens_whose_parameters_have_numbers_for_keys(tmp_path):
    # they become text in JSON, which sorts 10 before 2
    images, labels = small_images()
    weights = {label: 1.0 + label for label in range(12)}
    StreamCNNClassifier(store=tmp_path / "store", kernel="linear", class_weight=weights, random_state=0).fit(images, labels)
    assert FeatureStore(tmp_path / "store").verify() == []


def test_ctrl_c_is_not_forgotten_when_nobody_asks(monkeypatch):
    with pytest.raises(KeyboardInterrupt, match="when all was done"), interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interruptible():
        pass


def test_resume_without_a_store_is_refused_and_with_an_empty_one_begins(tmp_path):
    images, labels = small_images()
    with pytest.raises(ParameterError, match="resume=True needs the store of the fit"):
        StreamCNNClassifier().fit(images, labels, resume=True)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".DS_Store").touch()
    assert StreamCNNClassifier(store=tmp_path / "store", kernel="linear").fit(images, labels, resume=True).score(images, labels) > 0.1


def test_verify_data_says_where_it_cannot_be_done(tmp_path):
    images, labels = small_images()
    classifier = StreamCNNClassifier(store=tmp_path / "store", kernel="linear", random_state=0, keep_features=False)
    with pytest.raises(ParameterError, match="verify_data must be False where features are not kept"):
        classifier.fit(images, labels, verify_data=True)
    classifier.set_params(keep_features=True).fit(images, labels)
    with FeatureStore(tmp_path / "store") as store:
        store.lock()
        del store.shards("features")[0]["data_sha256"]
        store._manifest._rewrite()
    with pytest.raises(StoreError, match="was made before images had digests there"):
        classifier.fit(images, labels, verify_data=True)


def test_a_store_half_removed_can_be_used_again(tmp_path, monkeypatch):
    # the process died while it removed the store: what says what the store is goes last
    images, labels = small_images()
    classifier = StreamCNNClassifier(store=tmp_path / "store", kernel="linear", random_state=0).fit(images, labels)
    removed = []

    def dies(path, **options):
        removed.append(path)
        if len(removed) == 3:
            raise KeyboardInterrupt
        real(path, **options)

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        delete_store(tmp_path / "store")
    monkeypatch.undo()
    assert len(list((tmp_path / "store").glob("*/*.h5"))) < 6
    first = classifier.model_.to_arrays()
    again = classifier.fit(images, labels).model_.to_arrays()
    assert all(np.array_equal(array, first[name], equal_nan=True) for name, array in again.items())


@pytest.mark.parametrize("name", ["model.h5", "features.h5"])
def test_verify_looks_at_every_file_of_a_store(name, tmp_path, capsys):
    images, labels = small_images()
    StreamCNNClassifier(store=tmp_path / "store", kernel="linear", random_state=0).fit(images, labels)
    assert cli.main(["verify", str(tmp_path / "store")]) == 0
    path = tmp_path / "store" / name
    path.write_bytes(path.read_bytes()[:1000])
    assert cli.main(["verify", str(tmp_path / "store")]) == 1
    assert f"is damaged: {name}:" in capsys.readouterr().err


def test_partial_fit_stopped_by_ctrl_c_finishes_its_shard_and_goes_on(tmp_path, monkeypatch):
    images, labels = small_images()
    monkeypatch.setattr("streamcnn.checkpoint.STEP_SECONDS", 0)

    def fitted(name):
        return StreamCNNClassifier(store=tmp_path / name, kernel="linear", random_state=0, n_jobs=1).fit(images[:120], labels[:120])

    whole = fitted("whole").partial_fit(images[120:], labels[120:]).model_.to_arrays()
    stopped = fitted("stopped")
    faults.inject("interrupt@2")  # while the shard is written
    try:
        with pytest.raises(KeyboardInterrupt, match=r"the addition was interrupted; .* the same call goes on from there"):
            stopped.partial_fit(images[120:], labels[120:])
    finally:
        faults.inject(None)
    with FeatureStore(tmp_path / "stopped") as store:
        assert len(store.shards("added")) == 1
    again = stopped.partial_fit(images[120:], labels[120:]).model_.to_arrays()
    assert all(np.array_equal(array, whole[name], equal_nan=True) for name, array in again.items())
    assert not (tmp_path / "stopped" / "checkpoints").exists()
