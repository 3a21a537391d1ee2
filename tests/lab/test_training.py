"""Training on a few random images: resuming after a kill, the learning rate, the files that come out."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from tdq_utils import load_model
from tdq_utils.errors import TDQError
from tdq_utils.fit import loop
from tdq_utils.lab import training
from tdq_utils.lab.fid import Statistics, load_classifier
from tdq_utils.lab.training import check_gradients, learning_rate, train_classifier, train_unet


@pytest.fixture
def tiny(monkeypatch, unet):
    """The shape of ``unet`` and ten small random images; the state is saved after every iteration."""
    monkeypatch.setattr(training, "UNET", {key: value for key, value in unet.config.items() if not key.startswith("_")})
    monkeypatch.setattr(training, "load_images", lambda **options: torch.rand(10, 1, 8, 8) * 2 - 1)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))


def train(out, **options):
    torch.manual_seed(3)  # of the images
    return train_unet(out, iterations=3, batch=4, **options)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, monkeypatch, tmp_path):
    whole = train(tmp_path / "whole")

    def killed(iteration, iterations):
        if iteration == 2:
            raise KeyboardInterrupt
        return learning_rate(iteration, iterations)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "learning_rate", killed)
        train(tmp_path / "parts")
    assert torch.load(tmp_path / "parts" / "state.pt")["iteration"] == 2
    resumed = train(tmp_path / "parts")

    states = [torch.load(tmp_path / run / "state.pt") for run in ("whole", "parts")]
    assert states[0]["log"] == states[1]["log"] and len(states[0]["log"]) == 3
    assert all(torch.equal(value, states[1]["model"][key]) for key, value in states[0]["model"].items())
    averages = [state["ema"]["shadow_params"] for state in states]
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))
    assert (whole / "loss.csv").read_text() == (resumed / "loss.csv").read_text()
    models = [load_model(folder)[0].state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


def test_what_comes_out_is_the_average_model(tiny, tmp_path):
    folder = train(tmp_path)
    model, scheduler = load_model(folder)
    state = torch.load(tmp_path / "state.pt")
    assert type(model) is UNet2DModel and scheduler.config.timestep_spacing == "trailing"
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), state["ema"]["shadow_params"], strict=True))
    assert not torch.equal(model.conv_in.weight, state["model"]["conv_in.weight"])
    iteration, loss = (folder / "loss.csv").read_text().split()[-1].split(",")
    assert iteration == "3" and float(loss) == pytest.approx(np.mean(state["log"]), abs=1e-4)
    assert not list(tmp_path.glob("*.part"))


def test_another_seed_is_another_run(tiny, tmp_path):
    first, other = (train_unet(tmp_path / str(seed), iterations=1, batch=4, seed=seed) for seed in (0, 1))
    assert (first / "loss.csv").read_text() != (other / "loss.csv").read_text()


def test_learning_rate_warms_up_stays_and_falls():
    rates = np.array([learning_rate(i, 5000) for i in range(5000)])
    np.testing.assert_allclose(rates[:200], 1e-3 * np.arange(1, 201) / 200)
    assert (rates[199:3501] == 1e-3).all()
    np.testing.assert_allclose(np.diff(rates[3500:]), -1e-3 / 1500)
    assert rates[-1] == pytest.approx(1e-3 / 1500)
    assert [learning_rate(i, 9000) for i in range(3500)] == rates[:3500].tolist()  # a run can be lengthened


def test_train_classifier_writes_what_distances_need(monkeypatch, tmp_path):
    images, labels = torch.rand(96, 1, 28, 28) * 2 - 1, torch.arange(96) % 10
    monkeypatch.setattr(training, "load_images", lambda **options: (images, labels))
    accuracy = train_classifier(tmp_path, epochs=1, batch=32)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test_accuracy": accuracy, "epochs": 1, "seed": 0}
    features = load_classifier(tmp_path)(images).double()
    reference = Statistics.load(tmp_path / "fashion-mnist-test.npz")
    assert reference.n == 96
    np.testing.assert_allclose(reference.mu, features.mean(0), atol=0.01)  # pixels rounded to 8 bits


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_learns_what_an_eager_one_learns(tiny, tmp_path):
    for compiled in (False, True):
        train(tmp_path / str(compiled), compiled=compiled)
    eager, compiled = (torch.load(tmp_path / run / "state.pt") for run in ("False", "True"))
    assert compiled["log"] == pytest.approx(eager["log"], rel=1e-4)
    for key, weight in eager["model"].items():
        torch.testing.assert_close(compiled["model"][key], weight, atol=1e-5, rtol=1e-3)


def test_a_wrong_gradient_stops_the_run_before_it_starts():
    right = {"conv.weight": torch.ones(4), "conv.bias": torch.ones(1)}
    check_gradients(right, {**right, "conv.bias": torch.ones(1) + 1e-5})
    for wrong in (torch.zeros(4), torch.full((4,), torch.nan)):
        with pytest.raises(TDQError, match=r"conv.weight differs .* without --compile"):
            check_gradients(right, {**right, "conv.weight": wrong})
