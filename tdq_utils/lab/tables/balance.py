"""Time or channels? What balancing channels gives, alone and with intervals over t."""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from tdq_utils.lab.tables.ptq import Job

BITS = ((8, 5), (4, 4), (8, 6), (4, 5), (8, 4))
HEADLINE = BITS[:2]  # these get a third repeat
METHODS, BY_INPUT = ("mse", "table", "tdq"), ("dynamic-sample", "dynamic-token")
ELSEWHERE = ((8, 5), (8, 6), (4, 5), (8, 4))  # ptq.csv has the rows that are not balanced, but for those per token
RULES = ("smooth", "ptq4dit", "mse")  # beside "range", tried once at the headline bits


@dataclass(frozen=True)
class BalanceJob(Job):
    """A row of the table; ``rule``: by which channels are balanced, or "-"."""

    rule: str = "-"

    @property
    def choices(self) -> dict[str, Any]:
        """What is not as always: the balance."""
        return super().choices | ({} if self.rule == "-" else dict(balance=self.rule))


def balance_jobs(repeats: int = 2) -> list[BalanceJob]:
    """The jobs of the table, most wanted first: balanced by "range", with weights rounded to nearest or, of 4 bits, by AdaRound;
    at bits that the table of post-training quantization lacks, also without. Intervals by input, slowest to sample, last."""
    jobs, last = [], []
    for repeat in range(repeats + 1):
        jobs.append(BalanceJob("full precision", repeat=repeat))
        for w, a in BITS if repeat < repeats else HEADLINE:
            base = BalanceJob("", w, a, repeat, rule="range")
            jobs += [replace(base, method=method) for method in METHODS]
            jobs += [replace(base, method=method, rule="-") for method in METHODS if (w, a) not in ELSEWHERE]
            learned = [replace(base, method=method, weights_method="adaround") for method in ("mse", "tdq")]
            jobs += learned if (w, a) == HEADLINE[1] else []
            last += learned if w < 8 and (w, a) != HEADLINE[1] else []
            last += [replace(base, method=method) for method in BY_INPUT]
            last += [replace(base, method=method, rule="-") for method in BY_INPUT[(w, a) in ELSEWHERE :]]
    jobs += [BalanceJob("mse", w, a, rule=rule) for w, a in HEADLINE for rule in RULES]
    return jobs + last


def with_plain(balanced: pd.DataFrame, ptq: pd.DataFrame) -> pd.DataFrame:
    """The rows of this table, and those of post-training quantization at the same bits, methods and repeats (``rule`` "-")."""
    keys = ["method", "weights", "activations", "repeat", "weights_method"]
    wanted = balanced[keys].drop_duplicates()
    return pd.concat([balanced, ptq.assign(rule="-").merge(wanted)]).drop_duplicates([*keys, "rule"], ignore_index=True)
