"""How many threads, and holding BLAS to that number."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import scipy.linalg  # noqa: F401 - brings its own BLAS, which the controller must find
from threadpoolctl import ThreadpoolController

from streamcnn.errors import ParameterError


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


def limit_blas(n_jobs: int) -> AbstractContextManager:
    """Context in which BLAS uses `n_jobs` threads: another number gives other last bits."""
    return _controller().limit(limits=n_jobs, user_api="blas")


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
def _controller() -> ThreadpoolController:
    # looking for the loaded libraries takes milliseconds, and some callers limit BLAS thousands of times
    return ThreadpoolController()
