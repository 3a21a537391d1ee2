"""A page needs no network: nothing in it names an address to load from, and what it needs is inside."""

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest
from ipywidgets import Widget
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tdq_utils.__main__ import main
from tdq_utils.errors import DataError
from tdq_utils.show import pages, site, widgets

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Loaded(HTMLParser):
    """What a page loads: ``src`` of anything and ``href`` of all but links to follow, and addresses in its styles."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.style = [], False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.style = tag == "style"
        named = [value for name, value in attrs if name in ("src", "srcset", "href", "data", "xlink:href") and tag != "a"]
        self.addresses += [value for value in named if not re.match("data:image/|#", value)]

    def handle_data(self, data):
        if self.style:
            self.addresses += re.findall(
                r"@import[^;]*|url\((?!['\"]?(?:data:|#))[^)]*\)", re.sub(r"/\*.*?\*/", "", data, flags=re.S)
            )


@pytest.fixture
def notebook():
    """A formula, and a slider panel with its state, as a kernel leaves it."""
    panel = widgets.frames(lambda value: plt.subplots(figsize=(1, 1))[0], [1, 2])
    view = {"application/vnd.jupyter.widget-view+json": dict(model_id=panel.model_id, version_major=2, version_minor=0)}
    state = {"application/vnd.jupyter.widget-state+json": Widget.get_manager_state()}
    cells = [
        new_markdown_cell("# A lesson\nWith $\\hat x$ and `$HOME`:\n\n$$\\frac{1}{2} < s$$"),
        new_code_cell("panel", execution_count=1, outputs=[new_output("execute_result", view, execution_count=1)]),
    ]
    return new_notebook(cells=cells, metadata={"widgets": state})


def test_the_script_is_the_pinned_one():
    digest = hashlib.sha256(site.WIDGETS.read_bytes()).hexdigest()
    assert digest == "8f6d2d3f856d8595d1841dec3019d99bbe74d331f2a5178c2a33bfec729e3d6a"
    assert digest in (site.WIDGETS.parent / "README.md").read_text()
    assert {"LICENSE", "embed.js.LICENSE.txt"} <= {path.name for path in site.WIDGETS.parent.iterdir()}
    assert "</script" not in site.WIDGETS.read_text()  # it would end the script inside of the page


def test_a_page_holds_its_slider_and_its_formulas(notebook, tmp_path):
    site.write_page(notebook, tmp_path / "new folder" / "page.html")
    page = (tmp_path / "new folder" / "page.html").read_text()
    assert "<title>A lesson</title>" in page
    assert site.WIDGETS.read_text()[:5000] in page and "SelectionSliderModel" in page
    assert page.count("<math") == 2 and "<mfrac>" in page and "$$" not in page.partition("<main>")[2]
    assert "<code>$HOME</code>" in page
    assert not Loaded(tmp_path / "new folder" / "page.html").addresses


def test_a_page_without_sliders_is_small(notebook, tmp_path):
    del notebook.metadata["widgets"], notebook.cells[1]
    site.write_page(notebook, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 500_000


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_no_lesson_loads_anything(path, tmp_path):
    site.write_page(nbformat.read(path, as_version=4), tmp_path / "page.html")
    assert not Loaded(tmp_path / "page.html").addresses


def test_the_default_page_of_nbconvert_would_be_noticed(notebook, tmp_path):
    (tmp_path / "page.html").write_text(site.HTMLExporter().from_notebook_node(notebook)[0])
    assert len(Loaded(tmp_path / "page.html").addresses) >= 2


def test_demo_prints_its_table_and_writes_such_a_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(nbclient.NotebookClient, "execute", lambda self: None)  # the stored outputs do
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "FCD" in printed and "static, MSE" in printed and "W8A5" in printed
    assert not Loaded(tmp_path / "quickstart.html").addresses


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    assert main(["site", "--out", str(folder)]) == 0
    return folder


def test_the_site_has_a_page_for_everything(built):
    names = {path.name for path in built.glob("*.html")}
    assert {"index.html", "search.html", "explorer.html", "readme.html", "data.html", "data-models-fashion-mnist.html"} <= names
    assert {f"{path.stem}.html" for path in LESSONS} <= names
    assert {f"table-{path.stem}.html" for path in (ROOT / "data/results").glob("*.csv")} <= names


def test_the_site_loads_its_own_files_only(built):
    for path in built.glob("*.html"):
        loaded = Loaded(path).addresses
        assert all((built / address).is_file() for address in loaded), (path.name, loaded)
    assert not re.search(r"@import|url\((?!data:)", (built / "assets" / "site.css").read_text())


def test_every_figure_has_a_text_of_its_own(built):
    for lesson in LESSONS:
        texts = re.findall(r'<figure tabindex="0"><img alt="([^"]*)"', (built / f"{lesson.stem}.html").read_text())
        assert texts and all(len(text) > 25 for text in texts), lesson.stem
        assert len(set(texts)) >= 0.9 * len(texts), lesson.stem


def test_an_earlier_site_is_replaced_and_nothing_else(built, tmp_path):
    (built / "old.html").touch()
    site.build(ROOT, built)
    assert not (built / "old.html").exists()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match="holds other files"):
        site.build(ROOT, tmp_path)
    with pytest.raises(DataError, match="has none"):
        site.build(tmp_path, tmp_path / "out")


def test_exercises_are_pages_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "exercises").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Kit\nSee [tasks](notebooks/exercises/00_a.ipynb) and [code](tdq_utils/x.py).")
    one = new_notebook(cells=[new_markdown_cell("# Lesson\n[tasks](exercises/00_a.ipynb)"), new_code_cell("1 < 2")])
    two = new_notebook(cells=[new_markdown_cell("# Tasks\n[back](../00_a.ipynb#part) [out](https://example.org)")])
    nbformat.write(one, tmp_path / "notebooks" / "00_a.ipynb")
    nbformat.write(two, tmp_path / "notebooks" / "exercises" / "00_a.ipynb")
    (tmp_path / "notebooks" / "exercises" / "TEACHING.md").write_text("# For teachers\nA plan.")
    site.build(tmp_path, out := tmp_path / "site")
    assert 'href="exercises-00_a.html"' in (out / "00_a.html").read_text()
    text = (out / "exercises-00_a.html").read_text()
    assert 'href="00_a.html#part"' in text and 'href="https://example.org"' in text
    assert 'href="exercises-TEACHING.html"' in text  # its neighbour
    assert "tdq_utils/x.py" not in (out / "readme.html").read_text()


def test_a_panel_that_needs_python_is_told_from_one_that_moves(notebook):
    state = {**notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]}
    view = notebook.cells[1].outputs[0].data["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert not pages.needs_kernel(view, state)
    unlinked = {name: model for name, model in state.items() if not model["model_name"].endswith("LinkModel")}
    assert pages.needs_kernel(view, unlinked)


def test_the_text_of_a_figure_is_its_title_its_function_and_the_sentence_before():
    text = pages.described('tdq.profile_plots.drift_heatmap(p, title="How ranges move")', "Bright is *wide*. Rows are layers.")
    assert text.startswith("How ranges move. ") and text.endswith("Bright is wide. Rows are layers")
    assert "layer" in text and pages.described("x", "").startswith("Figure")
