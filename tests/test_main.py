"""The command line."""

import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

import tdq_utils as tdq
from tdq_utils.__main__ import main, parser
from tdq_utils.lab import reproduce as engine
from tdq_utils.lab import training
from tdq_utils.lab.protocol import Protocol, Reference
from tdq_utils.lab.tables import qat, quickstart


@pytest.mark.parametrize("command", ["demo", "exercises", "train-unet", "train-dit", "train-classifier", "calibrate", "reproduce",
                                     "report", "explorer", "site", "bench"])  # fmt: skip
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "default" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2(capsys):
    assert main(["reproduce", "quickstart", "--model", "no such model"]) == 2
    assert capsys.readouterr().err.startswith("error: load_model takes one of")


@pytest.mark.filterwarnings("ignore:'tdq_utils.__main__' found in sys.modules")  # it is there since the import above
def test_the_module_runs_as_a_program(monkeypatch, capsys):
    """What ``python -m`` does, without another process that imports torch."""
    monkeypatch.setattr(sys, "argv", ["tdq_utils", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tdq_utils", run_name="__main__", alter_sys=True)
    assert stop.value.code == 0
    assert "train-unet" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "iterations"), [("train-unet", 5400), ("train-dit", 8000)])
def test_training_defaults_are_the_shipped_recipe(command, iterations):
    args = parser().parse_args([command])
    assert (args.iterations, args.batch, args.seed) == (iterations, 128, 0)


@pytest.mark.parametrize(("command", "loops"), [("train-unet", "iterations"), ("train-dit", "iterations"),
                                                ("train-classifier", "epochs")])  # fmt: skip
def test_training_commands_hand_their_options_on(command, loops, monkeypatch, tmp_path, capsys):
    """Bound to the real signature, so that an option which the function does not take fails here."""
    name = command.replace("-", "_")
    signature, calls = inspect.signature(getattr(training, name)), []
    found, line = (0.5, "Test accuracy 0.5000; written to") if loops == "epochs" else (tmp_path, "EMA weights:")
    monkeypatch.setattr(training, name, lambda *args, **how: calls.append(signature.bind(*args, **how).arguments) or found)
    given = {"out": tmp_path, "seed": 3, loops: 5, "root": tmp_path / "data"}
    assert main([command, *(f"--{option}={value}" for option, value in given.items())]) == 0
    assert given.items() <= calls[0].items()
    assert capsys.readouterr().out == f"{line} {tmp_path}\n"
    if command == "train-unet":
        main([command, "--compile", "--device", "cuda", "--batch", "7"])
        assert (calls[1]["compiled"], calls[1]["device"], calls[1]["batch"]) == (True, "cuda", 7)


@pytest.mark.parametrize("table", ["qat", "trials"])
def test_iterations_are_one_or_more(table, capsys):
    for iterations in ("0", "-1"):
        assert main(["reproduce", table, "--iterations", iterations]) == 2
        assert f"--iterations must be a whole number, 1 or more; got {iterations}" in capsys.readouterr().err


@pytest.mark.parametrize(("table", "option", "belongs"), [
    ("ablations", "--quick", "ptq, qat"), ("quickstart", "--quick", "ptq, qat"), ("trials", "--steps=5", "quickstart, ptq, qat"),
    ("ptq", "--iterations=30", "qat, trials"), ("ptq", "--picture=x.png", "quickstart"), ("qat", "--methods", "quickstart"),
    ("ptq", "--weights=4", "quickstart"), ("ablations", "--activations=4", "quickstart"),
])  # fmt: skip
def test_an_option_of_another_table_is_refused(table, option, belongs, capsys):
    assert main(["reproduce", table, option]) == 2
    assert f"{option.split('=')[0]} belongs to {belongs}; got {table}, which fixes its own" in capsys.readouterr().err


@pytest.mark.parametrize(("table", "out", "images"), [
    ("quickstart", "quickstart.csv", 256), ("ptq", "ptq.csv", 1000), ("qat", "qat.csv", 1000), ("trials", "trials.csv", 256),
    ("ablations", "ablations.csv", 1000), ("ptq --quick", "ptq-quick.csv", 128),
])  # fmt: skip
def test_the_command_of_a_table_measures_its_jobs(table, out, images, monkeypatch, capsys):
    """Bound to the real signature: what is measured, where it goes, and with how many images."""
    signature, calls = inspect.signature(engine.reproduce), []

    def measure(*args, **options):
        calls.append(signature.bind(*args, **options).arguments)
        return pd.DataFrame([dict(method="mse", fcd=1.0)])

    monkeypatch.setattr(engine, "reproduce", measure)
    monkeypatch.setattr(qat, "add_losses", lambda *args: None)
    assert main(["reproduce", *table.split(), "--mix-threads"]) == 0
    (call,) = calls
    assert call["out"] == Path("runs") / out and call["cache"] == Path("runs/cache") and call["images"] == images
    assert call["mix_threads"] and len(set(call["jobs"])) == len(call["jobs"]) >= 12
    assert "mse    1\nWritten to" in capsys.readouterr().out


def test_other_models_are_loaded_and_measured_as_asked(monkeypatch, tmp_path):
    loaded, signature, measured = [], inspect.signature(tdq.load_model), []
    original = tdq.load_model
    monkeypatch.setattr(tdq, "load_model", lambda *args: loaded.append(signature.bind(*args).arguments) or original())
    measure = lambda *args: measured.append(inspect.signature(reproduce).bind(*args).arguments) or pd.DataFrame()  # noqa: E731
    reproduce = engine.reproduce
    monkeypatch.setattr(engine, "reproduce", measure)
    options = "--data cifar10 --root somewhere --download --classes 10 --guidance 1.5 --dtype bfloat16 --scheduler ddim"
    assert main(["reproduce", "ptq", "--model", "owner/name", *options.split(), "--features", "inception"]) == 0
    (call,), (model,) = measured, loaded
    assert (model["name"], model["scheduler"], model["dtype"]) == ("owner/name", "ddim", torch.bfloat16)
    assert call["protocol"] == Protocol(Reference("cifar10", "somewhere", True), 1.5, 10) and call["features"] == "inception"
    loaded.clear()
    main(["reproduce", "ptq"])
    assert measured[1]["protocol"] == Protocol() and loaded[0]["dtype"] is None and loaded[0]["scheduler"] is None


def test_a_guided_model_with_classes_is_calibrated(tmp_path):
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, patch_size=2, num_layers=1, norm_num_groups=1)
    dit = DiTTransformer2DModel(**sizes, num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=5)
    dit.save_pretrained(tmp_path / "dit" / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "dit" / "scheduler")
    options = "--method mse --images 4 --steps 2 --guidance 2 --dtype bfloat16"
    assert main(["calibrate", "--model", str(tmp_path / "dit"), *options.split(), "--out", str(tmp_path / "out")]) == 0
    model = tdq.load_quantized(tmp_path / "out")
    assert model.quantization.method == "mse" and type(model) is DiTTransformer2DModel


def test_the_quickstart_takes_methods_and_bits(monkeypatch):
    jobs = []
    monkeypatch.setattr(engine, "reproduce", lambda given, *args, **options: jobs.extend(given) or pd.DataFrame())
    main(["reproduce", "quickstart", "--methods", "mse", "tdq", "--weights", "4", "--activations", "8", "--steps", "10"])
    assert [(job.method, job.weights, job.activations, job.steps) for job in jobs[1:-1]] == [("mse", 4, 8, 10), ("tdq", 4, 8, 10)]
    jobs.clear()
    main(["reproduce", "quickstart", "--methods", "--images", "5000"])
    assert [job.method for job in jobs] == ["full precision", "real images"]


def test_the_picture_shows_every_interval(unet, scheduler, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "reproduce", lambda *args, **options: pd.DataFrame())
    monkeypatch.setattr(tdq, "load_model", lambda *args, **options: (unet, scheduler))
    pictures = {(method, None, None): torch.zeros(10, 1, 8, 8) for method in ("full precision", "minmax", "mse", "tdq")}
    calls = []
    monkeypatch.setattr(quickstart, "compare", lambda *args: calls.append(args) or (None, pictures))
    picture = tmp_path / "drift.png"
    assert main(["reproduce", "quickstart", "--steps", "2", "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    assert calls[0][2] == [("minmax", 8, 5), ("mse", 8, 5), ("tdq", 8, 5)]


@pytest.mark.parametrize("page", ["README.md", "data/README.md", "data/results/README.md", "data/models/fashion-mnist/README.md",
                                  "data/models/classifier/README.md"])  # fmt: skip
def test_the_commands_of_a_page_are_commands(page):
    text = (Path(__file__).parents[1] / page).read_text()
    commands = re.findall(r"`[^`]*-m tdq_utils ([^`]*)`", text)
    assert commands or page == "data/README.md"
    for command in commands:
        parser().parse_args(shlex.split(command))


def test_make_reproduce_gives_every_table_its_threads():
    """Those of the committed rows: with others it would refuse to go on."""
    text = (Path(__file__).parents[1] / "Makefile").read_text()
    for name, threads in re.findall(r"call MEASURE,(\w+),(\d)", text):
        assert set(pd.read_csv(Path(__file__).parents[1] / f"data/results/{name}.csv").threads) == {int(threads)}
    assert text.count("call MEASURE,") == 6
