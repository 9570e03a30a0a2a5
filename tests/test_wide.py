"""The linear SVM on wide rows."""

import tracemalloc

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from streamcnn import wide
from streamcnn.errors import DataError
from streamcnn.few import FewSolver
from streamcnn.ladder import svm_bytes
from streamcnn.linear import LinearProblem
from streamcnn.newton import solve
from streamcnn.rows import ArrayRows
from streamcnn.svm import StreamingSVC
from streamcnn.wide import WIDE, WideSolver, wide_bytes


def overlapping(n, k, n_classes, seed=0, dtype=np.float64):
    """Rows of classes that overlap, with spectra that fall off as those of pictures do, of mean squared norm 1; and their codes."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % n_classes
    rows = (rng.standard_normal((n_classes, k))[codes] * 0.2 + rng.standard_normal((n, k))) * np.arange(1, k + 1) ** -0.4
    return (rows / np.sqrt(np.square(rows).sum(axis=1).mean())).astype(dtype), codes.astype(np.int32)


def problem_of(rows, codes, **more):
    weights = more.pop("row_weights", np.ones(codes.max() + 1))
    return LinearProblem(ArrayRows(rows), rows.dtype, more.pop("scale", 1.0), codes, weights, **more)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and blocks of rows in small problems."""
    monkeypatch.setattr(wide, "_TILE", 32)
    monkeypatch.setattr(wide, "_ROWS", 128)


@pytest.mark.parametrize("C", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_minimum_is_newtons(n_classes, C):
    """Objective and planes are those of Newton steps and of liblinear, weights of rows and a row scaling included."""
    rows, codes = overlapping(1100, 40, n_classes)
    sample_weight = np.random.default_rng(1).uniform(0, 2, len(rows))
    problem = problem_of(rows, codes, sample_weight=sample_weight, scale=3.0)
    found = WideSolver(problem).solve(C, 1e-11, 500)
    expected = solve(problem, C, 1e-10, 100)
    assert found.converged.all() and expected.converged.all()
    # a step left of 1e-11 of f: planes off by about its root, 3e-6, relative to the curvature of 1 that regularisation gives
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-9)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-3 * np.abs(expected.weights).max())
    machine = problem.machine(found)
    for plane, positive in enumerate(problem.positive):
        rival = LinearSVC(C=C, dual=False, tol=1e-10, max_iter=10_000).fit(3 * rows, codes == positive, sample_weight)
        np.testing.assert_allclose(machine.coef[plane] / 3, rival.coef_[0], atol=2e-3 * np.abs(rival.coef_).max())


def test_the_factor_solves_what_it_says_for_one_c_after_the_other():
    """S and its factor share an array and do not disturb each other: x of (1 + f S) x = q, for three f."""
    rows, codes = overlapping(300, 75, 3)
    solver = WideSolver(problem_of(rows, codes))
    z = np.column_stack([rows, np.ones(300)])
    q = np.random.default_rng(2).standard_normal((4, 76))
    for factor in (0.5, 2000.0, 3.0):
        # condition numbers reach 1e5 here
        np.testing.assert_allclose(solver._factor(factor)([0] * 4, q) @ (np.eye(76) + factor * z.T @ z), q, atol=1e-9)


def test_more_features_than_rows_and_repeated_ones():
    """Columns that repeat leave S singular, and at a large C float32 finds it indefinite: planes that separate the rows, all the same."""
    rows, codes = overlapping(90, 40, 3, dtype=np.float32)
    rows = np.ascontiguousarray(np.tile(rows, 4))
    problem = problem_of(rows, codes)
    found = WideSolver(problem).solve(1e6, 1e-4, 400)
    expected = solve(problem, 1e6, 1e-4, 100)
    decisions = rows @ found.weights[:, :-1].T + found.weights[:, -1]
    assert (decisions.argmax(axis=1) == codes).all()
    # where nearly no row has a loss, quasi-Newton steps near the minimum slowly: 1.3 times it was seen
    assert (found.objective < 2 * expected.objective).all()


@pytest.mark.parametrize("n_jobs", [2, 3])
@pytest.mark.parametrize(("solver", "n", "k", "tol"), [(WideSolver, 500, 90, 1e-5), (FewSolver, 100, 2500, 1e-6)])
def test_any_number_of_threads_gives_the_same_bits(solver, n, k, tol, n_jobs):
    """Every product has one thread, so planes have the same bits for 1, 2 and 3."""
    rows, codes = overlapping(n, k, 4, dtype=np.float32)
    one, more = (solver(problem_of(rows, codes, n_jobs=jobs)).solve(10.0, tol, 100) for jobs in (1, n_jobs))
    np.testing.assert_array_equal(one.weights, more.weights)


def test_beyond_its_width_the_svm_is_this_one(monkeypatch):
    """StreamingSVC goes over to it by the number of features alone, and chooses C with it."""
    rows, codes = overlapping(900, 60, 3, dtype=np.float32)
    narrow = StreamingSVC(kernel="linear", random_state=0).fit(rows, codes)
    calls = []
    original = WideSolver.solve
    monkeypatch.setattr(WideSolver, "solve", lambda self, *args: calls.append(args[0]) or original(self, *args))
    monkeypatch.setattr("streamcnn.wide.WIDE", 59)
    svc = StreamingSVC(kernel="linear", random_state=0).fit(rows, codes)
    assert svc.C_ == narrow.C_ and calls[-1] == svc.C_ and len(calls) == len(svc.selection_) + 1
    # ends within 1e-4 of the minimum; its planes differ by the root of that at the most
    np.testing.assert_allclose(svc.decision_function(rows), narrow.decision_function(rows), atol=0.03)


def test_classes_added_later_start_from_the_planes_there_are():
    """A start from planes of the same problem is done within a few passes."""
    rows, codes = overlapping(900, 60, 3)
    solver = WideSolver(problem_of(rows, codes))
    first = solver.solve(10.0, 1e-8, 200)
    again = solver.solve(10.0, 1e-8, 200, first)
    assert again.n_passes.max() <= 3 < first.n_passes.max()


def test_nan_is_refused():
    """The first row that is not finite is named."""
    rows, codes = overlapping(300, 40, 3)
    rows[217, 3] = np.nan
    with pytest.raises(DataError, match="row 217 contains NaN"):
        WideSolver(problem_of(rows, codes)).solve(1.0, 1e-4, 10)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("weight, C", [(1.0, 1e37), (1e37, 1.0)])
def test_what_float32_cannot_hold_is_refused(weight, C):
    """A C, or weights, whose products with rows are infinite are one sentence: a factor was looked for for ever."""
    rows, codes = overlapping(300, 40, 3, dtype=np.float32)
    problem = problem_of(rows, codes, sample_weight=np.full(300, weight))
    with pytest.raises(DataError, match="must have products with rows that float32 holds"):
        WideSolver(problem).solve(C, 1e-4, 3)


def test_memory_is_what_is_declared(monkeypatch):
    """Peak of allocations, the rows left out, is below the sum that the plan is told, and no tenth of it above it is hidden."""
    monkeypatch.setattr(wide, "_TILE", 256)
    rows, codes = overlapping(1000, 1500, 4, dtype=np.float32)
    declared = sum(wide_bytes(1500, 4, 4, 2).values())
    tracemalloc.start()
    problem = problem_of(rows, codes, n_jobs=2)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    WideSolver(problem).solve(1.0, 1e-4, 20)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert 0.5 * declared < peak < declared
    # one matrix, whatever the number of classes
    assert svm_bytes("linear", WIDE + 1, [40_000] * 100)["products of features"] == 4 * (WIDE + 2) ** 2
