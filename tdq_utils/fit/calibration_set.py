"""The calibration set: samples (x_t, t) of the full-precision model's own trajectories, saved and loaded."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdq_utils.denoiser.call import each_tensor, joined
from tdq_utils.denoiser.files import write_arrays
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.record import Calls
from tdq_utils.denoiser.sampling import asker, checked_seeds, sample, timesteps
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

    ``x_t``: what the model got, ``"sample channel height width"``, in its dtype. ``t``: ``"sample"``, as it was told. ``seeds``:
    ``"sample"`` int64, of each sample's trajectory. ``condition``: further arguments of the model, a row a sample. ``model``: the
    fingerprint of the model that made it. ``at``: how t was drawn, ``"uniform"`` or ``"skewed"``; ``"chosen"``: from a list.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    seeds: torch.Tensor
    model: str
    condition: dict[str, Any] = field(default_factory=dict)
    at: str = "uniform"

    @staticmethod
    def collect(model: nn.Module, scheduler: Any, seeds: int | Iterable[int] = range(64), steps: int = 20,
                at: str | Iterable[int] = "uniform", per_seed: int | None = None,
                condition: dict[str, Any] | None = None, **sampling: Any) -> "CalibrationSet":  # fmt: skip
        """Sample trajectories and keep some of their steps; same arguments, same set.

        Args:
            model, scheduler, seeds, steps, condition, sampling: as for :func:`tdq_utils.denoiser.sampling.sample`; a quantized
                model is run in full precision. Of a guided trajectory both calls are kept.
            at: ``"uniform"``: any step alike (Q-Diffusion); ``"skewed"``: steps drawn by :func:`skewed_density`
                (PTQ4DM); or a list of time steps to keep.
            per_seed: steps kept of each trajectory, drawn without replacement from the seed alone; default: all for
                "uniform", half for "skewed".

        TDQError: unknown ``at``, a time step that is not visited, ``per_seed`` out of range, a model in training mode.
        """
        check_eval(model)
        numbers = checked_seeds(seeds)
        if callable(condition):
            raise TDQError("A calibration set needs conditions with a row a seed; got a function. Record calls instead: "
                           "record(model, inputs=n) around sample(...), then data=recorded.inputs.")  # fmt: skip
        visited = timesteps(scheduler, steps, model, **(sampling.get("scheduling") or {}))
        if not isinstance(at, (str, Iterable)):
            raise TDQError(f"at must be 'uniform', 'skewed' or a list of time steps; got {at!r}.")
        at = at if isinstance(at, str) else list(at)
        kept = {seed: _kept(seed, visited, at, per_seed, scheduler.config.num_train_timesteps) for seed in numbers}
        found = []

        def keep(call):
            rows = [i for i, seed in enumerate(call["seeds"]) if call["t"] in kept[seed]]
            found.extend((call["t"], call["seeds"][i], call["rows"][i], call["input"][i].cpu()) for i in rows)

        with full_precision(model):
            made_by = fingerprint(model)
            sample(model, scheduler, numbers, steps, callback=keep, condition=condition, **sampling)
        found.sort(key=lambda call: -call[0])  # stable: within a t, in the order of the seeds
        t, owners, rows, x_t = (list(column) for column in zip(*found, strict=True))
        guided, how = sampling.get("guidance") is not None, at if isinstance(at, str) else "chosen"
        asked = asker(model, len(numbers), condition, sampling.get("negative"), sampling.get("guidance"))(rows)
        given = joined(asked.condition, asked.negative) if guided else asked.condition
        x_t, t, owners = (column * (1 + guided) for column in (x_t, t, owners))
        return CalibrationSet(
            torch.stack(x_t), torch.tensor(t), torch.tensor(owners), made_by, each_tensor(Tensor.cpu, given), how
        )

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
        x_t = self.x_t[rows].to(device)
        x_t = x_t.contiguous(memory_format=torch.channels_last) if x_t.dim() == 4 else x_t
        return x_t, self.t[rows].to(device), each_tensor(lambda value: value[rows].to(device), self.condition)

    def check(self, model: nn.Module) -> None:
        """TDQError: the set was made with another model."""
        check_made_by(model, self.model, "calibration set")

    def save(self, path: str | Path) -> None:
        """Write the set as npz (no pickles)."""
        arrays: dict[str, Any] = dict(_flat("condition", self.condition)) | dict(x_t=self.x_t, t=self.t, seeds=self.seeds)
        kinds = json.dumps({name: str(value.dtype).removeprefix("torch.") for name, value in arrays.items()})
        arrays = {name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in arrays.items()}
        write_arrays(path, **arrays, model=self.model, at=self.at, kinds=kinds)

    @staticmethod
    def load(path: str | Path) -> "CalibrationSet":
        """Read a set that :meth:`save` wrote. DataError: missing or damaged."""
        try:
            with np.load(path) as data:
                given = {key: data[key] for key in data.files}
            model, at, kinds = str(given.pop("model")), str(given.pop("at", "uniform")), json.loads(str(given.pop("kinds", "{}")))
            tensors = {name: torch.from_numpy(value) for name, value in given.items()}
            tensors = {name: value.to(getattr(torch, kinds[name])) if name in kinds else value for name, value in tensors.items()}
            x_t, t, seeds = (tensors.pop(key) for key in ("x_t", "t", "seeds"))
            condition: dict[str, Any] = {}
            for name, value in tensors.items():
                _, *path, last = name.split(".")
                reduce(lambda tree, key: tree.setdefault(key, {}), path, condition)[last] = value
            return CalibrationSet(x_t, t, seeds, model, condition, at)
        except Exception as error:
            raise DataError(f"{path} must be a calibration set as CalibrationSet.save writes it: {error!r}") from error


def _flat(name, tree):
    """``(dotted name, tensor)`` of a tree of dicts. TDQError: other things are in it."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(f"{name}.{key}", value)
    else:
        raise TDQError(
            f"A set is saved with conditions that are tensors, in dicts; {name} is a {type(tree).__name__}. Leave it out."
        )


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
                       "record(model), CalibrationSet.collect(model, scheduler, ...) or profile_activations.")  # fmt: skip


def check_data(model: nn.Module, data: Any) -> None:
    """TDQError: ``data`` is nothing that a model can run on, or was made by another model."""
    if not isinstance(data, (CalibrationSet, Calls)):
        raise TDQError(f"data must be a CalibrationSet, or recorded.inputs of record(model, inputs=n); got {data!r}. Read a file "
                       "with CalibrationSet.load.")  # fmt: skip
    check_made_by(model, data.model, "calibration set")


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
