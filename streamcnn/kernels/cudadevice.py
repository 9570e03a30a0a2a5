"""The CUDA device from the host's side: is there one, how much memory it lends, and chunks of images streamed through it.

The one place that imports `numba.cuda`, which is the package numba-cuda (extras `cuda12` and `cuda13`) or, for tests on machines
without a device, the simulator that numba brings along (`NUMBA_ENABLE_CUDASIM=1`).
"""

import os
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numba import cuda as numba_cuda

from streamcnn.errors import DeviceError, MemoryBudgetError, ParameterError
from streamcnn.kernels import simulated
from streamcnn.kernels.jit import run_workers
from streamcnn.memory import format_bytes, parse_bytes

cuda: Any = numba_cuda  # its types are those of the simulator, or none
intrinsic: Any = None if simulated() else import_module("numba.cuda.extending").intrinsic
# few images are few blocks: nothing the user could change
warnings.filterwarnings("ignore", message=r"Grid size \d+ will likely result in GPU under-utilization")

LIMIT_VARIABLE = "STREAMCNN_DEVICE_MEMORY_LIMIT"
# of the free device memory: contexts of other processes, and what numba frees late, need the rest
_SHARE = 0.8
# float32 numbers of page-locked memory per host worker. Not measured on a device: a transfer of 1 MiB takes some 50 us on PCIe 4,
# several times what it costs to start one
WORKER_FLOATS = 1 << 20
_TRANSFER_BYTES = 1 << 20
_LINE = 256  # bytes: the alignment of device memory, kept inside a slot

_one_caller = threading.Lock()


_processes: set[int] = set()


def _check_process() -> None:
    """Note that this process uses CUDA, and refuse in one that was forked from a process which did."""
    _processes.add(os.getpid())
    if len(_processes) > 1:
        raise DeviceError(
            'device "cuda" was in use when this process was forked, which CUDA does not survive: start processes by the "spawn" method of '
            'multiprocessing, or use device="cpu"'
        )


def problem() -> str | None:
    """Why no CUDA device can be used, or None when one can."""
    _check_process()
    try:
        return None if cuda.is_available() else "no CUDA device was found"
    except Exception as error:  # a broken driver or toolkit raises what it likes
        return f"CUDA does not start ({error})"


def device_name() -> str:
    """What the device calls itself."""
    if simulated():
        return "simulator"
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def host_floats(image_floats: int, out_floats: int, work_bytes: int = 0) -> int:
    """float32 numbers of page-locked host memory per worker: room for two slots of one image, as numbers given.

    Preprocessing, which has no scratch of its own, fits as well: there the results are as large as the image.
    """
    return max(WORKER_FLOATS, 2 * slot_bytes(1, 4 * image_floats, 4 * max(image_floats, out_floats), work_bytes) // 4)


def held_bytes() -> int:
    """Bytes of page-locked host memory that the last call used, and which are still there."""
    return sum(slot.host.nbytes for slots in _slots.values() for slot in slots)


def device_limit() -> int:
    """Bytes of device memory to use: `STREAMCNN_DEVICE_MEMORY_LIMIT` (bytes or `"2GiB"`), else 80 % of what is free at first use."""
    _check_process()
    told = os.environ.get(LIMIT_VARIABLE)
    return parse_bytes(told) if told else _free_at_first_use()


@lru_cache(maxsize=1)
def _free_at_first_use() -> int:
    free = cuda.current_context().get_memory_info().free
    return int(_SHARE * free) if free != float("inf") else 1 << 62  # the simulator's memory is the host's


def context_exists() -> bool:
    """Whether this process has worked on the device already, and holds what the driver keeps for it."""
    return simulated() or _free_at_first_use.cache_info().currsize > 0


def send(*arrays: np.ndarray) -> list:
    """Flat device arrays with the numbers of `arrays`, all in one transfer: each takes longer to start than these do to travel."""
    _check_process()
    bounds = np.cumsum([0, *(_aligned(array.nbytes) for array in arrays)]).tolist()
    packed = np.zeros(bounds[-1], np.uint8)
    for array, start in zip(arrays, bounds):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    device = cuda.to_device(packed)
    return [device[start : start + array.nbytes].view(array.dtype) for array, start in zip(arrays, bounds)]


def plan_chunk(n: int, image_bytes: int, out_bytes: int, work_bytes: int, fixed_bytes: int, host_bytes: int, limit: int) -> tuple[int, int]:
    """Images per transfer, and bytes of each of the two slots, which take as much on the device as in page-locked host memory.

    A slot has room for the images, their results and what the kernels need besides; the device holds two, and `fixed_bytes`.
    Several transfers per call, or nothing would overlap, but none so short that starting it takes longer than doing it.

    Parameters
    ----------
    n : int
        Images of the call.
    image_bytes, out_bytes, work_bytes : int
        Of one image: as it is sent, its results, and device memory besides.
    fixed_bytes : int
        Filters and tables on the device.
    host_bytes : int
        Page-locked host memory, both slots together.
    limit : int
        Device memory.

    Raises
    ------
    MemoryBudgetError
        When not even one image fits the device memory.
    ParameterError
        When not even one fits the host memory, that is: the scratch.
    """
    smallest = 2 * slot_bytes(1, image_bytes, out_bytes, work_bytes)
    if limit - fixed_bytes < smallest:
        raise MemoryBudgetError(
            f"device memory limit must be at least {format_bytes(smallest + fixed_bytes)} for one image of this layer, got "
            f'{format_bytes(limit)}: set {LIMIT_VARIABLE} higher, free device memory, or use device="cpu"'
        )
    if host_bytes < smallest:
        raise ParameterError(
            f"scratch must have at least {smallest // 4} numbers for images of this size, got {host_bytes // 4}: "
            f"allocate it with the columns that conv_scratch(...) or contrast_scratch(...) names"
        )
    room = min(host_bytes, limit - fixed_bytes) // 2 // _LINE * _LINE
    per_image = image_bytes + out_bytes + work_bytes
    wanted = max(-(-n // 4), _TRANSFER_BYTES // per_image, 1)
    return min(n, wanted, max(1, (room - 3 * _LINE) // per_image)), room


def slot_bytes(n: int, *sizes: int) -> int:
    """Bytes of `n` images with buffers of these sizes, each buffer aligned."""
    return sum(_aligned(n * size) for size in sizes)


class _Slot:
    """A stream, the device memory of one chunk, and the page-locked host memory that its transfers need to run beside the kernels."""

    def __init__(self, size: int):
        self.stream = cuda.stream()
        self.host = cuda.pinned_array(size, np.uint8)
        self.device = cuda.device_array(size, np.uint8)
        self.results: tuple[np.ndarray, np.ndarray] | None = None

    def start(self, images: np.ndarray, out: np.ndarray, work_bytes: int, n_workers: int, launch: Callable) -> None:
        """Send `images`, launch, and fetch the results into host memory, all in the background once the images are copied."""
        self.finish(n_workers)
        at_out = _aligned(images.nbytes)
        at_work = at_out + _aligned(out.nbytes)
        sent, fetched = self.host[: images.nbytes], self.host[at_out : at_out + out.nbytes]
        device_in, device_out = self.device[: images.nbytes], self.device[at_out : at_out + out.nbytes]
        work = self.device[at_work : at_work + work_bytes] if work_bytes else None
        _copy(images.reshape(-1).view(np.uint8), sent, n_workers)
        device_in.copy_to_device(sent, stream=self.stream)
        launch(self.stream, device_in.view(images.dtype), device_out.view(out.dtype), work, len(images))
        device_out.copy_to_host(fetched, stream=self.stream)
        self.results = fetched, out.reshape(-1).view(np.uint8)

    def finish(self, n_workers: int) -> None:
        """Wait for what was started, and hand its results over."""
        self.stream.synchronize()
        if self.results is not None:
            _copy(*self.results, n_workers)
            self.results = None


_slots: dict[int, tuple[_Slot, _Slot]] = {}  # by their size: one entry


def stream_chunks(images, out, host_bytes: int, n_workers: int, launch: Callable, *, work_bytes=0, fixed_bytes=0, limit=None) -> None:
    """Run `launch` over the images chunk by chunk on two streams: while one computes, the other's data travel.

    Parameters
    ----------
    images : ndarray of shape (n, H, W, C), uint8 or float32, C-contiguous
    out : ndarray of shape (n, ...), float32 or float16, C-contiguous
        May be `images` itself: a chunk is read before its results are written.
    host_bytes : int
        Page-locked memory to use; kept until a call asks for another size.
    n_workers : int
        Host threads that copy into and out of it.
    launch : callable (stream, device images, device out, device work, n)
        Starts the kernels for n images; flat device arrays, `work` of n * `work_bytes` uint8 and undefined content, or None.
    work_bytes, fixed_bytes : int
        Device memory of `launch` per image, and besides.
    limit : int, optional
        Bytes of device memory; default `device_limit()`.
    """
    _check_process()
    n = len(images)
    if n == 0:
        return
    limit = device_limit() if limit is None else limit
    chunk, size = plan_chunk(n, images[0].nbytes, out[0].nbytes, work_bytes, fixed_bytes, host_bytes, limit)
    with _one_caller:
        if size not in _slots:
            _slots.clear()  # before the new ones: both together might not fit
            if not simulated():  # numba frees late
                cuda.current_context().memory_manager.deallocations.clear()
            _slots[size] = _Slot(size), _Slot(size)
        slots = _slots[size]
        for slot in slots:  # results of a call that was interrupted are nobody's
            slot.results = None
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            slots[0].start(images[part], out[part], len(images[part]) * work_bytes, n_workers, launch)
            slots = slots[::-1]
        for slot in slots:  # the older first
            slot.finish(n_workers)


def _copy(source: np.ndarray, target: np.ndarray, n_workers: int) -> None:
    """Copy bytes with several threads, where that pays for starting them (0.1 ms)."""
    n_workers = min(n_workers, source.nbytes >> 20) or 1

    def work(worker):
        part = slice(source.size * worker // n_workers, source.size * (worker + 1) // n_workers)
        np.copyto(target[part], source[part])

    run_workers(work, n_workers)


def _aligned(size: int) -> int:
    return -(-size // _LINE) * _LINE
