"""The house stands as it was drawn: which wing imports which, how long files are, what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tdq_utils"
WINGS = ["errors", "method", "denoiser", "fit", "run", "lab", "show"]  # from the ground up
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports_of(path):
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in MODULES} or {node.module}
    return {name for name in found if name.split(".")[0] == "tdq_utils"}


def wing_of(module):
    parts = module.split(".")
    return WINGS.index(parts[1]) if len(parts) > 1 and parts[1] in WINGS else len(WINGS)


def test_every_file_has_a_room():
    """Beside the wings there are only the public names and the command line."""
    outside = {path.name for path in PACKAGE.glob("*.py")}
    assert outside == {"__init__.py", "__main__.py", "errors.py"}
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(WINGS) - {"errors"}


@each_file
def test_no_wing_imports_upward(path):
    assert [name for name in imports_of(path) if wing_of(name) > wing_of(module_of(path))] == []


def test_no_imports_in_a_circle():
    arrows = {
        module_of(path): imports_of(path) & MODULES - {module_of(path)} for path in FILES if path != PACKAGE / "__init__.py"
    }
    while free := {name for name, targets in arrows.items() if not targets & set(arrows)}:
        arrows = {name: targets for name, targets in arrows.items() if name not in free}
    assert not arrows


@each_file
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 300


def test_a_wing_is_introduced_by_one_sentence():
    for path in PACKAGE.glob("*/**/__init__.py"):
        assert len(path.read_text().splitlines()) == 1, path


@each_file
def test_what_is_public_is_annotated(path):
    def functions(node, public=True):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from functions(child)
            elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name == "__init__"):
                yield child

    missing = []
    for function in functions(ast.parse(path.read_text())):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        arguments += [a for a in (function.args.vararg, function.args.kwarg) if a]
        missing += [f"{function.name}({a.arg})" for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        missing += [f"{function.name} ->"] if function.returns is None and function.name != "__init__" else []
    assert missing == []


def test_importing_brings_nothing_heavy():
    heavy = ("torchmetrics", "onnx", "onnxruntime", "matplotlib", "seaborn", "pandas", "ipywidgets", "diffusers")
    code = f"import sys, tdq_utils; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_there():
    import tdq_utils

    assert all(getattr(tdq_utils, name) is not None for name in tdq_utils.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tdq_utils.nothing  # noqa: B018
