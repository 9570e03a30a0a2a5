"""One pass over the rows of a `LinearProblem`: f, its gradient and its Hessian at a point of each plane of a group.

The Hessian 1 + 2 C sum over active rows of v z z' (those with margin below 1) comes from the same pass as f and its gradient, and nearly
all time goes into it. Its sums are kept from pass to pass, and only rows that became active or ceased to be are added or taken away: on
features of CIFAR-10 (60,000 x 200, 10 classes) from the third pass on 16, 8, 2 and 0.4 % of the rows, where half of them are active. Each
plane's sum is made by one thread at a time in the order of the blocks: its bits depend on no schedule.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from streamcnn.linear import LinearProblem
from streamcnn.rowinput import Pieces, blocks_of, is_rows
from streamcnn.rows import block_rows

# Hessians held at a time; classes beyond are solved afterwards, in passes of their own
_HESSIANS = 64 << 20
# which rows were active, a bit for each row and plane of a group; where they would take more, Hessians are made afresh in every pass
_ACTIVE_BITS = 64 << 20
# rows added to and taken from a Hessian, per active row, after which it is made afresh lest their float32 rounding add up
_TURNOVER = 4
NARROW = 1024
"""Features from which on planes take one BLAS call of all threads instead of a plane to each thread."""
# what goes from pass to pass
_KEPT = ("sums", "before", "turnover", "n_active")


def group_size(n_features: int, n_planes: int) -> int:
    """Planes solved together: their Hessians fill 64 MiB at most; follows the shapes alone."""
    return int(min(n_planes, max(1, _HESSIANS // (8 * (n_features + 1) ** 2))))


def pass_rows(n_features: int) -> int:
    """Rows of a block of a pass: a power of two up to 8,192 that keeps it near 4 MiB, at least `block_rows`.

    With 1,024 rows of 200 columns, adding the products to the sums of 10 planes and waking threads took most of a later pass.
    """
    fitting = max(1, (4 << 20) // (4 * n_features))
    return max(block_rows(n_features), min(8192, 1 << (fitting.bit_length() - 1)))


def n_lanes(n_features: int, n_planes: int, n_jobs: int) -> int:
    """Threads that make Hessians of different planes at the same time."""
    return 1 if n_features >= NARROW else min(n_jobs, n_planes)


def active_bytes(n_rows: int, n_planes: int) -> int:
    """Bytes of the bits that say which rows are active for the planes of a group; 0 where they are not kept."""
    size = n_planes * -(-n_rows // 8)
    return size if size <= _ACTIVE_BITS else 0


@dataclass
class _Slot:
    """What the Hessians of one block are made of: rows z, which of them are active for each plane, weights of the rows or None."""

    z: np.ndarray
    active: np.ndarray
    row_weights: np.ndarray | None = None
    start: int = 0
    n_valid: int = 0


class Evaluator:
    """f, gradient and Hessian of a group of planes in one pass, in buffers made once.

    The caller's thread reads a block and finds margins, loss and gradient while others make the Hessians of the block before.
    """

    def __init__(self, problem: LinearProblem, positive: np.ndarray, C: float):
        self.problem, self.positive, self.C = problem, positive, C
        dtype, k = problem.dtype, problem.source.n_features
        rows, n = pass_rows(k), len(positive)
        self.source = Pieces(problem.source, block_rows(k)) if is_rows(problem.source) else problem.source
        lanes = n_lanes(k, n, problem.n_jobs)
        self.block = np.empty((rows, k), dtype)
        self.slots = [_Slot(np.zeros((rows, k + 1), dtype), np.empty((n, rows), bool)) for _ in range(2 if lanes > 1 else 1)]
        self.margins, self.residual = np.empty((n, rows), dtype), np.empty((n, rows), dtype)
        self.scratch = deque((np.empty((rows, k + 1), dtype), np.empty((k + 1, k + 1), dtype)) for _ in range(lanes))
        self.pool, self.helpers = ThreadPoolExecutor(max(1, lanes - 1)), range(lanes - 1)
        # sums over active rows, rows active when they were made, and rows added and taken since they were zero
        self.sums, self.work = np.zeros((n, k + 1, k + 1)), np.empty((k + 1, k + 1), order="F")
        self.before = np.zeros((n, active_bytes(len(problem.codes), n) // n), np.uint8)
        self.turnover, self.n_active = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.column = problem.columns(positive)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pool.shutdown()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What one pass leaves to the next, as arrays; not copied."""
        return {name: getattr(self, name) for name in _KEPT}

    def go_on(self, arrays: dict[str, np.ndarray]) -> None:
        """Take what `to_arrays` gave."""
        for name in _KEPT:
            setattr(self, name, arrays[name])

    def __call__(
        self, weights: np.ndarray, live: np.ndarray, at_zero: bool, zero_gradient: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """f (n,) and gradient (n, k + 1) at `weights` (n, k + 1), all float64; `hessian` then gives that of live planes.

        With `at_zero`, where all rows are active for all planes, one Hessian serves all. `zero_gradient`, zeros (n, k + 1) where
        given, becomes the gradient there.
        """
        C, rounded = self.C, weights.astype(self.problem.dtype)
        loss, gradient = np.zeros(len(weights)), np.zeros_like(weights)
        planes = np.flatnonzero(live)[:1] if at_zero else np.flatnonzero(live)
        self._forget(planes[self.turnover[planes] > _TURNOVER * self.n_active[planes]] if self.before.size else planes)
        self.n_active[planes] = 0
        previous: tuple[_Slot, deque, list[Future]] | None = None
        for number, (start, n_valid) in enumerate(blocks_of(self.source, self.block)):
            slot = self.slots[number % len(self.slots)]
            slot.start, slot.n_valid = start, n_valid
            self._evaluate(slot, rounded, loss, gradient, zero_gradient)
            self._finish(previous)
            previous = slot, (left := deque(planes)), [self.pool.submit(self._add_planes, slot, left) for _ in self.helpers]
            if not self.helpers:
                self._finish(previous)
                previous = None
        self._finish(previous)
        if zero_gradient is not None:
            zero_gradient *= 2 * C
        if at_zero:
            # one by one: numpy makes a copy of all of them where the source is one of the targets
            for matrix in self.sums[1:]:
                matrix[:] = self.sums[0]
            # half of the rows or fewer will stay active: the next Hessians are better made afresh
            self.turnover[:], self.n_active[:] = 1, 0
        return C * loss + 0.5 * np.square(weights).sum(axis=1), 2 * C * gradient + weights

    def hessian(self, c: int) -> np.ndarray:
        """That of plane `c` at the latest point: (k + 1, k + 1), float64, in a buffer that the next call overwrites."""
        # symmetric to the last bit, as BLAS computes one triangle: the transpose is read in the order in which it is written
        np.multiply(self.sums[c].T, 2 * self.C, out=self.work)
        self.work[np.diag_indices_from(self.work)] += 1
        return self.work

    def _forget(self, planes: np.ndarray) -> None:
        self.sums[planes], self.before[planes], self.turnover[planes] = 0, 0, 0

    def _evaluate(self, slot: _Slot, rounded: np.ndarray, loss: np.ndarray, gradient: np.ndarray, zero_gradient: np.ndarray | None) -> None:
        """Scale the block into `slot.z`, find active rows, and add to loss and gradients (without the factors C and 2 C)."""
        problem, m, residual, z, n_valid = self.problem, self.margins, self.residual, slot.z, slot.n_valid
        np.multiply(self.block, problem.dtype.type(problem.scale), out=z[:, :-1])
        z[:n_valid, -1], z[n_valid:, -1] = 1, 0
        np.matmul(rounded, z.T, out=m)
        column, own = problem.own_planes(self.column, slot.start, slot.start + n_valid)
        # 1 - t w'z: rows of the plane's class last, as each row has at most one such plane
        of_own = 1 - m[column, own]
        m += 1
        m[column, own] = of_own
        m[:, n_valid:] = 0
        np.maximum(m, 0, out=m)
        np.greater(m, 0, out=slot.active)
        weights = problem.weights_of(slot.start, slot.start + n_valid)
        slot.row_weights = None if weights is None else weights.astype(m.dtype)
        if slot.row_weights is None:
            np.copyto(residual, m)
        else:
            np.multiply(m[:, :n_valid], slot.row_weights, out=residual[:, :n_valid])
            residual[:, n_valid:] = 0
        loss += np.einsum("ci,ci->c", m, residual, dtype=np.float64)
        residual[column, own] *= -1
        gradient += residual @ z
        if zero_gradient is not None:
            residual[:, :n_valid] = 1 if slot.row_weights is None else slot.row_weights
            residual[column, own] *= -1
            zero_gradient += residual @ z

    def _finish(self, block: tuple[_Slot, deque, list[Future]] | None) -> None:
        """Lend a hand with the planes left of a block, and wait until all are done."""
        if block is not None:
            slot, left, futures = block
            self._add_planes(slot, left)
            for future in futures:
                future.result()

    def _add_planes(self, slot: _Slot, planes: deque) -> None:
        """Bring the sums of `planes` up to date with a block; several threads may take planes from the same queue."""
        scratch = self.scratch.pop()
        while planes:
            try:
                c = planes.popleft()
            except IndexError:
                break
            self._add_changes(int(c), slot, *scratch)
        self.scratch.append(scratch)

    def _add_changes(self, c: int, slot: _Slot, rows: np.ndarray, product: np.ndarray) -> None:
        """Add v z z' of rows that have become active for plane `c`, and take away that of rows which no longer are.

        Only these rows are multiplied. Measured at 200 features: 1.6, 3, 6 and 11 times as fast at 60, 30, 10 and 2 % of the rows
        as all rows with weights 0, and as fast when they are all.
        """
        now = slot.active[c]
        self.n_active[c] += np.count_nonzero(now)
        entered, left = np.flatnonzero(now), None
        if self.before.size:
            here = self.before[c, slot.start // 8 : (slot.start + slot.n_valid + 7) // 8]
            old = np.zeros(len(now), bool)
            old[: slot.n_valid] = np.unpackbits(here, count=slot.n_valid, bitorder="little")
            entered, left = np.flatnonzero(now & ~old), np.flatnonzero(old & ~now)
            here[:] = np.packbits(now[: slot.n_valid], bitorder="little")
            self.turnover[c] += len(entered) + len(left)
        for numbers, change in ((entered, np.add), (left, np.subtract)):
            if numbers is None or not len(numbers):
                continue
            part = rows[: len(numbers)]
            np.take(slot.z, numbers, axis=0, out=part, mode="clip")
            if slot.row_weights is not None:
                part *= np.sqrt(slot.row_weights[numbers])[:, None]
            np.matmul(part.T, part, out=product)
            change(self.sums[c], product, out=self.sums[c])
