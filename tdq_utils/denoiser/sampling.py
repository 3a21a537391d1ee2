"""Noise from seeds, and the deterministic sampler with a callback."""

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of, prediction
from tdq_utils.errors import TDQError


def noise(seeds: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise; entry i depends on ``seeds[i]`` alone.

    Drawn on the CPU, because the bits of a GPU's generator differ from device to device.

    Returns:
        Tensor ``"seed *shape"`` float32.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def timesteps(scheduler: Any, steps: int | None = None) -> list[Any]:
    """The time steps that a scheduler visits in ``steps`` steps, descending; default: all. TDQError: steps out of range."""
    limit = scheduler.config.num_train_timesteps
    if steps is None:
        return list(range(limit))[::-1]
    if isinstance(steps, float) or not 1 <= steps <= limit:
        raise TDQError(f"steps must be a whole number from 1 to {limit}; got {steps}.")
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    return [int(t) if float(t).is_integer() else float(t) for t in scheduler.timesteps]


def checked_seeds(seeds: int | Iterable[int]) -> list[int]:
    """``seeds`` as a non-empty list of ints; a single int is a list of one. TDQError: none given, or no whole numbers."""
    try:
        found = [operator.index(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    except TypeError:
        raise TDQError(f"seeds must be whole numbers, one an image; got {seeds!r}. Pass for example range(16).") from None
    if not found or min(found) < 0:
        got = f"{min(found)}" if found else "an empty range"
        raise TDQError(f"seeds must name at least one image, by numbers from 0; got {got}. Pass for example range(16).")
    return found


def sample(model: Any, scheduler: Any, seeds: int | Iterable[int] = range(64), steps: int = 50, batch_size: int = 16,
           callback: Callable[[dict[str, Any]], Any] | None = None, condition: dict[str, torch.Tensor] | None = None,
           progress: bool = True, pad: bool = True) -> torch.Tensor:  # fmt: skip
    """Generate one image per seed with DDIM (Song et al. 2021, eta = 0).

    Every batch is filled up to ``batch_size``, because the last bits of a convolution depend on the size of its
    batch, and a quantizer turns a last bit into a whole level. So the bits of image i depend on its seed, the
    machine and ``batch_size`` alone: not on its neighbours, their number, or its place among them. (The method
    "dynamic" is the exception: its interval is that of the whole batch, by definition.)

    Args:
        model: any diffusers denoiser that takes ``(sample, timestep)``, in the state it is in
            (full precision, or quantized and calibrated).
        scheduler: a diffusers scheduler; it is copied, never changed.
        seeds: one int an image. steps: sampling steps. batch_size: images at a time; 16 is as fast as more on a
            CPU, a GPU wants hundreds.
        callback: called after each step with a dict: ``step`` (index), ``t``, ``x_t`` (before the step),
            ``eps`` (the model's output), ``x_prev`` (after the step), ``seeds`` (of this batch).
        condition: further keyword arguments of the model, such as ``{"class_labels": tensor}``, each with one
            row a seed.
        progress: show a bar over model calls. pad: fill up the last batch.

    Returns:
        Images ``"seed channel height width"`` float32 on the CPU, in [-1, 1] for models of images.

    Raises:
        TDQError: no seeds, a step count out of range, a model in training mode, or uncalibrated, or wrongly frozen.
    """
    how: dict[str, Any] = dict(callback=callback, condition=condition, progress=progress, pad=pad)
    return torch.cat(list(sample_batches(model, scheduler, seeds, steps, batch_size, **how)))


@torch.no_grad()
def sample_batches(model: Any, scheduler: Any, seeds: int | Iterable[int], steps: int = 50, batch_size: int = 16,
                   callback: Callable[[dict[str, Any]], Any] | None = None, condition: dict[str, torch.Tensor] | None = None,
                   progress: bool = True, pad: bool = True) -> Iterator[torch.Tensor]:  # fmt: skip
    """:func:`sample`, a batch at a time: yields images, so that any number of them needs the memory of one batch."""
    seeds = checked_seeds(seeds)
    if batch_size < 1:
        raise TDQError(f"batch_size must be at least 1; got {batch_size}.")
    if getattr(model, "training", False):
        raise TDQError("Sampling takes a model in eval mode; this one is in training mode. Call model.eval().")
    condition = condition or {}
    if wrong := {k: len(v) for k, v in condition.items() if len(v) != len(seeds)}:
        raise TDQError(f"condition must have one row for each of the {len(seeds)} seeds; got {wrong}.")
    starts = range(0, len(seeds), batch_size)
    total = len(timesteps(scheduler, steps)) * len(starts)
    with tqdm(total=total, desc="sample", disable=not progress, leave=False) as bar:
        for start in starts:
            rows = list(range(start, min(start + batch_size, len(seeds))))
            filled = rows + [rows[-1]] * (batch_size - len(rows) if pad else 0)
            x_t = noise([seeds[row] for row in filled], _shape(model))
            given = {key: value[filled] for key, value in condition.items()}
            yield _trajectory(model, scheduler, x_t, steps, given, callback, [seeds[row] for row in rows], bar)


def _trajectory(model, scheduler, x_t, steps, condition, callback, seeds, bar):
    """Take noise ``x_t`` to images; the first ``len(seeds)`` of them count, the rest fill the batch."""
    device, n = device_of(model), len(seeds)
    condition = {key: value.to(device) for key, value in condition.items()}
    scheduler = type(scheduler).from_config(scheduler.config)  # a scheduler keeps state while it samples
    scheduler.set_timesteps(steps)
    eta = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    x_t = x_t.to(device, memory_format=torch.channels_last) * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        one_t_a_sample = t.to(device).expand(len(x_t))  # DiT takes no single t
        eps = prediction(model(scheduler.scale_model_input(x_t, t), one_t_a_sample, **condition))
        if eps.shape[1] == 2 * x_t.shape[1]:  # models that also predict a variance
            eps = eps.chunk(2, dim=1)[0]
        x_prev = scheduler.step(eps, t, x_t, **eta).prev_sample
        if callback:
            callback(dict(step=step, t=int(t), x_t=x_t[:n], eps=eps[:n], x_prev=x_prev[:n], seeds=seeds))
        x_t = x_prev
        bar.update()
    return x_t[:n].float().cpu().contiguous()


def _shape(model):
    config = model.config
    size = config.sample_size
    return (config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
