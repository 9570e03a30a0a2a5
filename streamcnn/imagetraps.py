"""Image files made to keep a decoder busy, or to fill its memory, within a size in pixels that is allowed."""

import math
from pathlib import Path

from PIL import Image

_TILE_WIDTH, _TILE_HEIGHT = 0x0142, 0x0143
# A file of some hundred KB is enough for any of these:
# - progressive JPEG decodes all pixels once a scan, of which each takes 127 bytes (88 megapixels: 0.06 s a scan). Cameras and programs
#   write 6 to 20 scans
_MAX_SCANNED = 5_000_000_000
# - TIFF holds a whole tile, however large (64 x 64 pixels with a tile of 40,000 x 40,000: 1.5 GiB)
_SMALL_TILE = 1 << 22
# - run-length BMP is unpacked by Python, a byte at a time where a row is filled up, and before Pillow 13 by rows past its end
_MAX_RUN_LENGTH, _MAX_RUN_WIDTH = 1 << 24, 1 << 16


def trap_in(path: Path, image: Image.Image) -> str | None:
    """What makes decoding an opened file take far more than its pixels do, or None."""
    width, height = image.size
    if image.info.get("progressive"):
        scans = _count(path, b"\xff\xda")
        if scans * width * height > _MAX_SCANNED:
            return f"has {scans} scans of {width} x {height} pixels"
    tile = [int(image.getexif().get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_HEIGHT)] if image.format == "TIFF" else [0, 0]
    if math.prod(tile) > max(_SMALL_TILE, 4 * width * height):
        return f"has tiles of {tile[0]} x {tile[1]} pixels for {width} x {height}"
    coders = [tile[0] for tile in getattr(image, "tile", ())]
    if "bmp_rle" in coders and (width > _MAX_RUN_WIDTH or width * height > _MAX_RUN_LENGTH):
        return f"has {width} x {height} pixels packed by runs, more than {_MAX_RUN_LENGTH} or wider than {_MAX_RUN_WIDTH}"
    return None


def _count(path: Path, mark: bytes) -> int:
    """How often the two bytes `mark` occur in a file."""
    found, before = 0, b""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found += (before + piece).count(mark)
            before = piece[-1:]
    return found
