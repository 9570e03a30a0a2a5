"""What decoding a file holds, declared before it is decoded; and files too large for a limit."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from streamcnn import StreamCNNClassifier, plan
from streamcnn.errors import MemoryBudgetError
from streamcnn.imagefiles import Caps, read_decode_bytes
from streamcnn.images import open_images
from streamcnn.system import resident_bytes

HEIGHT, WIDTH = 1500, 2000
MIB = 1 << 20


def picture(channels=3, dtype=np.uint8):
    """A smooth picture, quick to pack."""
    plane = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)).astype(np.uint8)
    if channels == 1:
        return Image.fromarray(plane.astype(dtype) * (200 if dtype == np.uint16 else 1))
    return Image.fromarray(np.stack([plane, plane[::-1], plane, plane][:channels], axis=-1))


def turned():
    """EXIF data that turn the picture by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS = {
    "grey.pgm": lambda p: picture(1).save(p),
    "grey.png": lambda p: picture(1).save(p, compress_level=1),
    "bits.png": lambda p: picture(1).convert("1").save(p),
    "colour.jpg": lambda p: picture().save(p),
    "turned.jpg": lambda p: picture().save(p, exif=turned()),
    "progressive.jpg": lambda p: picture().save(p, progressive=True, subsampling=0),
    "cmyk.jpg": lambda p: picture().convert("CMYK").save(p),
    "colour.png": lambda p: picture().save(p, compress_level=1),
    "alpha.png": lambda p: picture(4).save(p, compress_level=1),
    "palette.png": lambda p: picture().convert("P").save(p),
    "deep.png": lambda p: picture(1, np.uint16).save(p, compress_level=1),
    "deep.pgm": lambda p: picture(1, np.uint16).save(p),
    "colour.webp": lambda p: picture().save(p, quality=50, method=0),
    "alpha.webp": lambda p: picture(4).save(p, quality=50, method=0),
    "colour.tif": lambda p: picture().save(p, compression="tiff_lzw"),
    "float.tif": lambda p: Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(p),
    "colour.bmp": lambda p: picture().save(p),
}

_CHILD = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from streamcnn.images import open_images
from streamcnn.system import peak_resident_bytes, reset_peak, resident_bytes
Image.init()
for path in sys.argv[1:]:
    for image_shape in (None, (150, 200)):
        source = open_images(path, image_shape=image_shape)
        out = np.ones((1, *source.image_shape), source.dtype)
        before, _ = resident_bytes(), reset_peak()
        source.read(0, 1, out)
        print(Path(path).name, image_shape is None, peak_resident_bytes() - before, source.scratch_bytes(1)["decoded file"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's own")
def test_decoding_holds_what_is_declared(tmp_path):
    """Every kind of file, as it is and resized: never more than declared (and a MiB for the decoder), and no kind half of it."""
    for name, make in KINDS.items():
        make(tmp_path / name)
    files = [str(tmp_path / name) for name in KINDS]
    # so that glibc gives every large block back at once, and the next file has to ask for it again
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", _CHILD, *files], check=True, capture_output=True, text=True, env=env)
    measured = [line.split() for line in done.stdout.splitlines()]
    assert len(measured) == 2 * len(KINDS)
    for name, whole, grown, declared in measured:
        assert int(grown) <= int(declared) + MIB, (name, whole)
        # PNG is planned as if it had to be turned; small sums are mostly the array itself
        assert int(grown) >= 0.4 * int(declared) - 4 * MIB, (name, whole)


def test_headers_of_large_images_are_all_read(tmp_path):
    """One file among a hundred that costs more to decode decides what is declared."""
    for row in range(9):
        picture(1).save(tmp_path / f"{row}.pgm")
    plain = open_images(tmp_path).scratch_bytes(1)["decoded file"]
    picture(1).convert("LA").save(tmp_path / "5.png")
    assert open_images(tmp_path).scratch_bytes(1)["decoded file"] >= plain + 12 * HEIGHT * WIDTH


def test_a_file_too_large_for_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    """With its name, its size and what is left, also where bad files are skipped: the limit must not decide what is a bad file."""
    for row in range(2):
        (tmp_path / str(row)).mkdir()
        picture().save(tmp_path / str(row) / "a.jpg")

    def never(self, *args):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", never)
    needed = read_decode_bytes(tmp_path / "0" / "a.jpg")
    for on_error in ("raise", "skip"):
        with pytest.raises(MemoryBudgetError, match=r"a\.jpg: decoding its 2000 x 1500 pixels takes 28 MiB, more than the .* raise memory"):
            open_images(tmp_path, on_error=on_error, memory_limit=resident_bytes() + needed // 2)
    limit = resident_bytes() + needed // 2
    with pytest.raises(MemoryBudgetError, match="decoding its 2000 x 1500 pixels"):
        StreamCNNClassifier(memory_limit=limit).fit(tmp_path)
    assert Caps(decode_bytes=needed).check(tmp_path, Image.open(tmp_path / "0" / "a.jpg")) is None


def test_large_images_are_planned_with_their_decoding(tmp_path):
    """The plan of a folder of large photographs names the decoded file."""
    for row in range(4):
        (tmp_path / str(row % 2)).mkdir(exist_ok=True)
        picture().save(tmp_path / str(row % 2) / f"{row}.jpg")
    made = plan(tmp_path, memory_limit="4GiB", image_shape=(64, 64))
    # 5 bytes a pixel: Pillow's own four and one for its resizing
    assert made.stage("extract").claims["decoded file"] >= 5 * HEIGHT * WIDTH
    assert made.stage("extract").claims["pixels"] == 4 * 64 * 64 * 3
