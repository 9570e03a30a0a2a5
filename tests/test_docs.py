"""The documentation: what it shows runs, what it links to is there, its tables are where they are written, Sphinx has nothing to say."""

import argparse
import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from children import CONTEXT
from pages import FENCE, ROOT, blocks, run_page

import streamcnn
from streamcnn.cli import build_parser

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
MARKED = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)


def name_of(page: Path) -> str:
    """As a test's parameter."""
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory, digits):
    """A folder with `photos/` and `test_photos/`, 20 and 10 digits a class, and `new_photos/` without classes."""
    from PIL import Image

    folder, (images, labels), used = tmp_path_factory.mktemp("photos"), digits, dict.fromkeys(range(10), 0)
    for row, (image, label) in enumerate(zip(images, labels.tolist())):
        used[label] += 1
        where = f"photos/{label}" if used[label] <= 20 else f"test_photos/{label}" if used[label] <= 30 else "new_photos"
        if used[label] <= 32:
            (folder / where).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0]).save(folder / where / f"{row}.png")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language in ("python", "console") for b in blocks(page))], ids=name_of)
def test_code_on_a_page_runs(page, photos, tmp_path):
    """Python blocks of a page run in order, in one namespace and a folder with images, and so do its quick commands."""
    folder, log = tmp_path / "here", tmp_path / "log.txt"
    shutil.copytree(photos, folder)
    process = CONTEXT.Process(target=run_page, args=(page, folder, log))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()
    if left_out := {name for block in blocks(page) for name in block.missing}:
        pytest.skip(f"all ran but for the block with {', '.join(left_out)}, which is not installed")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_known(page):
    """Each command on a page exists, with every option and extra it is shown with; no block is of a language that no test looks at."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for block in blocks(page):
        assert block.language in {"python", "console", "text", "{toctree}", "{include}", "{eval-rst}", "{command-help}"}, block.line
        for words in block.commands if block.language == "console" else []:
            if words[0] == "streamcnn" and words[1:] != ["--version"]:
                build_parser().parse_args(words[1:])  # leaves with usage where it does not know something
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), words
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), words
            elif words[0] == "pytest":
                assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words
            else:
                assert words[0] in {"streamcnn", "pip", "py", "python3", "source", ".venv/Scripts/Activate.ps1", "sphinx-build"}, words
    # the README's sentences about extras too
    for names in re.findall(r'pip install "\.\[(\w+)\]"', page.read_text(encoding="utf-8")):
        assert names in extras


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Each relative link and picture of a page is a file of the project, and what it points at there is a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        assert file.resolve().is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            assert anchor in map(slug, headings), target


def strings(path: Path) -> list[str]:
    """All strings of a module, those with fields as one, each field a line feed."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_messages_that_are_explained_exist():
    """Each message that is a heading of the page on troubleshooting is one that the package can say."""
    said = [text for path in Path(streamcnn.__file__).parent.rglob("*.py") for text in strings(path)]
    headings = re.findall(r"^### `(.*)`$", prose(DOCS / "troubleshooting.md"), re.MULTILINE)
    assert len(headings) > 15
    for heading in headings:
        assert len(heading.replace("...", "").strip()) >= 10, f"{heading} would be found anywhere"
        pattern = re.compile(r"\n".join(map(re.escape, heading.split("..."))))
        assert any(pattern.search(text) for text in said), heading


# -- tables ------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def bench(monkeypatch):
    """`tools/bench.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench")


def test_the_smallest_limit_of_a_table_is_one_that_is_planned(bench, tmp_path):
    """The limit of the table of limits would do, and a hundredth less is refused."""
    np.save(tmp_path / "d.npy", np.zeros((40, 16, 16), np.uint8))
    np.save(tmp_path / "d_labels.npy", np.arange(40) % 2)
    limit = bench.smallest_limit(tmp_path / "d.npy", "fast", tmp_path)
    for allowed, code in ((limit, 0), (limit * 99 // 100, 1)):
        command = [sys.executable, "-m", "streamcnn", "plan", str(tmp_path / "d.npy"), "--memory-limit", str(allowed)]
        assert subprocess.run(command, capture_output=True, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}).returncode == code


def test_tables_are_written_wherever_their_markers_stand(bench, tmp_path, monkeypatch):
    """A table replaces what stands between its markers on each page that has them; paths of pictures are the page's; others stay."""
    (tmp_path / "docs").mkdir()
    texts = {"README.md": "a\n<!-- x -->\nold\n<!-- /x -->\nb\n", "docs/p.md": "<!-- x -->\n<!-- /x -->\n<!-- y -->\nc\n<!-- /y -->\n"}
    for name, text in (texts | {"docs/q.md": "d\n"}).items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    bench.write("x", r"![p](docs/p.png) \1")
    assert (tmp_path / "README.md").read_text() == "a\n<!-- x -->\n![p](docs/p.png) \\1\n<!-- /x -->\nb\n"
    assert (tmp_path / "docs/p.md").read_text() == "<!-- x -->\n![p](p.png) \\1\n<!-- /x -->\n<!-- y -->\nc\n<!-- /y -->\n"
    assert (tmp_path / "docs/q.md").read_text() == "d\n"
    with pytest.raises(SystemExit, match=r"neither README\.md nor docs/\*\.md has markers for z"):
        bench.write("z", "")


def test_each_table_has_one_content_and_a_measurement(bench, monkeypatch):
    """Tables that stand on two pages are the same there, and the tool knows how to measure each, and no other."""
    tables: dict[str, str] = {}
    for page in PAGES:
        for name, text in MARKED.findall(page.read_text(encoding="utf-8")):
            text = text.replace("](docs/", "](")
            assert tables.setdefault(name, text) == text, (page, name)
    for variable in ("STREAMCNN_DATA", "STREAMCNN_LARGE"):
        monkeypatch.setenv(variable, "/none")
    with pytest.raises(SystemExit) as raised:
        bench.main(["nothing"])
    assert set(str(raised.value).partition("there are ")[2].split(", ")) == set(tables)


# -- Sphinx ------------------------------------------------------------------------------------------------------------------
def directives(kind: str) -> list[str]:
    """Full names that the API pages document by a directive such as `autoclass`."""
    names = []
    for page in (DOCS / "api").glob("*.md"):
        found = re.findall(rf"^\.\. {kind}:: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        names += [name if name.startswith("streamcnn.") else f"streamcnn.{name}" for name in found]
    return names


def found_by(name: str):
    """The object of a full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_public_name_has_its_place():
    """The API pages have each public name, the page of commands each command."""
    documented = set(directives("autoclass") + directives("autofunction"))
    documented.add("streamcnn.StreamCNNError")  # with its module
    assert {f"streamcnn.{name}" for name in streamcnn.__all__} <= documented
    assert {f"streamcnn.{name}" for name in ("displays", "datasets", "errors")} <= set(directives("automodule"))
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    shown = re.findall(r"^```{command-help} (\w+)$", (DOCS / "command-line.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert shown == list(commands.choices)


def command_tables() -> list[str]:
    """Rows of the tables of commands and of flags, as the parser has them."""
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    heads, flags = [], {}
    for name, parser in commands.items():
        words = [f"streamcnn {name}"]
        for action in parser._actions:
            if not action.option_strings:
                words.append(action.choices[0] if action.choices else action.dest.upper())
            elif action.dest != "help":
                values = action.metavar or "|".join(action.choices or [])
                flag = f"{action.option_strings[0]} {values}".strip().replace("|", r"\|")
                flags.setdefault((flag, (action.help or "").replace("%%", "%")), []).append(name)
                words += [flag] if action.required else []
        heads.append(f"| `{' '.join(words)}` | {parser.description} |")
    return heads + [f"| `{flag}` | {', '.join(names)} | {text} |" for (flag, text), names in flags.items()]


def test_the_tables_of_commands_are_the_parsers():
    """The page of the command line, which a code host shows without the parser's help, has each command and flag with what it does."""
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    rows = command_tables()
    assert [line for line in page.splitlines() if line.startswith(("| `streamcnn ", "| `--"))] == rows, "\n".join(rows)


@pytest.mark.parametrize("name", directives("autoclass") + directives("autofunction"))
def test_parameters_are_documented(name):
    """The docstring of a public class or function names each parameter of its signature, and no other."""
    docscrape = pytest.importorskip("numpydoc.docscrape", reason="numpydoc is not installed: docstrings are not parsed")
    value = found_by(name)
    documented = [one.strip("* ") for parameter in docscrape.FunctionDoc(value)["Parameters"] for one in parameter.name.split(",")]
    accepted = [parameter for parameter in inspect.signature(value).parameters if parameter != "self"]
    assert set(documented) == set(accepted), name


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The documentation as a web site, and what Sphinx said."""
    for library in ("sphinx", "myst_parser", "numpydoc", "furo"):
        pytest.importorskip(library, reason=f"{library} is not installed: the documentation is not built")
    folder = tmp_path_factory.mktemp("html")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-n",
        "-d",
        str(folder / "doctrees"),
        str(DOCS),
        str(folder / "html"),
    ]
    return folder / "html", subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_sphinx_builds_without_warnings(built):
    """The documentation builds with warnings as errors and every reference checked, and holds names, help and changes."""
    html, done = built
    assert done.returncode == 0, done.stderr
    pages = "".join(page.read_text(encoding="utf-8") for page in (html / "api").glob("*.html"))
    for name in streamcnn.__all__:
        assert re.search(rf'id="streamcnn\.(errors\.)?{name}"', pages), name
    assert re.search(r"<code[^>]*>(<span[^>]*>)?\.npz<", pages)  # a dot is no part of a name
    assert "--keep-features" in (html / "command-line.html").read_text(encoding="utf-8")
    assert "0.1.0" in (html / "changelog.html").read_text(encoding="utf-8")
