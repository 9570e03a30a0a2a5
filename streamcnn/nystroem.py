"""The RBF kernel for rows of any number: Nystroem features of landmark rows, mapped block by block into the linear SVM.

With landmarks z_1 ... z_m and their kernel matrix V diag(l) V', a row x is mapped to diag(l)^(-1/2) V' (k(z_1, x), ..., k(z_m, x)):
features whose inner products are the kernel's projection on the landmarks (Williams & Seeger 2001, section 2). The SVM of `linear`,
squared hinge loss and regularised intercept, is solved on them. Nothing of size rows x landmarks is ever held or stored: each pass
computes the kernel again, and products with V are taken of planes and gradients, never of rows.

Quasi-Newton steps start from the second derivative that the landmarks themselves predict, which in this basis is diagonal:
1 + 2 C a l_j / m with a active rows (the idea of FALKON's preconditioner, Rudi, Carratino & Rosasco 2017, section 3).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.linalg import eigh

from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.quasinewton import HISTORY, STEPS, PlanesSolver
from streamcnn.rbf import KernelMachine, kernel_of
from streamcnn.rowinput import blocks_of
from streamcnn.rows import block_rows
from streamcnn.threads import limit_blas

LANDMARKS = 2048
# rows whose kernel one thread computes at a time; the result is the same for any number of threads
PIECE = 512
# planes solved together: their points, gradients and histories fill so much at most
_PLANES = 64 << 20
# eigenvalues below this share of the largest are left away: dividing by their roots would blow up rounding
_CUT = {"float32": 1e-6, "float64": 1e-12}


def group_size(n_landmarks: int, n_planes: int) -> int:
    """Planes solved together; follows the shapes alone."""
    return int(min(n_planes, max(1, _PLANES // (8 * (n_landmarks + 1) * (2 * HISTORY + 8)))))


class Landmarks:
    """Landmark rows and the basis of their features.

    Parameters
    ----------
    rows : ndarray of shape (m, n_features), float64
        Scaled.
    gamma : float
    dtype : numpy dtype
        Of the kernel of rows with landmarks.
    scale : float
        Factor on raw rows.

    Attributes
    ----------
    basis : ndarray of shape (m, r), float64
        V diag(l)^(-1/2).
    eigenvalues : ndarray of shape (r,)
        l, those too small left away.
    """

    def __init__(self, rows: np.ndarray, gamma: float, dtype, scale: float):
        self.rows, self.gamma, self.dtype, self.scale = rows, gamma, np.dtype(dtype), scale
        # distances are taken about the landmarks' mean: with an offset of 1,000 deviations, float32 squares about 0 left only their
        # rounding of them, and no plane converged. Rounded, so that both sides are moved by the same
        self._mean = (rows.mean(axis=0) / scale).astype(dtype)
        rows = rows - self._mean.astype(np.float64) * scale
        squares = np.einsum("ij,ij->i", rows, rows)
        # one product of (x, |x|^2, 1) with these columns is the exponent -gamma |x - z|^2
        weights = np.concatenate([2 * gamma * rows, np.full((len(rows), 1), -gamma), -gamma * squares[:, None]], axis=1).T
        with limit_blas(1):  # so that the basis has the same bits for any number of threads
            itself = np.concatenate([rows, squares[:, None], np.ones((len(rows), 1))], axis=1) @ weights
            # transposed, as LAPACK works in place on columns alone
            eigenvalues, vectors = eigh(kernel_of(itself).T, overwrite_a=True, check_finite=False, driver="evr")
        # they ascend
        first = int(np.argmax(eigenvalues > _CUT[self.dtype.name] * eigenvalues[-1]))
        self.weights = weights.astype(dtype)
        self.eigenvalues, self.basis = eigenvalues[first:], vectors[:, first:]
        self.basis /= np.sqrt(self.eigenvalues)

    def kernel(self, rows: np.ndarray, augmented: np.ndarray, out: np.ndarray) -> None:
        """Kernel (n, m) of raw `rows` (n, n_features) with the landmarks; `augmented` is work space (n, n_features + 2)."""
        scaled = augmented[:, :-2]
        np.subtract(rows, self._mean, out=scaled)
        scaled *= scaled.dtype.type(self.scale)
        np.einsum("ij,ij->i", scaled, scaled, out=augmented[:, -2])
        augmented[:, -1] = 1
        kernel_of(np.matmul(augmented, self.weights, out=out))


class NystroemProblem(PlanesSolver):
    """The SVM on the features of landmarks.

    Parameters
    ----------
    problem : LinearProblem
    landmarks : Landmarks
    """

    def __init__(self, problem: LinearProblem, landmarks: Landmarks):
        super().__init__(problem, len(landmarks.eigenvalues) + 1, group_size(len(landmarks.rows), len(problem.positive)))
        self.landmarks = landmarks

    def machine(self, solution: LinearSolution) -> "NystroemMachine":
        """Decisions of raw rows by `solution`."""
        coef = solution.weights[:, :-1] @ self.landmarks.basis.T
        return NystroemMachine(self.landmarks.gamma, self.problem.scale, self.landmarks.rows, coef, solution.weights[:, -1].copy())

    def continued(self, dual_coef: np.ndarray, intercept: np.ndarray, known: np.ndarray) -> LinearSolution:
        """Planes of a `NystroemMachine` with the same landmarks, of the classes `known`, as a start for `solve`."""
        # inverse of what `machine` does: basis' diag(l) basis is 1
        weights = dual_coef @ (self.landmarks.basis * self.landmarks.eigenvalues)
        return self.problem.begin(np.column_stack([weights, intercept]), known)

    def evaluator(self, C: float, positive: np.ndarray) -> "_Pass":
        """See `_Pass`."""
        return _Pass(self.problem, self.landmarks, positive, C)


class _Pass:
    """f along a direction, gradient and the diagonal of the second derivative of a group of planes, in buffers made once."""

    def __init__(self, problem: LinearProblem, landmarks: Landmarks, positive: np.ndarray, C: float):
        self.problem, self.landmarks, self.C, self.n = problem, landmarks, C, len(positive)
        dtype, m, k = landmarks.dtype, len(landmarks.rows), problem.source.n_features
        self.block = np.empty((block_rows(k), k), dtype)
        piece = min(PIECE, len(self.block))
        pieces = len(self.block) // piece
        self.buffers = [(np.empty((piece, k + 2), dtype), np.empty((piece, m), dtype)) for _ in range(min(problem.n_jobs, pieces))]
        self.spans = [slice(first, first + piece) for first in range(0, len(self.block), piece)]
        self.column = problem.columns(positive)
        self.pool = ThreadPoolExecutor(len(self.buffers))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pool.shutdown()

    def __call__(self, points: np.ndarray, directions: np.ndarray):
        """As `quasinewton.minimise` wants it."""
        landmarks = self.landmarks
        both = np.concatenate([points, directions])
        coef = (both[:, :-1] @ landmarks.basis.T).astype(landmarks.dtype)
        intercept = both[:, -1:].astype(landmarks.dtype)
        losses, gradient, active = np.zeros((len(STEPS), self.n)), np.zeros((self.n, len(landmarks.rows) + 1)), np.zeros(self.n)
        for start, n_valid in blocks_of(self.problem.source, self.block):
            spans = [span for span in self.spans if span.start < n_valid]
            work = [self.pool.submit(self._piece, span, start, n_valid, coef, intercept) for span in spans]
            # added in the order of the rows, whichever is ready first
            for part in work:
                loss, residual_kernel, residual, weight = part.result()
                losses += loss
                gradient[:, :-1] += residual_kernel
                gradient[:, -1] += residual
                active += weight
        moved = points + np.array(STEPS)[:, None, None] * directions
        values = self.C * losses + 0.5 * np.square(moved).sum(axis=2)
        pulled = np.concatenate([gradient[:, :-1] @ landmarks.basis, gradient[:, -1:]], axis=1)
        share = np.append(landmarks.eigenvalues / len(landmarks.rows), 1.0)
        curvature = 1 + 2 * self.C * active[:, None] * share
        return values, moved[0] - 2 * self.C * pulled, lambda planes, vectors: vectors / curvature[planes]

    def _piece(self, span: slice, start: int, n_valid: int, coef: np.ndarray, intercept: np.ndarray):
        """Sums over a few rows of the block: losses (steps, n), residuals times kernel (n, m), residuals (n,), active rows (n,)."""
        augmented, kernel = self.buffers.pop()
        try:
            self.landmarks.kernel(self.block[span], augmented, kernel)
            decisions = np.matmul(coef, kernel.T)
            decisions += intercept
            count = min(n_valid, span.stop) - span.start
            first = start + span.start
            along = decisions[: self.n], decisions[self.n :]
            losses, residual, active = self.problem.losses_along(self.column, first, count, *along, STEPS)
            return losses, residual @ kernel, residual.sum(axis=1, dtype=np.float64), active
        finally:
            self.buffers.append((augmented, kernel))


class NystroemMachine(KernelMachine):
    """Decisions by kernels with landmarks.

    Parameters
    ----------
    gamma, scale : float
        As in `KernelMachine`.
    landmarks : ndarray of shape (m, n_features), float64
        Scaled.
    dual_coef : ndarray of shape (n_planes, m), float64
    intercept : ndarray of shape (n_planes,), float64
    """

    def __init__(self, gamma: float, scale: float, landmarks: np.ndarray, dual_coef: np.ndarray, intercept: np.ndarray):
        super().__init__(gamma, scale, landmarks, intercept)
        self.landmarks, self.dual_coef, self.intercept = landmarks, dual_coef, intercept

    @property
    def n_outputs(self) -> int:
        """Columns of the decisions."""
        return len(self.intercept)

    def add(self, kernel: np.ndarray, start: int, stop: int, sums: np.ndarray) -> None:
        """Every landmark speaks for every plane."""
        sums += kernel @ self.dual_coef[:, start:stop].T
