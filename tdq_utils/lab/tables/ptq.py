"""The table of post-training quantization: what a row is, and which rows there are."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import DYNAMIC, METHODS, quantize

BITS = ((8, 8), (8, 6), (8, 5), (8, 4), (4, 8), (4, 5))
HEADLINE = ((8, 6), (8, 5), (4, 5))  # these get a third repeat
QUICK_BITS = ((8, 5), (4, 5))
CALIBRATION = 32  # trajectories


@dataclass(frozen=True)
class Job:
    """One row to measure; its fields are the columns that tell rows apart.

    Attributes:
        method: one of ``METHODS``, "full precision" or "real images". weights, activations: bits, 0 for full precision.
        repeat: number of the noise and calibration seeds. weights_method: "nearest" or "adaround".
        steps: sampling steps.
    """

    method: str
    weights: int = 0
    activations: int = 0
    repeat: int = 0
    weights_method: str = "nearest"
    steps: int = 20

    @property
    def name(self):
        """Name of the folder for what :meth:`prepare` keeps."""
        return "-".join(map(str, asdict(self).values()))

    def folder(self, cache, model):
        """Where :meth:`prepare` keeps what it has made of the model."""
        return Path(cache) / f"{fingerprint(model)}-{self.name}"

    @property
    def calibration(self):
        """``(trajectories, steps)`` that calibration sees."""
        return CALIBRATION, self.steps

    @property
    def options(self):
        """Further arguments of ``calibrate``."""
        return dict(seed=self.repeat) if self.method in ("learned", "tdq") else {}

    @property
    def quantization(self):
        """Further arguments of ``quantize``."""
        return {}

    @property
    def transfers(self):
        """Whether a table meets steps that it was not calibrated for."""
        return False

    def prepare(self, model, scheduler, calibration, folder, progress=False):
        """Quantize and calibrate the model, in place.

        Args:
            calibration: function -> ``(data, profile)`` that calibration sees; the profile is ``None`` before the model is
                quantized. folder: for what a long preparation keeps to go on from. progress: show bars.

        Returns:
            Further columns of the row.
        """
        quantize(model, self.weights or None, self.activations or None, self.method, **self.quantization)
        data, profile = calibration()
        learned = dict(weights_method="adaround", data=data) if self.weights_method == "adaround" else {}
        calibrate(model, scheduler, profile=profile, **learned, progress=progress, **self.options)
        return {}


def ptq_jobs(quick=False, steps=20, repeats=2):
    """The jobs of the table of post-training quantization, most wanted first.

    Full precision and real images once a repeat; then every method at every pair of bits, ``repeats`` times and
    once more at the headline settings; the dynamic intervals, slowest to sample, at the end.
    ``quick``: one repeat of W8A5 and W4A5.
    """
    bits, repeats = (QUICK_BITS, 1) if quick else (BITS, repeats)
    jobs = []
    for repeat in range(repeats + (not quick)):
        wanted = bits if repeat < repeats else HEADLINE
        wanted = sorted(wanted, key=lambda pair: pair not in HEADLINE)
        jobs += [Job("full precision", repeat=repeat), Job("real images", repeat=repeat)]
        jobs += [Job(method, w, a, repeat) for w, a in wanted for method in METHODS]
        if not quick:  # learned rounding of weights matters where they have few bits
            jobs += [Job(method, w, a, repeat, "adaround") for w, a in wanted if w < 8 for method in ("mse", "tdq")]
    jobs.sort(key=lambda job: job.method in DYNAMIC)
    return [replace(job, steps=steps) for job in jobs]
