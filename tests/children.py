"""Runs of the command line in child processes that may die at any moment; quick to start where the system can fork."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np

FORKING = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKING else "spawn")
if FORKING:
    # these take a second to import; children begin with them loaded
    CONTEXT.set_forkserver_preload(["streamcnn.commands", "streamcnn.kernels.cpu", "scipy.linalg", "sklearn.svm", "children"])


def make_images(path: Path, n_images: int, seed: int = 0) -> Path:
    """Noisy images of 4 classes, 8 x 8, as HDF5."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n_images)
    patterns = rng.integers(60, 200, (4, 8, 8, 1))
    images = np.clip(patterns[labels] + rng.normal(0, 60, (n_images, 8, 8, 1)), 0, 255).astype(np.uint8)
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, labels
    return path


class _Vanish:
    """Instead of a fault: a folder is moved away at a step."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number, self.count = folder, number, 0

    def reach(self, name: str) -> None:
        self.count += 1
        if self.count == self.number and self.folder.exists():
            self.folder.rename(self.folder.with_name("moved away"))


def _obey_permissions() -> None:
    """Let root, who may write anywhere, be held to the permissions of files (Linux: without the capability DAC_OVERRIDE)."""
    if sys.platform != "linux" or os.getuid() != 0:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for word in range(2):  # effective and permitted, of the first 32
        sets[word] &= ~0b10
    assert libc.capset(header, sets) == 0


def _main(arguments: list[str], small: bool, fault: str | None, log: str | None, output: str, file_limit: int | None, nobody: bool) -> None:
    from streamcnn import checkpoint, cli, faults, shards

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    if small:
        # shards of 1,024 rows, and everything kept at once
        shards._SHARD_BYTES = 0
        checkpoint.STATE_SECONDS = checkpoint.STEP_SECONDS = 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if nobody:
        _obey_permissions()
    if fault is not None and fault.startswith("vanish@"):
        faults._fault = _Vanish(Path(arguments[arguments.index("--store") + 1]), int(fault.removeprefix("vanish@")))
    else:
        faults.inject(fault, log)
    code = cli.main(arguments)
    sys.stdout.flush()
    sys.exit(code)


class Child:
    """A run of `streamcnn` with these arguments.

    Parameters
    ----------
    arguments : list of str
    folder : Path
        For its output.
    small : bool
        Shards of 1,024 rows; each step and pass is kept in a checkpoint.
    fault, log : str or None
        As `STREAMCNN_FAULT` and `STREAMCNN_FAULT_LOG`; or `vanish@N`: the folder of `--store` is moved away at step N.
    file_limit : int or None
        Bytes of a file beyond which writing fails.
    nobody : bool
        Held to permissions, even as root.
    """

    def __init__(self, arguments, folder: Path, small: bool = True, fault=None, log=None, file_limit=None, nobody=False):
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        options = (list(map(str, arguments)), small, fault, None if log is None else str(log), str(self.output), file_limit, nobody)
        self.process = CONTEXT.Process(target=_main, args=options)
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """The exit code, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {timeout} s: {self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        """All that it has said."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def result(self) -> dict:
        """The object that `--json` printed."""
        return json.loads(next(line for line in self.text.splitlines() if line.startswith("{")))
