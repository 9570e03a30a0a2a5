"""Some rows of another image source, as a source of their own."""

import hashlib
from typing import Any

import numpy as np

from streamcnn.errors import ParameterError
from streamcnn.sources import ImageSource


class SubsetSource(ImageSource):
    """The images of `rows` alone; nothing is copied, each is read where it is.

    Parameters
    ----------
    source : ImageSource
    rows : array-like of shape (n,), int
        Row numbers, each larger than the one before, so that a stream is read forward only; neighbours are read together.

    Attributes
    ----------
    classes_ : ndarray
        Those of the source that these rows have.

    Raises
    ------
    ParameterError
        When `rows` are not ascending row numbers of the source.

    Examples
    --------
    >>> from streamcnn import open_images
    >>> source = open_images(np.zeros((5, 8, 8), np.uint8), labels=list("abbab"))
    >>> SubsetSource(source, [0, 3]).classes_.tolist()
    ['a']
    """

    kind = "subset"

    def __init__(self, source: ImageSource, rows):
        rows, n = np.asarray(rows), source.n_samples
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not rows.size or rows[0] < 0 or rows[-1] >= n or (np.diff(rows) <= 0).any():
            raise ParameterError(
                f"rows must be ascending row numbers from 0 to {n - 1}, none twice, got {rows!r:.60}: sort them, with a mask give "
                "numpy.flatnonzero(mask)"
            )
        labels = None
        if source.labels is not None and source.classes_ is not None:
            left, codes = np.unique(source.labels[rows], return_inverse=True)
            labels = codes.reshape(-1).astype(np.int32), source.classes_[left]
        super().__init__(len(rows), source.image_shape, source.stored_dtype, labels)
        self.path, self.opened_with = source.path, source.opened_with | {"rows": True}
        self._source, self._rows = source, np.asarray(rows, np.int64)
        self._of: str | None = None

    def _fill(self, start, stop, out):
        self._source.n_jobs = self.n_jobs
        self._source.read_rows(self._rows[start:stop], out)

    def name_of(self, row):
        return self._source.name_of(int(self._rows[row]))

    def close(self):
        self._source.close()

    def _scratch(self, chunk_size: int) -> dict[str, int]:
        # `scratch_bytes` of the source would count its labels, which are there already
        return self._source._scratch(chunk_size) | {"row numbers": self._rows.nbytes}

    def _identity(self) -> dict[str, Any]:
        if self._of is None:  # of an array in memory it takes a pass over all pixels
            self._of = self._source.fingerprint()
        return super()._identity() | {"of": self._of, "rows": hashlib.sha256(self._rows.tobytes()).hexdigest()}
