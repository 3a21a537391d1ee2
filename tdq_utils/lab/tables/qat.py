"""The table of quantization-aware training: every method in one loop, with its controls."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from diffusers import SchedulerMixin
from torch import nn

from tdq_utils.denoiser.files import beside
from tdq_utils.errors import TDQError
from tdq_utils.fit.finetuning import FINETUNED, GENERATOR_RATE, STEP_RATE, finetune
from tdq_utils.fit.quantize import freeze
from tdq_utils.lab.tables.ptq import Calibrated, Job, Training
from tdq_utils.run.storage import save_quantized

BITS = ((4, 4), (3, 3), (4, 8), (8, 8))
HEADLINE = (4, 4)  # gets a second repeat, and TDQ on the other rules
FEWEST = (3, 3)  # gets a second repeat of LSQ and TDQ
METHODS, UNTRAINED = ("lsq", "tdq", "pact", "nipq"), ("mse", "tdq")  # trained; what calibration alone does at the same bits
LONGER = 3  # times the iterations, once for LSQ and TDQ: what the difference comes to
SAMPLED_STEPS = (10, 50, 100)  # at which full precision, LSQ and TDQ are sampled, too
TOLD_APART = ("method", "weights", "activations", "repeat", "iterations", "step_rate", "generator_rate", "split_skips")


@dataclass(frozen=True)
class QatJob(Job):
    """A row of the table: a training, or a control.

    Attributes:
        iterations: of training, by a ``method`` of ``FINETUNED`` or "fine-tuned", in full precision; 0: calibration alone.
        batch, step_rate, generator_rate, split_skips: as for :func:`tdq_utils.fit.finetuning.finetune`, or 0.
        calibrated_steps: of the trajectories that calibration, which training starts from, sees."""

    iterations: int = 600
    batch: int = 64
    step_rate: float = STEP_RATE
    generator_rate: float = 0.0
    calibrated_steps: int = 20
    split_skips: bool = False

    @property
    def name(self) -> str:
        """One training serves every number of sampling steps."""
        return super().name if self.steps == self.calibrated_steps else replace(self, steps=self.calibrated_steps).name

    @property
    def choices(self) -> dict[str, Any]:
        """What is not as always; a training gives its seed to calibration itself."""
        return {**({} if self.iterations else super().choices), **(dict(split_skips=True) if self.split_skips else {})}

    def trained(self, method: str, **settings: Any) -> Self:
        """The row of a training by ``method`` at the default rates; ``settings``: further fields."""
        if source := FINETUNED.get(method, ("", ""))[1]:
            settings = dict(step_rate=STEP_RATE, generator_rate=GENERATOR_RATE * (source == "tdq")) | settings
        return replace(self, method=method, **settings)

    def prepare(self, model: nn.Module, scheduler: SchedulerMixin, calibration: Calibrated, folder: Path, training: Training,
                progress: bool = False) -> dict[str, Any]:  # fmt: skip
        """Train in place, or calibrate. Goes on from ``folder``; leaves there ``loss.csv`` and ``model/``: frozen, packed."""
        if self.iterations == 0:
            return super().prepare(model, scheduler, calibration, folder, training, progress)
        method = "lsq" if self.method == "fine-tuned" else self.method
        how = {name: getattr(self, name) for name in ("iterations", "batch", "step_rate", "generator_rate", "split_skips")}
        images, condition = training()
        losses = finetune(model, scheduler, images, method, weights=self.weights or None, activations=self.activations or None,
                          seed=self.repeat, out=folder, progress=progress, data=calibration()[0], **condition, **how,
                          **self.options)  # fmt: skip
        pd.DataFrame({"loss": losses}).to_csv(folder / "loss.csv", index_label="iteration", float_format="%.5g")
        frozen = copy.deepcopy(model)
        freeze(frozen, scheduler, max(SAMPLED_STEPS))  # whose time steps include those of all the others
        save_quantized(frozen, folder / "model", packed=self.weights > 0)
        return dict(loss=np.mean(losses[-100:]))


def qat_jobs(quick: bool = False, steps: int = 20, iterations: int = 600, batch: int = 64) -> list[QatJob]:
    """The jobs of the table, most wanted first. ``quick``: W4A4 with LSQ and TDQ alone. TDQError: steps that are not frozen."""
    if max(SAMPLED_STEPS) % steps:
        raise TDQError(f"steps must divide {max(SAMPLED_STEPS)}, for which trained models are frozen; got {steps}.")
    untrained = QatJob("full precision", steps=steps, iterations=0, batch=0, step_rate=0.0, calibrated_steps=steps)
    headline = replace(untrained, weights=HEADLINE[0], activations=HEADLINE[1])
    train = partial(QatJob.trained, iterations=iterations, batch=batch)
    jobs = []
    for repeat in range(1 if quick else 2):
        jobs += [replace(untrained, method=name, repeat=repeat) for name in ("full precision", "real images")]
        jobs += [replace(headline, method=name, repeat=repeat) for name in UNTRAINED]
        jobs += [train(replace(headline, repeat=repeat), name) for name in METHODS[:2]]
    if quick:
        return jobs
    compared = [job for job in jobs if job.iterations]
    for repeat in range(2):
        jobs += [train(replace(headline, repeat=repeat), name) for name in (*METHODS[2:], "tdq-pact", "tdq-nipq")]
        jobs += [train(replace(untrained, repeat=repeat), "fine-tuned")]
    full = [job for job in jobs if job.method == "full precision"]
    jobs += [replace(job, steps=other) for other in SAMPLED_STEPS for job in (*full, *compared)]
    for w, a in BITS:
        start = replace(untrained, weights=w, activations=a)
        jobs += [replace(start, method=name) for name in UNTRAINED] + [train(start, name) for name in METHODS]
        jobs += [train(replace(start, repeat=1), name) for name in METHODS[:2] if (w, a) == FEWEST]
    # Controls: generators without a factor, as published; constants that hardly move.
    jobs += [replace(job, step_rate=0.1 if job.method == "lsq" else 0.0) for job in compared]
    jobs += [replace(job, iterations=LONGER * iterations) for job in compared[:2]]
    return list(dict.fromkeys(jobs))


def default_trainings(table: pd.DataFrame) -> pd.Series:
    """Which rows, of the table or its losses, are trainings by the defaults of ``finetune``: no other rates, longer, or split."""
    shortest = table.iterations[table.iterations > 0].min()
    return (table.iterations == shortest) & ~table.split_skips & ((table.step_rate == STEP_RATE) | (table.method == "fine-tuned"))


def add_losses(path: str | Path, jobs: Iterable[QatJob], cache: str | Path, model: nn.Module, every: int = 20) -> None:
    """Write the losses that the trainings of ``model`` among ``jobs`` left in ``cache`` into a CSV; others that it holds stay.

    Columns: ``TOLD_APART``, ``iteration`` (the last of ``every``), ``loss`` (the mean of these). No trainings, no file."""
    known = [pd.read_csv(path)] if Path(path).exists() else []
    for folder, job in {job.folder(cache, model): job for job in jobs if job.iterations}.items():
        if (folder / "loss.csv").exists():
            loss = pd.read_csv(folder / "loss.csv").loss
            means, who = loss.groupby(loss.index // every).mean(), {key: getattr(job, key) for key in TOLD_APART}
            known.append(pd.DataFrame(dict(**who, iteration=np.minimum((means.index + 1) * every, len(loss)), loss=means)))
    if known:
        with beside(Path(path)) as part:
            rows = pd.concat(known).drop_duplicates([*TOLD_APART, "iteration"], keep="last")
            rows.to_csv(part, index=False, float_format="%.5g")
