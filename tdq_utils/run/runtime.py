"""A calibrated model ready to run: the intervals of all layers in one table, one row of it looked up by t at each call."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tdq_utils.denoiser.call import time_argument
from tdq_utils.denoiser.sampling import timesteps
from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import QuantizedLayer, SplitQuantizer
from tdq_utils.fit.quantize import activation_quantizers, checked_state, quantized_layers
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.grid import on_levels
from tdq_utils.method.step_sizes import DynamicStep, TableStep, TimeSteps, nearest


class Compiled(nn.Module):
    """A model through ``torch.compile`` (``compiled=False``: not, to compare), sampled like ``net`` itself, which is changed."""

    def __init__(self, net: Any, compiled: bool = True):
        super().__init__()
        self.net, self.config, self.compiled = net, net.config, compiled
        self.train(net.training)
        if compiled:
            for layer in net.modules():
                if type(layer) is nn.GroupNorm:
                    layer.__class__ = ChannelwiseGroupNorm
            net.compile()

    def forward(self, sample: torch.Tensor, timestep: Any, **condition: Any) -> Any:
        """The model's output."""
        timestep = torch.as_tensor(timestep, device=sample.device)  # a number would be compiled into the graph
        if self.compiled and sample.dim() == 4:  # every new stride is compiled anew, and one channel has strides of two formats
            sample = sample.clone(memory_format=torch.channels_last)
        return self.net(sample, **{time_argument(self.net): timestep}, **condition)


class ChannelwiseGroupNorm(nn.GroupNorm):
    """A group norm that reduces each channel before it joins those of a group: the same but for last bits."""

    # Groups of three channels defeat torch's compiler: two such norms took a quarter of the shipped model's time in integers.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized, scaled and shifted, shaped as ``x``."""
        var, mean = torch.var_mean(x, dim=tuple(range(2, x.dim())), correction=0)
        means = mean.view(len(x), self.num_groups, -1)
        between, mean = torch.var_mean(means, dim=2, correction=0, keepdim=True)
        var = var.view_as(means).mean(2, keepdim=True) + between
        scale = (self.weight.view(self.num_groups, -1) * (var + self.eps).rsqrt()).flatten(1)
        shift = self.bias - (mean * scale.view_as(means)).flatten(1)
        wide = (*x.shape[:2], *[1] * (x.dim() - 2))
        return x * scale.view(wide) + shift.view(wide)


class Runner(Compiled):
    """A copy of a calibrated model, frozen, whose layers read their intervals from one row of one tensor.

    The row is copied into place once a call, by the value of t: the whole cost of an interval that depends on time.
    No layer knows t or its bits, so that one compiled graph serves every step, and every setting of equal structure.

    Args:
        model: calibrated, frozen or not; left as it is. TDQError: it is neither, or calibrated per step at other steps.
        scheduler, steps: what the runner can be sampled with; default: what the model was frozen for.
        compiled: run through ``torch.compile`` (most of a minute at the first call, less time at every other).

    ``table``: ``"t value quantizer"`` (:func:`interval_table`). ``now``: its row, ``"value quantizer"``. ``net``: the copy.
    ``features``: ``"t feature"``, all that is cached (:mod:`tdq_utils.fit.temporal_cache`); ``found``: its row.
    """

    table: torch.Tensor
    now: torch.Tensor
    features: torch.Tensor
    found: torch.Tensor

    def __init__(self, model: nn.Module, scheduler: Any = None, steps: int | None = None, compiled: bool = True):
        visited = _frozen_for(model) if scheduler is None else timesteps(scheduler, steps, model)
        table = interval_table(model, visited)
        features = feature_table(model, visited)
        super().__init__(_copy(model, now := table[0].clone(), found := features[0].clone(), self.make_layer), compiled)
        self.rows = {float(t): row for row, t in enumerate(visited)}
        self.register_buffer("table", table)
        self.register_buffer("now", now)
        self.register_buffer("features", features)
        self.register_buffer("found", found)
        self.moves = _moves(table)

    @staticmethod
    def make_layer(name: str, layer: QuantizedLayer, activation: nn.Module | None) -> nn.Module:
        """The layer to run in place of a quantized one, which is a copy: here itself, with ``activation`` for its quantizer."""
        layer.rounded, layer.activation = layer.quantized_weight().detach().clone(), activation
        return layer

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Take over the weights and intervals of another calibrated model of equal structure, without compiling again."""
        self.table.copy_(interval_table(model, list(self.rows)))
        self.now.copy_(self.table[0])
        self.features.copy_(feature_table(model, list(self.rows)))
        self.moves, layers = _moves(self.table), quantized_layers(model)
        for name, layer in layers.items():
            if layer.cached is None:
                self.load_layer(self.net.get_submodule(name), layer)
        mine, inside = self.net.state_dict(), tuple(f"{name}." for name in layers)
        for name, value in model.state_dict().items():  # norms and all that stays in full precision: training moves them, too
            if not name.startswith(inside):
                mine[name].copy_(value)

    @staticmethod
    def load_layer(mine: Any, layer: QuantizedLayer) -> None:
        """Give ``mine``, which :meth:`make_layer` made, the weights of another quantized layer."""
        mine.rounded.copy_(layer.quantized_weight())
        mine.balance = None if layer.balance is None else layer.balance.detach().clone()
        if layer.bias is not None:
            mine.bias.copy_(layer.bias)

    def forward(self, sample: torch.Tensor, timestep: Any, **condition: Any) -> Any:
        """The model's output. TDQError: several t in a batch, or a t that is not in the table."""
        if self.moves:
            self.now.copy_(self.row(torch.as_tensor(timestep)))
        if len(self.found):
            self.found.copy_(self.features[self.place(torch.as_tensor(timestep))])
        return super().forward(sample, timestep, **condition)

    def row(self, timestep: torch.Tensor) -> torch.Tensor:
        """The row of the table, ``"value quantizer"``, of a call's time steps."""
        return self.table[self.place(timestep)]

    def place(self, timestep: torch.Tensor) -> int:
        """The number of that row. TDQError: several t in a batch, or a t that is not in the table."""
        return self.rows[one_time(timestep, sorted(self.rows))]


def one_time(timestep: torch.Tensor, known: list[float]) -> float:
    """What a call's time steps are among the ``known``, ascending (none: any). TDQError: several, or not known."""
    t, *others = TimeSteps(timestep, timestep.numel()).values
    if others:
        raise TDQError(f"This model takes one t a call; got {t:g} and {others[0]:g}. Call it for each, or the frozen model once.")
    return known[nearest(known, t)] if known else t


def bits_on_grid(model: nn.Module) -> tuple[int, int]:
    """Bits of weights and activations of a quantized model. TDQError: it is none, or either is in full precision."""
    weights, activations = (state := checked_state(model)).weights, state.activations
    if weights is None or activations is None:
        raise TDQError(f"Integers need weights and activations on a grid; got W{weights}A{activations}. Quantize both.")
    return weights, activations


def _moves(table):
    """Whether any interval depends on t; if none does, nothing is looked up."""
    return not torch.equal(table, table[:1].expand_as(table))


def _frozen_for(model):
    """The time steps that a frozen model's tables hold; of one without tables any will do, and 0 stands for them."""
    steps = [quantizer.step for quantizer in activation_quantizers(model).values()]
    if any(isinstance(step, StepGenerator) for step in steps):
        raise TDQError("A runner must know its time steps; this model is not frozen. Pass scheduler and steps, or freeze it.")
    tables = [*steps, *(layer.cached for layer in quantized_layers(model).values())]
    return next((table.t.tolist() for table in tables if isinstance(table, TableStep)), [0])


def interval_table(model: nn.Module, visited: Sequence[float]) -> torch.Tensor:
    """What every activation quantizer of a calibrated model needs at the time steps ``visited``: ``"t value quantizer"`` float32.

    The values: step size (of input-dependent intervals: 1), least and greatest level, counted from 0 (``x_hat = s *
    clip(round(x / s), least, greatest)``). TDQError: the model is not calibrated, or calibrated per step at other steps.
    """
    columns = [_column(quantizer, visited) for quantizer in activation_quantizers(model).values()]
    return torch.stack(columns, dim=2) if columns else torch.zeros(len(visited), 3, 0)


def _column(quantizer, visited):
    if isinstance(quantizer.step, DynamicStep):
        half = 2.0 ** (quantizer.bits - 1)
        return torch.tensor([1.0, -half, half - 1]).expand(len(visited), 3)
    if quantizer.step is None:
        raise TDQError("A runner takes a calibrated model; call calibrate(model, scheduler, ...) first.")
    return quantizer.step.interval_on(visited, quantizer.grid)


def feature_table(model: nn.Module, visited: Sequence[float]) -> torch.Tensor:
    """``"t feature"``: what the cached layers of a model put out at ``visited``, side by side. TDQError: a t is missing."""
    tables = [layer.cached.at(visited) for layer in quantized_layers(model).values() if layer.cached is not None]
    return torch.cat(tables, dim=1) if tables else torch.zeros(len(visited), 0)


class CachedRow(nn.Module):
    """What is in the places ``part`` of ``found``, ``"feature"``, for each row of the input."""

    def __init__(self, found: torch.Tensor, part: slice):
        super().__init__()
        self.found, self.part = found, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``"batch ... width"`` for an input ``"batch ... in"``, whose values do not matter."""
        return self.found[self.part].to(x.dtype).expand(*x.shape[:-1], -1)


class RowQuantizer(nn.Module):
    """Fake-quantizes with the interval in ``column`` of ``now``, ``"value quantizer"``, or that ``step`` finds for the input."""

    def __init__(self, now: torch.Tensor, column: int, step: DynamicStep | None = None):
        super().__init__()
        self.now, self.column, self.step = now, column, step

    def interval(self, x: torch.Tensor, balanced: bool = False) -> tuple[torch.Tensor, ...]:
        """Step size, least and greatest level, counted from the value 0; they broadcast to ``x``."""
        s, least, greatest = self.now[:, self.column].unbind()
        return (s, least, greatest) if self.step is None else self.step.interval(x, least, greatest, balanced)

    def forward(self, x: torch.Tensor, t: TimeSteps | None = None, balance: torch.Tensor | None = None) -> torch.Tensor:
        """Levels times step size, and times the balance that the input is divided by first; shaped as ``x``."""
        if balance is not None:
            x = x * (1 / balance)
            return on_levels(x, *self.interval(x, True)) * balance
        return on_levels(x, *self.interval(x, False))

    def levels(self, x: torch.Tensor, inverse: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """``(q, s, zero)``: levels of ``x * inverse``, from 0, uint8; step size; level of the value 0, int32. ``inverse``: of the
        balance."""
        x = x if inverse is None else x * inverse
        s, least, greatest = self.interval(x, inverse is not None)
        q = torch.clamp(torch.round(x * (1.0 / s)), least, greatest) - least
        return q.to(torch.uint8), s, (-least).to(torch.int32)


def _copy(model, now, found, make_layer):
    """A copy of the model that is not quantized, with layers made by ``make_layer`` whose quantizers read ``now``, or cached."""
    net, dynamic = copy.deepcopy(model), lambda step: step if isinstance(step, DynamicStep) else None
    readers = {q: RowQuantizer(now, column, dynamic(q.step)) for column, q in enumerate(activation_quantizers(net).values())}
    start = 0
    for name, layer in quantized_layers(net).items():
        if layer.cached is not None:
            width = len(layer.weight)
            net.set_submodule(name, CachedRow(found, slice(start, start + width)))
            start += width
            continue
        activation = readers.get(layer.activation)
        if isinstance(layer.activation, SplitQuantizer):
            activation = SplitQuantizer(layer.activation.at, [readers[half] for half in layer.activation.halves])
        net.set_submodule(name, make_layer(name, layer, activation))
    for handle in net.quantization.handles:
        handle.remove()
    del net.quantization
    return net
