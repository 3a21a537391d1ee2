"""Judges of the exercises on lesson 00: levels, the widest interval, distance in pixels."""

from typing import Any

import torch

from tdq_utils.method.grid import Grid
from tdq_utils.show.checks.compare import Case, Check


def _levels(bits: int) -> tuple[int, int]:
    return Grid(bits).q_min, Grid(bits).q_max


levels = Check(
    _levels,
    lambda: [dict(bits=bits) for bits in (8, 5, 2)],
    right="one level more below zero than above, 2^bits in all.",
    mistakes={
        "it leaves out the lowest level; b bits hold 2^b levels": lambda bits: (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1),
        "it has no negative levels": lambda bits: (0, 2**bits - 1),
        "it has a level too many above zero": lambda bits: (-(2 ** (bits - 1)), 2 ** (bits - 1)),
        "it has twice as many levels as these bits hold": lambda bits: (-(2**bits), 2**bits - 1),
    },
)


def _minmax(x: torch.Tensor, bits: int) -> torch.Tensor:
    return Grid(bits).widest_step(x.min(), x.max())


def _values() -> list[Case]:
    x = torch.randn(200, generator=torch.Generator().manual_seed(3))
    return [dict(x=torch.cat([x, torch.tensor([far])]), bits=bits) for far, bits in ((6.0, 5), (-6.0, 3), (9.0, 8))]


minmax_step = Check(
    _minmax,
    _values,
    right="nothing is truncated, and no smaller step does that.",
    mistakes={
        "it looks at the greatest value alone; the least one may reach further": lambda x, bits: x.max() / Grid(bits).q_max,
        "it divides by q_max at both ends; below zero there is one level more": lambda x, bits: x.abs().max() / Grid(bits).q_max,
        "it divides by the levels below zero at both ends; above zero there is one fewer": (
            lambda x, bits: x.abs().max() / -Grid(bits).q_min
        ),
        "it spreads the levels from least to greatest; on the symmetric grid 0 is in the middle": (
            lambda x, bits: (x.max() - x.min()) / (2**bits - 1)
        ),
    },
)


def _paired(images: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    from tdq_utils.lab.fid import paired_mse  # brings torchmetrics

    return paired_mse(images, clean)


def _pictures() -> list[Case]:
    draw: Any = torch.Generator().manual_seed(4)
    return [{name: torch.randn(3, 1, 4, 4, generator=draw) for name in ("images", "clean")}]


pixel_distance = Check(
    _paired,
    _pictures,
    right="one distance for each picture, of what a screen would show.",
    mistakes={
        "it does not cut pixels to [-1, 1] first": lambda images, clean: (images - clean).square().flatten(1).mean(1),
        "it cuts the difference, not the pictures": lambda images, clean: (images - clean).clamp(-1, 1).square().mean((1, 2, 3)),
        "it takes a root; the distance is a mean of squares": lambda images, clean: _paired(images, clean).sqrt(),
        "it adds squares up; the distance is their mean": lambda images, clean: _paired(images, clean) * clean[0].numel(),
        "it averages over all pictures; each has a distance of its own": lambda images, clean: _paired(images, clean).mean(),
    },
)
