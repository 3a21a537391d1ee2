"""Every exercise's judge takes the kit's answer, refuses plausible wrong ones in a sentence that names what is wrong, and never
shows a traceback."""

import importlib
import pkgutil
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from wrong_answers import WRONG

from tdq_utils.show import checks
from tdq_utils.show.checks.compare import Check
from tdq_utils.show.exercises import cells, sources

MODULES = [module.name for module in pkgutil.iter_modules(checks.__path__) if module.name != "compare"]
CHECKS = {
    name: check
    for module in MODULES
    for name, check in vars(importlib.import_module(f"tdq_utils.show.checks.{module}")).items()
    if isinstance(check, Check)
}


@pytest.fixture(scope="module")
def solved():
    """``{check: (name of the function, its solution, the names around it)}`` of all exercises."""
    found = {}
    for source in sources():
        names, solution = {}, ""
        for kind, text in cells(source.read_text()):
            if kind == "solution":
                solution = text
            if kind != "markdown" and not text.startswith("checks."):
                exec(text, names)
            if kind == "code" and (judged := re.fullmatch(r"checks\.(\w+)\((\w+)\)", text)):
                found[judged[1]] = judged[2], solution, names
    return found


def test_there_is_an_exercise_for_every_check(solved):
    assert len(CHECKS) >= 30
    assert solved.keys() == CHECKS.keys() == WRONG.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_the_kits_own_answer_is_right(name):
    assert CHECKS[name].verdict(CHECKS[name].reference).startswith("right: ")


@pytest.mark.parametrize("name", WRONG)
def test_plausible_wrong_answers_are_refused_with_the_reason(name, solved):
    function, solution, names = solved[name]
    assert len(WRONG[name]) >= 3
    for part, other, said in WRONG[name]:
        assert part in solution
        around = dict(names)
        exec(solution.replace(part, other), around)
        verdict = CHECKS[name].verdict(around[function])
        assert re.match(rf"not right: .*({'|'.join(map(re.escape, said.split('|')))})", verdict), (other, said, verdict)
        assert verdict.endswith(".") and "\n" not in verdict


def unfinished(*arguments):
    raise NotImplementedError


def careless(*arguments):
    raise KeyError("x\nand more")


@pytest.mark.parametrize("name", CHECKS)
def test_nothing_that_a_student_does_is_a_traceback(name):
    verdict = CHECKS[name].verdict
    assert verdict(unfinished).startswith("not yet: ")
    assert verdict(lambda *arguments: None) == "not right: it returns nothing; end the function with return."
    assert "it raises TypeError: " in verdict(lambda: 1)
    assert verdict(careless).startswith("not right: it raises KeyError: ")
    assert verdict(3) == "not right: pass the function itself, without calling it; got an int."
    for rubbish in ("text", [], (), {}, object(), torch.zeros(0), torch.full((7, 7), torch.nan), np.float32("nan"), 1j):
        assert verdict(lambda *arguments, rubbish=rubbish: rubbish).startswith("not right: "), rubbish


def doubling(cases, **options):
    return Check(lambda x: 2 * x, lambda: [dict(x=x) for x in cases], **options)


def test_the_verdict_is_printed(capsys):
    doubling([1.0])(lambda x: 2 * x)
    doubling([1.0], right="well done.")(lambda x: x + x)
    doubling([1.0])(unfinished)
    assert capsys.readouterr().out.splitlines() == [
        "right: the same as the kit's own.",
        "right: well done.",
        "not yet: replace the line that raises NotImplementedError, run that cell, then this one.",
    ]


def test_what_is_wrong_and_where():
    check = doubling([torch.tensor([[1.0, 3.0]])])
    assert check.verdict(lambda x: x * torch.tensor([2.0, 3])) == "not right: for x = 3 it gives 9, expected 6."
    outer = Check(lambda x: x[:, None] * x, lambda: [dict(x=torch.tensor([1.0, 3.0]))])
    assert outer.verdict(lambda x: x[:, None] + x) == "not right: at index [1, 1] it gives 6, expected 9."
    assert "it returns shape [2]; expected [1, 2]" in check.verdict(lambda x: 2 * x[0])
    assert "it returns torch.int64; expected torch.float32" in check.verdict(lambda x: (2 * x).long())
    assert "it gives nan" in check.verdict(lambda x: x / 0 - x / 0)
    assert "it gives 4, expected 6" in doubling([3.0]).verdict(lambda x: 4)


def test_inputs_changed_in_place_are_noticed():
    check = doubling([torch.ones(2)])
    assert check.verdict(lambda x: x.mul_(2)) == "not right: it changes its argument x in place; work on a copy."
    assert check.verdict(lambda x: 2 * x).startswith("right")  # and they are whole again for the next answer


def test_torchs_own_not_implemented_error_is_not_taken_for_a_stub():
    def lacking(x):
        raise NotImplementedError('"round" not implemented for Long')

    assert doubling([1.0]).verdict(lacking).startswith("not right: it raises NotImplementedError: ")


def test_a_known_mistake_must_fit_all_cases():
    check = doubling([2.0, 3.0], mistakes={"it squares": lambda x: x**2, "it breaks": lambda x: x.missing})
    assert check.verdict(lambda x: x * x) == "not right: it squares; for x = 3 it gives 9, expected 6."
    assert check.verdict(lambda x: 5.0) == "not right: for x = 2 it gives 5, expected 4."


def test_random_answers_leave_the_generator_alone():
    state = torch.random.get_rng_state()
    doubling([torch.ones(2)]).verdict(lambda x: torch.rand(2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_importing_the_judges_brings_nothing_heavy():
    heavy = ("torchmetrics", "onnx", "matplotlib", "seaborn", "pandas", "ipywidgets", "diffusers", "nbformat")
    modules = ", ".join(f"tdq_utils.show.checks.{name}" for name in MODULES)
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
