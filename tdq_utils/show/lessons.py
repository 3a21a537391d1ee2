"""What the lessons from 05 on need around their cells: measured rows -> frames to show, and their figures."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import nn

from tdq_utils.fit.quantize import quantized_layers
from tdq_utils.lab.tables.quickstart import verdict
from tdq_utils.show import plots
from tdq_utils.show.result_plots import training_labels
from tdq_utils.show.tables import NAMES, bits

REFERENCES = ["full precision", "real images"]
HEADS = {"fcd": "FCD", "kid": "KID", "mse": "distance"}


def protocol(table: pd.DataFrame) -> str:
    """How the quantized rows of a table of results were made, for its caption."""
    rows = table[table.weights > 0]
    steps = ", ".join(map(str, sorted(rows.steps.unique())))
    engine, batch, threads = (rows[name].mode()[0] for name in ("engine", "batch_size", "threads"))
    how = f"{rows.images.iloc[0]:,} images a row, {rows.sampler.iloc[0]}, {steps} steps; engine: {engine}"
    return f"{how}, batches of {batch}, {threads} thread{'s' if threads > 1 else ''}."


def repeats(table: pd.DataFrame) -> str:
    """How often each pair of bits was measured, for a caption."""
    counts = table.repeat.groupby(bits(table), sort=False).nunique()
    return "; ".join(f"{n} repeats of {', '.join(alike.index)}" for n, alike in counts.groupby(counts, sort=False))


def by_bits(table: pd.DataFrame, measure: str = "fcd") -> pd.DataFrame:
    """Means over repeats: a row a method, a column a pair of bits. ``REFERENCES``, which have no bits, stand in each column."""
    rows = table[table.weights_method == "nearest"]
    rows = rows.assign(bits=bits(rows)).sort_values(["weights", "activations"], ascending=False)
    wide = rows.pivot_table(measure, "method", "bits", sort=False)
    for name in REFERENCES:
        wide.loc[name] = rows[rows.method == name][measure].mean()
    return wide.reindex([name for name in [*dict.fromkeys([*NAMES][1:]), *REFERENCES] if name in wide.index]).reset_index()


def judged(table: pd.DataFrame, measure: str = "fcd") -> pd.DataFrame:
    """:func:`~tdq_utils.lab.tables.quickstart.verdict` for readers; ``gap closed``: per cent of that between the best static
    interval and full precision; ``over the table``: per cent."""
    found = verdict(table, measure).sort_values(["weights", "activations"], ascending=False)
    full = table[table.method == "full precision"][measure].mean()
    return pd.DataFrame({
        "bits": bits(found), "best static interval": found.static.map(NAMES), "its mean": found.static_mean, "TDQ": found.tdq,
        "per-step table": found.table, "TDQ better in every repeat": found.wins.map({True: "yes", False: "no"}),
        "repeats": found.repeats, "gap closed": 100 * (found.static_mean - found.tdq) / (found.static_mean - full),
        "over the table": 100 * found.over_table,
    }).reset_index(drop=True)  # fmt: skip


def compared(table: pd.DataFrame, question: str, measure: str = "fcd") -> pd.DataFrame:
    """The variants of one question of the ablation table: the mean, and its change from the first variant in per cent, in the
    mean and in each repeat. Columns ``method``, ``variant``, the measure, ``change``, ``repeat 0``, ..."""
    wide = table[table.question == question].pivot_table(measure, ["method", "variant"], "repeat", sort=False)
    each = pd.concat([wide.mean(axis="columns").rename("change"), wide.add_prefix("repeat ")], axis="columns")
    change = 100 * (each / each.groupby("method", sort=False).transform("first") - 1)
    return change.assign(**{HEADS[measure]: each.change})[[HEADS[measure], *change]].reset_index()


def pivoted(rows: pd.DataFrame, index: str | list[str], columns: str, values: str | list[str]) -> pd.DataFrame:
    """A pivot table of means with one line of heads, such as ``FCD, TDQ``; of one measure alone, ``TDQ``."""
    wide = rows.pivot_table(values, index, columns, sort=False)
    heads = wide.columns if isinstance(values, list) else [("", name) for name in wide.columns]
    wide.columns = [", ".join(filter(None, (HEADS.get(value, value), str(NAMES.get(name, name))))) for value, name in heads]
    return wide.reset_index()


def trainings(table: pd.DataFrame) -> pd.DataFrame:
    """A line a kind of training and pair of bits, means over repeats; those without bits first."""
    rows = table.assign(bits=bits(table).fillna("–"), training=training_labels(table))
    groups = rows.groupby(["bits", "training"], sort=False)
    spread = groups.fcd.agg(**{"repeats": "size", "FCD": "mean", "least": "min", "greatest": "max"})
    found = spread.join(groups[["kid", "mse", "loss"]].mean()).rename(columns=HEADS).reset_index()
    pairs = ["–", *found.bits]
    return found.sort_values("bits", key=lambda column: column.map(pairs.index), kind="stable", ignore_index=True)


def step_sizes(model: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """s by layer, noise first, at the ``steps`` time steps that a model was frozen for."""
    found = {name: layer.activation.step.s for name, layer in quantized_layers(model).items()}
    return {name: s.flip(0) if s.dim() else s.expand(steps) for name, s in found.items()}


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """While open, what goes into and comes out of each quantized layer: ``{name: (input, output)}`` of the latest call."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with ExitStack() as handles:
        for name, layer in quantized_layers(model).items():
            hook = layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
            handles.callback(hook.remove)
        yield seen


def real_against_real(sizes: np.ndarray, distances: Sequence[float], c: float, reference: int = 10_000) -> FigureBase:
    """FCD of real images against their number, and the law ``c (1 / n + 1 / reference)``."""
    ax, label = plots.axes_of(None, 6, 3), f"c (1/n + 1/{reference:,}), c = {c:.0f} (fitted from n = 500)"
    ax.loglog(sizes, distances, "o", label="measured")
    ax.loglog(sizes, c * (1 / sizes + 1 / reference), "--", color="0.4", label=label)
    ax.set(xlabel="real images", ylabel="FCD to the test set", title="Real against real: the bias falls roughly as 1/n")
    for axis in (ax.xaxis, ax.yaxis):
        plots.plain_log(axis)
    ax.legend()
    return ax.figure
