"""Quantized twins of conv and linear layers, and the clock that tells them the time step of the call."""

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from tdq_utils.errors import TDQError
from tdq_utils.method.grid import Grid, fake_quantize, mse_step
from tdq_utils.method.rules import lsq
from tdq_utils.method.step_sizes import DynamicStep, TimeSteps


class ActivationQuantizer(nn.Module):
    """Quantizes one layer's input: a grid, and a source of step sizes.

    Args:
        bits: 2 to 8.
        grid: :class:`Grid`, or ``None`` to choose it by the range of each input (dynamic methods).
        step: :class:`tdq_utils.method.step_sizes.StepSize`, or ``None`` until calibration. In training, ``rule``
            (:mod:`tdq_utils.method.rules`) quantizes.
    """

    def __init__(self, bits, grid=None, step=None):
        super().__init__()
        self.bits, self.grid, self.step, self.rule = bits, grid, step, fake_quantize

    def forward(self, x, t):
        """Fake-quantize ``x`` at :class:`tdq_utils.method.step_sizes.TimeSteps` ``t``. TDQError: not calibrated."""
        if self.step is None:
            raise TDQError("A quantized model must be calibrated before it runs; call calibrate(model, scheduler, ...).")
        if self.grid is None and getattr(self.step, "per", None) == "sample":
            ranges = zip(*(ends.tolist() for ends in x.reshape(len(x), -1).aminmax(dim=1)), strict=True)
            if len({Grid.for_range(self.bits, *ends) for ends in ranges}) > 1:
                # A sample's grid must not depend on its neighbours.
                return torch.cat([self(sample, t) for sample in x.split(1)])
        grid = self.grid or Grid.for_range(self.bits, *(end.item() for end in x.aminmax()))
        rule = self.rule if self.training else fake_quantize
        return rule(x, self.step(x, t, grid), grid)

    def extra_repr(self):
        """Bits and the kind of grid, for print(model)."""
        kind = "by input" if self.grid is None else "symmetric" if self.grid.low is None else "unsigned"
        return f"bits={self.bits}, grid={kind}"


class QuantizedLayer(nn.Module):
    """What a quantized conv or linear layer has beside its original parameters.

    Attributes:
        activation: :class:`ActivationQuantizer`, or ``None`` for full-precision inputs.
        weight_grid: :class:`Grid`, or ``None`` for full-precision weights.
        weight_step: step sizes of the weights, one for each output channel or one for all; of a layer with a split
            input, two rows of them.
        split: channels of the input that belong to its first half, or ``None``.
        levels: integer levels of the weights where rounding was learned (AdaRound), int8; else ``None``: the nearest.
        rounded: the rounded weights of a frozen layer, else ``None``.
        clock: the model's :class:`Clock`.
    """

    def quantized_weight(self):
        """The weights on their grid, as floats."""
        if self.rounded is not None or self.weight_grid is None:
            return self.weight if self.rounded is None else self.rounded
        if self.levels is not None:
            return self.levels * self.spread_weight_step()
        rule = lsq if self.training else fake_quantize
        if self.split is None:
            return rule(self.weight, self.weight_step, self.weight_grid)
        halves = zip(_halves(self.weight, self.split), self.weight_step, strict=True)
        return torch.cat([rule(half, s, self.weight_grid) for half, s in halves], dim=1)

    def spread_weight_step(self):
        """The step size of every weight, in a shape that broadcasts to the weights."""
        rows = self.weight_step.reshape(2 if self.split else 1, -1, *[1] * (self.weight.dim() - 1))
        if self.split is None:
            return rows[0]
        widths = self.split, self.weight.shape[1] - self.split
        return torch.cat([s.expand(-1, width, *s.shape[2:]) for s, width in zip(rows, widths, strict=True)], dim=1)

    def forward(self, x):
        """The layer on quantized input and weights."""
        if self.activation is not None:
            x = self.activation(x, self.clock and self.clock.now)
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


def weight_levels(layer):
    """The integer levels of a quantized layer's weights: int8, shaped as the weights."""
    if layer.levels is not None:
        return layer.levels
    return (layer.quantized_weight().detach() / layer.spread_weight_step()).round().to(torch.int8)


class SplitQuantizer(nn.Module):
    """Two activation quantizers for the halves of a concatenated input, which often differ in range (Q-Diffusion).

    Args:
        at: channels of the first half. halves: two :class:`ActivationQuantizer`.
    """

    def __init__(self, at, halves):
        super().__init__()
        self.at, self.halves = at, nn.ModuleList(halves)

    def forward(self, x, t):
        """Fake-quantize each half with its own quantizer at :class:`TimeSteps` ``t``."""
        return torch.cat([q(half, t) for q, half in zip(self.halves, _halves(x, self.at), strict=True)], dim=1)

    def parts(self, layer: str) -> dict[str, slice]:
        """Names and channels of the two halves of the input of ``layer``."""
        return {f"{layer}[:{self.at}]": slice(0, self.at), f"{layer}[{self.at}:]": slice(self.at, None)}


def _halves(x, at):
    return x[:, :at], x[:, at:]


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


def twin(layer, grid, activations, dynamic, weights_per, split=None):
    """A quantized layer that shares ``layer``'s parameters.

    Args:
        layer: conv or linear. grid: of the weights, or ``None``. activations: bits, or ``None``.
        dynamic: ``"tensor"`` or ``"sample"`` for input-dependent step sizes, ``None`` for calibrated ones.
        weights_per: ``"channel"`` or ``"tensor"``. split: channels of the first half of a concatenated input.
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
        parts = [weight] if split is None else _halves(weight, split)
        steps = [mse_step(part.flatten(1) if weights_per == "channel" else part.reshape(1, -1), grid) for part in parts]
        weight_step = steps[0] if split is None else torch.stack(steps)
    copied.register_buffer("weight_step", weight_step)
    copied.register_buffer("levels", None)
    copied.register_buffer("rounded", None)
    copied.split, copied.activation = split, None
    if activations is not None:
        make = lambda: ActivationQuantizer(activations, step=DynamicStep(dynamic) if dynamic else None)  # noqa: E731
        quantizer = make() if split is None else SplitQuantizer(split, [make(), make()])
        copied.activation = quantizer.to(layer.weight.device)
    return copied
