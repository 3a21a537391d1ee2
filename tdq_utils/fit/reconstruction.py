"""Learn on a calibration set: step sizes by the outputs of blocks or of the model, and how weights are rounded."""

import re
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from tdq_utils.denoiser.call import at_times, device_of, predict, times_of
from tdq_utils.denoiser.record import Calls
from tdq_utils.errors import TDQError, check
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.layers import QuantizedLayer
from tdq_utils.fit.loop import descend
from tdq_utils.fit.quantize import activation_quantizers, checked_state, full_precision, quantized_layers, round_weights
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.step_sizes import LearnedStep

# The units of reconstruction, as in BRECQ (Li et al. 2021): residual and transformer blocks, attention, resampling.
BLOCKS = re.compile(r"(TransformerBlock|Attention)$|^(ResnetBlock2D|Downsample2D|Upsample2D)$")


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """``{name: module}``: the outermost blocks that hold quantized layers; a layer outside of any is its own block."""
    units = {}
    for layer in quantized_layers(model):
        ancestors = [layer[:i] for i, letter in enumerate(layer) if letter == "."]
        unit = next((name for name in ancestors if BLOCKS.search(type(model.get_submodule(name)).__name__)), layer)
        units[unit] = model.get_submodule(unit)
    return units


def refine(model: nn.Module, data: CalibrationSet | Calls, target: str = "block", iterations: int = 200, rate: float = 1e-3,
           batch_size: int = 16, seed: int = 0, progress: bool = True) -> list[float]:  # fmt: skip
    """Descend the error of outputs instead of inputs: go on with the step sizes that "learned" or "tdq" chose.

    All step sizes learn together, by LSQ's gradient, from random samples of the set at mixed t. Returns the losses.

    Args:
        model: calibrated by "learned" or "tdq". data: its :class:`tdq_utils.fit.calibration_set.CalibrationSet`.
        target: ``"block"``: every block gets the full-precision input and should give the full-precision output, in
            parallel, each relative to the variance of its output (as BRECQ, without its order); ``"noise"``: the
            model should predict the full-precision noise.
        iterations: of Adam with a cosine rate from ``rate``. batch_size: samples an iteration, drawn, as dropout, by ``seed``.
    """
    steps = [quantizer.step for quantizer in activation_quantizers(model).values()]
    sources = nn.ModuleList(step for step in steps if isinstance(step, (LearnedStep, StepGenerator)))
    sources.train().requires_grad_()
    loss, how = partial(TARGETS[target], model), (iterations, rate, batch_size, seed, progress)
    try:
        return _learn(model, data, lambda batch, i: loss(batch), list(sources.parameters()), f"refine by {target}", *how)
    finally:
        sources.eval()


def _learn(model, data, loss, parameters, title, iterations, rate, batch_size, seed, progress):
    """Descend ``loss(batch, i)`` over ``parameters``, on random batches of ``data``."""
    check("count", iterations=iterations, batch_size=batch_size)
    check("positive", rate=rate)
    if not parameters:
        raise TDQError(f"{title} needs step sizes that learn, or weights on a grid; got none. Call quantize and calibrate first.")
    device, generator = device_of(model), torch.Generator().manual_seed(seed)
    loss_of = lambda i: loss(data.draw(batch_size, generator, device), i)  # noqa: E731
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return descend(loss_of, parameters, iterations, rate, title, progress)


def _noise_error(model, batch):
    with full_precision(model), torch.no_grad():
        expected = predict(model, *batch)
    return (predict(model, *batch) - expected).square().mean() / expected.var()


def _block_error(model, batch):
    """Mean over blocks of the squared error of the block's output, relative to the variance of that output."""
    units, seen = blocks(model), {}

    def keep(name, module, args, kwargs, output):
        seen[name] = args, kwargs, output

    with full_precision(model), torch.no_grad(), ExitStack() as hooks:
        for name in units:  # a unit that is a single layer is another module while the model is in full precision
            handle = model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True)
            hooks.callback(handle.remove)
        predict(model, *batch)
    with at_times(times_of(batch[1], len(batch[0]))):  # blocks are called without the model around them
        pairs = [
            pair
            for name, (args, kwargs, expected) in seen.items()
            for pair in zip(_tensors(units[name](*args, **kwargs)), _tensors(expected), strict=True)
        ]
        errors = [(got - expected).square().mean() / expected.var().clamp_min(1e-12) for got, expected in pairs]
    return torch.stack(errors).mean()


def _tensors(output):
    """The tensors of a block's output: some give text and image tokens."""
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if isinstance(part, torch.Tensor)]


TARGETS = {"block": _block_error, "noise": _noise_error}


class SoftRounding(nn.Module):
    """AdaRound's relaxed rounding of one layer's weights (Nagel et al. 2020, eq. 16-24).

    ``w = s * clip(floor(w / s) + h(V))`` with ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)``; V starts where h is the
    fraction that rounding drops, so that the soft weights start as the weights themselves.
    """

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.grid: Any = layer.weight_grid
        self.s = layer.spread_weight_step().detach()
        scaled = layer.weight.detach() / self.s
        self.floor = scaled.floor()
        fraction = (scaled - self.floor).clamp(1e-4, 1 - 1e-4)
        self.v = nn.Parameter(-torch.log(1.2 / (fraction + 0.1) - 1))

    @property
    def h(self) -> torch.Tensor:
        """Share of a step that is rounded up, 0..1, like the weights."""
        return (1.2 * self.v.sigmoid() - 0.1).clamp(0, 1)

    def weight(self, up: torch.Tensor) -> torch.Tensor:
        """The weights, with ``up`` (0..1) added to the levels below."""
        return self.s * (self.floor + up).clamp(self.grid.q_min, self.grid.q_max)

    def penalty(self, beta: float) -> torch.Tensor:
        """Mean distance of h from a decision: near 1 at 0.5 and 0 at both ends; sharper with smaller ``beta``."""
        return (1 - (2 * self.h - 1).abs().pow(beta)).mean()


def sharpness(i: int, iterations: int) -> float | None:
    """``beta`` of the penalty at iteration ``i``, from 20 to 2; ``None`` in the first fifth: first reconstruct, then decide."""
    warm = iterations // 5
    return None if i < warm else 2 + 18 * (1 - (i - warm) / max(1, iterations - warm))


def adaround(model: nn.Module, data: CalibrationSet | Calls, iterations: int = 400, rate: float = 1e-2, batch_size: int = 16,
             weight: float = 0.01, seed: int = 0, progress: bool = True) -> list[float]:  # fmt: skip
    """Learn whether each weight is rounded up or down, by the outputs of blocks; activations stay in full precision.

    The learned levels stay in the layers as ``levels`` (int8). Returns the loss of each iteration. Arguments as for
    :func:`refine`; ``model``: calibrated or not; ``weight``: of the penalty, in the last four fifths of the iterations.
    """
    learned = {name: layer for name, layer in quantized_layers(model).items() if name not in checked_state(model).temporal}
    soft = [(layer, SoftRounding(layer)) for layer in learned.values() if layer.weight_grid is not None]
    activations = {layer: layer.activation for layer in quantized_layers(model).values()}

    def loss(batch, i):
        for layer, rounding in soft:
            layer.rounded = rounding.weight(rounding.h)
        error = _block_error(model, batch)
        if (beta := sharpness(i, iterations)) is None:
            return error
        return error + weight * torch.stack([rounding.penalty(beta) for _, rounding in soft]).mean()

    try:
        for layer in activations:
            layer.activation = None
        parameters, how = [rounding.v for _, rounding in soft], (iterations, rate, batch_size, seed, progress)
        losses = _learn(model, data, loss, parameters, "adaround", *how)
    finally:
        for layer, activation in activations.items():
            layer.activation, layer.rounded = activation, None
    for layer, rounding in soft:
        up = (rounding.h >= 0.5).float()
        layer.levels = (rounding.weight(up) / rounding.s).round().to(torch.int8).detach()
    if checked_state(model).frozen:
        round_weights(model)
    return losses
