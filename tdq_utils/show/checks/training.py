"""Judges of the exercises on lesson 07: the loss, and what LSQ, PACT and NIPQ put in the place of rounding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdq_utils.fit.loop import noised
from tdq_utils.method.grid import Grid, fake_quantize
from tdq_utils.method.rules import lsq, nipq, pact
from tdq_utils.show.checks.compare import Case, Check


def _scheduler() -> Any:
    from diffusers import DDIMScheduler  # seconds to import

    return DDIMScheduler()


def _loss(model: Callable, x_0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    x_t, _, target = noised(_scheduler(), x_0, t, eps)
    return F.mse_loss(model(x_t, t), target)


def _model(x_t: Tensor, t: Tensor) -> Tensor:
    """Stands for a denoiser."""
    return torch.tanh(x_t) * (1 + t.view(-1, 1, 1, 1) / 500)


def _batch() -> list[Case]:
    draw = torch.Generator().manual_seed(13)
    x_0, eps = (torch.randn(3, 1, 3, 3, generator=draw) for _ in range(2))
    return [dict(model=_model, x_0=x_0, eps=eps, t=torch.tensor([20, 400, 900]), alpha_bar=_scheduler().alphas_cumprod)]


denoising_loss = Check(
    _loss,
    _batch,
    right="training descends this, through the rounding.",
    mistakes={
        "it shows the model the clean picture; expected the noisy one": lambda model, x_0, eps, t, a: F.mse_loss(
            model(x_0, t), eps
        ),
        "it compares with the picture; the model predicts the noise": (
            lambda model, x_0, eps, t, a: F.mse_loss(model(noised(_scheduler(), x_0, t, eps)[0], t), x_0)
        ),
        "it adds squares up; expected their mean": lambda model, x_0, *rest: _loss(model, x_0, *rest) * x_0.numel(),
        "it takes absolute differences; expected squared ones": (
            lambda model, x_0, eps, t, a: F.l1_loss(model(noised(_scheduler(), x_0, t, eps)[0], t), eps)
        ),
        "it takes the first t for all; each picture has its own": (
            lambda model, x_0, eps, t, a: _loss(model, x_0, eps, t[:1].expand(len(t)), a)
        ),
    },
)


def _slope(rule: Callable[..., Tensor], x: Tensor, s: Tensor, bits: int, **options: Any) -> Tensor:
    """The gradient of each value's output with respect to a step size of its own."""
    each = s.expand(len(x)).clone().requires_grad_()
    return torch.autograd.grad(rule(x[:, None], each, Grid(bits), **options).sum(), each)[0]


def _factor(n: int, q_max: int) -> float:
    """LSQ's gradient over the plain one, measured."""
    x, bits = torch.full((n,), 1000.0), q_max.bit_length() + 1  # all beyond the grid: whole numbers add up exactly
    scaled, plain = (torch.tensor(0.3, requires_grad=True) for _ in range(2))
    lsq(x, scaled, Grid(bits)).sum().backward()
    fake_quantize(x, plain, Grid(bits)).sum().backward()
    return (scaled.grad.double() / plain.grad.double()).item()  # type: ignore[union-attr]


lsq_factor = Check(
    _factor,
    lambda: [dict(n=n, q_max=q_max) for n, q_max in ((64, 7), (500, 1), (1000, 127))],
    right="a step size that many values share does not run away from the weights.",
    mistakes={
        "it lacks the root": lambda n, q_max: 1 / (n * q_max),
        "it leaves q_max out": lambda n, q_max: n**-0.5,
        "it leaves the number of values out": lambda n, q_max: q_max**-0.5,
        "it is the factor's inverse": lambda n, q_max: (n * q_max) ** 0.5,
    },
)


def _pact(x: Tensor, s: Tensor, bits: int) -> Tensor:
    return _slope(pact, x, s, bits, decay=0.0)


pact_gradient = Check(
    _pact,
    lambda: [dict(x=torch.tensor([0.3, -0.4, 1.7, 4.0, -5.0, 0.9, -2.1]), s=torch.tensor(0.5), bits=3)],
    right="only what is clipped speaks, and always for a wider grid.",
    mistakes={
        "it is LSQ's: what is rounded says nothing in PACT": lambda x, s, bits: _slope(fake_quantize, x, s, bits),
        "below the grid it gives 0; values are cut there, too": lambda x, s, bits: _pact(x, s, bits).clamp_min(0),
        "outside of the grid it gives -1 and 1; the ends are s q_min and s q_max": lambda x, s, bits: _pact(x, s, bits).sign(),
        "it counts a value as cut only where it rounds beyond the end; clipping begins at the end itself": (
            lambda x, s, bits: torch.where((x / s).round() == (x / s).round().clamp(*_ends(bits)), 0.0, _pact(x, s, bits))
        ),
        "it has a sign of its own; below the grid the gradient is q_min, negative": lambda x, s, bits: _pact(x, s, bits).abs(),
    },
)


def _ends(bits: int) -> tuple[int, int]:
    return Grid(bits).q_min, Grid(bits).q_max


def _noisy(x: Tensor, s: Tensor, bits: int, noise: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # as _noise did
        return nipq(x, s, Grid(bits))


def _noise() -> list[Case]:
    x = torch.tensor([0.3, -0.4, 1.7, 4.0, -5.0, 0.9, -2.1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [dict(x=x, s=torch.tensor(0.5), bits=3, noise=torch.rand_like(x) - 0.5)]


noisy_quantize = Check(
    _noisy,
    _noise,
    right="as wrong as rounding on average, and with a gradient everywhere.",
    mistakes={
        "its noise is as wide as 1; expected as a step, s": (
            lambda x, s, bits, noise: x.clamp(_ends(bits)[0] * s, _ends(bits)[1] * s) + noise
        ),
        "it does not cut at the ends of the grid": lambda x, s, bits, noise: x + s * noise,
        "it cuts after the noise; expected before": (
            lambda x, s, bits, noise: (x + s * noise).clamp(_ends(bits)[0] * s, _ends(bits)[1] * s)
        ),
        "it rounds; noise takes the place of rounding": (
            lambda x, s, bits, noise: s * (x / s + noise).round().clamp(*_ends(bits))
        ),
        "it cuts at q_min and q_max; the ends are s q_min and s q_max": (
            lambda x, s, bits, noise: x.clamp(*_ends(bits)) + s * noise
        ),
        "it leaves the noise out": lambda x, s, bits, noise: x.clamp(_ends(bits)[0] * s, _ends(bits)[1] * s),
    },
)
