"""What makes TDQ work: one question at a time, everything else as in the main table."""

from dataclasses import dataclass, replace

from tdq_utils.lab.tables.ptq import CALIBRATION, Job
from tdq_utils.method.generator import RawTime

CALIBRATED_STEPS = 50  # for the question of what happens at other numbers of steps
SAMPLED_STEPS = (10, 20, 50, 100)

# question -> variant -> arguments of calibrate. The published choice comes first.
VARIANTS = {
    "encoding of t": {"Fourier features": {}, "raw t": dict(features=RawTime())},
    "initial step size": {
        "the best of each step": {},
        "best constant": dict(follow=0.0),
        "mean + 3 std": dict(start="std", follow=0.0),
        "LSQ: 2 mean / sqrt(q_max)": dict(start="lsq", follow=0.0),
    },
    "linear layers": {str(depth): dict(depth=depth) for depth in (4, 1, 2, 3, 5)},
    "reconstruction of": {
        "each layer's input": {},
        "each block's output": dict(reconstruct="block"),
        "the predicted noise": dict(reconstruct="noise"),
    },
    "skip inputs": {"one quantizer": {}, "one for each half": {}},
    "calibration images": {str(n): {} for n in (CALIBRATION, 2, 8, 128)},
}
TRANSFER = "sampling steps"


@dataclass(frozen=True)
class Ablation(Job):
    """A row of the ablation table.

    Attributes:
        question: a key of ``VARIANTS``, or "sampling steps". variant: one of its variants, or the name of the method.
        calibrated_steps: of the trajectories that calibration sees.
    """

    question: str = ""
    variant: str = "-"
    calibrated_steps: int = 20

    @property
    def calibration(self):
        """``(trajectories, steps)`` that calibration sees."""
        return int(self.variant) if self.question == "calibration images" else CALIBRATION, self.calibrated_steps

    @property
    def options(self):
        """Further arguments of ``calibrate``."""
        return {**super().options, **VARIANTS.get(self.question, {}).get(self.variant, {})}

    @property
    def quantization(self):
        """Further arguments of ``quantize``."""
        return dict(split_skips=self.variant == "one for each half")

    @property
    def transfers(self):
        """Whether a table meets steps that it was not calibrated for."""
        return self.steps != self.calibrated_steps


def ablation_jobs(repeats=2, weights=8, activations=5):
    """The jobs of the ablation table, at one pair of bits: every variant of every question, ``repeats`` times."""
    jobs = []
    for repeat in range(repeats):
        base = Ablation("tdq", weights, activations, repeat)
        for steps in SAMPLED_STEPS:
            moved = replace(base, question=TRANSFER, calibrated_steps=CALIBRATED_STEPS, steps=steps)
            jobs.append(replace(moved, method="full precision", weights=0, activations=0))
            jobs += [replace(moved, method=method) for method in ("mse", "learned", "table", "tdq")]
        jobs += [
            replace(base, question=question, variant=variant) for question, variants in VARIANTS.items() for variant in variants
        ]
        # How many images a constant and a table need, beside how many the generator does.
        jobs += [
            replace(base, method=method, question="calibration images", variant=variant)
            for method in ("mse", "table")
            for variant in VARIANTS["calibration images"]
        ]
    return jobs
