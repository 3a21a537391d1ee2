"""Figures of measured tables: means over repeats, whiskers from the least to the greatest. ``measure``: a key of ``LABELS``."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, zip_longest
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure, FigureBase, SubFigure

from tdq_utils.fit.finetuning import STEP_RATE
from tdq_utils.show.plots import COLOURS, MARKERS, PALETTE, axes_of, heading, plain_log
from tdq_utils.show.tables import NAMES, bits

LABELS = {"fcd": "FCD to the test set (lower is better)", "kid": "KID (lower is better)",
          "mse": "squared pixel difference\nto full precision (lower is better)"}  # fmt: skip
FULL: dict[str, Any] = dict(color="0.35", ls="--", label="full precision")


def _full(table: pd.DataFrame, measure: str) -> float:
    return table.loc[table.method == "full precision", measure].mean()


def _means(rows: pd.DataFrame, by: str, measure: str) -> pd.DataFrame:
    """Of the repeats at each value of a column: ``mean``, and how far the least and the greatest are from it."""
    found = rows.groupby(by)[measure].agg(["mean", "min", "max"])
    return found.assign(min=found["mean"] - found["min"], max=found["max"] - found["mean"])


def _lines(ax: Axes, rows: pd.DataFrame, methods: Iterable[str], by: str, measure: str, apart: float = 0.0) -> None:
    """A line a method, in the order of their colours; ``apart``, so that whiskers do not hide each other."""
    wanted = set(methods)
    for i, method in enumerate(method for method in COLOURS if method in wanted):
        found = _means(rows[rows.method == method], by, measure)
        style = dict(ls="--") if method == "full precision" else dict(marker=MARKERS[method], ms=5)
        ax.errorbar(found.index + apart * (i - len(wanted) / 2), found["mean"], found[["min", "max"]].to_numpy().T, lw=1.4,
                    color=COLOURS[method], label=NAMES[method], **style)  # fmt: skip


def _bars(ax: Axes, places: Sequence, found: pd.DataFrame, xlabel: str, **look: Any) -> None:
    ax.barh(places, found["mean"], xerr=found[["min", "max"]].to_numpy().T, **{"ecolor": "0.3", "capsize": 2, **look})
    ax.set_xlabel(xlabel)
    ax.grid(axis="y", visible=False)


def _panels(rows: pd.DataFrame, by: pd.Series, width: float, height: float, title: str | None, **how: Any
            ) -> list[tuple[Axes, pd.DataFrame]]:  # fmt: skip
    """Panels of this size in inches, two a line, and room for a legend: each with the rows of one value of ``by``, its title."""
    groups = list(rows.groupby(by, sort=False))
    columns, lines = min(2, len(groups)), (len(groups) + 1) // 2
    size = width * columns + 1.5, height * lines
    fig, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, **how)
    heading(fig, title)
    for ax, (name, _) in zip_longest(axes.flat, groups, fillvalue=("", None)):
        ax.set_title(name) if name else ax.remove()
    return [(ax, group) for ax, (_, group) in zip(axes.flat, groups, strict=False)]


def _legend_beside(fig: Figure | SubFigure, place: Any = "center left", height: float = 0.5) -> FigureBase:
    """One legend for all panels, right of the first row."""
    lines = {label: line for ax in fig.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.axes[:2][-1].legend(lines.values(), lines, fontsize=8, loc=place, bbox_to_anchor=(1, height))
    return fig


def distance_bars(table: pd.DataFrame) -> FigureBase:
    """FCD of each setting, with full precision as a line: shorter is better."""
    ax, rows = axes_of(None, 6.5, 3), table[table.weights.notna()]
    palette = {NAMES[method]: colour for method, colour in COLOURS.items()}
    sns.barplot(rows, x=bits(rows), y="fcd", hue=rows.method.map(NAMES), palette=palette, ax=ax)
    ax.axhline(_full(table, "fcd"), **FULL)
    ax.set(xlabel="", ylabel=LABELS["fcd"])
    ax.legend(fontsize=8)
    return ax.figure


def quality_against_bits(table: pd.DataFrame, measure: str = "fcd", methods: Iterable[str] | None = None,
                         title: str | None = None, relative_to: str | None = None) -> FigureBase:  # fmt: skip
    """Rows of :func:`tdq_utils.lab.reproduce.reproduce`: a line a method, a panel for each width of the weights.

    ``relative_to``: a method by whose value, at the same bits and repeat, all are divided; otherwise full precision is dashed."""
    rows = table[(table.weights > 0) & (table.weights_method == "nearest")]
    if relative_to:
        key = ["weights", "activations", "repeat"]
        base = rows.join(rows[rows.method == relative_to].set_index(key)[measure].rename("base"), on=key).base
        rows = rows.assign(**{measure: rows[measure] / base})
    rows = rows.sort_values("weights", ascending=False, kind="stable")
    panels = _panels(rows, rows.weights.map("{}-bit weights".format), 5, 3.8, title, sharey=True)
    for ax, panel in panels:
        _lines(ax, panel, rows.method if methods is None else methods, "activations", measure, apart=0.03)
        if _full(table, measure) > 0 and not relative_to:
            ax.axhline(_full(table, measure), **FULL)
        ax.set_xticks(sorted(panel.activations.unique()))
        ax.set(xlabel="bits of the activations", yscale="linear" if relative_to else "log")
    first = panels[0][0]
    if not relative_to:
        plain_log(first.yaxis)
    first.set_ylabel(f"{measure.upper()} / that of {NAMES[relative_to]}" if relative_to else LABELS[measure])
    return _legend_beside(first.figure)


def quality_against_steps(table: pd.DataFrame, measure: str = "fcd", title: str | None = None) -> FigureBase:
    """Quality against the number of sampling steps (column ``steps``), a line a method, full precision dashed."""
    ax, steps = axes_of(None, 7, 3.6), sorted(table.steps.unique())
    _lines(ax, table, table.method, "steps", measure)
    ax.set(xscale="log", xlabel="sampling steps", ylabel=LABELS[measure], title=title or "")
    ax.set_xticks(steps, [f"{step:.0f}" for step in steps])
    ax.minorticks_off()
    return _legend_beside(ax.figure, "upper left", 1)


def time_bars(table: pd.DataFrame, title: str | None = None) -> FigureBase:
    """Where the time goes: a stacked bar a variant, a colour a kind of work (:func:`tdq_utils.lab.bench.where_time_goes`)."""
    wide = table.pivot(index="variant", columns="kind", values="seconds").loc[table.variant.unique(), table.kind.unique()]
    ax = axes_of(None, 8, 0.5 * len(wide) + 1.2)
    wide.iloc[::-1].plot.barh(stacked=True, ax=ax, color=[PALETTE[i] for i in (0, 2, 1)], width=0.7)
    ax.set(xlabel="seconds for the batch", ylabel="", title=title or "")
    return _legend_beside(ax.figure, "upper left", 1)


def ratio_bars(table: pd.DataFrame, baseline: str, title: str | None = None) -> FigureBase:
    """Time of each variant over that of ``baseline`` in the same round; whiskers from the least to the greatest round."""
    rows = table[table.baseline == baseline].iloc[::-1]
    ax = axes_of(None, 7, 0.4 * len(rows) + 1)
    found = pd.DataFrame({"mean": rows.ratio, "min": rows.ratio - rows.ratio_min, "max": rows.ratio_max - rows.ratio})
    _bars(ax, rows.variant, found, f"time / time of {baseline} (less is faster)", color=PALETTE[0], capsize=3, height=0.65)
    ax.axvline(1, color="0.35", ls="--", lw=1)
    ax.set_title(title or "")
    return ax.figure


def variant_bars(table: pd.DataFrame, question: str, measure: str = "fcd", title: str | None = None,
                 references: Mapping[str, float] | None = None) -> FigureBase:  # fmt: skip
    """One question of the ablations (:func:`tdq_utils.lab.tables.ablations.ablation_jobs`): a bar a variant, a colour a method;
    ``references``: ``{label: value}``, drawn as dashed lines, for scale."""
    rows = table[table.question == question]
    variants, methods = list(dict.fromkeys(rows.variant)), list(dict.fromkeys(rows.method))
    if all(variant.isdigit() for variant in variants):
        variants.sort(key=int)
    ax, height = axes_of(None, 7, 0.45 * len(variants) * len(methods) ** 0.6 + 1), 0.8 / len(methods)
    for i, method in enumerate(methods):
        found = _means(rows[rows.method == method], "variant", measure).reindex(variants)
        places = [row + height * (i - (len(methods) - 1) / 2) for row in range(len(variants))]
        _bars(ax, places, found, LABELS[measure], height=height * 0.9, color=COLOURS[method], label=NAMES[method])
    ax.set_yticks(range(len(variants)), variants)
    ax.invert_yaxis()
    ax.set_title(title or question)
    for (label, value), style in zip((references or {}).items(), cycle(["--", ":"]), strict=False):
        ax.axvline(value, color="0.35", ls=style, label=label)
    return _legend_beside(ax.figure, "upper left", 1) if len(methods) > 1 or references else ax.figure


def training_bars(table: pd.DataFrame, measure: str = "fcd", title: str | None = None) -> FigureBase:
    """Rows of :func:`tdq_utils.lab.tables.qat.qat_jobs`, of one number of sampling steps: a panel a pair of bits, a bar a kind
    (pale: calibrated only)."""
    rows = table[table.weights > 0].assign(label=training_labels(table))
    for ax, group in _panels(rows, bits(rows), 5.2, 3.4, title):
        kinds = group.drop_duplicates("label").iloc[::-1]
        shades = [to_rgba(COLOURS[row.method], 1 if row.iterations else 0.4) for row in kinds.itertuples()]
        found = _means(group, "label", measure).loc[kinds.label]
        _bars(ax, kinds.label, found, LABELS[measure].replace(" (", "\n("), height=0.7, color=shades)
        ax.axvline(_full(table, measure), **FULL)
    return _legend_beside(ax.figure)


def training_labels(table: pd.DataFrame) -> pd.Series:
    """What a row of the training table is, for readers: with the index of ``table``."""
    shortest = table.iterations[table.iterations > 0].min()

    def label(row):
        name = NAMES.get(row.method, row.method)
        if row.weights and not row.iterations:
            return f"{name}: calibrated only"
        name += f", step rate {row.step_rate:g}" if row.weights and row.step_rate != STEP_RATE else ""
        name += ", split skips" if row.split_skips else ""
        return f"{name}, {row.iterations} iterations" if row.iterations > shortest else name

    return pd.Series([label(row) for row in table.itertuples()], table.index)


def loss_lines(curves: pd.DataFrame, above: str | None = None, title: str | None = None) -> FigureBase:
    """Losses of trainings of one length (:func:`tdq_utils.lab.tables.qat.add_losses`): a line a method, a panel a pair of bits.

    ``above``: a method without bits, whose loss on the same batches is subtracted: batches differ far more than methods do."""
    if above:
        floor = curves[curves.method == above].set_index(["repeat", "iteration"]).loss.rename("floor")
        curves = curves[curves.method != above].join(floor, on=["repeat", "iteration"], how="inner")
        curves = curves.assign(loss=curves.loss - curves.floor)
    for ax, group in _panels(curves, bits(curves).fillna("no quantizer"), 5, 3, title):
        for method, lines in group.groupby("method", sort=False):
            mean = lines.groupby("iteration").loss.mean()
            ax.plot(mean, marker=MARKERS[method], ms=4, lw=1.2, color=COLOURS[method], label=NAMES[method])
        ax.set(xlabel="iteration", ylabel="denoising loss (squared error)" + (f",\nabove {NAMES[above]}" if above else ""))
        if above and ax.dataLim.ymin > 0:
            ax.set_yscale("log")
            plain_log(ax.yaxis)
    return _legend_beside(ax.figure)
