"""Judges of the exercises on lesson 05: moments, Frechet distance, its bias, and the gap that is closed."""

from typing import Any

import torch
from torch import Tensor

from tdq_utils.show.checks.compare import Case, Check


def _statistics(features: Tensor) -> Any:
    from tdq_utils.lab.fid import Statistics  # brings torchmetrics

    return Statistics.of(features)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    found = _statistics(features)
    return torch.from_numpy(found.mu), torch.from_numpy(found.sigma)


def _features(*sizes: int, width: int = 4) -> list[Tensor]:
    """Sets of features of one distribution, whose directions depend on each other."""
    draw = torch.Generator().manual_seed(11)
    mix = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return [torch.randn(n, width, generator=draw, dtype=torch.float64) @ mix + 1 for n in sizes]


moments = Check(
    _moments,
    lambda: [dict(features=features) for features in _features(12, 30)],
    right="all that a Frechet distance wants to know of a set.",
    mistakes={
        "its covariance is divided by n; unbiased is n - 1": (
            lambda features: (features.mean(0), torch.cov(features.T, correction=0))
        ),
        "its covariance is taken around 0; take the mean away first": (
            lambda features: (features.mean(0), features.T @ features / (len(features) - 1))
        ),
        "it holds variances alone; expected the whole covariance": (
            lambda features: (features.mean(0), torch.diag(features.var(0)))
        ),
        "it takes images for features; turn the matrix round": lambda features: _moments_of_images(features),
    },
)


def _moments_of_images(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(1), torch.cov(features)


def _frechet(mu_a: Tensor, sigma_a: Tensor, mu_b: Tensor, sigma_b: Tensor) -> float:
    from tdq_utils.lab.fid import Statistics, frechet_distance

    return frechet_distance(Statistics(mu_a, sigma_a, 0), Statistics(mu_b, sigma_b, 0))


def _two() -> list[Case]:
    a, b = _features(20, 25)
    b[:, 0] += 2
    b[:, 1] *= 3
    (mu_a, sigma_a), (mu_b, sigma_b) = _moments(a), _moments(b)
    return [dict(mu_a=mu_a, sigma_a=sigma_a, mu_b=mu_b, sigma_b=sigma_b)]


def _apart(mu_a: Tensor, mu_b: Tensor) -> float:
    return (mu_a - mu_b).square().sum().item()


frechet = Check(
    _frechet,
    _two,
    right="the same Gaussians have distance 0, others more.",
    mistakes={
        "it does not square the distance of the means": lambda a, A, b, B: (
            _frechet(a, A, b, B) - _apart(a, b) + _apart(a, b) ** 0.5
        ),
        "it takes roots entry by entry; expected the root of the matrix, so of its eigenvalues": (
            lambda a, A, b, B: _apart(a, b) + (A + B - 2 * (A @ B).abs().sqrt()).trace().item()
        ),
        "its root counts once; expected twice": (
            lambda a, A, b, B: (_frechet(a, A, b, B) + _apart(a, b) + (A + B).trace().item()) / 2
        ),
        "it looks at the means alone": lambda a, A, b, B: _apart(a, b),
        "it looks at the covariances alone": lambda a, A, b, B: _frechet(a, A, b, B) - _apart(a, b),
        "it takes a root at the end; the Frechet distance is used squared": lambda a, A, b, B: _frechet(a, A, b, B) ** 0.5,
    },
)


def _by_n(features: Tensor, reference: Tensor, sizes: list[int]) -> list[float]:
    return [_frechet(*_moments(features[:n]), *_moments(reference)) for n in sizes]


def _sets() -> list[Case]:
    features, reference = _features(400, 600, width=3)
    return [dict(features=features, reference=reference, sizes=[10, 40, 100, 400])]


distance_by_n = Check(
    _by_n,
    _sets,
    right="both sets have the same distribution, and the distance falls with n: all of it is bias.",
    mistakes={
        "it takes all images each time; expected the first n": (
            lambda features, reference, sizes: _by_n(features, reference, [len(features)] * len(sizes))
        ),
        "it takes the last n images; expected the first": (
            lambda features, reference, sizes: _by_n(features.flip(0), reference, sizes)
        ),
        "it cuts the reference, too; that stays whole": (
            lambda features, reference, sizes: [_by_n(features, reference[:n], [n])[0] for n in sizes]
        ),
        "it compares with the whole set of features; expected with the reference": (
            lambda features, reference, sizes: _by_n(features, features, sizes)
        ),
    },
)


def _closed(static: Tensor, tdq: Tensor, full: Tensor) -> float:
    import pandas as pd

    from tdq_utils.show.lessons import judged

    rows = [dict(method=method, repeat=i, weights=bits, activations=bits, fcd=fcd)
            for method, bits, values in (("mse", 5, static), ("tdq", 5, tdq), ("full precision", 0, full))
            for i, fcd in enumerate(values.tolist())]  # fmt: skip
    return float(judged(pd.DataFrame(rows).assign(weights_method="nearest"))["gap closed"].iloc[0])


def _distances() -> list[Case]:
    pairs = ([7.5, 7.7, 7.3], [6.0, 6.3, 6.1], [1.2, 1.0, 1.4]), ([3.3, 3.1], [3.2, 2.9], [1.2, 1.3])
    return [dict(zip(("static", "tdq", "full"), map(torch.tensor, found), strict=True)) for found in pairs]


gap_closed = Check(
    _closed,
    _distances,
    right="the share of what could be won, not of what is there.",
    mistakes={
        "it divides by the static distance; expected by its gap to full precision": (
            lambda static, tdq, full: (100 * (1 - tdq.mean() / static.mean())).item()
        ),
        "it gives a share; expected per cent": lambda *case: _closed(*case) / 100,
        "it gives what is left of the gap; expected what is closed": lambda *case: 100 - _closed(*case),
        "it averages the shares of the repeats; expected the share of the means": (
            lambda static, tdq, full: (100 * (static - tdq) / (static - full)).mean().item()
        ),
    },
)
