"""One progress bar per stage, on standard error; and the place where a run notices that it shall stop."""

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
    """Let the first Ctrl-C inside the block end the run at the next block of images or rows, and a second one at once.

    Python raises `KeyboardInterrupt` wherever it happens to be, and in a callback that may neither fail nor raise it is lost.
    """

    def handle(number, frame):
        if _stop.is_set():
            raise KeyboardInterrupt
        _stop.set()
        sys.stderr.write("\nstopping after the current block; press Ctrl-C again to stop at once\n")

    _stop.clear()
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
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

    @contextmanager
    def bar(self, name: str, total: int | None, unit: str = "images", in_shards: bool = False) -> Iterator[Callable[[int], None]]:
        """A bar for the block; call what it gives with the number of things just done.

        With `in_shards` whoever works in the block finishes a shard before it asks the monitor whether to stop.
        """

        def check() -> None:
            _check_stop()
            if self.monitor is not None and not in_shards:
                self.monitor.check()

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


def _check_stop() -> None:
    if _stop.is_set():
        raise KeyboardInterrupt


class CountedRows:
    """Rows that report how many of them were read."""

    def __init__(self, rows: Rows, update: Callable[[int], None]):
        self._rows, self._update = rows, update
        self.n_rows, self.n_features = rows.n_rows, rows.n_features

    def read(self, start: int, stop: int, out) -> None:
        self._rows.read(start, stop, out)
        self._update(stop - start)
