"""Figures of measured tables: which method keeps how much quality, at which bits, with its spread."""

from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import to_rgba

from tdq_utils.fit.finetuning import STEP_RATE
from tdq_utils.show import plots
from tdq_utils.show.names import NAMES

LABELS = {
    "fcd": "FCD to the test set (lower is better)",
    "mse": "squared pixel difference\nto full precision (lower is better)",
    "kid": "KID (lower is better)",
}


def distance_bars(table, ax=None):
    """FCD of each setting, with full precision as a line: shorter is better."""
    ax = plots.axes_of(ax, 6.5, 3)
    rows = table[table.weights.notna()]
    bits = [f"W{w:.0f}A{a:.0f}" for w, a in zip(rows.weights, rows.activations, strict=True)]
    palette = {NAMES[method]: colour for method, colour in plots.COLOURS.items()}
    sns.barplot(rows, x=bits, y="fcd", hue=rows.method.map(NAMES), palette=palette, ax=ax)
    full = table.loc[table.method == "full precision", "fcd"].item()
    ax.axhline(full, color=plots.COLOURS["full precision"], ls="--", label="full precision")
    ax.set(xlabel="", ylabel="FCD to the test set (lower is better)")
    ax.legend(fontsize=8)
    return ax.figure


def quality_against_bits(table, measure="fcd", methods=None, title=None, relative_to=None):
    """Quality against bits of the activations, a line a method, a panel for each width of the weights.

    Points are means over repeats, bars reach from the least to the greatest; the dashed line is full precision, where the
    measure has it.

    Args:
        table: rows of :func:`tdq_utils.lab.reproduce.reproduce`. measure: ``"fcd"``, ``"kid"`` or ``"mse"``.
        methods: which lines; default: all. relative_to: a method by whose value, at the same bits and repeat, all are divided.
    """
    rows = table[(table.weights > 0) & (table.weights_method == "nearest")]
    if relative_to:
        rows = _relative(rows, measure, relative_to)
    methods = [method for method in plots.COLOURS if method in set(rows.method if methods is None else methods)]
    widths = sorted(rows.weights.unique(), reverse=True)
    fig, axes = plt.subplots(
        1, len(widths), figsize=(5 * len(widths) + 1.5, 3.8), layout="constrained", sharey=True, squeeze=False
    )
    for ax, width in zip(axes[0], widths, strict=True):
        _panel(ax, rows[rows.weights == width], measure, methods)
        level = table.loc[table.method == "full precision", measure].mean()
        if level > 0 and not relative_to:
            ax.axhline(level, color="0.35", ls="--", label="full precision")
        ax.set(xlabel="bits of the activations", title=f"{width}-bit weights", yscale="linear" if relative_to else "log")
    if not relative_to:
        plots.plain_log(axes[0, 0].yaxis)
    axes[0, 0].set_ylabel(f"{measure.upper()} / that of {NAMES[relative_to]}" if relative_to else LABELS[measure])
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return fig


def _relative(rows, measure, method):
    key = ["weights", "activations", "repeat"]
    base = rows[rows.method == method].set_index(key)[measure].rename("base")
    joined = rows.join(base, on=key)
    return joined.assign(**{measure: joined[measure] / joined.base})


def _panel(ax, rows, measure, methods):
    for i, method in enumerate(methods):
        by = rows[rows.method == method].groupby("activations")[measure].agg(["mean", "min", "max"])
        if by.empty:
            continue
        shifted = by.index + 0.03 * (i - len(methods) / 2)  # so that bars do not hide each other
        spread = [by["mean"] - by["min"], by["max"] - by["mean"]]
        ax.errorbar(shifted, by["mean"], spread, color=plots.COLOURS[method], marker=plots.MARKERS[method], ms=5, lw=1.4,
                    label=NAMES[method])  # fmt: skip
    ax.set_xticks(sorted(rows.activations.unique()))


def time_bars(table, title=None):
    """Where the time goes: a stacked bar a variant, a colour a kind of work (:func:`tdq_utils.lab.bench.where_time_goes`)."""
    wide = table.pivot(index="variant", columns="kind", values="seconds").loc[table.variant.unique(), table.kind.unique()]
    ax = plots.axes_of(None, 8, 0.5 * len(wide) + 1.2)
    wide.iloc[::-1].plot.barh(stacked=True, ax=ax, color=[plots.PALETTE[i] for i in (0, 2, 1)], width=0.7)
    ax.set(xlabel="seconds for the batch", ylabel="", title=title or "")
    ax.legend(title="", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax.figure


def ratio_bars(table, baseline, title=None):
    """Time of each variant over that of ``baseline`` in the same round; whiskers from the least to the greatest round."""
    rows = table[table.baseline == baseline].iloc[::-1]
    ax = plots.axes_of(None, 7, 0.4 * len(rows) + 1)
    spread = [rows.ratio - rows.ratio_min, rows.ratio_max - rows.ratio]
    ax.barh(rows.variant, rows.ratio, xerr=spread, color=plots.PALETTE[0], ecolor="0.3", capsize=3, height=0.65)
    ax.axvline(1, color="0.35", ls="--", lw=1)
    ax.set(xlabel=f"time / time of {baseline} (less is faster)", title=title or "")
    ax.grid(axis="y", visible=False)
    return ax.figure


def variant_bars(table, question, measure="fcd", title=None, references=None):
    """One question of the ablation table: a bar a variant, a colour a method; whiskers from least to greatest repeat.

    Args:
        table: rows of :func:`tdq_utils.lab.tables.ablations.ablation_jobs`. question: of ``VARIANTS``. measure: as above.
        references: ``{label: value}``, drawn as dashed lines, for scale.
    """
    rows = table[table.question == question]
    variants, methods = list(dict.fromkeys(rows.variant)), list(dict.fromkeys(rows.method))
    if all(variant.isdigit() for variant in variants):
        variants.sort(key=int)
    ax, height = plots.axes_of(None, 7, 0.45 * len(variants) * len(methods) ** 0.6 + 1), 0.8 / len(methods)
    for i, method in enumerate(methods):
        by = rows[rows.method == method].groupby("variant")[measure].agg(["mean", "min", "max"]).reindex(variants)
        places = [row + height * (i - (len(methods) - 1) / 2) for row in range(len(variants))]
        spread = [by["mean"] - by["min"], by["max"] - by["mean"]]
        ax.barh(places, by["mean"], height * 0.9, xerr=spread, color=plots.COLOURS[method], ecolor="0.3", capsize=2,
                label=NAMES[method])  # fmt: skip
    ax.set_yticks(range(len(variants)), variants)
    ax.invert_yaxis()
    ax.set(xlabel=LABELS[measure], title=title or question)
    ax.grid(axis="y", visible=False)
    for (label, value), style in zip((references or {}).items(), cycle(["--", ":"]), strict=False):
        ax.axvline(value, color="0.35", ls=style, label=label)
    if len(methods) > 1 or references:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax.figure


def quality_against_steps(table, measure="fcd", title=None):
    """Quality against the number of sampling steps, a line a method, full precision dashed.

    Args:
        table: rows with columns ``method``, ``steps`` and the measure; means over repeats are drawn, bars from least to greatest.
    """
    ax = plots.axes_of(None, 7, 3.6)
    for method in [method for method in plots.COLOURS if method in set(table.method)]:
        by = table[table.method == method].groupby("steps")[measure].agg(["mean", "min", "max"])
        spread = [by["mean"] - by["min"], by["max"] - by["mean"]]
        style = dict(ls="--", marker=None) if method == "full precision" else dict(marker=plots.MARKERS[method], ms=5)
        ax.errorbar(by.index, by["mean"], spread, color=plots.COLOURS[method], lw=1.4, label=NAMES[method], **style)
    steps = sorted(table.steps.unique())
    ax.set(xscale="log", xlabel="sampling steps", ylabel=LABELS[measure], title=title or "")
    ax.set_xticks(steps, [f"{step:.0f}" for step in steps])
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax.figure


def training_bars(table, measure="fcd", title=None):
    """Quantization-aware training: a panel a pair of bits, a bar a row's kind; whiskers from least to greatest repeat.

    Pale bars: calibrated only.

    Args:
        table: rows of :func:`tdq_utils.lab.tables.qat.qat_jobs`, of one number of sampling steps. measure: as above.
    """
    rows = table[(table.weights > 0)].assign(label=training_labels(table))
    pairs = list(rows[["weights", "activations"]].drop_duplicates().itertuples(index=False))
    fig, axes = _panels(len(pairs), 5.2, 3.4)
    for ax, (w, a) in zip(axes, pairs, strict=True):
        group = rows[(rows.weights == w) & (rows.activations == a)]
        kinds = {measure: ["mean", "min", "max"], "method": "first", "iterations": "first"}
        by = group.groupby("label", sort=False).agg(kinds).iloc[::-1]
        mean, least, most = (by[measure, part] for part in ("mean", "min", "max"))
        shades = zip(by["method", "first"], by["iterations", "first"], strict=True)
        ax.barh(by.index, mean, xerr=[mean - least, most - mean], ecolor="0.3", capsize=2, height=0.7,
                color=[to_rgba(plots.COLOURS[method], 1 if trained else 0.4) for method, trained in shades])  # fmt: skip
        ax.axvline(table.loc[table.method == "full precision", measure].mean(), color="0.35", ls="--", label="full precision")
        ax.set(xlabel=LABELS[measure].replace(" (", "\n("), title=f"W{w}A{a}")
        ax.grid(axis="y", visible=False)
    _legend_beside(axes)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return fig


def _panels(number, width, height):
    """``(figure, axes)``: panels of this size in inches, two a row, and room for a legend."""
    rows, columns = (number + 1) // 2, min(2, number)
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns + 1.5, height * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[number:]:
        ax.remove()
    return fig, axes.flat[:number]


def _legend_beside(axes):
    """One legend for all panels, right of the first row."""
    lines = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[:2][-1].legend(lines.values(), lines, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def training_labels(table):
    """What a row of the training table is, for readers: ``Series`` with the index of ``table``."""
    shortest = table.iterations[table.iterations > 0].min()

    def label(row):
        name = NAMES.get(row.method, row.method)
        if row.weights and not row.iterations:
            return f"{name}: calibrated only"
        name += f", step rate {row.step_rate:g}" if row.weights and row.step_rate != STEP_RATE else ""
        name += ", split skips" if row.split_skips else ""
        return f"{name}, {row.iterations} iterations" if row.iterations > shortest else name

    return pd.Series([label(row) for row in table.itertuples()], table.index)


def loss_lines(curves, above=None, title=None):
    """Training loss against iterations, a line a method, a panel a pair of bits; means over repeats.

    Args:
        curves: of :func:`tdq_utils.lab.tables.qat.loss_curves`, of trainings of one length.
        above: a method without bits, such as "fine-tuned", whose loss on the same batches (the same repeat) is subtracted:
            batches differ far more than methods do.
    """
    if above:
        floor = curves[curves.method == above].set_index(["repeat", "iteration"]).loss.rename("floor")
        curves = curves[curves.method != above].join(floor, on=["repeat", "iteration"], how="inner")
        curves = curves.assign(loss=curves.loss - curves.floor)
    pairs = list(curves[["weights", "activations"]].drop_duplicates().itertuples(index=False))
    fig, axes = _panels(len(pairs), 5, 3)
    for ax, (w, a) in zip(axes, pairs, strict=True):
        group = curves[(curves.weights == w) & (curves.activations == a)]
        for method, lines in group.groupby("method", sort=False):
            mean = lines.groupby("iteration").loss.mean()
            ax.plot(
                mean.index, mean, color=plots.COLOURS[method], marker=plots.MARKERS[method], ms=4, lw=1.2, label=NAMES[method]
            )
        logarithmic = above and ax.dataLim.ymin > 0
        ax.set(xlabel="iteration", title=f"W{w}A{a}" if w else "no quantizer", yscale="log" if logarithmic else "linear")
        if logarithmic:
            plots.plain_log(ax.yaxis)
        ax.set_ylabel("denoising loss (squared error)" + (f",\nabove {NAMES[above]}" if above else ""))
    _legend_beside(axes)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return fig
