"""What the notebooks promise beyond what --nbval compares. nbval itself runs them all: ``make test``."""

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbval.plugin import IPyNbFile, coalesce_streams

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    numbers = [p.name[:2] for p in NOTEBOOKS]
    assert all(number.isdigit() for number in numbers) and len(set(numbers)) == len(numbers)
    assert len(NOTEBOOKS) >= 9


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
def test_opens_with_few_imports_and_has_short_cells(path):
    sources = [cell.source for cell in code_cells(read(path))]
    imports = [line for line in sources[0].splitlines() if line.startswith(("import ", "from "))]
    assert "import tdq_utils as tdq" in imports and len(imports) <= 6
    assert not [source for source in sources if len(source.splitlines()) > 25]


@each_notebook
def test_every_table_is_a_styled_one_with_a_caption_of_its_own(path):
    cells = code_cells(read(path))
    assert not [cell.source for cell in cells if "to_string(" in cell.source]
    shown = [output.data["text/html"] for cell in cells for output in cell.outputs if "text/html" in output.get("data", {})]
    tables = [html for html in shown if "<table" in html]
    assert all("<caption>" in html and 'class="dataframe"' not in html for html in tables)
    names = [re.search(r'<table id="(T_[0-9a-f]{8})"', html)[1] for html in tables]
    assert len(set(names)) == len(names)  # a style belongs to one table


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
def test_nbval_notices_any_changed_digit(path, request):
    """By nbval's own comparison of every cell: it takes what is stored, and refuses it with any one printed digit changed.

    (That the notebook, run again, prints what is stored is what ``make test`` itself shows.)
    """
    changes = 0
    for item in IPyNbFile.from_parent(request.session, path=path).collect():
        if not item.options["check"] or item.options["skip"]:
            continue
        stored = coalesce_streams(item.cell.outputs)
        assert item.compare_outputs(stored, stored)
        for i, output in enumerate(stored):
            holder, key = (output, "text") if "text" in output else (output.data, "text/html")
            for digit in re.finditer(r"\d" if key == "text" else r"\d(?=[^<>]*</td>)", holder.get(key, "")):
                changed, at = deepcopy(stored), digit.start()
                other = changed[i] if key == "text" else changed[i].data
                other[key] = f"{holder[key][:at]}{(int(digit[0]) + 1) % 10}{holder[key][at + 1 :]}"
                assert not item.compare_outputs(changed, stored)
                changes += 1
    assert changes, "the notebook prints no number that is compared"


def test_nbval_fails_on_a_changed_digit(tmp_path):
    """The command of ``make test`` itself, on a notebook of two cells: the one that stores a wrong number fails, no other."""
    cells = [new_code_cell(f"print({n})", outputs=[new_output("stream", text=f"{n}\n")], execution_count=n) for n in (1, 2)]
    cells[1].outputs[0].text = "3\n"
    nbformat.write(new_notebook(cells=cells), tmp_path / "corrupted.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "corrupted.ipynb"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "mismatch" in result.stdout
    assert "1 failed, 1 passed" in result.stdout


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
