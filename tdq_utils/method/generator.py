"""Temporal Dynamic Quantization: a small network that predicts the step size from t alone."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tdq_utils.errors import TDQError, check, checked_whole
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import StepSize, TimeSteps


class FourierFeatures(nn.Module):
    """Geometric Fourier features of the time step, ``[cos(t w_i), sin(t w_i)]``, ``w_i = 10000^(-i / half)``.

    An MLP on raw t barely varies with t (low-frequency bias); these features give it every scale. ``width`` of them, even.
    """

    w: torch.Tensor

    def __init__(self, width: int = 128):
        super().__init__()
        if checked_whole("width", width, 2, 2**16) % 2:
            raise TDQError(f"width must be even and at least 2; got {width}.")
        half = width // 2
        self.register_buffer("w", torch.exp(-math.log(10_000) * torch.arange(half) / half), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Time steps ``"batch"`` -> ``"batch width"``."""
        angles = t.float()[:, None] * self.w
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class RawTime(nn.Module):
    """The time step itself, scaled to 0..1: the encoding that Fourier features are compared with."""

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Time steps ``"batch"`` -> ``"batch 1"``."""
        return t.float()[:, None] / 1000


def unit_of(t: Any) -> dict[str, float]:
    """``origin`` and ``unit`` for a :class:`StepGenerator`, by the time steps ``"t"`` that a model was told, noise first.

    What runs from 0 to about 1000 stays, ``(0, 1)``; [0, 1] is stretched, ``(0, 1000)``, and turned round where noise is 0,
    ``(1, -1000)``; anything else, as the logarithm of a noise level, so that it fills 0..1000.
    """
    first, last = float(t[0]), float(t[-1])
    low, high = min(first, last), max(first, last)
    if low >= 0 and 1.5 < high <= 1024:
        return {}
    if low >= 0 and high <= 1:
        return dict(origin=0.0, unit=1000.0) if first >= last else dict(origin=1.0, unit=-1000.0)
    return dict(origin=last, unit=1000.0 / (first - last)) if first != last else {}


class StepGenerator(StepSize):
    """The TDQ module: ``s(t) = softplus(MLP(enc(t)))`` (So et al. 2023, section 4).

    He-initialized, with a last bias that makes s(t) start near ``s_0`` for every t. The network sees ``(t - origin) * unit``:
    0..1000, noise at 1000, whatever the model is told (:func:`unit_of`).

    Args:
        s_0: positive step size to start from, usually the static MSE-optimal one.
        features: :class:`FourierFeatures` (default) or :class:`RawTime`.
        depth: linear layers, at least 1 (paper: 4). hidden: their width (paper: 64).
        dropout: before the last layer, in training only (authors' code: 0.2).
        scaled: with a learned factor, as :meth:`learn_scale` adds it. origin, unit: of t.
    """

    over_time = True

    def __init__(self, s_0: Any = 1.0, features: nn.Module | None = None, depth: int = 4, hidden: int = 64,
                 dropout: float = 0.2, scaled: bool = False, origin: float = 0.0, unit: float = 1.0):  # fmt: skip
        super().__init__()
        self.origin, self.unit = origin, unit
        check("positive", s_0=s_0.item() if isinstance(s_0, torch.Tensor) else s_0)
        depth, hidden = checked_whole("depth", depth, 1, 2**8), checked_whole("hidden", hidden, 1, 2**12)
        check("share", dropout=dropout)
        self.features = features or FourierFeatures()
        width = self.features(torch.zeros(1)).shape[1]
        sizes = [width] + [hidden] * (depth - 1)
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(sizes[-1], 1))
        self._initialize(float(s_0))
        self.register_parameter("log_scale", None)
        if scaled:
            self.learn_scale()

    def learn_scale(self) -> None:
        """Add a learned factor, 1 at first, if there is none: ``s(t) = exp(log_scale) softplus(MLP(enc(t)))``.

        What a constant does at its rate, all of s(t) can then do at the same; the network is left with the shape over t.
        """
        if self.log_scale is None:
            self.log_scale = nn.Parameter(torch.zeros((), device=self.mlp[-1].bias.device))

    def settings(self) -> dict[str, Any]:
        """Width of the features (1: raw t), depth, hidden width, dropout; if not as always, learned factor, unit of t."""
        linears = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        width, hidden = linears[0].in_features, linears[-1].in_features
        further: dict[str, Any] = {} if self.log_scale is None else dict(scaled=True)
        further |= {} if (self.origin, self.unit) == (0, 1) else dict(origin=self.origin, unit=self.unit)
        return dict(width=width, depth=len(linears), hidden=hidden, dropout=self.mlp[-2].p, **further)

    @torch.no_grad()
    def _initialize(self, s_0):
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        # The last layer starts small, so that s(t) = s_0 up to a few per cent.
        self.mlp[-1].weight.mul_(0.01)
        # The inverse of softplus, written so that neither large nor small s_0 loses digits.
        self.mlp[-1].bias.fill_(s_0 + math.log(-math.expm1(-s_0)))

    def at(self, t: torch.Tensor) -> torch.Tensor:
        """s(t) for time steps ``"batch"`` -> ``"batch"``, positive; differentiable in the weights."""
        s = F.softplus(self.mlp(self.features((t - self.origin) * self.unit))).squeeze(1).clamp_min(1e-8)
        return s if self.log_scale is None else s * self.log_scale.exp()

    def forward(self, x: torch.Tensor, t: TimeSteps, grid: Grid) -> torch.Tensor:
        """One value, or one for each sample."""
        return t.spread(self.at(self._tensor(t.values)) if self.training else self._each(t.values))

    @torch.no_grad()
    def on(self, t: Sequence[float], nearest: bool = False) -> torch.Tensor:
        """s(t) at time steps ``t``, ``"t"``: what inference looks up instead of running this."""
        training = self.training
        s = self.eval()._each(t)
        self.train(training)
        return s

    def _each(self, t):
        # One t at a time: the sums of a batched product depend on the batch, and a frozen table
        # must hold exactly the values that the generator gives in any batch.
        return torch.cat([self.at(self._tensor([value])) for value in t])

    def _tensor(self, values):
        return torch.tensor(list(values), device=self.mlp[-1].bias.device)
