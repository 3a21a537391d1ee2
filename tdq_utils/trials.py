"""Short trainings that show what the choices behind the table of training do: rates, the generator, the grid."""

from dataclasses import dataclass, replace

from tdq_utils.qat import HEADLINE, QatJob
from tdq_utils.temporal import RawTime

# Rates of constants, by method; of TDQ's factors and networks, in pairs. All relative to the rate of the weights.
CONSTANT_RATES = {"lsq": (0.1, 1, 10, 100, 300), "pact": (10, 100, 300), "nipq": (10, 100, 300)}
TDQ_RATES = ((0, 1), (100, 1), (0, 3), (100, 0.3), (0, 10), (100, 3), (300, 1), (100, 10))

# What else might decide between TDQ and LSQ: variant -> arguments of calibrate.
VARIANTS = {
    "symmetric grid": dict(shifted=False),
    "no dropout": dict(dropout=0.0),
    "from the best constant": dict(follow=0.0),
    "raw t": dict(features=RawTime()),
}


@dataclass(frozen=True)
class Trial(QatJob):
    """A row of the table of trials.

    Attributes:
        variant: a key of ``VARIANTS``; "-": none.
    """

    variant: str = "-"

    @property
    def options(self):
        """Further arguments of ``calibrate``."""
        return {**super().options, **VARIANTS.get(self.variant, {})}


def trial_jobs(iterations=150, batch=64):
    """The jobs of the table of trials, at W4A4: every method at several rates; TDQ, and LSQ where it applies, in variants."""
    untrained = Trial("full precision", iterations=0, batch=0, step_rate=0.0)
    start = replace(untrained, weights=HEADLINE[0], activations=HEADLINE[1], iterations=iterations, batch=batch)
    rates = [(method, rate, 0) for method, rates in CONSTANT_RATES.items() for rate in rates]
    rates += [("tdq", *pair) for pair in TDQ_RATES]
    jobs = [replace(start, method=name, step_rate=float(a), generator_rate=float(b)) for name, a, b in rates]
    lsq, tdq = start.trained("lsq"), start.trained("tdq")
    jobs += [replace(job, variant="symmetric grid") for job in (lsq, tdq)]
    jobs += [replace(job, split_skips=True) for job in (lsq, tdq)]
    jobs += [replace(tdq, variant=variant) for variant in VARIANTS if variant != "symmetric grid"]
    return [untrained, *jobs]
