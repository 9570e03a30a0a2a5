"""The linear SVM on few rows of many features."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from sklearn.svm import LinearSVC
from test_wide import overlapping, problem_of

from streamcnn.checkpoint import FileCheckpoint
from streamcnn.errors import DataError
from streamcnn.few import FewSolver
from streamcnn.ladder import svm_bytes
from streamcnn.newton import solve
from streamcnn.svm import StreamingSVC
from streamcnn.wide import WIDE, WideSolver, linear_method


@pytest.mark.parametrize("C", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_minimum_is_newtons(n_classes, C):
    """Objective and planes are those of Newton steps in all features and of liblinear, weights of rows and a row scaling included."""
    rows, codes = overlapping(60, 150, n_classes)
    problem = problem_of(rows, codes, sample_weight=np.random.default_rng(1).uniform(0, 2, len(rows)), scale=3.0)
    found, expected = FewSolver(problem).solve(C, 1e-10, 100), solve(problem, C, 1e-10, 100)
    assert found.converged.all()
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-9)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-6 * np.abs(expected.weights).max())
    for plane, positive in enumerate(problem.positive) if C <= 10 else ():  # liblinear does not converge beyond
        rival = LinearSVC(C=C, dual=False, tol=1e-10, max_iter=10_000).fit(3 * rows, codes == positive, problem.sample_weight)
        np.testing.assert_allclose(found.weights[plane, :-1], rival.coef_[0], atol=1e-4 * np.abs(rival.coef_).max())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", ["repeated", "zero", "one", "all zero"])
def test_rows_that_span_little(kind, dtype):
    """Rows that are equal, all zero, or one and the same leave fewer directions than rows: the minimum, from other planes too, and no
    division by 0."""
    rows, codes = overlapping(60, 150, 3, dtype=dtype)
    if kind in ("repeated", "zero"):
        rows[::2] = rows[1::2] if kind == "repeated" else 0
    else:
        rows[:] = rows[1] if kind == "one" else 0
    problem = problem_of(rows, codes)
    solver, expected = FewSolver(problem), solve(problem, 10.0, 1e-8, 100)
    found = solver.solve(10.0, 1e-8, 100)
    for each in (found, solver.solve(10.0, 1e-8, 100, solver.solve(1.0, 1e-8, 100))):
        # of float32 the rounding of f, and the root of it
        np.testing.assert_allclose(each.objective, expected.objective, rtol=1e-8 if dtype == np.float64 else 1e-5)
        np.testing.assert_allclose(each.weights, expected.weights, atol=1e-5 if dtype == np.float64 else 3e-3)


def test_what_rows_differ_by_little_counts():
    """Where they lie on a line but for a ten-thousandth of its length, that ten-thousandth still separates the classes."""
    rng = np.random.default_rng(0)
    rows, codes = overlapping(60, 150, 3)
    rows = rng.standard_normal((60, 1)) * rng.standard_normal(150) / 12 + 1e-4 * rows
    problem = problem_of(rows, codes)
    found, expected = FewSolver(problem).solve(1e8, 1e-10, 200), solve(problem, 1e8, 1e-10, 200)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)


def test_stopped_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Planes after a pass are kept, and taken up."""
    monkeypatch.setattr("streamcnn.checkpoint.STATE_SECONDS", 0)
    solver, calls = FewSolver(problem_of(*overlapping(60, 150, 3))), []

    def stop():
        calls.append(0)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        solver.solve(1.0, 1e-10, 100, checkpoint=FileCheckpoint(tmp_path, "digest", stop=stop, durable=False))
    checkpoint = FileCheckpoint(tmp_path, "digest", durable=False)
    found = solver.solve(1.0, 1e-10, 100, checkpoint=checkpoint)
    assert checkpoint.used
    np.testing.assert_array_equal(found.weights, solver.solve(1.0, 1e-10, 100).weights)


def test_float32_separated_rows_and_a_start():
    """Where `wide` steps for hundreds of passes, a few; from the planes found, one more, whatever the scale of rows."""
    rows, codes = overlapping(100, 2500, 3, dtype=np.float32)
    solver = FewSolver(problem_of(rows / 3, codes, scale=3.0))
    found = solver.solve(300.0, 1e-6, 100)
    again = solver.solve(300.0, 1e-6, 100, replace(found, start_gradient=None))
    assert found.converged.all() and found.n_passes.max() <= 15 and again.n_passes.max() <= 2
    np.testing.assert_allclose(again.weights, found.weights, atol=1e-4 * np.abs(found.weights).max())


def test_sizes_alone_choose_the_solver(monkeypatch):
    """Up to 2,048 rows, and half as many as features, of more than 2,048; StreamingSVC takes it, and chooses C by it."""
    sizes = [(5, 2048), (5, 2049), (1024, 2049), (1025, 2049), (2048, 5000), (2049, 5000)]
    assert [linear_method(*size) for size in sizes] == ["newton", "few", "few", "wide", "few", "wide"]
    calls, rows, codes = [], *overlapping(120, WIDE + 1, 3, dtype=np.float32)
    original = FewSolver.solve
    monkeypatch.setattr(FewSolver, "solve", lambda self, *args: calls.append(args[0]) or original(self, *args))
    monkeypatch.setattr(WideSolver, "solve", None)
    svc = StreamingSVC(kernel="linear", random_state=0).fit(rows, codes)
    assert calls == [*svc.selection_, svc.C_] and svc.score(rows, codes) == 1


def test_nan_is_refused():
    """The first row that is not finite is named."""
    rows, codes = overlapping(30, 90, 3)
    rows[17, 3] = np.nan
    with pytest.raises(DataError, match="row 17 contains NaN"):
        FewSolver(problem_of(rows, codes))


@pytest.mark.parametrize(("n", "k"), [(1000, 2100), (300, 9000)])
def test_memory_is_what_is_declared(n, k):
    """Peak of allocations, the rows' own source left out, is below what a plan counts, and not far below."""
    rows, codes = overlapping(n, k, 4, dtype=np.float32)
    declared = sum(svm_bytes("linear", k, np.bincount(codes).tolist(), n_jobs=2).values())
    svc = StreamingSVC(kernel="linear", n_jobs=2, random_state=0)
    StreamingSVC(kernel="linear", C=1.0).fit(rows[:50], codes[:50])  # what is loaded on first use
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    svc.fit(rows, codes)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert 0.4 * declared < peak < declared
