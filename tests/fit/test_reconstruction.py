"""Learning on outputs: what is learned and what is left alone, errors that fall, and AdaRound's definition."""

import pytest
import torch

from tdq_utils import calibrate, freeze, load_quantized, quantize, restore, save_quantized
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.quantize import quantized_layers
from tdq_utils.fit.reconstruction import SoftRounding, _block_error, _noise_error, adaround, blocks, refine
from tdq_utils.method.grid import fake_quantize


@pytest.fixture
def data(unet, scheduler):
    return CalibrationSet.collect(unet, scheduler, range(8), steps=4, progress=False)


def error(model, data, measure):
    with torch.no_grad():
        return sum(measure(model, batch).item() for batch in data.batches(8))


def test_every_quantized_layer_is_in_one_block(unet):
    quantize(unet, 8, 4, "tdq")
    units = blocks(unet)
    for layer in quantized_layers(unet):
        assert sum(layer == unit or layer.startswith(unit + ".") for unit in units) == 1
    assert {"down_blocks.0.resnets.0", "down_blocks.1.attentions.0", "up_blocks.0.upsamplers.0"} <= set(units)


@pytest.mark.parametrize("target", ["block", "noise"])
@pytest.mark.parametrize("method", ["learned", "tdq"])
def test_refine_lowers_the_error_of_its_target(calibrated, data, method, target):
    model = calibrated(method, weights=None, activations=8)
    for layer in quantized_layers(model).values():  # far from the best
        layer.activation.step = type(layer.activation.step)(8 * layer.activation.step.at(torch.tensor([500])).item()).eval()
    measure = {"block": _block_error, "noise": _noise_error}[target]
    weights = {name: p.clone() for name, p in model.named_parameters() if ".activation." not in name}
    before = error(model, data, measure)
    rate = {"learned": 1e-2, "tdq": 1e-3}[method]
    losses = refine(model, data, target, iterations=40, rate=rate, progress=False)
    assert len(losses) == 40
    assert error(model, data, measure) < 0.85 * before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in weights)
    assert not any(layer.activation.step.training for layer in quantized_layers(model).values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("learn", [refine, adaround])
def test_gradients_and_flags_of_the_model_stay(calibrated, data, learn):
    model = calibrated("learned")
    model.conv_in.requires_grad_(True)
    model.conv_in.bias.grad = torch.ones(8)
    learn(model, data, iterations=2, progress=False)
    assert {name: p.grad.sum().item() for name, p in model.named_parameters() if p.grad is not None} == {"conv_in.bias": 8.0}
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".activation." not in n} == {
        "conv_in.weight", "conv_in.bias",
    }  # fmt: skip


def test_full_precision_blocks_have_no_error(unet, data):
    quantize(unet, None, None, "tdq")
    assert error(unet, data, _block_error) == error(unet, data, _noise_error) == 0


def test_blocks_work_on_every_model(denoiser, scheduler, monkeypatch):
    monkeypatch.setattr(refine, "__defaults__", ("block", 3, *refine.__defaults__[2:]))  # target, iterations
    model, condition = denoiser
    data = CalibrationSet.collect(model, scheduler, range(3), steps=2, condition=condition, progress=False)
    quantize(model, 8, 4, "tdq")
    options = dict(iterations=2, reconstruct="block", progress=False)
    calibrate(model, scheduler, data=data, **options)
    assert error(model, data, _block_error) > 0


def test_soft_rounding_starts_as_the_weights_and_decides(unet):
    quantize(unet, 4, None, "mse")
    layer = next(iter(quantized_layers(unet).values()))
    soft = SoftRounding(layer)
    inside = (layer.weight / soft.s > -7.9) & (layer.weight / soft.s < 6.9)
    torch.testing.assert_close(soft.weight(soft.h)[inside], layer.weight[inside], atol=1e-4, rtol=1e-3)
    nearest = fake_quantize(layer.weight, layer.weight_step, layer.weight_grid)
    torch.testing.assert_close(soft.weight((soft.h >= 0.5).float()), nearest)
    with torch.no_grad():
        soft.v[:] = 20.0
    assert soft.penalty(2) == 0 and (soft.h == 1).all()


def test_adaround_lowers_the_error_and_leaves_the_model(unet, data, tmp_path):
    original = {name: value.clone() for name, value in unet.state_dict().items()}
    quantize(unet, 3, None, "mse")
    before = error(unet, data, _block_error)
    adaround(unet, data, iterations=150, rate=3e-2, progress=False)
    assert error(unet, data, _block_error) < 0.9 * before
    for layer in quantized_layers(unet).values():
        s = layer.weight_step.reshape(-1, *[1] * (layer.weight.dim() - 1))
        # Up or down, never further: a step around the weight, or the end of the grid.
        inside = (layer.weight / s).clamp(layer.weight_grid.q_min, layer.weight_grid.q_max)
        assert ((layer.levels - inside).abs() < 1.001).all()
    save_quantized(unet, tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_quantized(tmp_path)(x, 500).sample, unet(x, 500).sample)
    restore(unet)
    assert all(torch.equal(value, original[name]) for name, value in unet.state_dict().items())


def test_adaround_through_calibrate_survives_freezing(unet, scheduler, data, monkeypatch):
    monkeypatch.setattr(adaround, "__defaults__", (3, *adaround.__defaults__[1:]))
    quantize(unet, 4, 8, "mse")
    calibrate(unet, scheduler, data=data, weights_method="adaround", progress=False)
    x = torch.randn(2, 1, 8, 8)
    unfrozen = unet(x, 999).sample
    freeze(unet, scheduler, 4)
    assert torch.equal(unet(x, 999).sample, unfrozen)


@pytest.mark.parametrize(("method", "options", "message"), [
    ("mse", dict(reconstruct="block"), "needs a step size that learns"), ("tdq", dict(reconstruct="x"), "'input', 'block' or"),
    ("tdq", dict(weights_method="best"), "None .nearest level. or 'adaround'"),
    ("dynamic", dict(reconstruct="block"), "'learned' or 'tdq'; got 'dynamic'"),
])  # fmt: skip
def test_bad_input(unet, scheduler, method, options, message):
    quantize(unet, 8, 4, method)
    with pytest.raises(TDQError, match=message):
        calibrate(unet, scheduler, **options)


def test_there_must_be_something_to_learn(unet, scheduler, data, calibrated):
    quantize(unet, None, 8, "tdq")
    with pytest.raises(TDQError, match="rounds quantized weights; these are in full precision. Call quantize"):
        calibrate(unet, scheduler, data=data, weights_method="adaround")
    with pytest.raises(TDQError, match="adaround needs step sizes that learn, or weights on a grid; got none"):
        adaround(unet, data, progress=False)
    restore(unet)
    quantize(unet, 4, None, "tdq")
    with pytest.raises(TDQError, match="'learned' or 'tdq'; got activations in full precision"):
        calibrate(unet, scheduler, data=data, reconstruct="block")
    restore(unet)
    with pytest.raises(TDQError, match="refine by block needs step sizes that learn"):
        refine(calibrated("mse"), data, progress=False)


@pytest.mark.parametrize(("options", "message"), [
    (dict(iterations=0), "iterations must be a whole number, 1 or more; got 0"), (dict(iterations=-1), "1 or more; got -1"),
    (dict(batch_size=0), "batch_size must be a whole number, 1 or more; got 0"),
    (dict(rate=0.0), "rate must be a finite number above 0; got 0"),
])  # fmt: skip
def test_numbers_out_of_range(calibrated, data, options, message):
    model = calibrated("learned")
    for learn in (refine, adaround):
        with pytest.raises(TDQError, match=message):
            learn(model, data, progress=False, **options)
    assert model.quantization.activations and all(layer.activation for layer in quantized_layers(model).values())
