"""Threads, forked and spawned processes: the same bits as alone, no abort, no hang, or an error that says what to do."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import h5py
import joblib
import numpy as np
import pytest
from sklearn.model_selection import cross_val_predict
from threadpoolctl import threadpool_info

from streamcnn import ConvLayer, MemoryMonitor, StreamCNNClassifier, open_images
from streamcnn.errors import StoreError
from streamcnn.memory import _lock as memory_lock
from streamcnn.store import FeatureStore
from streamcnn.threads import limit_blas

LAYERS = [ConvLayer(6, 3, filters="random", pool_size=3)]
FEW_FEATURES = [ConvLayer(6, 3, filters="random", pool_size=20)]
# a hang is a failure: far longer than any of this takes, on a busy machine too
PATIENCE = 60

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def classifier(**changes):
    return StreamCNNClassifier(**{"layers": LAYERS, "n_components": 12, "kernel": "linear", "C": 1.0, "random_state": 0} | changes)


def large(**changes):
    """For images of 64 x 64, on which convolution takes the time."""
    return classifier(layers=FEW_FEATURES, **changes)


def at_once(*works):
    """Results of functions that start at the same time, each on a thread of its own."""
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(run, work) for work in works]]


class Forked:
    """A forked child that runs `work(pipe)`; `result` is what that returns, or fails with its traceback."""

    def __init__(self, work):
        context = multiprocessing.get_context("fork")
        self.pipe, inner = context.Pipe()

        def run():
            try:
                inner.send(work(inner))
            except BaseException:
                inner.send(traceback.format_exc())

        self.process = context.Process(target=run, daemon=True)
        self.process.start()

    def receive(self):
        if not self.pipe.poll(PATIENCE):
            self.process.kill()
            pytest.fail("the forked child hangs")
        return self.pipe.recv()

    def result(self):
        received = self.receive()
        self.process.join(PATIENCE)
        return received


# --- threads ---------------------------------------------------------------------------------------------------------------------


def test_two_fits_at_once_are_those_made_alone(digits):
    """Two estimators with other seeds, kernels and numbers of threads, fitted in two threads: filters, PCA and SVM have the same bits."""
    # large enough that convolutions of both overlap
    images, labels = digits[0][:300].repeat(8, axis=1).repeat(8, axis=2), digits[1][:300]
    makers = [lambda: large(n_jobs=1), lambda: large(random_state=1, kernel="rbf", gamma=1.0, n_jobs=2)]

    def arrays(make):
        return make().fit(images, labels).model_.to_arrays()

    alone = [arrays(make) for make in makers]
    for _ in range(2):
        for one, other in zip(alone, at_once(*[lambda make=make: arrays(make) for make in makers])):
            assert one.keys() == other.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], other[name], strict=True)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "nystroem"])
def test_one_model_predicts_in_two_threads(digits, kernel):
    """Many images and single ones at once, from a model just fitted: each decision as alone."""
    images, labels = digits[0][:300], digits[1][:300]
    make = classifier(kernel=kernel, gamma=1.0, n_landmarks=40).fit(images, labels)
    alone = make.decision_function(images)
    model = make.fit(images, labels)

    def singles():
        return np.concatenate([model.decision_function(images[i : i + 1]) for i in range(40)])

    # from row 96 on blocks of 16 rows are the same ones
    single, many, other = at_once(singles, lambda: model.decision_function(images), lambda: model.decision_function(images[96:]))
    np.testing.assert_array_equal(single, alone[:40], strict=True)
    np.testing.assert_array_equal(many, alone, strict=True)
    np.testing.assert_array_equal(other, alone[96:], strict=True)


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_has_the_number_of_threads_that_each_thread_asked_for():
    """Three threads with other numbers, nested and interrupted by errors: each sees its own, and the one before is back at the end."""
    before = blas_threads()

    def work(n):
        for turn in range(20):
            with limit_blas(n):
                assert blas_threads() == {n}
                with limit_blas(3 - n):
                    assert blas_threads() == {3 - n}
                    time.sleep(1e-3)
                assert blas_threads() == {n}
                if turn == 19:
                    raise KeyError(n)

    def caught(n):
        with pytest.raises(KeyError):
            work(n)
        return True

    assert at_once(lambda: caught(1), lambda: caught(2), lambda: caught(1)) == [True] * 3
    assert blas_threads() == before


def test_decisions_left_off_half_way_keep_nobody_waiting(digits):
    """A generator of decisions that is not finished does not hold what other threads need."""
    model = classifier().fit(digits[0][:300], digits[1][:300])
    decisions = model.model_.decisions(open_images(digits[0][:64]))
    first = next(decisions)[1]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(model.decision_function, digits[0][: len(first)]).result(PATIENCE)
    np.testing.assert_array_equal(first, other)


def source_files(folder):
    """Images whose every pixel says which image it is, in each kind of file that is read through a handle and a buffer."""
    images = np.broadcast_to(np.arange(600.0)[:, None, None], (600, 40, 40)).copy()
    np.save(folder / "a.npy", images)
    np.savez_compressed(folder / "b.npz", images=images[:100])
    with h5py.File(folder / "c.h5", "w") as file:
        file["images"] = images
    return [folder / "a.npy", folder / "b.npz", folder / "c.h5"]


def wrong_rows(source, offset, n_reads=300):
    """How many of some images here and there are not what they should be."""
    out, wrong = np.empty((3, *source.image_shape), source.dtype), 0
    for turn in range(n_reads):
        start = (offset + 7 * turn) % (source.n_samples - 3)
        source.read(start, start + 3, out)
        wrong += int((out != np.arange(start, start + 3)[:, None, None, None]).any())
    return wrong


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["npy", "npz", "h5"])
def test_one_source_is_read_by_two_threads(tmp_path, kind):
    """Each read gives its own images, although file, place and conversion buffer are one."""
    with open_images(source_files(tmp_path)[kind]) as source:
        n = 40 if kind == 1 else 300  # each reading backward unpacks from the start
        assert at_once(lambda: wrong_rows(source, 0, n), lambda: wrong_rows(source, 311, n)) == [0, 0]
        assert source.n_images_read == 2 * 3 * n


def stored(folder):
    """A store of 3 shards, whose rows say which row they are."""
    store = FeatureStore.create(folder / "store")
    for start in (0, 500, 1000):
        store.append(np.broadcast_to(np.arange(start, start + 500)[:, None], (500, 200)).astype(np.float16))
    return store


def wrong_stored(rows, offset):
    out, wrong = np.empty((20, 200), np.float32), 0
    for turn in range(100):
        start = (offset + 177 * turn) % 1480
        rows.read(start, start + 20, out)
        wrong += int((out != np.arange(start, start + 20)[:, None]).any())
    return wrong


def test_stored_rows_are_read_by_two_threads(tmp_path):
    """Each read gives its own rows, although one shard is open at a time, and the buffer of float16 is one."""
    with stored(tmp_path) as store, store.rows() as rows:
        assert at_once(lambda: wrong_stored(rows, 0), lambda: wrong_stored(rows, 700)) == [0, 0]


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_scikit_learn_runs_us_in_parallel(digits, backend):
    """Cross-validation on two threads or processes gives the decisions of one after the other, bit for bit."""
    images, labels = digits[0][:240].repeat(8, axis=1).repeat(8, axis=2).reshape(240, -1), digits[1][:240]
    model = large(image_shape=(64, 64), n_jobs=2)
    alone = cross_val_predict(model, images, labels, cv=2, method="decision_function")
    with joblib.parallel_backend(backend, n_jobs=2):
        both = cross_val_predict(model, images, labels, cv=2, method="decision_function", n_jobs=2)
    np.testing.assert_array_equal(both, alone, strict=True)


COMPILE = """
import threading, numpy as np
from streamcnn.kernels import checksum, half
barrier, results = threading.Barrier(4), []
def work(i):
    narrow = np.empty(64, np.float16)
    barrier.wait()
    half.narrow(np.arange(64, dtype=np.float32), narrow)
    results.append((checksum.fletcher32(narrow), bytes(narrow)))
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(results) == 4 and len(set(results)) == 1, results
assert results[0][1] == bytes(np.arange(64, dtype=np.float16))
"""


def program(text, *flags, **environment):
    """Run a program of its own; it must end well and say nothing on standard error."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", text], capture_output=True, text=True, env={**os.environ, **environment}, timeout=2 * PATIENCE
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
    return done.stdout


def test_kernels_compile_in_four_threads_at_once(tmp_path):
    """With nothing in the cache all four compile or wait, and have the same results."""
    program(COMPILE, NUMBA_CACHE_DIR=str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))


# --- forks -----------------------------------------------------------------------------------------------------------------------


@forks
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["npy", "npz", "h5"])
def test_a_source_opened_before_a_fork_is_read_by_both(tmp_path, kind):
    """Parent and child read the same source at once: handles with one place for both would mix their images."""
    with open_images(source_files(tmp_path)[kind]) as source:
        n = 40 if kind == 1 else 2000
        assert wrong_rows(source, 0, 2) == 0
        child = Forked(lambda pipe: wrong_rows(source, 311, n))
        assert wrong_rows(source, 0, n) == 0
        assert child.result() == 0


@forks
def test_handles_are_not_shared_with_a_forked_child(tmp_path):
    """In the child sources and stored rows are closed, in the parent they are as open as before."""
    with stored(tmp_path) as store, store.rows() as rows, open_images(source_files(tmp_path)[0]) as source:
        assert wrong_rows(source, 0, 1) == 0 and wrong_stored(rows, 0) == 0
        copied = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert copied._file is None and wrong_rows(copied, 0, 1) == 0
        opened = [source._file, rows._file]
        child = Forked(lambda pipe: [source._file, copied._file, rows._file, wrong_rows(source, 0), wrong_stored(rows, 700)])
        assert child.result() == [None, None, None, 0, 0]
        assert [source._file, rows._file] == opened and wrong_stored(rows, 3) == 0
        copied.close()


@forks
def test_a_forked_child_neither_writes_to_a_locked_store_nor_keeps_it_locked(tmp_path):
    """The child reads; every way to write is refused; the lock is the parent's alone, and free once the parent has let go of it."""
    store = stored(tmp_path)
    before = (store.path / "manifest.jsonl").read_bytes()

    def work(pipe):
        refused = 0
        for write in (
            lambda: store.append(np.ones((3, 200), np.float16)),
            lambda: store.begin("features"),
            lambda: store.finish("pca", "d"),
            lambda: store.update_config(a=1),
            store.drop_added,
            store.delete,
        ):
            try:
                write()
            except StoreError as error:
                refused += "is locked by the process that this one was forked from: open the store here" in str(error)
        with store.rows() as rows:
            wrong = wrong_stored(rows, 0)
        other = FeatureStore(store.path)
        try:
            other.lock()
            wrong += 1000
        except StoreError:
            pass
        pipe.send((refused, wrong))
        assert pipe.recv() == "closed"
        other.lock()
        pipe.send("locked")
        assert pipe.recv() == "end"

    child = Forked(work)
    assert child.receive() == (6, 0)
    assert (store.path / "manifest.jsonl").read_bytes() == before
    store.append(np.ones((3, 200), np.float16))
    store.close()
    child.pipe.send("closed")
    assert child.receive() == "locked"
    with pytest.raises(StoreError, match="in use by another process"):
        store.lock()
    child.pipe.send("end")
    assert child.result() is None
    store.lock()
    store.close()


@forks
def test_a_child_of_a_process_that_has_let_go_of_a_store_does_not_hold_it(tmp_path):
    """A child forked while the store was locked lives on: the parent takes the store again, as often as it likes."""
    store = stored(tmp_path)
    child = Forked(lambda pipe: pipe.send("here") or pipe.recv())
    assert child.receive() == "here"
    store.close()
    store.lock()
    store.close()
    child.pipe.send("end")
    assert child.result() == "end"


@forks
def test_a_child_forked_in_the_middle_of_other_threads_work_predicts_and_fits(digits):
    """Locks that another thread holds at the fork, of BLAS and of the memory monitor, do not stop the child; its bits are the parent's."""
    images, labels = digits[0][:300], digits[1][:300]
    model = classifier().fit(images, labels)
    alone, inside, leave = model.decision_function(images), threading.Event(), threading.Event()

    def hold():
        with limit_blas(1):
            inside.set()
            assert leave.wait(PATIENCE)

    def watch():
        while not leave.is_set():
            with MemoryMonitor(), memory_lock:
                time.sleep(1e-3)

    threads = [threading.Thread(target=work) for work in (hold, watch)]
    for thread in threads:
        thread.start()
    assert inside.wait(PATIENCE)
    try:
        children = [
            Forked(lambda pipe: (model.decision_function(images), classifier().fit(images, labels).decision_function(images)))
            for _ in range(2)
        ]
        for child in children:
            for found in child.result():
                np.testing.assert_array_equal(found, alone, strict=True)
    finally:
        leave.set()
        for thread in threads:
            thread.join(PATIENCE)


# --- spawned processes, and programs of their own --------------------------------------------------------------------------------


def test_sources_estimators_and_models_go_to_a_spawned_process(tmp_path, digits):
    """Pickled with open handles and buffers, they give the same bits there."""
    images, labels = digits[0][:300], digits[1][:300]
    np.save(tmp_path / "a.npy", images)
    model = classifier().fit(images, labels)
    with open_images(tmp_path / "a.npy") as source:
        alone = model.decision_function(source)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            there = pool.apply_async(model.decision_function, (source,)).get(PATIENCE)
            fitted = pool.apply_async(classifier().fit, (source, labels) if source.labels is not None else (images, labels)).get(PATIENCE)
    np.testing.assert_array_equal(there, alone, strict=True)
    np.testing.assert_array_equal(fitted.decision_function(images), alone, strict=True)


FIT = """
import sys
import numpy as np
from streamcnn import ConvLayer, StreamCNNClassifier
from streamcnn.kernels import cpu
# from here on: on import numba asks `uname` for the processor
started = []
sys.addaudithook(lambda event, arguments: started.append(event) if event in STARTS else None)
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
images = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
labels = np.arange(120) % 3
model = StreamCNNClassifier(layers=[ConvLayer(4, 3, filters="random")], n_components=8, kernel="KERNEL", random_state=0).fit(images, labels)
model.predict(images)
print(started)
"""


def test_no_process_is_started_and_nothing_is_left_open(tmp_path):
    """A fit in a script without a guard, under Python's development mode with every warning an error and memory checked by its allocator:
    no process is started, no file left open."""
    strict = ("-X", "dev", "-W", "error")
    assert program(FIT.replace("KERNEL", "linear"), *strict, STREAMCNN_TMPDIR=str(tmp_path)) == "[]\n"
    assert list(tmp_path.iterdir()) == []
