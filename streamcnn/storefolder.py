"""The folder of a store: made where nothing is, without links inside, written to by one process at a time."""

import os
import shutil
from pathlib import Path

from streamcnn.errors import StoreError
from streamcnn.files import TEMPORARY_SUFFIX, FolderLock, fsync_folder, writing
from streamcnn.forking import tell_child
from streamcnn.manifest import KINDS
from streamcnn.untrusted import check_regular, first_line


class StoreFolder:
    """A folder that a process may take for itself.

    Parameters
    ----------
    path : str or Path
    durable : bool

    Raises
    ------
    StoreError
        When it is missing, or has symbolic links inside.
    """

    def __init__(self, path: str | Path, durable: bool):
        self.path, self.durable = Path(path), durable
        self._lock = FolderLock(self.path)
        self._locked = self._in_parent = False
        if not self.path.is_dir():
            raise StoreError(f"{self.path}: no such folder")
        self._check_folder()

    def _check_folder(self) -> None:
        """Refuse links inside, through which files elsewhere would be read, written or deleted."""
        try:
            for folder in (self.path, *(self.path / name for name in (*KINDS, "stages", "checkpoints")), *self.path.glob("checkpoints/*")):
                for entry in os.scandir(folder) if folder.is_dir() else ():
                    # a junction is Windows' link to a folder
                    if entry.is_symlink() or getattr(entry, "is_junction", bool)():
                        raise StoreError(f"{entry.path} is a symbolic link, which no store has inside: put the file or folder itself there")
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.path} cannot be read ({first_line(error)})") from error

    def lock(self) -> None:
        """Take the folder for this process, not for its forked children."""
        self._check_folder()
        if (lock := self._lock.path).exists():
            check_regular(lock, StoreError, links=False)
        self._lock.acquire()
        self._locked, self._in_parent = True, False
        tell_child(self)

    def _remove_leftovers(self) -> None:
        """Remove what a killed process has left half-written."""
        for leftover in self.path.rglob(f"*{TEMPORARY_SUFFIX}"):
            if not leftover.is_dir():
                with writing(leftover):
                    leftover.unlink(missing_ok=True)

    def after_fork(self) -> None:
        """See `forking.tell_child`: the lock stays the parent's, and is free as soon as that lets go of it."""
        self._in_parent = self._in_parent or self._locked
        self._lock.release()

    def _check_process(self) -> None:
        if self._in_parent:
            raise StoreError(
                f"{self.path} is locked by the process that this one was forked from: open the store here, by FeatureStore(path), and lock "
                "it once that has closed it"
            )

    def close(self) -> None:
        """Release the lock, if held."""
        self._locked = False
        self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _make_folder(self, name: str) -> None:
        if (folder := self.path / name).is_dir():
            return
        with writing(folder):
            folder.mkdir()
            if self.durable:
                fsync_folder(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the store."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def delete(self) -> None:
        """Remove the store's folder and all in it."""
        self._check_process()
        self.close()
        delete_store(self.path)


def check_empty(path: Path) -> None:
    """Refuse a path that is there already, but for a folder that holds nothing, or what systems and dead processes leave behind."""
    junk = ("Thumbs.db", "desktop.ini")

    def counts(file: Path) -> bool:
        return file.suffix != TEMPORARY_SUFFIX and not file.name.startswith(".") and file.name not in junk

    if path.exists() and (not path.is_dir() or any(map(counts, path.iterdir()))):
        raise StoreError(f"{path} is not an empty folder: choose another, or an existing store to reuse")


def delete_store(path: Path) -> None:
    """Remove a store; one that is left half-removed can still be opened."""
    if path.is_dir():
        for part in path.iterdir():
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
