"""Concatenated skip inputs, each half with quantizers of its own: found by structure, calibrated, saved, taken out."""

import pytest
import torch

from tdq_utils import calibrate, quantize
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.choice import skip_splits
from tdq_utils.fit.layers import SplitQuantizer
from tdq_utils.fit.quantize import activation_quantizers, quantized_layers
from tdq_utils.fit.reconstruction import adaround, refine
from tdq_utils.method.grid import fake_quantize


@pytest.mark.parametrize("kind", ["unet", "text_unet"])
def test_splits_are_where_the_model_concatenates(kind, monkeypatch, request):
    """The widths of what the model really joins, call by call, against what the structure says."""
    model, joined, original = request.getfixturevalue(kind), [], torch.cat

    def cat(tensors, dim=0):
        if dim == 1 and tensors[0].dim() == 4:
            joined.append(tensors[0].shape[1])
        return original(tensors, dim=dim)

    splits = skip_splits(model)
    monkeypatch.setattr(torch, "cat", cat)
    condition = {"encoder_hidden_states": torch.zeros(1, 5, 12)} if kind == "text_unet" else {}
    model(torch.zeros(1, model.config.in_channels, 8, 8), 5, **condition)
    assert joined == [width for name, width in splits.items() if name.endswith("conv1")]


@pytest.fixture
def data(unet, scheduler):
    return CalibrationSet.collect(unet, scheduler, range(4), steps=4, progress=False)


def test_halves_learn_and_come_back_from_disk(unet, scheduler, data, comes_back):
    quantize(unet, 4, 5, "tdq", split_skips=True)
    calibrate(unet, scheduler, data=data, iterations=5, progress=False)
    refine(unet, data, "block", iterations=2, progress=False)
    adaround(unet, data, iterations=3, progress=False)
    layer = quantized_layers(unet)["up_blocks.0.resnets.0.conv1"]
    assert isinstance(layer.activation, SplitQuantizer) and layer.weight_step.shape[0] == 2
    names = activation_quantizers(unet)
    assert "up_blocks.0.resnets.0.conv1[:16]" in names and "up_blocks.0.resnets.0.conv1[16:]" in names
    comes_back()


def test_each_half_has_the_step_of_its_own_values(unet, scheduler, data):
    quantize(unet, 8, 5, "minmax", split_skips=True)
    calibrate(unet, scheduler, data=data, progress=False)
    name = "up_blocks.0.resnets.0.conv_shortcut"
    layer, seen = quantized_layers(unet)[name], []
    layer.activation.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    at = layer.activation.at
    for x_t, t, _ in data.batches():
        unet(x_t, t)
    first, second = (q.step.s for q in layer.activation.halves)
    assert first != second
    got = layer.activation(seen[0], None)
    assert torch.equal(got[:, :at], fake_quantize(seen[0][:, :at], first, layer.activation.halves[0].grid))
    assert torch.equal(got[:, at:], fake_quantize(seen[0][:, at:], second, layer.activation.halves[1].grid))
    weight = layer.quantized_weight()
    assert torch.equal(weight[:, at:], fake_quantize(layer.weight[:, at:], layer.weight_step[1], layer.weight_grid))
    torch.testing.assert_close(weight, weight.div(layer.spread_weight_step()).round() * layer.spread_weight_step())


def test_a_model_without_skips():
    with pytest.raises(TDQError, match="needs a UNet with up_blocks; Linear concatenates no skips"):
        skip_splits(torch.nn.Linear(1, 1))
