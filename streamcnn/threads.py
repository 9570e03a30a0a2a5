"""How many threads, and holding BLAS to that number."""

import os
from contextlib import AbstractContextManager
from functools import cache

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
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1:
        raise ParameterError(f"n_jobs must be a whole number of at least 1, -1 or None (all cores), got {n_jobs!r}")
    return min(n_jobs, cores)


def limit_blas(n_jobs: int) -> AbstractContextManager:
    """Context in which BLAS uses `n_jobs` threads: another number gives other last bits."""
    return _controller().limit(limits=n_jobs, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    # looking for the loaded libraries takes milliseconds, and some callers limit BLAS thousands of times
    return ThreadpoolController()
