"""The table of post-training quantization: what a row is, and which rows there are."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.profile import Profile
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.quantize import DYNAMIC, METHODS, quantize

SEEDS = 1_000_000  # repeat r samples the seeds from r * SEEDS on and calibrates on others of the same million
BITS = ((8, 8), (8, 6), (8, 5), (8, 4), (4, 8), (4, 5))
HEADLINE = ((8, 6), (8, 5), (4, 5))  # these get a third repeat
QUICK_BITS = ((8, 5), (4, 5))
# Left out: of the shipped UNet only the 16 layers of its attention have tokens; TFMQ-DM's ranges are in a table of neighbours.
LEFT_OUT = ("dynamic-token", "finite-set")
CALIBRATION = 32  # trajectories

Calibrated = Callable[[], tuple[CalibrationSet | None, Profile | None]]
Training = Callable[[], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """One row to measure; its fields are the columns that tell rows apart.

    Attributes:
        method: one of ``METHODS``, "full precision" or "real images". weights, activations: bits, 0 for full precision.
        repeat: number of the noise and calibration seeds. weights_method: "nearest" or "adaround".
        steps: sampling steps. first_calibrated: seed of a repeat's calibration, counted from its first seed of noise."""

    method: str
    weights: int = 0
    activations: int = 0
    repeat: int = 0
    weights_method: str = "nearest"
    steps: int = 20
    first_calibrated: ClassVar[int] = SEEDS // 2

    @property
    def name(self) -> str:
        """Of the work that is done for this row: jobs with one name share its folder."""
        return "-".join(map(str, asdict(self).values()))

    def folder(self, cache: str | Path, model: nn.Module) -> Path:
        """Where :meth:`prepare` keeps what it makes of the model, with the number of threads that there are now."""
        return Path(cache) / f"{fingerprint(model)}-{torch.get_num_threads()}-{self.name}"

    @property
    def choices(self) -> dict[str, Any]:
        """What is not as always: ``trajectories`` of calibration, what ``quantize`` takes, arguments of ``calibrate``."""
        return dict(seed=self.repeat) if self.method in ("learned", "tdq") else {}

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of ``calibrate``."""
        return {name: value for name, value in self.choices.items() if name not in ("trajectories", "split_skips", "balance")}

    @property
    def split_inputs(self) -> bool:
        """Whether the halves of skip inputs are quantized apart."""
        return self.choices.get("split_skips", False)

    @property
    def balance(self) -> str | None:
        """The rule that channels are balanced by."""
        return self.choices.get("balance")

    @property
    def calibration(self) -> tuple[range, int]:
        """``(seeds, steps)`` of the trajectories that calibration sees; steps: those of sampling, if the job has no others."""
        first = self.repeat * SEEDS + self.first_calibrated
        return range(first, first + self.choices.get("trajectories", CALIBRATION)), getattr(self, "calibrated_steps", self.steps)

    def prepare(self, model: nn.Module, scheduler: SchedulerMixin, calibration: Calibrated, folder: Path, training: Training,
                progress: bool = False) -> dict[str, Any]:  # fmt: skip
        """Quantize and calibrate the model, in place; return further columns of the row.

        ``calibration``: function -> ``(data, profile)`` that calibration sees, the profile ``None`` before the model is
        quantized; ``folder``: for what a long preparation keeps to go on from; ``training``: function -> ``(images, further
        arguments)`` of ``finetune``; ``progress``: show bars."""
        how = dict(split_skips=self.split_inputs, balance=self.balance)
        quantize(model, self.weights or None, self.activations or None, self.method, **how)
        data, profile = calibration()
        seen: dict[str, Any] = dict(data=data) if self.balance else dict(profile=profile)
        if self.weights_method == "adaround":
            seen |= dict(weights_method="adaround", data=data)
        calibrate(model, scheduler, **seen, progress=progress, **self.options)
        return {}


def ptq_jobs(quick: bool = False, steps: int = 20, repeats: int = 2) -> list[Job]:
    """The jobs of the table, most wanted first; dynamic intervals, slowest to sample, last. ``quick``: W8A5 and W4A5, once.

    Every method at every pair of bits ``repeats`` times, once more at the headline settings; references once a repeat."""
    bits, repeats = (QUICK_BITS, 1) if quick else (BITS, repeats)
    jobs = []
    for repeat in range(repeats + (not quick)):
        wanted = sorted(bits if repeat < repeats else HEADLINE, key=lambda pair: pair not in HEADLINE)
        jobs += [Job("full precision", repeat=repeat), Job("real images", repeat=repeat)]
        jobs += [Job(method, w, a, repeat) for w, a in wanted for method in METHODS if method not in LEFT_OUT]
        if not quick:  # learned rounding of weights matters where they have few bits
            jobs += [Job(method, w, a, repeat, "adaround") for w, a in wanted if w < 8 for method in ("mse", "tdq")]
    jobs.sort(key=lambda job: job.method in DYNAMIC)
    return [replace(job, steps=steps) for job in jobs]
