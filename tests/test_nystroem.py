"""Landmark features of the RBF kernel, the quasi-Newton solver, and probabilities."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_classification
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.svm import LinearSVC

from streamcnn.calibration import fit_slope, held_out_rows, probabilities
from streamcnn.decisions import decide_rows
from streamcnn.errors import DataError, ParameterError
from streamcnn.linear import LinearProblem
from streamcnn.nystroem import Landmarks, NystroemProblem, group_size
from streamcnn.quasinewton import STEPS, minimise
from streamcnn.rows import ArrayRows
from streamcnn.selection import landmark_rows, most_landmarks
from streamcnn.svm import StreamingSVC
from streamcnn.threads import limit_blas


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """BLAS threads wait for each other in a loop, which takes many times as long on cores that others use too."""
    with limit_blas(1):
        yield


def kernel_of(rows, others, gamma):
    """exp(-gamma |x - z|^2), pair by pair in float64."""
    return np.exp(-gamma * np.square(rows[:, None] - others[None]).sum(axis=2))


def test_the_reference_kernel_is_worked_out_by_hand():
    """Distance 5 at gamma 0.04 is exp(-1)."""
    assert kernel_of(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]]), 0.04)[0, 0] == pytest.approx(np.exp(-1), rel=1e-15)


def overlapping(n, k, n_classes, seed=0):
    """Rows of classes that overlap, of mean squared norm near 1, float64, and their codes."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % n_classes
    rows = rng.standard_normal((n_classes, k))[codes] * 0.5 + rng.standard_normal((n, k))
    return rows / np.sqrt(np.square(rows).sum(axis=1).mean()), codes.astype(np.int32)


def problem_of(rows, codes, landmarks, gamma=2.0, **more):
    base = LinearProblem(ArrayRows(rows), rows.dtype, 1.0, codes, np.ones(codes.max() + 1), **more)
    return NystroemProblem(base, Landmarks(landmarks.astype(np.float64), gamma, rows.dtype, 1.0))


def features_of(problem, rows):
    """The features the module's head defines, made outright."""
    marks = problem.landmarks
    return kernel_of(rows.astype(np.float64), marks.rows, marks.gamma) @ marks.basis


def test_features_of_landmarks_give_their_kernel_back():
    """Inner products of the landmarks' own features are the kernel; of other rows, its projection on the landmarks."""
    rows, codes = overlapping(120, 6, 3)
    problem = problem_of(rows, codes, rows[:40])
    own, features = features_of(problem, rows[:40]), features_of(problem, rows)
    np.testing.assert_allclose(own @ own.T, kernel_of(rows[:40], rows[:40], 2.0), atol=1e-9)
    with_marks = kernel_of(rows, rows[:40], 2.0)
    projected = with_marks @ np.linalg.solve(kernel_of(rows[:40], rows[:40], 2.0), with_marks.T)
    np.testing.assert_allclose(features @ features.T, projected, atol=1e-9)


def objective(features, targets, coef, intercept, C):
    """LinearSVC's, in float64."""
    short = np.maximum(0, 1 - targets * (features @ coef + intercept))
    return 0.5 * (coef @ coef + intercept**2) + C * np.square(short).sum()


@pytest.mark.parametrize(("n_classes", "C"), [(2, 1.0), (4, 0.1), (4, 30.0)])
def test_the_solution_is_liblinears_on_the_features(n_classes, C):
    """Objective of every plane within 1e-6 of LinearSVC's on features made outright, over several blocks and pieces."""
    rows, codes = overlapping(2300, 5, n_classes)
    problem = problem_of(rows, codes, rows[::23])
    solution = problem.solve(C, 1e-9, 400)
    assert solution.converged.all()
    features = features_of(problem, rows)
    theirs = LinearSVC(C=C, dual=False, tol=1e-9, max_iter=10_000).fit(features, codes)
    for plane, positive in enumerate(range(n_classes) if n_classes > 2 else [1]):
        targets = np.where(codes == positive, 1.0, -1.0)
        best = objective(features, targets, theirs.coef_[plane], theirs.intercept_[plane], C)
        ours = objective(features, targets, solution.weights[plane, :-1], solution.weights[plane, -1], C)
        assert abs(ours - best) <= 1e-6 * best
        assert solution.objective[plane] == pytest.approx(ours, rel=1e-9)
    # and the machine decides by kernels with landmarks what the features decide
    decisions = decide_rows(problem.machine(solution), rows[:200])
    expected = features[:200] @ solution.weights[:, :-1].T + solution.weights[:, -1]
    np.testing.assert_allclose(decisions, expected if n_classes > 2 else expected[:, 0], atol=1e-7)


def test_float32_rows_reach_the_same_objective():
    """Rounding of the kernel to float32 moves the objective by less than 1e-5 of it."""
    rows, codes = overlapping(1500, 5, 3)
    fine = problem_of(rows, codes, rows[::20]).solve(1.0, 1e-8, 300)
    coarse = problem_of(rows.astype(np.float32), codes, rows[::20].astype(np.float32)).solve(1.0, 1e-7, 300)
    np.testing.assert_allclose(coarse.objective, fine.objective, rtol=1e-5)


def test_threads_and_groups_change_nothing(monkeypatch):
    """Bits are those of one thread; planes solved in groups are the same planes."""
    rows, codes = overlapping(2500, 4, 5)
    rows = rows.astype(np.float32)
    alone = problem_of(rows, codes, rows[::50], n_jobs=1).solve(1.0, 1e-4, 100)
    together = problem_of(rows, codes, rows[::50], n_jobs=2).solve(1.0, 1e-4, 100)
    assert np.array_equal(alone.weights, together.weights) and np.array_equal(alone.objective, together.objective)
    monkeypatch.setattr("streamcnn.nystroem._PLANES", 1)
    assert group_size(50, 5) == 1
    parts = problem_of(rows, codes, rows[::50]).solve(1.0, 1e-4, 100)
    np.testing.assert_allclose(parts.objective, alone.objective, rtol=1e-5)


def test_a_row_of_weight_two_counts_as_two_rows():
    """And one of weight 0 as none."""
    rows, codes = overlapping(900, 4, 3)
    weights = np.ones(900)
    weights[:100], weights[100:200] = 2, 0
    problem = problem_of(rows, codes, rows[::30])
    weighted = NystroemProblem(replace(problem.problem, sample_weight=weights), problem.landmarks).solve(1.0, 1e-9, 400)
    repeated = np.concatenate([np.arange(100), np.arange(100), np.arange(200, 900)])
    plain = problem_of(rows[repeated], codes[repeated], rows[::30]).solve(1.0, 1e-9, 400)
    np.testing.assert_allclose(weighted.objective, plain.objective, rtol=1e-8)


def test_a_warm_start_is_shorter():
    """From the solution for another C the same end is reached in fewer passes."""
    rows, codes = overlapping(1200, 5, 3)
    problem = problem_of(rows, codes, rows[::20])
    near, cold = problem.solve(1.0, 1e-7, 300), problem.solve(1.3, 1e-7, 300)
    warm = problem.solve(1.3, 1e-7, 300, near)
    assert warm.n_passes.sum() < cold.n_passes.sum()
    np.testing.assert_allclose(warm.objective, cold.objective, rtol=1e-5)


def test_landmarks_that_are_the_same_row_are_no_trouble():
    """A kernel matrix without full rank loses the directions that are not there."""
    rows, codes = overlapping(400, 4, 2)
    problem = problem_of(rows, codes, np.repeat(rows[:20], 3, axis=0))
    assert len(problem.landmarks.eigenvalues) == 20
    assert np.isfinite(problem.solve(1.0, 1e-6, 200).weights).all()


def test_quadratics_are_minimised_and_no_step_rises():
    """Independent functions with scalings far off, whose first steps overshoot: each ends at its own minimum."""
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(3)]
    matrices = np.stack([basis * np.logspace(0, spread, 12) @ basis.T for basis, spread in zip(bases, (1, 2, 3))])
    goals, seen = rng.standard_normal((3, 12)), []

    def evaluate(points, directions):
        away = points + np.array(STEPS)[:, None, None] * directions - goals
        values = 1 + 0.5 * np.einsum("scd,cde,sce->sc", away, matrices, away)
        seen.append(values[0])
        return values, np.einsum("cde,ce->cd", matrices, away[0]), lambda planes, rows: rows / 0.3

    points, _, passes, converged = minimise(evaluate, np.zeros((3, 12)), 1e-11, 1e-14, 200)
    assert converged.all() and len(set(passes)) > 1 and passes.max() == len(seen)
    np.testing.assert_allclose(points, goals, atol=1e-5)
    # the first step of each is too long and is shortened
    assert (seen[1] > seen[0]).all()


# -- the estimator -----------------------------------------------------------------------------------------------------
def test_beyond_the_exact_svm_the_rbf_kernel_goes_on(monkeypatch):
    """kernel="rbf" past its rows: landmarks, within a point of the exact SVM on digits, C and gamma chosen, and reproducible."""
    X, y = load_digits(return_X_y=True)
    X, T, y, t = train_test_split(X, y, random_state=0)
    exact = StreamingSVC("rbf", random_state=0).fit(X, y)
    monkeypatch.setattr("streamcnn.ladder.RBF_ROWS", 1000)
    svc = StreamingSVC("rbf", n_landmarks=500, random_state=0).fit(X, y)
    assert svc.kernel_ == "nystroem" and exact.kernel_ == "rbf"
    assert svc.landmarks_.shape[0] == svc.n_vectors and 480 <= svc.n_vectors <= 500
    assert svc.score(T, t) >= exact.score(T, t) - 0.01
    assert (svc.C_, svc.gamma_) in svc.selection_ and len(svc.selection_) == 9
    by_hand = kernel_of(T[:50] * svc.scale_, svc.landmarks_, svc.gamma_) @ svc.dual_coef_.T + svc.intercept_
    np.testing.assert_allclose(svc.decision_function(T[:50]), by_hand, atol=1e-9)
    again = StreamingSVC("rbf", n_landmarks=500, random_state=0).fit(X, y)
    assert np.array_equal(again.dual_coef_, svc.dual_coef_)


# -- sample weights and probabilities ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_sample_weights_reach_every_rung(kernel):
    """Weights of 1 change nothing; a class of weight 1e-3 is given up where classes overlap."""
    rows, codes = overlapping(600, 3, 2)
    plain = StreamingSVC(kernel, C=1.0, gamma=1.0).fit(rows, codes)
    ones = StreamingSVC(kernel, C=1.0, gamma=1.0).fit(rows, codes, np.ones(600))
    assert np.array_equal(plain.decision_function(rows), ones.decision_function(rows))
    light = StreamingSVC(kernel, C=1.0, gamma=1.0).fit(rows, codes, np.where(codes == 1, 1e-3, 1.0))
    assert light.predict(rows).mean() < 0.5 * plain.predict(rows).mean()


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (np.ones(59), "one weight for each row of X, got 59"),
        (np.ones(61), "got 61"),
        (-np.ones(60), "at least 0"),
        ([np.nan] * 60, "finite"),
    ],
)
def test_bad_sample_weights_are_refused(weights, match):
    """Too few, too many, negative or not a number."""
    rows, codes = overlapping(60, 3, 2)
    with pytest.raises(DataError, match=match):
        StreamingSVC("linear", C=1.0).fit(rows, codes, weights)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_slope_of_made_decisions_is_found(n_classes):
    """Labels drawn from softmax(3 * decisions): slope 3 within four standard errors, and probabilities sum to 1."""
    rng = np.random.default_rng(0)
    decisions = rng.standard_normal(20_000 if n_classes == 2 else (20_000, n_classes))
    chances = probabilities(decisions, 3.0)
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-12)
    if n_classes == 2:
        np.testing.assert_allclose(chances[:, 1], 1 / (1 + np.exp(-3 * decisions)), rtol=1e-12)
    codes = (rng.random(20_000)[:, None] > chances.cumsum(axis=1)).sum(axis=1)
    slope = fit_slope(decisions, codes, None)
    # curvature of the log-likelihood in the slope, by differences
    loss = [log_loss(codes, probabilities(decisions, 3.0 + step)) * 20_000 for step in (-0.1, 0, 0.1)]
    error = np.sqrt(0.01 / (loss[0] - 2 * loss[1] + loss[2]))
    assert abs(slope - 3) < 4 * error < 0.4
    # rows told apart without exception leave it finite
    assert np.isfinite(fit_slope(np.array([-1.0, 1.0]), np.array([0, 1]), None))


@pytest.mark.parametrize("kernel", ["linear", "rbf", "nystroem"])
def test_probabilities_are_calibrated_on_rows_not_seen(kernel):
    """Log loss on other rows within a tenth of that at the best slope for them, which the training rows' own slope is not."""
    X, y = make_classification(4000, 20, n_informative=6, n_classes=3, class_sep=0.7, flip_y=0.1, random_state=0)
    X, T, y, t = train_test_split(X, y, train_size=1500, random_state=0)
    svc = StreamingSVC(kernel, C=10.0, gamma=2.0, n_landmarks=400, probability=True, tol=1e-8, max_iter=1000).fit(X, y)
    plain = StreamingSVC(kernel, C=10.0, gamma=2.0, n_landmarks=400, tol=1e-8, max_iter=1000).fit(X, y)
    decisions = svc.decision_function(T)
    # a start elsewhere leaves the solver's tolerance; with nystroem, landmarks are drawn from the rows not held out
    if kernel != "nystroem":
        np.testing.assert_allclose(decisions, plain.decision_function(T), atol=0.05)
    best = log_loss(t, probabilities(decisions, fit_slope(decisions, t, None)))
    assert log_loss(t, svc.predict_proba(T)) < 1.1 * best
    assert np.array_equal(svc.predict_proba(T).argmax(axis=1), svc.predict(T))
    loaded = StreamingSVC.from_arrays(svc.to_arrays())
    assert np.array_equal(loaded.predict_proba(T), svc.predict_proba(T))
    assert not hasattr(plain, "predict_proba")
    with pytest.raises(AttributeError, match=r"^predict_proba needs probability=True in fit: set_params"):
        plain.predict_proba(T)


def test_rows_to_calibrate_on_are_a_fifth_of_each_class():
    """By hash of the row number, ascending; a class of a single row is an error that names it."""
    codes = np.repeat([0, 1, 2], [500, 100, 50])
    rows = held_out_rows(codes, np.array(["a", "b", "c"]), 0)
    assert np.bincount(codes[rows]).tolist() == [100, 20, 10] and (np.diff(rows) > 0).all()
    # two rows are sampled of a class whose share of 20,000 is none, and one of them is held out
    codes = np.repeat([0, 1], [99_997, 3])
    assert np.bincount(codes[held_out_rows(codes, np.array(["a", "b"]), 0)]).tolist() == [3999, 1]
    with pytest.raises(DataError, match="at least 2 rows of each class to hold some out, got 1 of 501 rows for class 'b'"):
        held_out_rows(np.repeat([0, 1], [500, 1]), np.array(["a", "b"]), 0)


@pytest.mark.parametrize("n_landmarks", [1, 19, 60])
def test_each_class_has_a_landmark(n_landmarks):
    """Where the share of a class is less than one row it has one, and the plan counts them."""
    rows, codes = overlapping(300, 6, 20)
    svc = StreamingSVC("nystroem", C=1.0, gamma=1.0, n_landmarks=n_landmarks).fit(rows, codes)
    scaled = rows * svc.scale_
    nearest = codes[np.square(scaled[:, None] - svc.landmarks_[None]).sum(axis=2).argmin(axis=0)]
    assert np.bincount(nearest, minlength=20).tolist() == [max(1, n_landmarks * 15 // 300)] * 20
    assert len(svc.landmarks_) <= most_landmarks(n_landmarks, 300, 20)


def test_an_offset_does_not_drown_the_kernel():
    """float32 rows 1,000 deviations from 0 have the decisions of the same rows about 0: the kernel knows distances alone."""
    rng = np.random.default_rng(0)
    # multiples of 1/64 below 16, so that adding 1,024 rounds nothing
    rows, codes = np.round(rng.standard_normal((600, 5)) * 64) / 64, np.arange(600) % 3
    rows[np.arange(600), codes] += 3
    near, far = (StreamingSVC("nystroem", C=1.0, gamma="scale", n_landmarks=60, tol=1e-8, max_iter=500) for _ in range(2))
    decisions = near.fit(rows.astype(np.float32), codes).decision_function(rows.astype(np.float32))
    moved = (rows + 1024).astype(np.float32)
    # the objective, 1-strongly convex on the features, is within 1e-6 of its minimum of about 60: features of norm 1 move by sqrt(2 * 6e-5)
    np.testing.assert_allclose(far.fit(moved, codes).decision_function(moved), decisions, atol=0.02)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "nystroem"])
def test_a_class_of_weight_zero_is_refused(kernel):
    """libsvm would leave it out and number the others wrongly, and "balanced" divide by its weight."""
    rows, codes = overlapping(90, 6, 3)
    for weight in (None, "balanced"):
        with pytest.raises(DataError, match="sample_weight must be above 0 for a row of each class, is 0 for all of 1"):
            StreamingSVC(kernel, C=1.0, gamma=1.0, class_weight=weight).fit(rows, codes, (codes != 1) * 1.0)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "nystroem"])
def test_rows_of_weight_zero_are_not_drawn(kernel):
    """Of 60 rows that count among 6,000 a fifth of each class is held out to choose C, and to calibrate; landmarks are of them."""
    rows, codes = overlapping(6000, 6, 3)
    weights = np.zeros(6000)
    weights[::100] = 1
    svc = StreamingSVC(kernel, n_landmarks=50, gamma=1.0, probability=True).fit(rows, codes, weights)
    accuracies = np.array(list(svc.selection_.values()))
    assert len(accuracies) >= 3 and np.allclose(accuracies * 12, np.round(accuracies * 12))
    assert np.isin(held_out_rows(codes, svc.classes_, 0, weights), np.arange(0, 6000, 100)).all()
    assert len(held_out_rows(codes, svc.classes_, 0, weights)) == 12
    if kernel == "nystroem":
        counted = rows[::100] * svc.scale_
        assert np.abs(svc.landmarks_[:, None] - counted[None]).max(axis=2).min(axis=1).max() < 1e-6


def test_landmarks_are_found_beside_held_out_rows():
    """Both are drawn by hash; of 25,000 rows whose 4,000 held out weigh 0, as many landmarks are found as of all."""
    codes = (np.arange(25_000) % 3).astype(np.int32)
    weights = np.ones(25_000)
    weights[held_out_rows(codes, np.arange(3), 0)] = 0
    problem = LinearProblem(ArrayRows(np.arange(25_000.0)[:, None]), np.dtype(float), 1.0, codes, np.ones(3), 1, weights)
    drawn = landmark_rows(problem, 60, 0)[:, 0].astype(int)
    assert len(drawn) >= 58 and weights[drawn].all()


def test_probability_wished_for_too_late_is_an_error():
    """Set after fit, nothing was held out."""
    rows, codes = overlapping(90, 6, 3)
    svc = StreamingSVC("linear", C=1.0).fit(rows, codes).set_params(probability=True)
    with pytest.raises(ParameterError, match="probability must be True when fit is called"):
        svc.predict_proba(rows)
