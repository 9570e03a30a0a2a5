"""The source over image files: a class-per-folder tree, a flat folder, or one file."""

import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from streamcnn.errors import DataError, FileError, ParameterError, warn
from streamcnn.imagefiles import NO_CAPS, REPAIR, SIDE, Caps, Decoder, Header, Listing, read_decode_bytes, read_header, read_size
from streamcnn.labels import encode_labels
from streamcnn.sources import ImageSource, check_finite, check_image_shape

_PROBED = 64
# bytes a pixel of the costliest mode; where that is little for every file, their headers need not be read for it
_COSTLIEST_MODE, SMALL_DECODING = 32, 16 << 20
# files whose sizes are all asked before anything runs: 0.4 s for 2,000 small JPEG files, 0.2 s for PNG
_CHECKED = 2_000
# shorter sides above it are worth a word: the time goes with the pixels
_LARGE = 2 * SIDE
# bad files that even a small folder may have
_FEW_BAD = 3
_STORED = {8: np.uint8, 16: np.uint16, 32: np.float32}


class FolderSource(ImageSource):
    """Images in files, decoded one at a time.

    Size (the commonest), colour and bits come from up to 64 files spread evenly over the listing. With `image_shape`
    every file is resized. Then, and for large images, every header is read once: it takes the costliest file to say what
    decoding will hold.

    With `"auto"` files are resized where fewer than three in four of those 64 have the commonest size, or some are upright and others lie:
    that is how photos are, while one image of another size among equal ones is likely to be there by mistake. They become squares of 96
    pixels, or of the median of their shorter sides where that is less.

    Parameters
    ----------
    root : Path
    listing : Listing
    image_shape : (height, width), (height, width, 1 or 3), "auto" or None
        With channels, colour files may become grey.
    labels : array-like (files of the listing,), or None
        Instead of the folders' names.
    on_error : "raise" or "skip"
        "skip" decodes every file once now and leaves out those that fail: at most 1 % of them, or up to 3 that are fewer than half.
    known_bad : iterable of (relative path, reason), or None
        `bad_files` of an earlier run: exactly these are left out, and nothing is decoded now.
    caps : Caps
        What a file may take.
    """

    kind = "folder"

    def __init__(
        self,
        root: Path,
        listing: Listing,
        image_shape: tuple[int, ...] | str | None = None,
        labels=None,
        on_error: str = "raise",
        known_bad: Iterable[tuple[str, str]] | None = None,
        caps: Caps = NO_CAPS,
    ):
        self.path = self._root = root
        self._digest = listing.digest
        known = None if known_bad is None else dict(known_bad)
        bad = known or {}
        asked = check_image_shape(image_shape)
        if asked and asked[2:] not in ((), (1,), (3,)):
            raise ParameterError(f"image_shape for image files must have 1 or 3 channels, got {asked}")
        tolerated = set(listing.names) if on_error == "skip" else set(bad)
        caps = replace(caps, resized=image_shape is not None)
        headers = self._probe(listing.names, tolerated, caps)
        sizes = Counter((header.height, header.width) for header in headers.values())
        height, width = sizes.most_common(1)[0][0]
        if asked is None and image_shape is not None:  # "auto"; compared with that, an array of two sides would be two answers
            asked = common_shape(sizes)
            if asked is not None:
                warn(
                    f"{root}: the images are of several sizes, so all are stretched to {asked[0]} x {asked[1]} pixels; "
                    "image_shape=(height, width) (--image-size HxW) sets another size"
                )
            elif min(height, width) > _LARGE:
                warn(
                    f"{root}: the images are used in their size, {height} x {width} pixels; image_shape=({SIDE}, {SIDE}) "
                    f"(--image-size {SIDE}x{SIDE}) takes a fraction of the time, and may recognise no less"
                )
        caps = replace(caps, resized=asked is not None)
        if asked:
            height, width = asked[:2]
        channels = asked[2] if asked and len(asked) == 3 else (3 if any(header.colour for header in headers.values()) else 1)
        bits = max(header.bits for header in headers.values())
        self._decoder = Decoder(height, width, channels, bits, asked is not None, asked is not None and len(asked) == 3, caps)
        # in larger folders only where the probe shows that they differ; those left out as bad may be of any size
        self._sizes_unknown = (len(listing.names) <= _CHECKED or len(sizes) > 1) and not (asked or tolerated)
        self._decoding = _COSTLIEST_MODE * height * width
        if asked or self._decoding > SMALL_DECODING:
            self._decoding = self._costliest_file(listing.names, tolerated, caps)

        encoded = self._encode(listing, labels)
        super().__init__(len(listing.names), (height, width, channels), _STORED[bits], encoded)
        if labels is None:
            self._labels_digest = None  # the digest of the listing has the class folders' names
        self._names = listing.names
        if known is None and on_error == "skip":
            bad = self._find_bad()
        self._leave_out(bad)

    @property
    def resizes(self) -> bool:
        """Whether files are brought to `image_shape`, rather than refused when they are of another."""
        return self._decoder.resize

    def _probe(self, names: list[str], tolerated: set[str], caps: Caps) -> dict[int, Header]:
        """Headers by row, of up to 64 files spread evenly.

        Files known as bad are asked too, and may fail, so that a run that is told of them decides as the run that found them.
        """
        headers: dict[int, Header] = {}
        failure: Exception | None = None
        spread = _spread(len(names))
        for row in spread:
            try:
                headers[row] = read_header(self._root / names[row], caps)
            except (FileError, DataError) as error:
                failure = error
                if names[row] not in tolerated:
                    raise
        if not headers:
            raise DataError(f"{self._root}: none of {len(spread)} files asked of {len(names)} can be read, the last reason: {failure}")
        return headers

    def _costliest_file(self, names: list[str], tolerated: set[str], caps: Caps) -> int:
        """Bytes that decoding the costliest file holds."""
        costliest = 0
        for name in names:
            try:
                costliest = max(costliest, read_decode_bytes(self._root / name, caps))
            except (FileError, DataError):
                if name not in tolerated:
                    raise
        return costliest

    def _encode(self, listing: Listing, labels):
        if labels is not None:
            return encode_labels(labels, len(listing.names))
        if listing.classes is None or listing.codes is None:
            return None
        return listing.codes, np.array(listing.classes)

    def _find_bad(self) -> dict[str, str]:
        image = np.empty(self.image_shape, self.dtype)
        bad = {}
        for row, name in enumerate(self._names):
            try:
                self._decode(row, image)
            except (FileError, DataError) as error:
                bad[name] = str(error).removeprefix(f"{self._root / name}: ").removesuffix(REPAIR)
        self.n_images_read += len(self._names)
        n = len(self._names)
        if len(bad) > max(n // 100, min(_FEW_BAD, (n - 1) // 2)):
            name, reason = next(iter(bad.items()))
            raise DataError(
                f'on_error="skip" (--skip-bad) leaves out at most 1 % of the files, or up to {_FEW_BAD} that are fewer than half, but '
                f"{len(bad)} of {n} in {self._root} cannot be used, the first: {name}: {reason}"
            )
        return bad

    def _leave_out(self, bad: dict[str, str]) -> None:
        kept = [row for row, name in enumerate(self._names) if name not in bad]
        if not kept:
            raise DataError(f"{self._root}: all {len(self._names)} files are in known_bad; leave known_bad out")
        if len(kept) < len(self._names):
            self.bad_files = [(name, bad[name]) for name in self._names if name in bad]
            self._names = [self._names[row] for row in kept]
            self.n_samples = len(kept)
            if self.labels is not None and self.classes_ is not None:
                # a class may have lost its only file
                left, codes = np.unique(self.labels[kept], return_inverse=True)
                self.labels, self.classes_ = codes.reshape(-1).astype(np.int32), self.classes_[left]
        self._names_bytes = sys.getsizeof(self._names) + sum(map(sys.getsizeof, self._names))

    def _decode(self, row: int, out: np.ndarray) -> None:
        path = self._root / self._names[row]
        self._decoder.into(path, out)
        if self._decoder.bits == 32:
            try:
                check_finite(out, out, row * self.row_values, self.row_values)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None

    def _fill(self, start, stop, out):
        n_threads = min(self.n_jobs, stop - start)
        if n_threads <= 1:
            for row in range(start, stop):
                self._decode(row, out[row - start])
            return
        # Pillow decodes without the interpreter's lock; the first file that fails, in order of rows, is the one that is named
        with ThreadPoolExecutor(n_threads) as pool:
            for _ in pool.map(lambda row: self._decode(row, out[row - start]), range(start, stop)):
                pass

    def name_of(self, row):
        return self._names[row]

    def _scratch(self, chunk_size):
        # on the way to the final size Pillow may hold a picture of up to four times its sides
        height, width, _ = self.image_shape
        resizing = 64 * height * width if self._decoder.resize else 0
        return {"names": self._names_bytes, "decoded file": (self._decoding + resizing) * max(1, min(self.n_jobs, chunk_size))}

    def check(self) -> None:
        if not self._sizes_unknown:
            return
        decoder = self._decoder
        for path in (self._root / name for name in self._names):
            size, expected = read_size(path, decoder.caps), (decoder.width, decoder.height)
            if size != expected and size[::-1] == expected:  # perhaps a PNG that is turned, which decoding tells
                header = read_header(path, decoder.caps)
                size = header.width, header.height
            if size != expected:
                raise decoder.wrong_size(path, size)
        self._sizes_unknown = False

    def _identity(self):
        # not the number of samples: which files are bad does not change what the folder is
        facts = {**super()._identity(), "listing": self._digest, "image_shape": self.image_shape}
        return {name: value for name, value in facts.items() if name != "n_samples"}


def common_shape(sizes: Counter[tuple[int, int]]) -> tuple[int, int] | None:
    """The (height, width) that files of these sizes are resized to by `image_shape="auto"`; None where they keep theirs."""
    turned = any(height != width and (width, height) in sizes for height, width in sizes)
    if 4 * sizes.most_common(1)[0][1] >= 3 * sizes.total() and not turned:
        return None
    side = min(SIDE, int(np.median([min(size) for size in sizes.elements()])))
    return side, side


def _spread(n_files: int) -> list[int]:
    """Up to 64 rows spread evenly over `n_files`, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, n_files - 1, min(n_files, _PROBED)).tolist()})
