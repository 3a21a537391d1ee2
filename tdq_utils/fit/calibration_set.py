"""The calibration set: samples (x_t, t) of the full-precision model's own trajectories, saved and loaded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.profile import write_arrays
from tdq_utils.denoiser.sampling import checked_seeds, sample, timesteps
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.quantize import full_precision

SKEWED = (0.4, 0.4)  # mean and deviation of t / T in PTQ4DM (Shang et al. 2023, the script of their code for DDIM)


def skewed_density(t: Any, num_train_timesteps: int = 1000) -> np.ndarray:
    """PTQ4DM's density over time steps, up to a factor: normal, skewed towards the clean end; like ``t``."""
    mean, std = (value * num_train_timesteps for value in SKEWED)
    return np.exp(-0.5 * ((np.asarray(t, float) - mean) / std) ** 2)


@dataclass
class CalibrationSet:
    """Pairs (x_t, t) that the full-precision model met while it sampled, with what the model was called with.

    ``x_t``: ``"sample channel height width"`` float32. ``t``: ``"sample"`` int64, descending. ``seeds``: ``"sample"`` int64, of
    each sample's trajectory. ``condition``: further arguments of the model, a row a sample. ``model``: the fingerprint of the
    model that made it. ``at``: how t was drawn, ``"uniform"`` or ``"skewed"``; ``"chosen"``: from a list.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    seeds: torch.Tensor
    model: str
    condition: dict[str, torch.Tensor] = field(default_factory=dict)
    at: str = "uniform"

    @staticmethod
    def collect(model: nn.Module, scheduler: Any, seeds: int | Iterable[int] = range(64), steps: int = 20,
                at: str | Iterable[int] = "uniform", per_seed: int | None = None,
                condition: dict[str, torch.Tensor] | None = None, **sampling: Any) -> "CalibrationSet":  # fmt: skip
        """Sample trajectories and keep some of their steps; same arguments, same set.

        Args:
            model, scheduler, seeds, steps, condition, sampling: as for :func:`tdq_utils.denoiser.sampling.sample`; a quantized
                model is run in full precision.
            at: ``"uniform"``: any step alike (Q-Diffusion); ``"skewed"``: steps drawn by :func:`skewed_density`
                (PTQ4DM); or a list of time steps to keep.
            per_seed: steps kept of each trajectory, drawn without replacement from the seed alone; default: all for
                "uniform", half for "skewed".

        TDQError: unknown ``at``, a time step that is not visited, ``per_seed`` out of range, a model in training mode.
        """
        check_eval(model)
        numbers, visited = checked_seeds(seeds), timesteps(scheduler, steps)
        at = at if isinstance(at, str) else list(at)
        kept = {seed: _kept(seed, visited, at, per_seed, scheduler.config.num_train_timesteps) for seed in numbers}
        found = []

        def keep(call):
            rows = [i for i, seed in enumerate(call["seeds"]) if call["t"] in kept[seed]]
            found.extend((call["t"], call["seeds"][i], call["x_t"][i].float().cpu()) for i in rows)

        with full_precision(model):
            made_by = fingerprint(model)
            sample(model, scheduler, numbers, steps, callback=keep, condition=condition, **sampling)
        found.sort(key=lambda pair: -pair[0])  # stable: within a t, in the order of the seeds
        t, owners, x_t = zip(*found, strict=True)
        row = {seed: i for i, seed in enumerate(numbers)}
        condition = {key: value[[row[seed] for seed in owners]] for key, value in (condition or {}).items()}
        drawn = at if isinstance(at, str) else "chosen"
        return CalibrationSet(torch.stack(x_t), torch.tensor(t), torch.tensor(owners), made_by, condition, drawn)

    def __len__(self) -> int:
        return len(self.t)

    def batches(self, batch_size: int = 16, device: str | torch.device = "cpu") -> Iterator[tuple]:
        """Batches on ``device`` whose samples share one t: ``(x_t, t, condition)``, t of shape ``"batch"``."""
        for value in self.t.unique().flip(0):
            for rows in (self.t == value).nonzero()[:, 0].split(batch_size):
                yield self._batch(rows, device)

    def draw(self, batch_size: int, generator: torch.Generator, device: str | torch.device = "cpu") -> tuple:
        """One batch of different samples, any t, as :meth:`batches` gives them."""
        return self._batch(torch.randperm(len(self), generator=generator)[:batch_size], device)

    def _batch(self, rows, device):
        x_t = self.x_t[rows].to(device).contiguous(memory_format=torch.channels_last)
        return x_t, self.t[rows].to(device), {key: value[rows].to(device) for key, value in self.condition.items()}

    def check(self, model: nn.Module) -> None:
        """TDQError: the set was made with another model."""
        check_made_by(model, self.model, "calibration set")

    def save(self, path: str | Path) -> None:
        """Write the set as npz (no pickles)."""
        arrays: dict[str, Any] = {f"condition.{key}": value.numpy() for key, value in self.condition.items()}
        write_arrays(path, **arrays, x_t=self.x_t, t=self.t, seeds=self.seeds, model=self.model, at=self.at)

    @staticmethod
    def load(path: str | Path) -> "CalibrationSet":
        """Read a set that :meth:`save` wrote. DataError: missing or damaged."""
        try:
            with np.load(path) as data:
                given = {key: data[key] for key in data.files}
            x_t, t, seeds = (torch.from_numpy(given.pop(key)) for key in ("x_t", "t", "seeds"))
            model, at = str(given.pop("model")), str(given.pop("at", "uniform"))
            condition = {key.removeprefix("condition."): torch.from_numpy(value) for key, value in given.items()}
            return CalibrationSet(x_t, t, seeds, model, condition, at)
        except Exception as error:
            raise DataError(f"{path} must be a calibration set as CalibrationSet.save writes it: {error!r}") from error


def check_eval(model: nn.Module) -> None:
    """TDQError: a part of the model is in training mode, where dropout would move what is measured."""
    with full_precision(model):  # quantizers have modes of their own
        training = [name or "the whole" for name, module in model.named_modules() if module.training]
    if training:
        raise TDQError(f"The model must be in evaluation mode; {training[0]} is in training mode. Call model.eval() first.")


def check_made_by(model: nn.Module, made_by: str, what: str) -> None:
    """TDQError: the fingerprint ``made_by`` of a calibration set or profile ("": unknown) is that of another model."""
    with full_precision(model):
        given = fingerprint(model)
    if made_by not in ("", given):
        raise TDQError(f"A {what} serves the model that made it, {made_by}; this model is {given}. Make another: "
                       "CalibrationSet.collect(model, scheduler, ...) or profile_activations.")  # fmt: skip


def _kept(seed, visited, at, per_seed, num_train_timesteps):
    if not isinstance(at, str):
        if not at or per_seed is not None:
            got = "an empty list" if not at else f"per_seed={per_seed}, too, which is for 'uniform' and 'skewed'"
            raise TDQError(f"at must name the time steps to keep, such as {visited[0]}; got {got}.")
        if unknown := set(at) - set(visited):
            raise TDQError(f"at must name visited time steps, {', '.join(map(str, visited))}; got {min(unknown)}.")
        return set(at)
    if at not in ("uniform", "skewed"):
        raise TDQError(f"at must be 'uniform', 'skewed' or a list of time steps; got {at!r}.")
    if per_seed is None:
        per_seed = len(visited) if at == "uniform" else (len(visited) + 1) // 2
    if per_seed not in range(1, len(visited) + 1):
        raise TDQError(f"per_seed must be from 1 to the {len(visited)} steps of a trajectory; got {per_seed}.")
    density = np.ones(len(visited)) if at == "uniform" else skewed_density(visited, num_train_timesteps)
    drawn = torch.multinomial(torch.from_numpy(density), per_seed, generator=torch.Generator().manual_seed(seed))
    return {visited[i] for i in drawn.tolist()}
