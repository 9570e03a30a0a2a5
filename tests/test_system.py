"""What the operating system says: each system through the same interface, control groups of both versions, and the heap."""

import ctypes
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from streamcnn import system
from streamcnn.memory import MemoryMonitor, resolve_limit
from streamcnn.system import LinuxMemory, MacMemory, ProcessMemory, cgroup_free, cgroup_limits, default_limit, machine_bytes

MIB = 1 << 20


class MadeUpSystem(ProcessMemory):
    """A process whose memory is set by the test; `can_reset` is what tells Linux from the others."""

    def __init__(self, can_reset: bool, peak: int | None):
        self.now, self.mark, self.can_reset = 100 * MIB, peak, can_reset

    def hold(self, n_bytes):
        self.now = n_bytes
        self.mark = None if self.mark is None else max(self.mark, n_bytes)

    def resident(self):
        return self.now

    def peak(self):
        return self.mark

    def reset_peak(self):
        if self.can_reset:
            self.mark = self.now
        return self.can_reset


@pytest.fixture
def made_up(monkeypatch):
    """Put a made-up system in the place of this one."""

    def put(can_reset, peak):
        made = MadeUpSystem(can_reset, peak)
        monkeypatch.setattr(system, "process_memory", made)
        return made

    return put


@pytest.mark.parametrize(("can_reset", "peak"), [(True, 900 * MIB), (False, 900 * MIB), (False, None)])
def test_an_older_and_higher_peak_is_not_the_runs(made_up, can_reset, peak):
    """900 MiB held before the block are not its peak, whether the mark can be reset, cannot, or is not kept at all."""
    made = made_up(can_reset, peak)
    with MemoryMonitor(interval=60) as monitor:
        made.hold(200 * MIB)
        monitor.sample()
        made.hold(150 * MIB)
    assert monitor.peak_bytes == 200 * MIB
    assert monitor.exact is can_reset


def test_a_mark_that_rises_during_the_block_is_the_blocks_own(made_up):
    """Where the mark cannot be reset (Windows, macOS), one that rose is exact, even between two samples."""
    made = made_up(False, 120 * MIB)
    with MemoryMonitor(interval=60) as monitor:
        made.hold(500 * MIB)
        made.hold(110 * MIB)
    assert monitor.peak_bytes == 500 * MIB
    assert monitor.exact


def test_a_peak_between_samples_belongs_to_its_stage(made_up):
    """Each stage has its own mark: what the first held is not the second's, nor lost for the whole."""
    made = made_up(True, 0)
    with MemoryMonitor(interval=60) as monitor:
        with monitor.stage("first"):
            made.hold(700 * MIB)
            made.hold(100 * MIB)
        with monitor.stage("second"):
            made.hold(300 * MIB)
            made.hold(100 * MIB)
    assert monitor.stage_peaks == {"first": 700 * MIB, "second": 300 * MIB}
    assert monitor.peak_bytes == 700 * MIB


def test_nested_monitors_both_see_the_peak(made_up):
    """A monitor inside another starts the mark afresh, and the outer one still knows what came before and its inner stages."""
    made = made_up(True, 0)
    with MemoryMonitor(interval=60) as outer:
        made.hold(800 * MIB)
        made.hold(100 * MIB)
        with MemoryMonitor(interval=60) as inner, inner.stage("work"):
            made.hold(300 * MIB)
            made.hold(100 * MIB)
    assert (outer.peak_bytes, inner.peak_bytes) == (800 * MIB, 300 * MIB)
    assert outer.stage_peaks == inner.stage_peaks == {"work": 300 * MIB}


def test_a_stage_is_its_threads_own(made_up):
    """Two runs in two threads: a stage of one is not the stage of the other, nor held against its plan."""
    made = made_up(True, 0)
    entered, leave = threading.Event(), threading.Event()
    names = []

    def other():
        with MemoryMonitor(interval=60) as monitor, monitor.stage("theirs", 150 * MIB):
            entered.set()
            leave.wait(10)
            made.hold(100 * MIB)
            names.append((monitor._stage, monitor.tight))

    thread = threading.Thread(target=other)
    with MemoryMonitor(interval=60) as mine:
        thread.start()
        entered.wait(10)
        with mine.stage("ours", 900 * MIB):
            leave.set()
            thread.join()
            assert mine._stage == "ours"
    assert names == [("theirs", False)]
    assert list(mine.stage_peaks) == ["ours"]


def test_a_long_trace_is_thinned_and_watched_as_closely_as_before(made_up):
    """Half of 20,000 samples is dropped and every second one kept from then on; peaks between kept ones still count."""
    made = made_up(True, 0)
    with MemoryMonitor(interval=60) as monitor:
        for _ in range(30_000):
            monitor.sample()
        made.hold(700 * MIB)
        monitor.sample()
        made.hold(100 * MIB)
    assert 10_000 < len(monitor.trace) < 20_000
    assert monitor.interval == 60
    assert monitor.peak_bytes == 700 * MIB


def test_linux_reads_status_and_resets_by_clear_refs(tmp_path):
    """VmRSS and VmHWM in KiB; a reset writes 5, and a refused one is told."""
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    memory = LinuxMemory(tmp_path)
    assert (memory.resident(), memory.peak()) == (MIB, 2 * MIB)
    assert memory.reset_peak()
    assert (tmp_path / "clear_refs").read_text() == "5"
    (tmp_path / "clear_refs").unlink()
    (tmp_path / "clear_refs").mkdir()
    assert not memory.reset_peak()


def test_mac_reads_the_physical_footprint():
    """Footprint and lifetime maximum lie at their places in rusage_info_v4; a failing call falls back to resident memory."""

    class Library:
        failed = 0

        def proc_pid_rusage(self, pid, flavor, buffer):
            assert flavor == 4
            numbers = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint64))
            numbers[2 + 7], numbers[2 + 28] = 123, 456
            return self.failed

    memory = MacMemory(Library())
    assert (memory.resident(), memory.peak(), memory.reset_peak()) == (123, 456, False)
    Library.failed = -1
    assert memory.resident() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert memory.peak() is None


@pytest.mark.parametrize("name", ["peak_wset", "peak_rss"])
def test_windows_reads_the_peak_working_set_under_both_of_psutils_names(monkeypatch, name):
    """psutil 8 renames the field."""
    info = SimpleNamespace(rss=5, **{name: 7})
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    assert (ProcessMemory().resident(), ProcessMemory().peak()) == (5, 7)


def write_groups(root):
    """Version 2 at a/b and version 1 at x/y; returns (root, membership)."""
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/memory.max").write_text("max\n")
    (root / "a/memory.max").write_text("700\n")
    (root / "a/memory.high").write_text("600\n")
    (root / "a/memory.current").write_text("350\n")
    (root / "a/memory.stat").write_text("anon 200\ninactive_file 100\nactive_file 20\nslab 30\n")
    (root / "memory/x/y").mkdir(parents=True)
    (root / "memory/x/memory.limit_in_bytes").write_text("500\n")
    (root / "memory/x/memory.usage_in_bytes").write_text("450\n")
    (root / "memory/x/memory.stat").write_text("inactive_file 1\nactive_file 1\ntotal_inactive_file 40\ntotal_active_file 5\n")
    (root / "cgroup").write_text("5:cpu,memory:/x/y\n0::/a/b\n")
    return root, root / "cgroup"


def test_cgroup_limits_of_both_versions_and_all_ancestors_count(tmp_path):
    """Version 2 reads memory.max and memory.high, version 1 limit_in_bytes, at every level above the process."""
    assert sorted(cgroup_limits(*write_groups(tmp_path))) == [500, 600, 700]


def test_what_is_free_in_a_group_counts_its_page_cache_as_free(tmp_path):
    """Limit less use, where cached file pages are no use: 600 - (350 - 120) and 500 - (450 - 45)."""
    assert sorted(cgroup_free(*write_groups(tmp_path))) == [95, 370]


def test_default_limit_is_half_the_machine_and_at_most_what_is_free(monkeypatch):
    """The smallest of physical memory and groups is halved; less is free, less is taken."""
    memory = SimpleNamespace(total=1000 * MIB, available=900 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(system, "resident_bytes", lambda: 10 * MIB)
    monkeypatch.setattr(system, "cgroup_limits", lambda: [600 * MIB])
    monkeypatch.setattr(system, "cgroup_free", lambda: [500 * MIB])
    assert machine_bytes() == 600 * MIB
    assert default_limit() == 300 * MIB
    monkeypatch.setattr(system, "cgroup_free", lambda: [50 * MIB])
    assert default_limit() == 60 * MIB


def test_limit_given_or_default():
    """Nobody who sets no limit loses more than half the machine."""
    assert 0 < resolve_limit(None) <= machine_bytes() // 2
    assert resolve_limit("1GiB") == 1 << 30


@pytest.mark.skipif(sys.platform != "linux", reason="the figures are glibc's")
def test_trimming_gives_freed_memory_back():
    """Small blocks freed but for the last stay with glibc until the heap is trimmed."""
    code = """
from streamcnn.system import resident_bytes, trim_heap
blocks = [bytes(8000) + bytes([i % 251]) for i in range(20_000)]
last = blocks[-1]
del blocks
held = resident_bytes()
trim_heap()
print(held - resident_bytes(), last[-1])
"""
    freed, _ = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert int(freed) > 100 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's own")
def test_peak_is_not_inherited_from_the_parent():
    """A child of a large process reports its own peak (ru_maxrss would report the parent's)."""
    ballast = np.ones(300 * MIB, np.uint8)
    code = "from streamcnn.memory import peak_resident_bytes as p; print(p())"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert ballast[-1] == 1
    assert peak < 250 * MIB


def test_sampling_thread_ends_with_its_block():
    """No thread is left behind, also when the block fails."""
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), MemoryMonitor():
        assert threading.active_count() == before + 1
        _ = 1 / 0
    assert threading.active_count() == before
