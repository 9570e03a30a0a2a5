"""The demonstration: digits enlarged and varied until they are twice the memory limit, written to disk and read from there."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from streamcnn.datasets import digits_split, enlarged_digits
from streamcnn.fitting import fit_model
from streamcnn.images import write_images_h5
from streamcnn.memory import MemoryMonitor, machine_bytes
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import Progress
from streamcnn.system import trim_heap

SIZE = 64
BLOCK = 4096
TEST_SHARE = 8


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


def warm_up(settings: Settings) -> None:
    """Compile every kernel the demo needs, by the same job on a few images.

    First in a process of its own, so that the compiler's 100 MiB and more end with it; this one then reads the kernels from disk. Where
    that process fails, or no kernel can be kept on disk, they are compiled here.
    """
    chosen = [settings.preset, str(settings.n_jobs), settings.device]
    subprocess.run([sys.executable, "-P", "-m", "streamcnn.demo", *chosen], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _small_job(settings)
    trim_heap()


def _small_job(settings: Settings) -> None:
    with MemoryMonitor() as monitor, enlarged_digits(64, SIZE) as source:
        fit_model(source, settings, None, machine_bytes(), Progress(), monitor)


if __name__ == "__main__":
    preset, n_jobs, device = sys.argv[1:]
    _small_job(resolve_settings(preset, n_jobs=int(n_jobs), device=device))
