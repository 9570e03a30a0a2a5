"""Compile loops with numba so that a cache that cannot be written or read costs time, never the run.

numba raises at import when no cache folder is writable, raises `EOFError` for ever after a cache file was cut short by a kill
(numba #10434), and serves stale code when a function in another file changed. All three are handled here.
"""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache, NullCache

logger = logging.getLogger("streamcnn")

CACHED: list[Any] = []
"""Every kernel loaded so far that has entries in the cache on disk."""


@lru_cache(maxsize=1)
def _sources_digest() -> str:
    """Digest of all kernel sources: numba looks only at the file of the cached function, not at what that inlines."""
    digest = hashlib.sha256()
    with suppress(OSError):  # sources inside a zip: they change only with the package
        for path in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _tell(kept: bool = True) -> None:
    """Say, once a process, why the first run stands still for some seconds."""
    after = "; later runs find them on disk" if kept else ", as each process does: no folder for them can be written (NUMBA_CACHE_DIR)"
    logger.info("compiling kernels for this machine%s", after)


class _TolerantCache(FunctionCache):
    """numba's cache on disk, where an unreadable entry is a miss and a failed write is no error."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _sources_digest())

    def load_overload(self, sig, target_context):
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # a torn pickle can raise nearly anything, and a fresh compile is always right
            self._delete_files()
            found = None
        if found is None:
            _tell()
        return found

    def save_overload(self, sig, data):
        # disk full, folder gone, index torn and not ours to delete: the compiled code in memory serves this run
        with suppress(Exception):
            super().save_overload(sig, data)

    def _delete_files(self):
        for path in Path(self._cache_path).glob(f"{self._impl.filename_base}.*nb[ci]"):
            with suppress(OSError):
                path.unlink()


class _NoCache(NullCache):
    """None, where no folder is writable: each process compiles anew, and says so."""

    def load_overload(self, sig, target_context):
        _tell(kept=False)


def jit(**options) -> Callable:
    """`numba.njit` with `nogil=True` and the cache on disk where one can be written.

    Parameters
    ----------
    **options
        Passed to `numba.njit`. `cache=False` for functions that only other kernels call: their code is cached in the caller's.

    Returns
    -------
    decorator
    """
    cache = options.pop("cache", True)

    def decorate(function):
        dispatcher = njit(**{"nogil": True, **options})(function)
        if cache and hasattr(dispatcher, "_cache"):  # without it numba is switched off (NUMBA_DISABLE_JIT)
            try:
                dispatcher._cache = _TolerantCache(function)
            except RuntimeError:  # no folder is writable
                dispatcher._cache = _NoCache()
            CACHED.append(dispatcher)
        return dispatcher

    return decorate


def flat(array: np.ndarray) -> np.ndarray:
    """The numbers of a C-contiguous array in one axis, never marked read-only: numba would compile once more for that type."""
    if array.flags.writeable:
        return array.reshape(-1)

    class Writable:
        __array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False), "shape": (array.size,)}

    return np.asarray(Writable())


def by_type(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images as (uint8, float32), one of them empty, so that one compiled kernel serves both."""
    if images.dtype == np.uint8:
        return flat(images), np.empty(0, np.float32)
    return np.empty(0, np.uint8), flat(images)


def run_workers(work: Callable[[int], object], n_workers: int) -> None:
    """Call `work(worker)` for worker 0 to n_workers - 1 side by side, one of them on this thread.

    For kernels that release the GIL. Against numba's `parallel=True` this compiles in a third of the time (measured), may be
    called from any thread and after a fork, and leaves no threads spinning beside those of BLAS; it costs 0.1 ms a call.
    """
    if n_workers == 1:
        work(0)
        return
    with ThreadPoolExecutor(n_workers - 1) as pool:
        others = [pool.submit(work, worker) for worker in range(1, n_workers)]
        work(0)
    for other in others:
        other.result()


# measured (LLVM 22, x86-64): what LLVM keeps after loading a run's kernels from the cache, and after compiling all of them. It
# serves the next kernel too, so the first one of a process pays; one compiled later takes a tenth of that.
_LOADING_BYTES, _COMPILING_BYTES = 56 << 20, 128 << 20


def pending_bytes(dispatchers) -> int:
    """What this process will still grow by when these kernels come into use: nothing, the loading or the compiling of them."""
    new = [dispatcher for dispatcher in dispatchers if _is_new(dispatcher)]
    cached = all(_is_cached(dispatcher) for dispatcher in new)
    if len(new) < len(dispatchers):  # LLVM is there already
        return 0 if cached else (_COMPILING_BYTES - _LOADING_BYTES) // 2
    return _LOADING_BYTES if cached else _COMPILING_BYTES


def compiles_first(dispatcher) -> bool:
    """Whether the next use of a kernel compiles it: it is neither in this process nor on disk."""
    return _is_new(dispatcher) and not _is_cached(dispatcher)


def _is_new(dispatcher) -> bool:
    """Whether a kernel has not been used in this process; without signatures numba is switched off."""
    return hasattr(dispatcher, "signatures") and not dispatcher.signatures


def _is_cached(dispatcher) -> bool:
    with suppress(Exception):  # an unreadable index is a miss
        return bool(dispatcher._cache._cache_file._load_index())
    return False
