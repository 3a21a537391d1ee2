"""Quantized conv and linear layers: the very modules of the model, for as long as it is quantized with another class."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tdq_utils.denoiser.call import now
from tdq_utils.errors import TDQError
from tdq_utils.method.balance import for_weight
from tdq_utils.method.grid import Grid, fake_quantize, mse_step, on_levels
from tdq_utils.method.rules import lsq
from tdq_utils.method.step_sizes import DynamicStep, StepSize, TableStep, TimeSteps


class ActivationQuantizer(nn.Module):
    """Quantizes one layer's input, in training by ``rule`` (:mod:`tdq_utils.method.rules`).

    ``bits``: 2 to 8. ``grid``: :class:`Grid`, or ``None`` to choose it by the range of each input (dynamic methods).
    ``step``: where step sizes come from, or ``None`` until calibration.
    """

    grid: Any
    step: Any

    def __init__(self, bits: int, grid: Grid | None = None, step: StepSize | None = None):
        super().__init__()
        self.bits, self.grid, self.step = bits, grid, step
        self.rule: Callable[..., torch.Tensor] = fake_quantize

    def forward(self, x: torch.Tensor, t: TimeSteps | None, balance: torch.Tensor | None = None) -> torch.Tensor:
        """Fake-quantize ``x`` at :class:`TimeSteps` ``t``, its channels divided by ``balance`` meanwhile.

        TDQError: not calibrated, or t is needed and not known.
        """
        if self.step is None:
            raise TDQError("A quantized model must be calibrated before it runs; call calibrate(model, scheduler, ...).")
        if balance is not None:
            return (self._rounded(x * (1 / balance), t, True) * balance).to(x.dtype)
        return self._rounded(x, t, False)

    def _rounded(self, x, t, balanced):
        if t is None and self.step.over_time:
            raise TDQError("A layer whose interval follows t must know the call that it is in; got none. Call the model itself, "
                           "not its forward or a part of it, and turn gradient checkpointing off "
                           "(model.disable_gradient_checkpointing()).")  # fmt: skip
        if (interval := self._own_interval(x, t, balanced)) is not None:
            x_hat = on_levels(x.detach(), *interval).to(x.dtype)
            return x_hat + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else x_hat  # straight-through
        rule = self.rule if self.training else fake_quantize
        return rule(x, self.step(x, t, self.grid), self.grid)

    def _own_interval(self, x, t, balanced):
        """Of a step source that has levels of its own, beside those of the grid."""
        if isinstance(self.step, DynamicStep):
            half = 2 ** (self.bits - 1)
            return self.step.interval(x, -half, half - 1, balanced)
        return self.step.interval(x, t) if isinstance(self.step, TableStep) and self.step.levels is not None else None

    def _apply(self, fn, recurse=True):
        return super()._apply(less_dtype(fn), recurse)

    def extra_repr(self) -> str:
        """Bits and the kind of grid, for print(model)."""
        kind = "by input" if self.grid is None else "symmetric" if self.grid.low is None else "unsigned"
        return f"bits={self.bits}, grid={kind}"


class SplitQuantizer(nn.Module):
    """Two quantizers, ``halves``, for the channels before and after ``at`` of a concatenated input (Q-Diffusion)."""

    def __init__(self, at: int, halves: list[nn.Module]):
        super().__init__()
        self.at = at
        self.halves: Any = nn.ModuleList(halves)

    def forward(self, x: torch.Tensor, t: TimeSteps | None, balance: torch.Tensor | None = None) -> torch.Tensor:
        """Fake-quantize each half with its own quantizer at :class:`TimeSteps` ``t``."""
        balances = (None, None) if balance is None else (balance[: self.at], balance[self.at :])
        halves = zip(self.halves, _halves(x, self.at), balances, strict=True)
        return torch.cat([quantizer(half, t, d) for quantizer, half, d in halves], dim=1)

    def parts(self, layer: str) -> dict[str, slice]:
        """Names and channels of the two halves of the input of ``layer``."""
        return {f"{layer}[:{self.at}]": slice(0, self.at), f"{layer}[{self.at}:]": slice(self.at, None)}


def _halves(x, at):
    return x[:, :at], x[:, at:]


def less_dtype(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What moves a module's tensors, for step sizes: they follow the device, not the dtype."""
    return lambda v: fn(v).to(v.dtype) if v.is_meta else v.to(fn(v).device)


class QuantizedLayer(nn.Module):
    """What a quantized conv or linear layer has beside its own parameters, which stay as they are.

    ``activation``: quantizer, ``weight_grid``: :class:`Grid`; ``None``: full precision. ``weight_step``: one for each output
    channel or one for all; with a split input, two rows of them. ``split``: channels of the input that belong to its first half.
    ``levels``: int8, of weights whose rounding was learned (AdaRound). ``rounded``: the weights of a frozen layer.
    ``balance``: what each input channel is divided by before it is quantized, and its weights multiplied with, in a shape that
    broadcasts to the input; ``None``: not balanced.
    ``cached``: a table over t of what it puts out, in place of all this (:mod:`tdq_utils.fit.temporal_cache`), or ``None``.
    """

    weight: Any
    bias: Any
    activation: Any
    weight_grid: Grid | None
    weight_step: torch.Tensor
    split: int | None
    levels: torch.Tensor | None
    rounded: torch.Tensor | None
    balance: torch.Tensor | None
    cached: Any

    @property
    def weight_balance(self) -> torch.Tensor | None:
        """``balance``, in a shape that broadcasts to the weights."""
        return None if self.balance is None else for_weight(self.balance.flatten(), self.weight, getattr(self, "groups", 1))

    def folded_weight(self) -> torch.Tensor:
        """The weights that are put on the grid: multiplied with the balance."""
        return self.weight if self.balance is None else self.weight * self.weight_balance

    def quantized_weight(self) -> torch.Tensor:
        """The weights on their grid, as floats."""
        if self.rounded is not None or self.weight_grid is None:
            return self.weight if self.rounded is None else self.rounded
        rule, weight = lsq if self.training else fake_quantize, self.folded_weight()
        if self.levels is not None:
            weight = self.levels * self._folded_step()
        elif self.split is None:
            weight = rule(weight, self.weight_step, self.weight_grid)
        else:
            halves = zip(_halves(weight, self.split), self.weight_step, strict=True)
            weight = torch.cat([rule(half, s, self.weight_grid) for half, s in halves], dim=1)
        return weight if self.balance is None else (weight / self.weight_balance).to(self.weight.dtype)

    def spread_weight_step(self) -> torch.Tensor:
        """The step size of every weight, in a shape that broadcasts to the weights."""
        return self._folded_step() if self.balance is None else self._folded_step() / self.weight_balance

    def _folded_step(self):
        rows = self.weight_step.reshape(2 if self.split else 1, -1, *[1] * (self.weight.dim() - 1))
        if self.split is None:
            return rows[0]
        widths = self.split, self.weight.shape[1] - self.split
        return torch.cat([s.expand(-1, width, *s.shape[2:]) for s, width in zip(rows, widths, strict=True)], dim=1)

    def weight_levels(self) -> torch.Tensor:
        """The integer levels of the weights: int8, shaped as the weights."""
        if self.levels is not None:
            return self.levels
        return (self.quantized_weight().detach() / self.spread_weight_step()).round().to(torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on quantized input and weights."""
        if self.cached is not None:
            return self.cached(x, now())
        if self.activation is not None:
            x = self.activation(x, now(), self.balance)
        weight = self.quantized_weight().to(x)  # a view of itself where device and dtype agree
        return (F.linear if isinstance(self, nn.Linear) else self._conv_forward)(x, weight, self.bias)

    def _apply(self, fn, recurse=True):
        own = {name: buffer for name in BUFFERS if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        self._buffers |= {name: less_dtype(fn)(buffer) for name, buffer in own.items()}
        return self


# What a layer turns into, by its class: QuantizedLinear, ..., each a QuantizedLayer and the plain class; and the way back.
QUANTIZED: dict[type[nn.Module], Any] = {
    plain: type(f"Quantized{plain.__name__}", (QuantizedLayer, plain), {"__module__": __name__})
    for plain in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
PLAIN = {quantized: plain for plain, quantized in QUANTIZED.items()}
QuantizedLinear, QuantizedConv1d, QuantizedConv2d, QuantizedConv3d = PLAIN  # pickles find them by name
BUFFERS = ("weight_step", "levels", "rounded", "balance")
ADDED = ("weight_grid", "split", "activation", "cached", *BUFFERS)


def attach(layer: nn.Module, **added: Any) -> None:
    """Make a plain layer a quantized one, in place: its class changes, its parameters, hooks and identity stay.

    ``added``: attributes of :class:`QuantizedLayer`, by name; those that are not named are ``None``.
    """
    plain = type(layer)
    layer.__class__ = QUANTIZED[plain]
    _redirect(layer, plain, QUANTIZED[plain])
    for name in ADDED:
        if name in BUFFERS and not isinstance(added.get(name), nn.Parameter):
            layer.register_buffer(name, added.get(name))
        else:
            setattr(layer, name, added.get(name))


def blank_balance(layer: Any) -> torch.Tensor:
    """Factors of 1 for the input channels of a layer, in a shape that broadcasts to the input."""
    channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
    return torch.ones(channels, *[1] * (layer.weight.dim() - 2), device=layer.weight.device)


def detach(layer: nn.Module) -> dict[str, Any]:
    """The inverse of :func:`attach`; returns what it was given, as it is by now."""
    added = {name: getattr(layer, name) for name in ADDED}
    for name in added:
        delattr(layer, name)
    quantized, plain = type(layer), PLAIN[type(layer)]
    layer.__class__ = plain
    _redirect(layer, quantized, plain)
    return added


def _redirect(layer, old, new):
    """Offloading and casting put a ``forward`` of their own on a layer, which ends in a method of its class: change that, too."""
    for holder, name in forward_slots(layer, old):
        setattr(holder, name, MethodType(new.forward, layer))


def forward_slots(layer: nn.Module, kind: type[nn.Module]) -> list[tuple[Any, str]]:
    """Where hooks of accelerate and diffusers keep the layer's own ``forward``: ``(object, attribute)``."""
    references = getattr(getattr(layer, "_diffusers_hook", None), "_fn_refs", [])
    places = [(layer, "forward"), (layer, "_old_forward"), *((fn, name) for fn in references for name in vars(fn))]
    is_method = lambda value: getattr(value, "__func__", None) is kind.forward and value.__self__ is layer  # noqa: E731
    return [(holder, name) for holder, name in places if is_method(vars(holder).get(name))]


def search_weight_step(weight: torch.Tensor, grid: Grid, per: str, split: int | None = None) -> torch.Tensor:
    """Least-error step sizes of weights ``"out in ..."``, per output ``"channel"`` or ``"tensor"``; of halves, in two rows."""
    parts = [weight.detach().float()] if split is None else _halves(weight.detach().float(), split)
    steps = [mse_step(part.flatten(1) if per == "channel" else part.reshape(1, -1), grid) for part in parts]
    return steps[0] if split is None else torch.stack(steps)
