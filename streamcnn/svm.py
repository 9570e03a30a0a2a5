"""The SVM ladder: step 3 of Lee & Lee (2017). Exact RBF while rows allow; beyond, an exact streamed linear SVM, on the rows or on
Nystroem features of them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from streamcnn.calibration import fit_slope, held_out_rows, probabilities
from streamcnn.checkpoint import Checkpoint
from streamcnn.errors import DataError, ParameterError, warn
from streamcnn.labels import decoded
from streamcnn.ladder import KERNELS, TILE, check_class_weight, check_landmarks, check_probability, resolve_kernel
from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.newton import continued
from streamcnn.nystroem import LANDMARKS, Landmarks, NystroemProblem
from streamcnn.rbf import RBF_ARRAYS, RbfMachine
from streamcnn.rowinput import Batches, blocks_of, gather, is_batches, is_rows, open_rows, row_sizes, working_dtype
from streamcnn.rows import ArrayRows, block_rows
from streamcnn.selection import landmark_rows, select
from streamcnn.slicing import is_sliced
from streamcnn.svmsaved import ARRAYS, Machine, arrays_of, restore
from streamcnn.threads import limit_blas, resolve_n_jobs
from streamcnn.wide import WIDE, linear_solver


def has_probabilities(svc) -> bool:
    """Whether a classifier was made with `probability`; an AttributeError that says so where it was not."""
    if not svc.probability:
        raise AttributeError("predict_proba needs probability=True in fit")
    return True


class StreamingSVC(ClassifierMixin, BaseEstimator):
    """Support vector classifier for rows of any number.

    Rows are multiplied by `scale_` = 1 / sqrt(mean squared row norm), so that `C` and `gamma` mean the same on every data set.

    Parameters
    ----------
    kernel : {"auto", "rbf", "linear", "nystroem"}
        `"rbf"`: libsvm's exact one-against-one SVM, up to 20,000 rows and 100 classes, beyond them `"nystroem"`. `"linear"`: exact
        one-against-rest SVM with squared hinge loss and regularised intercept, as `LinearSVC(dual=False)` on the scaled rows, streamed;
        memory does not grow with rows. `"nystroem"`: the same SVM on features of the RBF kernel with landmark rows
        (`streamcnn.nystroem`). `"auto"`: rbf within its limits, else linear.
    C : float or "auto"
        Weight of the loss. `"auto"`: chosen on held-out rows.
    gamma : float, "scale" or "auto"
        Of the RBF kernel `exp(-gamma |x - z|^2)` of scaled rows. `"scale"`: scikit-learn's `1 / (n_features * X.var())` of rows as
        given. `"auto"`: chosen on held-out rows.
    class_weight : None, "balanced" or dict
        Weight of each row by its class. (`LinearSVC` weighs only the rows of the class that is told from the rest.)
    n_landmarks : int
        Rows drawn for `"nystroem"`, about: each class gets its share, and a row at least. Accuracy nears the exact SVM's as they
        grow; a pass costs n * n_landmarks * n_features, memory 16 * n_landmarks^2 bytes.
    probability : bool
        Whether to hold out a fifth of a sample of 20,000 rows, train without them, fit probabilities on their decisions, and then
        train on all rows: twice the work, for `predict_proba`.
    tol : float
        Of the linear solver, see `streamcnn.newton.solve`. Nystroem planes, and those of more than 2,048 features, are done when the
        step left would lower their objective by less than 100 * tol of it: on CIFAR-10 that was within 0.3 % of the minimum and of
        the same accuracy. libsvm runs with its 1e-3.
    max_iter : int
        Passes of the linear solver over the rows at most.
    cache_size : float
        MiB of libsvm's kernel cache.
    n_jobs : int or None
        BLAS threads; part of what fixes the last bits.
    random_state : int, RandomState or None
        Seed of the hash that picks the sample on which C and gamma are chosen, landmarks, and rows held out; None is 0.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    kernel_ : str
    C_, gamma_, scale_ : float
        `gamma_` is for scaled rows, NaN with the linear kernel.
    selection_ : dict
        Accuracy on held-out rows of each C (linear) or (C, gamma) tried; empty when given or when a class has fewer than
        5 rows in the sample: then C = 1 (rbf: 10) and gamma = 1.
    coef_, intercept_ : ndarray of shape (n_planes, n_features) and (n_planes,)
        Linear, for rows as given: `decision = X @ coef_.T + intercept_`.
    support_vectors_, dual_coef_, intercept_, n_support_ : ndarray
        RBF, laid out as scikit-learn's; support vectors are scaled rows.
    landmarks_, dual_coef_, intercept_ : ndarray of shape (m, n_features), (n_planes, m) and (n_planes,)
        Nystroem: `decision = exp(-gamma_ |scale_ x - z|^2) @ dual_coef_.T + intercept_`.
    slope_ : float
        With `probability`: factor on decisions.
    n_iter_ : ndarray of int
        Passes of each plane, or libsvm's iterations of each pair.
    n_features_in_, n_jobs_ : int

    Notes
    -----
    Two classes have one decision, positive for `classes_[1]`. More: RBF has votes plus squashed confidence as scikit-learn's
    `decision_function_shape="ovr"`, and `predict` is its argmax, so equal votes are settled by confidence (as `SVC` does only with
    `break_ties=True`); linear and nystroem have one plane per class, in the order of `classes_`, and equal decisions go to the first.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> StreamingSVC(C=10, gamma=1).fit(X, y).score(X, y) > 0.95
    True
    """

    def __init__(
        self,
        kernel="auto",
        C="auto",
        gamma="auto",
        class_weight=None,
        n_landmarks=LANDMARKS,
        probability=False,
        tol=1e-6,
        max_iter=100,
        cache_size=200,
        n_jobs=None,
        random_state=None,
    ):
        self.kernel = kernel
        self.C = C
        self.gamma = gamma
        self.class_weight = class_weight
        self.n_landmarks = n_landmarks
        self.probability = probability
        self.tol = tol
        self.max_iter = max_iter
        self.cache_size = cache_size
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X, y=None, sample_weight=None, checkpoint=None):
        """Train on all rows.

        Parameters
        ----------
        X : array-like of shape (n, n_features), Rows, or re-iterable of batches (rows, labels)
            Read once for their size, once for the sample where C or gamma is chosen, then once (rbf) or once per pass.
        y : array-like of shape (n,)
            Labels; None for batches, which bring them.
        sample_weight : array-like of shape (n,) or None
            Weight of each row's loss: 0 leaves a row out, 2 counts it twice.
        checkpoint : Checkpoint or None
            Keeps what is chosen, and planes after each pass, from which a later call with the same rows goes on.

        Returns
        -------
        self

        Raises
        ------
        DataError
            For NaN or infinity, rows too large or small to be scaled, a single class, labels or weights that do not match the rows, a
            class whose rows all weigh 0, or, with `probability`, one of fewer than 2 rows.
        ParameterError
            For a parameter out of range.
        """
        return self._fit(X, y, sample_weight, checkpoint=checkpoint or Checkpoint())

    def refit(self, X, y, before: "StreamingSVC", known: np.ndarray, checkpoint: Checkpoint | None = None):
        """Train on the rows of a fitted SVM and further ones, with its row scaling.

        Where the kernel is the same, C, gamma and landmarks are those of `before`, and planes start from its planes. The result is that
        of a training from nothing with these, to the solver's tolerance.

        Parameters
        ----------
        X : Rows
            All rows, in any order.
        y : array-like of shape (n,)
        before : StreamingSVC
            Fitted.
        known : ndarray of shape (len(before.classes_),), int
            Places of its classes among the sorted labels of `y`.
        checkpoint : Checkpoint or None
            As in `fit`.

        Returns
        -------
        self
        """
        return self._fit(X, y, None, before, known, checkpoint=checkpoint or Checkpoint())

    def _fit(self, X, y, sample_weight: Any, before: Any = None, known: Any = None, *, checkpoint: Checkpoint):
        self._check_parameters()
        source: Any
        if is_rows(X) or is_batches(X) or is_sliced(X):
            source, dtype = open_rows(self, X, reset=True)
        else:
            X, y = validate_data(self, X, decoded(y), dtype="numeric", ensure_all_finite=False)
            source, dtype = ArrayRows(X), working_dtype(X.dtype)
        with limit_blas(self.n_jobs_):
            weights = _check_weights(sample_weight)
            # with a scaling that is kept nothing else follows from them: a pass less
            sizes = before is None or self.gamma == "scale"
            with np.errstate(over="ignore"):
                n_rows, mean_square, variance = _sizes(source, dtype, weights, checkpoint) if sizes else (source.n_rows, 1.0, 1.0)
            if weights is not None and (weights == 1).all():
                weights = None
            y = self._labels(source, y, n_rows)
            check_classification_targets(y)
            classes, codes = _encode(y)
            if len(classes) < 2:
                raise DataError(f"y must hold at least 2 classes, got 1 class: {classes.tolist()[0]!r}")
            kernel = resolve_kernel(self.kernel, n_rows, len(classes), source.n_features)
            scale = float(1 / np.sqrt(mean_square)) if mean_square > 0 else 1.0
            if not 0 < scale <= float(np.finfo(dtype).max):
                raise DataError(f"X must have a mean squared row norm that can be divided by, got {mean_square:.3g}; rescale X")
            scale = scale if before is None else before.scale_
            counts = np.bincount(codes, weights)
            if not counts.all():
                rare = classes.tolist()[int(np.argmin(counts))]
                raise DataError(f"sample_weight must be above 0 for a row of each class, is 0 for all of {rare!r}; leave these rows out")
            class_weights = self._class_weights(classes, counts)
            problem = LinearProblem(source, dtype, scale, codes, class_weights, self.n_jobs_, weights)
            gamma = None if isinstance(self.gamma, str) else float(self.gamma)
            if isinstance(self.gamma, str) and self.gamma == "scale":
                gamma = 1 / (source.n_features * variance * scale**2) if variance > 0 else 1.0
            C, seed = None if isinstance(self.C, str) else float(self.C), self._seed()
            kept = before if before is not None and before.kernel_ == kernel else None
            if kept is not None:
                C, gamma, tried = kept.C_, kept.gamma_, kept.selection_
            else:
                chosen = partial(select, kernel, C, gamma, problem, seed, self.max_iter, self.cache_size, self.n_landmarks, self._codes_of)
                C, gamma, tried = _selected(chosen, checkpoint)
            trainer = _Trainer(self, kernel, C, gamma, seed, checkpoint)
            if kept is not None:
                trainer.go_on(kept, problem, known)
            slope = self._calibrate(trainer, problem, classes, seed) if self.probability else None
            machine, n_iter = trainer.fit(problem)
        self.classes_, self.kernel_, self.scale_, self.C_ = classes, kernel, problem.scale, C
        self.gamma_ = float("nan") if kernel == "linear" else gamma
        self.selection_, self.n_iter_ = tried, n_iter
        self._take(machine, slope)
        return self

    def _calibrate(self, trainer: "_Trainer", problem: LinearProblem, classes: np.ndarray, seed: int) -> float:
        """Slope fitted on the decisions of rows that the machine has not seen."""
        rows = held_out_rows(problem.codes, classes, seed, problem.sample_weight)
        weights = np.ones(len(problem.codes)) if problem.sample_weight is None else problem.sample_weight.copy()
        weights[rows] = 0
        machine, _ = trainer.fit(replace(problem, sample_weight=weights))
        own = None if problem.sample_weight is None else problem.sample_weight[rows]
        decisions = decide_rows(machine, gather(problem.source, rows, problem.dtype, problem.dtype))
        return fit_slope(decisions, problem.codes[rows], own)

    def _check_parameters(self) -> None:
        if self.kernel not in KERNELS:
            raise ParameterError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        for name, value, words in (("C", self.C, ("auto",)), ("gamma", self.gamma, ("auto", "scale")), ("tol", self.tol, ())):
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not (value in words if isinstance(value, str) else number and 0 < value < np.inf):
                wanted = " or ".join(["a positive number", *(f'"{word}"' for word in words)])
                raise ParameterError(f"{name} must be {wanted}, got {value!r}")
        if not isinstance(self.max_iter, (int, np.integer)) or isinstance(self.max_iter, bool) or self.max_iter < 1:
            raise ParameterError(f"max_iter must be a whole number of at least 1, got {self.max_iter!r}")
        if not isinstance(self.cache_size, (int, float, np.number)) or not 0 < self.cache_size < np.inf:
            raise ParameterError(f"cache_size must be a positive number of MiB, got {self.cache_size!r}")
        check_landmarks(self.n_landmarks)
        check_class_weight(self.class_weight)
        check_probability(self.probability)
        self.n_jobs_ = resolve_n_jobs(self.n_jobs)

    def _seed(self) -> int:
        if isinstance(self.random_state, np.random.RandomState):
            return int(self.random_state.randint(2**31))
        if self.random_state is None or (isinstance(self.random_state, (int, np.integer)) and self.random_state >= 0):
            return int(self.random_state or 0)
        raise ParameterError(f"random_state must be None, a whole number >= 0 or a RandomState, got {self.random_state!r}")

    @staticmethod
    def _labels(source, y, n_rows: int) -> np.ndarray:
        if isinstance(source, Batches) and y is None:
            if not source.labels:
                raise DataError("batches must be (rows, labels), or y must be given, got rows alone")
            y = np.concatenate(source.labels)
        if y is None:
            raise DataError("StreamingSVC requires y to be passed, but the target y is None")
        y = column_or_1d(decoded(y), warn=True)
        if len(y) != n_rows:
            raise DataError(f"y must have one label for each of {n_rows} rows, got {len(y)}")
        return y

    def _class_weights(self, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Weight of each class, (n_classes,) float64; "balanced" is n / (n_classes * count), as scikit-learn's."""
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            return counts.sum() / (len(classes) * counts)
        wanted = check_class_weight(self.class_weight) or {}
        if unknown := set(wanted).difference(classes.tolist()):
            raise ParameterError(f"class_weight must weigh classes of y, got {unknown.pop()!r}; leave it away")
        return np.array([wanted.get(label, 1.0) for label in classes.tolist()])

    def _take(self, machine: Machine, slope: float | None) -> None:
        """Make `machine` the fitted one and show its arrays under scikit-learn's names."""
        for name in {name for names in ARRAYS.values() for name in names} | {"slope_"}:
            self.__dict__.pop(name, None)
        self._machine = machine
        for name in ARRAYS[self.kernel_]:
            setattr(self, name, getattr(machine, name.removesuffix("_")))
        if slope is not None:
            self.slope_ = slope

    @property
    def n_vectors(self) -> int:
        """Support vectors or landmarks."""
        return len(getattr(self._machine, "vectors", ()))

    # -- use -----------------------------------------------------------------------------------------------------------
    def decision_function(self, X):
        """Decisions of each row; the same row has the same bits in any company.

        Parameters
        ----------
        X : array-like of shape (n, n_features), Rows, or re-iterable of batches

        Returns
        -------
        ndarray of shape (n,) for two classes, else (n, n_classes), float64
        """
        check_is_fitted(self, "_machine")
        source, dtype = open_rows(self, X, reset=False)
        block = np.empty((block_rows(source.n_features), source.n_features), dtype)
        with limit_blas(self.n_jobs_):
            parts = [self.decide_block(block[:n_valid]) for _, n_valid in blocks_of(source, block)]
        return np.concatenate(parts)

    def predict(self, X):
        """Class of each row.

        Parameters
        ----------
        X : array-like of shape (n, n_features), Rows, or re-iterable of batches

        Returns
        -------
        ndarray of shape (n,)
            Of `classes_`.
        """
        decisions = self.decision_function(X)
        return self.classes_[to_codes(decisions)]

    def score(self, X, y, sample_weight=None):
        """Mean accuracy."""
        return super().score(X, decoded(y), sample_weight)

    @available_if(has_probabilities)
    def predict_proba(self, X):
        """Probabilities of the classes: softmax of `slope_` times decisions.

        Parameters
        ----------
        X : array-like of shape (n, n_features), Rows, or re-iterable of batches

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            In the order of `classes_`.
        """
        return self.probabilities(self.decision_function(X))

    def probabilities(self, decisions: np.ndarray) -> np.ndarray:
        """Probabilities (m, n_classes) of decisions, (m,) for two classes or (m, n_classes)."""
        self.check_probability()
        return probabilities(decisions, self.slope_)

    def check_probability(self) -> None:
        """Refuse probabilities of a fit without them.

        Raises
        ------
        ParameterError
        """
        if not hasattr(self, "slope_"):
            raise ParameterError("probability must be True when fit is called for predict_proba: fit again with it (--probability)")

    def decide_block(self, block: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Decisions of one block, for pipelines: no checks, no limit on BLAS threads.

        Parameters
        ----------
        block : ndarray of shape (rows, n_features)
            Computed 64 rows at a time, the last ones zero-padded, so that a row's bits do not depend on the size of blocks, as
            long as they begin at multiples of 64.
        out : ndarray, optional
            float64 (rows,) for two classes, else (rows, n_classes).

        Returns
        -------
        out
        """
        return decide_rows(self._machine, block, out)

    @staticmethod
    def _codes_of(machine, rows: np.ndarray) -> np.ndarray:
        # block by block: all decisions at once would be the largest thing in memory with thousands of classes
        codes = np.empty(len(rows), np.int32)
        for start in range(0, len(rows), 16 * TILE):
            codes[start : start + 16 * TILE] = to_codes(decide_rows(machine, rows[start : start + 16 * TILE]))
        return codes

    # -- keep ----------------------------------------------------------------------------------------------------------
    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `predict` needs and what was chosen, as arrays without objects."""
        check_is_fitted(self, "_machine")
        return arrays_of(self)

    @classmethod
    def from_arrays(cls, arrays) -> "StreamingSVC":
        """The estimator that `to_arrays` described.

        Raises
        ------
        DataError
            When arrays are missing or do not fit together.
        """
        svc, machine, slope = restore(cls, arrays)
        svc._take(machine, slope)
        return svc


class _Trainer:
    """Trains machines with the same parameters, the second one from where the first one ended; a kernel's landmarks are drawn once."""

    def __init__(self, svc: StreamingSVC, kernel: str, C: float, gamma: float, seed: int, checkpoint: Checkpoint):
        self.svc, self.kernel, self.C, self.gamma, self.seed, self.checkpoint = svc, kernel, C, gamma, seed, checkpoint
        self.landmarks: Landmarks | None = None
        self.solution: LinearSolution | None = None

    def go_on(self, before: StreamingSVC, problem: LinearProblem, known: np.ndarray) -> None:
        """Start from the planes of `before`, whose classes are `known` among those of `problem`."""
        if self.kernel == "linear":
            self.solution = continued(problem, self.C, before.coef_, before.intercept_, known)
        elif self.kernel == "nystroem":
            self.landmarks = Landmarks(before.landmarks_, self.gamma, problem.dtype, problem.scale)
            self.solution = NystroemProblem(problem, self.landmarks).continued(before.dual_coef_, before.intercept_, known)

    def fit(self, problem: LinearProblem) -> tuple[Machine, np.ndarray]:
        """The machine and the passes of each plane, or libsvm's iterations of each pair."""
        svc = self.svc
        if self.kernel == "rbf":
            return self._fit_rbf(problem)
        if self.kernel == "linear":
            tol = 100 * svc.tol if problem.source.n_features > WIDE else svc.tol
            self.solution = solution = linear_solver(problem)(self.C, tol, svc.max_iter, self.solution, self.checkpoint)
            machine: Machine = problem.machine(solution)
        else:
            if self.landmarks is None:
                rows = landmark_rows(problem, svc.n_landmarks, self.seed)
                self.landmarks = Landmarks(rows, self.gamma, problem.dtype, problem.scale)
            kernel = NystroemProblem(problem, self.landmarks)
            self.solution = solution = kernel.solve(self.C, 100 * svc.tol, svc.max_iter, self.solution, self.checkpoint)
            machine = kernel.machine(solution)
        if not solution.converged.all():
            warn(
                f"the {self.kernel} SVM has not converged in max_iter={svc.max_iter} passes for {np.sum(~solution.converged)} of "
                f"{len(solution.converged)} planes; raise max_iter or tol, or lower C",
                ConvergenceWarning,
            )
        return machine, solution.n_passes

    def _fit_rbf(self, problem: LinearProblem) -> tuple[RbfMachine, np.ndarray]:
        n = len(problem.codes)

        def train() -> dict[str, np.ndarray]:
            rows, weights = problem.scaled(np.arange(n)), problem.weights_of(0, n)
            machine, n_iter = RbfMachine.fit(rows, problem.codes, weights, self.C, self.gamma, problem.scale, self.svc.cache_size)
            return {name: getattr(machine, name) for name in RBF_ARRAYS} | {"n_iter": n_iter}

        found = self.checkpoint.step(train)
        return RbfMachine(self.gamma, problem.scale, *(found[name] for name in RBF_ARRAYS)), found["n_iter"]


def _sizes(source, dtype, weights: np.ndarray | None, checkpoint: Checkpoint) -> tuple[int, float, float]:
    """`row_sizes`, as a step."""
    n_rows, mean_square, variance = checkpoint.step(lambda: {"sizes": np.array(row_sizes(source, dtype, weights))})["sizes"].tolist()
    return int(n_rows), mean_square, variance


def _selected(choose: Callable[[], tuple[float, float, dict]], checkpoint: Checkpoint) -> tuple[float, float, dict]:
    """What `choose` gives, `select` with its arguments, as a step."""

    def compute() -> dict[str, np.ndarray]:
        C, gamma, tried = choose()
        pairs = [(*(key if isinstance(key, tuple) else (key, np.nan)), accuracy) for key, accuracy in tried.items()]
        return {"chosen": np.array([C, gamma]), "tried": np.array(pairs).reshape(-1, 3)}

    found = checkpoint.step(compute)
    tried = {(c if np.isnan(g) else (c, g)): accuracy for c, g, accuracy in found["tried"].tolist()}
    return *found["chosen"].tolist(), tried


def _check_weights(sample_weight: Any) -> np.ndarray | None:
    """Weights of rows (n,) float64 or None; their number is checked when the rows are counted."""
    if sample_weight is None:
        return None
    try:
        weights = np.asarray(sample_weight, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"sample_weight must be numbers, got a {type(sample_weight).__name__} of others; convert them") from None
    if weights.ndim != 1:
        raise DataError(f"sample_weight must be 1D, a weight for each row, got an array of shape {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise DataError("sample_weight must be finite numbers of at least 0 and not all zero; a weight of 0 leaves a row out")
    return weights


def _encode(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted classes, the code of each label (n,) int32.

    Labels that are codes already, as a run's are, are taken as they are; a sort of them would take 24 bytes a row.
    """
    if y.dtype.kind in "iu" and len(y) and y.min() == 0 and y.max() < len(y):
        counts = np.bincount(y)
        if counts.all():
            return np.arange(len(counts), dtype=y.dtype), y.astype(np.int32, copy=False)
    classes, codes = np.unique(y, return_inverse=True)
    return classes, codes.reshape(-1).astype(np.int32)


def decide_rows(machine: Machine, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Decisions of raw rows (n, n_features) in tiles of 64, the last one zero-padded."""
    columns = machine.n_outputs
    if out is None:
        out = np.empty(len(rows) if columns == 1 else (len(rows), columns))
    tile, result, table = np.zeros((TILE, rows.shape[1])), np.empty((TILE, columns)), out.reshape(len(rows), columns)
    for start in range(0, len(rows), TILE):
        n_valid = min(TILE, len(rows) - start)
        tile[:n_valid], tile[n_valid:] = rows[start : start + n_valid], 0
        machine.decide(tile, result)
        table[start : start + n_valid] = result[:n_valid]
    return out


def to_codes(decisions: np.ndarray) -> np.ndarray:
    """Class codes (m,) of decisions, (m,) for two classes or (m, n_classes); of equal decisions the first class."""
    return (decisions > 0).astype(np.intp) if decisions.ndim == 1 else decisions.argmax(axis=1)
