"""What a forked child must not share with its parent: places in open files, and locks whose threads it does not have.

A descriptor has one place for both processes, so that each would read where the other left off; a file lock taken before the fork is
held by both; a thread lock that another thread held is never released in the child.
"""

import os
import threading
import weakref
from typing import Any

_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def tell_child(holder: Any) -> None:
    """Call `holder.after_fork()` in every child that this process forks while `holder` lives."""
    _holders.add(holder)


def _in_child() -> None:
    for holder in list(_holders):
        holder.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class ThreadLock:
    """A lock for one thread at a time, in objects that are pickled or copied: the other object has one of its own."""

    def __init__(self):
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception) -> None:
        self._lock.release()

    def __reduce__(self):
        return ThreadLock, ()
