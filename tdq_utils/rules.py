"""Training-time quantizers: what gradient a step size gets. At evaluation all of them round to the same grid."""

import torch

from tdq_utils.quantizers import fake_quantize


def lsq(x, s, grid):
    """LSQ (Esser et al. 2020): rounding with the gradient of eq. 3, scaled by ``1 / sqrt(N q_max)``, N values a step size."""
    return fake_quantize(x, s, grid, grad_factor=(x.numel() / s.numel() * grid.q_max) ** -0.5)


PACT_DECAY = 1e-4  # about what balances the pull of the clipped values, in the median layer of the shipped model at 4 bits


def pact(x, s, grid, decay=PACT_DECAY):
    """PACT (Choi et al. 2018): the end of the grid learns from the values beyond it alone; rounding is straight-through.

    They only ever widen it; what holds against them is the L2 decay of PACT's alpha, ``s q_max``: ``decay / 2 alpha**2`` is
    added to the loss, a mean over samples where each has its own step size.
    """
    if s.requires_grad and decay:
        pull = decay * grid.q_max**2 / s.numel() * s.detach()
        s.register_hook(lambda gradient: gradient + pull)
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
