"""Training of the transformer on a few random images: resuming after a kill, the loss, the folder that comes out."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding

from tdq_utils.__main__ import parser
from tdq_utils.fit import loop
from tdq_utils.fit.loop import iteration_generator
from tdq_utils.lab import training_dit
from tdq_utils.lab.training_dit import NO_CLASS, flow_matching_loss, train_dit

SMALL = dict(training_dit.DIT, sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8)


@pytest.fixture
def tiny(monkeypatch):
    """A small transformer and ten random images; the state is saved after every iteration."""
    data = torch.rand(10, 1, 8, 8) * 2 - 1, torch.arange(10)
    monkeypatch.setattr(training_dit, "DIT", SMALL)
    monkeypatch.setattr(training_dit, "load_images", lambda **options: data)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, monkeypatch, tmp_path):
    whole = train_dit(tmp_path / "whole", iterations=3, batch=4)
    original = training_dit.learning_rate

    def killed(iteration, iterations):
        if iteration == 2:
            raise KeyboardInterrupt
        return original(iteration, iterations)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_dit, "learning_rate", killed)
        train_dit(tmp_path / "parts", iterations=3, batch=4)
    assert torch.load(tmp_path / "parts" / "state.pt")["iteration"] == 2
    resumed = train_dit(tmp_path / "parts", iterations=3, batch=4)

    states = [torch.load(tmp_path / run / "state.pt") for run in ("whole", "parts")]
    assert set(states[0]) == {"iteration", "log", "model", "ema", "optimizer"} and states[0]["log"] == states[1]["log"]
    models = [DiTPipeline.from_pretrained(folder, vae=None).transformer.state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())
    assert (whole / "loss.csv").read_text() == (resumed / "loss.csv").read_text()


def test_what_comes_out_is_the_average_and_a_flow_matching_scheduler(tiny, tmp_path):
    pipeline = DiTPipeline.from_pretrained(train_dit(tmp_path, iterations=2, batch=4), vae=None)
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


def test_the_command(monkeypatch, capsys, tmp_path):
    args = parser().parse_args(["train-dit", "--out", str(tmp_path), "--iterations", "5", "--seed", "2"])
    monkeypatch.setattr(training_dit, "train_dit", lambda *given, root: (*given, root))
    args.run(args)
    assert capsys.readouterr().out == f"EMA weights: {(tmp_path, 5, 128, 2, None)}\n"
    assert parser().parse_args(["train-dit"]).iterations == 8000
