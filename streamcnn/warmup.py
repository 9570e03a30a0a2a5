"""Compile every kernel now, by using it once on a few pixels: `streamcnn warmup`, and before anything is timed."""

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

from streamcnn.datasets import enlarged_digits
from streamcnn.fitting import fit_model
from streamcnn.kernels import ACTIVATIONS, POOLS, checksum, cpu, half, jit, peak, warp
from streamcnn.memory import MemoryMonitor, machine_bytes
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import Progress
from streamcnn.system import trim_heap


def compile_kernels() -> dict[str, Any]:
    """Compile the CPU kernels, or load them from the cache on disk.

    Returns
    -------
    dict
        `seconds`; `compiled` and `cached`, the numbers of kernels compiled now and found on disk; `cache`, the folder in which
        the next process finds them, null where none can be written.
    """
    start = time.perf_counter()
    images = np.zeros((1, 4, 4, 1), np.uint8)
    floats = np.empty(images.shape, np.float32)
    edges = np.arange(3)
    filters, bias, out = np.ones((1, 3, 3, 1), np.float32), np.zeros(1, np.float32), np.empty((1, 2, 2, 1), np.float32)
    for norm in (None, 1.0):
        scratch = np.empty((1, cpu.conv_scratch((4, 4, 1), filters.shape, out.shape[1:], 0, norm)), np.float32)
        cpu.conv_layer(images, filters, bias, 1, 0, ACTIVATIONS["relu"], 0.0, POOLS["mean"], edges, edges, scratch, out, norm)
    cpu.standardize(images, floats)
    cpu.log(images, floats)
    cpu.local_contrast(images, 3, 1.0, np.empty((1, cpu.contrast_scratch((4, 4, 1), 3)), np.float32), floats)
    narrow = np.empty(floats.shape, np.float16)
    half.narrow(floats, narrow)
    half.widen(narrow, floats)
    checksum.fletcher32(narrow)
    pictures = np.zeros((1, 4, 4), np.float32)
    keys, rows = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    warp.warp(pictures, keys, rows, np.empty((1, 4, 4), np.uint8))
    warp.crop(images, keys, rows, True, np.empty(images.shape, np.uint8))
    peak.multiply_add_rate(1, 1)
    stats = [kernel.stats for kernel in jit.CACHED]
    folders = {s.cache_path for s in stats if s.cache_path is not None}
    return {
        "seconds": time.perf_counter() - start,
        "compiled": sum(sum(s.cache_misses.values()) for s in stats),
        "cached": sum(sum(s.cache_hits.values()) for s in stats),
        "cache": next(iter(folders), None),
    }


def warm_up(settings: Settings) -> None:
    """Compile or load whatever a fit with `settings` needs, by the same job on a few small images.

    First in a process of its own, so that the compiler's 100 MiB and more end with it; this one then reads the kernels from disk. Where
    that process fails, or no kernel can be kept on disk, they are compiled here.
    """
    chosen = [settings.preset, str(settings.n_jobs), settings.device]
    subprocess.run([sys.executable, "-P", "-m", "streamcnn.warmup", *chosen], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _small_job(settings)
    trim_heap()


def _small_job(settings: Settings) -> None:
    few = tuple(replace(layer, n_filters=min(layer.n_filters, 16)) for layer in settings.layers)
    settings = replace(settings, layers=few)
    with MemoryMonitor() as monitor, enlarged_digits(64, 64) as source:
        fit_model(source, settings, None, machine_bytes(), Progress(), monitor)


if __name__ == "__main__":
    preset, n_jobs, device = sys.argv[1:]
    _small_job(resolve_settings(preset, n_jobs=int(n_jobs), device=device))
