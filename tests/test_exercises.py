"""The exercises: notebooks are what their sources give, unsolved they say "not yet", solved they are right."""

import re
from pathlib import Path

import nbformat
import pytest

from tdq_utils.__main__ import main
from tdq_utils.errors import DataError
from tdq_utils.show import exercises

ROOT = Path(__file__).parents[1]
SOURCES = exercises.sources()
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders that the command writes to: ``(students, solutions)``, at a depth of two as the real ones."""
    folder = tmp_path_factory.mktemp("made")
    exercises.write(folder / "students", folder / "solutions")
    return folder / "students", folder / "solutions"


def read(folder, source):
    return nbformat.read(folder / f"{source.stem}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(notebook):
    return [output.text for cell in code_cells(notebook) for output in cell.outputs]


def test_every_lesson_has_exercises_and_they_are_enough():
    lessons = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {source.stem for source in SOURCES} <= lessons
    assert len(SOURCES) >= 10
    tasks = [sum(kind == "solution" for kind, _ in exercises.cells(source.read_text())) for source in SOURCES]
    assert all(2 <= n <= 4 for n in tasks) and sum(tasks) >= 30
    assert f"Ten notebooks, {sum(tasks)} tasks" in (exercises.EXERCISES / "TEACHING.md").read_text()
    assert f"{sum(tasks)} functions to write" in (ROOT / "README.md").read_text()


@each_source
def test_the_committed_notebook_is_what_its_source_gives(source, made):
    name = f"{source.stem}.ipynb"
    stale = "notebooks/exercises is not what its sources give; run make exercises, and commit"
    assert (exercises.EXERCISES / name).read_text() == (made[0] / name).read_text(), stale


def test_no_notebook_is_left_without_a_source():
    assert {path.stem for path in exercises.EXERCISES.glob("*.ipynb")} == {source.stem for source in SOURCES}


@each_source
def test_unsolved_it_runs_clean_and_every_check_says_not_yet(source, made):
    notebook = read(made[0], source)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    checked = [cell for cell in cells if cell.source.startswith("checks.")]
    assert len(said(notebook)) == len(checked) and all(text.startswith("not yet: ") for text in said(notebook))
    stubs = [cell.source for cell in cells if "task" in cell.metadata.get("tags", [])]
    assert len(stubs) == len(checked) and all(text.endswith('"""\n    raise NotImplementedError') for text in stubs)


@each_source
def test_a_stub_raises_nothing_but_that_it_is_one(source):
    for kind, text in exercises.cells(source.read_text()):
        if kind == "solution":
            exec(exercises.stub(text), names := {})
            function = next(value for name, value in names.items() if name != "__builtins__")
            with pytest.raises(NotImplementedError):
                function(*[None] * function.__code__.co_argcount)


@each_source
def test_solved_every_check_says_right(source, made):
    found = said(read(made[1], source))
    assert found and all(text.startswith("right: ") for text in found), found


@each_source
def test_it_opens_and_ends_as_exercises_do(source, made):
    cells = read(made[0], source).cells
    for word in ("# Exercises ", "**Goal.**", "**Prerequisites.**", "**Minutes:**"):
        assert word in cells[0].source
    heads = re.findall(r"^## (\d)\. .* \((\d+) minutes\)$", "\n".join(cell.source for cell in cells), flags=re.M)
    assert [int(number) for number, _ in heads] == list(range(1, 1 + len(said(read(made[0], source)))))
    assert f"**Minutes:** {sum(int(minutes) for _, minutes in heads)}." in cells[0].source
    assert "**Solutions:**" in cells[-1].source and "**Next:**" in cells[-1].source


@each_source
def test_links_lead_somewhere_from_both_folders(source):
    for solved, links, folder in ((False, "../", exercises.EXERCISES), (True, "../../notebooks/", exercises.SOLUTIONS)):
        made = exercises.notebook(source.read_text(), solved, links)
        text = "\n".join("".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
            # Not resolve(): build/ need not exist. Exercises link to each other by name, and lie together.
            there = Path(re.sub(r"[^/]+/[^/]+/\.\./\.\./", "", f"{folder}/{target}").replace("/exercises/../", "/"))
            assert there.exists() or (exercises.EXERCISES / target).exists(), target


@each_source
def test_its_lesson_leads_to_it(source):
    lesson = nbformat.read(ROOT / "notebooks" / f"{source.stem}.ipynb", as_version=4)
    assert f"](exercises/{source.stem}.ipynb)" in lesson.cells[-1].source


def test_the_page_for_teachers_knows_every_exercise():
    page = (exercises.EXERCISES / "TEACHING.md").read_text()
    for source in SOURCES:
        assert f"]({source.stem}.ipynb)" in page
        for kind, text in exercises.cells(source.read_text()):
            for title, minutes in re.findall(r"^## \d\. (.*) \((\d+) minutes\)$", text, flags=re.M) if kind == "markdown" else ():
                assert f"| {title} | {minutes} |" in page
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (exercises.EXERCISES / target).exists(), target


def test_a_stub_keeps_arguments_and_docstring_alone():
    solution = (
        'import math\n\n\ndef f(\n    x, bits=8\n):\n    """What it does.\n\n    And more."""\n    return x\n\n\n'
        'def g():\n    """G."""\n    return 1'
    )
    assert exercises.stub(solution) == (
        'def f(\n    x, bits=8\n):\n    """What it does.\n\n    And more."""\n    raise NotImplementedError\n\n\n'
        'def g():\n    """G."""\n    raise NotImplementedError'
    )


def test_a_source_is_read_cell_by_cell():
    text = '# %% [markdown]\n# # Head\n#\n# Text.\n# %%\nx = 1\n\n# %% tags=["solution"]\ndef f():\n    """F."""\n    return 2\n'
    assert exercises.cells(text) == [
        ("markdown", "# Head\n\nText."), ("code", "x = 1"), ("solution", 'def f():\n    """F."""\n    return 2')
    ]  # fmt: skip
    with pytest.raises(DataError, match="begins with # %%"):
        exercises.cells("# %% [raw]\n")


def test_without_sources_the_command_says_so(tmp_path):
    with pytest.raises(DataError, match="must hold the exercises"):
        exercises.sources(tmp_path)


def test_the_command_writes_both(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(exercises, "EXERCISES", tmp_path / "students")
    monkeypatch.setattr(exercises, "sources", lambda: SOURCES[:1])
    assert main(["exercises", "--out", str(tmp_path / "solutions")]) == 0
    assert "1 notebooks for students" in capsys.readouterr().out
    assert {path.parent.name for path in tmp_path.rglob("*.ipynb")} == {"students", "solutions"}


def test_what_is_handed_in_is_run_and_judged(tmp_path, capsys):
    """By a kernel: one task right, one wrong, one left, one whose cell fails, whatever the outputs in the file say."""
    answers = ["def f(x, s, bits): return s * (x / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)",
               "def f(x): return x.round()", "def f(x, s, bits): raise NotImplementedError", "del f"]  # fmt: skip
    names = ["fake_quantize", "straight_through", "step_gradient", "best_step"]
    cells = [nbformat.v4.new_code_cell("from tdq_utils.show.checks import quantizers as checks")]
    for answer, name in zip(answers, names, strict=True):
        claimed = [nbformat.v4.new_output("stream", text="right: I said so.\n")]
        cells += [nbformat.v4.new_code_cell(answer), nbformat.v4.new_code_cell(f"checks.{name}(f)", outputs=claimed)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path := tmp_path / "ada.ipynb")
    assert main(["exercises", "--check", str(path)]) == 0
    head, wrong, left, failed = capsys.readouterr().out.splitlines()
    assert head == f"{path}: 1 of 4 right"
    assert wrong.startswith("  straight_through: not right: its gradient is that of round, which is zero")
    assert left.startswith("  step_gradient: not yet: ")
    assert failed == "  best_step: not right: it did not run."
