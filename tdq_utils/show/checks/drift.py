"""Judges of the exercises on lesson 02: range, drift, gain, and a percentile from a histogram."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.recording import Histogram
from tdq_utils.method.grid import squared_error
from tdq_utils.show.checks.compare import Case, Check


def _reach(x: Tensor) -> Tensor:
    return x.abs().quantile(0.999, dim=1)


def _recorded() -> list[Case]:
    draw = torch.Generator().manual_seed(6)
    return [dict(x=torch.randn(4, 3000, generator=draw) * torch.tensor([[1.0], [2], [3], [0.5]]) - 0.7)]


reach = Check(
    _reach,
    _recorded,
    right="one range for each step, and single outliers do not decide it.",
    tolerance=5e-3,  # between two neighbouring values one may interpolate or not
    mistakes={
        "it takes the largest magnitude; expected the 99.9th percentile": lambda x: x.abs().amax(1),
        "it takes the percentile of the values, not of their magnitudes": lambda x: x.quantile(0.999, dim=1),
        "it takes the 99th percentile; expected the 99.9th": lambda x: x.abs().quantile(0.99, dim=1),
        "it joins all steps; each has a range of its own": lambda x: x.abs().quantile(0.999),
        "it takes three standard deviations; expected a percentile": lambda x: 3 * x.std(1),
    },
)


def _correlation(reach: Tensor, t: Tensor) -> float:
    return torch.corrcoef(torch.stack([reach, t.float()]))[0, 1].item()


drift = Check(
    lambda reach, t: ((reach.max() / reach.min()).item(), _correlation(reach, t)),
    lambda: [dict(reach=torch.tensor([2.0, 1.0, 4.0, 7.0, 5.0]), t=torch.tensor([999, 799, 599, 399, 199]))],
    right="how far the range moves, and how steadily.",
    mistakes={
        "its ratio is that of the last step to the first; expected largest to smallest": (
            lambda reach, t: ((reach[-1] / reach[0]).item(), _correlation(reach, t))
        ),
        "its ratio is that of smallest to largest": lambda reach, t: ((reach.min() / reach.max()).item(), _correlation(reach, t)),
        "it correlates with the number of the step; t falls while that grows": (
            lambda reach, t: ((reach.max() / reach.min()).item(), -_correlation(reach, t))
        ),
        "its correlation is a covariance; divide by both standard deviations": (
            lambda reach, t: ((reach.max() / reach.min()).item(), torch.cov(torch.stack([reach, t.float()]))[0, 1].item())
        ),
    },
)


@cache
def _profile() -> Profile:
    """Two layers whose standard deviation moves over five steps: far, and hardly."""
    scales = np.array([[1.0, 1.5, 2.5, 4.0, 6.0], [1.0, 1.1, 1.0, 0.9, 1.0]])
    base = torch.randn(4000, generator=torch.Generator().manual_seed(7)).clamp(-4, 4)
    histograms = [[Histogram() for _ in row] for row in scales]
    for row, factors in zip(histograms, scales, strict=True):
        for histogram, factor in zip(row, factors, strict=True):
            histogram.add(base * factor, float(base.abs().max()) * factor)
    ends = dict(least=float(base.min()) * scales, greatest=float(base.max()) * scales, mean=0 * scales, std=scales)
    counts, limit = (np.array([[getattr(h, name) for h in row] for row in histograms]) for name in ("counts", "limit"))
    return Profile(["mover", "sitter"], np.array([999, 799, 599, 399, 199]), counts=counts, limit=limit, **ends)


def _errors(profile: Profile, layer: str, bits: int) -> tuple[Tensor, Tensor]:
    """Of each step: under the best constant, and under the best step size of its own."""
    grid, (values, counts) = profile.grid(layer, bits), profile.values(layer)
    fixed, free = (squared_error(values, counts, s.expand(len(values)), grid) for s in profile.best_steps(layer, bits))
    return fixed, free


def _decibel(profile: Profile, layer: str, bits: int) -> float:
    return float(profile.drift(bits).gain_db[profile.row(layer)])


gain_db = Check(
    _decibel,
    lambda: [dict(profile=_profile(), layer=layer, bits=bits) for layer, bits in (("mover", 4), ("sitter", 4), ("mover", 6))],
    right="the most that any interval which depends on t alone can win at this layer.",
    tolerance=2e-3,
    mistakes={
        "its sign is turned round; divide the constant's error by that of the free steps": lambda *case: -_decibel(*case),
        "it multiplies the logarithm by 20; squared errors want 10": lambda *case: 2 * _decibel(*case),
        "it takes the natural logarithm; decibels want base 10": lambda *case: _decibel(*case) * np.log(10),
        "it averages the gains of the steps; expected the ratio of the sums": (
            lambda *case: 10 * torch.log10(torch.divide(*_errors(*case))).mean().item()
        ),
    },
)


def _percentile(counts: Tensor, limit: float, q: float) -> float:
    one = dict.fromkeys(("mean", "std"), np.zeros((1, 1)))
    ends = dict(least=np.full((1, 1), -limit), greatest=np.full((1, 1), limit), limit=np.full((1, 1), limit))
    return float(Profile(["x"], np.zeros(1), counts=counts.numpy()[None, None], **one, **ends).percentile(q)[0, 0])


def _histogram() -> list[Case]:
    counts = torch.tensor([0, 6, 5, 9, 4, 9, 20, 14, 12, 30, 8, 2, 1, 1, 0, 0])
    return [dict(counts=counts, limit=limit, q=q) for limit, q in ((4.0, 50.0), (2.0, 90.0), (4.0, 99.0))]


def _unfolded(counts: Tensor, q: float) -> int:
    return int((counts.cumsum(0) / counts.sum() < q / 100).sum())


histogram_percentile = Check(
    _percentile,
    _histogram,
    right="from counts alone: no activation has to be kept.",
    mistakes={
        "it looks at positive values alone; fold the negative half onto them": (
            lambda counts, limit, q: (_unfolded(counts[len(counts) // 2 :], q) + 1) * 2 * limit / len(counts)
        ),
        "it gives the lower edge of the bin; expected the upper one": (
            lambda counts, limit, q: _percentile(counts, limit, q) - 2 * limit / len(counts)
        ),
        "it gives the middle of the bin; expected its upper edge": (
            lambda counts, limit, q: _percentile(counts, limit, q) - limit / len(counts)
        ),
        "it takes the percentile of the values; expected that of their magnitudes": (
            lambda counts, limit, q: (_unfolded(counts, q) + 1) * 2 * limit / len(counts) - limit
        ),
        "it takes all bins to lie over [0, limit]; they lie over [-limit, limit]": (
            lambda counts, limit, q: _percentile(counts, limit, q) / 2
        ),
    },
)
