"""Hand-made hostile files: each is read rightly or refused by one sentence of ours, quickly, in little memory, with nothing written."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile_files import CASES, OPEN, ROOM

from streamcnn import StreamCNNError

# pipes and links that need no privileges
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and symbolic links are POSIX's")


def _everything(folder: Path) -> dict:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def _refused(case, path) -> object:
    if case.error is None:
        return OPEN[case.kind](path)
    with pytest.raises(case.error, match=case.match) as raised:
        OPEN[case.kind](path)
    assert isinstance(raised.value, StreamCNNError)
    assert "\n" not in str(raised.value)
    return None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hostile_files_are_read_or_refused(tmp_path, case):
    """The right result or the error expected, one line, within 5 seconds; nothing is written outside a store, or anywhere by reading."""
    (tmp_path / "in").mkdir()
    path = case.make(tmp_path / "in")
    before, start = _everything(tmp_path), time.perf_counter()
    result = _refused(case, path)
    assert time.perf_counter() - start < 5
    after = _everything(tmp_path)
    if case.kind == "use":  # the store itself may be written to
        inside = str(path)
        before, after = ({name: facts for name, facts in found.items() if not name.startswith(inside)} for found in (before, after))
    assert after == before
    if case.right is not None:
        assert result == case.right


def test_there_are_enough_of_them():
    """At least 40 files, a dozen of each kind."""
    assert len(CASES) >= 40
    assert all(sum(case.kind == kind for case in CASES) >= 12 for kind in ("images", "model", "store"))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit of data and its high-water mark are Linux's")
def test_bombs_stay_small_under_a_limit_of_the_kernel(tmp_path):
    """Each file that would fill the memory is refused (or read) within 192 MiB, in a process that cannot have much more."""
    command = [sys.executable, str(Path(__file__).with_name("hostile_files.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {name: (outcome, used) for name, outcome, used in map(json.loads, done.stdout.splitlines())}
    for case in CASES:
        if case.bomb:
            outcome, used = found[str(case)]
            assert outcome == ("read" if case.error is None else "refused"), (str(case), outcome)
            assert used < ROOM, (str(case), used)
