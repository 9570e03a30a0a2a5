"""One progress bar per stage, on standard error; and the place where a run notices that it shall stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from streamcnn.memory import MemoryMonitor, format_bytes
from streamcnn.rows import Rows

_stop = threading.Event()


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
            sys.stderr.write("\nstopping where nothing is lost; press Ctrl-C again to stop at once\n")

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


class Progress:
    """Bars with ETA and memory beside it; silent when `verbose` is 0.

    Parameters
    ----------
    verbose : int
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
        # a log file gets a line now and then, a terminal a moving bar
        interval = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(total=total, desc=f"{name:<8}", unit=f" {unit}", unit_scale=True, mininterval=interval, file=sys.stderr) as bar:

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
            tqdm.write(text, file=sys.stderr)


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
