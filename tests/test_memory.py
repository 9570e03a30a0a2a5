"""Sizes, limits of the machine, claims and the monitor."""

import subprocess
import sys

import numpy as np
import pytest

from streamcnn.errors import MemoryBudgetError, ParameterError
from streamcnn.memory import (
    MemoryBudget,
    MemoryMonitor,
    _cgroup_limits,
    default_limit,
    format_bytes,
    machine_bytes,
    parse_bytes,
    resident_bytes,
    resolve_limit,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 << 20), ("1GiB", 1 << 30), ("1GB", 10**9), (" 1.5 gib ", 3 << 29), ("2g", 2 << 30), ("4096", 4096), (4096, 4096)],
)
def test_sizes_are_understood(text, expected):
    """Sizes in powers of 1024 and of 1000, with and without space, are bytes."""
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["12 bananas", "", "GiB", "-1GiB", 0, -5, None, True, 1.5, "1e9"])
def test_other_sizes_are_refused(text):
    """What is no positive size is refused with the value and an example."""
    with pytest.raises(ParameterError, match="memory_limit must be a positive number of bytes or a size"):
        parse_bytes(text)


def test_format_bytes_reads_back():
    """What is shown is what was meant."""
    assert [format_bytes(n) for n in (10, 2048, 5 << 20, 3 << 30, 2 << 40)] == ["10 B", "2 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB"]


def test_cgroup_limits_of_both_versions_and_all_ancestors_count(tmp_path):
    """Version 2 reads memory.max and memory.high, version 1 limit_in_bytes, at every level above the process."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/memory.max").write_text("max\n")
    (tmp_path / "a/memory.max").write_text("700\n")
    (tmp_path / "a/memory.high").write_text("600\n")
    (tmp_path / "memory/x/y").mkdir(parents=True)
    (tmp_path / "memory/x/memory.limit_in_bytes").write_text("500\n")
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,memory:/x/y\n0::/a/b\n")
    assert sorted(_cgroup_limits(tmp_path, membership)) == [500, 600, 700]


def test_default_limit_is_at_most_half_the_machine():
    """Nobody who sets no limit loses more than half the machine."""
    assert 0 < default_limit() <= machine_bytes() // 2
    assert resolve_limit(None) <= machine_bytes() // 2
    assert resolve_limit("1GiB") == 1 << 30


def test_budget_adds_claims_and_refuses_with_the_table():
    """Claims add up by name; one too many is refused, names every claim, and is not kept."""
    budget = MemoryBudget(resident_bytes() + (100 << 20))
    budget.claim("pixels", 30 << 20)
    budget.claim("pixels", 10 << 20)
    assert budget.claims["pixels"] == 40 << 20
    assert list(budget.claims)[0] == "already in use"
    with pytest.raises(MemoryBudgetError, match=r"too small[\s\S]*already in use[\s\S]*gram[\s\S]*pixels"):
        budget.claim("gram", 200 << 20)
    assert "gram" not in budget.claims
    budget.release("pixels")
    assert budget.free == pytest.approx(100 << 20, abs=1 << 20)


def test_monitor_sees_a_peak_that_is_gone_again_and_its_stage():
    """Memory touched and freed inside a stage is in the peak, in the stage's peak and in the trace."""
    with MemoryMonitor("4GiB", interval=0.005) as monitor:
        before = resident_bytes()
        with monitor.stage("big"):
            block = np.ones(80 << 20, np.uint8)
            monitor.sample()
            del block
    assert monitor.peak_bytes >= before + (75 << 20)
    assert monitor.stage_peaks["big"] >= before + (75 << 20)
    assert {stage for _, stage, _ in monitor.trace} == {"", "big"}


def test_monitor_writes_its_trace(tmp_path):
    """The trace is a CSV of seconds, stage and bytes."""
    with MemoryMonitor() as monitor:
        pass
    monitor.write_csv(tmp_path / "memory.csv")
    lines = (tmp_path / "memory.csv").read_text().splitlines()
    assert lines[0] == "seconds,stage,resident_bytes"
    assert len(lines) == len(monitor.trace) + 1
    assert int(lines[1].split(",")[2]) > 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's own")
def test_peak_is_not_inherited_from_the_parent():
    """A child of a large process reports its own peak (ru_maxrss would report the parent's)."""
    ballast = np.ones(300 << 20, np.uint8)
    code = "from streamcnn.memory import peak_resident_bytes as p; print(p())"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert ballast[-1] == 1
    assert peak < 250 << 20
