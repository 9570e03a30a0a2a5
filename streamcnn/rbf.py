"""The exact RBF SVM of scikit-learn, kept as arrays, with a decision function in fixed blocks."""

import numpy as np
from sklearn.svm import SVC

# support vectors and rows taken at a time; so few rows because one image is padded to as many
TILE, _ROWS = 1024, 16


def kernel_of(exponents: np.ndarray) -> np.ndarray:
    """The RBF kernel of exponents -gamma |x - s|^2, in their place."""
    # rounding may leave a distance of 0 on the wrong side
    np.minimum(exponents, 0, out=exponents)
    return np.exp(exponents, out=exponents)


class KernelMachine:
    """Decisions from sums over an RBF kernel with vectors, in fixed blocks.

    Parameters
    ----------
    gamma : float
        Of scaled rows: kernel exp(-gamma |x - s|^2).
    scale : float
        Factor on the rows given.
    vectors : ndarray of shape (m, n_features), float64
        Scaled.
    constants : ndarray of shape (n_sums,), float64
        What the sums start from.
    """

    def __init__(self, gamma: float, scale: float, vectors: np.ndarray, constants: np.ndarray):
        self.gamma, self.scale, self.vectors = float(gamma), float(scale), vectors
        self._constants, self._sizes = constants, self.gamma * np.einsum("ij,ij->i", vectors, vectors)
        self._of_zeros: np.ndarray | None = None

    def add(self, kernel: np.ndarray, start: int, stop: int, sums: np.ndarray) -> None:
        """Add to `sums` (rows, n_sums) what `kernel` (rows, stop - start) with vectors `start` to `stop` contributes."""
        raise NotImplementedError

    def settle(self, sums: np.ndarray, out: np.ndarray) -> None:
        """Make decisions `out` (rows, n_outputs) of `sums` (rows, n_sums)."""
        out[:] = sums

    def decide(self, tile: np.ndarray, out: np.ndarray) -> None:
        """Decisions of raw float64 rows `tile` (rows, n_features), which is overwritten, into `out` (rows, n_outputs)."""
        for start in range(0, len(tile), _ROWS):
            rows, result = tile[start : start + _ROWS], out[start : start + _ROWS]
            if len(rows) == _ROWS and not rows.any():  # padding: most of the block that a single image is decided in
                if self._of_zeros is None:
                    decided = np.empty_like(result)
                    self._decide(rows, decided)
                    self._of_zeros = decided  # once it is filled: another thread may look
                result[:] = self._of_zeros
            else:
                self._decide(rows, result)

    def _decide(self, tile: np.ndarray, out: np.ndarray) -> None:
        tile *= self.scale
        sizes = self.gamma * np.einsum("ij,ij->i", tile, tile)
        tile *= 2 * self.gamma
        sums = np.empty((len(tile), len(self._constants)))
        sums[:] = self._constants
        for start in range(0, len(self.vectors), TILE):
            stop = min(start + TILE, len(self.vectors))
            kernel = tile @ self.vectors[start:stop].T
            kernel -= sizes[:, None]
            kernel -= self._sizes[start:stop]
            self.add(kernel_of(kernel), start, stop, sums)
        self.settle(sums, out)


# of a machine, in the order in which it takes them
RBF_ARRAYS = ("support_vectors", "dual_coef", "intercept", "n_support")


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
        n = len(n_support)
        # for each class one sum for every other class, ascending as in dual_coef; a pair's decision is the sum of its two, and its
        # intercept begins that of its first class
        mine, other = np.nonzero(~np.eye(n, dtype=bool))
        place = np.empty((n, n), np.int64)
        place[mine, other] = np.arange(len(mine))
        self._partner, self._first = place[other, mine], mine < other
        constants = np.zeros(len(mine))
        constants[self._first] = intercept
        super().__init__(gamma, scale, support_vectors, constants)
        self.support_vectors, self.intercept = support_vectors, intercept
        self.dual_coef, self.n_support = dual_coef, n_support
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

    def add(self, kernel: np.ndarray, start: int, stop: int, sums: np.ndarray) -> None:
        """Each support vector speaks in the pairs of its class."""
        others = len(self.n_support) - 1
        for code in range(np.searchsorted(self._ends, start, side="right"), len(self.n_support)):
            first, last = max(start, self._ends[code] - self.n_support[code]), min(stop, self._ends[code])
            if first >= stop:
                break
            sums[:, code * others : (code + 1) * others] += kernel[:, first - start : last - start] @ self.dual_coef[:, first:last].T

    def settle(self, sums: np.ndarray, out: np.ndarray) -> None:
        """As scikit-learn's `decision_function_shape="ovr"`: votes of the pairs, plus the sum s of the pairs' decisions squashed to
        s / (3 (|s| + 1)), which settles equal votes. Two classes: the one pair's decision, positive for the second class.
        """
        pairs = sums + sums[:, self._partner]
        if self.n_outputs == 1:
            out[:, 0] = pairs[:, 0]
            return
        by_class = len(sums), len(self.n_support), -1
        # a pair speaks for its first class from 0 upwards, for its second one below 0
        votes = np.count_nonzero(((pairs >= 0) == self._first).reshape(by_class), axis=2)
        confidence = np.where(self._first, pairs, -pairs).reshape(by_class).sum(axis=2)
        np.add(votes, confidence / (3 * (np.abs(confidence) + 1)), out=out)
