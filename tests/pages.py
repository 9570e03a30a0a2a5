"""Code blocks of a page of the documentation, and a process that runs them in a folder of images."""

import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what is run; the other commands take too long or need data that are not there, and are parsed only
QUICK = {"plan", "fit", "predict", "evaluate", "report", "verify", "info"}
# so that what takes long on a page is short here
SHORTER = {"15min": "1s", "20GiB": "1MiB", "100000": "100"}
OPTIONAL = {"torch"}


@dataclass
class Block:
    """A fenced block: the line it begins in, its language, its text."""

    line: int
    language: str
    text: str

    @property
    def short(self) -> str:
        """Its text with what takes long made short."""
        return re.sub("|".join(SHORTER), lambda match: SHORTER[match[0]], self.text)

    @property
    def missing(self) -> set[str]:
        """Optional libraries that it imports and that are not installed."""
        imported = set(re.findall(r"^(?:import|from) (\w+)", self.text, re.MULTILINE))
        return {name for name in imported & OPTIONAL if find_spec(name) is None}

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command of a console block."""
        lines = self.short.replace("\\\n", "").splitlines()
        # on Windows a backslash is part of a path
        return [shlex.split(line.replace("\\", "/"), comments=True) for part in lines for line in part.split(" && ") if line]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(text[: match.start()].count("\n") + 1, match[1], match[2]) for match in FENCE.finditer(text)]


def run_page(page: Path, folder: Path, log: Path) -> None:
    """Run Python blocks in one namespace, and commands, in order; the process ends with exit code 1 where one fails.

    `folder` is the current folder meanwhile, and `log` is told of each block that is begun, and gets all output.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    sys.path.insert(0, str(ROOT / "tools"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        sys.stderr.write(f"# {page.name}, line {block.line}\n")
        if block.language == "python" and not block.missing:
            exec(compile(block.short, f"{page.name} from line {block.line}", "exec"), namespace)  # noqa: S102 - our own pages
        elif block.language == "console":
            for words in block.commands:
                _run_command(words)
    sys.stdout.flush()


def _run_command(words: list[str]) -> None:
    from streamcnn import cli

    if words[0] == "streamcnn" and words[1] in QUICK and "cuda" not in words:
        sys.stderr.write(f"$ {' '.join(words)}\n")
        if (code := cli.main(words[1:])) != 0:
            sys.exit(f"exit code {code}")
    elif words[:2] == ["python", "tools/make_dataset.py"]:
        code = runpy.run_path(str(ROOT / words[1]))["main"](words[2:])
        assert code == 0, words
