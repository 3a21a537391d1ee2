"""The calibration set: samples (x_t, t) of the full-precision model's own trajectories, saved and loaded."""

from dataclasses import dataclass, field

import numpy as np
import torch

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.sampling import checked_seeds, sample, timesteps
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.quantize import full_precision

# PTQ4DM draws t from a normal distribution (mean, standard deviation), in units of the training steps T.
SKEWED = (0.4, 0.4)  # Shang et al. 2023, the script of their code for DDIM


def skewed_density(t, num_train_timesteps=1000):
    """PTQ4DM's density over time steps, up to a factor: normal, skewed towards the clean end; like ``t``."""
    mean, std = (value * num_train_timesteps for value in SKEWED)
    return np.exp(-0.5 * ((np.asarray(t, float) - mean) / std) ** 2)


@dataclass
class CalibrationSet:
    """Pairs (x_t, t) that the full-precision model met while it sampled, with what the model was called with.

    Attributes:
        x_t: ``"sample channel height width"`` float32. t: ``"sample"`` int64, descending.
        seeds: ``"sample"`` int64, the seed of each sample's trajectory.
        model: :func:`tdq_utils.denoiser.loading.fingerprint` of the model that made it.
        condition: further arguments of the model, each with one row a sample.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    seeds: torch.Tensor
    model: str
    condition: dict = field(default_factory=dict)

    @staticmethod
    def collect(model, scheduler, seeds=range(64), steps=20, at="uniform", per_seed=None, condition=None, **sampling):
        """Sample trajectories and keep some of their steps; same arguments, same set.

        Args:
            model, scheduler, seeds, steps, condition: as for :func:`tdq_utils.denoiser.sampling.sample`; a quantized model is
                run in full precision.
            at: ``"uniform"``: any step alike (Q-Diffusion); ``"skewed"``: steps drawn by :func:`skewed_density`
                (PTQ4DM); or a list of time steps to keep.
            per_seed: steps kept of each trajectory, drawn without replacement from the seed alone; default:
                all for "uniform", half for "skewed".
            sampling: ``batch_size``, ``progress`` of ``sample``.

        Raises:
            TDQError: unknown ``at``, a time step that is not visited, ``per_seed`` out of range.
        """
        seeds = checked_seeds(seeds)
        visited = timesteps(scheduler, steps)
        kept = {seed: _kept(seed, visited, at, per_seed, scheduler.config.num_train_timesteps) for seed in seeds}
        found = []

        def keep(call):
            rows = [i for i, seed in enumerate(call["seeds"]) if call["t"] in kept[seed]]
            found.extend((call["t"], call["seeds"][i], call["x_t"][i].float().cpu()) for i in rows)

        with _aside(model):
            made_by = fingerprint(model)
            sample(model, scheduler, seeds, steps, callback=keep, condition=condition, **sampling)
        found.sort(key=lambda pair: -pair[0])  # stable: within a t, in the order of the seeds
        t, owners, x_t = zip(*found, strict=True)
        row = {seed: i for i, seed in enumerate(seeds)}
        condition = {key: value[[row[seed] for seed in owners]] for key, value in (condition or {}).items()}
        return CalibrationSet(torch.stack(x_t), torch.tensor(t), torch.tensor(owners), made_by, condition)

    def __len__(self):
        return len(self.t)

    def batches(self, batch_size=16, device="cpu"):
        """Batches on ``device`` whose samples share one t: ``(x_t, t, condition)``, t of shape ``"batch"``."""
        for value in self.t.unique().flip(0):
            for rows in (self.t == value).nonzero()[:, 0].split(batch_size):
                yield self._batch(rows, device)

    def draw(self, batch_size, generator, device="cpu"):
        """One batch of different samples, any t, as :meth:`batches` gives them."""
        return self._batch(torch.randperm(len(self), generator=generator)[:batch_size], device)

    def _batch(self, rows, device):
        x_t = self.x_t[rows].to(device).contiguous(memory_format=torch.channels_last)
        return x_t, self.t[rows].to(device), {key: value[rows].to(device) for key, value in self.condition.items()}

    def check(self, model):
        """TDQError: the set was made with another model."""
        with _aside(model):
            given = fingerprint(model)
        if given != self.model:
            raise TDQError(
                f"A calibration set serves the model that made it, {self.model}; this model is {given}. "
                "Collect another with CalibrationSet.collect(model, scheduler, ...)."
            )

    def save(self, path):
        """Write the set as npz (no pickles)."""
        condition = {f"condition.{key}": value.numpy() for key, value in self.condition.items()}
        np.savez_compressed(path, x_t=self.x_t, t=self.t, seeds=self.seeds, model=np.array(self.model), **condition)

    @staticmethod
    def load(path):
        """Read a set that :meth:`save` wrote. DataError: missing or damaged."""
        try:
            with np.load(path) as data:
                x_t, t, seeds = (torch.from_numpy(data[key]) for key in ("x_t", "t", "seeds"))
                condition = {
                    key.removeprefix("condition."): torch.from_numpy(data[key])
                    for key in data.files
                    if key.startswith("condition.")
                }
                return CalibrationSet(x_t, t, seeds, str(data["model"]), condition)
        except Exception as error:
            raise DataError(f"{path} must be a calibration set as CalibrationSet.save writes it: {error!r}") from error


def _kept(seed, visited, at, per_seed, num_train_timesteps):
    """The time steps that are kept of one trajectory."""
    if not isinstance(at, str):
        if unknown := set(at) - set(visited):
            raise TDQError(f"at must name visited time steps, {', '.join(map(str, visited))}; got {min(unknown)}.")
        return set(at)
    if at not in ("uniform", "skewed"):
        raise TDQError(f"at must be 'uniform', 'skewed' or a list of time steps; got {at!r}.")
    per_seed = per_seed or (len(visited) if at == "uniform" else (len(visited) + 1) // 2)
    if not 1 <= per_seed <= len(visited):
        raise TDQError(f"per_seed must be from 1 to the {len(visited)} steps of a trajectory; got {per_seed}.")
    density = np.ones(len(visited)) if at == "uniform" else skewed_density(visited, num_train_timesteps)
    drawn = torch.multinomial(torch.from_numpy(density), per_seed, generator=torch.Generator().manual_seed(seed))
    return {visited[i] for i in drawn.tolist()}


def _aside(model):
    """A context in which the model is its full-precision self, quantized or not."""
    return full_precision(model) if hasattr(model, "quantization") else torch.no_grad()
