"""Execute the notebooks in fresh kernels and save them with their outputs.

python tools/run_notebooks.py                                    all of them
python tools/run_notebooks.py notebooks/01_quickstart.ipynb      some

Each runs in a temporary folder of its own beside the `.csv` files that notebooks read. Needs the extra `test`, `STREAMCNN_DATA` for the
third one's faces, and an environment without ipywidgets: bars are then text, which also those see who only look at the file.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LARGEST_BYTES = 310_000
# folders of a user or a machine, on Linux, macOS and Windows; and what a kernel calls a cell's file
_MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|private|var/folders)/\S*|[A-Za-z]:\\+\S*|site-packages|ipykernel_\d+")
_ALARM = re.compile(r"Warning\b|Traceback|\x1b\[")


def execute(path: Path, folder: Path, more: str = "") -> Any:
    """A copy of the notebook executed in `folder`, its outputs tidied.

    Parameters
    ----------
    path : Path
    folder : Path
        Where its kernel works; gets the data files that lie beside the notebook.
    more : str
        Code to execute after the last cell, which is not kept.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell, or `more`, raises.
    """
    for data in path.parent.glob("*.csv"):
        shutil.copy(data, folder)
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    n_cells = len(book.cells)
    if more:
        book.cells.append(nbformat.v4.new_code_cell(more))
    # a test run may have chosen a backend that draws nowhere
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client = NotebookClient(book, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    del book.cells[n_cells:]
    tidy(book)
    return book


def tidy(book: Any) -> None:
    """Leave away what is of the moment or the machine: states of widgets, each state of a bar but the last, metadata."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        kept: list[Any] = []
        for output in cell.outputs:
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                continue
            if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
        cell.outputs = kept


def problems(path: Path) -> list[str]:
    """What is wrong with a saved notebook, a sentence each."""
    book, found = json.loads(path.read_text(encoding="utf-8")), []
    if (size := path.stat().st_size) > LARGEST_BYTES:
        found.append(f"has {size:,} bytes, more than {LARGEST_BYTES:,}")
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("was not executed from top to bottom as it is")
    for cell in cells:
        for output in cell["outputs"]:
            texts = {name: value for name, value in output.get("data", {}).items() if not name.startswith("image/")}
            text = json.dumps([texts, output.get("text"), output.get("traceback")], ensure_ascii=False)
            where = f"cell {cell['execution_count']}"
            if output["output_type"] == "error" or output.get("name") == "stderr" or _ALARM.search(text):
                found.append(f"{where} shows an error or a warning: {text[:200]}")
            if (machine := _MACHINE.search(text)) is not None:
                found.append(f"{where} names a place of this machine: {machine[0]}")
    return found


def main(paths: list[str]) -> int:
    """Execute and save; the exit code says whether anything is wrong with one of them."""
    wrong = 0
    for path in map(Path, paths) if paths else sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            nbformat.write(execute(path, Path(folder)), path)
        for problem in problems(path):
            sys.stderr.write(f"{path.name} {problem}\n")
            wrong += 1
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
