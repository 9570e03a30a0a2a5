"""PCA and SVM go on from what they kept, to the same bits, and read no finished row again."""

import numpy as np
import pytest

from streamcnn import StreamingPCA, StreamingSVC
from streamcnn.checkpoint import FileCheckpoint, with_checkpoint
from streamcnn.progress import CountedRows
from streamcnn.rows import ArrayRows

RNG = np.random.default_rng(0)
ROWS = (RNG.standard_normal((5000, 40)) * np.linspace(3, 0.1, 40)).astype(np.float32)
LABELS = (ROWS[:, 0] + ROWS[:, 1] * ROWS[:, 2] > 0).astype(int) + 2 * (ROWS[:, 3] > 0)


class Interrupted(Exception):
    pass


class Run:
    """A computation that is stopped at its k-th place, then goes on."""

    def __init__(self, folder, compute):
        self.folder, self.compute = folder, compute

    def __call__(self, stop_at=None, digest="digest"):
        """What `compute` gives, and how many rows were read for it now."""
        calls = 0

        def stop():
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Interrupted

        self.read = 0

        def count(n):
            self.read += n

        source = ArrayRows(ROWS)
        read = source.read
        source.read = lambda *arguments: (read(*arguments), count(arguments[1] - arguments[0]))
        rows = CountedRows(source, lambda n: None)
        result = self.compute(rows, FileCheckpoint(self.folder, digest, rows, stop, durable=False))
        self.places, self.counted = calls, rows.n_read
        return result


@pytest.fixture
def keep_all(monkeypatch):
    monkeypatch.setattr("streamcnn.checkpoint.STEP_SECONDS", 0)


def pca(**parameters):
    def compute(rows, checkpoint):
        return StreamingPCA(n_jobs=1, random_state=0, **parameters).fit(rows, checkpoint=checkpoint).to_arrays()

    return compute


def svm(**parameters):
    def compute(rows, checkpoint):
        fitted = StreamingSVC(n_jobs=1, random_state=0, **parameters).fit(rows, LABELS, checkpoint=checkpoint)
        return fitted.to_arrays() | {"tried": np.array(list(fitted.selection_.values()))}

    return compute


def check_every_place(folder, compute, overlap):
    """Stopped at each place where it keeps its state, it ends in the same bits, and reads at most `overlap` rows twice."""
    whole = Run(folder / "whole", compute)
    expected = whole()
    total, places = whole.read, whole.places
    assert places > 1
    for place in range(1, places + 1):
        run = Run(folder / str(place), compute)
        with pytest.raises(Interrupted):
            run(stop_at=place)
        before = run.read
        found = run()
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{name}, stopped at {place}")
        assert before + run.read <= total + overlap
        assert run.counted == whole.counted  # the bar ends where it would have


@pytest.mark.parametrize(
    ("parameters", "overlap"),
    [
        ({"solver": "covariance", "n_components": 5}, 0),
        ({"solver": "covariance", "n_components": 5, "whiten": True}, 0),
        ({"solver": "randomized", "n_components": 4}, 0),
        ({"solver": "incremental", "n_components": 4, "batch_size": 700}, 0),
    ],
)
def test_pca_stopped_anywhere_goes_on_to_the_same_bits(parameters, overlap, tmp_path, keep_all, monkeypatch):
    monkeypatch.setattr("streamcnn.moments.gram_rows", lambda d: 1024)
    monkeypatch.setattr("streamcnn.pca.gram_rows", lambda d: 1024)
    check_every_place(tmp_path, pca(**parameters), overlap)


@pytest.mark.parametrize(
    "parameters",
    [
        {"kernel": "linear"},
        {"kernel": "linear", "C": 1000.0},
        {"kernel": "linear", "C": 1.0, "probability": True},
        {"kernel": "nystroem", "C": 1.0, "gamma": 1.0, "n_landmarks": 30},
        {"kernel": "nystroem", "n_landmarks": 20, "probability": True},
    ],
    ids=lambda parameters: " ".join(map(str, parameters.values())),
)
def test_svm_stopped_anywhere_goes_on_to_the_same_bits(parameters, tmp_path, keep_all, monkeypatch):
    # two planes at a time; the landmarks are looked up again, and with probabilities the rows held out
    monkeypatch.setattr("streamcnn.hessians._HESSIANS", 2 * 8 * 41 * 41)
    monkeypatch.setattr("streamcnn.nystroem.group_size", lambda m, n: 2)
    check_every_place(tmp_path, svm(**parameters), 3 * len(ROWS))


def test_a_step_that_took_long_is_not_done_again(tmp_path, keep_all):
    calls = []

    def compute():
        calls.append(1)
        return {"a": np.arange(3)}

    for _ in range(2):
        checkpoint = FileCheckpoint(tmp_path, "digest", durable=False)
        np.testing.assert_array_equal(checkpoint.step(compute)["a"], [0, 1, 2])
        assert len(calls) == 1
        checkpoint.step(lambda: {"b": np.ones(2)})


def test_a_quick_step_leaves_no_file(tmp_path):
    FileCheckpoint(tmp_path / "new", "digest").step(lambda: {"a": np.arange(3)})
    assert not (tmp_path / "new").exists()


def test_state_is_kept_when_it_is_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("streamcnn.checkpoint.time.monotonic", lambda: clock[0])
    checkpoint = FileCheckpoint(tmp_path, "digest", durable=False)
    for now, kept in ((120, False), (146, True), (180, False), (192, True)):
        clock[0] = now
        (tmp_path / "state.h5").unlink(missing_ok=True)
        checkpoint.keep(lambda: {"n": np.array(1)})
        assert (tmp_path / "state.h5").exists() == kept, now


@pytest.mark.parametrize("change", ["digest", "step", "damage"])
def test_state_of_something_else_is_none(change, tmp_path, keep_all, monkeypatch):
    monkeypatch.setattr("streamcnn.checkpoint.STATE_SECONDS", 0)
    FileCheckpoint(tmp_path, "digest", durable=False).keep(lambda: {"n": np.arange(100)})
    assert FileCheckpoint(tmp_path, "digest", durable=False).left() is not None
    other = FileCheckpoint(tmp_path, "other" if change == "digest" else "digest", durable=False)
    if change == "step":
        other.step(dict)
    if change == "damage":
        content = bytearray((tmp_path / "state.h5").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "state.h5").write_bytes(content)
    assert other.left() is None


@pytest.mark.parametrize(
    "forged",
    [
        {"n": np.array(100)},
        {"n": np.array(4096), "shift": np.zeros(40), "total": np.zeros(40), "gram": np.zeros((3, 3))},
        {"n": np.array(4096), "shift": np.zeros(40), "total": np.zeros(40), "gram": np.full((40, 40), np.nan)},
        {"n": np.ones(3), "shift": np.zeros(40), "total": np.zeros(40), "gram": np.zeros((40, 40))},
    ],
    ids=["arrays missing", "wrong shape", "no numbers", "a count that is none"],
)
def test_a_made_up_state_is_dropped_and_the_stage_starts_afresh(forged, tmp_path, caplog):
    # its hash and digest are right, as whoever forges them makes these too
    compute = pca(solver="covariance", n_components=5)
    expected = Run(tmp_path / "whole", compute)()
    FileCheckpoint(tmp_path / "forged", "digest", durable=False)._save("state.h5", forged)
    found = Run(tmp_path / "forged", lambda rows, checkpoint: with_checkpoint(checkpoint, lambda kept: compute(rows, kept)))()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert "holds what no run has kept" in caplog.text


def test_errors_of_the_data_are_not_taken_for_those_of_a_checkpoint(tmp_path):
    def fails(checkpoint):
        raise ValueError("of the rows")

    with pytest.raises(ValueError, match="of the rows"):
        with_checkpoint(FileCheckpoint(tmp_path, "digest"), fails)


def test_a_run_that_shall_stop_keeps_the_state_of_svm_too(tmp_path, keep_all):
    compute = svm(kernel="linear", C=1.0)
    run = Run(tmp_path, compute)
    with pytest.raises(Interrupted):
        run(stop_at=4)
    assert (tmp_path / "state.h5").exists()
