"""A runner gives what the frozen model gives, for every method, and takes over another model without compiling again."""

from dataclasses import replace

import pytest
import torch

from tdq_utils import calibrate, freeze, quantize, restore, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.quantize import METHODS
from tdq_utils.run.integer import IntegerRunner
from tdq_utils.run.runtime import ChannelwiseGroupNorm, Runner

HOW = {"seeds": range(3), "steps": 4, "progress": False}


def frozen(model, scheduler, profile, method="table", weights=8, activations=5, **options):
    quantize(model, weights, activations, method, **options)
    profile = replace(profile, model="")  # some of these models were changed since
    calibrate(model, scheduler, profile=profile, progress=False, **({"iterations": 3} if method in ("tdq", "learned") else {}))
    freeze(model, scheduler, 4)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_same_images_as_the_frozen_model(unet, scheduler, profile, method):
    frozen(unet, scheduler, profile, method)
    runner = Runner(unet, scheduler, 4, compiled=False)
    assert torch.equal(sample(runner, scheduler, **HOW), sample(unet, scheduler, **HOW))


@pytest.mark.parametrize("bits", [(None, 5), (8, None)])
def test_weights_or_activations_alone(unet, scheduler, profile, bits):
    frozen(unet, scheduler, profile, "mse", *bits)
    runner = Runner(unet, scheduler, 4, compiled=False)
    assert torch.equal(sample(runner, scheduler, **HOW), sample(unet, scheduler, **HOW))


def test_split_skips(unet, scheduler):
    quantize(unet, 8, 5, "table", split_skips=True)
    calibrate(unet, scheduler, range(2), 4, progress=False)
    freeze(unet, scheduler, 4)
    runner = Runner(unet, scheduler, 4, compiled=False)
    assert torch.equal(sample(runner, scheduler, **HOW), sample(unet, scheduler, **HOW))


def test_the_model_it_was_made_from_is_left_alone(unet, scheduler, profile):
    x = torch.randn(2, 1, 8, 8)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    clean = unet(x, 749).sample
    runner = Runner(frozen(unet, scheduler, profile), scheduler, 4, compiled=False)
    quantized = runner(x, 749).sample
    restore(unet)
    assert torch.equal(unet(x, 749).sample, clean)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert torch.equal(runner(x, 749).sample, quantized)  # and the runner does not need it any more


def test_one_graph_for_all_steps_bits_and_methods(unet, scheduler, profile):
    x, counters = torch.randn(2, 1, 8, 8), torch._dynamo.utils.counters["stats"]
    runner = Runner(frozen(unet, scheduler, profile, "table", 8, 5), scheduler, 4, compiled=False)
    torch._dynamo.reset()
    runner.net.compile(backend="eager")  # traced and guarded as for any backend, without the minute it takes
    counters.clear()
    runner(x, 999)
    graphs = counters["unique_graphs"]
    for method, weights, activations in (("mse", 4, 6), ("tdq", 8, 8)):
        restore(unet)
        runner.load(frozen(unet, scheduler, profile, method, weights, activations))
        for t in (999, 249):
            assert torch.equal(runner(x, t).sample, unet(x, t).sample)
    assert graphs > 0
    assert counters["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", [Runner, IntegerRunner])
def test_takes_over_everything_that_training_moves(unet, scheduler, profile, kind):
    """Norms, biases and the layers in full precision, not the quantized weights alone; and the first model may change later."""
    runner = kind(frozen(unet, scheduler, profile, "mse", 8, 8), scheduler, 4, compiled=False)
    first = sample(runner, scheduler, **HOW)
    restore(unet)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(sample(runner, scheduler, **HOW), first)
    runner.load(frozen(unet, scheduler, profile, "mse", 8, 8))
    fresh = kind(unet, scheduler, 4, compiled=False)
    assert torch.equal(sample(runner, scheduler, **HOW), sample(fresh, scheduler, **HOW))
    assert not torch.equal(sample(runner, scheduler, **HOW), first)


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 12, 6)])
def test_channelwise_group_norm_is_group_norm(shape):
    norm = torch.nn.GroupNorm(4, 12, eps=1e-3).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    x = 3 * torch.randn(shape) + torch.randn(12, *[1] * (len(shape) - 2))
    expected = norm(x)
    norm.__class__ = ChannelwiseGroupNorm
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("t", "message"), [
    (600, "holds 4 time steps.*got t = 600"), (torch.tensor([999, 749]), "takes one t a call; got 749 and 999"),
])  # fmt: skip
def test_refuses_a_time_it_was_not_built_for(unet, scheduler, profile, t, message):
    runner = Runner(frozen(unet, scheduler, profile), scheduler, 4, compiled=False)
    with pytest.raises(TDQError, match=message):
        runner(torch.randn(2, 1, 8, 8), t)


def test_freezes_what_is_not_frozen(unet, scheduler, profile):
    quantize(unet, 8, 5, "tdq")
    calibrate(unet, scheduler, profile=profile, progress=False, iterations=3)
    images = sample(Runner(unet, scheduler, 4, compiled=False), scheduler, **HOW)
    freeze(unet, scheduler, 4)
    assert torch.equal(images, sample(unet, scheduler, **HOW))


def test_refuses_what_is_not_calibrated(unet, scheduler, profile):
    with pytest.raises(TDQError, match="must be quantized"):
        Runner(unet, scheduler, 4, compiled=False)
    quantize(unet, 8, 5, "table")
    with pytest.raises(TDQError, match="calibrated model"):
        Runner(unet, scheduler, 4, compiled=False)
    calibrate(unet, scheduler, profile=profile, progress=False)
    with pytest.raises(TDQError, match="calibrated for"):
        Runner(unet, scheduler, 5, compiled=False)
