"""How much memory this process may use, has used, and means to use.

Resident memory is what the limit is about. Its peak is the kernel's own high-water mark where there is one, and a sampled maximum
elsewhere; `streamcnn.system` asks for both.
"""

import contextlib
import csv
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from streamcnn import system, tracing
from streamcnn.errors import MemoryBudgetError, ParameterError
from streamcnn.files import replacing
from streamcnn.system import default_limit, machine_bytes, peak_resident_bytes, reset_peak, resident_bytes

__all__ = ["MemoryBudget", "MemoryMonitor", "claims_table", "default_limit", "format_bytes", "machine_bytes", "parse_bytes"]
__all__ += ["peak_resident_bytes", "reset_peak", "resident_bytes", "resolve_limit"]

logger = logging.getLogger("streamcnn")

# seconds for which a sample is good enough to decide by
_FRESH = 0.005
# share of the limit at which a run stops by itself
STOP_SHARE = 0.98

_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}ib": 1024**_i, f"{_letter}b": 1000**_i, _letter: 1024**_i}


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or a text.

    Parameters
    ----------
    size : int or str
        Such as `"512MiB"`, `"1.5 GB"` or `"2g"` (k, m, g, t alone are powers of 1024).

    Returns
    -------
    int

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


_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # held for microseconds, but by threads that a forked child does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_active: list["MemoryMonitor"] = []


def _start_mark() -> bool:
    """Start the system's high-water mark afresh, after every active monitor has taken note of it; False where not permitted."""
    with _lock:
        for monitor in _active:
            monitor._take_mark()
        done = system.reset_peak()
        mark = system.peak_resident_bytes()
        for monitor in _active:
            monitor._mark = mark
        return done


class MemoryMonitor:
    """Watch this process's resident memory while a block of code runs. Monitors may be nested.

    Parameters
    ----------
    limit : int, str or None
        Drawn beside the trace. The monitor of a run also watches it: see `check`.
    interval : float
        Seconds between samples.
    live : bool
        In a notebook, show the trace while the block runs, drawn anew every second. Elsewhere without effect.

    Attributes
    ----------
    trace : list of (seconds, stage, bytes)
    peak_bytes : int
        Highest resident memory since entry: the system's own high-water mark where `exact` is True, else the largest sample.
    exact : bool
        The system let the mark be reset at entry, or the mark rose during the block and so is the block's own.
    stage_peaks, stage_planned : dict of str to int
        The same of each stage, and what was planned for it.
    tight : bool
        A stage held more than planned: the heap was trimmed, and whoever works in chunks goes on with the smallest.
    near_limit : bool
        98 % of the limit was reached.

    Examples
    --------
    >>> with MemoryMonitor() as monitor:
    ...     with monitor.stage("fill"):
    ...         data = bytearray(10_000_000)
    >>> monitor.peak_bytes > 10_000_000, list(monitor.stage_peaks)
    (True, ['fill'])
    """

    def __init__(self, limit: int | str | None = None, interval: float = 0.05, live: bool = False):
        self.limit = None if limit is None else parse_bytes(limit)
        self.interval = interval
        self.live = live
        self.trace: list[tuple[float, str, int]] = []
        self.stage_peaks: dict[str, int] = {}
        self.stage_planned: dict[str, int] = {}
        self.tight = self.near_limit = False
        self._stage = ""
        self._peak, self._exact = 0, False
        self._n_samples, self._keep_every, self._owner, self._sampled = 0, 1, 0, 0.0
        self._mark: int | None = None
        self._view: tracing.LiveView | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self):
        with _lock:
            self._owner = threading.get_ident()
            _active.append(self)
            self._mark = system.peak_resident_bytes()
            self._exact = _start_mark()
        self._start = time.perf_counter()
        # made here, on the thread whose output it belongs to
        self._view = tracing.LiveView() if self.live else None
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
        with _lock:
            _active.remove(self)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()
            self._draw()
        self._draw(last=True)

    def _draw(self, last: bool = False) -> None:
        try:
            if self._view is not None:
                self._view.update(self, last)
        except Exception as error:  # a notebook gone or broken must not end the watch
            self._view = None
            logger.warning("the live memory view has ended (%s)", error)

    def _take_mark(self) -> None:
        mark = system.peak_resident_bytes()
        # a mark that could not be reset, and has not risen, is from before
        if mark is not None and self._mark is not None and mark > self._mark:
            self._exact = True
            self._note(mark)

    def _note(self, n_bytes: int) -> None:
        self._peak = max(self._peak, n_bytes)
        if self._stage:
            self.stage_peaks[self._stage] = max(self.stage_peaks.get(self._stage, 0), n_bytes)
        planned = self.stage_planned.get(self._stage)
        if planned is not None and n_bytes > planned and not self.tight:
            self.tight = True
            text = "stage %s holds %s where %s were planned: going on with the smallest chunks"
            logger.warning(text, self._stage, format_bytes(n_bytes), format_bytes(planned))
            system.trim_heap()
        if self.limit is not None and n_bytes >= STOP_SHARE * self.limit:
            self.near_limit = True

    def sample(self) -> int:
        """Take a sample now and return it in bytes."""
        with _lock:
            resident = system.resident_bytes()
            self._note(resident)
            self._take_mark()
            # half of a long trace is dropped at a time, and fewer samples are kept from then on: a run of days stays small, evenly
            # spread, and watched as closely as at its start
            if len(self.trace) >= 20_000:
                self.trace = self.trace[::2]
                self._keep_every *= 2
            self._n_samples += 1
            self._sampled = time.perf_counter()
            if self._n_samples % self._keep_every == 0 or self.trace[-1][1] != self._stage:
                self.trace.append((time.perf_counter() - self._start, self._stage, resident))
        return resident

    @contextlib.contextmanager
    def stage(self, name: str, planned: int | None = None) -> Iterator[None]:
        """Name what runs inside the block, for this monitor and those around it.

        Parameters
        ----------
        name : str
        planned : int or None
            Bytes of the whole process that the block is meant to stay below; `tight` tells when it does not.
        """
        if planned is not None:
            self.stage_planned[name] = planned
        with _lock:
            _start_mark()
            # monitors of other threads watch other runs
            mine = {monitor for monitor in _active if monitor._owner == threading.get_ident()}
            before = [(monitor, monitor._stage) for monitor in {*mine, self}]
            for monitor, _ in before:
                monitor._stage = name
        try:
            yield
        finally:
            with _lock:
                self.sample()
                _start_mark()
                for monitor, stage in before:
                    monitor._stage = stage

    def check(self) -> None:
        """Take a sample, in the block, and stop a run that has come too near its limit; called between shards or blocks.

        Raises
        ------
        MemoryBudgetError
            When 98 % of the limit was reached since entry.
        """
        if self in _active and time.perf_counter() - self._sampled > _FRESH:
            self.sample()
        if not self.near_limit:
            return
        assert self.limit is not None
        raise MemoryBudgetError(
            f"memory_limit of {format_bytes(self.limit)} is nearly used up ({format_bytes(self._peak)} at the most, where "
            f"{format_bytes(max(self.stage_planned.values(), default=0))} were planned), so the run has stopped; what is finished is kept "
            "in the store, if one was given: free what else this process holds, or raise memory_limit, and resume"
        )

    @property
    def exact(self) -> bool:
        return self._exact

    @property
    def peak_bytes(self) -> int:
        if self in _active:
            with _lock:
                self._take_mark()
        return self._peak

    def write_csv(self, path: Path) -> None:
        """Write the trace as `seconds,stage,resident_bytes`."""
        with replacing(path, durable=False) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["seconds", "stage", "resident_bytes"])
            writer.writerows((f"{seconds:.3f}", stage, resident) for seconds, stage, resident in self.trace)

    def plot(self, ax=None):
        """Draw the trace with stages and limit by matplotlib (extra `plot`); returns the axes."""
        return tracing.plot(self, ax)

    def _repr_html_(self) -> str:
        return tracing.svg(self)
