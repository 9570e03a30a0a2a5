"""Image files by Pillow: which files of a folder are images, what their headers say, and their pixels.

Pillow's documented threat model is followed: formats by allow-list, sizes checked before decoding, truncated files refused,
no global setting of Pillow touched.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from streamcnn.errors import DataError, FileError, MemoryBudgetError
from streamcnn.imagetraps import trap_in

EXTENSIONS = (".pgm", ".ppm", ".pnm", ".pbm", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PPM", "PNG", "JPEG", "BMP", "TIFF", "WEBP")
MAX_PIXELS = 89_000_000
"""Largest image that is decoded; Pillow itself starts to warn of a decompression bomb at 89.5 million."""
REPAIR = '; repair it, move it away, or leave such files out by on_error="skip" (--skip-bad)'
_ORIENTATION = 0x0112
_COLOUR_MODES = {"RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
SIDE = 96
"""Of the square that images of several sizes are brought to, or advised to be, unless they are smaller."""


@dataclass(frozen=True)
class Listing:
    """The images below a folder, sorted by class name and then by path (by code point, so the same everywhere).

    names: paths relative to the folder with forward slashes; classes: sorted class names, or None for a flat folder;
    codes: int32 (n,) class of each; digest: SHA-256 over every path, size and time of change.
    """

    names: list[str]
    classes: list[str] | None
    codes: np.ndarray | None
    digest: str

    @classmethod
    def of(cls, root: Path, names: list[str], classes: list[str] | None = None, codes: np.ndarray | None = None) -> "Listing":
        """The listing of given files below `root`."""
        return cls(names, classes, codes, _digest(root, names))


def list_images(root: Path) -> Listing:
    """The image files of a class-per-folder tree, or of a flat folder.

    A folder directly below `root` that holds an image at any depth is a class. Hidden files and folders and other
    extensions are passed over. Without any class, images directly in `root` are a flat folder without labels.

    Raises
    ------
    FileError
        When there is no image, or the folder cannot be read.
    DataError
        When there are classes and loose images beside them.
    """
    try:
        folders, loose = _scan(root)
        found = {name: sorted(_walk(root / name, f"{name}/", (os.path.realpath(root),))) for name in sorted(folders)}
    except OSError as error:
        raise FileError(f"{root}: cannot be listed ({error})") from error
    classes = [name for name, files in found.items() if files]
    if not classes and not loose:
        raise FileError(f"{root}: no images in this folder or below; looked for {' '.join(EXTENSIONS)}")
    if classes and loose:
        raise DataError(
            f"{root}: {min(loose)} lies beside the class folder {classes[0]}; move loose images into a class folder or elsewhere"
        )
    if not classes:
        names = sorted(loose)
        return Listing.of(root, names)
    names = [name for folder in classes for name in found[folder]]
    codes = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found[folder]) for folder in classes])
    return Listing.of(root, names, classes, codes)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones (macOS writes `._a.jpg`) are not."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """(folders, images) directly in `folder`, hidden ones left out."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image_name(entry.name) and entry.is_file():
                images.append(entry.name)
    return folders, images


def _walk(folder: Path, prefix: str, above: tuple[str, ...]) -> list[str]:
    """Images in `folder` and below as `prefix` + path; a link back to a folder `above` is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return []
    folders, images = _scan(folder)
    names = [prefix + name for name in images]
    for name in folders:
        names += _walk(folder / name, f"{prefix}{name}/", (*above, here))
    return names


def _digest(root: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        try:
            status = (root / name).stat()
        except OSError as error:
            raise FileError(f"{root / name}: cannot be read ({error})") from error
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def listing_of_file(path: Path) -> Listing:
    """A single image file as a listing of one row without label."""
    return Listing.of(path.parent, [path.name])


@dataclass(frozen=True)
class Header:
    """What a file says before it is decoded: size as shown (EXIF orientation applied), bits (8, 16; 32: float or 32-bit
    integer) and whether it has colour."""

    height: int
    width: int
    bits: int
    colour: bool


@dataclass(frozen=True)
class Caps:
    """What a file may take at the most: pixels, and bytes while it is decoded (None: any), to be `resized` or not.

    The bytes come from the memory limit, which must not decide what an image is: a file above them is a `MemoryBudgetError`, which
    `on_error="skip"` does not skip.
    """

    pixels: int = MAX_PIXELS
    decode_bytes: int | None = None
    resized: bool = False

    def check(self, path: Path, image: Image.Image) -> None:
        """Refuse an opened image before anything of it is decoded."""
        width, height = image.size
        if width * height > self.pixels:
            raise FileError(f"{path}: has {width * height} pixels, more than the {self.pixels} allowed; scale it down")
        if (trap := trap_in(path, image)) is not None:
            raise FileError(f"{path}: {trap}; save it again in an image program")
        needed = decode_bytes(image, self.resized)
        if self.decode_bytes is not None and needed > self.decode_bytes:
            raise MemoryBudgetError(
                f"{path}: decoding its {width} x {height} pixels takes {needed >> 20} MiB, more than the {self.decode_bytes >> 20} MiB "
                "that memory_limit leaves for it: raise memory_limit, or scale the file down"
            )


NO_CAPS = Caps()

# bytes a pixel that Pillow keeps of each mode, and of the copy that another mode is converted to
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_CONVERTED_BYTES = {"L": 0, "RGB": 0, "1": 1, "I": 12, "F": 8}


def decode_bytes(image: Image.Image, resized: bool) -> int:
    """Bytes that turning this opened file into pixels holds at the most, the array it ends in left out.

    A decoder may keep the whole picture beside the result (progressive JPEG its coefficients, WebP frames); afterwards there may be a
    turned copy, a conversion (transparency: laid on white), and twice the packed pixels on their way to NumPy. Measured for 17 kinds
    of files with Pillow 13, see `tests/test_decoding.py`.
    """
    mode, has_alpha = image.mode, image.mode in _ALPHA_MODES or "transparency" in image.info
    stored = _STORED_BYTES.get(mode, 4)
    decoder = {"JPEG": 6 * bool(image.info.get("progressive")), "WEBP": 20 if has_alpha else 14, "TIFF": 2}.get(image.format or "", 0)
    # PNG may say so after its pixels, and asking would decode it
    turned = stored if image.format == "PNG" or image.getexif().get(_ORIENTATION, 1) != 1 else 0
    converted = 12 if has_alpha or stored == 2 else _CONVERTED_BYTES.get(mode, 4)
    packed = 0 if resized or has_alpha else 2 if mode in ("1", "L") else 8 if mode in ("I", "F") or stored == 2 else 6
    return math.prod(image.size) * (stored + max(decoder, turned + converted + packed, 1))


def read_header(path: Path, caps: Caps = NO_CAPS) -> Header:
    """Header of an image file.

    Raises
    ------
    FileError
        When it is no image of the formats allowed, or has too many pixels; path and reason in one line.
    DataError
        When its kind of pixels is not supported.
    MemoryBudgetError
        When decoding it would take more than `caps` allows.
    """
    with _Opened(path, caps) as image:
        bits, colour = _depth_and_colour(path, image)
        width, height = _turned(image)
        return Header(height, width, bits, colour)


def read_size(path: Path, caps: Caps = NO_CAPS) -> tuple[int, int]:
    """(width, height) as in `read_header`, without decoding: PNG files of the same number of pixels may turn out to be lying.

    Raises
    ------
    FileError, MemoryBudgetError
        As `read_header`.
    """
    with _Opened(path, caps) as image:
        return image.size if image.format == "PNG" else _turned(image)


def _turned(image: Image.Image) -> tuple[int, int]:
    """(width, height) as shown; Pillow gives TIFF sizes already turned."""
    turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def read_decode_bytes(path: Path, caps: Caps = NO_CAPS) -> int:
    """`decode_bytes` of a file, from the header alone (`read_header` has to decode PNG files, whose EXIF data may come last).

    Raises
    ------
    FileError, MemoryBudgetError
        As `read_header`.
    """
    with _Opened(path, caps) as image:
        return decode_bytes(image, caps.resized)


class _Opened:
    """Context of an image file opened by Pillow, within `caps`; whatever goes wrong inside becomes a `FileError` that names the file."""

    def __init__(self, path: Path, caps: Caps):
        self.path, self.caps = path, caps

    def __enter__(self) -> Image.Image:
        try:
            self.file = self.path.open("rb")
        except OSError as error:
            raise FileError(f"{self.path}: cannot be opened ({error.strerror or error})") from error
        try:
            self.image = Image.open(self.file, formats=FORMATS)
            self.caps.check(self.path, self.image)
        except BaseException as error:
            self.file.close()
            self._rename(error)
            raise
        return self.image

    def __exit__(self, kind, error, trace) -> None:
        self.image.close()
        self.file.close()
        if error is not None:
            self._rename(error)

    def _rename(self, error: BaseException) -> None:
        # decoders raise nearly everything: OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        if not isinstance(error, Exception) or isinstance(error, (FileError, DataError, MemoryError)):
            return
        reason = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error).strip()
        raise FileError(f"{self.path}: cannot be decoded ({(reason or type(error).__name__).splitlines()[0]}){REPAIR}") from error


def _depth_and_colour(path: Path, image: Image.Image) -> tuple[int, bool]:
    """(bits, colour) of an opened image. Grey palettes are grey; 48-bit colour is decoded to 8 bits by Pillow."""
    mode = image.mode
    if mode in ("1", "L", "LA", "La"):
        return 8, False
    if mode in ("P", "PA"):
        return 8, _palette_has_colour(image)
    if mode in _COLOUR_MODES:
        return 8, True
    if mode.startswith("I;16"):
        return 16, False
    if mode == "I":  # 16-bit PGM (Pillow scales its largest value to 65535), else integers of 32 bits
        return (32 if image.format == "TIFF" else 16), False
    if mode == "F":
        return 32, False
    raise DataError(f"{path}: pixels of Pillow's mode {mode} are not supported; convert the file to grey or RGB")


def _palette_has_colour(image: Image.Image) -> bool:
    palette = image.getpalette("RGB") or []
    colours = np.array(palette, np.uint8).reshape(-1, 3)
    return bool((colours != colours[:, :1]).any())


@dataclass(frozen=True)
class Decoder:
    """Turns files into pixels of one shape and type.

    Parameters
    ----------
    height, width, channels : int
        channels 1 or 3.
    bits : int
        8 -> uint8; 16 -> float32, 16-bit values divided by 257 (so 0 to 255), 8-bit values as they are;
        32 -> float32, values as they are.
    resize : bool
        Whether files of another size are resized: mean of the pixels (BOX) where both sides shrink by whole numbers, else
        Pillow's BILINEAR, which averages while it shrinks; first reduced by a whole factor when more than 4 times too large.
    recolour : bool
        Whether colour files may become grey (ITU-R 601 luma). Grey files always become colour by repeating.
    caps : Caps
        What a file may take.

    Notes
    -----
    Transparent pixels are laid on white, as viewers and browsers show them. Of several frames the first is taken.
    """

    height: int
    width: int
    channels: int
    bits: int
    resize: bool = False
    recolour: bool = False
    caps: Caps = NO_CAPS

    def into(self, path: Path, out: np.ndarray) -> None:
        """Decode `path` into `out` (height, width, channels), uint8 or float32.

        Raises
        ------
        FileError
            When it cannot be decoded, is truncated, or has too many pixels.
        DataError
            For another size, colour in a grey source, or deeper pixels than the source has.
        """
        with _Opened(path, self.caps) as image:
            if not self.resize and math.prod(image.size) != self.height * self.width:
                raise self.wrong_size(path, image.size)
            bits, colour = _depth_and_colour(path, image)
            self._check_kind(path, bits, colour)
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            if bits == 8:
                pixels = self._sized(path, _plain(image, "RGB" if self.channels == 3 else "L"))
            else:
                deep = np.asarray(image).astype(np.float32)
                pixels = self._sized(path, Image.fromarray(deep / np.float32(257) if bits == 16 else deep))
            array = np.asarray(pixels)
            out[...] = array if array.ndim == 3 else array[:, :, None]

    def _check_kind(self, path: Path, bits: int, colour: bool) -> None:
        if bits != self.bits and not (bits == 8 and self.bits == 16):
            raise DataError(f"{path}: has {bits}-bit pixels where the others have {self.bits}; convert it or move it away")
        if colour and self.channels == 1 and not self.recolour:
            raise DataError(
                f"{path}: is a colour image where the others are grey; "
                f"image_shape=({self.height}, {self.width}, 3) reads all as colour, ({self.height}, {self.width}, 1) as grey"
            )

    def wrong_size(self, path: Path, size: tuple[int, int]) -> DataError:
        """The error of a file of (width, height) `size`."""
        side = min(SIDE, self.height, self.width, *size)
        return DataError(
            f"{path}: is {size[1]} x {size[0]} pixels (height x width) where the others are {self.height} x {self.width}; "
            f"image_shape=({side}, {side}), say, stretches every image to that (--image-size {side}x{side})"
        )

    def _sized(self, path: Path, image: Image.Image) -> Image.Image:
        wanted = (self.width, self.height)
        if image.size == wanted:
            return image
        if not self.resize:
            raise self.wrong_size(path, image.size)
        if image.width % self.width == 0 and image.height % self.height == 0:
            return image.resize(wanted, Image.Resampling.BOX)
        return image.resize(wanted, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """`image` as "L" or "RGB", transparency laid on white."""
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image if image.mode == mode else image.convert(mode)
