"""One batch on its way from noise to images: what the model is asked in a step, and what the scheduler makes of the answer."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdq_utils.denoiser.call import device_of, each_tensor, predict, tell
from tdq_utils.errors import TDQError


def number(t: Any) -> float:
    """A time step as a plain number: an ``int`` if it is whole."""
    return int(t) if float(t).is_integer() else float(t)


@dataclass
class Asked:
    """What a model is asked about a batch: as :func:`tdq_utils.denoiser.sampling.sample` is given it, for these rows."""

    model: nn.Module
    condition: dict[str, Any]
    guidance: float | None = None
    negative: dict[str, Any] | None = None
    beside: Tensor | None = None

    def __post_init__(self) -> None:
        self.condition, self.negative, self.beside = (self._fit(v) for v in (self.condition, self.negative, self.beside))

    def _fit(self, tree):
        device = device_of(self.model)
        dtype = getattr(self.model, "dtype", None) or next(self.model.parameters()).dtype  # weights may be stored in another
        return each_tensor(lambda v: v.to(device, dtype if v.is_floating_point() else v.dtype), tree)

    def input(self, x: Tensor) -> Tensor:
        """What the model gets of scaled noisy samples ``x``: in its dtype, with the channels beside."""
        x = self._fit(x)
        return x if self.beside is None else torch.cat([x, self.beside], 1)

    def answer(self, x: Tensor, t: Tensor, channels: int) -> Tensor:
        """The prediction for inputs ``x`` at one t, float32; guided, but for a variance beyond the first ``channels``."""
        told = tell(self.model, t).expand(len(x))  # DiT takes no single t
        asked = predict(self.model, x, told, self.condition).float()
        if self.guidance is None:
            return asked
        against, variance = predict(self.model, x, told, self.negative or {}).float()[:, :channels], asked[:, channels:]
        return torch.cat([against + self.guidance * (asked[:, :channels] - against), variance], 1)


def opposite(model: nn.Module, condition: dict[str, Any]) -> dict[str, Any]:
    """The conditions of the unguided call: zeros of embeddings, the null label of a class-conditional transformer; masks and
    other whole numbers stay. TDQError: class labels of a model whose null label is not known."""
    against = each_tensor(lambda v: torch.zeros_like(v) if v.is_floating_point() else v, condition)
    if "class_labels" in condition:
        null = getattr(model.config, "num_embeds_ada_norm", None)
        if null is None:
            raise TDQError(f"negative must name the null label of a {type(model).__name__}, if it has one; got none. "
                           "Pass negative={'class_labels': tensor}.")  # fmt: skip
        against["class_labels"] = torch.full_like(condition["class_labels"], null)
    return against


def trajectory(asked: Asked, scheduler: Any, x_t: Tensor, steps: int, scheduling: dict[str, Any],
               generators: list[torch.Generator], n: int) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Take noise ``x_t`` to images; yields each step, the first ``n`` rows of it: the others fill the batch."""
    device, channels = device_of(asked.model), x_t.shape[1]
    scheduler = type(scheduler).from_config(scheduler.config)  # a scheduler keeps state while it samples
    scheduler.set_timesteps(steps, **scheduling)
    takes = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": 0.0} if "eta" in takes else {}
    options |= {"generator": generators} if "generator" in takes else {}
    x_t = x_t.to(device, memory_format=torch.channels_last if x_t.dim() == 4 else torch.preserve_format)
    x_t = x_t * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    for step, t in enumerate(scheduler.timesteps):
        given = asked.input(scale(x_t, t))
        out = asked.answer(given, t.to(device), channels)
        if out.shape[1] == 2 * channels and not learned:  # the model also predicts a variance
            out = out.chunk(2, dim=1)[0]
        before = torch.random.get_rng_state()
        x_prev = scheduler.step(out, t, x_t, **options).prev_sample
        if not torch.equal(before, torch.random.get_rng_state()):
            raise TDQError(f"A scheduler's noise must follow the seeds; {type(scheduler).__name__} draws its own. Take another "
                           "scheduler, or turn its noise off.")  # fmt: skip
        told, rows = number(tell(asked.model, t)), slice(n)
        yield dict(step=step, t=told, x_t=x_t[rows], input=given[rows], eps=out[rows], x_prev=x_prev[rows])
        x_t = x_prev
