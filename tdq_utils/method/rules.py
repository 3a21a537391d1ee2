"""Training-time quantizers: what gradient a step size gets. At evaluation all of them round to the same grid."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tdq_utils.method.grid import Grid, fake_quantize

PACT_DECAY = 1e-4  # what balances the pull of clipped values is 1e-5 to 8e-4 in the shipped model's convolutions, at 4 bits


def lsq(x: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """LSQ (Esser et al. 2020): rounding with the gradient of eq. 3, scaled by ``1 / sqrt(N q_max)``, N values a step size."""
    return fake_quantize(x, s, grid, grad_factor=(x.numel() / s.numel() * grid.q_max) ** -0.5)


def pact(x: Tensor, s: Tensor, grid: Grid, decay: float = PACT_DECAY) -> Tensor:
    """PACT (Choi et al. 2018): the end of the grid learns from the values beyond it alone; rounding is straight-through.

    They only ever widen it; what holds against them is the L2 decay of PACT's alpha, ``s q_max``: ``decay / 2 alpha**2`` is
    added to the loss, a mean over samples where each has its own step size.
    """
    if s.requires_grad and decay:
        pull = decay * grid.q_max**2 / s.numel() * s.detach()
        s.register_hook(lambda gradient: gradient + pull)
    clipped = _Clip.apply(x, s, grid)
    return clipped + (fake_quantize(x.detach(), s.detach(), grid) - clipped).detach()


def nipq(x: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """NIPQ (Shin et al. 2023): uniform noise of one step in place of rounding; its width and the truncation are learned."""
    noise = torch.rand_like(x) - 0.5
    return _Clip.apply(x, s, grid) + _spread(s, x) * noise


RULES: dict[str, Callable[..., Tensor]] = {"lsq": lsq, "pact": pact, "nipq": nipq}


def _spread(s, x):
    """Step sizes, one or one for each sample, in a shape that broadcasts to ``x``."""
    return s.reshape(()) if s.numel() == 1 else s.view(-1, *[1] * (x.dim() - 1))


class _Clip(torch.autograd.Function):
    """``x`` cut to the ends of the grid; gradients reach ``s`` from the values that were cut.

    Torch's own minimum and maximum would do; they share gradients at ties, which makes an iteration of training 1.3 to 1.5
    times as long.
    """

    @staticmethod
    def forward(ctx, x, s, grid):
        wide = _spread(s, x)
        zero = grid.zero(wide)
        clipped = torch.minimum(torch.maximum(x, (grid.q_min - zero) * wide), (grid.q_max - zero) * wide)
        ctx.save_for_backward(x, s, clipped)
        return clipped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, s, clipped = ctx.saved_tensors
        to_x = torch.where(x == clipped, grad, 0)
        from_cut = (grad - to_x).mul_(clipped)  # an end of the grid is proportional to s
        return to_x, (from_cut.sum() if s.numel() == 1 else from_cut.flatten(1).sum(1)).view(s.shape) / s, None
