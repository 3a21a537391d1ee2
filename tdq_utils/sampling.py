"""Noise from seeds, and the deterministic sampler with a callback."""

import inspect

import torch
from tqdm.auto import tqdm

from tdq_utils.errors import TDQError


def noise(seeds, shape):
    """Standard normal noise; entry i depends on ``seeds[i]`` alone.

    Drawn on the CPU, because the bits of a GPU's generator differ from device to device.

    Returns:
        Tensor ``"seed *shape"`` float32.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def timesteps(scheduler, steps):
    """The time steps that a scheduler visits in ``steps`` steps, descending ints. TDQError: steps out of range."""
    limit = scheduler.config.num_train_timesteps
    if not 1 <= steps <= limit:
        raise TDQError(f"steps must be from 1 to {limit}; got {steps}.")
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


def checked_seeds(seeds):
    """``seeds`` as a non-empty list of ints; a single int is a list of one. TDQError: none given."""
    seeds = [seeds] if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not seeds:
        raise TDQError("seeds must name at least one image; got an empty range. Pass for example range(16).")
    return seeds


@torch.no_grad()
def sample(model, scheduler, seeds=range(64), steps=50, batch_size=64, callback=None, condition=None, progress=True):
    """Generate one image per seed with DDIM (Song et al. 2021, eta = 0).

    Image i depends on its own seed, not on its batch. (Sums of a different batch size may differ in
    the last bit; same seeds, same batch size, same machine: same bits.)

    Args:
        model: any diffusers denoiser that takes ``(sample, timestep)``, in the state it is in
            (full precision, or quantized and calibrated).
        scheduler: a diffusers scheduler; it is copied, never changed.
        seeds: one int an image. steps: sampling steps. batch_size: images at a time.
        callback: called after each step with a dict: ``step`` (index), ``t``, ``x_t`` (before the step),
            ``eps`` (the model's output), ``x_prev`` (after the step), ``seeds`` (of this batch).
        condition: further keyword arguments of the model, such as ``{"class_labels": tensor}``, each with one
            row a seed.
        progress: show a bar over model calls.

    Returns:
        Images ``"seed channel height width"`` float32 on the CPU, in [-1, 1] for models of images.

    Raises:
        TDQError: no seeds, a step count out of range, an uncalibrated or wrongly frozen model.
    """
    seeds = checked_seeds(seeds)
    if batch_size < 1:
        raise TDQError(f"batch_size must be at least 1; got {batch_size}.")
    if wrong := {k: len(v) for k, v in (condition or {}).items() if len(v) != len(seeds)}:
        raise TDQError(f"condition must have one row for each of the {len(seeds)} seeds; got {wrong}.")
    parts = [slice(i, i + batch_size) for i in range(0, len(seeds), batch_size)]
    images = []
    with tqdm(total=len(timesteps(scheduler, steps)) * len(parts), desc="sample", disable=not progress, leave=False) as bar:
        for part in parts:
            rows = {k: v[part] for k, v in (condition or {}).items()}
            images.append(_trajectory(model, scheduler, seeds[part], steps, callback, rows, bar))
    return torch.cat(images)


def _trajectory(model, scheduler, seeds, steps, callback, condition, bar):
    device = next(model.parameters()).device
    condition = {k: v.to(device) for k, v in condition.items()}
    scheduler = type(scheduler).from_config(scheduler.config)  # a scheduler keeps state while it samples
    scheduler.set_timesteps(steps)
    eta = {"eta": 0.0} if "eta" in inspect.signature(scheduler.step).parameters else {}
    x_t = noise(seeds, _shape(model)).to(device, memory_format=torch.channels_last) * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        eps = model(scheduler.scale_model_input(x_t, t), t.to(device).expand(len(x_t)), **condition).sample  # one t a sample: DiT
        if eps.shape[1] == 2 * x_t.shape[1]:  # models that also predict a variance
            eps = eps.chunk(2, dim=1)[0]
        x_prev = scheduler.step(eps, t, x_t, **eta).prev_sample
        if callback:
            callback(dict(step=step, t=int(t), x_t=x_t, eps=eps, x_prev=x_prev, seeds=seeds))
        x_t = x_prev
        bar.update()
    return x_t.float().cpu().contiguous()


def _shape(model):
    config = model.config
    size = config.sample_size
    return (config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
