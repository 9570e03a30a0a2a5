"""New HDF5 files, written so that a full disk is an error and nothing worse."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import h5py

# a version-3 superblock carries checksums of its own, and older h5py still reads it
_VERSION = h5py.h5f.LIBVER_V110


class _Output(io.RawIOBase):
    """The file below HDF5, which is never told that a write has failed.

    When the system refuses a write to HDF5 itself, the library can neither write what it holds nor let go of it, and takes the process
    down when that ends (seen with HDF5 1.14 and 2: signal 11). So the first failure is kept for `check`, and what comes after it goes
    nowhere. The same holds for a Ctrl-C that arrives in these methods.
    """

    def __init__(self, path: Path):
        self._file = path.open("w+b", buffering=0)
        self._place = self._size = 0
        self.error: BaseException | None = None

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        if self.error is not None:
            raise self.error

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        try:
            if self.error is None:
                self._file.seek(self._place)
                done = 0
                while done < len(view):
                    done += self._file.write(view[done:]) or 0
        except BaseException as error:
            self.error = error
        self._place += len(view)
        self._size = max(self._size, self._place)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        try:
            if self.error is None:
                self._file.truncate(self._size)
        except BaseException as error:
            self.error = error
        return self._size

    def readinto(self, buffer) -> int:
        try:
            self._file.seek(self._place)
            n = self._file.readinto(buffer) or 0
        except BaseException as error:
            self.error = self.error or error
            n = 0
        self._place += n
        return n

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def flush(self) -> None:
        pass

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


class NewFile(h5py.File):
    """A new HDF5 file for writing; close it by leaving a `with` block of `creating`."""

    def __init__(self, output: _Output, chunk_cache: int | None = None):
        access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
        access.set_fileobj_driver(h5py.h5fd.fileobj_driver, output)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        access.set_libver_bounds(_VERSION, _VERSION)
        if chunk_cache is not None:
            access.set_cache(0, 521, chunk_cache, 0.75)  # HDF5's own number of slots and preemption
        # h5py.File can leave the root group's time of creation away from 3.15 on only: before, equal contents were different files
        creation.set_obj_track_times(False)
        super().__init__(h5py.h5f.create(b"new", h5py.h5f.ACC_TRUNC, creation, access))
        self.check = output.check


@contextlib.contextmanager
def creating(path: Path, chunk_cache: int | None = None) -> Iterator[NewFile]:
    """A new HDF5 file at `path`, closed at the end of the block.

    Parameters
    ----------
    path : Path
    chunk_cache : int or None
        Bytes of HDF5's chunk cache for each data set; None for its default.

    Yields
    ------
    NewFile
        Its method `check` raises what the system has said about a write so far; the end of the block does, too.

    Raises
    ------
    OSError
        Disk full, file too large, folder gone.
    """
    output = _Output(path)
    try:
        with NewFile(output, chunk_cache) as file:
            yield file
        output.check()
    finally:
        output.close()
