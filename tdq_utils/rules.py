"""Training-time quantizers: what gradient a step size gets. At evaluation all of them round to the same grid."""

import torch

from tdq_utils.quantizers import fake_quantize


def lsq(x, s, grid):
    """LSQ (Esser et al. 2020): rounding with the gradient of eq. 3, scaled by ``1 / sqrt(N q_max)``, N values a step size."""
    return fake_quantize(x, s, grid, grad_factor=(x.numel() / s.numel() * grid.q_max) ** -0.5)


def pact(x, s, grid):
    """PACT (Choi et al. 2018): the end of the grid learns from the values beyond it alone; rounding is straight-through.

    PACT's alpha is ``s q_max``. Its L2 decay belongs to the optimizer.
    """
    clipped = _clip(x, s, grid)
    return clipped + (fake_quantize(x.detach(), s.detach(), grid) - clipped).detach()


def nipq(x, s, grid):
    """NIPQ (Shin et al. 2023): uniform noise of one step in place of rounding; its width and the truncation are learned."""
    noise = torch.rand_like(x) - 0.5
    return _clip(x, s, grid) + _spread(s, x) * noise


RULES = {"lsq": lsq, "pact": pact, "nipq": nipq}


def _spread(s, x):
    """Step sizes, one or one for each sample, in a shape that broadcasts to ``x``."""
    return s if s.numel() == 1 else s.view(-1, *[1] * (x.dim() - 1))


def _clip(x, s, grid):
    """``x`` cut to the ends of the grid; gradients reach ``s`` from the values that were cut."""
    zero, s = _spread(grid.zero(s), x), _spread(s, x)
    return torch.minimum(torch.maximum(x, (grid.q_min - zero) * s), (grid.q_max - zero) * s)
