"""Judges of the exercises on lesson 04: encode t, start at s_0, send the gradient on, freeze."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tdq_utils.method.generator import FourierFeatures, StepGenerator
from tdq_utils.method.grid import Grid, fake_quantize
from tdq_utils.show.checks.compare import Case, Check


def _features(t: Tensor, width: int) -> Tensor:
    return FourierFeatures(width)(t)


def _waves(t: Tensor, exponents: Tensor) -> Tensor:
    angles = t.float()[:, None] * 10_000**exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1)


fourier_features = Check(
    _features,
    lambda: [dict(t=torch.tensor([0, 1, 250, 999]), width=8), dict(t=torch.tensor([37]), width=4)],
    right="fast waves tell neighbours apart, slow ones early from late.",
    mistakes={
        "it puts sines first; expected cosines": lambda t, width: _features(t, width).roll(width // 2, 1),
        "it alternates cosines and sines; expected all cosines, then all sines": (
            lambda t, width: _features(t, width).view(len(t), 2, -1).transpose(1, 2).flatten(1)
        ),
        "its slowest wave has the exponent -1; expected -i / half, which ends before": (
            lambda t, width: _waves(t, -torch.linspace(0, 1, width // 2))
        ),
        "its waves get faster with i; the exponent is negative": lambda t, width: _waves(t, 2 * torch.arange(width // 2) / width),
        "it divides i by width; expected by half of it": lambda t, width: _waves(t, -torch.arange(width // 2) / width),
    },
)


def _bias(s: float) -> float:
    return StepGenerator(s, depth=1).mlp[-1].bias.item()


inverse_softplus = Check(
    _bias,
    lambda: [dict(s=s) for s in (0.5, 3.0, 1e-6, 400.0)],
    right="exact for small and for large step sizes.",
    mistakes={
        "it loses digits, or overflows: exp(s) - 1 in float32 does; use expm1, or take s out of the logarithm": (
            lambda s: torch.tensor(s).exp().sub(1).log().item()
        ),
        "it is softplus itself; expected its inverse": lambda s: F.softplus(torch.tensor(s, dtype=torch.float64)).item(),
        "it is the inverse of exp; softplus is log(1 + exp)": math.log,
    },
)


def _chain(x: Tensor, z: Tensor, bits: int) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(fake_quantize(x, F.softplus(z), Grid(bits)).sum(), z)[0]


def _to_s(x: Tensor, z: Tensor, bits: int) -> Tensor:
    return _chain(x, z, bits) / torch.sigmoid(z)


def _inputs() -> list[Case]:
    x = torch.randn(40, generator=torch.Generator().manual_seed(9))
    return [dict(x=x, z=torch.tensor(z), bits=bits) for z, bits in ((-1.5, 4), (-0.5, 3))]


generator_gradient = Check(
    _chain,
    _inputs,
    right="this is what the generator's last bias learns from, and all of its weights behind it.",
    mistakes={
        "it stops at s; go on through softplus, whose derivative is sigmoid": _to_s,
        "it multiplies by softplus(z); its derivative is sigmoid(z)": lambda x, z, bits: _to_s(x, z, bits) * F.softplus(z),
        "it averages over values; the gradient of a sum is a sum": lambda x, z, bits: _chain(x, z, bits) / x.numel(),
        "it multiplies by exp(z), the derivative of exp; that of softplus is sigmoid": (
            lambda x, z, bits: _to_s(x, z, bits) * z.exp()
        ),
        "it takes z for the step size; s is softplus(z)": lambda x, z, bits: (
            _to_s(x, torch.log(torch.expm1(z.abs())), bits) * torch.sigmoid(z)
        ),
    },
)


def _table(generator: StepGenerator, t: list[int]) -> dict[int, float]:
    return dict(zip(t, generator.on(t).tolist(), strict=True))


def _frozen(function, generator, t):
    """The table; and whether the generator is as it was before."""
    table = function(generator, t)
    return {"the table": table, "the generator is in training mode afterwards, as before": generator.training}


def _generators() -> list[Case]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        made = [StepGenerator(s, FourierFeatures(8), hidden=16, dropout=0.5) for s in (0.2, 2.0)]
    for generator in made:
        torch.nn.init.ones_(generator.mlp[-1].weight)  # so that s(t) moves
    return [dict(generator=made[0].train(), t=[999, 500, 0]), dict(generator=made[1].eval(), t=[749, 499, 249])]


freeze = Check(
    _table,
    _generators,
    right="a table: at inference the generator is gone.",
    seen=_frozen,
    mistakes={
        "it leaves dropout on; a table is made in evaluation mode": (
            lambda generator, t: dict(zip(t, generator.at(torch.tensor(t)).tolist(), strict=True))
        ),
        "it leaves the generator in evaluation mode": lambda generator, t: _table(generator.eval(), t),
        "it gives every t the same step size": lambda generator, t: dict.fromkeys(t, _table(generator, t)[t[0]]),
        "it lists t in another order; expected noise first, as given": lambda generator, t: _table(generator, sorted(t)),
        "it holds what comes before softplus": (lambda generator, t: {k: _bias(s) for k, s in _table(generator, t).items()}),
    },
)
