"""What a long computation keeps on disk while it runs, to go on from there after an interruption, to the same last bit.

A computation is a row of steps, always the same ones in the same order, as everything in it is deterministic. The result of a step that
took long is kept; asked for again after an interruption, it is read instead of computed. Within a step the state is kept now and then,
between two blocks of rows or two passes. Each is one file of arrays with a hash and the digest of what it belongs to: complete or
absent, and of no use to anything else. A file that cannot be written costs a warning, and time if the run is interrupted.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.errors import FileError
from streamcnn.files import writing

logger = logging.getLogger("streamcnn")

Arrays = dict[str, np.ndarray]
FORMAT = "streamcnn-checkpoint"
STATE_SECONDS = 45.0
"""Least time between two states kept, the time of writing one (0.5 GB at most) left out."""
STEP_SECONDS = 1.0
"""A step that took less is computed again."""


class Checkpoint:
    """Steps and state of one computation; this one keeps nothing, see `FileCheckpoint`.

    Parameters
    ----------
    stop : callable
        Raises when the run shall stop; asked between steps, and where the state can be kept.

    Attributes
    ----------
    used : bool
        Whether something kept before the interruption was taken up.
    """

    used = False

    def __init__(self, stop: Callable[[], None] = lambda: None):
        self.stop = stop

    def step(self, compute: Callable[[], Arrays]) -> Arrays:
        """What `compute` gives, or gave before the interruption. Steps do not contain steps."""
        result = compute()
        self.stop()
        return result

    def left(self) -> Arrays | None:
        """The state that the step now running had kept before the interruption, None when it starts from nothing."""
        return None

    def keep(self, state: Callable[[], Arrays]) -> None:
        """Now, between two blocks or passes, the arrays of `state` say everything about the running step: keep them if it is time to,
        and always before the run stops."""
        self.stop()

    def remove(self) -> None:
        """Remove what is kept: the computation is finished, or starts afresh."""

    def afresh(self) -> "Checkpoint":
        """The same, before its first step."""
        return Checkpoint(self.stop)


class FileCheckpoint(Checkpoint):
    """A checkpoint in a folder of its own.

    Parameters
    ----------
    folder : Path
    digest : str
        Of all that the computation depends on: files of another digest are none, and are removed.
    counter : object with `n_read` and `skip(n)`, or None
        Counts rows for the progress bar, which after an interruption goes on where it was.
    stop : callable
        As in `Checkpoint`.
    durable : bool
        Flush to disk: needed to survive a power failure, not the death of the process.
    """

    def __init__(self, folder: Path, digest: str, counter: Any = None, stop: Callable[[], None] = lambda: None, durable: bool = True):
        super().__init__(stop)
        self.folder, self.digest, self.counter, self.durable = folder, digest, counter, durable
        self._number, self._since = 0, time.monotonic()

    def step(self, compute: Callable[[], Arrays]) -> Arrays:
        name = f"step-{self._number:05d}.h5"
        result = self._load(name)
        if result is None:
            begun = time.monotonic()
            result = compute()
            if time.monotonic() - begun >= STEP_SECONDS:
                self._save(name, result)
        self._number += 1
        self.stop()
        return result

    def left(self) -> Arrays | None:
        return self._load("state.h5")

    def keep(self, state: Callable[[], Arrays]) -> None:
        try:
            self.stop()
        except BaseException:
            self._save_state(state)
            raise
        if time.monotonic() - self._since >= STATE_SECONDS:
            self._save_state(state)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def afresh(self) -> "FileCheckpoint":
        return FileCheckpoint(self.folder, self.digest, self.counter, self.stop, self.durable)

    def _save_state(self, state: Callable[[], Arrays]) -> None:
        self._save("state.h5", state())
        self._since = time.monotonic()

    def _load(self, name: str) -> Arrays | None:
        try:
            arrays, header = load_arrays(self.folder / name, FORMAT, 1)
        except FileError:
            return None
        n_read = header.get("n_read")
        if header.get("digest") != self.digest or type(n_read) is not int:
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
            return None
        if header.get("step") != self._number:
            return None
        self.used = True
        if self.counter is not None:
            self.counter.skip(n_read - self.counter.n_read)
        return arrays

    def _save(self, name: str, arrays: Arrays) -> None:
        header = {"format": FORMAT, "format_version": 1, "digest": self.digest, "step": self._number}
        header["n_read"] = 0 if self.counter is None else self.counter.n_read
        try:
            with writing(self.folder):
                for folder in (self.folder.parent, self.folder):  # not those above: a store that is gone shall not be made again
                    folder.mkdir(exist_ok=True)
            save_arrays(self.folder / name, arrays, header, self.durable)
        except FileError as error:
            logger.warning("a checkpoint was not kept, the run goes on without: %s", error)


def with_checkpoint(checkpoint: Checkpoint, work: Callable[[Checkpoint], Any]) -> Any:
    """`work(checkpoint)`; where something that was kept leads to an error, once more from nothing.

    Hashes tell damage, but not what somebody has made up.
    """
    try:
        return work(checkpoint)
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError):
        if not checkpoint.used:
            raise
        logger.warning("a checkpoint holds what no run has kept: it is removed, and the stage starts from the beginning")
        checkpoint.remove()
    return work(checkpoint.afresh())
