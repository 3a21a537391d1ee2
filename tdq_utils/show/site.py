"""Notebooks as pages that open from a disk, without a network: sliders move, formulas are set, nothing is fetched."""

from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.exporters.html import contextfilter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

WIDGETS = Path(__file__).parent / "assets" / "embed.js"

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


class _MathRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers set by themselves."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


class _Page(HTMLExporter):
    @contextfilter
    def markdown2html(self, context: object, source: str) -> str:
        return MarkdownWithMath(renderer=_MathRenderer(escape=False)).render(source)


def write_page(notebook: NotebookNode, path: Path) -> None:
    """An executed notebook, with the state of its widgets -> one HTML file that needs no other and no network."""
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    resources = {"metadata": {"name": title}, "widgets": WIDGETS.read_text().rpartition("//# sourceMappingURL")[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_Page(raw_template=TEMPLATE).from_notebook_node(notebook, resources)[0])
