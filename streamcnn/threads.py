"""How many threads, and holding BLAS to that number."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import numpy as np
import scipy.linalg  # noqa: F401 - brings its own BLAS, which the controller must find
from threadpoolctl import LibController, ThreadpoolController

from streamcnn.errors import ParameterError

logger = logging.getLogger("streamcnn")


def resolve_n_jobs(n_jobs: int | None) -> int:
    """Threads to use: `n_jobs`, or every core this process may run on when it is None or -1.

    Parameters
    ----------
    n_jobs : int >= 1, -1 or None

    Returns
    -------
    int

    Raises
    ------
    ParameterError
        For any other value.
    """
    # cores that affinity masks leave to this process; not every system has the call
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if n_jobs is None or n_jobs == -1:
        return cores
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, (int, np.integer)) or n_jobs < 1:
        raise ParameterError(f"n_jobs must be a whole number of at least 1, -1 or None (all cores), got {n_jobs!r}")
    return min(int(n_jobs), cores)


@contextmanager
def limit_blas(n_jobs: int) -> Iterator[None]:
    """Block in which BLAS uses `n_jobs` threads: another number gives other last bits.

    That number belongs to the whole process, so one Python thread is inside such a block at a time (and may nest them); others wait, and
    estimators in several threads have the bits they have alone. What a thread inside waits for must not enter one.
    """
    turn = _turn  # a forked child has one of its own, and may still have to leave this one
    if not turn.acquire(timeout=_PATIENCE):
        logger.warning("waiting for another thread to finish its linear algebra, as BLAS has one number of threads for the whole process")
        turn.acquire()
    try:
        libraries = _libraries()
        before = [library.get_num_threads() for library in libraries]
        _set_threads(libraries, [n_jobs] * len(libraries))
        try:
            yield
        finally:
            _set_threads(libraries, before)
    finally:
        turn.release()


def _set_threads(libraries: list[LibController], numbers: list[int]) -> None:
    for library, number in zip(libraries, numbers):
        if library.get_num_threads() != number:
            # newer threadpoolctl lets one thread alone set it, and ignores the others without a word: the turn decides that here
            if hasattr(library, "clear_controlling_thread"):
                library.clear_controlling_thread(force=True)
            library.set_num_threads(number)


def _new_turn() -> None:
    global _turn
    _turn = threading.RLock()


_PATIENCE = 60.0
_turn = threading.RLock()
if hasattr(os, "register_at_fork"):
    # the thread that has the turn is not in the child
    os.register_at_fork(after_in_child=_new_turn)


def share(work: Callable, items: Iterable, n_threads: int) -> None:
    """Call `work(item)` for each item, on `n_threads` threads of which this one is the first; each takes the next item when it is free.

    Waits for all; what `work` raises is raised here. Starting the others takes a fifth of a millisecond.
    """
    left = deque(items)

    def take() -> None:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return
            work(item)

    if n_threads == 1:
        take()
        return
    with ThreadPoolExecutor(n_threads - 1) as pool:
        others = [pool.submit(take) for _ in range(n_threads - 1)]
        try:
            take()
        finally:
            left.clear()
        for other in others:
            other.result()


@cache
def _libraries() -> list[LibController]:
    # looking for the loaded libraries takes milliseconds, and some callers limit BLAS thousands of times
    return ThreadpoolController().select(user_api="blas").lib_controllers
