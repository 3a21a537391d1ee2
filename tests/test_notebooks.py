"""What the notebooks promise beyond what --nbval compares. nbval itself runs them all: ``make test``."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def nbval(path):
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-q", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent)


def test_there_are_notebooks():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{i:02d}" for i in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 5


@each_notebook
def test_is_executed_in_order_and_clean(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@each_notebook
def test_opens_and_ends_as_every_lesson_does(path):
    first, last = read(path).cells[0].source, read(path).cells[-1].source
    for word in ("Goal.", "What you will do.", "Prerequisites.", "Minutes:"):
        assert f"**{word}**" in first
    for word in ("## Takeaways", "## Exercises\n1. ", "\n2. ", "**Next:**"):
        assert word in last


@each_notebook
def test_local_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
        assert (path.parent / target).exists(), target


@each_notebook
def test_every_panel_has_a_static_twin(path):
    """The cell after a slider panel holds a picture for readers without a kernel."""
    cells = [cell for cell in code_cells(read(path)) if cell.source]
    panels = [i for i, cell in enumerate(cells) if re.search(r"widgets\.(frames|live)\(", cell.source)]
    for i in panels:
        assert "nbval-ignore-output" in cells[i].metadata.tags
        assert any("image/png" in output.get("data", {}) for output in cells[i + 1].outputs)


@each_notebook
def test_nbval_notices_a_changed_number(path, tmp_path):
    """One stored digit is changed in a copy that ends right after it: that cell must fail, and no other.

    (That the unchanged notebook passes is what ``make test`` itself shows.)
    """
    notebook, number = read(path), re.compile(r"\d")
    compared = [
        (end, output)
        for end, cell in enumerate(notebook.cells, start=1)
        if cell.cell_type == "code" and "nbval-ignore-output" not in cell.metadata.get("tags", [])
        for output in cell.outputs
        if number.search(output.get("text", ""))
    ]
    assert compared, "the notebook prints no number that is compared"
    end, output = compared[0]
    notebook.cells = notebook.cells[:end]
    for cell in notebook.cells:  # tests run two at a time, and four threads on two cores wait for each other
        cell.source = cell.source.replace("set_num_threads(2)", "set_num_threads(1)")
    output.text = number.sub(lambda digit: str((int(digit[0]) + 1) % 10), output.text, count=1)
    nbformat.write(notebook, tmp_path / "corrupted.ipynb")
    result = nbval(tmp_path / "corrupted.ipynb")
    assert result.returncode == 1
    assert "mismatch" in result.stdout
    assert "1 failed" in result.stdout


def test_kernels_have_no_network():
    """The guard that conftest.py puts around notebook kernels works, and lets loopback through."""
    code = (
        "import socket, urllib.request\n"
        "server = socket.create_server(('127.0.0.1', 0)); socket.create_connection(server.getsockname()).close()\n"
        "try: urllib.request.urlopen('http://192.0.2.1/', timeout=1)\n"
        "except OSError as error: print(error)\n"
        "try: urllib.request.urlopen('http://example.org/', timeout=1)\n"
        "except OSError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.count("blocked by tests/offline") == 2
