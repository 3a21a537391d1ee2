"""Judges of the exercises on lesson 06: repeats, changes, other numbers of steps, and halves of an input."""

import torch
from torch import Tensor

from tdq_utils.fit.layers import ActivationQuantizer, SplitQuantizer
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import StaticStep, TableStep
from tdq_utils.show.checks.compare import Case, Check

STATIC = ("minmax", "mse", "learned")


def _wins(static: Tensor, tdq: Tensor) -> bool:
    import pandas as pd

    from tdq_utils.lab.tables.quickstart import verdict

    rows = [dict(method=method, repeat=repeat, fcd=fcd)
            for method, values in zip((*STATIC, "tdq"), (*static, tdq), strict=True)
            for repeat, fcd in enumerate(values.tolist())]  # fmt: skip
    found = verdict(pd.DataFrame(rows).assign(weights=8, activations=5, weights_method="nearest"))
    return bool(found.wins.iloc[0])


def _measured() -> list[Case]:
    static = torch.tensor([[9.0, 8.0, 9.5], [7.0, 7.5, 7.2], [7.1, 6.9, 7.4]])
    ours = ([6.9, 6.8, 7.1], [6.5, 7.0, 6.0], [6.0, 6.0, 7.3], [9.0, 9.0, 6.0], [7.2, 7.0, 7.5])
    return [dict(static=static, tdq=torch.tensor(tdq)) for tdq in ours]


better_everywhere = Check(
    _wins,
    _measured,
    right="against whichever constant is best in that repeat, in every repeat.",
    mistakes={
        "it compares means; one repeat may say the opposite": lambda static, tdq: bool(tdq.mean() < static.mean(1).min()),
        "it is content with one repeat; expected all": lambda static, tdq: bool((tdq < static.amin(0)).any()),
        "it compares with the constant that is best on average; expected the best one of each repeat": (
            lambda static, tdq: bool((tdq < static[static.mean(1).argmin()]).all())
        ),
        "it is content with beating some constant; expected the best one": (
            lambda static, tdq: bool((tdq < static.amax(0)).all())
        ),
    },
)


def _change(fcd: Tensor) -> Tensor:
    import pandas as pd

    from tdq_utils.show.lessons import compared  # brings matplotlib

    rows = [dict(question="q", method="tdq", variant=str(i), repeat=j, fcd=value)
            for i, row in enumerate(fcd.tolist()) for j, value in enumerate(row)]  # fmt: skip
    return torch.tensor(compared(pd.DataFrame(rows), "q").change.tolist())


change_of_means = Check(
    _change,
    lambda: [dict(fcd=torch.tensor([[6.0, 8.0], [6.6, 8.0], [5.0, 9.5]]))],
    right="in per cent of the default, the first row.",
    mistakes={
        "it averages the changes of the repeats; expected the change of the means": (
            lambda fcd: 100 * (fcd / fcd[0] - 1).mean(1)
        ),
        "it gives shares; expected per cent": lambda fcd: _change(fcd) / 100,
        "it gives ratios; the first row has changed by 0": lambda fcd: 100 * fcd.mean(1) / fcd[0].mean(),
        "it divides by each row's own mean; expected that of the first": lambda fcd: 100 * (1 - fcd[0].mean() / fcd.mean(1)),
    },
)


def _lookup(table_t: Tensor, table_s: Tensor, t: Tensor) -> Tensor:
    return TableStep(table_t, table_s).on(t.tolist(), nearest=True)


def _below(table_t: Tensor, table_s: Tensor, t: Tensor) -> Tensor:
    order = table_t.argsort()
    return table_s[order][torch.searchsorted(table_t[order].contiguous(), t, right=True).sub(1).clamp_min(0)]


def _between(table_t: Tensor, table_s: Tensor, t: Tensor) -> Tensor:
    import numpy as np

    order = table_t.argsort()
    return torch.tensor(np.interp(t, table_t[order], table_s[order]), dtype=table_s.dtype)


nearest_step = Check(
    _lookup,
    lambda: [dict(table_t=torch.tensor([999, 749, 499, 249]), table_s=torch.tensor([0.1, 0.25, 0.4, 0.9]),
                  t=torch.tensor([999, 949, 780, 600, 499, 280, 19]))],
    right="a table has an answer for every t, if the nearest step will do.",
    mistakes={
        "it takes the next step below; the one above may be nearer": _below,
        "it interpolates; expected the entry of the nearest step": _between,
        "it answers in ascending order; expected the order of t": lambda a, s, t: _lookup(a, s, t).flip(0),
        "it takes the table to ascend; it begins with noise": lambda a, s, t: _lookup(a, s.flip(0), t),
    },
)  # fmt: skip


def _halves(x: Tensor, at: int, s: Tensor, bits: int) -> Tensor:
    return SplitQuantizer(at, [ActivationQuantizer(bits, Grid(bits), StaticStep(value)) for value in s])(x, None)


def _whole(x: Tensor, s: Tensor, bits: int) -> Tensor:
    return ActivationQuantizer(bits, Grid(bits), StaticStep(s))(x, None)


def _skips() -> list[Case]:
    x = torch.randn(4, 5, 5, 5, generator=torch.Generator().manual_seed(12))
    return [dict(x=x, at=2, s=torch.tensor([0.1, 0.7]), bits=4)]


quantize_halves = Check(
    _halves,
    _skips,
    right="the quiet half has fine steps, the loud one reaches far.",
    mistakes={
        "it swaps the two step sizes": lambda x, at, s, bits: _halves(x, at, s.flip(0), bits),
        "it quantizes all channels by the first step size": lambda x, at, s, bits: _whole(x, s[0], bits),
        "it quantizes all channels by the second step size": lambda x, at, s, bits: _whole(x, s[1], bits),
        "it cuts the batch in two; expected the channels, axis 1": (
            lambda x, at, s, bits: torch.cat([_whole(x[:at], s[0], bits), _whole(x[at:], s[1], bits)])
        ),
    },
)
