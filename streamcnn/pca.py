"""Principal components of rows that do not fit in memory: step 2 of Lee & Lee (2017)."""

import logging
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from streamcnn.checkpoint import Checkpoint
from streamcnn.errors import DataError, ParameterError
from streamcnn.incremental import RESULTS, Incremental, iter_incremental
from streamcnn.moments import Moments, gram_rows, moments_of
from streamcnn.pcaplan import choose_solver
from streamcnn.pcasaved import arrays_of, restore
from streamcnn.projection import Projector, deviation
from streamcnn.randomized import randomized_pca
from streamcnn.rowinput import blocks_of, check_finite, is_batches, is_rows, open_rows
from streamcnn.rows import ArrayRows, block_rows, iter_blocks
from streamcnn.threads import limit_blas, resolve_n_jobs

logger = logging.getLogger("streamcnn")


class StreamingPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Principal component analysis in one pass, or a few, over rows of any number.

    Parameters
    ----------
    n_components : int or None
        None: as many as rows and features allow (`"incremental"` from batches: as the first batch allows).
    solver : {"auto", "covariance", "incremental", "randomized"}
        `"covariance"`: exact, mergeable, 12 * n_features^2 bytes. `"randomized"`: at least 0.9999 of the exact captured variance (a
        warning is logged otherwise) in 2 to 6 passes, at most 90 * n_components * n_features + 4300 * n_components^2 bytes.
        `"incremental"`: scikit-learn's `IncrementalPCA`, 0.97 to 1.0 of the exact captured variance,
        52 * (batch_size + n_components) * n_features bytes. `"auto"`: covariance up to 8,192 features (and beyond for so many
        components that it is smaller), else randomized; for `partial_fit`, which sees each row once, incremental.
    whiten : bool
        Scale the reduced columns to unit variance.
    batch_size : int or None
        Rows of a batch of `"incremental"`, which `fit` makes at most so large; at least `n_components`. None: three times
        `n_components`, at least 256. (Ten times captures at most 0.5 % more variance, one time 0.3 % less and takes longer.)
    n_jobs : int or None
        BLAS threads; part of what fixes the last bits.
    random_state : int or None
        Seed of `"randomized"`; None is 0.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features), float64
        In each row the coefficient of largest size is positive.
    mean_, var_ : ndarray of shape (n_features,), float64
    explained_variance_, explained_variance_ratio_, singular_values_ : ndarray of shape (n_components,), float64
    noise_variance_ : float
        Mean variance of the directions left out.
    n_components_, n_features_in_, n_samples_seen_, n_jobs_ : int
    solver_, solver_reason_ : str
        What was used, and why.
    n_passes_ : int
        How often `fit` has read the rows.

    Notes
    -----
    `fit` gives the same bits in whatever batches the rows arrive, as it cuts them into fixed blocks; with `"incremental"`, arrays
    and `Rows` are dealt to the batches by stripes (they may be sorted by class), whereas a re-iterable of batches is taken in
    its own order; so is the sample with which `"randomized"` starts. Its `explained_variance_` never exceeds the variance along the
    component, and falls short of it in sum by less than 0.0001 in general. `partial_fit` takes each call's rows as they come.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.random.default_rng(0).standard_normal((1000, 20)).astype(np.float32)
    >>> StreamingPCA(n_components=3).fit(rows).transform(rows).shape
    (1000, 3)
    """

    def __init__(self, n_components=None, solver="auto", whiten=False, batch_size=None, n_jobs=None, random_state=None):
        self.n_components = n_components
        self.solver = solver
        self.whiten = whiten
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X, y=None, checkpoint=None):
        """Components of all rows of `X`, forgetting what was fitted before.

        Parameters
        ----------
        X : array-like of shape (n, n_features), Rows, or re-iterable of batches (m, n_features) or (rows, labels)
        y : ignored
        checkpoint : Checkpoint or None
            Keeps the sums of the rows seen, from which a later call with the same X goes on; not with batches.

        Returns
        -------
        self

        Raises
        ------
        DataError
            For NaN or infinity, values whose squares overflow, or fewer than two rows.
        ParameterError
            When there are fewer rows or features than `n_components`.
        """
        self._check_parameters()
        source, dtype = open_rows(self, X, reset=True, ensure_min_samples=2)
        try:
            if (n_rows := getattr(source, "n_rows", 2)) < 2:
                raise DataError(f"X must have at least 2 rows, got {n_rows} sample(s)")
            k = self._check_n_components(getattr(source, "n_rows", self.n_features_in_))
            self._start(k)
            checkpoint = checkpoint if checkpoint is not None and is_rows(source) else Checkpoint()
            with limit_blas(self.n_jobs_):
                if self.solver_ == "covariance":
                    self._fit_covariance(source, dtype, checkpoint)
                elif self.solver_ == "randomized":
                    self._fit_randomized(source, k, dtype, checkpoint)
                else:
                    self._fit_incremental(source, k, checkpoint)
        except BaseException:
            self.__dict__.pop("n_samples_seen_", None)
            raise
        return self

    def partial_fit(self, X, y=None):
        """Add rows to those seen so far.

        Parameters
        ----------
        X : array-like of shape (m, n_features)
        y : ignored

        Returns
        -------
        self

        Raises
        ------
        DataError
            For NaN or infinity, or another number of features; nothing is added then.
        ParameterError
            With `"randomized"`, which needs several passes, or for a StreamingPCA that was loaded without its state.

        Notes
        -----
        With `"covariance"` the components are computed when they are first asked for. With `"incremental"` the array is one
        batch, and the first one must have at least `n_components` rows.
        """
        first = not hasattr(self, "n_samples_seen_")
        if is_rows(X) or is_batches(X):
            raise ParameterError(f"partial_fit takes one array of rows at a time, got {type(X).__name__}; use fit")
        if first:
            self._check_parameters()
        if (self.solver if first else self.solver_) == "randomized":
            raise ParameterError(
                'partial_fit sees each row once, which solver="randomized" cannot do with: use fit, or solver="covariance" or "incremental"'
            )
        if not first and "_state" not in self.__dict__:
            raise ParameterError("this StreamingPCA was loaded without its accumulated state and takes no more rows; fit a new one")
        source, dtype = open_rows(self, X, reset=first)
        assert isinstance(source, ArrayRows)
        # all of it before any of it is added
        block = np.empty((block_rows(self.n_features_in_), self.n_features_in_), dtype)
        for start, n_valid in iter_blocks(source, block):
            check_finite(block[:n_valid], start + (0 if first else self.n_samples_seen_))
        if first:
            self._start(self._check_n_components(self.n_features_in_), one_pass=True)
        with limit_blas(self.n_jobs_):
            if self.solver_ == "incremental":
                batch = np.empty((source.n_rows, self.n_features_in_))
                source.read(0, source.n_rows, batch)
                self._add_incremental(batch)
                return self
            block = np.empty((gram_rows(self.n_features_in_), self.n_features_in_), dtype)
            for _, n_valid in iter_blocks(source, block):
                self._add(block, n_valid)
        self._drop_results()
        return self

    def merge(self, other: "StreamingPCA") -> "StreamingPCA":
        """Take in all rows that `other` has seen, as if they had been fitted here; `other` stays as it is.

        Parameters
        ----------
        other : StreamingPCA

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            Unless both are fitted with `"covariance"` on rows of the same width.
        """
        for pca in (self, other):
            check_is_fitted(pca, "n_samples_seen_")
            if not isinstance(getattr(pca, "_state", None), Moments):
                raise ParameterError(f'merge needs solver="covariance" on both sides, with accumulated state, got {pca.solver_!r}')
        if self.n_features_in_ != other.n_features_in_:
            raise DataError(f"merge needs rows of the same width, got {self.n_features_in_} and {other.n_features_in_} features")
        self._state.merge(other._state)
        self.n_samples_seen_ = self._state.n
        self._drop_results()
        return self

    def __getattr__(self, name):
        # only reached for attributes that are not there: components asked for after partial_fit or merge
        if name in RESULTS and isinstance(self.__dict__.get("_state"), Moments):
            with limit_blas(self.n_jobs_):
                self._finish()
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_parameters(self) -> None:
        choose_solver(self.solver, 1)
        for name, value in (("n_components", self.n_components), ("batch_size", self.batch_size)):
            if value is not None and (not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1):
                raise ParameterError(f"{name} must be None or a whole number of at least 1, got {value!r}")
        seed = self.random_state
        if seed is not None and (not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0):
            raise ParameterError(f"random_state must be None or a whole number of at least 0, got {seed!r}")
        self.n_jobs_ = resolve_n_jobs(self.n_jobs)

    def _start(self, n_components: int, one_pass: bool = False) -> None:
        """Forget what was fitted before."""
        self._drop_results()
        self.solver_, self.solver_reason_ = choose_solver(self.solver, self.n_features_in_, n_components, one_pass)
        if self.solver == "auto":
            logger.info("PCA solver %s (%s)", self.solver_, self.solver_reason_)
        self.n_samples_seen_, self.n_passes_ = 0, 1
        self._state: Any = Incremental() if self.solver_ == "incremental" else None

    def _drop_results(self) -> None:
        for name in RESULTS:
            self.__dict__.pop(name, None)
        self._projector: Projector | None = None

    def _check_n_components(self, n_rows: int) -> int:
        most = min(n_rows, self.n_features_in_)
        if self.n_components is not None and self.n_components > most:
            raise ParameterError(
                f"n_components must be at most min(rows, features) = min({n_rows}, {self.n_features_in_}) = {most}, got "
                f"{self.n_components}; lower it or add rows"
            )
        return most if self.n_components is None else int(self.n_components)

    def _add(self, block: np.ndarray, n_valid: int) -> None:
        if self._state is None:
            self._state = Moments.about(block, n_valid, self.n_jobs_)
        self._state.add(block, n_valid)
        self.n_samples_seen_ = self._state.n

    def _finish(self, few: np.ndarray | None = None) -> None:
        """Components from the moments, and all rows where they are few, under the caller's BLAS limit."""
        state, n = self._state, self._state.n
        if n < 2:
            raise DataError(f"X must have at least 2 rows, got {n} sample(s)")
        k = self._check_n_components(n)
        values, vectors = state.leading(k, few)
        # as exact as the values of few rows are: those along all directions add up to it
        variance = state.variance if few is None else few.var(axis=0, dtype=np.float64)
        self._keep(values, vectors, state.mean, variance)

    def _fit_covariance(self, source, dtype, checkpoint: Checkpoint) -> None:
        self._state, few = moments_of(source, dtype, self.n_jobs_, checkpoint)
        self.n_samples_seen_ = self._state.n
        self._finish(few)

    def _fit_incremental(self, source, k: int, checkpoint: Checkpoint) -> None:
        if (left := checkpoint.left()) is not None:
            self._state = Incremental.from_arrays(left)
            del left  # its components would stay beside those of the batches to come
            self._take_incremental()
        # without n_components, batches of unknown number decide by the first of them
        known = self.n_components is not None or is_rows(source)
        for batch in iter_incremental(source, k if known else 1, self.batch_size, self._state.n_batches):
            self._add_incremental(batch)
            checkpoint.keep(self._state.to_arrays)
        if not self.n_samples_seen_:
            raise DataError("X must have at least 2 rows, got 0 sample(s)")

    def _fit_randomized(self, source, k: int, dtype, checkpoint: Checkpoint) -> None:
        found = randomized_pca(source, k, self._check_n_components, dtype, int(self.random_state or 0), checkpoint)
        self.n_samples_seen_, self.n_passes_ = found.n, found.n_passes
        self._keep(found.values, found.vectors, found.mean, found.variance)

    def _keep(self, values: np.ndarray, vectors: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> None:
        """Set the results from eigenpairs, and mean and variance (divided by n) of the columns."""
        n, k = self.n_samples_seen_, len(values)
        total = variance.sum() * n / (n - 1)
        rest = min(n, self.n_features_in_) - k
        self.components_, self.explained_variance_ = vectors, values
        self.explained_variance_ratio_ = values / total if total > 0 else np.zeros(k)
        self.singular_values_ = np.sqrt(values * (n - 1))
        self.noise_variance_ = float(max(total - values.sum(), 0.0) / rest) if rest else 0.0
        self.mean_, self.var_, self.n_components_ = mean, variance, k
        self._projector = None

    def _add_incremental(self, batch: np.ndarray) -> None:
        """One batch of float64 rows, which is overwritten."""
        k = self._check_n_components(len(batch) if self.n_samples_seen_ == 0 else self.n_features_in_)
        if self.n_samples_seen_ == 0 and len(batch) == 1:
            raise DataError("X must have at least 2 rows in its first batch, got 1 sample(s)")
        self._state.add(batch, k)
        self._take_incremental()

    def _take_incremental(self) -> None:
        for name, value in self._state.results().items():
            setattr(self, name, value)
        self.n_samples_seen_ = self._state.n
        self._projector = None

    # -- use -----------------------------------------------------------------------------------------------------------
    def transform(self, X):
        """Project rows on the components.

        Parameters
        ----------
        X : array-like of shape (n, n_features), Rows, or re-iterable of batches

        Returns
        -------
        ndarray of shape (n, n_components)
            float64 for float64 (and wide integer) arrays, else float32.
        """
        check_is_fitted(self, "n_samples_seen_")
        source, dtype = open_rows(self, X, reset=False)
        projector = self._make_projector(dtype)
        block = np.empty((block_rows(self.n_features_in_), self.n_features_in_), dtype)
        reduced = np.empty((len(block), self.n_components_), dtype)
        n_rows = getattr(source, "n_rows", None)
        result = np.empty((n_rows or 0, self.n_components_), dtype)
        parts = []
        with limit_blas(self.n_jobs_):
            for start, n_valid in blocks_of(source, block):
                projector(block, reduced)
                if n_rows is None:
                    parts.append(reduced[:n_valid].copy())
                else:
                    result[start : start + n_valid] = reduced[:n_valid]
        return result if n_rows is not None else np.concatenate(parts)

    def transform_block(self, block: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Project one float32 block into `out`, for pipelines: no allocation, no checks, no limit on BLAS threads.

        Parameters
        ----------
        block : ndarray of shape (rows, n_features), float32
            Zero-padded, always as many rows; overwritten.
        out : ndarray of shape (rows, n_components), float32
            Padded rows give rows to be ignored.

        Returns
        -------
        out
        """
        if self._projector is None:
            self._projector = self._make_projector(np.dtype(np.float32))
        return self._projector(block, out)

    def drop_projector(self) -> None:
        """Let go of the buffers of `transform_block`; the next call makes them again."""
        self._projector = None

    def _make_projector(self, dtype) -> Projector:
        return Projector(self.components_, self.mean_, self.explained_variance_ if self.whiten else None, dtype)

    def inverse_transform(self, X):
        """Rows whose `transform` is `X`, as near as the components allow.

        Parameters
        ----------
        X : array-like of shape (n, n_components)

        Returns
        -------
        ndarray of shape (n, n_features)
            float32 for float32, else float64.

        Raises
        ------
        DataError
            When `X` has another number of columns.
        """
        check_is_fitted(self, "n_samples_seen_")
        X = check_array(X, dtype=[np.float64, np.float32], input_name="X")
        if X.shape[1] != self.n_components_:
            raise DataError(f"X must have n_components_ = {self.n_components_} columns, got {X.shape[1]}")
        weights = self.components_ * (deviation(self.explained_variance_)[:, None] if self.whiten else 1.0)
        weights, result = weights.astype(X.dtype), np.empty((len(X), self.n_features_in_), X.dtype)
        block = np.empty((block_rows(self.n_features_in_), self.n_components_), X.dtype)
        with limit_blas(self.n_jobs_):
            for start, n_valid in iter_blocks(ArrayRows(X), block):
                result[start : start + n_valid] = (block @ weights)[:n_valid]
        result += self.mean_.astype(X.dtype)
        return result

    @property
    def _n_features_out(self):
        return self.n_components_

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # -- keep ----------------------------------------------------------------------------------------------------------
    def to_arrays(self) -> dict[str, np.ndarray]:
        """What `transform` needs, as arrays without objects. What `partial_fit` and `merge` need is left out."""
        check_is_fitted(self, "n_samples_seen_")
        return arrays_of(self)

    @classmethod
    def from_arrays(cls, arrays) -> "StreamingPCA":
        """The estimator that `to_arrays` described.

        Raises
        ------
        DataError
            When arrays are missing or do not fit together.
        """
        return restore(cls, arrays)
