"""The CUDA kernels: in the simulator always, in PTX where numba-cuda is installed, on a device where there is one."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_preprocess
from conv_cases import CASES, NON_FINITE, agree, bits, for_simulator, make, rounds_as_the_cpu, run, same_as_cpu, windows

from streamcnn import kernels
from streamcnn.errors import DeviceError
from streamcnn.kernels import cpu, cuda_problem, get_kernels, resolve_device

HERE = Path(__file__).parent


def run_program(name, *arguments, **environment):
    """What a program beside this file prints as JSON."""
    command = [sys.executable, "-W", "ignore", str(HERE / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# --- simulator -------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy before 2 makes float64 of the simulator's uint64 and int")
def test_simulated_kernels_agree_with_cpu_and_reference():
    """Every check of cuda_simulated.py holds in numba's simulator: values, bits, chunks, memory."""
    # in two processes, as the simulator has the interpreter of one busy
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(lambda part: run_program("cuda_simulated.py", part, "2", NUMBA_ENABLE_CUDASIM="1"), "01"))
    results = halves[0] | halves[1]
    assert results.keys() >= for_simulator(CASES).keys() | NON_FINITE.keys()
    assert {name: problem for name, problem in results.items() if problem} == {}


# --- PTX -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    if find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed: CUDA kernels are not compiled to PTX")
    # the oldest that numba-cuda supports with CUDA 12 and 13, then current ones
    return run_program("cuda_ptx.py", "8.0", "7.5", "9.0", "10.0")


def test_kernels_compile_for_real_devices(compiled):
    """All kernels type-check and compile; local arrays and helpers are gone, sums stay in registers."""
    assert {tuple(kernel["capability"]) for kernel in compiled} == {(8, 0), (7, 5), (9, 0), (10, 0)}
    for kernel in compiled:
        assert not kernel["local"] and not kernel["calls"], kernel
        # none with CUDA 12's assembler; CUDA 13's stores and loads 40 bytes of 64 filters x 75 taps for 10.0
        assert kernel.get("spilled", 0) <= 64, kernel
        assert kernel.get("shared", 0) <= 48 << 10, kernel


def test_ptx_rounds_as_the_cpu_does(compiled):
    """Fused multiply-adds where the contract has them and nowhere else; nothing flushed, approximated or on tensor cores."""
    for kernel in compiled:
        name = kernel["name"]
        assert kernel["tensor"] == 0, kernel
        if name == "log of floats":  # the device's own log1p
            continue
        assert kernel["other fma"] == kernel["flushed"] == kernel["fusible"] == 0, kernel
        assert (kernel["fma"] > 0) == name.startswith(("conv", "multiply-adds"))
        assert (kernel["halves"] > 0) == (" float16 " in name), kernel
        if name.startswith("conv"):
            # the innermost loop: loads of four numbers only
            assert kernel["fma"] % 16 == 0 and kernel["vector loads"] > 0 and kernel["single loads"] == 0, kernel
            assert kernel["aligned"] == 2, kernel
        if name.startswith(("standardize", "contrast")):
            assert kernel["sums"] > 0


# --- device ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device():
    """The CUDA kernels on a real device."""
    if problem := cuda_problem():
        pytest.skip(f"CUDA kernels are not run on a device: {problem}")
    return get_kernels("cuda")


@pytest.mark.parametrize("name", CASES)
def test_device_gives_the_bits_of_the_cpu(device, name):
    """Every case of the CPU kernel, bit for bit, and within the bound of the reference."""
    same_as_cpu(agree(device, CASES[name]), CASES[name])


@pytest.mark.parametrize("n_filters", [8, 32, 64, 256])
@pytest.mark.parametrize("activation", ["relu", "split"])
def test_device_gives_the_bits_of_the_cpu_with_each_tile(device, n_filters, activation):
    """Many images in many chunks, under a small limit of device memory too."""
    case = make(300, (32, 32, 3), n_filters, (5, 5)), {"activation": activation, "edges": windows(2)}
    limited = SimpleNamespace(conv_scratch=device.conv_scratch, conv_layer=partial(device.conv_layer, limit=8 << 20))
    for kernels_of_device in (device, limited):
        same_as_cpu(run(kernels_of_device, *case[0], **case[1]), case)


@pytest.mark.parametrize("name", NON_FINITE)
def test_device_follows_ieee(device, name):
    """Infinity and NaN as on the CPU."""
    arrays, options = NON_FINITE[name]
    same_as_cpu(run(device, *arrays, **options), NON_FINITE[name])


def test_device_rounds_as_the_cpu(device):
    """float16 results have the bits of the host's rounding, and those beyond its range are told."""
    rounds_as_the_cpu(device)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("steps", ["standardize", "log", "smooth", "local_contrast", ("log", "local_contrast", "standardize")])
def test_device_preprocesses_as_the_cpu(device, steps, dtype):
    """The same bits, but for log of float32, whose last bit may differ and then be divided by a small deviation."""
    images = test_preprocess.make(40, (33, 20, 3), dtype)
    out, expected = (test_preprocess.run(steps, images, k) for k in (device, cpu))
    if dtype == np.float32 and "log" in steps:
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    else:
        assert np.array_equal(bits(out), bits(expected))


# --- choice of the device --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked_anew():
    """Forget whether there is a device, before and after."""
    cuda_problem.cache_clear()
    yield
    cuda_problem.cache_clear()


def test_cuda_without_numba_cuda_names_what_to_install(asked_anew, monkeypatch):
    """The error says what to install, and auto is the CPU."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r'"cuda" is not there: numba-cuda is not installed.*\[cu13\].*\[cu12\].*use "cpu"'):
        get_kernels("cuda")
    assert get_kernels("auto") is cpu


def test_cuda_without_a_device_says_so(asked_anew, monkeypatch):
    """With numba-cuda but no device the error says that, also when CUDA cannot start; auto is the CPU."""
    from streamcnn.kernels import cudadevice

    def broken():
        raise OSError("driver too old")

    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    for available, message in [(lambda: False, "no CUDA device was found"), (broken, r"CUDA does not start \(driver too old\)")]:
        cuda_problem.cache_clear()
        monkeypatch.setattr(cudadevice.cuda, "is_available", available)
        with pytest.raises(DeviceError, match=message):
            resolve_device("cuda")
        assert resolve_device("auto") == "cpu"


def test_a_numba_cuda_that_cannot_be_imported_is_no_device(asked_anew, monkeypatch):
    """An ImportError inside numba-cuda (an old one beside a new numba) is part of the message, and auto is the CPU."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "streamcnn.kernels.cudadevice", None)
    with pytest.raises(DeviceError, match=r"numba-cuda cannot be imported \(.*cudadevice.*\); update it, or use"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


def test_auto_takes_a_device_but_never_the_simulator(asked_anew, monkeypatch):
    """auto is CUDA where it can be used; a simulated device has to be asked for."""
    monkeypatch.setattr(kernels, "cuda_problem", lambda: None)
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "0")
    assert resolve_device("auto") == "cuda" and resolve_device("cpu") == "cpu"
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert resolve_device("auto") == "cpu" and resolve_device("cuda") == "cuda"


def test_choosing_without_cuda_is_cheap():
    """Where numba-cuda is not installed, choosing imports no numba and no CUDA."""
    code = (
        "import sys, streamcnn.kernels as k; k.find_spec = lambda name: None; assert k.resolve_device('auto') == 'cpu';"
        "print([m for m in sys.modules if m.startswith(('numba', 'streamcnn.kernels.'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
