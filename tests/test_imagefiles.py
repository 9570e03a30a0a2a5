"""Folders of image files: what is listed, how each kind of file is decoded, and what a bad file does."""

import os
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from streamcnn import folderimages as images_module
from streamcnn.errors import DataError, FileError, ParameterError
from streamcnn.imagefiles import Decoder
from streamcnn.images import FolderSource, open_images

H, W = 6, 8
GREY = np.random.default_rng(5).integers(0, 256, (H, W), np.uint8)
COLOUR = np.random.default_rng(6).integers(0, 256, (H, W, 3), np.uint8)
DEEP = np.random.default_rng(7).integers(0, 65536, (H, W), np.uint16)


def save(path, pixels=GREY, **options):
    """Write an image file, its folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def read_all(source) -> np.ndarray:
    out = np.empty((source.n_samples, *source.image_shape), source.dtype)
    source.read(0, source.n_samples, out)
    return out


def read_one(path, **options) -> np.ndarray:
    return read_all(open_images(path, **options))[0]


def names_of(source) -> list[str]:
    return [source.name_of(row) for row in range(source.n_samples)]


def truncated(path):
    """Cut the file's last half off."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


# listing


def test_tree_is_sorted_by_class_and_path(tmp_path):
    """Files at any depth below a class folder are listed by class name, then path, with forward slashes, by code point."""
    # "a-b" < "a/" as text: paths sorted as a whole would mix the classes
    for name in ("a/z.png", "a/Ü 像.PNG", "a/deep/er/x.pgm", "a-b/1.bmp", "b/10.png", "b/9.JPeG", "Z/1.tif"):
        save(tmp_path / name)
    source = open_images(tmp_path, need_labels=True)
    assert names_of(source) == ["Z/1.tif", "a/deep/er/x.pgm", "a/z.png", "a/Ü 像.PNG", "a-b/1.bmp", "b/10.png", "b/9.JPeG"]
    assert source.classes_.tolist() == ["Z", "a", "a-b", "b"]
    assert source.labels.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert source.describe()["path"] == str(tmp_path)


def test_foreign_files_are_no_images(tmp_path):
    """Hidden files and folders, other extensions, folders named like images and classes without images are passed over."""
    save(tmp_path / "a/1.png")
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "a/Thumbs.db",
        "a/._1.png",
        "a/notes.txt",
        "a/1.png.bad",
        "empty/readme",
        ".x/1.png",
        "a/.h/2.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    (tmp_path / "a/folder.png").mkdir()
    (tmp_path / "empty/deeper").mkdir()
    source = open_images(tmp_path)
    assert names_of(source) == ["a/1.png"]
    assert source.classes_.tolist() == ["a"]


def test_flat_folder_and_single_file_have_no_labels(tmp_path):
    """Images directly in a folder are rows without labels, one file is one row; labels can be given."""
    for name in ("b.png", "a.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = open_images(tmp_path)
    assert (names_of(source), source.labels, source.classes_) == (["a.png", "b.png", "c.png"], None, None)
    assert open_images(tmp_path, ["x", "y", "x"]).labels.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="one value for each of the 3 images, got 2"):
        open_images(tmp_path, ["x", "y"])
    with pytest.raises(DataError, match="a folder per class"):
        open_images(tmp_path, need_labels=True)
    one = open_images(tmp_path / "b.png")
    assert (one.n_samples, one.labels, one.name_of(0)) == (1, None, "b.png")
    np.testing.assert_array_equal(read_all(one)[0, :, :, 0], GREY)


def test_loose_images_beside_class_folders_are_an_error(tmp_path):
    """An image beside class folders is neither: it is named, with a class folder."""
    save(tmp_path / "a/1.png")
    save(tmp_path / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png lies beside the class folder a"):
        open_images(tmp_path)


def test_folder_without_images(tmp_path):
    """An empty folder is an error that names it and the extensions looked for."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.gif").write_text("")
    with pytest.raises(FileError, match=rf"{tmp_path.name}: no images in this folder or below; looked for \.pgm .*\.webp"):
        open_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="links need rights on this system")
def test_links_are_followed_but_not_in_circles(tmp_path):
    """A linked class folder is a class; a link back to a folder above ends the walk."""
    save(tmp_path / "elsewhere/1.png")
    save(tmp_path / "tree/a/2.png")
    (tmp_path / "tree/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/a/loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/a/self").symlink_to(tmp_path / "tree/a")
    (tmp_path / "tree/a/dead.png").symlink_to(tmp_path / "nowhere.png")
    assert names_of(open_images(tmp_path / "tree")) == ["a/2.png", "b/1.png"]


def test_fingerprint_of_a_folder(tmp_path):
    """It follows names, sizes, times and the shape asked for, not where the folder lies, and reads no image."""

    def build(root, names=("a/1.png", "b/2.png")):
        for name in names:
            os.utime(save(tmp_path / root / name), ns=(10**18, 10**18))
        return open_images(tmp_path / root)

    first = build("one")
    assert build("two").fingerprint() == first.fingerprint()
    assert first.n_images_read == 0
    others = [build("three", ("a/1.png", "c/2.png")), open_images(tmp_path / "one", image_shape=(3, 4))]
    os.utime(tmp_path / "two/a/1.png", ns=(10**18, 10**18 + 1000))
    others += [open_images(tmp_path / "two"), open_images(tmp_path / "one", [5, 6])]
    assert len({source.fingerprint() for source in [first, *others]}) == 5


# decoding


@pytest.mark.parametrize("name", ["a.pgm", "a.pnm", "a.png", "a.bmp", "a.tif", "a.TIFF"])
def test_lossless_grey_formats(tmp_path, name):
    """Every lossless grey format delivers its pixels."""
    np.testing.assert_array_equal(read_one(save(tmp_path / name))[:, :, 0], GREY)


@pytest.mark.parametrize("name", ["a.ppm", "a.png", "a.bmp", "a.tif", "a.webp"])
def test_lossless_colour_formats(tmp_path, name):
    """Every lossless colour format delivers its pixels."""
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_array_equal(read_one(save(tmp_path / name, COLOUR, **options)), COLOUR)


def test_jpeg_in_grey_and_colour(tmp_path):
    """A flat JPEG delivers its grey or colour up to the rounding of the format."""
    grey, colour = np.full((16, 16), 90, np.uint8), np.full((16, 16, 3), (200, 100, 50), np.uint8)
    found = read_one(save(tmp_path / "grey.jpg", grey))
    assert found.shape == (16, 16, 1)
    # one level of rounding in each of DCT and colour conversion
    assert np.abs(found[:, :, 0].astype(int) - grey).max() <= 1
    assert np.abs(read_one(save(tmp_path / "colour.jpg", colour, quality=95)).astype(int) - colour).max() <= 3


def test_one_bit_images(tmp_path):
    """1-bit images deliver 0 and 255."""
    for name in ("a.png", "a.pbm", "a.tif"):
        found = read_one(save(tmp_path / name, Image.fromarray(GREY > 127)))
        np.testing.assert_array_equal(found[:, :, 0], np.where(GREY > 127, 255, 0))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_images(tmp_path, order):
    """16-bit PNG, PGM and TIFF deliver float32, divided by 257; 8-bit files among them stay as they are."""
    for name in ("a/1.png", "a/2.pgm", "a/3.tif"):
        if order == "<u2" or name.endswith("tif"):
            save(tmp_path / name, DEEP.astype(order))
    save(tmp_path / "b/4.png")
    source = open_images(tmp_path)
    found = read_all(source)
    assert (source.dtype, source.image_shape, source.nbytes_) == (np.float32, (H, W, 1), len(found) * H * W * 2)
    for image in found[:-1]:
        np.testing.assert_array_equal(image[:, :, 0], DEEP.astype(np.float32) / np.float32(257))
    np.testing.assert_array_equal(found[-1, :, :, 0], GREY)


def test_float_and_32_bit_tiff(tmp_path):
    """Float and 32-bit integer TIFF deliver their values; NaN is an error that names the file."""
    values = (GREY * 1000.5).astype(np.float32)
    np.testing.assert_array_equal(read_one(save(tmp_path / "a.tif", values))[:, :, 0], values)
    whole = GREY.astype(np.int32) * 70000
    np.testing.assert_array_equal(read_one(save(tmp_path / "b.tif", whole))[:, :, 0], whole.astype(np.float32))
    values[1, 2] = np.nan
    with pytest.raises(DataError, match=r"c\.tif: images must be finite: image 0 contains NaN"):
        read_one(save(tmp_path / "c.tif", values))


def test_palettes(tmp_path):
    """A palette of greys is a grey image, one with any colour is a colour image."""
    grey = Image.fromarray(GREY // 64)
    steps = np.array([10, 90, 170, 250], np.uint8)
    for colours, name in ((np.stack([steps] * 3, 1), "grey.png"), (np.stack([steps, steps, steps[::-1]], 1), "colour.png")):
        image = grey.copy()
        image.putpalette(colours.tobytes())
        found = read_one(save(tmp_path / name, image))
        expected = colours[GREY // 64]
        np.testing.assert_array_equal(found, expected[:, :, :1] if name == "grey.png" else expected)


def test_transparency_is_laid_on_white(tmp_path):
    """RGBA, LA and palettes with a transparent colour show white where they are transparent."""
    alpha = np.where(np.arange(W) < 4, 0, 255).astype(np.uint8)[None, :].repeat(H, 0)
    found = read_one(save(tmp_path / "rgba.png", np.dstack([COLOUR, alpha])))
    assert (found[:, :4] == 255).all()
    np.testing.assert_array_equal(found[:, 4:], COLOUR[:, 4:])
    layered = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    found = read_one(save(tmp_path / "la.png", layered))
    assert found.shape == (H, W, 1)
    assert (found[:, :4] == 255).all()
    np.testing.assert_array_equal(found[:, 4:, 0], GREY[:, 4:])
    indexed = Image.fromarray((GREY > 127).astype(np.uint8))
    indexed.putpalette([0, 0, 0, 80, 80, 80])
    found = read_one(save(tmp_path / "p.png", indexed, transparency=0))
    np.testing.assert_array_equal(found[:, :, 0], np.where(GREY > 127, 80, 255))


def test_cmyk_jpeg_is_colour(tmp_path):
    """A CMYK file comes as RGB."""
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = read_one(save(tmp_path / "a.jpg", ink))
    # red, up to JPEG's rounding
    assert found.shape == (16, 16, 3)
    assert (found[:, :, 0] > 250).all()
    assert (found[:, :, 1:] < 5).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize(("orientation", "turned"), [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_exif_orientation(tmp_path, name, orientation, turned):
    """Images are read as they are shown: turned as EXIF says, with the turned size."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    found = read_one(save(tmp_path / name, pixels, exif=exif, **options))
    # JPEG's error is far below half of the range
    np.testing.assert_array_equal(found > 127, turned(pixels) > 127)


def test_animation_gives_its_first_frame(tmp_path):
    """Of several frames or pages the first is read."""
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_one(tmp_path / "a.tif")[:, :, 0], GREY)


def test_colour_is_decided_over_the_listing(tmp_path):
    """One colour file among those asked makes the source colour; grey files are repeated into its channels."""
    save(tmp_path / "a/1.png")
    save(tmp_path / "b/2.png", COLOUR)
    found = read_all(open_images(tmp_path))
    np.testing.assert_array_equal(found[0], np.dstack([GREY] * 3))
    np.testing.assert_array_equal(found[1], COLOUR)


def test_up_to_64_files_are_asked(tmp_path, monkeypatch):
    """Opening asks 64 files spread evenly, the first and last among them; a colour file beyond is named when it is read."""
    save(tmp_path / "a/000.png")
    data = (tmp_path / "a/000.png").read_bytes()
    for row in range(1, 200):
        (tmp_path / f"a/{row:03d}.png").write_bytes(data)
    asked = []
    real = images_module.read_header
    monkeypatch.setattr(images_module, "read_header", lambda path, limit: (asked.append(int(path.stem)), real(path, limit))[1])
    open_images(tmp_path)
    assert len(asked) == 64
    assert (asked[0], asked[-1]) == (0, 199)
    assert set(np.diff(asked)) == {3, 4}
    odd = next(row for row in range(200) if row not in asked)
    save(tmp_path / f"a/{odd:03d}.png", COLOUR)
    source = open_images(tmp_path)
    with pytest.raises(DataError, match=rf"{odd:03d}\.png: is a colour image where the others are grey; image_shape=\(6, 8, 3\)"):
        read_all(source)
    np.testing.assert_array_equal(read_all(open_images(tmp_path, image_shape=(H, W, 3)))[odd], COLOUR)
    grey = read_all(open_images(tmp_path, image_shape=(H, W, 1)))[odd]
    np.testing.assert_array_equal(grey[:, :, 0], np.asarray(Image.fromarray(COLOUR).convert("L")))


# sizes


def test_turned_files_have_the_size_that_is_shown(tmp_path):
    """PNG files of 6 x 9 pixels, turned by their EXIF data, are of one size with one of 9 x 6; a straight one of 6 x 9 is not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a/1.png", "a/2.png", "b/1.jpg"):
        save(tmp_path / name, np.zeros((6, 9), np.uint8), exif=exif)
    save(tmp_path / "b/2.png", np.zeros((9, 6), np.uint8))
    source = open_images(tmp_path)
    assert source.image_shape == (9, 6, 1)
    source.check()
    save(tmp_path / "b/3.png", np.zeros((6, 9), np.uint8))
    with pytest.raises(DataError, match=r"3\.png: is 6 x 9 pixels"):
        open_images(tmp_path).check()


@pytest.mark.parametrize("size", [(6, 9), (12, 4), (8, 6)])
def test_odd_size_is_named(tmp_path, size):
    """The first file of another size is named with its size and the way out, also one with as many or turned pixels."""
    save(tmp_path / "a/1.png")
    save(tmp_path / "b/2.png", np.zeros(size, np.uint8))
    source = open_images(tmp_path)
    side = min(6, *size)
    message = rf"2\.png: is {size[0]} x {size[1]} pixels .* others are 6 x 8; image_shape=\({side}, {side}\), say, stretches"
    with pytest.raises(DataError, match=message):
        read_all(source)


def varied(root, sizes):
    """A tree of grey images of these (height, width), two classes in turn."""
    for i, (height, width) in enumerate(sizes):
        save(root / "ab"[i % 2] / f"{i}.png", np.full((height, width), 8 * i, np.uint8))
    return root


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([(100, 120), (120, 100), (300, 200), (100, 120)], (96, 96)),  # half of one size, the others upright or larger
        ([(40, 60), (60, 40), (50, 50), (400, 300)], (45, 45)),  # of small ones the median of 40, 40, 50 and 300
        ([(300, 200)] * 9 + [(200, 300)], (96, 96)),  # of one size, but one upright
        ([(6, 8), (6, 8), (6, 8), (6, 9)], None),  # one odd among four
        ([(6, 8)] * 4, None),
    ],
)
def test_files_of_several_sizes_are_resized_automatically_and_one_odd_file_is_not(tmp_path, sizes, shape):
    """image_shape="auto": below three in four of one size all become squares, said once; else nothing is resized."""
    varied(tmp_path, sizes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source = open_images(tmp_path, image_shape="auto")
    if shape is None:
        assert not said and source.image_shape == (6, 8, 1) and source.reading_shape is None and "image_shape" not in source.opened_with
        return
    side = shape[0]
    assert [str(w.message) for w in said] == [
        f"{tmp_path}: the images are of several sizes, so all are stretched to {side} x {side} pixels; "
        "image_shape=(height, width) (--image-size HxW) sets another size"
    ]
    assert said[0].filename == __file__
    told = open_images(tmp_path, image_shape=np.array(shape))
    assert source.fingerprint() == told.fingerprint() and source.opened_with == told.opened_with
    assert source.reading_shape == (*shape, 1)
    np.testing.assert_array_equal(read_all(source), read_all(told))


def test_automatic_size_of_one_odd_file_is_the_error_of_always(tmp_path):
    """With "auto" one file of another size among equal ones is named, as it is without."""
    for odd in (0, 4):  # of the first file, too, it is the others that say the size
        sizes = [(6, 8)] * 5
        sizes[odd] = (9, 9)
        varied(tmp_path / str(odd), sizes)
        with pytest.raises(DataError, match=rf"{odd}\.png: is 9 x 9 pixels \(height x width\) where the others are 6 x 8; "):
            open_images(tmp_path / str(odd), image_shape="auto").check()


def test_large_images_of_one_size_are_told_of_a_smaller_one(tmp_path):
    """Images whose shorter side is above 192 pixels are used as they are, with a word on time; smaller ones, and a size given, are not."""
    for name, size in (("large", (193, 200)), ("small", (192, 400))):
        varied(tmp_path / name, [size] * 2)
    with pytest.warns(UserWarning, match=r"used in their size, 193 x 200 pixels; image_shape=\(96, 96\) \(--image-size 96x96\) takes a fr"):
        assert open_images(tmp_path / "large", image_shape="auto").image_shape == (193, 200, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(tmp_path / "small", image_shape="auto")
        open_images(tmp_path / "large", image_shape=(193, 200))
        open_images(tmp_path / "large")


def test_automatic_size_is_for_files(digits):
    """Arrays and rows are opened as without "auto"; another word is refused."""
    images, _ = digits
    assert open_images(images, image_shape="auto").opened_with == {}
    assert open_images(images.reshape(len(images), -1), image_shape="auto").image_shape == (1, 64, 1)
    with pytest.raises(ParameterError, match=r'image_shape must be .* or "auto", got \'big\''):
        open_images(images, image_shape="big")


def test_resizing(tmp_path):
    """Whole-number shrinking is the mean of the pixels, anything else bilinear; files of that size are untouched."""
    save(tmp_path / "a/1.png", np.repeat(np.repeat(GREY, 3, 0), 2, 1))
    save(tmp_path / "a/2.png")
    save(tmp_path / "a/3.png", np.full((5, 50), 77, np.uint8))
    source = open_images(tmp_path, image_shape=(H, W))
    found = read_all(source)
    assert source.image_shape == (H, W, 1)
    np.testing.assert_array_equal(found[0, :, :, 0], GREY)
    np.testing.assert_array_equal(found[1, :, :, 0], GREY)
    assert (found[2] == 77).all()
    halved = read_one(tmp_path / "a/2.png", image_shape=(3, 4))[:, :, 0]
    mean = GREY.reshape(3, 2, 4, 2).mean((1, 3))
    # Pillow rounds once per axis: half a level each
    assert np.abs(halved - mean).max() <= 1
    # the largest of the three files has 18 x 16 pixels and is declared
    assert source.scratch_bytes(4)["decoded file"] >= 18 * 16 * 4


def test_resizing_16_bit(tmp_path):
    """16-bit images are resized as floats, without rounding to 8 bits."""
    found = read_one(save(tmp_path / "a.png", DEEP), image_shape=(3, 4))[:, :, 0]
    mean = (DEEP / 257).reshape(3, 2, 4, 2).mean((1, 3))
    # float32: 2**-24 of 256 per operation, a handful of operations
    np.testing.assert_allclose(found, mean, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 8, 2), (6, 8, 4)])
def test_image_files_have_one_or_three_channels(tmp_path, shape):
    """Other channels cannot be asked of image files."""
    save(tmp_path / "a.png")
    with pytest.raises(ParameterError, match="1 or 3 channels"):
        open_images(tmp_path, image_shape=shape)


def test_deeper_file_in_an_8_bit_source_is_named(tmp_path):
    """Bits are decided when opening; a deeper file that was not asked then is an error, not rounded."""
    with pytest.raises(DataError, match=r"a\.png: has 16-bit pixels where the others have 8"):
        Decoder(H, W, 1, 8).into(save(tmp_path / "a.png", DEEP), np.empty((H, W, 1), np.uint8))
    with pytest.raises(DataError, match=r"b\.tif: has 32-bit pixels where the others have 16"):
        Decoder(H, W, 1, 16).into(save(tmp_path / "b.tif", DEEP.astype(np.float32)), np.empty((H, W, 1), np.float32))


def test_one_file_of_another_size_is_found_before_anything_runs(tmp_path, monkeypatch):
    """`check` asks every file of a small folder for its size, as shown; of a large one only those asked when it was opened."""
    for row in range(100):
        save(tmp_path / f"a/{row:03d}.png")
    open_images(tmp_path).check()
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "a/050.jpg", exif=turned)
    monkeypatch.setattr(Decoder, "into", None)
    with pytest.raises(DataError, match=rf"050\.jpg: is {W} x {H} pixels"):
        open_images(tmp_path).check()
    open_images(tmp_path, image_shape=(H, W)).check()
    monkeypatch.setattr(images_module, "_CHECKED", 100)
    open_images(tmp_path).check()


# bad files


def test_text_named_png_is_found_when_opening(tmp_path):
    """A text file named .png, an empty one and a format not allowed are errors of one line that name the file."""
    save(tmp_path / "a/1.png")
    for content in (b"no image\nat all", b""):
        (tmp_path / "a/2.png").write_bytes(content)
        with pytest.raises(FileError, match=r"2\.png: cannot be decoded \(not an image of a known format\); repair it, .* \(--skip-bad\)$"):
            open_images(tmp_path)
    save(tmp_path / "a/2.png", format="GIF")
    with pytest.raises(FileError, match="not an image of a known format"):
        open_images(tmp_path)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.pgm", "x.bmp", "x.tif", "x.webp"])
def test_truncated_file_is_named(tmp_path, name):
    """A file cut in half is an error that names it, whatever its format, and never half an image."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    truncated(save(tmp_path / name, np.dstack([pixels] * 3) if name == "x.webp" else pixels))
    with pytest.raises(FileError, match=r"x\.\w+: cannot be decoded \([^\n]*\)$"):
        read_one(tmp_path / name)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_vanished_file_is_named(tmp_path):
    """A file that goes away between opening and reading is named."""
    save(tmp_path / "a/1.png")
    source = open_images(tmp_path)
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(FileError, match=r"1\.png: cannot be opened \(No such file"):
        read_all(source)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    """A file that promises too many pixels is refused by its header, with Pillow's globals as they were."""
    (tmp_path / "bomb.pgm").write_bytes(b"P5 80000 80000 255\n")
    (tmp_path / "large.pgm").write_bytes(b"P5 9000 9900 255\n")
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for name in ("bomb.pgm", "large.pgm"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(FileError, match=rf"{name}: "):
                open_images(tmp_path / name)
    assert limit == Image.MAX_IMAGE_PIXELS


def make_tree_with_bad_files(root, n_files, bad):
    """A tree of two classes whose files `bad` are cut short."""
    save(root / "a/0000.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    whole = (root / "a/0000.png").read_bytes()
    (root / "b").mkdir()
    for row in range(n_files):
        data = whole[: len(whole) // 2] if row in bad else whole
        (root / f"{'ab'[row % 2]}/{row:04d}.png").write_bytes(data)


def test_skipping_bad_files(tmp_path):
    """on_error="skip" leaves bad files out, lists path and reason, and a run told of them decides the same without a pass."""
    make_tree_with_bad_files(tmp_path, 200, bad={0, 7})
    with pytest.raises(FileError, match=r"0000\.png: cannot be decoded"):
        read_all(open_images(tmp_path))
    source = open_images(tmp_path, on_error="skip")
    assert [name for name, _ in source.bad_files] == ["a/0000.png", "b/0007.png"]
    assert all("cannot be decoded" in reason and str(tmp_path) not in reason for _, reason in source.bad_files)
    assert source.n_samples == len(read_all(source)) == 198
    assert "a/0000.png" not in names_of(source)
    assert np.bincount(source.labels).tolist() == [99, 99]
    assert source.nbytes_ == 198 * 64 * 64

    for on_error in ("raise", "skip"):
        again = open_images(tmp_path, on_error=on_error, known_bad=source.bad_files)
        assert again.n_images_read == 0
        assert again.bad_files == source.bad_files
        assert names_of(again) == names_of(source)
        assert again.fingerprint() == source.fingerprint()
        np.testing.assert_array_equal(again.labels, source.labels)
    assert open_images(tmp_path, on_error="skip", known_bad=[]).n_images_read == 0
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert (copy.bad_files, names_of(copy)) == (source.bad_files, names_of(source))
    given = open_images(tmp_path, np.arange(200), on_error="skip")
    assert given.classes_[given.labels][:3].tolist() == [1, 2, 3]


def test_fingerprint_does_not_depend_on_bad_files(tmp_path):
    """The folder is the same whether bad files are looked for, known or not met yet."""
    make_tree_with_bad_files(tmp_path, 200, bad={7})
    prints = [
        open_images(tmp_path, **options).fingerprint()
        for options in ({}, {"on_error": "skip"}, {"known_bad": [("b/0007.png", "x")]}, {"known_bad": [("a/0008.png", "x")]})
    ]
    assert len(set(prints)) == 1


def test_odd_files_are_skipped_too(tmp_path):
    """Files that read well but do not fit the others count as bad when skipping, so that reading never stops."""
    make_tree_with_bad_files(tmp_path, 300, bad=())
    save(tmp_path / "a/0100.png", np.zeros((5, 5), np.uint8))
    save(tmp_path / "b/0103.png", np.zeros((64, 64, 3), np.uint8))
    assert len(open_images(tmp_path, image_shape=(64, 64), on_error="skip").bad_files) <= 1
    source = open_images(tmp_path, on_error="skip")
    assert "is 5 x 5 pixels" in dict(source.bad_files)["a/0100.png"]
    assert len(read_all(source)) == source.n_samples


@pytest.mark.parametrize(("n_files", "n_bad"), [(2, 0), (3, 1), (6, 2), (7, 3), (40, 3), (399, 3), (400, 4)])
def test_more_than_a_few_bad_files_are_refused(tmp_path, n_files, n_bad):
    """So many bad files may be skipped, 1 % or 3 that are fewer than half; one more is refused with their number and the first reason."""
    bad = range(1, 1 + n_bad)
    make_tree_with_bad_files(tmp_path, n_files, bad)
    assert len(open_images(tmp_path, on_error="skip").bad_files) == n_bad
    (tmp_path / "ba"[n_bad % 2] / f"{n_bad + 1:04d}.png").write_text("no")
    with pytest.raises(DataError, match=rf"but {n_bad + 1} of {n_files} in .* cannot be used, the first: [ab]/\d+\.png: cannot be decoded"):
        open_images(tmp_path, on_error="skip")


def test_folder_of_only_bad_files(tmp_path):
    """When no file can be read, skipping says so with the reason; leaving all out is refused."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_text("no")
    with pytest.raises(DataError, match=r"none of 1 files asked of 1 can be read, the last reason: .*1\.png"):
        open_images(tmp_path, on_error="skip")
    save(tmp_path / "a/1.png")
    with pytest.raises(DataError, match="all 1 files are in known_bad"):
        open_images(tmp_path, known_bad=[("a/1.png", "")])


def test_class_that_loses_its_only_file(tmp_path):
    """A class whose only file is left out is no class any more."""
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        save(tmp_path / name)
    source = open_images(tmp_path, known_bad=[("b/2.png", "x")])
    assert (source.classes_.tolist(), source.labels.tolist()) == (["a", "c"], [0, 1])


def test_declared_names(tmp_path):
    """The list of names is declared with at least the bytes of its characters."""
    for row in range(9):
        save(tmp_path / f"a/{row}.png")
    source = open_images(tmp_path)
    assert isinstance(source, FolderSource)
    held = source.scratch_bytes(4)
    assert held["names"] >= 9 * len("a/0.png")
    assert set(held) == {"labels", "names", "decoded file"}
