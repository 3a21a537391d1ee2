"""Noise from seeds, and the deterministic sampler with a callback."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of, prediction
from tdq_utils.errors import TDQError, checked_whole

Seeds = int | Iterable[int]
Callback = Callable[[dict[str, Any]], Any] | None
Condition = dict[str, Tensor] | None


def noise(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise ``"seed *shape"``, float32; entry i depends on ``seeds[i]`` alone.

    Drawn on the CPU, because the bits of a GPU's generator differ from device to device.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def number(t: Any) -> float:
    """A time step as a plain number: an ``int`` if it is whole."""
    return int(t) if float(t).is_integer() else float(t)


def timesteps(scheduler: Any, steps: int | None = None) -> list[Any]:
    """The time steps that a scheduler visits in ``steps`` steps, descending; default: all. TDQError: steps out of range."""
    limit = scheduler.config.num_train_timesteps
    if steps is None:
        return list(range(limit))[::-1]
    steps = checked_whole("steps", steps, 1, limit)
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    return [number(t) for t in scheduler.timesteps]


def checked_seeds(seeds: Seeds) -> list[int]:
    """``seeds`` as a non-empty list of ints; a single int is a list of one. TDQError: none given, or no whole numbers."""
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    found = [checked_whole("A seed", seed, 0) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    if not found:
        raise TDQError("seeds must name at least one image; got an empty range. Pass for example range(16).")
    return found


def sample(model: Any, scheduler: Any, seeds: Seeds = range(64), steps: int = 50, batch_size: int = 16, callback: Callback = None,
           condition: Condition = None, progress: bool = True, pad: bool = True) -> Tensor:  # fmt: skip
    """Generate one image per seed with DDIM (Song et al. 2021, eta = 0).

    Every batch is filled up to ``batch_size``, because the last bits of a convolution depend on the size of its batch, and
    a quantizer turns a last bit into a whole level. So the bits of image i depend on its seed, the machine and ``batch_size``
    alone, not on its neighbours. (The method "dynamic" is the exception: its interval is that of the batch, by definition.)

    Args:
        model: any diffusers denoiser that takes ``(sample, timestep)``, in the state it is in: full precision or quantized.
        scheduler: a diffusers scheduler; it is copied, never changed.
        seeds: one int an image. steps: of sampling. batch_size: images at a time; 16 is enough for a CPU, a GPU wants hundreds.
        callback: called after each step with a dict: ``step`` (index), ``t``, ``x_t`` (before the step),
            ``eps`` (the model's output), ``x_prev`` (after the step), ``seeds`` (of this batch).
        condition: further keyword arguments of the model, such as ``{"class_labels": tensor}``, each with one row a seed.
        progress: show a bar over model calls. pad: fill up the last batch.

    Returns:
        Images ``"seed channel height width"`` float32 on the CPU, in [-1, 1] for models of images. TDQError: no seeds, steps
        out of range, a model in training mode, not calibrated, or frozen for other steps.
    """
    return torch.cat(list(sample_batches(model, scheduler, seeds, steps, batch_size, callback, condition, progress, pad)))


@torch.no_grad()
def sample_batches(model: Any, scheduler: Any, seeds: Seeds, steps: int = 50, batch_size: int = 16, callback: Callback = None,
                   condition: Condition = None, progress: bool = True, pad: bool = True) -> Iterator[Tensor]:  # fmt: skip
    """:func:`sample`, a batch at a time: yields images, so that any number of them needs the memory of one batch."""
    seeds, batch_size, condition = checked_seeds(seeds), checked_whole("batch_size", batch_size, 1), condition or {}
    if getattr(model, "training", False):
        raise TDQError("Sampling takes a model in eval mode; this one is in training mode. Call model.eval().")
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
            callback(dict(step=step, t=number(t), x_t=x_t[:n], eps=eps[:n], x_prev=x_prev[:n], seeds=seeds))
        x_t = x_prev
        bar.update()
    return x_t[:n].float().cpu().contiguous()


def _shape(model):
    size = model.config.sample_size
    return (model.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
