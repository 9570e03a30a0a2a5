"""Runs the README's measurements and writes its tables; numbers in the README come from here only.

python tools/bench.py                    demo
STREAMCNN_DATA=... python tools/bench.py  demo, Extended Yale B
"""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from streamcnn.reproduce import PAPER

README = Path(__file__).parent.parent / "README.md"


def run(*arguments: str) -> dict[str, Any]:
    """The JSON object of a streamcnn command, run in a fresh process."""
    command = [sys.executable, "-m", "streamcnn", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def mib(n_bytes: int) -> str:
    """Bytes as MiB."""
    return f"{n_bytes / 2**20:,.0f} MiB"


def demo_table() -> str:
    """What `streamcnn demo` measures."""
    r = run("demo")
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in r["stage_seconds"].items() if name != "evaluate")
    train = sum(seconds for name, seconds in r["stage_seconds"].items() if name != "evaluate")
    rows = [
        ("data on disk", f"{mib(r['data_bytes'])}, {r['n_train'] + r['n_test']:,} images of 64 x 64"),
        ("memory limit", mib(r["memory_limit_bytes"])),
        ("peak resident memory of the process", f"{mib(r['peak_rss_bytes'])} ({mib(r['planned_peak_bytes'])} planned)"),
        ("accuracy on variants of digits never trained on", f"{100 * r['accuracy']:.2f} %"),
        ("training", f"{train:.1f} s ({stages})"),
        ("machine", f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"),
    ]
    return "\n".join(["| `streamcnn demo` | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def yale_table(folder: Path) -> str:
    """`streamcnn reproduce lee2017` beside the paper's figures."""
    r = run("reproduce", "lee2017", str(folder), "--seeds", "5", "--memory-limit", "1GiB")
    ours = [f"{100 * r['accuracy'][s]:.2f} ± {100 * r['accuracy_std'][s]:.2f}" for s in ("2", "3")]
    lines = ["| Extended Yale B | subset 2, % | subset 3, % | learning | memory |", "|---|---|---|---|---|"]
    lines.append(f"| streamcnn, preset `lee2017`, 5 seeds | {' | '.join(ours)} | {r['train_seconds']:.1f} s | {mib(r['peak_rss_bytes'])} |")
    for who, (accuracy, seconds, kilobytes) in PAPER.items():
        lines.append(f"| {who} | {accuracy['2']:g} | {accuracy['3']:g} | {seconds:,} s | {mib(1024 * kilobytes)} |")
    return "\n".join(lines)


def write(name: str, table: str) -> None:
    """Put a table between its markers in the README."""
    text = README.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no markers for {name}")
    README.write_text(pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text), encoding="utf-8")


def main() -> None:
    """Measure everything there is data for."""
    write("demo", demo_table())
    if folder := os.environ.get("STREAMCNN_DATA"):
        write("yale", yale_table(Path(folder) / "CroppedYale"))


if __name__ == "__main__":
    main()
