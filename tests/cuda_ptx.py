"""Compiles the CUDA kernels without a device: a program of its own, started by test_cuda.py where numba-cuda is installed.

Prints one JSON list: for each kernel its name, compute capability, what its PTX holds, and what ptxas says where there is one.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numba
from numba import cuda, float32, float64, int32, int64, uint8, uint32
from numba.cuda import dispatcher
from numba.cuda.types import float16

from streamcnn.kernels import ACTIVATIONS, POOLS, cudaloops, cudapixels
from streamcnn.kernels.cuda import choose_tile

FLOATS, WIDE, INTS = float32[::1], float64[::1], int32[::1]


def ptxas() -> str | None:
    """The assembler, from NVIDIA's wheels or on the path, or None."""
    packages = Path(numba.__file__).parent.parent
    found = [str(path) for path in packages.glob("nvidia/*/bin/ptxas")]
    return next(iter(found), None) or shutil.which("ptxas")


def examine(name, kernel, signature, capability, folder) -> dict:
    """Compile one kernel; `max_registers` are kept, as the driver would."""
    # functions for the device are compiled for the device that is there; here there is none
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=capability)
    code = "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith((".param", "//")))
    result = {"name": name, "capability": capability, "local": ".local" in code, "calls": len(re.findall(r"^\s*call", code, re.M))}
    for key, pattern in {
        "fma": r"fma\.rn\.f32",
        "other fma": r"(?:fma|mad)\.(?!rn\.f32|lo|wide|hi)\S*",
        "vector loads": r"ld\.shared\.v4\.[fb]32",
        "single loads": r"ld\.shared\.[fb]32",
        "aligned": r"\.shared \.align 16",
        "flushed": r"\.ftz|\.approx",
        "tensor": r"tf32|mma",
        "halves": r"cvt\.rn\.f16\.f32",
    }.items():
        result[key] = len(re.findall(pattern, code))
    # a product without .rn may be fused with a sum that takes it
    products = set(re.findall(r"mul\.f(?:32|64)\s+(%\w+)", code))
    operands = re.findall(r"(?:add|sub)\S*\.f(?:32|64)\s+%\w+, (%?[\w.]+), (%?[\w.]+)", code)
    result["fusible"] = sum(bool(products & set(pair)) for pair in operands)
    result["sums"] = len(operands)
    if assembler := ptxas():
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        most = kernel.targetoptions.get("max_registers") or 255
        command = [
            assembler,
            "-v",
            f"-arch=sm_{capability[0]}{capability[1]}",
            f"-maxrregcount={most}",
            str(source),
            "-o",
            f"{source}.cubin",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        said = done.stderr
        if done.returncode:
            if "Unsupported .version" in said + done.stdout:  # an assembler older than the compiler
                return result
            raise RuntimeError(said + done.stdout)
        result["spilled"] = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
        result["registers"] = int(re.search(r"Used (\d+) registers", said)[1])
        result["shared"] = int((re.search(r"(\d+) bytes smem", said) or [0, 0])[1])
    return result


def kernels():
    """(name, kernel, signature) of a representative set."""
    for n_filters, n_taps, activation, pool in [
        (8, 9, "relu", "mean"),
        (32, 49, "abs", "max"),
        (64, 75, "relu", "mean"),
        (64, 25, "clip", "max"),
        (64, 75, "split", "max"),
        (256, 75, "relu", "mean"),
        (128, 1600, "relu", "max"),
    ]:
        tile = choose_tile(n_filters, n_taps, activation == "split")
        for images, checked in [(uint8[::1], n_taps % tile.taps > 0), (FLOATS, True)]:
            for out, normed in ((FLOATS, False), (float16[::1], False), (FLOATS, True)):
                kernel = cudaloops.conv_kernel(tile, ACTIVATIONS[activation], POOLS[pool], checked, out is not FLOATS, normed)
                signature = (images, FLOATS, FLOATS, uint32[::1], INTS, FLOATS, int64[::1], FLOATS, float32, out, uint32[::1])
                name = f"conv {n_filters} x {n_taps} {activation} {pool} {images.dtype} {out.dtype} {tile}{' normed' * normed}"
                yield name, kernel, signature
    yield "standardize", cudapixels.standardize_kernel(128), (uint8[::1], int64, FLOATS)
    yield "standardize floats", cudapixels.standardize_floats_kernel(128), (FLOATS, int64, FLOATS)
    yield "multiply-adds", cudaloops.multiply_adds, (float32, int64, FLOATS)
    yield "log of bytes", cudapixels.log_bytes, (uint8[::1], FLOATS, FLOATS)
    yield "log of floats", cudapixels.log_floats, (FLOATS, FLOATS)
    for images in (uint8[::1], FLOATS):
        yield f"inverse deviations {images.dtype}", cudapixels.inverse_deviations, (images, *[int64] * 9, float64, FLOATS)
        yield f"contrast columns {images.dtype}", cudapixels.contrast_columns, (images, int64, int64, int64, WIDE)
        yield f"smooth boxes {images.dtype}", cudapixels.smooth_boxes, (images, int64, int64, int64, int64, WIDE, FLOATS)
        yield f"contrast boxes {images.dtype}", cudapixels.contrast_boxes, (images, int64, int64, int64, int64, float64, WIDE, FLOATS)


def main() -> None:
    capabilities = [tuple(int(part) for part in argument.split(".")) for argument in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        chosen = list(kernels())
        # every kernel for the first, the first layer of the benchmark for the others
        todo = [(k, capabilities[0]) for k in chosen] + [(k, capability) for capability in capabilities[1:] for k in chosen[12:15]]
        json.dump([examine(*kernel, capability, folder) for kernel, capability in todo], sys.stdout)


if __name__ == "__main__":
    main()
