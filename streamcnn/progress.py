"""One progress bar per stage, on standard error or in a notebook; and the place where a run notices that it shall stop."""

import contextlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from streamcnn.memory import MemoryMonitor, format_bytes
from streamcnn.rows import Rows
from streamcnn.tracing import notebook_kernel

_stop = threading.Event()
# seconds, and things a second, below which a number of the last says nothing, or needs a decimal
_SHORTEST, _FAST = 0.1, 10


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first Ctrl-C inside the block end the run where nothing is lost, and a second one at once.

    That is after the shard, block or pass that is being worked on. Python raises `KeyboardInterrupt` wherever it happens to be, and in
    a callback that may neither fail nor raise it is lost. Only the main thread of a process hears signals: in others, and inside
    another such block, this does nothing; nor does it where someone else than Python itself takes care of Ctrl-C.
    """

    def handle(number, frame):
        if _stop.is_set():
            raise KeyboardInterrupt
        _stop.set()
        with contextlib.suppress(Exception):  # it may be just then that standard error is written to, or it is closed
            _output().write("\nstopping where nothing is lost; press Ctrl-C (in a notebook: stop) again to stop at once\n")

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    _stop.clear()
    signal.signal(signal.SIGINT, handle)
    try:
        yield
        if _stop.is_set():  # nobody has asked since
            raise KeyboardInterrupt("interrupted, when all was done")
    finally:
        signal.signal(signal.SIGINT, before)
        _stop.clear()


class _Lines:
    """What a bar tells, for log files and pipes: a line of text at the start, after two seconds, then every ten, and one at the end.

    Parameters
    ----------
    name, unit : str
    total : int or None
    """

    def __init__(self, name: str, total: int | None, unit: str):
        self.name, self.total, self.unit, self.n, self.more = name, total, unit, 0, ""
        self._steps = 0
        self._start = time.monotonic()
        self._next = self._start + 2
        self._write(f"starts, {counted(total, unit)}" if total else "starts")

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands at the end of each line."""
        self.more = f", {text}"

    def update(self, n: int) -> None:
        """`n` more are done."""
        self.n += n
        self._steps += n > 0
        now = time.monotonic()
        if now >= self._next and self.n != self.total:  # of the whole there is a line at the end
            self._next = now + 10
            seconds = now - self._start
            left = f", {(self.total - self.n) * seconds / self.n:.0f} s left" if self.total and self.n else ""
            self._write(f"{self.n:,}{f' of {self.total:,}' if self.total else ''} {self.unit}, {_speed(self.n, seconds)}{left}")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"{self.name:<8}: {text}{self.more}\n")
        sys.stderr.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        seconds = time.monotonic() - self._start
        done = f"{self.n:,} of {self.total:,} {self.unit}" if self.total and self.n < self.total else counted(self.n, self.unit)
        if kind is not None:
            self._write(f"stopped after {done}, {seconds:.1f} s")
            return
        # what was there already, or came all at once after other work, has no speed of its own
        timed = seconds >= _SHORTEST and self._steps > 1
        self._write(f"{done} in {seconds:.1f} s{f', {_speed(self.n, seconds)}' if timed else ''}")


def _speed(n: int, seconds: float) -> str:
    speed = n / seconds
    return f"{speed:,.0f} a second" if speed >= _FAST else f"{speed:.1f} a second"


def counted(n: int, unit: str) -> str:
    """`n` things for people; `unit` is their plural."""
    return f"{n:,} {unit.removesuffix('s') if n == 1 else unit}"


class Progress:
    """Bars with images a second, time left and memory: one that moves in a terminal or a notebook, plain lines elsewhere.

    Parameters
    ----------
    verbose : int
        0 is silent.
    monitor : MemoryMonitor or None
        Its last sample and limit are shown, and it may stop the run: see `MemoryMonitor.check`.
    """

    def __init__(self, verbose: int = 0, monitor: MemoryMonitor | None = None):
        self.verbose, self.monitor = verbose, monitor

    def check(self) -> None:
        """End the run if it shall stop: `KeyboardInterrupt` after Ctrl-C, `MemoryBudgetError` when the limit is nearly used up."""
        if _stop.is_set():
            raise KeyboardInterrupt
        if self.monitor is not None:
            self.monitor.check()

    @contextmanager
    def bar(self, name: str, total: int | None, unit: str = "images", stops: bool = True) -> Iterator[Callable[[int], None]]:
        """A bar for the block; call what it gives with the number of things just done.

        Each call may end the run, see `check`; without `stops` whoever works in the block asks where it can be left without loss.
        """
        check = self.check if stops else lambda: None
        if not self.verbose:
            yield lambda n: check()
            return
        with _new_bar(name, total, unit) as bar:

            def update(n: int) -> None:
                check()
                if self.monitor is not None and self.monitor.trace:
                    limit = "" if self.monitor.limit is None else f"/{format_bytes(self.monitor.limit)}"
                    bar.set_postfix_str(f"memory {format_bytes(self.monitor.trace[-1][2])}{limit}", refresh=False)
                bar.update(n)

            yield update

    def say(self, text: str) -> None:
        """A line for people."""
        if self.verbose:
            _output().write(text + "\n")


def _output() -> Any:
    """Where people are told: standard error, which a notebook would show as if something had gone wrong."""
    return sys.stdout if notebook_kernel() else sys.stderr


def _new_bar(name: str, total: int | None, unit: str) -> Any:
    if not (notebook_kernel() or sys.stderr.isatty()):
        return _Lines(name, total, unit)
    with warnings.catch_warnings():
        # in a notebook without ipywidgets tqdm advises to install it, and then draws its bar as text
        warnings.filterwarnings("ignore", message="IProgress not found")
        from tqdm.auto import tqdm  # a silent run need not wait for its import

    return tqdm(total=total, desc=f"{name:<8}", unit=f" {unit}", unit_scale=True, file=_output())


class CountedRows:
    """Rows that report how many of them were read: `n_read` in all."""

    def __init__(self, rows: Rows, update: Callable[[int], None]):
        self._rows, self._update = rows, update
        self.n_rows, self.n_features, self.n_read = rows.n_rows, rows.n_features, 0

    def read(self, start: int, stop: int, out) -> None:
        self._rows.read(start, stop, out)
        self.skip(stop - start)

    def skip(self, n: int) -> None:
        """Count `n` rows that were read before an interruption."""
        self.n_read += n
        self._update(n)
