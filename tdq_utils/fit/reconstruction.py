"""Learn on a calibration set: step sizes by the outputs of blocks or of the model, and how weights are rounded."""

from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import at_times, device_of
from tdq_utils.errors import TDQError, check
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.layers import QuantizedLayer
from tdq_utils.fit.quantize import activation_quantizers, checked_state, full_precision, quantized_layers, round_weights
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.step_sizes import LearnedStep, TimeSteps

TARGETS = ("block", "noise")
# The units of reconstruction, as in BRECQ (Li et al. 2021): residual blocks, attention, resampling.
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", "Downsample2D", "Upsample2D")


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """``{name: module}``: the outermost blocks that hold quantized layers; a layer outside of any is its own block."""
    units = {}
    for layer in quantized_layers(model):
        parts = layer.split(".")
        ancestors = [".".join(parts[:i]) for i in range(1, len(parts))]
        unit = next((name for name in ancestors if type(model.get_submodule(name)).__name__ in BLOCKS), layer)
        units[unit] = model.get_submodule(unit)
    return units


def refine(model: nn.Module, data: CalibrationSet, target: str = "block", iterations: int = 200, rate: float = 1e-3,
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
    loss = {"block": _block_error, "noise": _noise_error}[target]
    how = iterations, rate, batch_size, seed, progress
    try:
        return _descend(model, data, loss, list(sources.parameters()), *how, f"refine by {target}")
    finally:
        sources.eval()


def _descend(model, data, loss, parameters, iterations, rate, batch_size, seed, progress, title, before=None):
    """Adam on ``loss(model, batch)`` over ``parameters`` alone; ``before(i)`` runs first in iteration i and may add to it."""
    check("count", iterations=iterations, batch_size=batch_size)
    check("positive", rate=rate)
    if not parameters:
        raise TDQError(f"{title} needs step sizes that learn, or weights on a grid; got none. Call quantize and calibrate first.")
    losses, device = [], device_of(model)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in tqdm(range(iterations), desc=title, disable=not progress, leave=False):
            extra = before(i) if before else 0.0
            error = loss(model, data.draw(batch_size, generator, device)) + extra
            # Not backward(), which would leave gradients on the model's other parameters, or add to those that are there.
            gradients = torch.autograd.grad(error, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(error.item())
    return losses


def _noise_error(model, batch):
    x_t, t, condition = batch
    with full_precision(model), torch.no_grad():
        expected = model(x_t, t, **condition).sample
    return (model(x_t, t, **condition).sample - expected).square().mean() / expected.var()


def _block_error(model, batch):
    """Mean over blocks of the squared error of the block's output, relative to the variance of that output."""
    x_t, t, condition = batch
    units, seen = blocks(model), {}
    with full_precision(model), torch.no_grad(), _watching(model, units, seen):
        model(x_t, t, **condition)
    with at_times(TimeSteps(t, len(x_t))):  # blocks are called without the model around them
        errors = [
            (unit(*args, **kwargs) - expected).square().mean() / expected.var().clamp_min(1e-12)
            for unit, (args, kwargs, expected) in ((units[name], seen[name]) for name in seen)
        ]
    return torch.stack(errors).mean()


@contextmanager
def _watching(model, units, seen):
    """While open, the arguments and the output of each unit's call land in ``seen``."""

    def keep(name, module, args, kwargs, output):
        seen[name] = args, kwargs, output

    # A unit that is a single layer is another module while the model is in full precision.
    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True) for name in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def adaround(model: nn.Module, data: CalibrationSet, iterations: int = 400, rate: float = 1e-2, batch_size: int = 16,
             weight: float = 0.01, seed: int = 0, progress: bool = True) -> list[float]:  # fmt: skip
    """Learn whether each weight is rounded up or down, by the outputs of blocks; activations stay in full precision.

    The learned levels stay in the layers as ``levels`` (int8). Returns the loss of each iteration.

    Args:
        model: quantized, calibrated or not. data: its :class:`tdq_utils.fit.calibration_set.CalibrationSet`.
        iterations, rate, batch_size, seed: as for :func:`refine`. weight: of the penalty, in the second phase.
    """
    soft = [(layer, SoftRounding(layer)) for layer in quantized_layers(model).values() if layer.weight_grid is not None]
    activations = {layer: layer.activation for layer in quantized_layers(model).values()}
    warm, how = iterations // 5, (iterations, rate, batch_size, seed, progress)

    def before(i):
        for layer, rounding in soft:
            layer.rounded = rounding.weight(rounding.h)
        if i < warm:  # first reconstruct, then decide
            return 0.0
        beta = 2 + 18 * (1 - (i - warm) / max(1, iterations - warm))
        return weight * torch.stack([rounding.penalty(beta) for _, rounding in soft]).mean()

    try:
        for layer in activations:
            layer.activation = None
        losses = _descend(model, data, _block_error, [rounding.v for _, rounding in soft], *how, "adaround", before)
    finally:
        for layer, activation in activations.items():
            layer.activation, layer.rounded = activation, None
    for layer, rounding in soft:
        up = (rounding.h >= 0.5).float()
        layer.levels = (rounding.weight(up) / rounding.s).round().to(torch.int8).detach()
    if checked_state(model).frozen:
        round_weights(model)
    return losses
