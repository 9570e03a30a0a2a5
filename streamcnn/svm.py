"""The SVM ladder: step 3 of Lee & Lee (2017). Exact RBF while rows allow; beyond, an exact streamed linear SVM, on the rows or on
Nystroem features of them."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from streamcnn.availability import Needs, check_probability
from streamcnn.calibration import probabilities
from streamcnn.checkpoint import Checkpoint
from streamcnn.decisions import Machine, decide_rows, to_codes
from streamcnn.errors import DataError, ParameterError
from streamcnn.labels import decoded
from streamcnn.ladder import resolve_kernel
from streamcnn.linear import LinearProblem
from streamcnn.nystroem import LANDMARKS
from streamcnn.rowinput import blocks_of, is_batches, is_rows, open_rows, working_dtype
from streamcnn.rows import ArrayRows, block_rows
from streamcnn.slicing import is_sliced
from streamcnn.svmchecks import check_parameters, check_sample_weight, class_weights, encoded_labels, seed_of
from streamcnn.svmsaved import ARRAYS, arrays_of, restore
from streamcnn.svmtraining import Trainer, choose_parameters, measure_rows
from streamcnn.threads import limit_blas, resolve_n_jobs


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
        the same accuracy; few rows of so many (see `streamcnn.few`) have `tol` itself. libsvm runs with its 1e-3.
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
        check_parameters(self)
        self.n_jobs_ = resolve_n_jobs(self.n_jobs)
        source: Any
        if is_rows(X) or is_batches(X) or is_sliced(X):
            source, dtype = open_rows(self, X, reset=True)
        else:
            X, y = validate_data(self, X, decoded(y), dtype="numeric", ensure_all_finite=False)
            source, dtype = ArrayRows(X), working_dtype(X.dtype)
        with limit_blas(self.n_jobs_):
            weights = check_sample_weight(sample_weight)
            # with a scaling that is kept nothing else follows from them: a pass less
            asked = before is None or self.gamma == "scale"
            with np.errstate(over="ignore"):
                n_rows, mean_square, variance = measure_rows(source, dtype, weights, checkpoint) if asked else (source.n_rows, 1.0, 1.0)
            if weights is not None and (weights == 1).all():
                weights = None
            classes, codes = encoded_labels(source, y, n_rows)
            kernel = resolve_kernel(self.kernel, n_rows, len(classes))
            scale = float(1 / np.sqrt(mean_square)) if mean_square > 0 else 1.0
            if not 0 < scale <= float(np.finfo(dtype).max):
                raise DataError(f"X must have a mean squared row norm that can be divided by, got {mean_square:.3g}; rescale X")
            scale = scale if before is None else before.scale_
            counts = np.bincount(codes, weights)
            if not counts.all():
                rare = classes.tolist()[int(np.argmin(counts))]
                raise DataError(f"sample_weight must be above 0 for a row of each class, is 0 for all of {rare!r}; leave these rows out")
            of_classes = class_weights(self.class_weight, classes, counts)
            problem = LinearProblem(source, dtype, scale, codes, of_classes, self.n_jobs_, weights)
            gamma = None if isinstance(self.gamma, str) else float(self.gamma)
            if isinstance(self.gamma, str) and self.gamma == "scale":
                gamma = 1 / (source.n_features * variance * scale**2) if variance > 0 else 1.0
            C, seed = None if isinstance(self.C, str) else float(self.C), seed_of(self.random_state)
            limits = self.max_iter, self.cache_size, self.n_landmarks
            kept = before if before is not None and before.kernel_ == kernel else None
            if kept is not None:
                C, gamma, tried = kept.C_, kept.gamma_, kept.selection_
            else:
                C, gamma, tried = choose_parameters(checkpoint, kernel, C, gamma, problem, seed, *limits)
            trainer = Trainer(kernel, C, gamma, seed, self.tol, *limits, checkpoint)
            if kept is not None:
                trainer.go_on(kept._machine, problem, known)
            slope = trainer.calibrate(problem, classes) if self.probability else None
            machine, n_iter = trainer.fit(problem)
        self.classes_, self.kernel_, self.scale_, self.C_ = classes, kernel, problem.scale, C
        self.gamma_ = float("nan") if kernel == "linear" else gamma
        self.selection_, self.n_iter_ = tried, n_iter
        self._take(machine, slope)
        return self

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

    @Needs(check_probability)
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
