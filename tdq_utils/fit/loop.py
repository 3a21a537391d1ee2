"""What every training needs: the loss, one loop with an average of the weights, and a state on disk to go on from."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of, predict, tell
from tdq_utils.denoiser.files import beside, read_json
from tdq_utils.denoiser.loading import matches_flow
from tdq_utils.denoiser.record import Calls
from tdq_utils.denoiser.sampling import Condition, rows_of
from tdq_utils.denoiser.trajectory import Asked
from tdq_utils.errors import DataError, TDQError, check_folder

# prediction_type -> target, of x_0, eps and their factors in x_t
TARGETS: dict[str, Callable[..., torch.Tensor]] = {
    "epsilon": lambda x_0, eps, a, b: eps,
    "sample": lambda x_0, eps, a, b: x_0,
    "v_prediction": lambda x_0, eps, a, b: a * eps - b * x_0,
}


def iteration_generator(seed: int, iteration: int) -> torch.Generator:
    """Random numbers that depend on the seed and the iteration alone, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 10_000_000 + iteration)


def objective(scheduler: Any) -> str:
    """What a model of this scheduler is trained to predict: a key of ``TARGETS``, or "flow". TDQError: the kit knows no loss."""
    kind = "flow" if matches_flow(scheduler) else scheduler.config.get("prediction_type")
    if kind != "flow" and (kind not in TARGETS or not hasattr(scheduler, "alphas_cumprod")):
        raise TDQError(f"Training knows schedulers of flow matching, and those with alphas_cumprod and a prediction_type of "
                       f"{', '.join(TARGETS)}; got {type(scheduler).__name__} with {kind!r}. Pass the model's own.")  # fmt: skip
    return kind


def drawn(scheduler: Any, images: torch.Tensor, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """What is random in a batch: which images; how noisy: t or, for flow, sigma (logit-normal: Esser et al. 2024); noise."""
    pick = torch.randint(len(images), (batch,), generator=generator)
    if matches_flow(scheduler):
        level = torch.randn(batch, generator=generator).sigmoid()
    else:
        level = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
    return pick, level, torch.randn(batch, *images.shape[1:], generator=generator)


def noised(scheduler: Any, x_0: torch.Tensor, level: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``(x_t, t, target)`` of images at the levels that were :func:`drawn`; target: what the model should predict.

    Flow matching: ``x_t = (1 - sigma) x_0 + sigma eps``, the target is ``eps - x_0``. Else ``x_t = a x_0 + b eps`` with
    ``a^2 = alphas_cumprod``, ``b^2 = 1 - a^2``: as DDPM adds noise, whatever sampler shares its config; ``v = a eps - b x_0``."""
    kind, wide = objective(scheduler), lambda values: values.view(-1, *[1] * (x_0.dim() - 1))
    if kind == "flow":
        sigma = wide(level)
        return (1 - sigma) * x_0 + sigma * eps, scheduler.config.num_train_timesteps * level, eps - x_0
    alphas = wide(scheduler.alphas_cumprod.to(x_0.device, x_0.dtype)[level])
    a, b = alphas**0.5, (1 - alphas) ** 0.5
    return a * x_0 + b * eps, level, TARGETS[kind](x_0, eps, a, b)


def denoising_loss(model: nn.Module, images: torch.Tensor, scheduler: Any, batch: int, generator: torch.Generator,
                   teacher: nn.Module | None = None, distill: float = 0.0, condition: Condition = None
                   ) -> torch.Tensor:  # fmt: skip
    """Mean squared error of what the model predicts: noise (Ho et al. 2020, eq. 14), v, image or velocity, by its scheduler.

    Of a model that predicts a variance, too, the mean is trained. With a ``teacher``, ``distill`` of the loss (0 to 1) is the
    error against what the teacher predicts from the same input. ``condition``: further arguments of the model, a row an image.
    """
    pick, level, eps = drawn(scheduler, images, batch, generator)
    x_0, level, eps = (v.to(images.device) for v in (images[pick.to(images.device)], level, eps))
    x_t, t, target = noised(scheduler, x_0, level, eps)
    given = Asked(model, rows_of(condition, len(images), "condition", "images")(pick.tolist()))
    x_t = given.input(x_t.contiguous(memory_format=torch.channels_last) if x_t.dim() == 4 else x_t)

    def mean(net: nn.Module) -> torch.Tensor:
        found = predict(net, x_t, tell(net, t), given.condition).float()
        return found.chunk(2, dim=1)[0] if found.shape[1] == 2 * target.shape[1] else found

    predicted = mean(model)
    if teacher is None:
        return F.mse_loss(predicted, target)
    with torch.no_grad():
        taught = mean(teacher)
    return (1 - distill) * F.mse_loss(predicted, target) + distill * F.mse_loss(predicted, taught)


def recorded_loss(model: nn.Module, calls: Calls, teacher: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error against what the full-precision ``teacher`` predicts in a recorded call, drawn at random."""
    call = calls.draw(1, generator, device_of(model))
    with torch.no_grad():
        taught = predict(teacher, *call).float()
    return F.mse_loss(predict(model, *call).float(), taught)


def descend(loss_of: Callable[[int], torch.Tensor], parameters: list[nn.Parameter], iterations: int, rate: float,
            title: str = "", progress: bool = False) -> list[float]:  # fmt: skip
    """Adam, with a cosine fall from ``rate``, on the loss of each iteration over ``parameters`` alone. Returns the losses."""
    losses, optimizer = [], torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in tqdm(range(iterations), title, disable=not progress, leave=False):
        error = loss_of(i)
        # Not backward(), which would leave gradients on the model's other parameters, or add to those that are there.
        gradients = torch.autograd.grad(error, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(error.item())
    return losses


class Trainer:
    """Steps of an optimizer on a loss, an average of all parameters, and the state of both on disk.

    ``ema_decay``: of the average; it grows from 0 to this value over the first iterations. ``path``: of the state, saved every
    minute and at the end, and gone on from. A group of parameters may have a ``rate``, relative to that of the iteration.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema_decay: float, path: Path | None = None,
                 clip: float = 1.0):  # fmt: skip
        from diffusers.training_utils import EMAModel  # seconds, and sampling needs none of it

        self.model, self.optimizer, self.path, self.clip = model, optimizer, path, clip
        # The last bits of the sum are those of the lerp_ that the shipped UNet and the tables of training were made with
        # (measured: after 150 iterations none of two million values differs); with foreach=False they are not.
        self.ema = EMAModel(model.parameters(), decay=ema_decay, foreach=True)
        self.parts = dict(model=model, ema=self.ema, optimizer=optimizer)

    def run(self, loss_of: Callable[[torch.Generator], torch.Tensor], rate_of: Callable[[int], float], iterations: int,
            seed: int, title: str, progress: bool = True) -> list[float]:  # fmt: skip
        """Train to the end, or on from the state on disk; the model ends as the average. Returns the loss of each iteration.

        ``loss_of``: the loss, of the random numbers of an iteration. ``rate_of``: the rate of an iteration.
        TDQError: a loss or gradient that is not finite; no parameter has seen it. DataError: a damaged state.
        """
        (start, log), saved = self._load(), time.monotonic()
        self.model.train()
        for module in self.model.modules():
            if type(module).__name__ == "LabelEmbedding":  # each would drop labels of its own, whatever the condition says
                module.eval()
        bar = tqdm(range(start, iterations), title, iterations, initial=start, disable=not progress, leave=False, mininterval=2)
        for i in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = group.get("rate", 1.0) * rate_of(i)
            log.append(self._step(loss_of, i, seed))
            if self.path and (time.monotonic() - saved > 60 or i + 1 == iterations):
                self._save(i + 1, log)
                saved = time.monotonic()
            bar.set_postfix(loss=f"{sum(log[-50:]) / len(log[-50:]):.4f}", refresh=False)
        self.optimizer.zero_grad()
        if self.ema.decay:  # else the sum differs from the last values by rounding
            self.ema.copy_to(self.model.parameters())
        return log

    def _step(self, loss_of, i, seed):
        with torch.random.fork_rng(devices=[]):
            # Dropout and NIPQ's noise: another stream than that of the batch, which seed and i alone would repeat.
            torch.manual_seed(seed * 10_000_000 + 5_000_000 + i)
            loss = loss_of(iteration_generator(seed, i))
        self._check_finite("loss", loss, i)
        self.optimizer.zero_grad()
        loss.backward()
        self._check_finite("norm of the gradient", nn.utils.clip_grad_norm_(self.model.parameters(), self.clip), i)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        return loss.item()

    def _check_finite(self, what, value, i):
        if not torch.isfinite(value):
            kept = f" The last good state is in {self.path}." if self.path else ""
            raise TDQError(f"The {what} must stay finite; it is {value.item()} at iteration {i}. Lower rate.{kept}")

    def _save(self, iteration, log):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with beside(self.path) as part:
            torch.save({"iteration": iteration, "log": log, **state}, part)

    def _load(self):
        if self.path is None or not self.path.exists():
            return 0, []
        try:
            state = torch.load(self.path, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            return state["iteration"], state["log"]
        except Exception as error:
            message = f"{self.path} must be a state of this training, as it was saved: {error!r}. Delete it to start anew."
            raise DataError(message) from error


def state_path(out: str | Path, settings: dict[str, Any]) -> Path:
    """Path of the state in ``out``, which keeps its settings beside it. TDQError: it holds a run that began with others."""
    state, kept = Path(out) / "state.pt", Path(out) / "settings.json"
    check_folder(Path(out))
    settings = json.loads(json.dumps(described(settings), default=repr))
    if not state.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with beside(kept) as part:
            part.write_text(json.dumps(settings, indent=1) + "\n")
        return state
    other = read_json(kept) if kept.exists() else {}
    for name in {**settings, **other}:
        there, here = (repr(found[name]) if name in found else "its default" for found in (other, settings))
        if there != here:
            raise TDQError(f"A run goes on with the settings that it began with; {out} holds one with {name} = {there}, "
                           f"this one has {here}. Choose another out, or delete that folder.")  # fmt: skip
    return state


def described(value: Any, name: str = "") -> dict[str, Any]:
    """What tells settings apart: ``{dotted name: value}``, where a tensor or an array is a hash of its contents."""
    if isinstance(value, nn.Module):
        value = {"class": type(value).__name__, **dict(value.named_parameters()), **dict(value.named_buffers())}
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.compare}
    if isinstance(value, dict):
        parts = (described(part, f"{name}.{key}".lstrip(".")) for key, part in value.items())
        return dict(item for part in parts for item in part.items())
    if isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous().flatten()
        kind = f"{value.dtype} {[*value.shape]}".encode()
        value = hashlib.sha256(kind + tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {name: list(value) if isinstance(value, (tuple, range)) else value}
