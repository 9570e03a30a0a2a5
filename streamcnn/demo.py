"""The demonstration: digits enlarged and varied until they are twice the memory limit, written to disk and read from there."""

from pathlib import Path

import numpy as np

from streamcnn.datasets import digits_split, enlarged_digits
from streamcnn.images import write_images_h5
from streamcnn.plan import make_plan
from streamcnn.presets import Settings
from streamcnn.progress import Progress
from streamcnn.system import trim_heap

SIZE = 64
BLOCK = 4096
TEST_SHARE = 8


def check_limit(n_images: int, settings: Settings, limit: int) -> None:
    """Refuse a limit that is too small before a gigabyte is written: the plan of the same images, not yet made.

    Raises
    ------
    MemoryBudgetError
    """
    n_test = n_images // TEST_SHARE
    with enlarged_digits(n_images - n_test, SIZE) as source, enlarged_digits(n_test, SIZE) as test:
        make_plan(source, settings, limit, None, test)


def make_data(folder: Path, n_images: int, seed: int, progress: Progress) -> tuple[Path, Path]:
    """Write `train.h5` and, an eighth of all images, `test.h5`; no variant of a test digit is among the training images.

    Returns
    -------
    train, test : Path, Path
    """
    originals = digits_split(seed)
    n_test = n_images // TEST_SHARE
    paths = (folder / "train.h5", folder / "test.h5")
    with progress.bar("make", n_images) as update:
        for path, n, chosen in ((paths[0], n_images - n_test, originals), (paths[1], n_test, ~originals)):
            stream = enlarged_digits(n, SIZE, seed, originals=np.flatnonzero(chosen))

            def blocks(stream=stream):
                for images, labels, _ in stream.blocks(BLOCK):
                    yield images, labels
                    update(len(images))

            write_images_h5(path, blocks(), n, (SIZE, SIZE, 1), np.uint8)
    trim_heap()
    return paths
