"""How much memory this process may use, has used, and means to use.

Resident memory is what the limit is about. Its peak is the kernel's own high-water mark where there is one (Linux `VmHWM`,
Windows peak working set), and a sampled maximum elsewhere; never `ru_maxrss`, which a child inherits from its parent.
"""

import contextlib
import csv
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

from streamcnn.errors import MemoryBudgetError, ParameterError

_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}ib": 1024**_i, f"{_letter}b": 1000**_i, _letter: 1024**_i}


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text such as `"512MiB"`, `"1.5 GB"` or `"2g"` (k, m, g, t alone are powers of 1024).

    Raises
    ------
    ParameterError
        When it is neither, or not positive.
    """
    value = None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
        if match and match[2].lower() in _UNITS:
            value = int(float(match[1]) * _UNITS[match[2].lower()])
    elif isinstance(size, (int, float)) and not isinstance(size, bool) and size == int(size):
        value = int(size)
    if value is None or value <= 0:
        raise ParameterError(f'memory_limit must be a positive number of bytes or a size such as "2GiB", got {size!r}')
    return value


def format_bytes(n: float) -> str:
    """`n` bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit in ("B", "KiB") else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _status_bytes(field: str) -> int | None:
    """A field of `/proc/self/status` in bytes, or None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123 - sampled often, Path costs twice as much
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident_bytes() -> int:
    """Resident memory of this process now (macOS: physical footprint where psutil tells it)."""
    if sys.platform == "linux" and (resident := _status_bytes("VmRSS")) is not None:
        return resident
    info = psutil.Process().memory_info()
    return int(getattr(info, "phys_footprint", info.rss))


def peak_resident_bytes() -> int | None:
    """The system's own high-water mark of resident memory, or None where it keeps none that is this process's own."""
    if sys.platform == "linux":
        return _status_bytes("VmHWM")
    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_rss", getattr(info, "peak_wset", None))
    return None if peak is None else int(peak)


def reset_peak() -> bool:
    """Start the system's high-water mark afresh; False where that is not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Memory limits of this process's control groups, versions 1 and 2, the whole ancestry."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    limits = []
    for number, controllers, path in lines:
        if number == "0" and controllers == "":
            bases, names = [root, root / "unified"], ["memory.max", "memory.high"]
        elif "memory" in controllers.split(","):
            bases, names = [root / "memory"], ["memory.limit_in_bytes"]
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        for base in bases:
            for folder in (own, *own.parents):
                for name in names:
                    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit at this level
                        limits.append(int((base / folder / name).read_text()))
    return limits


def machine_bytes() -> int:
    """Memory this process may use: the smallest of physical memory and its control groups' limits."""
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def default_limit() -> int:
    """Half of what the machine allows this process, at most what is free now (with what the process already holds)."""
    return min(machine_bytes() // 2, psutil.virtual_memory().available + resident_bytes())


def resolve_limit(memory_limit: int | str | None) -> int:
    """The limit in bytes: as given, or `default_limit()` for None."""
    return default_limit() if memory_limit is None else parse_bytes(memory_limit)


class MemoryBudget:
    """A limit and the named claims on it.

    Parameters
    ----------
    limit : int, str or None
        Bytes, a size such as `"1GiB"`, or None for `default_limit()`.

    Attributes
    ----------
    limit : int
        Bytes.
    claims : dict of str to int
        Bytes claimed under each name. The first is `already in use`, what the process holds on entry.

    Examples
    --------
    >>> budget = MemoryBudget("4GiB")
    >>> budget.claim("pixels", 1000)
    >>> budget.claims["pixels"]
    1000
    """

    def __init__(self, limit: int | str | None = None):
        self.limit = resolve_limit(limit)
        self.claims: dict[str, int] = {"already in use": resident_bytes()}

    @property
    def claimed(self) -> int:
        """Sum of all claims in bytes."""
        return sum(self.claims.values())

    @property
    def free(self) -> int:
        """What is left of the limit in bytes; negative when over-claimed."""
        return self.limit - self.claimed

    def claim(self, name: str, n_bytes: int) -> None:
        """Add `n_bytes` under `name`.

        Raises
        ------
        MemoryBudgetError
            When the limit would be passed; the message is the itemised table.
        """
        claims = self.claims | {name: self.claims.get(name, 0) + int(n_bytes)}
        if sum(claims.values()) > self.limit:
            raise MemoryBudgetError(
                f"memory_limit of {format_bytes(self.limit)} is too small: {format_bytes(sum(claims.values()))} needed\n"
                + claims_table(claims)
            )
        self.claims = claims

    def release(self, name: str) -> None:
        """Drop the claim `name`."""
        self.claims.pop(name, None)

    def __repr__(self):
        return f"MemoryBudget(limit={format_bytes(self.limit)}, claimed={format_bytes(self.claimed)})\n{claims_table(self.claims)}"


def claims_table(claims: dict[str, int]) -> str:
    """Claims as lines of text, largest first after the first."""
    first, *rest = claims.items()
    lines = [first, *sorted(rest, key=lambda item: -item[1]), ("total", sum(claims.values()))]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {format_bytes(n):>10}" for name, n in lines)


class MemoryMonitor:
    """Watch this process's resident memory while a block of code runs.

    Parameters
    ----------
    limit : int, str or None
        Drawn beside the trace; nothing is enforced by the monitor.
    interval : float
        Seconds between samples.

    Attributes
    ----------
    trace : list of (seconds, stage, bytes)
    peak_bytes : int
        Highest resident memory since entry: the kernel's mark where `exact` is True, else the largest sample.
    stage_peaks : dict of str to int
        Largest sample of each stage.
    exact : bool

    Examples
    --------
    >>> with MemoryMonitor() as monitor:
    ...     data = bytearray(10_000_000)
    >>> monitor.peak_bytes > 10_000_000
    True
    """

    def __init__(self, limit: int | str | None = None, interval: float = 0.05):
        self.limit = None if limit is None else parse_bytes(limit)
        self.interval = interval
        self.trace: list[tuple[float, str, int]] = []
        self.stage_peaks: dict[str, int] = {}
        self.exact = False
        self._stage = ""
        self._peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self):
        self.exact = reset_peak()
        self._start = time.perf_counter()
        self._stop.clear()
        self.sample()
        self._thread = threading.Thread(target=self._watch, name="streamcnn memory monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self.sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()

    def sample(self) -> int:
        """Take a sample now and return it in bytes."""
        resident = resident_bytes()
        self._peak = max(self._peak, resident)
        self.stage_peaks[self._stage] = max(self.stage_peaks.get(self._stage, 0), resident)
        # half of a long trace is dropped at a time, so that a run of days stays small and evenly spread
        if len(self.trace) >= 20_000:
            self.trace = self.trace[::2]
            self.interval *= 2
        self.trace.append((time.perf_counter() - self._start, self._stage, resident))
        return resident

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name what runs inside the block."""
        before, self._stage = self._stage, name
        try:
            yield
        finally:
            self.sample()
            self._stage = before

    @property
    def peak_bytes(self) -> int:
        peak = peak_resident_bytes() if self.exact else None
        return self._peak if peak is None else max(peak, self._peak)

    def write_csv(self, path: Path) -> None:
        """Write the trace as `seconds,stage,resident_bytes`."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["seconds", "stage", "resident_bytes"])
            writer.writerows((f"{seconds:.3f}", stage, resident) for seconds, stage, resident in self.trace)
