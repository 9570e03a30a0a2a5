"""The linear SVM of `linear` on wide rows: one matrix for all planes instead of a Hessian for each.

A Hessian of D features takes 8 D^2 bytes a plane and a factorisation a pass: at 12,800 features and 10 planes 13 GB. All Hessians are
1 + 2 C sum of v z z' over active rows, so they differ in which rows are active alone. Here the sum over all rows, S, is made once,
in the rows' own precision, and the Cholesky factor of 1 + 2 C a S (a: the share of rows that is active at the end, about) serves
every plane as the second derivative that quasi-Newton steps start from. A pass then takes products with points and directions only,
and the factor only decides how many passes there are, never where they end.

S and its factor share one square array, a triangle each. All products are of one thread each, S in tiles on several: bits follow from no
number of threads, and where other processes use the cores too, two threads of BLAS took ten times as long as one for the thin
products of a pass, waiting for each other.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
from scipy.linalg import get_lapack_funcs

from streamcnn.errors import DataError
from streamcnn.few import FewSolver
from streamcnn.linear import LinearProblem, LinearSolution
from streamcnn.newton import solve
from streamcnn.quasinewton import HISTORY, STEPS, Evaluate, PlanesSolver, Precondition
from streamcnn.rowinput import Pieces, blocks_of, is_rows
from streamcnn.rows import block_rows

WIDE = 2048
"""Features beyond which rows are wide: Newton's Hessians would be made for one plane after the other."""
# rows of a block: with fewer, reading and writing S takes as long as the products
_ROWS = 512
# share of rows active at the end; features of CIFAR-10
_ACTIVE = 0.3
# side of the tiles in which S is summed and its triangle copied
_TILE = 1024


def wide_bytes(n_features: int, n_planes: int, itemsize: int, n_jobs: int) -> dict[str, int]:
    """Bytes of each buffer of `WideSolver`."""
    k1 = n_features + 1
    return {
        "row block": _ROWS * n_features * itemsize,
        "scaled block": _ROWS * k1 * itemsize,
        "products of features": k1 * k1 * itemsize,
        "tiles of products": n_jobs * _TILE * _TILE * itemsize,
        # decisions, targets, margins and their products with weights
        "margins": 10 * n_planes * _ROWS * itemsize,
        "planes": 8 * n_planes * k1 * (2 * HISTORY + len(STEPS) + 16),
    }


def linear_method(n_rows: int, n_features: int) -> str:
    """Which solver a linear SVM of these sizes takes: "newton", and where rows are wide "few" for few of them, else "wide"."""
    if n_features <= WIDE:
        return "newton"
    return "few" if n_rows <= most_few(n_features) else "wide"


def most_few(n_features: int) -> int:
    """Rows that are few for so many features: up to 2,048 and half as many; none where the features are few themselves."""
    return min(WIDE, n_features // 2) if n_features > WIDE else 0


def linear_solver(problem: LinearProblem) -> Callable[..., LinearSolution]:
    """The solver of `linear_method`: a function of (C, tol, max_iter, start, checkpoint)."""
    method = linear_method(len(problem.codes), problem.source.n_features)
    if method == "newton":
        return partial(solve, problem)
    return (FewSolver if method == "few" else WideSolver)(problem).solve


class WideSolver(PlanesSolver):
    """Planes of one problem for one C after the other; S is made once, when first needed, and again after an interruption.

    Parameters
    ----------
    problem : LinearProblem
    """

    def __init__(self, problem: LinearProblem):
        k = problem.source.n_features
        super().__init__(problem, k + 1, len(problem.positive))
        self._source = Pieces(problem.source, block_rows(k)) if is_rows(problem.source) else problem.source
        self._block, self._scaled = np.empty((_ROWS, k), problem.dtype), np.empty((_ROWS, k + 1), problem.dtype)
        self._products: np.ndarray | None = None

    @contextmanager
    def evaluator(self, C: float, positive: np.ndarray) -> Iterator[Evaluate]:
        """All planes, as they share the factor."""
        precondition = self._factor(2 * C * _ACTIVE)
        yield lambda points, directions: (*self._pass(C, points, directions), precondition)

    def _pass(self, C: float, points: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f at points + each step * directions, and its gradient at the first."""
        problem, n = self.problem, len(points)
        column, both = problem.columns(problem.positive), np.concatenate([points, directions]).astype(problem.dtype)
        losses, gradient = np.zeros((len(STEPS), n)), np.zeros_like(points)

        def add(z: np.ndarray, start: int, n_valid: int) -> None:
            decisions = np.matmul(both, z.T)
            loss, residual, _ = problem.losses_along(column, start, n_valid, decisions[:n], decisions[n:], STEPS)
            np.add(losses, loss, out=losses)
            np.add(gradient, residual @ z, out=gradient)

        self._each_block(add)
        moved = points + np.array(STEPS)[:, None, None] * directions
        return C * losses + 0.5 * np.square(moved).sum(axis=2), moved[0] - 2 * C * gradient

    def _each_block(self, work: Callable[[np.ndarray, int, int], None]) -> None:
        """Call work(z, first row, rows that count) for each block z = (scale * x, 1), in order, while the block after it is read."""
        z, k = self._scaled, self._block.shape[1]
        running: Future[None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for start, n_valid in blocks_of(self._source, self._block):
                if running is not None:
                    running.result()
                np.multiply(self._block, self.problem.dtype.type(self.problem.scale), out=z[:, :k])
                z[:n_valid, k], z[n_valid:, k] = 1, 0
                running = thread.submit(work, z, start, n_valid)
            if running is not None:
                running.result()

    def _sum_products(self) -> np.ndarray:
        """S (D, D) on and below the diagonal, in Fortran order."""
        k1, n_jobs = self._scaled.shape[1], self.problem.n_jobs
        total = np.zeros((k1, k1), self.problem.dtype, order="F")
        strips = _strips(k1)
        room = [np.empty((_TILE, _TILE), self.problem.dtype) for _ in range(n_jobs)]
        with ThreadPoolExecutor(n_jobs) as pool:

            def add_tile(z: np.ndarray, rows: slice, cols: slice) -> None:
                product = room.pop()
                # transposed, as the sums lie column by column
                part = product[: cols.stop - cols.start, : rows.stop - rows.start]
                np.matmul(z[:, cols].T, z[:, rows], out=part)
                total.T[cols, rows] += part
                room.append(product)

            def add(z: np.ndarray, start: int, n_valid: int) -> None:
                weights = self.problem.weights_of(start, start + n_valid)
                if weights is not None:
                    z[:n_valid] *= np.sqrt(weights)[:, None].astype(z.dtype)
                tiles = [pool.submit(add_tile, z, rows, cols) for i, rows in enumerate(strips) for cols in strips[: i + 1]]
                for tile in tiles:
                    tile.result()

            self._each_block(add)
        return total

    def _factor(self, factor: float) -> Precondition:
        """What solves (1 + factor * S) x = q for the rows q (m, D) of any planes.

        The Cholesky factor fills the upper triangle of S's array and its diagonal, which is remembered.
        """
        if self._products is None:
            self._products = self._sum_products()
            self._diagonal = self._products.diagonal().copy()
        a = self._products
        if not factor * float(self._diagonal.max()) < np.finfo(a.dtype).max:  # no larger diagonal would do
            C = factor / (2 * _ACTIVE)
            raise DataError(f"C and weights of rows must have products with rows that {a.dtype} holds, got C = {C:.3g}: lower them")
        potrf, potrs = get_lapack_funcs(["potrf", "potrs"], [a])
        places, strips, lift = np.arange(len(a)), _strips(len(a)), 1.0
        while True:
            for i, strip in enumerate(strips):
                for other in strips[:i]:
                    np.multiply(a[strip, other].T, factor, out=a[other, strip])
                below = np.tril(a[strip, strip], -1)
                a[strip, strip] = below + factor * below.T
            a[places, places] = factor * self._diagonal + lift
            if potrf(a, lower=False, clean=False, overwrite_a=True)[1] == 0:
                break
            # rounding has left it indefinite: any larger diagonal preconditions too
            lift = max(10 * lift, 1e-7 * factor * float(self._diagonal.max()))

        def solve(planes: list[int], rows: np.ndarray) -> np.ndarray:
            return potrs(a, rows.T.astype(a.dtype), lower=False, overwrite_b=True)[0].T.astype(np.float64)

        return solve


def _strips(size: int) -> list[slice]:
    return [slice(first, min(first + _TILE, size)) for first in range(0, size, _TILE)]
