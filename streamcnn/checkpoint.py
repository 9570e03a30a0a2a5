"""What a long computation keeps on disk while it runs, to go on from there after an interruption, to the same last bit.

A computation is a row of steps, always the same ones in the same order, as everything in it is deterministic. The result of a step that
took long is kept; asked for again after an interruption, it is read instead of computed. Within a step the state is kept now and then,
between two blocks of rows or two passes. Each is one file of arrays with a hash and the digest of what it belongs to: complete or
absent, and of no use to anything else. A file that cannot be written costs a warning, and time if the run is interrupted.
"""

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
    """Steps and state of one computation; this one keeps nothing, see `FileCheckpoint`."""

    def step(self, compute: Callable[[], Arrays]) -> Arrays:
        """What `compute` gives, or gave before the interruption. Steps do not contain steps."""
        return compute()

    def left(self) -> Arrays | None:
        """The state that the step now running had kept before the interruption, None when it starts from nothing."""
        return None

    def keep(self, state: Callable[[], Arrays]) -> None:
        """Now, between two blocks or passes, the arrays of `state` say everything about the running step: keep them if it is time to.

        May raise what ends the run, when it has been asked to stop; the state is kept then, too.
        """


class FileCheckpoint(Checkpoint):
    """A checkpoint in a folder of its own.

    Parameters
    ----------
    folder : Path
    digest : str
        Of all that the computation depends on: files of another digest are none.
    counter : object with `n_read` and `skip(n)`, or None
        Counts rows for the progress bar, which after an interruption goes on where it was.
    stop : callable
        Raises when the run shall stop.
    durable : bool
        Flush to disk: needed to survive a power failure, not the death of the process.
    """

    def __init__(self, folder: Path, digest: str, counter: Any = None, stop: Callable[[], None] = lambda: None, durable: bool = True):
        self.folder, self.digest, self.counter, self.stop, self.durable = folder, digest, counter, stop, durable
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

    def _save_state(self, state: Callable[[], Arrays]) -> None:
        self._save("state.h5", state())
        self._since = time.monotonic()

    def remove(self) -> None:
        """Remove all files: the computation is finished, or starts afresh."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, name: str) -> Arrays | None:
        try:
            arrays, header = load_arrays(self.folder / name, FORMAT, 1)
        except FileError:
            return None
        if header.get("digest") != self.digest or header.get("step") != self._number:
            return None
        if self.counter is not None:
            self.counter.skip(header["n_read"] - self.counter.n_read)
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
