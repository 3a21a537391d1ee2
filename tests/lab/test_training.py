"""Training on a few random images: resuming after a kill, the learning rate, the losses, the files that come out."""

import itertools
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding

from tdq_utils import load_model
from tdq_utils.errors import TDQError
from tdq_utils.fit import loop
from tdq_utils.fit.loop import iteration_generator
from tdq_utils.lab import training
from tdq_utils.lab.fid import Statistics, load_classifier
from tdq_utils.lab.training import (
    NO_CLASS,
    check_gradients,
    flow_matching_loss,
    learning_rate,
    train_classifier,
    train_dit,
    train_unet,
)


@pytest.fixture
def tiny(monkeypatch, unet):
    """The shape of ``unet``, a small transformer, and ten small random images; the state is saved after every iteration."""
    images, classes = torch.rand(10, 1, 8, 8) * 2 - 1, torch.arange(10)
    small = dict(sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    monkeypatch.setattr(training, "UNET", {key: value for key, value in unet.config.items() if not key.startswith("_")})
    monkeypatch.setattr(training, "DIT", training.DIT | small)
    monkeypatch.setattr(training, "load_images", lambda labels=False, **options: (images, classes) if labels else images)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))


train = partial(train_unet, iterations=3, batch=4)


def read_dit(folder):
    return DiTPipeline.from_pretrained(folder, vae=None)


@pytest.mark.parametrize(("train", "read"), [
    (train, lambda folder: load_model(folder)[0]),
    (partial(train_dit, iterations=3, batch=4), lambda folder: read_dit(folder).transformer),
], ids=["unet", "dit"])  # fmt: skip
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, monkeypatch, tmp_path, train, read):
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
    assert set(states[0]) == {"iteration", "log", "model", "ema", "optimizer"}
    assert states[0]["log"] == states[1]["log"] and len(states[0]["log"]) == 3
    assert all(torch.equal(value, states[1]["model"][key]) for key, value in states[0]["model"].items())
    averages = [state["ema"]["shadow_params"] for state in states]
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))
    assert (whole / "loss.csv").read_text() == (resumed / "loss.csv").read_text()
    models = [read(folder).state_dict() for folder in (whole, resumed)]
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


def test_what_comes_out_is_the_average_and_a_flow_matching_scheduler(tiny, tmp_path):
    pipeline = read_dit(train_dit(tmp_path, iterations=2, batch=4))
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    average = torch.load(tmp_path / "state.pt")["ema"]["shadow_params"]
    assert all(torch.equal(*pair) for pair in zip(pipeline.transformer.parameters(), average, strict=True))
    once = DiTTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")  # without a pipeline, too
    assert all(torch.equal(*pair) for pair in zip(once.parameters(), average, strict=True))


def test_labels_are_dropped_before_the_model_and_never_in_it(tiny, monkeypatch, tmp_path):
    seen, inside = [], []

    def spied(model, *args, **options):
        labels = options["class_labels"]
        seen.extend(labels.tolist())
        inside.extend(module.dropout_prob for module in model.modules() if isinstance(module, LabelEmbedding))
        return original(model, *args, **options)

    original = DiTTransformer2DModel.forward
    monkeypatch.setattr(DiTTransformer2DModel, "forward", spied)
    train_dit(tmp_path, iterations=8, batch=32)
    assert set(inside) == {0.0}
    assert 0.03 < seen.count(NO_CLASS) / len(seen) < 0.2 and set(seen) == {*range(10), NO_CLASS}


def test_the_velocity_is_what_is_learned():
    """A model that knew noise and image would have no error: it is asked for eps - x_0 at t = 1000 sigma."""
    images, labels = torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    images = (images + images.flip(3)) / 2  # the same when it is flipped

    def knows(x_t, t, class_labels):
        sigma = (t / 1000).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(x_t - images) / sigma)

    assert flow_matching_loss(knows, images, labels, 16, iteration_generator(0, 0)) < 1e-8
    shifted = lambda *args, **options: SimpleNamespace(sample=knows(*args, **options).sample + 1)  # noqa: E731
    torch.testing.assert_close(flow_matching_loss(shifted, images, labels, 16, iteration_generator(0, 0)), torch.tensor(1.0))
