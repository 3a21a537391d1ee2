"""Exercises: one source a lesson, from which come the students' notebooks and the solved ones."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from tdq_utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = ROOT / "notebooks" / "exercises"
SOLUTIONS = ROOT / "build" / "solutions"
MARK = "# %%"  # begins a cell, as editors and jupytext know it
TAG = ' tags=["solution"]'
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def sources(folder: Path = EXERCISES) -> list[Path]:
    """The files that exercises are written in, by lesson. DataError: there are none."""
    found = sorted((folder / "source").glob("[0-9]*.py"))
    if not found:
        raise DataError(f"{folder / 'source'} must hold the exercises; got none. Run this in a clone of the repository.")
    return found


def cells(text: str) -> list[tuple[str, str]]:
    """``(kind, source)`` of each cell of a source: "markdown", "code" or "solution"."""
    kinds = {" [markdown]": "markdown", "": "code", TAG: "solution"}
    found = []
    for part in re.split(rf"^{MARK}", text, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if head.rstrip() not in kinds:
            raise DataError(f"A cell of an exercise begins with {MARK} and one of {list(kinds)}; got {head!r}.")
        kind = kinds[head.rstrip()]
        found.append((kind, re.sub(r"^# ?", "", body, flags=re.M).strip() if kind == "markdown" else body.strip()))
    return found


def stub(solution: str) -> str:
    """What students get of a solution: each function with its arguments and docstring, and nothing in it."""
    lines, parts = solution.splitlines(), []
    for function in ast.parse(solution).body:
        if isinstance(function, ast.FunctionDef):
            kept = lines[function.lineno - 1 : function.body[0].end_lineno]
            parts.append("\n".join([*kept, "    raise NotImplementedError"]))
    return "\n\n\n".join(parts)


def notebook(source: str, solved: bool, links: str = "../") -> dict[str, Any]:
    """The notebook of one source, run: what its cells print is in it.

    ``solved``: with the solutions, or with their stubs. ``links``: where the lessons are, seen from its folder.
    """
    made: list[dict[str, Any]] = []
    names: dict[str, Any] = {}
    for number, (kind, text) in enumerate(cells(source)):
        if kind == "markdown":
            text = text.replace("](../", f"]({links}")
            own: dict[str, Any] = dict(cell_type="markdown", metadata={})
        else:
            text = stub(text) if kind == "solution" and not solved else text
            own = dict(cell_type="code", metadata={"tags": ["task"]} if kind == "solution" else {})
            own |= dict(outputs=_printed(text, names), execution_count=1 + sum("outputs" in cell for cell in made))
        made.append(dict(own, id=f"cell-{number}", source=text.splitlines(keepends=True)))
    return dict(cells=made, metadata=KERNEL, nbformat=4, nbformat_minor=5)


def _printed(text: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell in this process; a kernel would take seconds to start, and these cells only print."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(text, "exercise", "exec"), names)
    shown = out.getvalue().splitlines(keepends=True)
    return [dict(output_type="stream", name="stdout", text=shown)] if shown else []


def written(source: Path, solved: bool, links: str = "../") -> str:
    """The notebook of one source file as text."""
    return json.dumps(notebook(source.read_text(), solved, links), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def verdicts(path: Path, timeout: int = 120) -> dict[str, str]:
    """What the checks say of a notebook that a student hands in: ``{check: sentence}``, from running it in a kernel of its own.

    A check that says nothing, because its cell fails or takes more than ``timeout`` seconds, has not been passed.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError

    try:
        handed_in = nbformat.read(path, as_version=4)
    except Exception as error:  # a missing file, another kind of file, a notebook of another version
        raise DataError(f"{path} must be a notebook that a student hands in; it cannot be read: {error!r:.200}") from error
    client = NotebookClient(handed_in, timeout=timeout, kernel_name="python3", allow_errors=True)
    with contextlib.suppress(CellTimeoutError):
        client.execute()
    found = {}
    for cell in handed_in.cells:
        if name := re.fullmatch(r"checks\.(\w+)\(\w+\)", cell.source.strip()):
            found[name[1]] = "".join(output.get("text", "") for output in cell.outputs).strip() or "not right: it did not run."
    return found


def write(students: Path = EXERCISES, solutions: Path = SOLUTIONS) -> list[Path]:
    """Write the students' copies and the solved ones, and return their paths. DataError: no sources."""
    made = []
    for source in sources():
        for folder, solved, links in ((students, False, "../"), (solutions, True, "../../notebooks/")):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / source.with_suffix(".ipynb").name
            path.write_text(written(source, solved, links))
            made.append(path)
    return made
