"""Quantized layers against their definition: put on and taken off in place."""

import numpy as np
import pytest
import torch
from torch import nn

from tdq_utils import quantize, quantized_layers
from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import ActivationQuantizer, attach, detach, search_weight_step
from tdq_utils.method.grid import Grid, fake_quantize
from tdq_utils.method.step_sizes import DynamicStep, StaticStep

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
def test_a_quantized_layer_is_the_layer_on_quantized_input_and_weights(make, shape, weights_per):
    layer, x = make(), torch.randn(shape)
    parts = lambda: (type(layer), *(dict(d) for d in (vars(layer), layer._parameters, layer._buffers, layer._modules)))  # noqa: E731
    before, weight = parts(), layer.weight
    step = search_weight_step(weight, Grid(4), weights_per)
    assert step.shape == ((4,) if weights_per == "channel" else (1,))
    attach(layer, weight_grid=Grid(4), weight_step=step, activation=ActivationQuantizer(5, Grid(5), StaticStep(0.1)))
    assert layer.weight is weight
    output = layer(x)

    detach(layer)
    assert parts() == before
    with torch.no_grad():
        layer.weight.copy_(fake_quantize(layer.weight, step, Grid(4)))
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
    with pytest.raises(TDQError, match=r"must be told the time step; got none. Call model\(sample, timestep\)"):
        model(torch.zeros(2, 4))


def at_hand(per, x):
    return ActivationQuantizer(4, step=DynamicStep(per))(x, None)


def test_an_interval_a_token(text_unet):
    """Each token of a linear layer has the interval of its own values; a convolution, which has none, that of its sample."""
    quantize(text_unet, 8, 4, "dynamic-token")
    kinds = {type(layer).__name__: layer.activation for layer in quantized_layers(text_unet).values()}
    assert kinds["QuantizedLinear"].step.per == "token" and kinds["QuantizedConv2d"].step.per == "sample"
    x = torch.randn(2, 3, 16)
    x[0, 0] *= 100  # an outlier, which ruins the interval of its tensor, not those of the other tokens
    together = kinds["QuantizedLinear"](x, None)
    for i, j in np.ndindex(2, 3):
        assert torch.equal(together[i, j], kinds["QuantizedLinear"](x[i : i + 1, j : j + 1], None)[0, 0])
    assert together[1].unique().numel() > 10 > at_hand("tensor", x)[1].unique().numel()


def test_dynamic_intervals_let_gradients_through():
    x = torch.randn(2, 3, 16, requires_grad=True)
    for per in ("tensor", "sample", "token"):
        x_hat = at_hand(per, x)
        assert torch.equal(x_hat, at_hand(per, x.detach()))
        (gradient,) = torch.autograd.grad(x_hat.sum(), x)
        assert (gradient == 1).all()
