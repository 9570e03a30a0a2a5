"""Timing of pieces of work in turn, and the rival they are compared with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# threads of OpenMP and OpenBLAS spin for a while after their work, which is no fault of what runs next
REST = 0.02


def torch_with(n_threads: int) -> Any:
    """PyTorch with `n_threads` threads, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(n_threads)
    torch.set_grad_enabled(False)
    return torch


def medians(
    works: dict[str, Callable[[], object]], repeats: int, rest: float = REST, after: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each piece of work, all run in turn `repeats` times after one call that does not count, each after `rest`.

    What `after` does follows every call and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
        after()
    for _ in range(repeats):
        for name, work in works.items():
            time.sleep(rest)
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
            after()
    return {name: statistics.median(values) for name, values in times.items()}
