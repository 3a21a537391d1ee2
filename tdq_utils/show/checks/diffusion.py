"""Judges of the exercises on lesson 01, by diffusers' DDIM scheduler."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tdq_utils.denoiser.sampling import timesteps
from tdq_utils.show.checks.compare import Case, Check

STEPS = 20


@cache
def _scheduler(clip: bool = True, train_steps: int = 1000) -> Any:
    from diffusers import DDIMScheduler  # seconds to import

    scheduler: Any = DDIMScheduler(num_train_timesteps=train_steps, clip_sample=clip, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    return scheduler


def _pictures(*names: str) -> Case:
    draw = torch.Generator().manual_seed(5)
    return {name: torch.randn(3, 1, 3, 3, generator=draw) for name in names}


def _share(t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a, 1 - a


def _mixed(x_0: Tensor, eps: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    a, b = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    return a * x_0 + b * eps


forward_process = Check(
    lambda x_0, eps, t, alpha_bar: _scheduler().add_noise(x_0, eps, t),
    lambda: [{**_pictures("x_0", "eps"), "t": torch.tensor([0, 300, 999]), "alpha_bar": _scheduler().alphas_cumprod}],
    right="each picture at its own t, as diffusers adds noise.",
    mistakes={
        "its factors lack the square roots": lambda x_0, eps, t, a: _share(t, a)[0] * x_0 + _share(t, a)[1] * eps,
        "it swaps the factors of picture and noise": lambda x_0, eps, t, a: forward_process.reference(eps, x_0, t, a),
        "its noise has the factor 1 - sqrt(a); expected sqrt(1 - a)": (
            lambda x_0, eps, t, a: _share(t, a)[0].sqrt() * x_0 + (1 - _share(t, a)[0].sqrt()) * eps
        ),
        "it lays t along the width of the pictures; give alpha_bar[t] the shape (-1, 1, 1, 1)": _mixed,
    },
)


def _guess(x_t: Tensor, eps: Tensor, t: int, alpha_bar: Tensor) -> Tensor:
    return _scheduler(clip=False).step(eps, t, x_t).pred_original_sample


clean_guess = Check(
    _guess,
    lambda: [{**_pictures("x_t", "eps"), "t": t, "alpha_bar": _scheduler().alphas_cumprod} for t in (99, 499)],
    right="the picture that this noise was added to.",
    mistakes={
        "it does not divide by sqrt(a)": lambda x_t, eps, t, a: _guess(x_t, eps, t, a) * a[t].sqrt(),
        "it divides by a; expected sqrt(a)": lambda x_t, eps, t, a: _guess(x_t, eps, t, a) / a[t].sqrt(),
        "it adds the noise; expected to take it away": lambda x_t, eps, t, a: _guess(x_t, -eps, t, a),
        "it takes the noise away whole; expected its share sqrt(1 - a)": lambda x_t, eps, t, a: (x_t - eps) / a[t].sqrt(),
        "it clips to [-1, 1], which belongs to the next task": lambda x_t, eps, t, a: _guess(x_t, eps, t, a).clamp(-1, 1),
    },
)


def _at(t: int, alpha_bar: Tensor) -> Tensor:
    return alpha_bar[t] if t >= 0 else torch.tensor(1.0)


def _from(x_0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.sqrt() * x_0 + b.sqrt() * eps


def _clipped(x_t: Tensor, eps: Tensor, t: int, alpha_bar: Tensor) -> Tensor:
    return _guess(x_t, eps, t, alpha_bar).clamp(-1, 1)


ddim_step = Check(
    lambda x_t, eps, t, t_next, alpha_bar: _scheduler().step(eps, t, x_t).prev_sample,
    lambda: [
        {**_pictures("x_t", "eps"), "t": t, "t_next": max(-1, t - 1000 // STEPS), "alpha_bar": _scheduler().alphas_cumprod}
        for t in (999, 449, 49)
    ],
    right="one step of DDIM, as diffusers takes it.",
    mistakes={
        "it does not clip the guess to [-1, 1]": (
            lambda x_t, eps, t, n, a: _from(_guess(x_t, eps, t, a), eps, _at(n, a), 1 - _at(n, a))
        ),
        "it puts back the noise of t; expected that of t_next": (
            lambda x_t, eps, t, n, a: _from(_clipped(x_t, eps, t, a), eps, a[t], 1 - a[t])
        ),
        "at t_next = -1 it reads the last entry of alpha_bar; nothing is noisy there, so a = 1": (
            lambda x_t, eps, t, n, a: _from(_clipped(x_t, eps, t, a), eps, a[n], 1 - a[n])
        ),
        "it derives the noise anew from the clipped guess; take eps as the model gave it": (
            lambda x_t, eps, t, n, a: _scheduler().step(eps, t, x_t, use_clipped_model_output=True).prev_sample
        ),
        "it puts back no noise": lambda x_t, eps, t, n, a: _at(n, a).sqrt() * _clipped(x_t, eps, t, a),
    },
)

visited_steps = Check(
    lambda train_steps, steps: timesteps(_scheduler(train_steps=train_steps), steps),
    lambda: [dict(train_steps=1000, steps=20), dict(train_steps=1000, steps=4), dict(train_steps=100, steps=5)],
    right="from the noisiest step down, evenly spaced.",
    mistakes={
        'it begins below the noisiest step ("leading" spacing); the first is train_steps - 1': (
            lambda train, steps: list(range(0, train, train // steps))[::-1]
        ),
        "it counts from 1; time steps are counted from 0": lambda train, steps: list(range(train, 0, -(train // steps))),
        "it runs from picture to noise; sampling begins with noise": (
            lambda train, steps: list(range(train - 1, -1, -(train // steps)))[::-1]
        ),
    },
)
