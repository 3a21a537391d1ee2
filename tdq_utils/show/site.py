"""The site: lessons, explorer, measured tables and cards as plain files that open from a disk; nothing is fetched."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbconvert.exporters.html import contextfilter
from nbformat import NotebookNode

from tdq_utils.errors import DataError
from tdq_utils.show import explorer, pages
from tdq_utils.show.tables import significant

ASSETS = Path(__file__).parent / "assets"
WIDGETS = ASSETS / "embed.js"

# nbconvert's page without what it loads. The widgets' script looks for its own address, and stops where it has none, as inside
# of a page; any will do: what runs already is not fetched.
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}<style>
math { font-size: 1.2em } math[display=block] { margin: 0.6em 0 } .jp-CodeCell .highlight pre { white-space: pre-wrap }
</style>{%- endblock -%}
{%- block jupyter_widgets -%}{%- if 'widgets' in nb.metadata -%}
<script>document.currentScript.src = "embed.js";{{ resources.widgets }}</script>
{%- endif -%}{%- endblock -%}
"""


class _Page(HTMLExporter):
    @contextfilter
    def markdown2html(self, context: object, source: str) -> str:
        return pages.markdown(source)


def write_page(notebook: NotebookNode, path: Path) -> None:
    """An executed notebook, with the state of its widgets -> one HTML file that needs no other and no network."""
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    resources = {"metadata": {"name": title}, "widgets": WIDGETS.read_text().rpartition("//# sourceMappingURL")[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_Page(raw_template=TEMPLATE).from_notebook_node(notebook, resources)[0])


@dataclass
class Page:
    """A page of the site: file ``name``, ``title``, inside ``html``, the ``group`` of the index it stands in, one line on it."""

    name: str
    title: str
    html: str
    group: str
    line: str = ""
    moves: bool = False


GROUPS = ("Lessons", "Exercises", "Measured tables", "About")
FOLDERS = dict(zip(("notebooks", "notebooks/exercises", "data/results"), GROUPS, strict=False))


def build(root: Path, out: Path) -> int:
    """Write the site of a repository at ``root`` into folder ``out``, which is emptied first; returns the number of pages.

    Lessons and exercises are shown as they were committed; nothing is executed. DataError: no notebooks there, or ``out`` holds
    something else than a site.
    """
    if not list((root / "notebooks").glob("*.ipynb")):
        raise DataError(f"The site is made of a repository's notebooks/; {root} has none. Run it from a clone of the repository.")
    if out.exists() and any(out.iterdir()) and not (out / "assets" / "site.css").exists():
        raise DataError(f"--out must be an empty or new folder, or an earlier site, which is replaced; {out} holds other files.")
    shutil.rmtree(out, ignore_errors=True)
    (out / "assets").mkdir(parents=True)
    for name in ("site.css", "site.js", "embed.js", "embed.js.LICENSE.txt"):
        shutil.copy(ASSETS / name, out / "assets")
    found = list(_pages(root))
    for page in found:
        _write(page, found, out)
    index = Page("index.html", "Quantizing diffusion models over time steps", _index(found), "")
    search = Page("search.html", "Search", '<h1>Search</h1><ul id="hits" class="hits"></ul>', "")
    for page in (index, search):
        _write(page, found, out)
    words = [[page.name, page.title, *part] for page in found for part in pages.sections(page.html)]
    (out / "assets" / "search.js").write_text(f"window.INDEX = {json.dumps(words, ensure_ascii=False)};\n")
    (out / "explorer.html").write_text(explorer.page(explorer.shipped(), "index.html"))
    (out / ".nojekyll").touch()
    return len(found) + 3


def _sources(root: Path) -> dict[str, str]:
    """Files of the repository that are pages: ``{path: page}``."""
    found = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        found[f"notebooks/{path.name}"] = f"{path.stem}.html"
    for path in sorted((root / "notebooks" / "exercises").glob("*.[im][pd]*")):
        found[f"notebooks/exercises/{path.name}"] = f"exercises-{path.stem}.html"
    for path in sorted((root / "data" / "results").glob("*.csv")):
        found[f"data/results/{path.name}"] = f"table-{path.stem}.html"
    cards = sorted(path.relative_to(root).as_posix() for path in (root / "data").rglob("README.md"))
    for card in ("README.md", *cards):
        found[card] = f"{'-'.join(Path(card).parts[:-1]) or 'readme'}.html"
    return found


def _pages(root: Path) -> Iterator[Page]:
    sources = _sources(root)
    for path, name in sources.items():
        folder, file = str(Path(path).parent), root / path
        group, moves = FOLDERS.get(folder, "About"), False
        if file.suffix == ".ipynb":
            html, moves = pages.lesson(nbformat.read(file, as_version=4))
        elif file.suffix == ".csv":
            html = _table(file)
        else:
            html, group = pages.markdown(file.read_text()), group if group == "Exercises" else "About"
        html = pages.relinked(html, folder, sources, root)
        head = re.search(r"<h1[^>]*>(.*?)</h1>", html, flags=re.S)
        goal = re.search(r"<strong>Goal\.</strong>(.*?)</p>", html, flags=re.S)
        line = f"{len(pd.read_csv(file))} rows" if file.suffix == ".csv" else pages.plain(goal[1] if goal else _opening(html))
        yield Page(name, pages.plain(head[1]) if head else file.stem, html, group, line, moves)


def _opening(html: str) -> str:
    first = re.search(r"<p>(?!<img)(.*?)(?<=[.:])(?=\s|</p>)", html, flags=re.S)
    return first[1] if first else ""


def _table(file: Path) -> str:
    """A measured table; its columns can be sorted."""
    frame = pd.read_csv(file, dtype={"model": str})
    shown = {name: significant(4) for name in frame.select_dtypes("float")}
    html = frame.to_html(index=False, border=0, classes="sortable", formatters=shown, na_rep="", justify="left")
    note = ('What the columns mean, and the command that measured each file: <a href="README.md">the tables\' README</a>. '
            "Click a head to sort.")  # fmt: skip
    return f'<h1>{file.stem}.csv</h1><p>{note}</p><div class="scroll wide" tabindex="0">{html}</div>'


def _index(found: Sequence[Page]) -> str:
    groups = []
    for group in GROUPS:
        items = [f'<li><a href="{page.name}">{escape(page.title)}</a><p>{escape(page.line)}</p></li>' for page in found
                 if page.group == group]  # fmt: skip
        groups += [f'<section><h2>{group}</h2><ul class="cards">{"".join(items)}</ul></section>'] if items else []
    return f"""<h1>Quantizing diffusion models over time steps</h1>
<p class="lead">Why one fixed low-bit interval damages a diffusion model, and what an interval that follows the time step gives
back. Lessons with their results, sliders that move without a kernel, every measured number.</p>
<a class="hero" href="explorer.html"><b>One interval for every moment?</b><span>Drag the interval of any layer, play from noise to
image, compare a constant, a table and TDQ. Open the explorer &rarr;</span></a>{"".join(groups)}"""


def _write(page: Page, found: Sequence[Page], out: Path) -> None:
    """The page in its frame: the same head everywhere, links to its neighbours."""
    alike = [one for one in found if one.group == page.group]
    at = alike.index(page) if page in alike else -1
    beside = [("prev", alike[at - 1] if at > 0 else None), ("next", alike[at + 1] if 0 <= at < len(alike) - 1 else None)]
    words = {"prev": "Previous", "next": "Next"}
    links = "".join(f'<a rel="{rel}" href="{one.name}"><small>{words[rel]}</small>{escape(one.title)}</a>' for rel, one in beside
                    if one)  # fmt: skip
    here = {page.name: " aria-current=page"}
    menu = "".join(f'<li><a href="{one.name}"{here.get(one.name, "")}>{escape(one.title)}</a></li>' for one in alike)
    scripts = ['<script src="assets/search.js"></script>'] if page.name == "search.html" else []
    scripts += ['<script src="assets/embed.js"></script>'] if page.moves else []
    text = Template((ASSETS / "site.html").read_text()).substitute(
        title=escape(page.title), body=page.html,
        beside=f'<nav class="beside" aria-label="Neighbours">{links}</nav>' if links else "",
        menu=f"<details class=menu><summary>{page.group}</summary><ul>{menu}</ul></details>" if page.group else "",
        scripts="".join(scripts))  # fmt: skip
    (out / page.name).write_text(text)
