"""Measures the CUDA convolution against PyTorch with cuDNN: `python -m streamcnn.gpubench` on a machine with a device.

Float32 on both sides, TF32 off. Two comparisons: kernels alone, with everything on the device (PyTorch's images already float32, in
the better of its two layouts), and end to end from images to features in host memory, which both sides round to float16 on the
device. Contenders take turns; medians are kept.
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from streamcnn.kernels import ACTIVATIONS, POOLS, get_kernels


class Case(NamedTuple):
    """A convolution with ReLU and mean pooling; `dtype` is that of the images."""

    n: int
    height: int
    width: int
    channels: int
    n_filters: int
    kernel: int
    pool: int
    dtype: str

    @property
    def conv_shape(self) -> tuple[int, int]:
        return self.height - self.kernel + 1, self.width - self.kernel + 1

    @property
    def flop(self) -> int:
        """Of the conv rows and columns that reach a cell: two per multiply-add."""
        rows, cols = (length // self.pool * self.pool for length in self.conv_shape)
        return 2 * self.n * rows * cols * self.n_filters * self.kernel**2 * self.channels

    def __str__(self):
        size = f"{self.n}, {self.height}x{self.width}"
        return f"{size}, {self.channels} -> {self.n_filters}, {self.kernel}, {self.pool}"


CASES = (
    Case(512, 32, 32, 3, 64, 5, 2, "uint8"),
    Case(512, 32, 32, 3, 256, 5, 2, "uint8"),
    Case(512, 28, 28, 1, 64, 5, 2, "uint8"),
    Case(64, 192, 168, 1, 32, 7, 2, "uint8"),
    Case(128, 96, 84, 16, 32, 5, 2, "float32"),
    Case(256, 14, 14, 64, 128, 5, 2, "float32"),
)


def conv_cuda_rows(cases=CASES, repeats: int = 7, seconds: float = 0.05, n_threads: int = 4, rival: bool = True) -> dict[str, Any]:
    """The table.

    Parameters
    ----------
    cases : sequence of Case
    repeats : int
        Turns of each contender; medians are of these.
    seconds : float
        Least time of a turn: short work is done several times.
    n_threads : int
        Host threads that copy.
    rival : bool
        Measure PyTorch too; it has to be installed with CUDA.

    Returns
    -------
    dict
        `device`, `torch` (version or None), `peak_gflops` (measured multiply-adds) and `rows`; for each case `case`, `gflops`,
        `fraction_of_peak`, `kernel_seconds`, `wall_seconds` (end to end), `copy_seconds` (end to end without the kernel),
        `wall_to_larger` (wall over the larger of kernel and copies), and, where PyTorch is measured, `torch_kernel_seconds`,
        `torch_layout`, `torch_wall_seconds`, `kernel_ratio` and `wall_ratio` (above 1: ours is faster) and `largest_difference`
        (relative to the largest feature).

    Raises
    ------
    DeviceError
        Without a CUDA device.
    """
    kernels = get_kernels("cuda")
    # on a device's machine only
    from streamcnn.kernels.cudadevice import cuda, device_name

    torch: Any = importlib.import_module("torch") if rival else None
    if torch:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    peak = measure_peak(cuda, repeats, seconds)
    rows = [_row(case, kernels, torch, peak, repeats, seconds, n_threads) for case in cases]
    return {"device": device_name(), "torch": torch.__version__ if torch else None, "peak_gflops": peak, "rows": rows}


def _row(case: Case, kernels, torch, peak: float, repeats: int, seconds: float, n_threads: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (case.n, case.height, case.width, case.channels)).astype(case.dtype)
    filters = rng.normal(size=(case.n_filters, case.kernel, case.kernel, case.channels)).astype(np.float32) / 100
    bias = rng.normal(size=case.n_filters).astype(np.float32)
    out, contenders = _ours(case, kernels, images, filters, bias, n_threads)
    if torch is not None:
        theirs, rivals = _theirs(case, torch, images, filters, bias)
        contenders |= rivals
    took = take_turns(contenders, repeats, seconds)
    kernel, wall, copies = took["kernel"], took["wall"], took["copies"]
    row = {
        "case": str(case),
        "gflops": case.flop / kernel / 1e9,
        "fraction_of_peak": case.flop / kernel / 1e9 / peak,
        "kernel_seconds": kernel,
        "wall_seconds": wall,
        "copy_seconds": copies,
        "wall_to_larger": wall / max(kernel, copies),
    }
    if torch is not None:
        layout = min(("contiguous", "channels_last"), key=lambda name: took[f"torch {name}"])
        row |= {
            "torch_kernel_seconds": took[f"torch {layout}"],
            "torch_layout": layout,
            "torch_wall_seconds": min(took["torch wall contiguous"], took["torch wall channels_last"]),
            "kernel_ratio": took[f"torch {layout}"] / kernel,
            "wall_ratio": min(took["torch wall contiguous"], took["torch wall channels_last"]) / wall,
            "largest_difference": float(np.abs(theirs() - out).max() / np.abs(out).max()),
        }
    return row


def _ours(case: Case, kernels, images, filters, bias, n_threads: int) -> tuple[np.ndarray, dict[str, tuple[Callable, Callable]]]:
    """The features, and for each measurement what starts the work and what waits for it."""
    cuda = kernels.cuda
    rows, cols = (np.arange(length // case.pool + 1) * case.pool for length in case.conv_shape)
    out = np.zeros((case.n, len(rows) - 1, len(cols) - 1, case.n_filters), np.float16)
    scratch = np.empty((n_threads, kernels.conv_scratch(images.shape[1:], filters.shape, out.shape[1:], 0)), np.float32)
    codes = (1, 0, ACTIVATIONS["relu"], 0.0, POOLS["mean"], rows, cols)
    tile = kernels.choose_tile(case.n_filters, filters[0].size, False)
    launch, *_ = kernels.prepare_conv(images.shape[1:], filters, bias, *codes, tile)
    stream = cuda.stream()
    on_device, result = cuda.to_device(images.reshape(-1)), cuda.device_array(out.size, np.float32)

    def wall():
        kernels.conv_layer(images, filters, bias, *codes, scratch, out)

    def copies():
        kernels.stream_chunks(images, unused, scratch.nbytes, n_threads, lambda *arguments: None)

    unused = np.empty_like(out)
    wall()
    return out, {
        "kernel": (lambda: launch(stream, on_device, result, None, case.n), stream.synchronize),
        "wall": (wall, _nothing),
        "copies": (copies, _nothing),
    }


def _theirs(case: Case, torch, images, filters, bias) -> tuple[Callable, dict[str, tuple[Callable, Callable]]]:
    """PyTorch's features, and the same for it; end to end it copies through page-locked memory, too, and pools on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    host = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, channels, height, width) of images that stay as they lie
    pinned = torch.empty(images.shape, dtype=torch.from_numpy(images[:0]).dtype, pin_memory=device.type == "cuda").permute(0, 3, 1, 2)
    contenders: dict[str, tuple[Callable, Callable]] = {}
    shape = (case.n, case.n_filters, *(length // case.pool for length in case.conv_shape))
    fetched = torch.empty(shape, dtype=torch.float16, pin_memory=device.type == "cuda")
    biases = torch.from_numpy(bias).to(device)

    def compute(x, weights):
        with torch.inference_mode():
            return torch.nn.functional.avg_pool2d(torch.relu_(torch.nn.functional.conv2d(x, weights, biases)), case.pool)

    def end_to_end(weights, memory):
        pinned.copy_(host)
        x = pinned.to(device, non_blocking=True).float().contiguous(memory_format=memory)
        fetched.copy_(compute(x, weights).half(), non_blocking=True)
        wait()

    for name, memory in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        weights = torch.from_numpy(filters).permute(0, 3, 1, 2).contiguous(memory_format=memory).to(device)
        x = host.float().contiguous(memory_format=memory).to(device)
        contenders[f"torch {name}"] = (lambda x=x, weights=weights: compute(x, weights), wait)
        contenders[f"torch wall {name}"] = (lambda weights=weights, memory=memory: end_to_end(weights, memory), _nothing)
    return lambda: fetched.permute(0, 2, 3, 1).float().numpy(), contenders


def _nothing() -> None:
    pass


def take_turns(contenders: dict[str, tuple[Callable, Callable]], repeats: int, seconds: float) -> dict[str, float]:
    """Median seconds of each contender's work, the contenders one after the other in every turn.

    Each is (start, wait): work is started as often as fills `seconds`, then waited for.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    often = {}
    for name, contender in contenders.items():
        _clock(*contender, 1)  # compiles
        often[name] = max(1, int(seconds / max(_clock(*contender, 1), 1e-6)))
    for _ in range(repeats):
        for name, contender in contenders.items():
            times[name].append(_clock(*contender, often[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _clock(start: Callable, wait: Callable, often: int) -> float:
    wait()
    began = time.perf_counter()
    for _ in range(often):
        start()
    wait()
    return (time.perf_counter() - began) / often


def measure_peak(cuda, repeats: int, seconds: float, blocks: int = 4096, turns: int = 2048) -> float:
    """GFLOP/s of float32 multiply-adds that need nothing but registers: 16 independent chains a thread."""
    from streamcnn.kernels.cudaloops import multiply_adds

    stream, out = cuda.stream(), cuda.device_array(blocks, np.float32)

    def start():
        multiply_adds[blocks, 256, stream](np.float32(0.999), turns, out)

    return 2 * 16 * 256 * blocks * turns / take_turns({"peak": (start, stream.synchronize)}, repeats, seconds)["peak"] / 1e9


if __name__ == "__main__":
    sys.stdout.write(json.dumps(conv_cuda_rows(), indent=1) + "\n")
