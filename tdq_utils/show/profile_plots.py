"""Figures of a profile: how activations drift over t, and what a grid does to them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from tdq_utils.denoiser.profile import Profile, bin_centres
from tdq_utils.method.grid import Grid, fake_quantize, mse_step, squared_error
from tdq_utils.show.plots import COLOURS, PALETTE, T_AXIS, axes_of, image_rows, plain_log, time_axis

ROUNDED, TRUNCATED = PALETTE[0], COLOURS["mse"]


def drift_and_rescue(profile: Profile, layer: str, rows: Mapping[str, torch.Tensor], bits: int) -> Figure:
    """The README's picture: one layer's range over t with its best static interval, and what intervals do to pictures."""
    fig = plt.figure(figsize=(12, 3.3), layout="constrained")
    left, right = fig.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.35])[0]
    range_ribbon(profile, layer, static_bits=bits, ax=left.subplots())
    left.suptitle("Activations drift over the time steps ...", fontsize="medium")
    image_rows(rows, fig=right)
    right.suptitle(f"... so the interval should, too (8-bit weights, {bits}-bit activations)", fontsize="medium")
    return fig


def drift_heatmap(profile: Profile, layers: Iterable[str] | None = None) -> FigureBase:
    """Layer x t: the 99.9 % range of each layer at t, relative to its mean over t (log2)."""
    names = profile.layers if layers is None else list(layers)
    reach = profile.percentile(99.9)[[profile.row(name) for name in names]]
    ax = axes_of(None, 8, 1.4 + 0.16 * len(names))
    sns.heatmap(np.log2(reach / reach.mean(1, keepdims=True)), ax=ax, cmap="vlag", center=0, vmin=-0.6, vmax=0.6,
                xticklabels=_thinned(profile.t), yticklabels=names,
                cbar_kws={"label": "log2(range at t / mean range)", "extend": "both"})  # fmt: skip
    ax.tick_params(axis="y", labelsize=7)
    ax.set(xlabel=T_AXIS, ylabel="layer")
    ax.set_title("Each row is a layer: red where it needs a wider interval than on average, blue a narrower one")
    return ax.figure


def _thinned(t: np.ndarray) -> list[str]:
    """Labels for an axis over steps: ten at most."""
    return [str(value) if i % -(-len(t) // 10) == 0 else "" for i, value in enumerate(t)]


def range_ribbon(profile: Profile, layer: str, static_bits: int | None = None, ax: Axes | None = None) -> FigureBase:
    """One layer over t: full range, middle 99 %, and the MSE-optimal static interval at ``static_bits`` bits."""
    i = profile.row(layer)
    ax = axes_of(ax)
    ax.fill_between(profile.t, profile.least[i], profile.greatest[i], color=PALETTE[0], alpha=0.15, label="min to max")
    ax.fill_between(profile.t, *_quantiles(profile, layer, 0.005, 0.995).T, color=PALETTE[0], alpha=0.45, label="middle 99 %")
    if static_bits is not None:
        ends = levels(profile.best_steps(layer, static_bits)[0], profile.grid(layer, static_bits))[[0, -1]]
        for end, label in zip(ends, (f"best static interval, {static_bits} bits", None), strict=True):
            ax.axhline(end, color=COLOURS["mse"], ls="--", label=label)
    time_axis(ax)
    ax.set(ylabel="input of the layer", title=layer)
    ax.legend(loc="best", fontsize=8)
    return ax.figure


def levels(s: torch.Tensor, grid: Grid) -> np.ndarray:
    """Values of the grid's levels at step size ``s``, ascending."""
    return (torch.arange(grid.q_min, grid.q_max + 1) - grid.zero(s)).mul(s).numpy()


def _quantiles(profile: Profile, layer: str, *q: float) -> np.ndarray:
    """Quantiles (0..1) of one layer's values at each t, ``"step quantile"``."""
    counts = profile.counts[i := profile.row(layer)]
    share = counts.cumsum(1) / counts.sum(1, keepdims=True)
    places = np.stack([(share < part).sum(1) for part in q], axis=1)
    return np.take_along_axis(bin_centres(profile.limit[i], profile.bins), places, axis=1)


def range_boxes(profile: Profile, layer: str) -> FigureBase:
    """Box plots of one layer's values at each t: box the middle half, whiskers the middle 99.8 %, from the histograms."""
    quantiles = _quantiles(profile, layer, 0.001, 0.25, 0.5, 0.75, 0.999)
    keys = ("whislo", "q1", "med", "q3", "whishi", "label")
    boxes = [dict(zip(keys, (*five, t), strict=True)) for five, t in zip(quantiles, _thinned(profile.t), strict=True)]
    ax, look = axes_of(None), dict(boxprops=dict(facecolor=PALETTE[0], alpha=0.5), medianprops=dict(color="k"))
    ax.bxp(boxes, showfliers=False, patch_artist=True, **look)
    ax.tick_params(axis="x", rotation=60, labelsize=8)
    ax.set(xlabel=T_AXIS, ylabel="input of the layer", title=layer)
    return ax.figure


def drift_scatter(drift: pd.DataFrame) -> FigureBase:
    """Per layer (:meth:`Profile.drift`): how far its range moves against what an interval per step could gain."""
    ax = axes_of(None, 6, 3.4)
    sns.scatterplot(drift, x="ratio", y="gain_db", hue="correlation", palette="vlag", hue_norm=(-1, 1), edgecolor="0.3", ax=ax)
    ax.set(xlabel="largest / smallest range over t", ylabel="possible gain (dB)")
    ax.set_title("Layers whose range moves further tend to gain more from an interval per step")
    ax.legend(title="correlation\nof range with t", fontsize=8)
    return ax.figure


def histogram_with_grid(profile: Profile, layer: str, t: int, bits: int = 5, s: float | torch.Tensor | None = None,
                        ax: Axes | None = None) -> FigureBase:  # fmt: skip
    """The values of one layer at one time step, the quantization levels, and what lies outside them; bars as wide at every t.
    ``s``: step size; default: the MSE-optimal static one."""
    i, step, grid = profile.row(layer), profile.step(t), profile.grid(layer, bits)
    s = torch.as_tensor(profile.best_steps(layer, bits)[0] if s is None else s, dtype=torch.float32)
    ticks, half = levels(s, grid), s.item() / 2
    share = profile.counts[i, step] / profile.counts[i, step].sum()
    centres, limit = bin_centres(profile.limit[i, step], profile.bins), profile.limit[i, step]
    outside = (centres < ticks[0] - half) | (centres > ticks[-1] + half)
    wide = int(min(8 * profile.limit[i].max() / limit, len(share) // 16))  # bins to a bar; limits are powers of two
    edges = np.linspace(-1, 1, len(share) // wide + 1) * limit
    ax = axes_of(ax)
    for mask, colour, label in ((~outside, ROUNDED, "rounded"), (outside, TRUNCATED, "truncated")):
        heights = (share * mask).reshape(-1, wide).sum(1)
        # One outline, not a patch a bar: sliders draw ten of these.
        label = f"{label}: {share[mask].sum():.1%}"
        ax.stairs(np.where(heights > 0, heights, np.nan), edges, fill=True, lw=0, color=colour, label=label)
    ax.vlines(ticks, 1e-6, 4e-6, color="0.2", lw=1)
    low, high = profile.least[i].min(), profile.greatest[i].max()
    ax.set(yscale="log", ylim=(1e-6, 1), xlim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
    ax.set(xlabel="input of the layer", ylabel="share of values", title=f"{layer}\nt = {t}, {bits} bits, s = {s.item():.3g}")
    ax.legend(loc="upper right", fontsize=8)
    return ax.figure


def histogram_panels(profile: Profile, layer: str, t: Sequence[int], bits: int = 5, s: Sequence | None = None) -> Figure:
    """:func:`histogram_with_grid` side by side for several t; ``s``: one step size for each, or ``None``."""
    fig, axes = plt.subplots(1, len(t), figsize=(4.3 * len(t), 3), layout="constrained", sharey=True)
    for ax, value, s_t in zip(axes, t, s or [None] * len(t), strict=True):
        histogram_with_grid(profile, layer, value, bits, s_t, ax=ax)
    return fig


def split_error(values: torch.Tensor, counts: torch.Tensor, s: torch.Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """``(truncation, rounding)`` parts of the mean squared error, ``"row"``; values, counts: ``"row value"``; s: one a row."""
    inside = fake_quantize(values, s, grid).sub(values).abs() <= s[:, None] / 2 * (1 + 1e-4)
    truncation, rounding = (squared_error(values, counts * part, s, grid) / counts.sum(1) for part in (~inside, inside))
    return truncation.numpy(), rounding.numpy()


def error_over_t(profile: Profile, layer: str, s: float | torch.Tensor, grid: Grid, label: str = "static",
                 ax: Axes | None = None) -> FigureBase:  # fmt: skip
    """Stacked truncation and rounding error of one layer against t, at one step size or one for each t."""
    values, counts = profile.values(layer)
    ax = _stacked(ax, f"{layer}, {label}", profile.t, values, counts, torch.as_tensor(s).expand(len(values)), grid)
    time_axis(ax)
    ax.margins(y=0.25)  # room for the legend
    ax.legend(loc="upper left", ncols=2, fontsize=8)
    return ax.figure


def error_over_s(profile: Profile, layer: str, t: int, bits: int = 4) -> FigureBase:
    """Truncation and rounding error of one layer at one time step, against the step size."""
    grid, step, ratios = profile.grid(layer, bits), profile.step(t), torch.logspace(-0.7, 0.7, 60)
    values, counts = (v[step].expand(60, -1) for v in profile.values(layer))
    best = mse_step(values[:1], grid, counts[:1])[0]
    title = f"{layer}, t = {t}, {bits} bits: too small truncates, too large rounds coarsely"
    ax = _stacked(None, title, ratios, values, counts, best * ratios, grid)
    ax.axvline(1, color="k", ls=":", label="best s")
    ax.set(xscale="log", xlabel="step size / best step size at this t")
    plain_log(ax.xaxis)
    ax.legend(loc="upper center", fontsize=8)
    return ax.figure


def _stacked(ax: Axes | None, title: str, x: Any, *what: Any) -> Axes:
    """Axes with :func:`split_error` of ``what`` against x: rounding below, truncation above."""
    ax, parts = axes_of(ax), split_error(*what)
    ax.stackplot(x, *parts[::-1], labels=["rounding", "truncation"], colors=[ROUNDED, TRUNCATED], alpha=0.75)
    ax.set(ylabel="mean squared error", title=title)
    return ax
