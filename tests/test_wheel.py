"""Beyond the repository: the package as a wheel, alone, in a folder that holds nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = (
    "pandas",
    "matplotlib",
    "seaborn",
    "torchmetrics",
    "ipywidgets",
    "nbformat",
    "nbconvert",
    "onnx",
    "onnxruntime",
    "scipy",
)
needs_builder = pytest.mark.skipif(find_spec("setuptools") is None, reason="pip builds wheels with setuptools")
pytestmark = [needs_builder, pytest.mark.xdist_group("wheel")]


def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, args)], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "tdq_utils", source / "tdq_utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def alone(wheel, tmp_path_factory):
    """``alone(code)``: run Python on the wheel in an empty folder, without the extras; its output."""
    home, empty = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("empty")
    pip("install", "--no-deps", "--no-index", "--target", home, wheel)
    (home / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n")  # None: not there

    def run(*args):
        environment = {name: value for name, value in os.environ.items() if name != "TDQ_DATA"} | {"PYTHONPATH": str(home)}
        return subprocess.run([sys.executable, *args], cwd=empty, env=environment, capture_output=True, text=True)

    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tdq_utils"}
    assets = {f"tdq_utils/{path.relative_to(ROOT / 'tdq_utils')}" for path in (ROOT / "tdq_utils" / "show" / "assets").iterdir()}
    assert "tdq_utils/py.typed" in names and assets <= names
    assert {Path(name).suffix for name in assets} >= {".html", ".js", ".css", ".xz"}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tdq_utils").rglob("*.py")} <= names


def test_the_wheel_asks_for_the_core_alone(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("METADATA")]
        wanted = [
            line for line in opened.read(name).decode().splitlines() if line.startswith("Requires-Dist: ") and "extra" not in line
        ]
    names = {re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in wanted}
    assert names == {"torch", "diffusers", "accelerate", "safetensors", "numpy", "tqdm"}


def test_a_users_model_is_quantized_without_the_checkout_and_the_extras(alone):
    code = """
import tdq_utils as tdq, torch
from diffusers import UNet2DModel, DDIMScheduler
print(tdq.__file__)
model = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, block_out_channels=(8,),
                    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False).eval()
scheduler = DDIMScheduler()
tdq.quantize(model, 8, 6)
tdq.calibrate(model, scheduler, range(2), 2, iterations=2, progress=False)
tdq.freeze(model)
tdq.save_quantized(model, "saved")
again = tdq.load_quantized("saved")
print(torch.equal(*(tdq.sample(one, scheduler, range(2), 2, progress=False) for one in (model, again))))
"""
    found = alone("-c", code)
    assert found.returncode == 0, found.stderr
    place, same = found.stdout.split()
    assert not place.startswith(str(ROOT)) and same == "True"


def test_what_ships_with_the_repository_says_where_it_is(alone):
    code = """
import tdq_utils as tdq
for ask in (lambda: tdq.load_model("fashion-mnist"), lambda: tdq.load_images(root=None)):
    try:
        ask()
    except tdq.DataError as error:
        print("refused:", error)
try:
    tdq.layer_sensitivity
except tdq.TDQError as error:
    print("refused:", error)
"""
    lines = alone("-c", code.replace("(root=None)", "(split='train-10k')")).stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith("refused: ") for line in lines)
    assert all("TDQ_DATA" in line and "clone the repository" in line for line in lines[:2])
    assert "pip install 'tdq-utils[lab]'" in lines[2]


@pytest.mark.parametrize("command", ["report", "demo", "site", "explorer --measure fashion-mnist"])
def test_commands_end_with_a_message(command, alone):
    found = alone("-m", "tdq_utils", *command.split())
    assert found.returncode == 2 and found.stderr.startswith("error: ") and "Traceback" not in found.stderr, found.stderr
