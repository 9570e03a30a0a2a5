"""The frontier of presets: what is measured is not measured again, and the picture and table show it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def frontier(tmp_path, monkeypatch):
    """The tool, writing into a folder of its own, whose cells cost nothing; `calls` are those that were measured."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import frontier

    calls = []

    def run(command, **options):
        name, number = command[-2], int(command[-1])
        calls.append((name, number))
        candidate = frontier.cells()[number]
        line = dict.fromkeys(frontier.COLUMNS, "") | {"data": name, "preset": candidate.preset, "changed": frontier.changed(candidate)}
        if number == 5:
            line["reason"] = "too small, said so"
        else:
            line |= {"accuracy": 0.9 + number / 100, "seconds": 1.5 * (number + 1), "peak_bytes": (300 + number) << 20}
        return SimpleNamespace(stdout=f"noise\n{json.dumps(line)}\n")

    monkeypatch.setattr(frontier, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.setattr(frontier, "ROWS", tmp_path / "frontier.csv")
    monkeypatch.setattr(frontier, "PICTURE", tmp_path / "docs" / "frontier.png")
    monkeypatch.delenv("STREAMCNN_DATA", raising=False)
    return SimpleNamespace(tool=frontier, calls=calls)


def test_each_cell_is_measured_once(frontier):
    """A run that was stopped goes on with the cells that have no line, and one that is complete measures nothing."""
    tool, n = frontier.tool, len(frontier.tool.cells())
    table = tool.table()
    assert frontier.calls == [("digits", number) for number in range(n)]
    lines = tool.ROWS.read_text().splitlines()
    assert len(lines) == n + 1
    tool.ROWS.write_text("\n".join([*lines[:6], *lines[7:]]) + "\n")
    frontier.calls.clear()
    assert tool.table() == table
    assert frontier.calls == [("digits", 5)]
    assert "| `fast` | 48 filters | 90.00 %, 1.5 s, 300 MiB |" in table
    assert len([row for row in table.splitlines() if row.endswith("| - |")]) == 1  # the cell that could not be


def test_the_picture_is_small_and_seen_on_any_ground(frontier):
    """The picture takes less than 80 kB, has no ground of its own, and its points have the colours of their presets."""
    frontier.tool.table()
    assert frontier.tool.PICTURE.stat().st_size < 80_000
    with Image.open(frontier.tool.PICTURE) as picture:
        pixels = picture.convert("RGBA")
    assert pixels.getpixel((0, 0))[3] == 0
    found = {colour[:3] for _, colour in pixels.getcolors(1 << 20) if colour[3] > 240}
    for colour, _ in frontier.tool._STYLE.values():
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        # 64 colours are kept: the nearest is less than a sixteenth of the range off
        assert min(max(abs(a - b) for a, b in zip(rgb, other)) for other in found) < 16, colour


def test_a_cell_in_its_own_process_says_what_is_not_possible(tmp_path):
    """A cell prints one line; images too small for a preset are a line with the reason, as the others are with figures."""
    done = subprocess.run([sys.executable, TOOLS / "frontier.py", "digits", "3"], capture_output=True, text=True, check=True)
    line = json.loads(done.stdout)
    assert (line["preset"], line["accuracy"]) == ("lee2017", "")
    assert "kernel_size of 5 x 5 is larger" in line["reason"]
