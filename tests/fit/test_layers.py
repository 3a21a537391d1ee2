"""Quantized twins of single layers against their definition, and the clock."""

import pytest
import torch
from torch import nn

from tdq_utils import quantize
from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import twin
from tdq_utils.method.grid import Grid, fake_quantize
from tdq_utils.method.step_sizes import StaticStep, TimeSteps

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 4, bias=False), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, dilation=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 8, 8)),
    "conv2d-circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 3), (2, 6, 4, 4, 4)),
}


@pytest.mark.parametrize("weights_per", ["channel", "tensor"])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_twin_is_the_layer_on_quantized_input_and_weights(make, shape, weights_per):
    layer, x = make(), torch.randn(shape)
    before = dict(layer.__dict__), dict(layer._parameters), dict(layer._buffers), dict(layer._modules)
    quantized = twin(layer, Grid(4), activations=5, dynamic=None, weights_per=weights_per)
    quantized.activation.grid, quantized.activation.step = Grid(5), StaticStep(0.1)
    quantized.clock = type("Clock", (), {"now": TimeSteps(0, 2)})
    output = quantized(x)

    assert (layer.__dict__, layer._parameters, layer._buffers, layer._modules) == before
    assert quantized.weight is layer.weight and quantized.bias is layer.bias
    assert quantized.weight_step.shape == ((4,) if weights_per == "channel" else (1,))
    with torch.no_grad():
        layer.weight.copy_(fake_quantize(layer.weight, quantized.weight_step, Grid(4)))
        assert torch.equal(output, layer(fake_quantize(x, torch.tensor(0.1), Grid(5))))


def test_a_call_without_a_time_step():
    """A model whose time step is optional, as in DiT."""

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample, timestep=None):
            return self.layer(sample)

    model = Denoiser()
    quantize(model, activations=None, keep=[])
    assert model(torch.zeros(2, 4), 3).shape == (2, 4)
    with pytest.raises(TDQError, match=r"must be told the time step; call model\(sample, timestep\)"):
        model(torch.zeros(2, 4))
