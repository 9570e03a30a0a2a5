"""Measured: extraction from an HDF5 file to a store, against its parts, under limits, and against a convolution in memory."""

import io
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from streamcnn import safetybench
from streamcnn.errors import StreamCNNError
from streamcnn.features import FeatureExtractor
from streamcnn.files import scratch_folder
from streamcnn.images import ImageSource, open_images
from streamcnn.kernels import get_kernels
from streamcnn.layers import ConvLayer, resolve_layers
from streamcnn.memory import MemoryMonitor, parse_bytes
from streamcnn.network import Network
from streamcnn.pipeline import Run, draw_filters
from streamcnn.plan import Plan, make_plan
from streamcnn.presets import Settings, resolve_settings
from streamcnn.progress import Progress
from streamcnn.safetybench import verify_speed
from streamcnn.shards import shard_rows
from streamcnn.store import FeatureStore
from streamcnn.timing import medians, torch_with
from streamcnn.warmup import compile_kernels

# CIFAR-10's size and the features of the measurement it is compared with: 64 filters of 5 x 5, pooled over 4 x 4
N_IMAGES, SHAPE = 50_000, (32, 32, 3)
LAYERS = [ConvLayer(64, 5, filters="random", pool_size=4)]
LIMITS = {"512 MiB": "512MiB", "unlimited": "1TiB"}
_BATCH = 512


def extraction(n_threads: int, repeats: int, shrink: int) -> dict[str, Any]:
    """Seconds of whole extractions and of their parts, run in turn.

    Returns
    -------
    dict
        - `images`, `shape`, `features`
        - `start_seconds` : from the command `streamcnn fit` to its first chunk, with the kernels on disk
        - `limited_seconds` : limit to seconds of the extraction in a fresh process that runs under it
        - `speed_under_limit` : unlimited seconds to those under 512 MiB
        - `extract_seconds` : from `.h5` to a store, checksums, hashes and flushing to disk included
        - `parts_seconds` : `convolve` (pixels in memory to rounded rows), `read` (HDF5 to pixels) and `write` (rounded rows to a
          store), each alone
        - `overlap` : `extract_seconds` to the larger of `convolve`, and `read` plus `write`
        - `torch_seconds` : layout to seconds of PyTorch's convolution, ReLU and mean pooling of the same images in memory, by batches
          of 512, or null; `ratio` : the best of them to `extract_seconds`
        - `protection` : `extract_seconds` to those without checksums, hashes and flushing, run in turn
        - `verify` : see `safetybench.verify_speed`
    """
    compile_kernels()  # onto the disk: a process under 512 MiB that had to compile would have no room for much else
    folder, torch = scratch_folder(), torch_with(n_threads)
    path = folder / "images.h5"
    try:
        n = max(2048, N_IMAGES // shrink)
        images = np.random.default_rng(0).integers(0, 256, (n, *SHAPE), dtype=np.uint8)
        with h5py.File(path, "w", libver=("v110", "v110")) as file:
            file.create_dataset("images", data=images, chunks=(341, *SHAPE), fletcher32=True)
            file["labels"] = np.arange(n) % 10
        limited: dict[str, list[float]] = {name: [] for name in LIMITS}
        starts = []
        for _ in range(repeats):
            starts.append(_start_seconds(path, n_threads))
            for name, limit in LIMITS.items():
                command = [sys.executable, "-P", "-m", "streamcnn.iobench", str(path), limit, str(n_threads)]
                limited[name].append(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        under = {name: statistics.median(values) for name, values in limited.items()}
        with open_images(path) as source:
            checked = verify_speed(folder, repeats, shrink)
            works, network = _works(source, images, n_threads, folder)
            rivals = {} if torch is None else _torch_works(torch, images, network)
            seconds = medians(works | rivals, repeats, after=partial(_remove_store, folder))
            parts = {name: seconds[name] for name in ("convolve", "read", "write")}
            rival = {name: seconds[name] for name in rivals} or None
            return {
                "images": n,
                "shape": list(SHAPE),
                "features": network.n_features,
                "start_seconds": statistics.median(starts),
                "limited_seconds": under,
                "speed_under_limit": under["unlimited"] / under["512 MiB"],
                "extract_seconds": seconds["extract"],
                "parts_seconds": parts,
                "overlap": seconds["extract"] / max(parts["convolve"], parts["read"] + parts["write"]),
                "torch_seconds": rival,
                "ratio": min(rival.values()) / seconds["extract"] if rival else None,
                "protection": seconds["extract"] / seconds["unprotected"],
                "verify": checked,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_seconds(path: Path, n_threads: int) -> float:
    """Seconds from starting `streamcnn fit` to its extraction's first line, written when the first chunk begins; the fit ends there."""
    store = path.with_name("started")
    command = [sys.executable, "-P", "-m", "streamcnn", "fit", str(path), "--model", str(path.with_name("model.h5")), "--store", str(store)]
    start, said = time.perf_counter(), b""
    with subprocess.Popen([*command, "--threads", str(n_threads), "--device", "cpu"], stderr=subprocess.PIPE) as child:
        assert isinstance(child.stderr, io.BufferedReader)
        try:
            while b"\nextract" not in said:
                part = child.stderr.read1()
                if not part:
                    raise StreamCNNError(f"fit ended before its extraction: {said.decode(errors='replace')}")
                said += part
            return time.perf_counter() - start
        finally:
            child.kill()
            child.wait()
            shutil.rmtree(store, ignore_errors=True)  # or the next fit would find its filters drawn


def _settings(n_threads: int) -> Settings:
    # what comes after the extraction is not run: it must not decide which limit is enough
    after: dict[str, Any] = {"n_components": 16, "pca_solver": "incremental", "kernel": "linear"}
    return resolve_settings("fast", n_jobs=n_threads, layers=LAYERS, device="cpu", keep_features=True, **after)


def extract(source: ImageSource, plan: Plan, n_threads: int, folder: Path, network: Network, protected: bool = True) -> None:
    """From the source to a new store below `folder`; not `protected`, without checksums, hashes and flushing."""
    with MemoryMonitor(plan.limit) as monitor, FeatureStore.create(folder / "store", durable=protected) as store:
        store.checksums = protected
        Run(source, _settings(n_threads), store, plan, Progress(0, monitor), monitor).extract(network)


def _remove_store(folder: Path) -> None:
    """Not part of what is timed: taking 313 MB off the disk again takes 0.1 s (measured)."""
    shutil.rmtree(folder / "store", ignore_errors=True)


def main(path: str, limit: str, n_threads: str) -> None:
    """Print the seconds of an extraction under a limit; run as a process of its own."""
    with open_images(path) as source:
        settings, folder = _settings(int(n_threads)), Path(path).parent
        plan = make_plan(source, settings, parse_bytes(limit), folder)
        network = Network(plan.geometry, settings.preprocess, mirror=settings.mirror)
        draw_filters(network, source, settings, get_kernels("cpu"))
        start = time.perf_counter()
        extract(source, plan, int(n_threads), folder, network)
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        _remove_store(folder)


def _works(source: ImageSource, images: np.ndarray, n_threads: int, folder: Path) -> tuple[dict[str, Callable[[], object]], Network]:
    """What is timed: the whole, and its parts."""
    kernels, settings = get_kernels("cpu"), _settings(n_threads)
    n_features = Network(resolve_layers(LAYERS, SHAPE), ()).n_features
    rows = np.zeros((len(images), n_features), settings.feature_dtype)
    rows.fill(0)  # resident before the plan is made
    plan = make_plan(source, settings, parse_bytes(LIMITS["unlimited"]), folder)
    network = Network(plan.geometry, settings.preprocess, mirror=settings.mirror)
    draw_filters(network, source, settings, kernels)
    chunk, size = plan.chunk_size, shard_rows(n_features, rows.itemsize)

    def convolve() -> None:
        extractor = FeatureExtractor(source, network, settings.feature_dtype, chunk, settings.n_jobs, kernels)
        for start in range(0, len(images), chunk):
            rows[start : start + chunk] = extractor.convolve(images[start : start + chunk])

    def read() -> None:
        pixels = np.empty((chunk, *source.image_shape), source.dtype)
        for start in range(0, source.n_samples, chunk):
            source.read(start, min(start + chunk, source.n_samples), pixels)

    def write() -> None:
        with FeatureStore.create(folder / "store") as store:
            for shard, first in enumerate(range(0, len(rows), size)):
                part = rows[first : first + size]
                with store.writing("features", shard, first, len(part), rows.shape[1], rows.dtype, "") as writer:
                    for start in range(0, len(part), chunk):
                        writer.write(part[start : start + chunk], None)

    whole = partial(extract, source, plan, n_threads, folder, network)
    bare = partial(whole, protected=False)
    return {"extract": whole, "unprotected": bare, "convolve": convolve, "read": read, "write": write}, network


def _torch_works(torch: Any, images: np.ndarray, network: Network) -> dict[str, Callable[[], object]]:
    """PyTorch's convolution of the images in memory, batch by batch, in both layouts."""
    weights = torch.from_numpy(network.filters[0]).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    functional = torch.nn.functional

    def convolve(layout) -> None:
        w = weights.contiguous(memory_format=layout)
        for start in range(0, len(images), _BATCH):
            x = pixels[start : start + _BATCH].to(torch.float32, memory_format=layout)
            functional.avg_pool2d(torch.relu_(functional.conv2d(x, w)), 4)

    layouts = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    return {name: partial(convolve, layout) for name, layout in layouts.items()}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    height, width, channels = result["shape"]
    what = f"{result['images']:,} images of {height} x {width} x {channels} to {result['features']:,} features"
    lines = [f"| {what} | seconds |", "|---|---|"]
    lines += [f"| `.h5` to store, fresh process, {name} | {seconds:.2f} |" for name, seconds in result["limited_seconds"].items()]
    lines.append(f"| `.h5` to store | {result['extract_seconds']:.2f} |")
    lines += [f"| only {name} | {seconds:.2f} |" for name, seconds in result["parts_seconds"].items()]
    lines += safetybench.rows_of_table(result["verify"])
    for name, seconds in (result["torch_seconds"] or {}).items():
        lines.append(f"| PyTorch {name}: convolution alone, images in memory | {seconds:.2f} |")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> list[str]:
    """What the table does not say, one fact a line."""
    lines = [
        f"extraction under 512 MiB runs at {100 * result['speed_under_limit']:.0f} % of the unlimited speed; "
        f"it takes {result['overlap']:.2f} times its longest part (convolution, or reading and writing)"
    ]
    lines.append(f"checksums, hashes and flushing to disk make an extraction take {result['protection']:.2f} times as long as without them")
    lines.append(safetybench.summary(result["verify"]))
    lines.append(f"`streamcnn fit` starts its first chunk {result['start_seconds']:.1f} s after the command, kernels being on disk")
    if result["ratio"]:
        lines.append(f"PyTorch's convolution alone takes {result['ratio']:.1f} times as long as the whole extraction")
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:])
