"""What makes TDQ work: one question at a time, everything else as in the main table."""

from dataclasses import dataclass, replace
from typing import Any

from tdq_utils.lab.tables.ptq import CALIBRATION, Job
from tdq_utils.method.generator import RawTime

CALIBRATED_STEPS, SAMPLED_STEPS = 50, (10, 20, 50, 100)  # for the question of what happens at other numbers of steps

# question -> variant -> what is chosen otherwise. The published choice comes first.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "encoding of t": {"Fourier features": {}, "raw t": dict(features=RawTime())},
    "initial step size": {"the best of each step": {}, "best constant": dict(follow=0.0),
                          "mean + 3 std": dict(start="std", follow=0.0),
                          "LSQ: 2 mean / sqrt(q_max)": dict(start="lsq", follow=0.0)},
    "linear layers": {str(depth): dict(depth=depth) for depth in (4, 1, 2, 3, 5)},
    "reconstruction of": {"each layer's input": {}, "each block's output": dict(reconstruct="block"),
                          "the predicted noise": dict(reconstruct="noise")},
    "skip inputs": {"one quantizer": {}, "one for each half": dict(split_skips=True)},
    "calibration images": {str(n): dict(trajectories=n) for n in (CALIBRATION, 2, 8, 128)},
}  # fmt: skip


@dataclass(frozen=True)
class Ablation(Job):
    """A row of the ablation table: a variant (or "-") of a question of ``VARIANTS``; steps of the trajectories of calibration."""

    question: str = "-"
    variant: str = "-"
    calibrated_steps: int = 20

    @property
    def choices(self) -> dict[str, Any]:
        """What is not as always: the variant."""
        return {**super().choices, **VARIANTS.get(self.question, {}).get(self.variant, {})}


def ablation_jobs(repeats: int = 2, weights: int = 8, activations: int = 5) -> list[Ablation]:
    """The jobs of the ablation table, at one pair of bits: every variant of every question, ``repeats`` times."""
    jobs = []
    for repeat in range(repeats):
        base = Ablation("tdq", weights, activations, repeat)
        for steps in SAMPLED_STEPS:
            moved = replace(base, question="sampling steps", calibrated_steps=CALIBRATED_STEPS, steps=steps)
            jobs.append(replace(moved, method="full precision", weights=0, activations=0))
            jobs += [replace(moved, method=method) for method in ("mse", "learned", "table", "tdq")]
        jobs += [replace(base, question=question, variant=name) for question, variants in VARIANTS.items() for name in variants]
        # How many images a constant and a table need, beside how many the generator does.
        images = [replace(base, question="calibration images", variant=name) for name in VARIANTS["calibration images"]]
        jobs += [replace(job, method=method) for method in ("mse", "table") for job in images]
    return jobs
