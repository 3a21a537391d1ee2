"""Quantized twins of conv and linear layers, and the clock that tells them the time step of the call."""

import copy
import inspect

from torch import nn
from torch.nn import functional as F

from tdq_utils.errors import TDQError
from tdq_utils.quantizers import ActivationQuantizer, DynamicStep, TimeSteps, fake_quantize, mse_step


class QuantizedLayer(nn.Module):
    """What a quantized conv or linear layer has beside its original parameters.

    Attributes:
        activation: :class:`ActivationQuantizer`, or ``None`` for full-precision inputs.
        weight_grid: :class:`Grid`, or ``None`` for full-precision weights.
        weight_step: step sizes of the weights, one for each output channel or one for all.
        levels: integer levels of the weights where rounding was learned (AdaRound), int8; else ``None``: the nearest.
        rounded: the rounded weights of a frozen layer, else ``None``.
        clock: the model's :class:`Clock`.
    """

    def quantized_weight(self):
        """The weights on their grid, as floats."""
        if self.rounded is not None or self.weight_grid is None:
            return self.weight if self.rounded is None else self.rounded
        if self.levels is not None:
            return self.levels * self.weight_step.reshape(-1, *[1] * (self.weight.dim() - 1))
        return fake_quantize(self.weight, self.weight_step, self.weight_grid)

    def forward(self, x):
        """The layer on quantized input and weights."""
        if self.activation is not None:
            x = self.activation(x, self.clock.now)
        if isinstance(self, nn.Linear):
            return F.linear(x, self.quantized_weight(), self.bias)
        return self._conv_forward(x, self.quantized_weight(), self.bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A quantized ``nn.Linear``."""


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A quantized ``nn.Conv1d``."""


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A quantized ``nn.Conv2d``."""


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """A quantized ``nn.Conv3d``."""


TWINS = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}


class Clock:
    """Holds the time steps of the call that one model is in; its hooks see the arguments of that call."""

    def __init__(self):
        self.now = None

    def start(self, model, args, kwargs):
        """Forward pre-hook of the model."""
        call = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        if call.get("timestep") is None:
            raise TDQError("A quantized model must be told the time step; call model(sample, timestep).")
        self.now = TimeSteps(call["timestep"], batch=len(next(iter(call.values()))))

    def stop(self, model, args, output):
        """Forward hook of the model, called even when the forward pass raises."""
        self.now = None


def twin(layer, grid, activations, dynamic, weights_per):
    """A quantized layer that shares ``layer``'s parameters.

    Args:
        layer: conv or linear. grid: of the weights, or ``None``. activations: bits, or ``None``.
        dynamic: ``"tensor"`` or ``"sample"`` for input-dependent step sizes, ``None`` for calibrated ones.
        weights_per: ``"channel"`` or ``"tensor"``.
    """
    copied = copy.copy(layer)
    for key, value in layer.__dict__.items():
        if isinstance(value, dict):  # parameters, hooks, ...: the containers must not be shared
            copied.__dict__[key] = copy.copy(value)
    copied.__class__ = TWINS[type(layer)]
    copied.weight_grid = grid
    weight_step = None
    if grid is not None:
        weight = layer.weight.detach().float()
        weight_step = mse_step(weight.flatten(1) if weights_per == "channel" else weight.reshape(1, -1), grid)
    copied.register_buffer("weight_step", weight_step)
    copied.register_buffer("levels", None)
    copied.register_buffer("rounded", None)
    step = DynamicStep(dynamic) if dynamic else None
    copied.activation = None if activations is None else ActivationQuantizer(activations, step=step).to(layer.weight.device)
    return copied
