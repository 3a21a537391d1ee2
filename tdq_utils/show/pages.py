"""Notebooks and Markdown as the insides of pages: formulas as MathML, every figure with a text, links that lead somewhere."""

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from html import escape, unescape
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from tdq_utils.show import plots, profile_plots, result_plots

VIEW, STATE = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("view", "state"))
NO_KERNEL = """<aside class="card-link"><p>This panel redraws by Python, so it needs a running kernel. Below is its static twin;
the explorer does the same without a kernel.</p><a class="button" href="explorer.html">Open the explorer</a></aside>"""


class MathRenderer(IPythonRenderer):
    """Formulas as MathML, which browsers set by themselves."""

    def block_math(self, body: str) -> str:
        """A formula on its own line."""
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        """A formula inside of a sentence."""
        return convert(body)


def markdown(source: str) -> str:
    """Markdown with mathematics -> HTML; headings have anchors."""
    html = MarkdownWithMath(renderer=MathRenderer(escape=False)).render(source)
    return re.sub(r'<a class="anchor-link".*?</a>', "", html)


def plain(html: str) -> str:
    """The words of HTML, on one line."""
    bare = re.sub(r"<(style|script|math|annotation)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def relinked(html: str, base: str, pages: Mapping[str, str], root: Path) -> str:
    """Local links of a file in folder ``base`` of the repository -> pages of the site; pictures go inside.

    A link to what is on no page becomes plain text: nobody knows where the repository is.
    """

    def target(address: str) -> tuple[str, str]:
        path, _, anchor = address.partition("#")
        parts: list[str] = []
        for part in PurePosixPath(base, path).parts:
            if part != "..":
                parts.append(part)
            elif parts:
                parts.pop()
        return "/".join(parts), f"#{anchor}" if anchor else ""

    def link(match: re.Match) -> str:
        if re.match(r"[a-z]+:|#", match[1]):
            return match[0]
        path, anchor = target(match[1])
        return f'<a href="{pages[path]}{anchor}"{match[2]}>{match[3]}</a>' if path in pages else match[3]

    def picture(match: re.Match) -> str:
        path = root / target(match[1])[0]
        return f'src="data:image/png;base64,{b64encode(path.read_bytes()).decode()}"' if path.suffix == ".png" else match[0]

    html = re.sub(r'<a href="([^"]*)"([^>]*)>(.*?)</a>', link, html, flags=re.S)
    return re.sub(r'src="(?!data:)([^"]*)"', picture, html)


def described(source: str, before: str) -> str:
    """What a figure shows, for those who cannot see it: its title, what its function draws, and the sentences before it."""
    found = [title for title in re.findall(r'(?:title=|set_title\()"([^"{}]{6,})"', source)][:2]
    for name in re.findall(r"tdq\.(?:profile_plots|result_plots|plots)\.(\w+)\(", source)[:1]:
        functions = [getattr(module, name) for module in (profile_plots, result_plots, plots) if hasattr(module, name)]
        found += [
            re.split(r"(?<=[.;])\s", plain(function.__doc__).replace("``", ""))[0].rstrip(";") for function in functions[:1]
        ]
    sentences = re.split(r"(?<=[.:])\s", re.sub(r"[*`$]", "", before))
    found += [" ".join(sentences)[:220]] if before else []
    return ". ".join(dict.fromkeys(part.strip().rstrip(".") for part in found if part)) or "Figure made by the code above"


def needs_kernel(model_id: str, state: Mapping[str, Any]) -> bool:
    """Whether a widget of a view has a control that only Python answers: no link of the page ties it to another widget."""
    linked = json.dumps([model["state"] for model in state.values() if model["model_name"].endswith("LinkModel")])
    seen, stack = set(), [model_id]
    while stack:
        if (one := stack.pop()) in seen or one not in state:
            continue
        seen.add(one)
        stack += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[one]["state"]))
    controls = [one for one in seen if re.search("Slider|Dropdown|ToggleButtons|Checkbox", state[one]["model_name"])]
    controls = [one for one in controls if not state[one]["model_name"].endswith("StyleModel")]
    return any(f"IPY_MODEL_{one}" not in linked for one in controls)


def inside(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside of a script."""
    return json.dumps(data).replace("</", "<\\/")


def _outputs(cell: NotebookNode, before: str, state: Mapping[str, Any]) -> Iterator[str]:
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if output.output_type == "stream":
            yield f'<pre class="out" tabindex="0">{escape(output.text)}</pre>'
        elif VIEW in data:
            alt = escape(described(cell.source, before), quote=True)
            shown = inside(data[VIEW])
            dead = needs_kernel(data[VIEW]["model_id"], state)
            yield NO_KERNEL if dead else f'<div class="panel" data-alt="{alt}"><script type="{VIEW}">{shown}</script></div>'
        elif "image/png" in data:
            alt = escape(described(cell.source, before), quote=True)
            source = "data:image/png;base64," + "".join(data["image/png"].split())
            yield f'<figure tabindex="0"><img alt="{alt}" src="{source}"></figure>'
        elif "text/html" in data:
            yield f'<div class="out scroll" tabindex="0">{data["text/html"]}</div>'
        elif "text/plain" in data:
            yield f'<pre class="out" tabindex="0">{escape(data["text/plain"])}</pre>'


def lesson(notebook: NotebookNode) -> tuple[str, bool]:
    """A notebook with its stored outputs -> HTML, and whether it holds widgets that move."""
    state = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    parts, before = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(html := markdown(cell.source))
            before = plain(re.sub(r"<h\d.*?</h\d>", " ", html, flags=re.S))
        elif cell.cell_type == "code" and cell.source:
            code = highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code", wrapcode=True))
            parts += [code.replace("<pre>", '<pre tabindex="0">'), *_outputs(cell, before, state)]
    moves = any(f'type="{VIEW}"' in part for part in parts)
    if moves:
        parts.append(f'<script type="{STATE}">{inside(notebook.metadata.widgets[STATE])}</script>')
    return "\n".join(parts), moves


def sections(html: str) -> Iterable[tuple[str, str, str]]:
    """The parts of a page for the search: ``(anchor, heading, words)``."""
    pieces = re.split(r"(<h[123][^>]*>.*?</h[123]>)", html, flags=re.S)
    anchor, heading = "", ""
    for piece in pieces:
        if match := re.match(r'<h[123](?:[^>]*\bid="([^"]*)")?', piece):
            anchor, heading = match[1] or "", plain(piece)
        elif words := plain(re.sub(r'<div class="code">.*?</div>', " ", piece, flags=re.S)):
            yield anchor, heading, words
