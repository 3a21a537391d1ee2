"""Figures of channels: their ranges over t, what a balance makes of them, and what lies in time and in channels."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from tdq_utils.show.plots import COLOURS, PALETTE, axes_of

SHARE = 0.999  # of magnitudes that a range holds


def ranges(x: torch.Tensor) -> torch.Tensor:
    """Vectors ``"t vector channel"`` -> the 99.9 % range of each channel at each t, ``"t channel"``."""
    return x.abs().kthvalue(max(1, round(SHARE * x.shape[1])), dim=1).values


def channel_map(x: torch.Tensor, t: Sequence[float], title: str, ax: Axes | None = None) -> FigureBase:
    """Channel x t: ranges of :func:`ranges`, channels in the order of their largest."""
    reach = ranges(x)
    reach = reach[:, reach.amax(0).argsort()].T
    ax = axes_of(ax, 8, 3.4)
    picture = ax.imshow(reach, aspect="auto", cmap="cividis", interpolation="nearest", vmin=0)
    columns = range(0, len(t), max(1, -(-len(t) // 10)))
    ax.set_xticks(columns, [f"{t[i]:g}" for i in columns])
    ax.set(xlabel="time step t  (999 = noise, 0 = image)", ylabel="channel, by its range", title=title)
    ax.grid(False)
    ax.figure.colorbar(picture, ax=ax, label="99.9 % range")
    return ax.figure


def channel_bars(x: torch.Tensor, d: torch.Tensor, t: Sequence[float], step: int) -> FigureBase:
    """The range of every channel at one step: as it is, and divided by ``d``; both relative to the largest of all steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    for ax, values, colour, what in zip(axes, (x, x / d), (PALETTE[7], PALETTE[0]), ("as they are", "divided by d"), strict=True):
        reach = ranges(values)
        order = ranges(x).amax(0).argsort()
        ax.bar(np.arange(x.shape[2]), (reach[step] / reach.max())[order], width=1.0, color=colour)
        ax.axhline(float(reach[step].max() / reach.max()), color=COLOURS["mse"], ls="--", lw=1.2)
        ax.set(xlabel="channel, by its range", ylim=(0, 1.05), title=f"{what}, t = {t[step]:g}")
        ax.grid(False, axis="x")
    axes[0].set_ylabel("99.9 % range\n/ largest of all t")
    return figure


def time_and_channels(table: pd.DataFrame, ax: Axes | None = None) -> FigureBase:
    """Gain over time against gain over channels, a point a layer (:func:`tdq_utils.fit.decomposition.decompose`)."""
    ax = axes_of(ax, 5.4, 4.2)
    end = 1.15 * max(table.time_db.max(), table.channels_db.max(), 0.1)
    ax.plot([0, end], [0, end], color="0.5", lw=1, ls=":")
    ax.scatter(table.time_db, table.channels_db, color=PALETTE[0], s=22)
    ax.plot(table.time_db.median(), table.channels_db.median(), "X", color=COLOURS["mse"], ms=11, label="median")
    ax.annotate("channels matter more", (0.03, 0.94), xycoords="axes fraction", fontsize=9)
    ax.annotate("time matters more", (0.97, 0.06), xycoords="axes fraction", ha="right", fontsize=9)
    ax.set(xlabel="gain of an interval for each t (dB)", ylabel="gain of an interval for each channel (dB)")
    ax.set(xlim=(min(0, table.time_db.min()), end), ylim=(min(0, table.channels_db.min()), end))
    ax.legend(loc="center right", fontsize=9)
    return ax.figure


def balance_points(table: pd.DataFrame, ax: Axes | None = None) -> FigureBase:
    """FCD of each repeat by bits: one interval and TDQ, as channels are and balanced. Columns of the tables, and ``rule``."""
    ax = axes_of(ax, 8, 3.4)
    bits = [f"W{w}A{a}" for w, a in dict.fromkeys(zip(table.weights, table.activations, strict=True)) if w]
    looks = {("mse", "-"): ("s", "one constant"), ("tdq", "-"): ("o", "TDQ"),
             ("mse", "range"): ("s", "one constant, balanced"), ("tdq", "range"): ("o", "TDQ, balanced")}  # fmt: skip
    for i, ((method, rule), (marker, label)) in enumerate(looks.items()):
        rows = table[(table.method == method) & (table.rule == rule) & (table.weights_method == "nearest")]
        places = [bits.index(f"W{w}A{a}") + 0.16 * (i - 1.5) for w, a in zip(rows.weights, rows.activations, strict=True)]
        filled = "none" if rule == "-" else COLOURS[method]
        ax.plot(places, rows.fcd, marker, color=COLOURS[method], mfc=filled, ls="none", label=label)
    clean = table[table.method == "full precision"].fcd
    ax.axhline(clean.mean(), color=COLOURS["full precision"], lw=1, label="full precision")
    ax.set_xticks(range(len(bits)), bits)
    ax.set(ylabel="FCD (lower is better)", ylim=(0, None))
    ax.grid(False, axis="x")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax.figure
