"""Make an HDF5 data set of any size from a folder of images, or from digits: to try what does not fit in memory.

python tools/make_dataset.py out.h5 --from photos/ --size 96x96 --bytes 20GiB
python tools/make_dataset.py out.h5 --from digits --size 64x64 --rows 1000000

Rows are seeded crops, mirrored or not, lighter or darker (see `streamcnn.variations`); the file holds `images` and `labels`, and
`label_names` where labels are names. Memory stays below 300 MiB, and 8 bytes an image.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from streamcnn.datasets import load_digits_images
from streamcnn.errors import StreamCNNError
from streamcnn.images import ImageSource, open_images, write_images_h5
from streamcnn.memory import format_bytes, parse_bytes
from streamcnn.variations import VariedImages

_BLOCK_BYTES = 16 << 20


def make(path: Path, originals: ImageSource, n_rows: int, size: tuple[int, int], seed: int = 0, mirror: bool = True) -> VariedImages:
    """Write `n_rows` variations of `originals` to `path`."""
    stream = VariedImages(originals, n_rows, size, seed, mirror)
    labels, classes = stream.labels, stream.classes_
    assert labels is not None and classes is not None
    rows = max(1, _BLOCK_BYTES // stream.row_values)

    def blocks(bar):
        start = 0
        for images, _, _ in stream.blocks(rows):
            yield images, labels[start : start + len(images)]
            start += len(images)
            bar.update(images.nbytes)

    with tqdm(total=stream.nbytes_, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr) as bar:
        names = classes.tolist() if classes.dtype.kind == "U" else None
        write_images_h5(path, blocks(bar), n_rows, stream.image_shape, np.uint8, names)
    return stream


def main(arguments: list[str] | None = None) -> int:
    """Read the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .h5 file to write")
    parser.add_argument("--from", dest="origin", required=True, metavar="FOLDER", help='a class-per-folder tree of images, or "digits"')
    parser.add_argument("--size", default="96x96", metavar="HxW", help="pixels of each image")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--rows", type=int, metavar="N", help="images to make")
    amount.add_argument("--bytes", metavar="SIZE", help='pixels to make, such as "20GiB"')
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--no-mirror", action="store_true", help="for what has a right way round (digits never are mirrored)")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"\d+x\d+", args.size):
        parser.error(f"--size must look like 96x96, got {args.size!r}")
    height, width = map(int, args.size.split("x"))
    try:
        digits = args.origin == "digits"
        source = open_images(*load_digits_images(32)) if digits else open_images(args.origin, need_labels=True)
        row_bytes = math.prod((height, width, source.image_shape[2]))
        n_rows = args.rows if args.rows is not None else -(-parse_bytes(args.bytes) // row_bytes)
        stream = make(args.path, source, n_rows, (height, width), args.seed, mirror=not (digits or args.no_mirror))
    except StreamCNNError as error:
        print(f"make_dataset: {error}", file=sys.stderr)  # noqa: T201 - a tool's own words
        return 1
    sizes = f"{stream.n_samples} images of {height} x {width} x {stream.image_shape[2]}, {format_bytes(stream.nbytes_)}"
    print(f"{args.path}: {sizes}, {len(stream.classes_)} classes", file=sys.stderr)  # type: ignore[arg-type]  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
