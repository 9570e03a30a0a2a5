"""Measured figures of this machine: `streamcnn bench`.

Each benchmark is a function of `BENCHMARKS`. What is compared runs alternately in one process with equally many threads, and
every figure is the median of its repetitions.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from streamcnn import iobench, pcabench, pipebench, rbfbench, svmbench
from streamcnn.errors import ParameterError, StreamCNNError
from streamcnn.estimators import StreamCNNClassifier
from streamcnn.kernels import ACTIVATIONS, POOLS, cpu, empty_lines
from streamcnn.kernels.peak import multiply_add_rate
from streamcnn.kernels.simd import cpu_name
from streamcnn.threads import limit_blas
from streamcnn.timing import medians, torch_with

# environments that hold every library of the comparison to an older CPU. Without the empty NUMBA_CPU_FEATURES numba would
# keep this CPU's own, and with them the 32 registers of AVX-512
EMULATIONS = {
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    }
}


@dataclass(frozen=True)
class ConvCase:
    """A convolution of square filters with stride 1, ReLU and mean pooling over 2 x 2."""

    use: str
    n_images: int
    image_shape: tuple[int, int, int]
    n_filters: int
    kernel: int
    deep: bool = False

    def __str__(self) -> str:
        height, width, channels = self.image_shape
        return f"{self.n_images} x {height} x {width} x {channels} -> {self.n_filters}, {self.kernel} x {self.kernel}"


# the first four are first layers, whose images are uint8; the deep ones read the float32 features of a layer before
CONV_CASES = (
    ConvCase("colour thumbnails", 512, (32, 32, 3), 64, 5),
    ConvCase("colour thumbnails, many filters", 512, (32, 32, 3), 256, 5),
    ConvCase("handwritten digits", 512, (28, 28, 1), 64, 5),
    ConvCase("faces", 64, (192, 168, 1), 32, 7),
    ConvCase("faces, second layer", 128, (96, 84, 16), 32, 5, deep=True),
    ConvCase("small deep maps", 256, (14, 14, 64), 128, 5, deep=True),
)


def run_benchmarks(name: str, n_threads: int, repeats: int = 9, shrink: int = 1, **options: Any) -> dict[str, Any]:
    """Run one benchmark, or all of them.

    Parameters
    ----------
    name : str
        One of `BENCHMARKS`, or "all".
    n_threads : int
        Of every library compared.
    repeats : int
        Of which the median is taken.
    shrink : int
        Divides the number of images, to try the benchmark out.
    **options
        More arguments of one benchmark, when only that one runs.

    Returns
    -------
    dict
        `benchmarks` (their names), `threads`, `cpu` (its name to the compiler), `emulate` (of `emulated`, else null), `versions`
        (name to version; PyTorch null where it is not installed), `seconds`, and each benchmark's own object under its name.

    Raises
    ------
    ParameterError
        For another name.
    """
    _check_name(name)
    names = list(BENCHMARKS) if name == "all" else [name]
    start = time.perf_counter()
    results = {each: BENCHMARKS[each](n_threads, repeats, shrink, **options) for each in names}
    torch = torch_with(n_threads)
    versions = {package: version(package) for package in ("streamcnn", "numpy", "numba")} | {"torch": torch and torch.__version__}
    return {
        "benchmarks": names,
        "threads": n_threads,
        "cpu": cpu_name(),
        "emulate": None,
        "python": platform.python_version(),
        "versions": versions,
        "seconds": time.perf_counter() - start,
        **results,
    }


def _check_name(name: str) -> None:
    if name != "all" and name not in BENCHMARKS:
        raise ParameterError(f"the benchmark must be one of {', '.join([*BENCHMARKS, 'all'])}, got {name!r}")


def conv(n_threads: int, repeats: int, shrink: int) -> dict[str, Any]:
    """The convolution kernel against PyTorch, and the latency of one prediction.

    Returns
    -------
    dict
        - `rows`, one object for each of `CONV_CASES`: `use`, `shape` (text), `deep`, `gflops` (ours, from the images as they are to
          pooled rows), `torch_gflops` (layout to rate, for the same work: conversion of uint8 included, or null without PyTorch),
          `torch_float32_gflops` (the same of first layers for images converted beforehand, else null), `ratio` (ours to the best of
          `torch_gflops`), `ratio_float32` (to the best of both), `peak_fraction`, `sgemm_gflops` (numpy, in the same run)
        - `ratio_first_layers`, `ratio_float32_first_layers` : geometric means over rows that are not deep
        - `peak_gflops` : the machine's fused multiply-adds, the best rate measured; `peak_fraction` is of it
        - `latency_ms` : kernel of the SVM to the median of `predict` for one image of 32 x 32 x 3
    """
    # once more by itself: beside it, threads of BLAS and OpenMP still spin
    alone = max(multiply_add_rate(n_threads) for _ in range(5)) / 1e9
    torch = torch_with(n_threads)
    cases = [replace(case, n_images=max(1, case.n_images // shrink)) for case in CONV_CASES]
    rows, peaks = zip(*(_conv_row(case, n_threads, repeats, torch) for case in cases))
    peak = max(alone, *peaks)
    for row in rows:
        row["peak_fraction"] = row["gflops"] / peak

    def mean_ratio(key: str) -> float | None:
        return None if torch is None else math.prod(r[key] for r in rows if not r["deep"]) ** (1 / sum(not r["deep"] for r in rows))

    return {
        "rows": list(rows),
        "ratio_first_layers": mean_ratio("ratio"),
        "ratio_float32_first_layers": mean_ratio("ratio_float32"),
        "peak_gflops": peak,
        "latency_ms": {kernel: _latency_ms(kernel, n_threads, 20 * repeats) for kernel in ("linear", "rbf")},
    }


def _conv_row(case: ConvCase, n_threads: int, repeats: int, torch: Any) -> tuple[dict[str, Any], float]:
    """The row of a case and the peak measured beside it, both in GFLOP/s."""
    rng = np.random.default_rng(0)
    n_images, (height, width, channels) = case.n_images, case.image_shape
    images = rng.integers(0, 256, (n_images, *case.image_shape), dtype=np.uint8)
    if case.deep:
        images = images.astype(np.float32)
    filters = rng.normal(size=(case.n_filters, case.kernel, case.kernel, channels)).astype(np.float32)
    bias = rng.normal(size=case.n_filters).astype(np.float32)
    map_rows, map_cols = height - case.kernel + 1, width - case.kernel + 1
    edges = [2 * np.arange(size // 2 + 1) for size in (map_rows, map_cols)]
    out = empty_lines((n_images, map_rows // 2, map_cols // 2, case.n_filters))
    scratch = empty_lines((n_threads, cpu.conv_scratch(case.image_shape, filters.shape, out.shape[1:], 0)))
    square = rng.normal(size=(1024, 1024)).astype(np.float32)
    product = np.empty_like(square)
    rates: list[float] = []
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: cpu.conv_layer(images, filters, bias, 1, 0, ACTIVATIONS["relu"], 0.0, POOLS["mean"], *(*edges, scratch, out)),
        "sgemm": lambda: np.matmul(square, square, out=product),
        "peak": lambda: rates.append(multiply_add_rate(n_threads)),
    }
    rivals, converted = ({}, {}) if torch is None else _torch_works(torch, images, filters, bias)
    with limit_blas(n_threads):
        seconds = medians(works | rivals | converted, repeats)
    work = 2e-9 * n_images * map_rows * map_cols * filters.size

    def rate(names) -> dict[str, float] | None:
        return {name.split()[0]: work / seconds[name] for name in names} or None

    row = {
        "use": case.use,
        "shape": str(case),
        "deep": case.deep,
        "gflops": work / seconds["ours"],
        "torch_gflops": rate(rivals),
        "torch_float32_gflops": rate(converted),
        "ratio": min((seconds[name] for name in rivals), default=math.nan) / seconds["ours"] if torch else None,
        "ratio_float32": min((seconds[name] for name in rivals | converted), default=math.nan) / seconds["ours"] if torch else None,
        "sgemm_gflops": 2e-9 * square.shape[0] ** 3 / seconds["sgemm"],
    }
    if rivals:
        _check_result(next(iter(rivals.values())), out)
    return row, max(rates) / 1e9  # what stands in the way of the peak only lowers it


def _check_result(rival: Callable[[], Any], ours: np.ndarray) -> None:
    """A rate for another result would be worth nothing."""
    theirs = rival().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * float(np.abs(ours).max()))


def _torch_works(torch: Any, images: np.ndarray, filters: np.ndarray, bias: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """PyTorch's convolution, ReLU and mean pool in both layouts: from the images as they are, and from converted ones.

    Deep layers' input is float32 in the layout asked for in both cases, so it is in the first only.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    weights, offsets = torch.from_numpy(filters).permute(0, 3, 1, 2), torch.from_numpy(bias)
    layouts = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

    def layer(x, w):
        functional = torch.nn.functional
        return functional.avg_pool2d(torch.relu_(functional.conv2d(x, w, offsets)), 2)

    same, converted = {}, {}
    for name, layout in layouts.items():
        w = weights.contiguous(memory_format=layout)
        x = pixels.to(torch.float32, memory_format=layout).contiguous(memory_format=layout)
        ready = lambda x=x, w=w: layer(x, w)  # noqa: E731
        if images.dtype == np.float32:
            same[name] = ready
        else:
            same[name] = lambda layout=layout, w=w: layer(pixels.to(torch.float32, memory_format=layout), w)
            converted[f"{name} float32"] = ready
    return same, converted


def _latency_ms(kernel: str, n_threads: int, repeats: int) -> float:
    """Median milliseconds of `predict` for one colour image of 32 x 32 in memory, ten classes, preset "fast"."""
    rng = np.random.default_rng(0)
    labels = np.arange(1000) % 10
    images = rng.integers(0, 128, (1000, 32, 32, 3), dtype=np.uint8)
    images[np.arange(1000), 3 * labels, labels] += 127  # something to learn, so that the SVM is of ordinary size
    classifier = StreamCNNClassifier(kernel=kernel, C=1.0, gamma=0.5, n_jobs=n_threads, random_state=0).fit(images, labels)
    one = images[:1].copy()
    return 1e3 * medians({"predict": lambda: classifier.predict(one)}, repeats, rest=0)["predict"]


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "conv": conv,
    "io": iobench.extraction,
    "pca": pcabench.measure,
    "svm": svmbench.measure,
    "rbf": rbfbench.measure,
    "pipeline": pipebench.measure,
}
"""Name to function of (threads, repetitions, shrink); each returns a JSON object that its docstring describes."""


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['cpu']}, {result['threads']} threads" + (f", held to {result['emulate']}" if result["emulate"] else "")]
    if result["versions"]["torch"] is None:
        lines.append("PyTorch is not installed, so there is nothing to compare with: pip install torch")
    if "conv" in result:
        lines += ["", conv_table(result["conv"]), *conv_summary(result["conv"])]
    if "io" in result:
        lines += ["", iobench.table(result["io"]), *iobench.summary(result["io"])]
    for name, module in (("pca", pcabench), ("svm", svmbench), ("rbf", rbfbench), ("pipeline", pipebench)):
        if name in result:
            lines += ["", module.table(result[name])]
    return "\n".join(lines)


def conv_table(result: dict[str, Any]) -> str:
    """The rows of `conv` as a Markdown table."""
    lines = [
        "| convolution, ReLU, mean pool over 2 x 2 | images -> filters, size | PyTorch | SGEMM | streamcnn | of peak | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        rival = max(row["torch_gflops"].values()) if row["torch_gflops"] else None
        lines.append(
            f"| {row['use']} | {row['shape']} | {_round(rival)} | {_round(row['sgemm_gflops'])} | {_round(row['gflops'])} "
            f"| {100 * row['peak_fraction']:.0f} % | {_round(row['ratio'], 1)} |"
        )
    return "\n".join(lines)


def conv_summary(result: dict[str, Any]) -> list[str]:
    """What the table does not say, one fact a line."""
    lines = [f"rates in GFLOP/s; peak of fused multiply-adds {result['peak_gflops']:.0f}"]
    if result["ratio_first_layers"]:
        lines.append(
            f"first layers, geometric mean of the ratios: {result['ratio_first_layers']:.2f} from uint8 images on both sides, "
            f"{result['ratio_float32_first_layers']:.2f} against PyTorch on images converted beforehand"
        )
    lines.append("one prediction: " + ", ".join(f"{kernel} SVM {ms:.2f} ms" for kernel, ms in result["latency_ms"].items()))
    return lines


def _round(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def emulated(cpu_type: str, name: str, n_threads: int, repeats: int, shrink: int) -> dict[str, Any]:
    """`run_benchmarks` in a child process in which every library is held to the instructions of an older CPU.

    Raises
    ------
    ParameterError
        When there is no such emulation, or no such benchmark.
    """
    if cpu_type not in EMULATIONS:
        raise ParameterError(f"--emulate must be one of {', '.join(EMULATIONS)}, got {cpu_type!r}")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise ParameterError(f"--emulate {cpu_type} needs an x86-64 CPU, this is {platform.machine()}: leave it away")
    _check_name(name)
    numbers = {"--threads": n_threads, "--repeats": repeats, "--shrink": shrink}
    command = [sys.executable, "-m", "streamcnn", "bench", name, "--json", *(str(part) for pair in numbers.items() for part in pair)]
    child = subprocess.run(command, env=os.environ | EMULATIONS[cpu_type], capture_output=True, text=True)
    if child.returncode:
        raise StreamCNNError(f"the benchmark under {cpu_type} failed: {child.stderr.strip() or f'exit code {child.returncode}'}")
    return json.loads(child.stdout) | {"emulate": cpu_type}
