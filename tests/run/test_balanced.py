"""Balanced models run, in floats and integers, and are kept: what they give stays what they give."""

import platform

import pytest
import torch
from diffusers import UNet2DModel

from tdq_utils import (
    CalibrationSet,
    calibrate,
    freeze,
    load_quantized,
    quantize,
    quantized_layers,
    restore,
    sample,
    save_quantized,
)
from tdq_utils.run import integer
from tdq_utils.run.onnx import OnnxModel, export_onnx
from tdq_utils.run.runtime import Runner

HOW = {"seeds": range(3), "steps": 4, "progress": False}
METHODS = ("mse", "table", "tdq", "dynamic", "dynamic-sample", "dynamic-token")
needs_kernels = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not integer.sums_are_exact(8),
    reason="integer kernels need an x86 processor with 8-bit dot products",
)


@pytest.fixture
def data(unet, scheduler):
    return CalibrationSet.collect(unet, scheduler, range(100, 104), 4, progress=False)


def balanced(model, data, method="table", weights=4, **options):
    quantize(model, weights, 5, method, balance="range", **options)
    calibrate(model, data=data, progress=False, **({"iterations": 3} if method == "tdq" else {}))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_runners_give_the_same_images(unet, scheduler, data, method):
    freeze(balanced(unet, data, method), scheduler, 4)
    runner = Runner(unet, scheduler, 4, compiled=False)
    torch.testing.assert_close(sample(runner, scheduler, **HOW), sample(unet, scheduler, **HOW), atol=1e-4, rtol=0)


@needs_kernels
@pytest.mark.parametrize("weights", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_integers_within_one_level_of_the_simulation(unet, scheduler, data, method, weights):
    freeze(balanced(unet, data, method, weights), scheduler, 4)
    runner, seen, layers = integer.to_integer(unet, scheduler, 4, compiled=False), {}, quantized_layers(unet)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
    unet(torch.randn(3, 1, 8, 8), 749)
    runner(torch.randn(3, 1, 8, 8), 749)
    assert seen.keys() == layers.keys()
    for name, (x, out) in seen.items():
        found = runner.net.get_submodule(name)(x)
        torch.testing.assert_close(found, out, atol=2e-5 * out.abs().max().item(), rtol=1e-5)


@needs_kernels
def test_a_runner_takes_over_the_factors_of_another_model(unet, scheduler, data):
    freeze(balanced(unet, data), scheduler, 4)
    runners = [kind(unet, scheduler, 4, compiled=False) for kind in (Runner, integer.IntegerRunner)]
    restore(unet)
    quantize(unet, 4, 5, "table", balance="smooth")
    calibrate(unet, data=data, progress=False)
    freeze(unet, scheduler, 4)
    for runner in runners:
        runner.load(unet)
        afresh = type(runner)(unet, scheduler, 4, compiled=False)
        assert torch.equal(sample(runner, scheduler, **HOW), sample(afresh, scheduler, **HOW))


def test_a_runner_takes_over_a_model_that_is_not_balanced(unet, scheduler, data):
    freeze(balanced(unet, data), scheduler, 4)
    runner = Runner(unet, scheduler, 4, compiled=False)
    restore(unet)
    quantize(unet, 4, 5, "table")
    calibrate(unet, data=data, progress=False)
    freeze(unet, scheduler, 4)
    runner.load(unet)
    assert torch.equal(sample(runner, scheduler, **HOW), sample(unet, scheduler, **HOW))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(method="mse"), dict(split_skips=True), dict(weights=8)], ids=str)
def test_folders_hold_the_factors(unet, scheduler, data, x, tmp_path, packed, options):
    freeze(balanced(unet, data, **options), scheduler, 4)
    save_quantized(unet, tmp_path, packed)
    loaded = load_quantized(tmp_path)
    assert loaded.quantization.balance == "range" and torch.equal(loaded(x, 749).sample, unet(x, 749).sample)


def test_a_model_whose_factors_are_not_measured_is_kept_so(unet, tmp_path):
    quantize(unet, 4, 5, "mse", balance=True)
    save_quantized(unet, tmp_path)
    assert all(layer.balance is None for layer in quantized_layers(load_quantized(tmp_path)).values())


@pytest.mark.parametrize("frozen", [False, True])
def test_diffusers_keeps_them_too(unet, scheduler, data, x, tmp_path, frozen):
    balanced(unet, data, "tdq")
    if frozen:
        freeze(unet, scheduler, 4)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 749).sample, unet(x, 749).sample)


def test_onnx_files_hold_them(unet, scheduler, data, tmp_path):
    balanced(unet, data, weights=7)
    export_onnx(unet, scheduler, 4, tmp_path / "model.onnx")
    x = torch.randn(2, 1, 8, 8)
    assert (OnnxModel(tmp_path / "model.onnx")(x, 749).sample - unet(x, 749).sample).abs().mean() < 0.01


def test_half_precision(unet, data, x):
    unet.to(torch.bfloat16)
    quantize(unet, 8, 8, "mse", balance=True)
    calibrate(unet, data=CalibrationSet(data.x_t.bfloat16(), data.t, data.seeds, ""), progress=False)
    assert unet(x.bfloat16(), 749).sample.dtype == torch.bfloat16
    assert all(layer.balance.dtype == torch.float32 for layer in quantized_layers(unet).values())
    freeze(unet)
    assert unet(x.bfloat16(), 749).sample.dtype == torch.bfloat16
