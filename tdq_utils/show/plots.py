"""Figures of activations and quantizers; colour-blind-safe, axes labelled. Those of tables are in ``result_plots``."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from tdq_utils.denoiser.profile import bin_centres
from tdq_utils.method.grid import fake_quantize, mse_step, squared_error
from tdq_utils.show.names import NAMES

PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "full precision": "0.35",
    "minmax": PALETTE[1],
    "momentum": PALETTE[8],
    "percentile": PALETTE[7],
    "mse": PALETTE[3],
    "ptq4dm": PALETTE[9],
    "learned": PALETTE[6],
    "table": PALETTE[2],
    "tdq": PALETTE[0],
    "dynamic": PALETTE[4],
    "dynamic-sample": PALETTE[5],
    # Training: never in one figure with the static intervals, whose colours they share.
    "pact": PALETTE[1],
    "lsq": PALETTE[3],
    "nipq": PALETTE[4],
    "tdq-pact": PALETTE[9],
    "tdq-nipq": PALETTE[2],
    "fine-tuned": PALETTE[7],
}
MARKERS = dict(zip(COLOURS, cycle("os^vD<>pPX*h"), strict=False))
T_AXIS = "time step t  (999 = noise, 0 = image)"


def set_style():
    """The kit's look; call once at the top of a notebook."""
    sns.set_theme(style="whitegrid", context="notebook", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 80, "savefig.dpi": 80, "axes.titlelocation": "left", "axes.titlesize": "medium"})


def axes_of(ax, width=7.0, height=3.2):
    """``ax``, or new axes of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def plain_log(axis):
    """Ticks 1, 2, 5, 10, ... on a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _time_axis(ax):
    """Sampling runs from noise to image, so t falls from left to right."""
    ax.set_xlabel(T_AXIS)
    if not ax.xaxis_inverted():
        ax.invert_xaxis()


def image_rows(rows, columns=10, title=None):
    """``{label: images "image 1 height width" in [-1, 1]}`` as rows, the same seeds in each column."""
    fig = plt.figure(figsize=(0.75 * columns + 1.6, 0.8 * len(rows) + 0.4), layout="constrained")
    _image_rows(fig, rows, columns)
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return fig


def _image_rows(fig, rows, columns):
    axes = fig.subplots(len(rows), 1, squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        strip = torch.cat(list(images[:columns, 0].clamp(-1, 1)), dim=1)
        ax.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")


def drift_and_rescue(profile, layer, rows, bits):
    """The README's picture: one layer's range over t with its best static interval, and what intervals do to pictures."""
    fig = plt.figure(figsize=(12, 3.3), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1, 1.35])
    range_ribbon(profile, layer, static_bits=bits, ax=left.subplots())
    left.suptitle("Activations drift over the time steps ...", fontsize="medium")
    _image_rows(right, rows, columns=10)
    right.suptitle(f"... so the interval should, too (8-bit weights, {bits}-bit activations)", fontsize="medium")
    return fig


def drift_heatmap(profile, layers=None, ax=None):
    """Layer x t: the 99.9 % range of each layer at t, relative to its mean over t (log2)."""
    rows = [profile.row(name) for name in layers] if layers is not None else range(len(profile.layers))
    reach = profile.percentile(99.9)[list(rows)]
    drift = np.log2(reach / reach.mean(1, keepdims=True))
    ax = axes_of(ax, 8, 1.4 + 0.16 * len(drift))
    names = [profile.layers[row] for row in rows]
    sns.heatmap(
        drift, ax=ax, cmap="vlag", center=0, vmin=-0.6, vmax=0.6, xticklabels=_thinned(profile.t), yticklabels=names,
        cbar_kws={"label": "log2(range at t / mean range)", "extend": "both"},
    )  # fmt: skip
    ax.tick_params(axis="y", labelsize=7)
    ax.set(
        xlabel=T_AXIS,
        ylabel="layer",
        title="Each row is a layer: red where it needs a wider interval than on average, blue a narrower one",
    )
    return ax.figure


def _thinned(t, most=10):
    """Labels for an axis over steps: every second one, or fewer, is left in."""
    every = -(-len(t) // most)
    return [str(value) if i % every == 0 else "" for i, value in enumerate(t)]


def range_ribbon(profile, layer, static_bits=None, ax=None):
    """One layer over t: full range, middle 99 %, and the MSE-optimal static interval at ``static_bits`` bits."""
    i = profile.row(layer)
    ax = axes_of(ax)
    ax.fill_between(profile.t, profile.least[i], profile.greatest[i], color=PALETTE[0], alpha=0.15, label="min to max")
    low, high = (_quantile(profile, i, q) for q in (0.005, 0.995))
    ax.fill_between(profile.t, low, high, color=PALETTE[0], alpha=0.45, label="middle 99 %")
    if static_bits is not None:
        levels = _levels(profile.best_steps(layer, static_bits)[0], profile.grid(layer, static_bits))
        ax.axhline(levels[0], color=COLOURS["mse"], ls="--", label=f"best static interval, {static_bits} bits")
        ax.axhline(levels[-1], color=COLOURS["mse"], ls="--")
    _time_axis(ax)
    ax.set(ylabel="input of the layer", title=layer)
    ax.legend(loc="best", fontsize=8)
    return ax.figure


def _levels(s, grid):
    """Values of the grid's levels at step size ``s``, ascending."""
    return (torch.arange(grid.q_min, grid.q_max + 1) - grid.zero(s)).mul(s).numpy()


def _quantile(profile, layer, q):
    """The q-th quantile (0..1) of one layer's values at each t, ``"step"``."""
    counts = profile.counts[layer]
    share = counts.cumsum(1) / counts.sum(1, keepdims=True)
    return np.take_along_axis(bin_centres(profile.limit[layer]), (share < q).sum(1)[:, None], axis=1)[:, 0]


def range_boxes(profile, layer, ax=None):
    """Box plots of one layer's values at each t: box the middle half, whiskers the middle 99.8 %, from the histograms."""
    i = profile.row(layer)
    quantiles = np.stack([_quantile(profile, i, q) for q in (0.001, 0.25, 0.5, 0.75, 0.999)])
    keys = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(keys, column, strict=True), label=t) for column, t in zip(quantiles.T, _thinned(profile.t), strict=True)]
    ax = axes_of(ax)
    ax.bxp(
        boxes, showfliers=False, patch_artist=True, boxprops=dict(facecolor=PALETTE[0], alpha=0.5), medianprops=dict(color="k")
    )
    ax.tick_params(axis="x", rotation=60, labelsize=8)
    ax.set(xlabel=T_AXIS, ylabel="input of the layer", title=layer)
    return ax.figure


def drift_scatter(drift, ax=None):
    """Per layer: how far its range moves against what an interval per step could gain."""
    ax = axes_of(ax, 6, 3.4)
    sns.scatterplot(drift, x="ratio", y="gain_db", hue="correlation", palette="vlag", hue_norm=(-1, 1), edgecolor="0.3", ax=ax)
    ax.set(xlabel="largest / smallest range over t", ylabel="possible gain (dB)")
    ax.set_title("Layers whose range moves further tend to gain more from an interval per step")
    ax.legend(title="correlation\nof range with t", fontsize=8)
    return ax.figure


def histogram_with_grid(profile, layer, t, bits=5, s=None, ax=None):
    """The values of one layer at one time step, the quantization levels, and what lies outside them.

    Args:
        layer: dotted name. t: a time step of the profile. bits: of the grid.
        s: step size; default: the MSE-optimal static one. Bars are as wide at every t.
    """
    i, step, grid = profile.row(layer), profile.step(t), profile.grid(layer, bits)
    s = torch.as_tensor(profile.best_steps(layer, bits)[0] if s is None else s, dtype=torch.float32)
    levels, half = _levels(s, grid), s.item() / 2
    share = profile.counts[i, step] / profile.counts[i, step].sum()
    centres, limit = bin_centres(profile.limit[i, step]), profile.limit[i, step]
    outside = (centres < levels[0] - half) | (centres > levels[-1] + half)
    wide = int(min(8 * profile.limit[i].max() / limit, len(share) // 16))  # bins to a bar; limits are powers of two
    edges = np.linspace(-1, 1, len(share) // wide + 1) * limit
    ax = axes_of(ax)
    for mask, colour, label in ((~outside, PALETTE[0], "rounded"), (outside, COLOURS["mse"], "truncated")):
        heights = (share * mask).reshape(-1, wide).sum(1)
        style = dict(color=colour, label=f"{label}: {share[mask].sum():.1%}", lw=0)
        # One outline, not a patch a bar: sliders draw ten of these.
        ax.stairs(np.where(heights > 0, heights, np.nan), edges, fill=True, **style)
    ax.vlines(levels, 1e-6, 4e-6, color="0.2", lw=1)
    span = profile.greatest[i].max() - profile.least[i].min()
    ax.set(yscale="log", ylim=(1e-6, 1), xlim=(profile.least[i].min() - 0.05 * span, profile.greatest[i].max() + 0.05 * span))
    ax.set(xlabel="input of the layer", ylabel="share of values")
    ax.set_title(f"{layer}\nt = {t}, {bits} bits, s = {float(s):.3g}")
    ax.legend(loc="upper right", fontsize=8)
    return ax.figure


def histogram_panels(profile, layer, t, bits=5, s=None):
    """:func:`histogram_with_grid` side by side for several t; ``s``: one step size for each, or ``None``."""
    fig, axes = plt.subplots(1, len(t), figsize=(4.3 * len(t), 3), layout="constrained", sharey=True)
    for ax, value, s_t in zip(axes, t, s or [None] * len(t), strict=True):
        histogram_with_grid(profile, layer, value, bits, s_t, ax=ax)
    return fig


def split_error(values, counts, s, grid):
    """Truncation and rounding parts of the mean squared quantization error.

    Args:
        values, counts: ``"row value"``. s: one step size a row.

    Returns:
        ``(truncation, rounding)``, arrays ``"row"``.
    """
    inside = fake_quantize(values, s, grid).sub(values).abs() <= s[:, None] / 2 * (1 + 1e-4)
    parts = [squared_error(values, counts * mask, s, grid) / counts.sum(1) for mask in (~inside, inside)]
    return tuple(part.numpy() for part in parts)


def error_over_t(profile, layer, s, grid, label="static", ax=None):
    """Stacked truncation and rounding error of one layer against t."""
    values, counts = profile.values(layer)
    truncation, rounding = split_error(values, counts, torch.as_tensor(s).expand(len(values)), grid)
    ax = axes_of(ax)
    _stack(ax, profile.t, rounding, truncation)
    _time_axis(ax)
    ax.set(ylabel="mean squared error", title=f"{layer}, {label}")
    ax.margins(y=0.25)  # room for the legend
    ax.legend(loc="upper left", ncols=2, fontsize=8)
    return ax.figure


def error_over_s(profile, layer, t, bits=4, ax=None):
    """Truncation and rounding error of one layer at one time step, against the step size."""
    grid, step = profile.grid(layer, bits), profile.step(t)
    values, counts = (v[step : step + 1] for v in profile.values(layer))
    best = mse_step(values, grid, counts)[0]
    ratios = torch.logspace(-0.7, 0.7, 60)
    truncation, rounding = split_error(values.expand(60, -1), counts.expand(60, -1), best * ratios, grid)
    ax = axes_of(ax)
    _stack(ax, ratios, rounding, truncation)
    ax.axvline(1, color="k", ls=":", label="best s")
    ax.set(xscale="log", xlabel="step size / best step size at this t", ylabel="mean squared error")
    plain_log(ax.xaxis)
    ax.set_title(f"{layer}, t = {t}, {bits} bits: too small truncates, too large rounds coarsely")
    ax.legend(loc="upper center", fontsize=8)
    return ax.figure


def _stack(ax, x, rounding, truncation):
    ax.stackplot(x, rounding, truncation, labels=["rounding", "truncation"], colors=[PALETTE[0], COLOURS["mse"]], alpha=0.75)


def staircase(curves, ax=None):
    """Quantizers as functions: ``{label: (x, x_hat)}``."""
    ax = axes_of(ax, 5, 3.4)
    for label, (x, x_hat) in curves.items():
        ax.plot(x, x_hat, label=label)
    ax.axline((0, 0), slope=1, color="0.6", ls=":", label="identity")
    ax.set(
        xlabel="x",
        ylabel="quantized x",
        title="A small step follows closely but ends early; a large one reaches far in coarse steps",
    )
    ax.legend(fontsize=8)
    return ax.figure


def learning_curve(path, target, ylabel, title, ax=None):
    """A value per iteration, and where it should go."""
    ax = axes_of(ax)
    ax.plot(path)
    ax.axhline(target, color="0.4", ls="--")
    ax.set(xlabel="iteration", ylabel=ylabel, title=title)
    return ax.figure


def feature_image(features, ax=None):
    """Features ``"t feature"`` of every time step as an image."""
    ax = axes_of(ax)
    sns.heatmap(features.T.numpy(), ax=ax, cmap="vlag", center=0, xticklabels=100, yticklabels=16, cbar_kws={"label": "value"})
    ax.invert_xaxis()
    ax.set(
        xlabel=T_AXIS,
        ylabel="feature",
        title="Fourier features: fast ones tell neighbours apart, slow ones tell early from late",
    )
    return ax.figure


def lines_over_t(curves, ylabel, title, ax=None, markers=False, log=False):
    """Curves over t, such as step sizes or errors of several methods.

    Args:
        curves: ``{label: (t, values)}``; labels that are methods get the method's name and colour, others a colour that is left.
        markers: show the points, by a marker a method.
    """
    ax = axes_of(ax)
    taken = [COLOURS[label] for label in curves if label in COLOURS]
    spare = (colour for colour in PALETTE if colour not in taken)
    styles = {"mse": "--", "minmax": "--", "learned": "--", "table": ":"}
    for label, (t, values) in curves.items():
        colour, style = COLOURS.get(label) or next(spare), styles.get(label, "-")
        marker = MARKERS.get(label, "o") if markers else None
        ax.plot(t, values, label=NAMES.get(label, label), color=colour, ls=style, marker=marker, ms=5)
    _time_axis(ax)
    ax.set(ylabel=ylabel, title=title, yscale="log" if log else "linear")
    ax.legend(fontsize=8)
    return ax.figure
