"""The number format, fake quantization with its gradients, and the step size of least error."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdq_utils.errors import TDQError

SILU_MIN = -0.2785  # the minimum of x * sigmoid(x), at x = -1.278
CACHE = 2**17  # values that the search for a step size looks at together, a thread


@dataclass(frozen=True)
class Grid:
    """A uniform integer grid (the number format), without its step size.

    Symmetric: ``x_hat = s * clip(round(x / s), q_min, q_max)`` with q from -2^(b-1) to 2^(b-1) - 1.
    Shifted (``low < 0``) or unsigned (``low = 0``): all 2^b levels lie above ``low``, the least value
    of the input, as after SiLU. The shift is rounded to whole steps, so that 0 stays a level: zero
    padding is then exact and integer kernels can run the same grid.

    Args:
        bits: 2 to 8. low: least value of the input, <= 0; ``None`` for the symmetric grid. TDQError: out of these ranges.
    """

    bits: int
    low: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Integral) or not 2 <= self.bits <= 8:
            raise TDQError(f"bits must be a whole number from 2 to 8; got {self.bits!r}.")
        if self.low is not None and not (isinstance(self.low, Real) and -math.inf < self.low <= 0):
            raise TDQError(f"low must be None (symmetric) or a finite number <= 0; got {self.low!r}.")

    @property
    def q_min(self) -> int:
        """Least integer level."""
        return -(2 ** (self.bits - 1)) if self.low is None else 0

    @property
    def q_max(self) -> int:
        """Greatest integer level."""
        return 2 ** (self.bits - 1) - 1 if self.low is None else 2**self.bits - 1

    def zero(self, s: torch.Tensor) -> torch.Tensor:
        """Level that stands for 0 at step size ``s``: ``round(-low / s)``; same shape as ``s``."""
        if not self.low:
            return torch.zeros_like(s)
        return (-self.low / s.detach()).round().clamp(max=self.q_max)

    def widest_step(self, least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
        """Smallest step size that truncates nothing in [least, greatest] (min-max calibration)."""
        if self.low is None:
            return torch.maximum(-least / -self.q_min, greatest / self.q_max)
        return (greatest - self.low) / self.q_max

    @staticmethod
    def for_range(bits: int, least: float, greatest: float = math.inf) -> "Grid":
        """The grid for an input recorded in [least, greatest]: shifted if nothing lies below SiLU's
        minimum and the rest reaches at least twice as far up (so outputs of SiLU, GELU and ReLU), else
        symmetric. A small input of both signs is none of these: a shift larger than it would waste the levels."""
        if least < SILU_MIN - 1e-3 or (least < 0 and greatest < -2 * SILU_MIN):
            return Grid(bits)
        return Grid(bits, low=SILU_MIN if least < 0 else 0.0)


def fake_quantize(x: torch.Tensor, s: torch.Tensor, grid: Grid, grad_factor: float = 1.0) -> torch.Tensor:
    """Round ``x`` to ``grid`` with step size ``s`` and return floats: simulated quantization.

    Gradients follow LSQ (Esser et al. 2020, eq. 3): to ``s``, ``round(x/s) - x/s`` inside the grid and
    the (zero-corrected) end level outside; to ``x``, 1 inside and 0 outside (straight-through).

    Args:
        x: tensor of any shape; half precision is rounded in float32 and returned as it came.
        s: positive step size: one value, or one for each entry of the first axis of ``x``
            (samples of a batch for activations, output channels for weights).
        grad_factor: multiplies the gradient of ``s`` (LSQ: ``1 / sqrt(x.numel() * q_max)``).

    TDQError: ``x`` is not floating-point, or ``s`` has another number of entries. (Their values are not looked at: on a GPU
    that would wait for them.)
    """
    if not x.is_floating_point() or (s.numel() != 1 and s.numel() != len(x)):
        raise TDQError(f"fake_quantize takes floats, and one step size or one for each entry of the first axis; got x {x.dtype} "
                       f"{tuple(x.shape)} and s {tuple(s.shape)}. Convert x, or pass as many.")  # fmt: skip
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if torch.is_grad_enabled() and (x.requires_grad or s.requires_grad):
        return _LSQ.apply(wide, s, grid, grad_factor).to(x.dtype)
    return _rounded(wide, s, grid).to(x.dtype)


class _LSQ(torch.autograd.Function):
    """Torch's fused learnable operators, with a forward pass of the same bits that is vectorized on CPUs."""

    @staticmethod
    def forward(ctx, x, s, grid, grad_factor):
        ctx.save_for_backward(x, s)
        ctx.grid, ctx.grad_factor = grid, grad_factor
        return _rounded(x, s, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, s = ctx.saved_tensors
        zero, end = ctx.grid.zero(s).to(x.dtype), (ctx.grid.q_min, ctx.grid.q_max, ctx.grad_factor)
        if s.numel() == 1:
            op = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
            to_x, to_s, _ = op(grad, x, s.reshape(1), zero.reshape(1), *end)
        else:
            op = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward
            to_x, to_s, _ = op(grad, x, s, zero, 0, *end)
        return to_x, to_s.view(s.shape), None, None


def _rounded(x, s, grid):
    zero = grid.zero(s) if grid.low else None
    if s.numel() > 1:
        s, zero = (None if v is None else v.view(-1, *[1] * (x.dim() - 1)) for v in (s, zero))
    if zero is None:
        return x.mul(1.0 / s).round_().clamp_(grid.q_min, grid.q_max).mul_(s)
    return on_levels(x, s, grid.q_min - zero, grid.q_max - zero)


def on_levels(x: torch.Tensor, s: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """``s * clip(round(x / s), least, greatest)``, with levels counted from the value 0; all broadcast to ``x``."""
    q = x.mul(1.0 / s).round_()
    return torch.minimum(torch.maximum(q, least, out=q), greatest, out=q).mul_(s)


def squared_error(values: Tensor, counts: Tensor | None, s: Tensor, grid: Grid) -> Tensor:
    """Squared quantization error ``"..."``, summed over values ``"... value"`` weighted with ``counts``, same shape or ``None``.

    Differentiable in the step sizes ``s``, ``"..."``, where it is continuous: the derivative is that at fixed levels.
    TDQError: other shapes.
    """
    _check_counts(values, counts)
    if s.numel() != math.prod(values.shape[:-1]):
        raise TDQError(f"s must hold a step size for each row of values, {tuple(values.shape[:-1])}; got {tuple(s.shape)}.")
    x, s = values.reshape(-1, values.shape[-1]), s.reshape(-1, 1)
    levels = fake_quantize(x, s.detach()[:, 0], grid) / s.detach()
    error = (s * levels - x).square()
    error = error if counts is None else error * counts.reshape(x.shape)
    return error.sum(-1).view(values.shape[:-1])


@torch.no_grad()
def mse_step(values: Tensor, grid: Grid, counts: Tensor | None = None) -> Tensor:
    """The positive step sizes ``"..."`` that minimize the squared quantization error: a grid search, and a finer one.

    Values ``"... value"`` are weighted with ``counts``, or alike; the search is independent for every leading index.
    TDQError: no values, NaN or infinity among them, or counts of another shape.
    """
    _check_counts(values, counts)
    if not values.numel() or not torch.isfinite(values).all():
        got = "NaN or infinity" if values.numel() else f"none, {tuple(values.shape)}"
        raise TDQError(f"A step size is searched for finite values, one or more; got {got}. Leave out what is broken.")
    x = values.reshape(-1, values.shape[-1])
    # As many rows at a time as fit a cache. Torch adds up a single row, and rows that do not lie one after the other, in an
    # order that depends on their number: no part is one row of several, and other layouts stay whole. So no bit changes.
    room = CACHE * torch.get_num_threads() if x.is_cpu else x.numel()
    parts = max(1, len(x) // max(2, room // x.shape[1])) if x.is_contiguous() else 1
    weights = [None] * parts if counts is None else counts.reshape(x.shape).tensor_split(parts)
    found = [_search(*part, grid) for part in zip(x.tensor_split(parts), weights, strict=True)]
    return torch.cat(found).view(values.shape[:-1])


def _check_counts(values, counts):
    if counts is not None and counts.numel() != values.numel():
        raise TDQError(f"counts must have the shape of values, {tuple(values.shape)}; got {tuple(counts.shape)}.")


def _search(x, counts, grid):
    def summed(x_hat):  # the bits of squared_error, in the place of x_hat
        error = x_hat.sub_(x).square_()
        return (error if counts is None else error.mul_(counts)).sum(-1)

    present = x if counts is None else torch.where(counts > 0, x, 0)
    best = grid.widest_step(present.amin(-1), present.amax(-1)).clamp_min(1e-8)
    ratios, low = torch.logspace(-1.7, 0, 48, dtype=x.dtype), grid.low or 0.0
    for _ in range(2):
        found, least = best, torch.full_like(best, torch.inf)
        for ratio in ratios.flip(0):  # from the largest down; of equal errors the smallest step counts
            s = best * ratio
            error = summed(_rounded(x, s, grid).div_(s[:, None]).mul_(s[:, None]))
            found, least = torch.where(error > least, found, s), torch.minimum(error, least)
            if (error > 1.2 * least).all():  # is what lies beyond the grid, which grows as s falls, alone too much?
                ends = (grid.q_min - 0.5) * s + low, ((grid.q_max + 0.5) * s + low).clamp_min(0)
                if (summed(x.clamp(*(end[:, None] for end in ends))) > 1.001 * least).all():  # a margin far beyond rounding
                    break
        best = found
        spread = (ratios[-1] / ratios[-2]).log10().item()
        ratios = torch.logspace(-spread, spread, 25, dtype=x.dtype)  # an odd number: the best so far is tried again
    return best
