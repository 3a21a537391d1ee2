"""From seeds to images: any model, by its own scheduler, in batches whose neighbours do not matter."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import each_tensor, tell, time_argument
from tdq_utils.denoiser.trajectory import Asked, number, opposite, trajectory
from tdq_utils.errors import TDQError, checked_whole

Seeds = int | Iterable[int]
Callback = Callable[[dict[str, Any]], Any] | None
Condition = dict[str, Any] | Callable[[list[int]], dict[str, Any]] | None
SAMPLING = ("batch_size", "condition", "guidance", "negative", "beside", "shape", "scheduling")  # what a trajectory depends on


def noise(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise ``"seed *shape"``, float32; entry i depends on ``seeds[i]`` alone.

    Drawn on the CPU, because the bits of a GPU's generator differ from device to device. TDQError: no seeds, or no shape.
    """
    return _drawn(_generators(checked_seeds(seeds)), checked_shape(shape))


def _generators(seeds):
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _drawn(generators, shape):
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def timesteps(scheduler: Any, steps: int | None = None, model: nn.Module | None = None, **scheduling: Any) -> list[Any]:
    """The distinct time steps that a scheduler visits in ``steps`` steps, noise first, as ``model`` is told them.

    ``steps``: default: all that the scheduler was trained with. ``scheduling``: further arguments of its ``set_timesteps``.
    TDQError: steps out of range, or needed; no scheduler.
    """
    if not hasattr(scheduler, "set_timesteps"):
        raise TDQError(f"A scheduler must be one of diffusers, such as load_model gives; got {scheduler!r}.")
    limit = scheduler.config.num_train_timesteps
    if steps is None and not hasattr(scheduler, "alphas_cumprod"):
        raise TDQError(f"steps must be given for {type(scheduler).__name__}, whose time steps are not whole numbers; got none.")
    if steps is None:
        return [number(tell(model, t)) for t in range(limit)][::-1]
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(checked_whole("steps", steps, 1, limit), **scheduling)
    return list(dict.fromkeys(number(tell(model, t)) for t in scheduler.timesteps))


def checked_seeds(seeds: Seeds) -> list[int]:
    """``seeds`` as a non-empty list of ints; a single int is a list of one. TDQError: none given, or no whole numbers."""
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    found = [checked_whole("A seed", seed, 0) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    if not found:
        raise TDQError("seeds must name at least one image; got an empty range. Pass for example range(16).")
    return found


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple. TDQError: no whole numbers, or less than 1."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TDQError(f"shape must be that of one image or latent, such as (4, 64, 64); got {shape!r}.")
    return tuple(checked_whole(f"Every number of shape {tuple(shape)}", size, 1) for size in shape)


def sample(model: Any, scheduler: Any, seeds: Seeds = range(64), steps: int = 50, batch_size: int = 16, callback: Callback = None,
           condition: Condition = None, progress: bool = True, pad: bool = True, guidance: float | None = None,
           negative: Condition = None, beside: Tensor | None = None, shape: Sequence[int] | None = None,
           scheduling: dict[str, Any] | None = None) -> Tensor:  # fmt: skip
    """Generate one image per seed by the scheduler that is given; DDIM with eta = 0 (Song et al. 2021).

    Every batch is filled up to ``batch_size``, because the last bits of a convolution depend on the size of its batch, and
    a quantizer turns a last bit into a whole level. So the bits of image i depend on its seed, the machine and ``batch_size``
    alone, not on its neighbours; a scheduler that draws noise gets a generator of each seed. (The method "dynamic" is the
    exception: its interval is that of the batch, by definition.)

    Args:
        model: any diffusers denoiser, in the state it is in: full precision or quantized.
        scheduler: a diffusers scheduler for what the model predicts; it is copied, never changed.
        seeds: one int an image. steps: of sampling. batch_size: images at a time; 16 is enough for a CPU, a GPU wants hundreds.
        callback: called after each step with a dict: ``step`` (index), ``t`` (as the model was told it), ``x_t`` (before the
            step), ``input`` (what the model got), ``eps`` (its output, guided), ``x_prev`` (after the step), ``seeds`` and
            ``rows`` (which of all) of this batch.
        condition: further keyword arguments of the model, such as ``{"class_labels": tensor}``: a tree of tensors, each with one
            row a seed or one for all; or, for what has no rows, a function that returns them for a list of row numbers.
        progress: show a bar over steps. pad: fill up the last batch.
        guidance: w of classifier-free guidance (Ho and Salimans 2022), ``out = unguided + w (guided - unguided)``, by two calls.
        negative: conditions of the unguided call; default: zeros of embeddings, the null label of a DiT.
        beside: channels ``"seed channel ..."`` joined to x_t in every call (super-resolution, inpainting).
        shape: of one image or latent; default: by the model's config. scheduling: further arguments of ``set_timesteps``.

    Returns:
        Images ``"seed channel height width"``, or what ``shape`` says, float32 on the CPU, in [-1, 1] for models of images.

    Raises:
        TDQError: no seeds, steps out of range, conditions of other lengths, an unknown shape, a model in training mode, not
            calibrated, or frozen for other steps; a scheduler whose noise does not follow the seeds.
    """
    how = {name: value for name, value in locals().items() if name not in ("model", "scheduler", "seeds", "steps")}
    return torch.cat(list(sample_batches(model, scheduler, seeds, steps, **how)))


@torch.no_grad()
def sample_batches(model: Any, scheduler: Any, seeds: Seeds, steps: int = 50, batch_size: int = 16, progress: bool = True,
                   pad: bool = True, callback: Callback = None, shape: Sequence[int] | None = None,
                   scheduling: dict[str, Any] | None = None, **asking: Any) -> Iterator[Tensor]:  # fmt: skip
    """:func:`sample`, a batch at a time: yields images, so that any number of them needs the memory of one batch."""
    seeds, batch_size, scheduling = checked_seeds(seeds), checked_whole("batch_size", batch_size, 1), scheduling or {}
    if getattr(model, "training", False):
        raise TDQError("Sampling takes a model in eval mode; this one is in training mode. Call model.eval().")
    time_argument(model)
    if callback is not None and not callable(callback):
        raise TDQError(f"callback must be a function of a dict, or None; got {callback!r}.")
    shape, starts = checked_shape(shape) if shape else image_shape(model), range(0, len(seeds), batch_size)
    total, ask = len(timesteps(scheduler, steps, **scheduling)) * len(starts), asker(model, len(seeds), **asking)
    with tqdm(total=total, desc="sample", disable=not progress, leave=False) as bar:
        for start in starts:
            rows = list(range(start, min(start + batch_size, len(seeds))))
            filled = rows + [rows[-1]] * (batch_size - len(rows) if pad else 0)
            generators = _generators(seeds[row] for row in filled)
            run = trajectory(ask(filled), scheduler, _drawn(generators, shape), steps, scheduling, generators, len(rows))
            for seen in run:
                x_t = seen["x_prev"]
                if callback:
                    callback(seen | dict(seeds=[seeds[row] for row in rows], rows=rows))
                bar.update()
            yield x_t.float().cpu().contiguous()


def asker(model: nn.Module, n: int, condition: Condition = None, negative: Condition = None, guidance: float | None = None,
          beside: Tensor | None = None) -> Callable[[list[int]], Asked]:  # fmt: skip
    """A function of row numbers: what the model is asked about these rows of ``n``; arguments as for :func:`sample`."""
    if guidance is not None and not (isinstance(guidance, Real) and math.isfinite(guidance)):
        raise TDQError(f"guidance must be a finite number, or None for a model that is not guided; got {guidance!r}.")
    of_condition, of_beside = rows_of(condition, n, "condition"), rows_of({"beside": beside}, n, "beside")
    of_negative = rows_of(negative, n, "negative")

    def ask(rows):
        given = of_condition(rows)
        against = None if guidance is None else opposite(model, given) if negative is None else of_negative(rows)
        return Asked(model, given, guidance, against, of_beside(rows)["beside"])

    return ask


def rows_of(given: Condition, n: int, what: str, each: str = "seeds") -> Callable[[list[int]], dict[str, Any]]:
    """A function of row numbers that gives the conditions for these rows. TDQError: a tensor has neither 1 nor ``n`` rows."""
    if callable(given):
        return given

    def check(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) not in (1, n):
            raise TDQError(f"{what} must have one row for each of the {n} {each}, or one for all; got a tensor "
                           f"{tuple(tensor.shape)}. For what has no rows, pass a function of row numbers.")  # fmt: skip
        return tensor

    each_tensor(check, given := given or {})
    return lambda rows: each_tensor(lambda v: v[rows] if len(v) == n else v.expand(len(rows), *v.shape[1:]), given)


def image_shape(model: nn.Module) -> tuple[int, ...]:
    """Of one image or latent that the model makes, by its config. TDQError: that does not tell it."""
    size, kinds = getattr(getattr(model, "config", None), "sample_size", None), {type(module) for module in model.modules()}
    if size is None or nn.Conv3d in kinds:
        raise TDQError(f"shape must be given where the config does not tell it, as in a {type(model).__name__}; got none. "
                       "Pass that of one image or latent, such as shape=(4, 64, 64).")  # fmt: skip
    axes = 1 if nn.Conv1d in kinds and nn.Conv2d not in kinds else 2
    return model.config.in_channels, *(size if isinstance(size, (tuple, list)) else [size] * axes)
