"""What the operating system says about memory: what this process holds, its high-water mark, and what it may use.

One small interface, `ProcessMemory`, with a version for Linux, one for macOS and one for the rest; what builds on it is the same
code everywhere, and tests put a made-up system in its place. `ru_maxrss` is used nowhere: a child inherits it from its parent.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


class ProcessMemory:
    """Resident memory of this process as psutil tells it: on Windows the working set and its peak."""

    def resident(self) -> int:
        """Bytes resident now."""
        return int(psutil.Process().memory_info().rss)

    def peak(self) -> int | None:
        """The system's own high-water mark in bytes, or None where it keeps none that is this process's own."""
        info = psutil.Process().memory_info()
        # psutil 8 renames the peak working set
        peak = getattr(info, "peak_rss", getattr(info, "peak_wset", None))
        return None if peak is None else int(peak)

    def reset_peak(self) -> bool:
        """Start the high-water mark afresh; False where that is not permitted."""
        return False


class LinuxMemory(ProcessMemory):
    """`VmRSS` and `VmHWM` of /proc/self/status; writing 5 to /proc/self/clear_refs resets the latter."""

    def __init__(self, proc: Path = Path("/proc/self")):
        self._status, self._clear_refs = str(proc / "status"), proc / "clear_refs"

    def _field(self, name: str) -> int | None:
        try:
            with open(self._status, encoding="ascii") as file:  # noqa: PTH123 - sampled often, Path costs twice as much
                for line in file:
                    if line.startswith(name):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
        return None

    def resident(self) -> int:
        found = self._field("VmRSS:")
        return super().resident() if found is None else found

    def peak(self) -> int | None:
        return self._field("VmHWM:")

    def reset_peak(self) -> bool:
        try:
            self._clear_refs.write_text("5")
        except OSError:
            return False
        return True


class MacMemory(ProcessMemory):
    """The physical footprint, which counts compressed pages, as `proc_pid_rusage` gives it; plain resident memory where it fails.

    `rusage_info_v4` is a UUID of 16 bytes and then 64-bit numbers: the footprint is the 8th, its maximum over the process's life
    the 29th (sys/resource.h).
    """

    _FLAVOR, _FOOTPRINT, _LIFETIME_PEAK, _NUMBERS = 4, 7, 28, 64

    def __init__(self, library=None):
        with contextlib.suppress(OSError, AttributeError):
            library = library or ctypes.CDLL("/usr/lib/libproc.dylib")
        self._library = library

    def _number(self, index: int) -> int | None:
        buffer = (ctypes.c_uint64 * (2 + self._NUMBERS))()
        try:
            failed = self._library.proc_pid_rusage(os.getpid(), self._FLAVOR, ctypes.byref(buffer))
        except (AttributeError, OSError):
            return None
        return None if failed else int(buffer[2 + index])

    def resident(self) -> int:
        return self._number(self._FOOTPRINT) or super().resident()

    def peak(self) -> int | None:
        return self._number(self._LIFETIME_PEAK)


def _this_system() -> ProcessMemory:
    if sys.platform == "linux":
        return LinuxMemory()
    return MacMemory() if sys.platform == "darwin" else ProcessMemory()


process_memory: ProcessMemory = _this_system()


def resident_bytes() -> int:
    """Resident memory of this process now (macOS: physical footprint)."""
    return process_memory.resident()


def peak_resident_bytes() -> int | None:
    """The system's own high-water mark of resident memory, or None where it keeps none that is this process's own."""
    return process_memory.peak()


def reset_peak() -> bool:
    """Start the system's high-water mark afresh; False where that is not permitted."""
    return process_memory.reset_peak()


def trim_heap() -> None:
    """Give freed memory back to the system where its allocator (glibc's, Windows', macOS') takes such a request."""
    with contextlib.suppress(Exception):  # a request, never a need
        if hasattr(psutil, "heap_trim"):
            psutil.heap_trim()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, list[str], str]]:
    """Folder, names of limit files and name of the usage file of every control group of this process, the whole ancestry."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in lines:
        if number == "0" and controllers == "":
            bases, limits, usage = [root, root / "unified"], ["memory.max", "memory.high"], "memory.current"
        elif "memory" in controllers.split(","):
            bases, limits, usage = [root / "memory"], ["memory.limit_in_bytes"], "memory.usage_in_bytes"
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for base in bases:
            for folder in (own, *own.parents):
                yield base / folder, limits, usage


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no number: no limit at this level
        return None


def _file_pages(group: Path) -> int:
    """Bytes of the group's page cache, which the system takes back when somebody needs memory."""
    names, found = ("total_inactive_file", "total_active_file", "inactive_file", "active_file"), {}
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in names:
                found[name] = int(value)
    # version 1 has both forms, and the group's own pages are part of the total
    totals = [found[name] for name in names[:2] if name in found]
    return sum(totals) if totals else sum(found.values())


def cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Memory limits in bytes of this process's control groups, versions 1 and 2, the whole ancestry."""
    found = [_read_number(group / name) for group, names, _ in _groups(root, membership) for name in names]
    return [limit for limit in found if limit is not None]


def cgroup_free(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left below the limit of each control group that has one, its page cache counted as free."""
    free = []
    for group, names, usage in _groups(root, membership):
        used = _read_number(group / usage)
        limits = [limit for name in names if (limit := _read_number(group / name)) is not None]
        if limits and used is not None:
            free.append(max(0, min(limits) - max(0, used - _file_pages(group))))
    return free


def machine_bytes() -> int:
    """Memory this process may use: the smallest of physical memory and its control groups' limits."""
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def default_limit() -> int:
    """Half of what the machine allows this process, at most what is free now (with what the process already holds)."""
    free = min([psutil.virtual_memory().available, *cgroup_free()])
    return min(machine_bytes() // 2, free + resident_bytes())
