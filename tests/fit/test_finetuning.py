"""The QAT loop: what learns at which rate, exact resume, what stops it, and that the model comes back."""

import copy
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from tdq_utils import CalibrationSet, freeze, record, restore, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit import finetuning, loop
from tdq_utils.fit.finetuning import FINETUNED, finetune
from tdq_utils.fit.loop import iteration_generator
from tdq_utils.fit.quantize import activation_quantizers, quantized_layers
from tdq_utils.method.generator import FourierFeatures, RawTime, StepGenerator
from tdq_utils.method.step_sizes import LearnedStep


@pytest.fixture
def images():
    return torch.rand(12, 1, 8, 8) * 2 - 1


def train(unet, scheduler, images, profile, **options):
    options = {"iterations": 3, **options}
    return finetune(unet, scheduler, images, batch=4, warmup=2, progress=False, profile=profile, **options)


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch):
    original = finetuning.calibrate
    monkeypatch.setattr(finetuning, "calibrate", lambda *args, **options: original(*args, **options, iterations=3))


@pytest.fixture
def parameters(monkeypatch):
    """``[start, end]`` of a training: the values of all that learns, by name."""
    found = []

    def spy(name, after):
        original = getattr(finetuning, name)

        def spied(model, *args):
            result = original(model, *args) if after else None
            found.append({name: value.detach().clone() for name, value in model.named_parameters()})
            return result if after else original(model, *args)

        monkeypatch.setattr(finetuning, name, spied)

    spy("_learn", after=True)
    spy("_stop_learning", after=False)
    return found


@pytest.mark.parametrize("method", FINETUNED)
def test_everything_learns_and_the_model_comes_back(unet, scheduler, images, profile, method, parameters, comes_back):
    # One step, no average: more of them can lead back to where a value began.
    losses = train(unet, scheduler, images, profile, method=method, iterations=1, ema_decay=0.0)
    start, end = parameters
    assert [name for name, value in start.items() if torch.equal(end[name], value)] == []
    assert any(name.endswith("weight_step.original") for name in end)
    assert len(losses) == 1 and losses[0] > 0
    kind = StepGenerator if method.startswith("tdq") else LearnedStep
    assert {type(q.step) for q in activation_quantizers(unet).values()} == {kind}
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    comes_back()


def test_training_helps(unet, scheduler, profile):
    """On one image, over and over: the loss of a quantized random model falls."""
    images = torch.rand(1, 1, 8, 8).repeat(4, 1, 1, 1)
    losses = train(unet, scheduler, images, profile, method="tdq", iterations=60, rate=5e-3)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_step_sizes_learn_at_rates_of_their_own(unet, scheduler, images, profile, monkeypatch):
    seen = {}

    class Spy(finetuning.Trainer):
        def run(self, *args):
            names = {id(p): name for name, p in self.model.named_parameters()}
            for group in self.optimizer.param_groups:
                seen.update({names[id(p)]: group["rate"] for p in group["params"]})
            return super().run(*args)

    monkeypatch.setattr(finetuning, "Trainer", Spy)
    train(unet, scheduler, images, profile, method="lsq", iterations=1, rate=1e-3)
    for name, rate in seen.items():
        assert rate == pytest.approx(0.1 if name.endswith("log_s") else 1e-3), name
    restore(unet)
    train(unet, scheduler, images, profile, method="tdq", iterations=1, rate=1e-3)
    assert {rate for name, rate in seen.items() if ".mlp." in name} == {1e-3}
    assert {rate for name, rate in seen.items() if name.endswith("log_scale")} == {0.1}
    restore(unet)
    parts = [("lsq", "log_s", "step_rate"), ("tdq", "log_scale", "step_rate"), ("tdq", "mlp", "generator_rate")]
    for method, part, which in parts:
        seen.clear()
        train(unet, scheduler, images, profile, method=method, iterations=1, rate=1e-3, **{which: 0.5})
        restore(unet)
        assert {rate for name, rate in seen.items() if part in name} == {5e-4}
    seen.clear()
    train(unet, scheduler, images, profile, method="tdq", iterations=1, step_rate=0)
    assert not any("log_scale" in name for name in seen)  # the generator as published


def test_decay_narrows_the_grid_of_pact_and_of_no_other(unet, scheduler, images, profile):
    found = {}
    for method, decay in itertools.product(("pact", "tdq-pact", "lsq"), (0.0, 10.0)):
        train(unet, scheduler, images, profile, method=method, iterations=3, decay=decay)
        steps = [quantizer.step.at(torch.tensor([500])) for quantizer in activation_quantizers(unet).values()]
        found[method, decay] = torch.cat(steps).log().mean().item()
        restore(unet)
    for method in ("pact", "tdq-pact"):
        assert found[method, 10.0] < found[method, 0.0] - 0.01
    assert found["lsq", 10.0] == found["lsq", 0.0]


@pytest.mark.parametrize("method", ["tdq", "nipq"])
def test_a_killed_run_goes_on_with_the_same_losses(unet, scheduler, images, profile, method, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))
    whole = train(unet, scheduler, images, profile, method=method, iterations=4, out=tmp_path / "whole")
    final = {name: value.clone() for name, value in unet.state_dict().items()}
    restore(unet)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    original = finetuning.denoising_loss

    def killed(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args)

    calls = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning, "denoising_loss", killed)
        train(unet, scheduler, images, profile, method=method, iterations=4, out=tmp_path / "parts")
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())  # the one that went in
    assert train(unet, scheduler, images, profile, method=method, iterations=4, out=tmp_path / "parts") == whole
    assert all(torch.equal(value, final[name]) for name, value in unet.state_dict().items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(unet, scheduler, images, profile, monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))
    original, calls = finetuning.denoising_loss, []

    def broken(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(finetuning, "denoising_loss", broken)
    with pytest.raises(TDQError, match=r"loss must stay finite; it is nan at iteration 2. Lower rate. The last good state is in"):
        train(unet, scheduler, images, profile, out=tmp_path, iterations=5)
    assert torch.load(tmp_path / "state.pt")["iteration"] == 2


def test_a_gradient_that_is_not_finite_reaches_no_parameter(unet, scheduler, images, profile, monkeypatch, tmp_path):
    """The root of 0 is finite, and so is the loss; its derivative is not."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))
    original, calls = finetuning.denoising_loss, []

    def broken(*args):
        calls.append(1)
        loss = original(*args)
        return loss + (loss - loss.detach()).sqrt() if len(calls) == 3 else loss

    monkeypatch.setattr(finetuning, "denoising_loss", broken)
    with pytest.raises(TDQError, match=r"norm of the gradient must stay finite; it is (nan|inf) at iteration 2"):
        train(unet, scheduler, images, profile, out=tmp_path, iterations=5)
    kept = torch.load(tmp_path / "state.pt")
    assert kept["iteration"] == 2 and all(torch.isfinite(value).all() for value in kept["model"].values())


def test_step_sizes_of_weights_stay_positive_at_any_rate(unet, scheduler, images, profile):
    train(unet, scheduler, images, profile, weights=8, iterations=8, rate=0.3)
    for name, layer in quantized_layers(unet).items():
        assert (layer.weight_step > 0).all(), name


@pytest.mark.parametrize(
    ("changed", "name"),
    [(dict(method="nipq"), "method"), (dict(iterations=2), "iterations"), (dict(seed=1), "seed"), (dict(rate=1e-3), "rate")],
)
def test_a_folder_goes_on_with_its_own_settings_only(unet, scheduler, images, profile, tmp_path, changed, name):
    train(unet, scheduler, images, profile, method="lsq", out=tmp_path)
    restore(unet)
    with pytest.raises(TDQError, match=f"holds one with {name} = .*, this one has {changed[name]!r}. Choose another out"):
        train(unet, scheduler, images, profile, **{"method": "lsq", **changed}, out=tmp_path)
    torch.nn.init.ones_(unet.conv_out.bias)
    with pytest.raises(TDQError, match="holds one with model = "):
        train(unet, scheduler, images, profile, method="lsq", out=tmp_path)


@pytest.fixture
def begun(unet, scheduler, images, profile, tmp_path):
    """A folder with a finished training on the seeds 0 and 1; a function that goes on with it, with something changed."""
    given = dict(images=images, scheduler=scheduler, seeds=range(2), steps=2)

    def go_on(**changed):
        given_now = {**given, **changed}
        how = dict(method="lsq", iterations=2, batch=4, warmup=2, progress=False, out=tmp_path)
        losses = finetune(unet, given_now.pop("scheduler"), given_now.pop("images"), **how, **given_now)
        restore(unet)
        return losses

    go_on()
    return go_on


def test_other_images_scheduler_or_calibration_is_another_training(begun, unet, scheduler, images):
    other = images.clone()
    other[3, 0, 2, 2] += 1e-3
    leading = type(scheduler).from_config(scheduler.config, timestep_spacing="leading")
    data = CalibrationSet.collect(unet, scheduler, range(2), 2, progress=False)
    for changed, name in [
        (dict(images=other), "images"), (dict(images=images[:11]), "images"), (dict(steps=3), "calibration.steps"),
        (dict(scheduler=leading), "scheduler.timestep_spacing"), (dict(seeds=range(3)), "calibration.seeds"),
        (dict(scheduler=DDPMScheduler.from_config(scheduler.config)), "scheduler.class"), (dict(rate=1e-3), "rate"),
        (dict(shifted=False), "calibration.shifted"), (dict(seeds=None, steps=None, data=data), "calibration.seeds"),
    ]:  # fmt: skip
        with pytest.raises(TDQError, match=f"holds one with {name} = .*, this one has .*. Choose another out"):
            begun(**changed)


def test_the_same_training_goes_on_bit_for_bit(begun, images, scheduler):
    assert begun() == begun(images=images.clone(), scheduler=type(scheduler).from_config(scheduler.config), seeds=[0, 1])


def test_other_data_and_profiles_are_told_apart_by_their_contents(unet, scheduler, profile):
    data = CalibrationSet.collect(unet, scheduler, range(2), 2, progress=False)
    same, other = copy.deepcopy(data), copy.deepcopy(data)
    other.x_t[0, 0, 0, 0] += 1e-6
    assert loop.described(same, "data") == loop.described(data, "data") != loop.described(other, "data")
    profile.best_steps(0, 4)  # a cache is no difference
    moved = replace(profile, counts=profile.counts + 1)
    assert loop.described(replace(profile)) == loop.described(profile) != loop.described(moved)
    assert loop.described(dict(features=RawTime())) != loop.described(dict(features=FourierFeatures()))


@pytest.mark.parametrize(("names", "values", "rule"), [
    (("iterations", "batch", "warmup"), (0, -1, 2.0), "a whole number, 1 or more"),
    (("rate", "step_rate", "generator_rate", "decay"), (-1.0, float("nan"), float("inf"), "1"), "a finite number, 0 or more"),
    (("distill", "ema_decay"), (-0.1, 1.5), "a number from 0 to 1"), (("clip",), (0.0, -1.0), "a finite number above 0"),
])  # fmt: skip
def test_nothing_is_begun_with_a_number_out_of_range(unet, scheduler, images, names, values, rule):
    for name, value in itertools.product(names, values):
        with pytest.raises(TDQError, match=f"{name} must be {rule}; got {value!r}"):
            finetune(unet, scheduler, images, **{name: value})
    assert not hasattr(unet, "quantization")


def test_a_model_in_training_mode_is_refused(unet, scheduler, images, tmp_path):
    unet.mid_block.train()
    with pytest.raises(TDQError, match=r"must be in evaluation mode; mid_block is in training mode. Call model.eval\(\)"):
        finetune(unet, scheduler, images, out=tmp_path)
    assert not list(tmp_path.iterdir()) and unet.mid_block.training


@pytest.mark.parametrize("broken", ["calibrate", "_learn", "denoising_loss"])
def test_whatever_stops_it_the_model_is_as_it_was(unet, scheduler, images, profile, monkeypatch, broken):
    """Weights, gradients, what needs one, and the mode of every module."""
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.conv_in.requires_grad_(True)
    unet.conv_in.bias.grad = torch.ones(8)
    original = getattr(finetuning, broken)

    def fails(*args, **options):
        original(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, broken, fails)
    with pytest.raises(KeyboardInterrupt):
        train(unet, scheduler, images, profile)
    assert not hasattr(unet, "quantization") and not any(module.training for module in unet.modules())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == {"conv_in.weight", "conv_in.bias"}
    assert {name: p.grad.tolist() for name, p in unet.named_parameters() if p.grad is not None} == {"conv_in.bias": [1.0] * 8}


def test_a_trained_model_holds_no_gradients(unet, scheduler, images, profile):
    unet.conv_in.bias.grad = torch.full((8,), 1e3)  # and one from before does not enter
    assert train(unet, scheduler, images, profile) == train_again(unet, scheduler, images, profile)
    assert all(p.grad is None for p in unet.parameters())


def train_again(unet, *args):
    restore(unet)
    unet.zero_grad()
    return train(unet, *args)


def test_a_failed_calibration_leaves_the_full_precision_model(unet, scheduler, images, profile, tmp_path):
    with pytest.raises(TDQError, match="'tdq' takes .*; got 'percentile'"):
        train(unet, scheduler, images, profile, percentile=99, out=tmp_path)
    assert not hasattr(unet, "quantization") and not unet.training
    train(unet, scheduler, images, profile, seed=1, out=tmp_path)  # nothing was begun there, so any settings will do


def test_the_seed_reaches_the_generators(unet, scheduler, images, profile, parameters):
    for seed in (0, 1):
        train(unet, scheduler, images, profile, seed=seed, iterations=1)
        restore(unet)
    first, second = parameters[0], parameters[2]
    assert all(not torch.equal(first[name], second[name]) for name in first if "mlp.0.weight" in name)


def test_dropout_and_noise_are_not_the_stream_of_the_batch(unet, scheduler, images, profile, monkeypatch):
    def recorded(model, images, scheduler, batch, generator):
        drawn.append((torch.rand(64), torch.rand(64, generator=generator)))
        return original(model, images, scheduler, batch, generator)

    original, drawn = finetuning.denoising_loss, []
    monkeypatch.setattr(finetuning, "denoising_loss", recorded)
    train(unet, scheduler, images, profile)
    assert len(drawn) == 3 and not {tuple(noise.tolist()) for noise, _ in drawn} & {tuple(data.tolist()) for _, data in drawn}


def test_without_averaging_the_model_ends_with_the_last_values(unet, scheduler, images, profile, parameters, tmp_path):
    train(unet, scheduler, images, profile, ema_decay=0.0, out=tmp_path)
    last = torch.load(tmp_path / "state.pt")["model"]
    assert all(torch.equal(value, last[name]) for name, value in parameters[1].items())


def test_a_teacher_is_a_share_of_the_loss(unet, scheduler, images):
    other = copy.deepcopy(unet)
    torch.nn.init.ones_(other.conv_out.bias)
    loss = partial(finetuning.denoising_loss, unet, images, scheduler, 4)
    plain, taught = loss(iteration_generator(0, 0)), partial(loss, teacher=other)
    error = taught(iteration_generator(0, 0), distill=1.0)
    assert error > 0
    assert loss(iteration_generator(0, 0), teacher=unet, distill=1.0) == 0
    torch.testing.assert_close(taught(iteration_generator(0, 0), distill=0.25), 0.75 * plain + 0.25 * error)


def test_distillation_starts_near_what_it_learns_from(unet, scheduler, images, profile):
    """The error against the model's own full-precision prediction: far below that against the noise, and falling."""
    plain = train(unet, scheduler, images, profile, iterations=1)[0]
    restore(unet)
    losses = train(unet, scheduler, images, profile, iterations=40, rate=2e-3, distill=1.0)
    assert losses[0] < 0.5 * plain
    assert sum(losses[-10:]) < sum(losses[:10])


def test_unknown_method(unet, scheduler, images):
    with pytest.raises(TDQError, match="method must be one of pact, lsq, nipq, tdq, .*; got 'qat'"):
        finetune(unet, scheduler, images, method="qat")


def test_a_finetuned_model_samples(unet, scheduler, images, profile):
    train(unet, scheduler, images, profile, iterations=1)
    freeze(unet, scheduler, 4)
    assert torch.isfinite(sample(unet, scheduler, range(2), 4, progress=False)).all()


@pytest.mark.parametrize("method", ["lsq", "tdq"])
def test_recorded_calls_of_a_pipeline_train_too(text_unet, tmp_path, method):
    """Against full precision: no images, no scheduler; guided, conditioned, whatever the pipeline did. Resumed bit for bit."""
    text, x = torch.randn(2, 5, text_unet.config.cross_attention_dim), torch.randn(2, 2, 8, 8)
    with record(text_unet, inputs=4) as recorded, torch.no_grad():
        for t in (999, 700, 400, 100):
            text_unet(x, t, encoder_hidden_states=text)
    before = copy.deepcopy(text_unet.state_dict())
    how = dict(method=method, iterations=30, warmup=2, rate=2e-3, progress=False)
    losses = finetune(text_unet, None, recorded.inputs, out=tmp_path / "a", **how)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    freeze(text_unet)
    text_unet(x, 700, encoder_hidden_states=text)
    restore(text_unet)
    assert all(torch.equal(value, before[name]) for name, value in text_unet.state_dict().items())
    again = finetune(text_unet, None, recorded.inputs, out=tmp_path / "a", **how)
    assert again == losses
    restore(text_unet)
    recorded.inputs._calls.pop()
    with pytest.raises(TDQError, match="holds one with images = "):
        finetune(text_unet, None, recorded.inputs, out=tmp_path / "a", **how)
    with pytest.raises(TDQError, match="Recorded calls have their own conditions"):
        finetune(text_unet, None, recorded.inputs, distill=0.5, **how)
    assert not hasattr(text_unet, "quantization")
