"""The exact RBF SVM of scikit-learn, kept as arrays, with a decision function in fixed blocks."""

import numpy as np
from sklearn.svm import SVC

# support vectors and rows taken at a time; so few rows because one image is padded to as many
TILE, _ROWS = 1024, 16


class KernelMachine:
    """Sums over an RBF kernel with vectors, in fixed blocks.

    Parameters
    ----------
    gamma : float
        Of scaled rows: kernel exp(-gamma |x - s|^2).
    scale : float
        Factor on the rows given.
    vectors : ndarray of shape (m, n_features), float64
        Scaled.
    intercept : ndarray of shape (n_sums,), float64
    """

    def __init__(self, gamma: float, scale: float, vectors: np.ndarray, intercept: np.ndarray):
        self.gamma, self.scale = float(gamma), float(scale)
        self.vectors, self.intercept = vectors, intercept
        self._squares = np.einsum("ij,ij->i", vectors, vectors)
        self._of_zeros: np.ndarray | None = None

    def add(self, kernel: np.ndarray, start: int, stop: int, sums: np.ndarray) -> None:
        """Add to `sums` (rows, n_sums) what `kernel` (rows, stop - start) with vectors `start` to `stop` contributes."""
        raise NotImplementedError

    def sums(self, tile: np.ndarray, out: np.ndarray) -> None:
        """Sums for raw float64 rows `tile` (rows, n_features), which is overwritten, into `out` (rows, n_sums)."""
        for start in range(0, len(tile), _ROWS):
            rows, result = tile[start : start + _ROWS], out[start : start + _ROWS]
            if len(rows) == _ROWS and not rows.any():  # padding: most of the block that a single image is decided in
                if self._of_zeros is None:
                    self._of_zeros = np.empty_like(result)
                    self._add_all(rows, self._of_zeros)
                result[:] = self._of_zeros
            else:
                self._add_all(rows, result)

    def _add_all(self, tile: np.ndarray, sums: np.ndarray) -> None:
        tile *= self.scale
        squares = np.einsum("ij,ij->i", tile, tile)
        sums[:] = self.intercept
        for start in range(0, len(self.vectors), TILE):
            stop = min(start + TILE, len(self.vectors))
            kernel = tile @ self.vectors[start:stop].T
            kernel *= 2
            kernel -= squares[:, None]
            kernel -= self._squares[start:stop]
            kernel *= self.gamma
            # rounding may leave a distance of 0 on the wrong side
            np.minimum(kernel, 0, out=kernel)
            np.exp(kernel, out=kernel)
            self.add(kernel, start, stop, sums)


class RbfMachine(KernelMachine):
    """Decision values of a one-against-one RBF SVM.

    Parameters
    ----------
    gamma, scale : float
        As in `KernelMachine`.
    support_vectors : ndarray of shape (n_support, n_features), float64
        Scaled, sorted by class.
    dual_coef : ndarray of shape (n_classes - 1, n_support), float64
    intercept : ndarray of shape (n_classes * (n_classes - 1) / 2,), float64
    n_support : ndarray of shape (n_classes,), int
        Support vectors of each class. All four are laid out as `sklearn.svm.SVC`'s attributes.
    """

    def __init__(self, gamma: float, scale: float, support_vectors, dual_coef, intercept, n_support):
        super().__init__(gamma, scale, support_vectors, intercept)
        self.support_vectors = support_vectors
        self.dual_coef, self.n_support = dual_coef, n_support
        n = len(n_support)
        # pair (i, j), i < j, stands at pairs[i, j]; row i lists those of class i, by the other class ascending as dual_coef has them
        pairs = np.zeros((n, n), np.int64)
        upper = np.triu_indices(n, 1)
        pairs[upper] = np.arange(len(upper[0]))
        pairs += pairs.T
        self._pairs = pairs[~np.eye(n, dtype=bool)].reshape(n, n - 1)
        self._ends = np.cumsum(n_support)

    @classmethod
    def fit(
        cls, rows: np.ndarray, codes: np.ndarray, weights: np.ndarray | None, C: float, gamma: float, scale: float, cache_size: float
    ) -> tuple["RbfMachine", np.ndarray]:
        """Train `SVC` on scaled float64 rows (n, n_features) in C order. Returns the machine and libsvm's iterations per pair.

        `weights` (n,) are those of the rows, None for 1. `cache_size` is in MiB and changes no bit of the result; the tolerance is
        libsvm's 1e-3.
        """
        svc = SVC(kernel="rbf", C=C, gamma=gamma, cache_size=max(1.0, cache_size)).fit(rows, codes, weights)
        machine = cls(gamma, scale, svc.support_vectors_, svc.dual_coef_, svc.intercept_, svc.n_support_.astype(np.int64))
        return machine, np.asarray(svc.n_iter_)

    @property
    def n_outputs(self) -> int:
        """Columns of the decisions."""
        return 1 if len(self.n_support) == 2 else len(self.n_support)

    def decide(self, tile: np.ndarray, out: np.ndarray) -> None:
        """Decisions of raw float64 rows `tile` (rows, n_features), which is overwritten, into `out` (rows, n_outputs).

        As scikit-learn's `decision_function_shape="ovr"`: votes of the pairs, plus the sum s of the pairs' decisions squashed to
        s / (3 (|s| + 1)), which settles equal votes. Two classes: the one pair's decision, positive for the second class.
        """
        pairs = np.empty((len(tile), len(self.intercept)))
        self.sums(tile, pairs)
        if self.n_outputs == 1:
            out[:, 0] = pairs[:, 0]
            return
        for code, columns in enumerate(self._pairs):
            own = pairs[:, columns]
            # a pair speaks for its first class from 0 upwards, for its second one below 0
            votes = (own[:, code:] >= 0).sum(axis=1) + (own[:, :code] < 0).sum(axis=1)
            confidence = own[:, code:].sum(axis=1) - own[:, :code].sum(axis=1)
            out[:, code] = votes + confidence / (3 * (np.abs(confidence) + 1))

    def add(self, kernel: np.ndarray, start: int, stop: int, sums: np.ndarray) -> None:
        """Each support vector speaks in the pairs of its class."""
        for code in range(np.searchsorted(self._ends, start, side="right"), len(self.n_support)):
            first, last = max(start, self._ends[code] - self.n_support[code]), min(stop, self._ends[code])
            if first >= stop:
                break
            sums[:, self._pairs[code]] += kernel[:, first - start : last - start] @ self.dual_coef[:, first:last].T
