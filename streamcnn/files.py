"""A file is complete or absent: temporary name, flush to disk, rename. And a folder lock that dies with its process."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from streamcnn.errors import FileError, StoreError, StreamCNNError
from streamcnn.faults import step

TEMPORARY_SUFFIX = ".tmp"
# how each kind of file begins, in small letters, and what its first MiB has somewhere
_HDF5 = b"\x89hdf"
KINDS = {
    "HDF5 file": (_HDF5, b""),
    "streamcnn model": (_HDF5, b"streamcnn-model"),
    "CSV of predict": (b"index,path,", b""),
    "HTML page": (b"<!doctype html", b""),
}


def fsync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    step(f"fsync {path.name}")
    with path.open("rb+") as file:
        flush_to_disk(file.fileno())


def flush_to_disk(descriptor: int) -> None:
    """Wait until a file's bytes are on the disk; on macOS `fsync` alone leaves them in the drive's memory."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # network drives do not have it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def fsync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk (a rename is not, before that). Windows has no such call."""
    if os.name == "nt":
        return
    step(f"fsync folder {folder.name}")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well it becomes `path`, else it is removed.

    Parameters
    ----------
    path : Path
    durable : bool
        Flush file and folder to disk before returning. False for data that need not outlive the process.

    Yields
    ------
    Path
        Write and close this file inside the block.

    Raises
    ------
    FileError
        When the system refuses to write: disk full, folder read-only or gone.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with writing(path):
        try:
            step(f"write {path.name}")
            yield temporary
            if durable:
                fsync_file(temporary)
            step(f"rename {path.name}")
            temporary.replace(path)
            if durable:
                fsync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # of a folder that is gone, or read-only by now
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make what the system or HDF5 says about a failed write inside the block a `FileError` that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # HDF5 says "Unable to ..." or "Can't ..." with RuntimeError, others have bugs
        if isinstance(error, StreamCNNError) or (isinstance(error, RuntimeError) and not str(error).startswith(("Unable", "Can't"))):
            raise
        number = getattr(error, "errno", None) or next((n for n in _FAILURES if f"errno = {n}," in str(error)), None)
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        raise FileError(f"{path}: cannot be written ({reason}): {_way_out(number)}; what is finished is kept") from error


# numbers that HDF5 hides in its sentence
_FAILURES = [getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT", "EROFS", "EACCES", "EIO") if hasattr(errno, name)]


def _way_out(number: int | None) -> str:
    if number == errno.ENOENT:
        return "its folder is gone; put it back, or choose another"
    if number in (errno.EISDIR, errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY):
        return "something else has its name; move that away"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make its folder writable, or choose another"
    return "make room on the disk, or choose another"


def check_output_file(path: Path, what: str, kind: str, *inputs: str | Path) -> None:
    """Refuse a path that cannot become a file, is one of the `inputs` or holds what is not of its `kind` of `KINDS`, before any
    work is spent on it."""
    for other in inputs:
        if path.exists() and Path(other).exists() and path.samefile(other):
            raise FileError(f"{what} must not be {other}, which is read: give another file name")
    if path.is_dir():
        raise FileError(f"{what} must be a file, but {path} is a folder: give a file name")
    if not path.parent.is_dir():
        raise FileError(f"{what} cannot be written: folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"{what} cannot be written: folder {path.parent} is read-only; choose another")
    check_replaceable(path, what, kind)


def check_replaceable(path: Path, what: str, kind: str) -> None:
    """Refuse to replace a file that is neither empty nor of that `kind` of `KINDS`: it may be a photo, or a data set."""
    if path.is_file() and path.stat().st_size and not is_kind(path, kind):
        raise FileError(f"{what} must not be {path}, which is no {kind} and so is not replaced: give another file name, or remove it")


def is_kind(path: Path, kind: str) -> bool:
    """Whether the file looks like that `kind` of `KINDS`."""
    beginning, mark = KINDS[kind]
    try:
        with path.open("rb") as file:
            start = file.read(1 << 20).lower()
        return start.startswith(beginning) and mark in start
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from None


def is_memory_disk(folder: Path) -> bool:
    """Whether the folder lies on tmpfs, whose files are RAM (Linux; False where the system does not tell)."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    resolved = folder.resolve()
    holding = [(len(m[1]), m[2]) for m in mounts if resolved.is_relative_to(m[1])]
    return bool(holding) and max(holding)[1] in ("tmpfs", "ramfs")


def scratch_parents() -> list[Path]:
    """Where data that need not be kept may go: `STREAMCNN_TMPDIR` where that is set, else the platform's cache folder, the temporary
    folder, the current one."""
    if chosen := os.environ.get("STREAMCNN_TMPDIR"):
        return [Path(chosen)]
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home() raises where there is no home
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        cache = home / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache"))
    return [cache / "streamcnn", Path(tempfile.gettempdir()), Path.cwd()]


def _can_hold_scratch(parent: Path) -> bool:
    """Whether `parent` is, or can become, a folder on disk that this process may write to; nothing is made."""
    there = existing(parent)
    # root may write anywhere, but nothing has room in /proc
    return there.is_dir() and os.access(there, os.W_OK) and not is_memory_disk(there) and shutil.disk_usage(there).total > 0


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def scratch_parent() -> Path:
    """Where `scratch_folder` will make its folder."""
    return next(filter(_can_hold_scratch, scratch_parents()), scratch_parents()[0])


def scratch_folder() -> Path:
    """A new, empty folder on disk for data that need not be kept, in the first of `scratch_parents` that can be written.

    Never on a memory disk, which would spend the very RAM the limit protects.

    Raises
    ------
    FileError
        When none of them can be written.
    """
    for parent in filter(_can_hold_scratch, scratch_parents()):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="streamcnn-", dir=parent))
        except OSError:
            continue
    tried = ", ".join(map(str, scratch_parents()))
    raise FileError(f"no folder on disk for intermediate data (tried {tried}): set STREAMCNN_TMPDIR to one that can be written")


class FolderLock:
    """Exclusive use of a folder by one process, through an OS file lock that the system drops when the process ends."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreError
            When another process holds it.
        """
        with writing(self.path):
            file = self.path.open("a+b")
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise StoreError(f"{self.path.parent} is in use by another process: wait for it, or choose another store") from error
        self._file = file

    def release(self) -> None:
        """Give the lock back; without it nothing happens."""
        if self._file is not None:
            self._file.close()
            self._file = None
