"""The one reader of a denoiser's call: which time step has each sample. What a call knows lives as long as the call."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tdq_utils.errors import TDQError
from tdq_utils.method.step_sizes import TimeSteps

TIME = ("timestep", "timesteps", "t")  # what the families of diffusers call it
# What the pipelines of these families tell their models, instead of the scheduler's t.
PER_THOUSAND = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "ChromaTransformer2DModel",
                "AuraFlowTransformer2DModel")  # fmt: skip
OWN_PIPELINE = ("ZImageTransformer2DModel", "Lumina2Transformer2DModel")  # these turn t round, and the output's sign


@dataclass(frozen=True)
class _Call:
    """A call of ``model`` that has begun and not ended; ``outer``: the call that it was made in."""

    model: nn.Module | None
    times: TimeSteps | None
    outer: "_Call | None"


# Not on the model: one model may be called in two threads, at two time steps.
_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)


def check_module(model: Any) -> None:
    """TDQError: what should be a model is no module of torch."""
    if not isinstance(model, nn.Module):
        raise TDQError(f"A model must be a module of torch, such as load_model gives; got {model!r}. Of a pipeline, pass its "
                       "denoiser: pipe.unet or pipe.transformer.")  # fmt: skip


def time_argument(model: nn.Module) -> str:
    """The name of the argument that carries the time step. TDQError: no module, or ``forward`` has none."""
    check_module(model)
    names = inspect.signature(model.forward).parameters
    found = next((name for name in TIME if name in names), None)
    if hasattr(model, "_orig_mod"):
        raise TDQError("A model must be given as it is, not in the wrapper of torch.compile; got an OptimizedModule. Pass what "
                       "it wraps, model._orig_mod: a pipeline may keep the wrapper.")  # fmt: skip
    if found is None:
        raise TDQError(f"A denoiser takes the time step as one of {', '.join(TIME)}; {type(model).__name__}.forward takes "
                       f"{', '.join(names)}. Wrap it in a module whose forward does.")  # fmt: skip
    return found


def read_times(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TimeSteps:
    """The time steps of a call ``model(*args, **kwargs)``, by the signature of the model: as received, in any unit.

    Time steps ``"batch token"`` (image to video) count by the noisiest token of each sample. TDQError: no time step, or a
    number of them that is neither 1 nor that of the samples.
    """
    sample, t, _ = read_call(model, args, kwargs)
    return times_of(t, len(sample))


def times_of(t: Any, batch: int) -> TimeSteps:
    """The time steps of ``batch`` samples, from what the model is given as ``t``: as for :func:`read_times`."""
    t = torch.as_tensor(t)
    return TimeSteps(t.flatten(1).amax(1) if t.dim() > 1 else t, batch)


def read_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """A call ``model(*args, **kwargs)`` taken apart: ``(sample, t, others by name)``. TDQError: no time step."""
    call, name = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments), time_argument(model)
    if call.get(name) is None:
        raise TDQError(f"The model must be told the time step; got none. Call model(sample, {name}).")
    sample = call.pop(next(iter(call)))
    more = (p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_KEYWORD)
    call |= call.pop(next(more, ""), {})
    return sample, call.pop(name), call


def predict(model: nn.Module, sample: Any, t: Any, condition: Mapping[str, Any]) -> torch.Tensor:
    """What the model predicts; the inverse of :func:`read_call`: all by name, since the second argument need not be t."""
    first = next(iter(inspect.signature(model.forward).parameters))
    return prediction(model(**{first: sample, time_argument(model): t, **condition}))


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """``tree``, nested lists, tuples and dicts as models are given them, with ``function`` applied to its tensors."""
    from accelerate.utils import recursively_apply  # slow to import

    return recursively_apply(function, tree)


def joined(first: Any, second: Any) -> Any:
    """Two trees of equal structure as one: tensors joined along their first axis, what is no tensor taken from ``first``."""
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {key: joined(value, second[key]) for key, value in first.items()}
    if isinstance(first, (list, tuple)):
        return type(first)(joined(a, b) for a, b in zip(first, second, strict=True))
    return first


def tell(model: nn.Module | None, t: Any) -> Any:
    """What a model is told of a scheduler's t: by its family, and its ``timestep_scale``. TDQError: only its pipeline knows."""
    family = type(getattr(model, "net", model)).__name__  # or of what a runner runs
    if family in OWN_PIPELINE:
        raise TDQError(f"The pipeline of a {family} turns t and the output round; sample does not. Use it in record(...), then "
                       "calibrate(..., profile=recorded.profile) and freeze(model).")  # fmt: skip
    scale = getattr(getattr(model, "config", None), "timestep_scale", 1.0)
    return t / 1000 if family in PER_THOUSAND else t if scale == 1 else t * scale


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: its execution device if accelerate offloads it, else that of its parameters."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    offloaded = next((hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None), None)
    return torch.device(offloaded) if offloaded is not None else next(model.parameters()).device


def prediction(output: Any) -> torch.Tensor:
    """The tensor that a denoiser predicts, from what it returned: an object with ``sample``, a tuple, or the tensor itself.

    A list of samples, as from Z-Image, is stacked, ``"batch ..."``; of samples that differ in shape, all values in a row.
    """
    found = output if isinstance(output, torch.Tensor) else output.sample if hasattr(output, "sample") else output[0]
    if isinstance(found, torch.Tensor):
        return found
    alike = len({one.shape for one in found}) == 1
    return torch.stack(list(found)) if alike else torch.cat([one.flatten() for one in found])


def follow(model: nn.Module) -> list[RemovableHandle]:
    """Let :func:`now` know the time steps of the model's calls, until the handles are removed."""
    enter = model.register_forward_pre_hook(_enter, with_kwargs=True)
    return [enter, model.register_forward_hook(_leave, always_call=True)]


def _enter(model, args, kwargs):
    _CALL.set(_Call(model, read_times(model, args, kwargs), _CALL.get()))


def _leave(model, args, output):
    call = _CALL.get()
    if call is not None and call.model is model:  # else it failed before it was entered
        _CALL.set(call.outer)


def now() -> TimeSteps | None:
    """The time steps of the innermost call under way in this thread; ``None`` outside of any."""
    call = _CALL.get()
    return call.times if call else None


@contextmanager
def at_times(times: TimeSteps) -> Iterator[None]:
    """While open, :func:`now` gives ``times``: for parts of a model that are called without the model around them."""
    token = _CALL.set(_Call(None, times, _CALL.get()))
    try:
        yield
    finally:
        _CALL.reset(token)
