"""Judges of the exercises on lesson 03: rounding to a grid, its two gradients, and the step of least error."""

import torch
from torch import Tensor

from tdq_utils.method.grid import Grid, mse_step, squared_error
from tdq_utils.method.grid import fake_quantize as kit_quantize
from tdq_utils.show.checks.compare import Case, Check, Wrong


def _rounded(x: Tensor, s: Tensor, bits: int) -> Tensor:
    return kit_quantize(x, s, Grid(bits))


def _ends(bits: int) -> tuple[int, int]:
    return Grid(bits).q_min, Grid(bits).q_max


def _ties() -> list[Case]:
    x = torch.tensor([0.3, 2.5, -1.5, 0.5, 9.0, -9.0, -7.8, 3.4])
    return [dict(x=x, s=torch.tensor(1.0), bits=4), dict(x=x, s=torch.tensor(0.5), bits=3)]


fake_quantize = Check(
    _rounded,
    _ties,
    right="ties go to the even level, and both ends are cut.",
    mistakes={
        "it rounds half up; expected half to even": lambda x, s, bits: s * (x / s + 0.5).floor().clamp(*_ends(bits)),
        "it rounds half away from zero; expected half to even": (
            lambda x, s, bits: s * (x.sign() * (x.abs() / s + 0.5).floor()).clamp(*_ends(bits))
        ),
        "it rounds down; expected to the nearest level": lambda x, s, bits: s * (x / s).floor().clamp(*_ends(bits)),
        "it cuts towards zero; expected the nearest level": lambda x, s, bits: s * (x / s).trunc().clamp(*_ends(bits)),
        "it does not cut at the ends of the grid": lambda x, s, bits: s * (x / s).round(),
        "it leaves out the lowest level": lambda x, s, bits: s * (x / s).round().clamp(-_ends(bits)[1], _ends(bits)[1]),
        "it returns the levels; multiply them by s": lambda x, s, bits: (x / s).round().clamp(*_ends(bits)),
        "its grid is unsigned; the symmetric one has negative levels": lambda x, s, bits: (
            s * (x / s).round().clamp(0, 2**bits - 1)
        ),
    },
)


def _value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    out = function(x)
    if not out.requires_grad:
        raise Wrong("it carries no gradient; detach the rounding error alone, not the whole result")
    return {"value": out.detach(), "gradient": torch.autograd.grad(out.sum(), x)[0]}


straight_through = Check(
    lambda x: kit_quantize(x, torch.tensor(1.0), Grid(8)),
    lambda: [dict(x=torch.tensor([0.3, 2.5, -1.7, 4.0, -0.5]))],
    right="forward it rounds, backward it is not there.",
    seen=_value_and_gradient,
    gives=Tensor,
    mistakes={
        "its gradient is that of round, which is zero": lambda x: x.round(),
        "it does not round": lambda x: x * 1.0,
        "its gradient counts twice": lambda x: 2 * x + (x.round() - 2 * x).detach(),
    },
)


def _gradient(x: Tensor, s: Tensor, bits: int) -> Tensor:
    each = s.expand(len(x)).clone().requires_grad_()  # a step size for each value, so a gradient for each value
    return torch.autograd.grad(kit_quantize(x[:, None], each, Grid(bits)).sum(), each)[0]


def _by_parts(inside, low=None, high=None):
    """A gradient by its value inside the grid, and below and above it (default: the end's level)."""

    def gradient(x, s, bits):
        u, (least, most) = x / s, _ends(bits)
        below, above = (least if low is None else low), (most if high is None else high)
        return torch.where(u.round() > most, above, torch.where(u.round() < least, below, inside(u)))

    return gradient


step_gradient = Check(
    _gradient,
    lambda: [dict(x=torch.tensor([0.3, -0.4, 1.26, 4.0, -5.0, 0.9, -2.1]), s=torch.tensor(s), bits=3) for s in (0.5, 0.8)],
    right="LSQ's gradient: what is rounded asks for a nearer level, what is cut for a wider grid.",
    mistakes={
        "inside the grid it gives round(u); expected round(u) - u": _by_parts(lambda u: u.round()),
        "inside the grid its sign is turned round; expected round(u) - u": _by_parts(lambda u: u - u.round()),
        "inside the grid it gives 0; expected round(u) - u": _by_parts(torch.zeros_like),
        "it gives round(u) - u outside of the grid, too; there it is the end's level": lambda x, s, bits: (x / s).round() - x / s,
        "outside of the grid it gives 0; expected q_min and q_max": _by_parts(lambda u: u.round() - u, 0.0, 0.0),
        "outside of the grid it gives -1 and 1; expected q_min and q_max": _by_parts(lambda u: u.round() - u, -1.0, 1.0),
    },
)


def _over_least(function, x, bits):
    """The squared error of the step that was found, over the least one; below the kit's own counts as that."""
    grid = Grid(bits)
    error = lambda s: squared_error(x[None], None, torch.as_tensor(s, dtype=x.dtype).reshape(1), grid).item()  # noqa: E731
    ratio = error(function(x, bits)) / error(mse_step(x[None], grid))
    return {"squared error over the least": 1.0 if ratio < 1 else ratio}


def _absolute(x: Tensor, bits: int) -> Tensor:
    tried = torch.linspace(0.02, 1, 200) * _widest(x, bits)
    return min(tried, key=lambda s: (_rounded(x, s, bits) - x).abs().sum().item())


def _widest(x: Tensor, bits: int) -> Tensor:
    return Grid(bits).widest_step(x.min(), x.max())


def _tailed() -> list[Case]:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(8))
    return [dict(x=scale * x.sign() * x.abs() ** 1.5, bits=bits) for scale, bits in ((1.0, 4), (0.01, 3), (30.0, 5))]


best_step = Check(
    lambda x, bits: mse_step(x[None], Grid(bits))[0],
    _tailed,
    right="within two per cent of the least error that there is.",
    seen=_over_least,
    tolerance=0.02,
    mistakes={
        "it is the step that truncates nothing; a smaller one has less error": _widest,
        "it minimizes the absolute error; expected the squared one": _absolute,
        "it spreads three standard deviations over the grid; search for the least error": (
            lambda x, bits: 3 * x.std() / Grid(bits).q_max
        ),
    },
)
