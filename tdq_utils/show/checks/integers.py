"""Judges of the exercises on lesson 08: levels, sums and convolutions in integers, and a balance that folds away."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tdq_utils.method.grid import Grid, fake_quantize
from tdq_utils.show.checks.compare import Case, Check


def _levels(x: Tensor, s: float, zero: int) -> Tensor:
    step = torch.tensor(s)
    return (fake_quantize(x, step, Grid(8, low=-zero * s)) / step).round().add(zero).to(torch.uint8)


to_levels = Check(
    _levels,
    lambda: [dict(x=torch.tensor([0.0, 0.3, -0.25, 2.6, 40.0, -9.0]), s=s, zero=zero) for s, zero in ((0.1, 3), (0.05, 0))],
    right="one byte a value, and 0 is a level.",
    mistakes={
        "it does not cut at 0 and 255, so bytes wrap round": (
            lambda x, s, zero: ((x / s).round() + zero).remainder(256).to(torch.uint8)
        ),
        "it leaves the zero point out": lambda x, s, zero: _levels(x, s, 0),
        "it rounds down; expected to the nearest level": (
            lambda x, s, zero: ((x / s).floor() + zero).clamp(0, 255).to(torch.uint8)
        ),
        "it takes the zero point away; expected to add it": (
            lambda x, s, zero: ((x / s).round() - zero).clamp(0, 255).to(torch.uint8)
        ),
        "it cuts before it adds the zero point": (
            lambda x, s, zero: ((x / s).round().clamp(0, 255) + zero).clamp(0, 255).to(torch.uint8)
        ),
    },
)


def _bytes(*shape: int, least: int = 0, most: int = 256, seed: int = 14) -> Tensor:
    kind = torch.uint8 if least == 0 else torch.int8
    return torch.randint(least, most, shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def _dot(q: Tensor, q_w: Tensor, zero: int, s: float, s_w: float) -> float:
    return F.linear(s * (q.double() - zero), s_w * q_w.double()).item()


integer_dot = Check(
    _dot,
    lambda: [dict(q=_bytes(6), q_w=_bytes(6, least=-128, most=128), zero=zero, s=0.02, s_w=0.005) for zero in (37, 0)],
    tolerance=1e-6,
    right="one multiplication of floats for the whole sum; for another t only s and the zero point change.",
    mistakes={
        "it leaves the zero point out; take zero times the sum of q_w away": (
            lambda q, q_w, zero, s, s_w: s * s_w * (q.int() * q_w.int()).sum().item()
        ),
        "it multiplies bytes as bytes, which wrap round; turn both into 32-bit integers first": (
            lambda q, q_w, zero, s, s_w: s * s_w * ((q.to(torch.int8) * q_w).sum() - zero * q_w.int().sum()).item()
        ),
        "it takes the zero point away once; expected once for each weight, so zero times the sum of q_w": (
            lambda q, q_w, zero, s, s_w: s * s_w * ((q.int() * q_w.int()).sum().item() - zero)
        ),
        "it leaves a step size out; expected s s_w": lambda q, q_w, zero, s, s_w: _dot(q, q_w, zero, s, 1.0),
        "it returns the sum of integers; multiply it by s s_w": lambda q, q_w, zero, s, s_w: _dot(q, q_w, zero, 1.0, 1.0),
    },
)


def _conv(q: Tensor, q_w: Tensor, zero: int, s: float, s_w: Tensor) -> Tensor:
    return F.conv2d(s * (q.float() - zero), s_w.view(-1, 1, 1, 1) * q_w.float(), padding=1)


def _bordered(q: Tensor, q_w: Tensor, zero: int, s: float, s_w: Tensor) -> Tensor:
    """Where the border is padded with level 0."""
    sums = F.conv2d(F.pad(q.float(), [1] * 4) - zero, q_w.float())
    return s * s_w.view(-1, 1, 1) * sums


def _layers() -> list[Case]:
    q, q_w = _bytes(2, 3, 5, 5), _bytes(5, 3, 3, 3, least=-128, most=128)
    s_w = torch.tensor([0.01, 0.02, 0.005, 0.03, 0.015])
    return [dict(q=q, q_w=q_w, zero=zero, s=0.1, s_w=s_w) for zero in (11, 0)]


integer_conv = Check(
    _conv,
    _layers,
    right="the border holds the level of the value 0, so padding is exact.",
    mistakes={
        "it pads with level 0; the value 0 has the level zero": _bordered,
        "it leaves the zero point out": lambda q, q_w, zero, s, s_w: _conv(q, q_w, 0, s, s_w),
        "it does not pad; expected one pixel at each side": (
            lambda q, q_w, zero, s, s_w: _conv(q, q_w, zero, s, s_w)[:, :, 1:-1, 1:-1]
        ),
        "it lays s_w along the width; it has one entry for each output channel": (
            lambda q, q_w, zero, s, s_w: _conv(q, q_w, zero, s, torch.ones_like(s_w)) * s_w
        ),
        "it takes one s_w for all channels; each output channel has its own": (
            lambda q, q_w, zero, s, s_w: _conv(q, q_w, zero, s, s_w[:1].expand_as(s_w))
        ),
    },
)


def _balanced(function, x, weight, d):
    """What the layer is given, and what it then makes."""
    balanced, folded = function(x, weight, d)
    return {"input of the layer": balanced, "its output": F.conv2d(balanced, folded, padding=1)}


def _divided(x: Tensor, weight: Tensor, d: Tensor) -> Tensor:
    return x / d.view(-1, 1, 1)


def _loud() -> list[Case]:
    draw = torch.Generator().manual_seed(15)
    d = torch.tensor([0.5, 1.0, 20.0, 3.0])
    x, weight = (torch.randn(shape, generator=draw) for shape in ((2, 4, 4, 4), (4, 4, 3, 3)))
    return [dict(x=x * d.view(-1, 1, 1), weight=weight, d=d)]


fold_balance = Check(
    lambda x, weight, d: (_divided(x, weight, d), weight * d.view(1, -1, 1, 1)),
    _loud,
    right="the same output, from channels that now share one interval without harm.",
    seen=_balanced,
    gives=tuple,
    mistakes={
        "it folds d into the output channels; the input channels are axis 1 of the weights": (
            lambda x, weight, d: (_divided(x, weight, d), weight * d.view(-1, 1, 1, 1))
        ),
        "it divides the weights, too; they must take back what the input lost": (
            lambda x, weight, d: (_divided(x, weight, d), weight / d.view(1, -1, 1, 1))
        ),
        "it leaves the weights as they are, so the output changes": lambda x, weight, d: (_divided(x, weight, d), weight),
        "it lays d along the width of the input; channels are axis 1": (
            lambda x, weight, d: (x / d, weight * d.view(1, -1, 1, 1))
        ),
        "it multiplies the input and divides the weights; expected the other way round": (
            lambda x, weight, d: (x * d.view(-1, 1, 1), weight / d.view(1, -1, 1, 1))
        ),
        "it balances nothing": lambda x, weight, d: (x, weight),
    },
)
