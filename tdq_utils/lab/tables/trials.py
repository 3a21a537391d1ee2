"""Short trainings that show what the choices behind the table of training do: rates, the generator, the grid."""

from dataclasses import dataclass, replace
from typing import Any

from tdq_utils.lab.tables.qat import HEADLINE, QatJob
from tdq_utils.method.generator import RawTime

# Rates of constants, by method; of TDQ's factors and networks, in pairs. All relative to the rate of the weights.
CONSTANT_RATES = {"lsq": (0.1, 1, 10, 100, 300), "pact": (10, 100, 300), "nipq": (10, 100, 300)}
TDQ_RATES = ((0, 1), (100, 1), (0, 3), (100, 0.3), (100, 3), (300, 1))
EIGHT_BITS = (("lsq", "-"), ("pact", "-"), ("pact", "decay 1e-5"), ("pact", "decay 1e-6"))  # what PACT's decay is to eight bits

# What else might decide: variant -> methods that it is tried with, arguments of finetune and calibrate.
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "symmetric grid": (("lsq", "tdq"), dict(shifted=False)),
    "no dropout": (("tdq",), dict(dropout=0.0)),
    "from the best constant": (("tdq",), dict(follow=0.0)),
    "raw t": (("tdq",), dict(features=RawTime())),
    **{f"decay {decay}": (("pact",), dict(decay=float(decay))) for decay in ("1e-3", "1e-5", "1e-6")},
}


@dataclass(frozen=True)
class Trial(QatJob):
    """A row of the table of trials; ``variant``: a key of ``VARIANTS``, or "-"."""

    variant: str = "-"

    @property
    def choices(self) -> dict[str, Any]:
        """What is not as always: the variant."""
        return {**super().choices, **VARIANTS.get(self.variant, ((), {}))[1]}


def trial_jobs(iterations: int = 150, batch: int = 64) -> list[Trial]:
    """The jobs of the table of trials, at W4A4 (``EIGHT_BITS``: W8A8): several rates, and variants of one thing at a time."""
    untrained = Trial("full precision", iterations=0, batch=0, step_rate=0.0)
    start = replace(untrained, weights=HEADLINE[0], activations=HEADLINE[1], iterations=iterations, batch=batch)
    rates = [(method, rate, 0) for method, rates in CONSTANT_RATES.items() for rate in rates] + [("tdq", *r) for r in TDQ_RATES]
    jobs = [replace(start, method=name, step_rate=float(a), generator_rate=float(b)) for name, a, b in rates]
    jobs += [start.trained(method, split_skips=True) for method in ("lsq", "tdq")]
    jobs += [start.trained(method, variant=name) for name, (methods, _) in VARIANTS.items() for method in methods]
    jobs += [replace(start.trained(method, variant=name), weights=8, activations=8) for method, name in EIGHT_BITS]
    return [untrained, *jobs]
