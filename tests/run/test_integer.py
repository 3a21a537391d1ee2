"""Integers give what the simulation gives: layer by layer, image by image, for every kind of interval."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from tdq_utils import calibrate, freeze, load_quantized, quantize, restore, sample, save_quantized
from tdq_utils.errors import TDQError
from tdq_utils.fit.quantize import quantized_layers
from tdq_utils.run import integer as module
from tdq_utils.run.integer import IntegerConv2d, IntegerLinear, to_integer

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not module.sums_are_exact(8),
    reason="integer kernels need an x86 processor with 8-bit dot products",
)
METHODS = ("minmax", "table", "finite-set", "tdq", "dynamic", "dynamic-sample", "dynamic-token")


def frozen(model, scheduler, profile, method="table", weights=8, activations=8, **options):
    quantize(model, weights, activations, method, **options)
    calibrate(model, scheduler, profile=profile, progress=False, **({"iterations": 3} if method == "tdq" else {}))
    freeze(model, scheduler, 4)
    return model


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_within_one_level_of_its_simulation(unet, scheduler, profile, method, bits):
    """Fed the same floats. The sums are exact in both, to float32: far less than a level of the output."""
    runner = to_integer(frozen(unet, scheduler, profile, method, *bits), scheduler, 4, compiled=False)
    seen = {}
    layers = quantized_layers(unet)
    handles = [
        layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, layer in layers.items()
    ]
    unet(torch.randn(3, 1, 8, 8), 749)
    for handle in handles:
        handle.remove()
    runner(torch.randn(3, 1, 8, 8), 749)  # puts the row of t = 749 in place
    assert seen.keys() == layers.keys()
    for name, (x, out) in seen.items():
        found = runner.net.get_submodule(name)(x)
        assert found.shape == out.shape
        torch.testing.assert_close(found, out, atol=1e-5 * out.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_images_within_a_bound_of_the_simulation(unet, scheduler, profile, method):
    """A last bit of a sum can tip a rounding, and a level more or less travels through the rest of the trajectory."""
    how = {"seeds": range(3), "steps": 4, "progress": False}
    frozen(unet, scheduler, profile, method)
    difference = sample(to_integer(unet, scheduler, 4, compiled=False), scheduler, **how) - sample(unet, scheduler, **how)
    assert difference.abs().mean() < 0.002
    assert difference.abs().max() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_alone_is_enough(unet, scheduler, profile, method):
    how = {"seeds": range(2), "steps": 4, "progress": False}
    frozen(unet, scheduler, profile, method)
    alone, told = to_integer(unet, compiled=False), to_integer(unet, scheduler, 4, compiled=False)
    assert torch.equal(sample(alone, scheduler, **how), sample(told, scheduler, **how))


def test_generators_must_be_told_the_steps(unet, scheduler, profile):
    quantize(unet, 8, 8, "tdq")
    calibrate(unet, scheduler, profile=profile, iterations=1, progress=False)
    with pytest.raises(TDQError, match="must know its time steps.*freeze it"):
        to_integer(unet)


def test_packed_4_bit_weights_come_from_disk_and_run(unet, scheduler, profile, tmp_path):
    frozen(unet, scheduler, profile, "table", 4, 8)
    save_quantized(unet, tmp_path, packed=True)
    how = {"seeds": range(2), "steps": 4, "progress": False}
    runners = [to_integer(model, compiled=False) for model in (unet, load_quantized(tmp_path))]
    assert torch.equal(*(sample(runner, scheduler, **how) for runner in runners))


def test_no_floats_are_kept_of_quantized_weights(unet, scheduler, profile):
    runner = to_integer(frozen(unet, scheduler, profile), scheduler, 4, compiled=False)
    layers = [layer for layer in runner.net.modules() if isinstance(layer, IntegerConv2d)]
    assert len(layers) == len(quantized_layers(unet))
    assert {type(layer) for layer in layers} == {IntegerConv2d, IntegerLinear}
    assert all(layer.packed.dtype == torch.int8 for layer in layers)
    assert all(not hasattr(layer, "weight") for layer in layers)


def test_levels_of_learned_rounding_are_kept(unet):
    quantize(unet, 4, 8, "mse")
    layer = next(iter(quantized_layers(unet).values()))
    nearest = layer.weight_levels()
    layer.levels = (nearest + 1).clamp(max=7)  # as AdaRound leaves them
    assert torch.equal(layer.weight_levels(), layer.levels)
    assert not torch.equal(layer.levels, nearest)


def test_takes_over_another_model(unet, scheduler, profile):
    how = {"seeds": range(2), "steps": 4, "progress": False}
    runner = to_integer(frozen(unet, scheduler, profile, "table", 8, 8), scheduler, 4, compiled=False)
    restore(unet)
    frozen(unet, scheduler, profile, "mse", 4, 5)
    runner.load(unet)
    fresh = to_integer(unet, scheduler, 4, compiled=False)
    assert torch.equal(sample(runner, scheduler, **how), sample(fresh, scheduler, **how))


@pytest.mark.parametrize("bits", [(None, 8), (8, None)], ids=str)
def test_refuses_a_model_that_is_half_float(unet, scheduler, profile, bits):
    with pytest.raises(TDQError, match="Integers need weights and activations"):
        to_integer(frozen(unet, scheduler, profile, "mse", *bits), scheduler, 4)


def test_refuses_layers_without_a_kernel(scheduler, unet):
    quantize(unet, 8, 8, "mse", split_skips=True)
    calibrate(unet, scheduler, range(2), 4, progress=False)
    freeze(unet, scheduler, 4)
    with pytest.raises(TDQError, match="no integer kernel for up_blocks.*keep it in full precision"):
        to_integer(unet, scheduler, 4, compiled=False)


def test_other_processors_are_told_of_the_simulation(unet, scheduler, profile, monkeypatch):
    frozen(unet, scheduler, profile)
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    with pytest.raises(TDQError, match="arm64.*simulation"):
        to_integer(unet, scheduler, 4)


def test_without_8_bit_sums_8_bit_weights_are_refused_and_7_bit_weights_warned_of(unet, scheduler, profile, monkeypatch):
    monkeypatch.setattr(module, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(module, "sums_are_exact", lambda bits: bits < 8)
    frozen(unet, scheduler, profile, weights=8)
    with pytest.raises(TDQError, match="with 8-bit weights they saturate here"):
        to_integer(unet, scheduler, 4)
    restore(unet)
    frozen(unet, scheduler, profile, weights=7)
    with pytest.warns(UserWarning, match="no 8-bit dot product"):
        to_integer(unet, scheduler, 4, compiled=False)


def test_sums_are_tried_where_instructions_are_hidden():
    """oneDNN may not use what the processor lists; older instructions add two products in 16 bits."""
    code = "from tdq_utils.run.integer import sums_are_exact as exact; print(exact(8), exact(7), exact(4))"
    found = {
        isa: subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True, check=True
        ).stdout.split()
        for isa in ("DEFAULT", "AVX2")
    }
    assert found == {"DEFAULT": ["True"] * 3, "AVX2": ["False", "True", "True"]}


def test_worst_case_sums_do_not_saturate():
    """All activations and weights at their ends: where 16-bit sums of older instructions would saturate."""

    class AllHigh(nn.Module):
        def levels(self, x, inverse):
            return torch.full_like(x, 255, dtype=torch.uint8), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)

    from tdq_utils.fit.layers import attach
    from tdq_utils.method.grid import Grid

    conv = nn.Conv2d(64, 16, 3, bias=False).requires_grad_(False)
    conv.weight.fill_(127.0)
    attach(conv, weight_grid=Grid(8), weight_step=torch.ones(16))
    out = IntegerConv2d(conv, AllHigh())(torch.zeros(1, 64, 3, 3))
    assert (out == 255 * 127 * 64 * 9).all()
