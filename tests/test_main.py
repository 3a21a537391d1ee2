"""The command line."""

import inspect
import runpy
import sys

import pytest

from tdq_utils.__main__ import main, parser
from tdq_utils.lab import training


@pytest.mark.parametrize("command", ["demo", "train-unet", "train-classifier", "compare", "calibrate", "reproduce", "bench"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "default" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2(capsys):
    assert main(["compare", "--model", "no such model"]) == 2
    assert capsys.readouterr().err.startswith("error: load_model takes one of")


@pytest.mark.filterwarnings("ignore:'tdq_utils.__main__' found in sys.modules")  # it is there since the import above
def test_the_module_runs_as_a_program(monkeypatch, capsys):
    """What ``python -m`` does, without another process that imports torch."""
    monkeypatch.setattr(sys, "argv", ["tdq_utils", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tdq_utils", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    assert "train-unet" in capsys.readouterr().out


def test_training_defaults_are_the_shipped_recipe():
    args = parser().parse_args(["train-unet"])
    assert (args.iterations, args.batch, args.seed) == (5400, 128, 0)


@pytest.mark.parametrize("command", ["train-unet", "train-classifier"])
def test_training_commands_hand_their_options_on(command, monkeypatch, tmp_path, capsys):
    """Bound to the real signature, so that an option which the function does not take fails here."""
    name = command.replace("-", "_")
    signature, calls = inspect.signature(getattr(training, name)), []
    monkeypatch.setattr(training, name, lambda *args, **options: calls.append(signature.bind(*args, **options).arguments) or 0.5)
    assert main([command, "--out", str(tmp_path), "--seed", "3"]) == 0
    assert calls[0]["out"] == tmp_path and calls[0]["seed"] == 3


@pytest.mark.parametrize(("table", "iterations"), [("ptq", 30), ("ablations", 30), ("qat", 0), ("qat", -1), ("trials", 0)])
def test_iterations_are_those_of_training(table, iterations, capsys):
    assert main(["reproduce", table, "--iterations", str(iterations)]) == 2
    assert f"1 or more; got {iterations} for {table}" in capsys.readouterr().err


def test_the_ablations_fix_their_own_steps(capsys):
    assert main(["reproduce", "ablations", "--quick"]) == 2
    assert "--quick and --steps belong to ptq and qat" in capsys.readouterr().err
