"""Files made to mislead, fill memory, hang or reach other files, made here and never kept; each with the error or result expected.

`python tests/hostile_files.py FOLDER` runs those called bombs in this process, under a limit of its own memory.
"""

import io
import json
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from mutations import lookup3, metadata_blocks
from PIL import Image, ImageCms, PngImagePlugin

from streamcnn import FeatureStore, load_model
from streamcnn.arrays import load_arrays, save_arrays
from streamcnn.errors import DataError, FileError, MemoryBudgetError, ModelError, StoreError
from streamcnn.images import open_images
from streamcnn.manifest import config_text, line_of
from streamcnn.system import resident_bytes

MODEL = Path(__file__).parent / "archive" / "v1" / "model.h5"
ROOM = 192 << 20
PIXELS = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5, 1)
GREY = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))


@dataclass(frozen=True)
class Case:
    """`make(folder)` gives the path; `error` None: it is read, with the result `right` if that is given."""

    make: Callable[[Path], Path]
    kind: str
    error: type[Exception] | None
    match: str
    bomb: bool
    right: object

    def __str__(self):
        return f"{self.kind}-{self.make.__name__}"


CASES: list[Case] = []


def case(kind: str, error: type[Exception] | None = None, match: str = "", bomb: bool = False, right: object = None):
    """Decorator of a function that makes a file."""

    def add(make):
        CASES.append(Case(make, kind, error, match, bomb, right))
        return make

    return add


def read_images(path: Path):
    """All pixels; what a plan would refuse is refused as it would."""
    limit = resident_bytes() + ROOM
    with open_images(path, memory_limit=limit) as source:
        if sum(source.scratch_bytes(1).values()) + 4 * source.row_values > ROOM:
            raise MemoryBudgetError("the plan refuses")
        return np.concatenate([pixels.copy() for pixels, _ in source.iter_chunks(1000)]).tolist()


def read_store(path: Path):
    """All rows and labels of all kinds, and verify."""
    store = FeatureStore(path)
    found = {kind: [(rows.tolist(), labels.tolist()) for rows, labels in store.iter_batches(100, kind)] for kind in ("features", "reduced")}
    for entry in store.entries:
        if "stage" in entry:
            store.stage_arrays(entry["stage"], entry["digest"])
    problems = store.verify()
    if problems:
        raise StoreError(problems[0])
    return found


def use_store(path: Path):
    """Everything a run does to a store it finds."""
    with FeatureStore(path) as store:
        store.lock()
        store.begin("features", "other")
        store.drop_added()
        store.append(np.ones((2, 3), np.float32))
    return None


def predict(path: Path):
    """Loads a model and predicts."""
    model = load_model(path, resident_bytes() + ROOM)
    images = np.full((3, *model.image_shape), 200, np.uint8)
    return [values.tolist() for _, values in model.decisions(open_images(images), device="cpu")]


OPEN = {"images": read_images, "store": read_store, "use": use_store, "model": predict}


# -- images -------------------------------------------------------------------------------------------------------------------------
def _named(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    make.__name__ = name
    return make


def _packed(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, data: bytes, more: bytes = b"") -> bytes:
    """A grey PNG of 8 bits with these packed rows."""
    chunks = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + more
    return b"\x89PNG\r\n\x1a\n" + chunks + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(tags: list[tuple], data: bytes) -> bytes:
    """A little-endian TIFF of one directory; the value "data" is where `data` lies."""
    place = 8 + 2 + 12 * len(tags) + 4
    out = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, kind, count, value in sorted(tags):
        out += struct.pack("<HHII", tag, kind, count, place if value == "data" else value)
    return out + struct.pack("<I", 0) + data


def tiled(side: int) -> bytes:
    """64 x 64 pixels in one tile of `side` x `side`."""
    data = zlib.compress(bytes(side * side), 1)
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff([*tags, (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, "data"), (325, 4, 1, len(data))], data)


for _name, _data, _error, _match in (
    ("empty.png", b"", FileError, "not an image"),
    ("empty.npy", b"", FileError, "not a .npy file"),
    ("empty.npz", b"", FileError, "not a readable .npz"),
    ("empty.h5", b"", FileError, "not a readable HDF5"),
    ("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", FileError, "not an image of a known format"),
    ("document.png", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", FileError, "not an image of a known format"),
    ("drawing.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", FileError, "not an image"),
    ("animation.png", _packed(GREY, "GIF"), FileError, "not an image of a known format"),
    ("icon.bmp", _packed(GREY, "ICO"), FileError, "not an image of a known format"),
    ("wide.png", png(10**9, 1, b""), FileError, "pixels"),
    ("giant.pgm", b"P5 30000 30000 255\n", FileError, "pixels"),
    ("cut.png", _packed(GREY, "PNG")[:-40], FileError, "cannot be decoded"),
    ("cut.jpg", _packed(GREY, "JPEG")[:-20], FileError, "cannot be decoded"),
    ("large-tile.tif", tiled(16_000), FileError, "tiles of 16000 x 16000"),
    ("text-bomb.png", png(8, 6, zlib.compress(bytes(54)), _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))), FileError, "cannot"),
    ("bomb.pgm", b"P5 9000 9000 255\n", MemoryBudgetError, "memory_limit"),
    ("run-length.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1080, 0, 0, 1078, 40, 9000, 9000, 1, 8, 1, 2, 0, 0, 256, 256) + bytes(1024)
     + b"\0\1", FileError, "packed by runs"),
):  # fmt: skip
    case("images", _error, _match, bomb=_name in ("text-bomb.png", "large-tile.tif", "bomb.pgm", "wide.png"))(_named(_name, _data))


@case("images", MemoryBudgetError, "memory_limit", bomb=True)
def bomb_within_pixels(folder: Path) -> Path:
    """80 megapixels of nothing in 80 KB."""
    Image.new("RGB", (9000, 8900)).save(folder / "b.png")
    return folder / "b.png"


@case("images", FileError, "scans")
def many_scans(folder: Path) -> Path:
    """A progressive JPEG whose last scan is there 2,000 times: minutes of work in 350 KB."""
    data = _packed(Image.new("L", (6000, 6000), 128), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    (folder / "s.jpg").write_bytes(data[:-2] + last * 2000 + data[-2:])
    return folder / "s.jpg"


@case("images", right=np.array(GREY)[None, :, :, None].tolist())
def png_named_jpg(folder: Path) -> Path:
    """The content decides, not the name."""
    (folder / "p.jpg").write_bytes(_packed(GREY, "PNG"))
    return folder / "p.jpg"


@case("images", right=np.array(GREY)[None, :, :, None].tolist())
def absurd_tags(folder: Path) -> Path:
    """A TIFF with unknown tags that promise gigabytes."""
    plain = [(256, 4, 1, 8), (257, 4, 1, 6), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, "data"), (277, 3, 1, 1)]
    absurd = [(278, 4, 1, 6), (279, 4, 1, 48), (50000, 12, 0x1FFFFFFF, 0xFFFFFFF0), (50001, 7, 0xFFFFFFFF, 8)]
    (folder / "t.tif").write_bytes(tiff([*plain, *absurd], np.array(GREY).tobytes()))
    return folder / "t.tif"


@case("images", FileError, "too large", bomb=True)
def colour_profile_bomb(folder: Path) -> Path:
    """64 MiB of colour profile in a PNG."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(1 << 26)
    more = _chunk(b"iCCP", b"x\0\0" + zlib.compress(profile, 9))
    rows = b"".join(b"\0" + bytes(row) for row in np.array(GREY))
    (folder / "i.png").write_bytes(png(8, 6, zlib.compress(rows), more))
    return folder / "i.png"


@case("images", right=np.array(GREY)[None, :, :, None].tolist())
def text_that_looks_like_code(folder: Path) -> Path:
    """Texts and EXIF data of a file are never looked at."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "'; __import__('os').system('false') #" * 100)
    GREY.save(folder / "c.png", pnginfo=texts)
    return folder / "c.png"


@case("images", FileError, "regular file")
def pipe(folder: Path) -> Path:
    """A named pipe that nobody writes to."""
    os.mkfifo(folder / "a.npy")
    return folder / "a.npy"


@case("images", FileError, "regular file")
def pipe_to_hdf5(folder: Path) -> Path:
    """A named pipe where HDF5 would wait."""
    os.mkfifo(folder / "a.h5")
    return folder / "a.h5"


@case("images", FileError, "regular file")
def device(folder: Path) -> Path:
    """Zeros without end."""
    (folder / "z.png").symlink_to("/dev/zero")
    return folder / "z.png"


@case("images", right=PIXELS[:2].tolist())
def pipe_beside_images(folder: Path) -> Path:
    """Pipes and devices in a folder are no images."""
    for row in range(2):
        Image.fromarray(PIXELS[row, :, :, 0]).save(folder / f"{row}.png")
    os.mkfifo(folder / "2.png")
    return folder


def _npy(folder: Path, text: str, data: bytes = b"", version: bytes = b"\1\0", length: int | None = None) -> Path:
    header = text.encode() + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(header) if length is None else length)
    (folder / "a.npy").write_bytes(b"\x93NUMPY" + version + size + header + data)
    return folder / "a.npy"


def _describe(shape: str, kind: str = "'|u1'", order: str = "False") -> str:
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}"


for _name, _text, _error, _match in (
    ("negative", _describe("(-4, 6, 5)"), FileError, "its shape is"),
    ("truth", _describe("(True, 6, 5)"), FileError, "its shape is"),
    ("endless", _describe("(10**9, 6, 5)"), FileError, "not a .npy file"),
    ("too many", _describe("(1000000000000, 6, 5)"), FileError, "is truncated"),
    ("beyond 64 bits", _describe(f"({10**30}, 6, 5)"), FileError, "its shape is"),
    ("records", _describe("(4,)", "[('a', '<f8'), ('b', '|u1')]"), DataError, "axes|real numbers"),
    ("objects", _describe("(4, 6, 5)", "'|O'"), DataError, "Python objects"),
    ("wide strings", _describe("(4, 6, 5)", "'<U1000000000'"), (FileError, DataError), "not a .npy file|real numbers"),
    ("columns first", _describe("(4, 6, 5)", order="True"), DataError, "Fortran order"),
    ("nested", "(" * 5000 + ")" * 5000, FileError, "not a .npy file"),
    ("code", "__import__('os').system('false')", FileError, "not a .npy file"),
):

    def _make(folder: Path, text=_text) -> Path:
        return _npy(folder, text, PIXELS.tobytes())

    _make.__name__ = f"npy {_name}"
    case("images", _error, _match)(_make)


@case("images", FileError, "longer than", bomb=True)
def npy_header_of_gigabytes(folder: Path) -> Path:
    """A header that promises 4 GiB, in a zip member that could give them."""
    with zipfile.ZipFile(folder / "h.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as member:
        member.write(b"\x93NUMPY\2\0" + struct.pack("<I", 0xFFFFFFF0))
        for _ in range(256):
            member.write(b" " * (1 << 20))
    return folder / "h.npz"


@case("images", DataError, "must hold 4 whole numbers or strings", bomb=True)
def labels_of_gigabytes(folder: Path) -> Path:
    """Labels whose type takes a gigabyte each."""
    np.save(folder / "a.npy", PIXELS)
    path = _npy(folder / "..", _describe("(4,)", "'<U400000000'"), bytes(64))
    path.rename(folder / "a_labels.npy")
    return folder / "a.npy"


def _npz(folder: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return folder / "a.npz"


def _saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _bare(shape: tuple, kind: str) -> bytes:
    """A header alone."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue()


def _lying_zip(folder: Path, members: dict[str, tuple[bytes, int]]) -> Path:
    """Deflated members, of which the directory and the local header say they have another size."""
    path = _npz(folder, {name: data for name, (data, _) in members.items()}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        for info in archive.infolist():
            struct.pack_into("<I", raw, info.header_offset + 22, members[info.filename][1])
            struct.pack_into("<I", raw, directory + 24, members[info.filename][1])
            directory += 46 + len(info.filename)
    path.write_bytes(raw)
    return path


@case("images", FileError, "of the file cannot be", bomb=True)
def npz_that_lies(folder: Path) -> Path:
    """A hundred bytes that say they are 4 GB of images, with as many labels."""
    images, labels = _bare((4 * 10**9 - 128, 1), "|u1"), _bare((4 * 10**9 - 128,), "|u1")
    return _lying_zip(folder, {"images.npy": (images, 4 * 10**9), "labels.npy": (labels, 4 * 10**9)})


@case("images", (MemoryBudgetError, FileError), "memory_limit|labels", bomb=True)
def npz_bomb(folder: Path) -> Path:
    """200 million images of one pixel, honestly packed: their labels alone do not fit."""
    with zipfile.ZipFile(folder / "b.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in (("images.npy", (200 << 20, 1)), ("labels.npy", (200 << 20,))):
            with archive.open(name, "w") as member:
                member.write(_bare(shape, "|u1"))
                for _ in range(200):
                    member.write(bytes(1 << 20))
    return folder / "b.npz"


@case("images", FileError, "not a readable .npz file|cannot be read")
def npz_encrypted(folder: Path) -> Path:
    """A member that says it needs a password."""
    path = _npz(folder, {"images.npy": _saved(PIXELS)})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    return path


@case("images", FileError, "must be stored or deflated")
def npz_of_another_method(folder: Path) -> Path:
    """bzip2 makes a million bytes of one."""
    return _npz(folder, {"images.npy": _saved(np.zeros((9000, 6, 5, 1), np.uint8))}, zipfile.ZIP_BZIP2)


@case("images", right=PIXELS.tolist())
def npz_of_paths(folder: Path) -> Path:
    """Members named as files elsewhere are never written."""
    return _npz(folder, {"../escaped.npy": _saved(PIXELS + 1), "/escaped.npy": b"x", "images.npy": _saved(PIXELS)})


@case("images", DataError, "Python objects")
def npz_of_objects(folder: Path) -> Path:
    """Pickled objects are never loaded."""
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}] * 4, object), allow_pickle=True)
    return _npz(folder, {"images.npy": out.getvalue()})


@case("images", FileError, "CRC")
def npz_of_another_pixel(folder: Path) -> Path:
    """The checksum of a member is compared when its last pixel has been read."""
    path = _npz(folder, {"images.npy": _saved(PIXELS)})
    path.write_bytes(path.read_bytes().replace(PIXELS[3].tobytes(), PIXELS[0].tobytes()))
    return path


# -- HDF5 images --------------------------------------------------------------------------------------------------------------------
def _h5(make: Callable[[h5py.File], object], libver="earliest") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with h5py.File(folder / "a.h5", "w", libver=libver) as file:
            make(file)
        return folder / "a.h5"

    write.__name__ = make.__name__
    return write


def h5_of_nothing(file):
    """10**12 images that were never written."""
    file.create_dataset("images", (10**12, 8, 8), np.uint8, chunks=(1000, 8, 8))


def h5_labels_of_nothing(file):
    """As many labels as images that take no space, and no place."""
    file.create_dataset("images", data=PIXELS)
    file.create_dataset("labels", (10**12,), np.int64, chunks=(1000,))


def h5_plugin(file):
    """A filter that would load a library."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4, 6, 5))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((4, 6, 5)), properties)


def h5_circle(file):
    """Groups inside each other."""
    file.create_group("a/b")
    file["a/b/c"] = file["a"]


def h5_records(file):
    """A type of a thousand fields."""
    file.create_dataset("images", (4,), [(f"f{i}", "<f8") for i in range(1000)])


def h5_with_attributes(file):
    """100 MB of attributes, which nobody asked for."""
    file.create_dataset("images", data=PIXELS)
    file["images"].attrs.create("x", np.zeros(12_500_000))


for _function, _error, _match, _bomb, _libver in (
    (h5_of_nothing, FileError, "declares 64000000000000 bytes", True, "earliest"),
    (h5_labels_of_nothing, (FileError, DataError), "declares 8000000000000 bytes|one label for each", True, "earliest"),
    (h5_plugin, FileError, "filter 32015, which is not allowed", False, "earliest"),
    (h5_circle, FileError, "not there; the file holds no data sets", False, "earliest"),
    (h5_records, DataError, "must hold numbers", False, "earliest"),
    (h5_with_attributes, None, "", True, "latest"),
):
    case("images", _error, _match, _bomb, PIXELS.tolist() if _error is None else None)(_h5(_function, _libver))


@case("images", right=PIXELS.tolist())
def h5_behind_a_user_block(folder: Path) -> Path:
    """HDF5 allows something else to come first."""
    with h5py.File(folder / "u.h5", "w", userblock_size=1024) as file:
        file["images"], file["labels"] = PIXELS, ["a", "b", "a", "ü"]
    with (folder / "u.h5").open("r+b") as raw:
        raw.write(b"#!/bin/sh\nfalse\n")
    return folder / "u.h5"


@case("images", FileError, "has no strings at address|not where it should be|must have short strings")
def h5_endless_heap(folder: Path) -> Path:
    """A heap whose first object has no size: the HDF5 library walks through it for ever."""
    with h5py.File(folder / "e.h5", "w") as file:
        file["images"], file["labels"] = PIXELS, ["a", "b", "a", "b"]
    raw = bytearray((folder / "e.h5").read_bytes())
    place = raw.index(b"GCOL") + 16
    raw[place : place + 16] = bytes(16)
    (folder / "e.h5").write_bytes(raw)
    return folder / "e.h5"


@case("images", DataError, "short", bomb=True)
def h5_label_of_a_megabyte(folder: Path) -> Path:
    """One string of 900 KB, 2,000 times in the file's table of labels and once in its heap."""
    with h5py.File(folder / "l.h5", "w") as file:
        file["images"] = np.zeros((2000, 2, 2), np.uint8)
        file.create_dataset("labels", data=["x" * 900_000, *["y"] * 1999], dtype=h5py.string_dtype())
        offset = file["labels"].id.get_offset()
    raw = bytearray((folder / "l.h5").read_bytes())
    raw[offset : offset + 2000 * 16] = raw[offset : offset + 16] * 2000
    (folder / "l.h5").write_bytes(raw)
    return folder / "l.h5"


@case("images", FileError, "chunks of at most", bomb=True)
def h5_label_chunk(folder: Path) -> Path:
    """Four labels in a chunk of half a gigabyte."""
    with h5py.File(folder / "c.h5", "w") as file:
        file["images"] = PIXELS
        file.create_dataset("labels", (4,), np.uint8, chunks=(1 << 29,), maxshape=(None,), compression="gzip")
    return folder / "c.h5"


@case("images", MemoryBudgetError, "plan refuses", bomb=True)
def h5_image_chunk(folder: Path) -> Path:
    """Four images in a chunk of a gigabyte, which the plan counts."""
    with h5py.File(folder / "c.h5", "w") as file:
        file.create_dataset("images", (4, 6, 5), np.uint8, chunks=(1 << 25, 6, 5), maxshape=(None, 6, 5), compression="gzip")
    return folder / "c.h5"


# -- models -------------------------------------------------------------------------------------------------------------------------
def _model(name: str, error, match: str, change: Callable[[dict, dict], None], bomb: bool = False) -> None:
    """A model with a valid hash whose arrays or header were changed."""

    def make(folder: Path) -> Path:
        arrays, header = load_arrays(MODEL, "streamcnn-model", 1)
        change(arrays, header)
        save_arrays(folder / "m.h5", arrays, header, durable=False)
        return folder / "m.h5"

    make.__name__ = name
    case("model", error, match, bomb)(make)


def _layer(**values) -> Callable[[dict, dict], None]:
    return lambda arrays, header: header["network"]["layers"][0].update(values)


def _array(key: str, array) -> Callable[[dict, dict], None]:
    return lambda arrays, header: arrays.update({key: array(arrays[key])})


def _header(**values) -> Callable[[dict, dict], None]:
    return lambda arrays, header: header.update(values)


for _args in (
    ("kernel of a billion", ModelError, "kernel_size", _layer(kernel_size=10**9)),
    ("no pool", ModelError, "pool_size must be", _layer(pool_grid=None, pool_size=0)),
    ("padding of a billion", ModelError, "padding must be at most", _layer(padding=10**9, kernel_size=10**9), True),
    ("a billion filters", ModelError, "the layer needs", _layer(n_filters=10**9), True),
    ("filters beyond every address", ModelError, "the layer needs", _layer(n_filters=10**14), True),
    ("stride of nothing", ModelError, "stride must be", _layer(stride=0)),
    ("gain of infinity", ModelError, "Out of range|header|misstates|gain", _layer(gain=10**400)),
    ("unknown field", ModelError, "lacks or misstates", _layer(command="rm -rf")),
    ("sides of a billion", ModelError, "image_shape must be", lambda a, h: h["network"].update(image_shape=[10**9, 10**9, 1]), True),
    ("a list for a number", ModelError, "image_shape must be", lambda a, h: h["network"].update(image_shape=[[1], 2, 3])),
    ("filters that are no numbers", ModelError, "no finite numbers", _array("network.filters_1", lambda a: a * np.float32(np.nan))),
    ("components of infinity", ModelError, "no finite numbers", _array("pca.components_", lambda a: a * np.inf)),
    ("components beyond float32", ModelError, "no finite number", _array("pca.components_", lambda a: a * 1e300)),
    ("planes that are no numbers", ModelError, "no finite numbers", _array("svm.coef_", lambda a: a * np.nan)),
    ("filters out of range", DataError, "exceed the range of float16", _array("network.filters_1", lambda a: np.full_like(a, 1e30))),
    ("negative kernel number", ModelError, "none of its own", _array("svm.header", lambda a: a * -1)),
    ("classes twice", ModelError, "different names", _header(classes=["a", "a", "b"])),
    ("a class of a megabyte", ModelError, "class names must be short", _header(classes=["x" * (1 << 20), *map(str, range(100))]), True),
    ("classes of all kinds", ModelError, "lacks or misstates", _header(classes=[[1], "a", None])),
    ("settings of a number", ModelError, "header is incomplete", _header(settings=5)),
    ("version of the future", ModelError, "update streamcnn", _header(format_version=10**6)),
    ("version of truth", ModelError, "format version|lacks", _header(format_version=-1)),
):
    _model(*_args)


@case("model", ModelError, "header is missing", bomb=True)
def deep_header(folder: Path) -> Path:
    """JSON nested a million times."""
    return _raw_header(folder, b"[" * 1_000_000 + b"]" * 1_000_000)


@case("model", ModelError, "header is missing", bomb=True)
def header_of_empty_lists(folder: Path) -> Path:
    """12 MB of text that would be 400 MB of lists."""
    return _raw_header(folder, b"[" + b"[]," * 4_000_000 + b"0]")


@case("model", ModelError, "header is missing")
def header_that_is_no_number(folder: Path) -> Path:
    """NaN is Python's, not JSON's."""
    return _raw_header(folder, b'{"format": "streamcnn-model", "format_version": NaN}')


def _raw_header(folder: Path, text: bytes) -> Path:
    with h5py.File(folder / "m.h5", "w", libver=("v110", "v110")) as file:
        file.create_dataset("json", data=np.frombuffer(text, np.uint8))
    return folder / "m.h5"


@case("model", ModelError, "more bytes than", bomb=True)
def one_array_of_many_names(folder: Path) -> Path:
    """16 MiB under 900 names."""
    with h5py.File(folder / "m.h5", "w", libver=("v110", "v110")) as file:
        file["a"] = np.zeros(2 << 20)
        for number in range(900):
            file[f"b{number}"] = file["a"]
    return folder / "m.h5"


@case("model", ModelError, "larger than its shape", bomb=True)
def array_in_a_giant_chunk(folder: Path) -> Path:
    """Ten numbers in a chunk of 2 GiB."""
    with h5py.File(folder / "m.h5", "w", libver=("v110", "v110")) as file:
        file.create_dataset("a", (10,), "f8", chunks=(1 << 28,), maxshape=(None,), fletcher32=True)
    return folder / "m.h5"


def _rehash(path: Path, place: int, value: int) -> None:
    """One byte of the metadata changed, with the checksum to it."""
    raw = bytearray(path.read_bytes())
    raw[place] = value
    start, end = next((start, end) for start, end in metadata_blocks(bytes(raw)) if start <= place < end)
    raw[end : end + 4] = lookup3(bytes(raw[start:end])).to_bytes(4, "little")
    path.write_bytes(raw)


@case("model", ModelError, "chunks of no axes")
def chunk_of_no_axes(folder: Path) -> Path:
    """The HDF5 library divides by their number when it opens the data set."""
    (folder / "m.h5").write_bytes(MODEL.read_bytes())
    # version 4, chunked, single filtered chunk, axes (the element is one), bytes a side
    place = MODEL.read_bytes().index(b"\4\2\2\2\1")
    _rehash(folder / "m.h5", place + 2, 0)
    _rehash(folder / "m.h5", place + 3, 0)
    return folder / "m.h5"


@case("store", StoreError, "too short for its checksum")
def chunk_of_no_bytes(folder: Path) -> Path:
    """The HDF5 library looks for a checksum before the beginning of memory."""
    store = good_store(folder)
    shard = store / "features/00001.h5"
    # as above, two axes and the element; then three sides and the kind of index
    _rehash(shard, shard.read_bytes().index(b"\4\2\2\3\1") + 9, 0)
    return store


@case("model", FileError, "regular file")
def model_is_a_pipe(folder: Path) -> Path:
    """Opening it would wait for ever."""
    os.mkfifo(folder / "m.h5")
    return folder / "m.h5"


# -- stores -------------------------------------------------------------------------------------------------------------------------
def good_store(folder: Path) -> Path:
    """A store of 2 + 3 rows and a stage."""
    with FeatureStore.create(folder / "store", {"classes": ["a", "b"]}, durable=False) as store:
        store.append(np.ones((2, 3), np.float32), [0, 1])
        store.append(np.arange(9, dtype=np.float32).reshape(3, 3), [1, 0, 0])
        store.finish("pca", "d", {"mean_": np.zeros(3)})
    return folder / "store"


def _store(name: str, error, match: str, change: Callable[[Path], object], kind: str = "store", bomb: bool = False) -> None:
    def make(folder: Path) -> Path:
        path = good_store(folder)
        change(path)
        return path

    make.__name__ = name
    case(kind, error, match, bomb)(make)


def _edit_line(number: int, **values) -> Callable[[Path], object]:
    """One line of the manifest changed, with a valid CRC."""

    def change(path: Path):
        lines = (path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        lines[number] = line_of(json.loads(lines[number]) | values)
        (path / "manifest.jsonl").write_bytes(b"".join(lines))

    return change


def _append_line(text: bytes) -> Callable[[Path], object]:
    return lambda path: (path / "manifest.jsonl").write_bytes((path / "manifest.jsonl").read_bytes() + text + b"\n")


def _config(**values) -> Callable[[Path], object]:
    base = {"format": "streamcnn-store", "format_version": 1, "digests": {}}
    return lambda path: (path / "config.json").write_text(config_text(base | values))


def _replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path):
        (path / name).unlink()
        make(path / name)

    return change


def _sparse(path: Path) -> None:
    """A gigabyte that takes no place."""
    with path.open("wb") as file:
        file.truncate(1 << 30)


def _outside(name: str) -> Callable[[Path], object]:
    """A file or folder moved out of the store, and a link in its place."""

    def change(path: Path):
        (path / name).rename(path.parent / "outside")
        (path / name).symlink_to(path.parent / "outside")

    return change


def _shard(change: Callable[[h5py.File], object]) -> Callable[[Path], object]:
    """The second shard written by somebody else, with a manifest that agrees as to its size."""

    def make(path: Path):
        with h5py.File(path / "features/00001.h5", "w", libver=("v110", "v110")) as file:
            change(file)
            file.require_dataset("labels", (3,), "<i8", chunks=(3,), fletcher32=True)
            file["labels"][:] = 0
        _edit_line(1, bytes=(path / "features/00001.h5").stat().st_size)(path)

    return make


def _bits_of_labels(path: Path) -> None:
    """Words of a label from 0000 to FFFF, which leave HDF5's checksum as it was: the label 0 becomes -1."""
    raw = bytearray((path / "features/00001.h5").read_bytes())
    with h5py.File(path / "features/00001.h5") as file:
        place = file["labels"].id.get_chunk_info(0).byte_offset
    raw[place + 8 : place + 16] = b"\xff" * 8
    (path / "features/00001.h5").write_bytes(raw)


for _args in (
    ("a config of a gigabyte", StoreError, "at most", _replace("config.json", _sparse), "store", True),
    ("a manifest of a gigabyte", StoreError, "at most", _replace("manifest.jsonl", _sparse), "store", True),
    ("a config that is a pipe", StoreError, "regular file", _replace("config.json", os.mkfifo)),
    ("a manifest that is a pipe", StoreError, "regular file", _replace("manifest.jsonl", os.mkfifo)),
    ("a shard that is a pipe", StoreError, "missing or of another size", _replace("features/00001.h5", os.mkfifo)),
    ("a deep config", StoreError, "nested too deeply", lambda p: (p / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)),
    ("a config of empty lists", StoreError, "holds too much", lambda p: (p / "config.json").write_text("[[]" + ",[]" * 5_000_000 + "]"),
     "store", True),
    ("a config that is no number", StoreError, "is no JSON", lambda p: (p / "config.json").write_text('{"format": NaN}')),
    ("a config of a list", StoreError, "is no feature store", lambda p: (p / "config.json").write_text("[1]")),
    ("a number of 5,000 digits", StoreError, "is no feature store", lambda p: (p / "config.json").write_text('{"a": ' + "9" * 5000 + "}")),
    ("a config without text", StoreError, "is no feature store", lambda p: (p / "config.json").write_bytes(b"\xff\xfe\0")),
    ("classes of numbers and lists", StoreError, "classes is of another kind", _config(classes=[1, [2]])),
    ("bad files of numbers", StoreError, "bad_files is of another kind", _config(bad_files=[3])),
    ("digests of a text", StoreError, "digests is of another kind", _config(digests="x")),
    ("another class name", StoreError, "checksum does not match",
     lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace('"b"', '"c"'))),
    (
        "another name of the checksum",
        StoreError,
        "checksum is missing",
        lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace('"crc"', '"crd"')),
    ),
    ("rows of a trillion", StoreError, "line 2 is damaged", _edit_line(1, rows=10**12)),
    ("rows of less than nothing", StoreError, "line 2 is damaged", _edit_line(1, rows=-3)),
    ("features of 10**18", StoreError, "line 2 is damaged", _edit_line(1, n_features=10**18)),
    ("rows of text", StoreError, "line 2 is damaged", _edit_line(1, rows="3")),
    ("rows of objects", StoreError, "line 2 is damaged", _edit_line(1, dtype="object")),
    ("a shard of /etc", StoreError, "line 2 is damaged", _edit_line(1, file="/etc/passwd")),
    ("a shard of another number", StoreError, "line 2 is damaged", _edit_line(1, file="features/00000.h5")),
    ("a shard twice", StoreError, "describes features/00000.h5 twice", _edit_line(1, shard=0, file="features/00000.h5", start=0)),
    ("overlapping shards", StoreError, "must start at row 2", _edit_line(1, start=1)),
    ("a gap between shards", StoreError, "must start at row 2", _edit_line(1, start=500)),
    ("a shard of another width", StoreError, "another width", _edit_line(1, n_features=2)),
    ("one row less", StoreError, "the manifest says", _edit_line(1, rows=2)),
    ("a stage elsewhere", StoreError, "line 3 is damaged", _edit_line(2, stage="../../../etc/passwd")),
    ("a line of deep lists", StoreError, "line 4 is damaged", _append_line(b"[" * 100_000)),
    ("a line of NaN", StoreError, "line 4 is damaged", _append_line(b'{"stage": NaN}')),
    ("features that are a link", StoreError, "symbolic link", _outside("features")),
    ("a shard that is a link", StoreError, "symbolic link", _outside("features/00001.h5")),
    ("features that are a link, used", StoreError, "symbolic link", _outside("features"), "use"),
    ("a manifest that is a link, used", StoreError, "symbolic link", _outside("manifest.jsonl"), "use"),
    ("a lock that is a link, used", StoreError, "symbolic link", lambda p: [(p / ".lock").unlink(missing_ok=True),
     (p / ".lock").symlink_to(p.parent / "made")], "use"),
    ("added rows that are a link, used", StoreError, "symbolic link", lambda p: (p / "added").symlink_to(p.parent), "use"),
    ("a temporary file that is a link, used", StoreError, "symbolic link",
     lambda p: (p / f"manifest.jsonl.{os.getpid()}.tmp").symlink_to(p.parent / "made"), "use"),
    ("external rows", StoreError, "in other files", _shard(lambda f: f.create_dataset("features", (3, 3), "<f4",
     external=[("/etc/passwd", 0, 36)]))),
    ("linked rows", StoreError, "leads elsewhere", _shard(lambda f: f.update({"features": h5py.ExternalLink("00000.h5", "features")}))),
    ("virtual rows", StoreError, "in other files", _shard(lambda f: f.create_virtual_dataset("features", _layout()))),
    ("packed rows", StoreError, "filter 1, which is not allowed", _shard(lambda f: f.create_dataset("features", (3, 3), "<f4",
     chunks=(3, 3), compression="gzip"))),
    ("rows the other way round", StoreError, "the manifest says", _shard(lambda f: f.create_dataset("features", (3, 3), ">f4",
     chunks=(3, 3), fletcher32=True))),
    ("rows without checksums", StoreError, "in pieces of None", _shard(lambda f: f.create_dataset("features", data=np.ones((3, 3), "f4")))),
    ("other rows", StoreError, "contents do not match their hash", _shard(lambda f: f.create_dataset("features",
     data=np.ones((3, 3), "f4"), chunks=(3, 3), fletcher32=True))),
    ("bits that HDF5's checksum does not see", StoreError, "00001.h5 is damaged: contents", _bits_of_labels),
):  # fmt: skip
    _store(*_args)


def _layout() -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((3, 3), "<f4")
    layout[:2] = h5py.VirtualSource("00000.h5", "features", (2, 3))
    return layout


_GOOD_ROWS = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]


@case("store", right={"features": [(_GOOD_ROWS, [0, 1, 1, 0, 0])], "reduced": []})
def store_as_it_should_be(folder: Path) -> Path:
    """What the others are made of is read."""
    return good_store(folder)


def main() -> int:
    """Run all bombs under a limit of ROOM more than this process has; a line of JSON each."""
    import resource

    folder = Path(sys.argv[1])
    paths = []
    for number, bomb in enumerate(c for c in CASES if c.bomb):
        (here := folder / str(number) / "in").mkdir(parents=True)
        paths.append((bomb, bomb.make(here)))
    predict(MODEL)  # numba and BLAS are no bomb's memory
    data = 1024 * int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (data + ROOM + (64 << 20),) * 2)
    for bomb, path in paths:
        Path("/proc/self/clear_refs").write_text("5")
        held = resident_bytes()
        try:
            OPEN[bomb.kind](path)
            outcome = "read"
        except Exception as error:
            expected = bomb.error is not None and isinstance(error, bomb.error)
            outcome = "refused" if expected else f"{type(error).__name__}: {error}"
        peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        sys.stdout.write(json.dumps([str(bomb), outcome, peak - held]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
