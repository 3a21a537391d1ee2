"""Figures of the report, as inline SVG that takes its colours from the page: light or dark."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import FigureBase

from tdq_utils.show.plots import COLOURS, PALETTE, axes_of, lines_over_t, set_style
from tdq_utils.show.tables import NAMES

INK, LINES = "#010203", "#010204"  # of text and grid, until the page's own colours take their places
SHOWN = 30  # bars of a figure; the table has all
T_AXIS = "time step t, as the model receives it (sampling goes from left to right)"


@contextmanager
def page_style() -> Iterator[None]:
    """While open, figures have the kit's look on no background; afterwards matplotlib's settings are what they were."""
    with plt.rc_context():
        set_style()
        plt.rcParams.update(
            dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK)
        )
        plt.rcParams.update(dict.fromkeys(("axes.edgecolor", "grid.color"), LINES))
        plt.rcParams.update(dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"))
        plt.rcParams.update({"legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "report"})
        yield


def inline(figure: Any, name: str, alt: str) -> str:
    """A figure as an SVG element whose ids begin with ``name``; the figure is closed. ``alt``: what it shows, in words."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace(LINES, "var(--line)")
    text = re.sub(r'<svg (.*?)width="[\d.]+pt"', r"<svg \1", text, count=1, flags=re.DOTALL)
    text = re.sub(r'height="[\d.]+pt"', "", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)


def heat_map(found: Mapping[str, Any], alt: str) -> tuple[str, tuple[float, ...]]:
    """Layer x t: the 99.9 % range, relative to each layer's largest, as :func:`inline`; and the left, right, upper and lower end
    of its cells, as parts of width and height."""
    reach, n = np.array(found["range"], dtype=float), len(found["layers"])
    ax = axes_of(None, 9, min(max(0.15 * n, 1.5), 40) + 1.5)
    shown = ax.imshow(reach / np.maximum(reach.max(1, keepdims=True), 1e-30), aspect="auto", cmap="cividis", vmin=0, vmax=1,
                      interpolation="nearest")  # fmt: skip
    columns, rows = (np.arange(0, size, max(1, -(-size // most))) for size, most in ((len(found["t"]), 10), (n, 260)))
    ax.set_xticks(columns, [f"{found['t'][i]:g}" for i in columns], fontsize=9)
    ax.set_yticks(rows, [found["layers"][i] for i in rows], fontsize=7)
    ax.set_xlabel(T_AXIS, fontsize=9)
    ax.grid(False)
    bar = ax.figure.colorbar(shown, ax=ax, location="top", shrink=0.5, aspect=35, pad=0.01)
    bar.set_label("range at t / largest range of the layer", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    picture = inline(ax.figure, "heat", alt)
    box = ax.get_position()  # by now: the layout is that of the picture
    return picture, (float(box.x0), float(box.x1), float(1 - box.y1), float(1 - box.y0))


def error_over_bits(found: Mapping[str, Any]) -> FigureBase:
    """The output's error by bits of activations, of the best constant and of TDQ."""
    ax = axes_of(None, 5.4, 3.2)
    for method, style in (("mse", "--"), ("tdq", "-")):
        rows = [row for row in found["outputs"] if row["method"] == method and row["error_db"] is not None]
        points = [row["bits"] for row in rows], [row["error_db"] for row in rows]
        ax.plot(*points, style, marker="s" if method == "mse" else "o", color=COLOURS[method], label=NAMES[method])
    ax.set(
        xlabel="bits of activations", ylabel="error of the output (dB)", xticks=sorted({row["bits"] for row in found["outputs"]})
    )
    ax.legend()
    return ax.figure


def gains(found: Mapping[str, Any]) -> FigureBase:
    """How much of the best constant's error is removed, by bits of activations; bars are two standard errors."""
    ax, rows = axes_of(None, 5.4, 3.2), found["gains"]
    height, margin = ([100 * (row[name] or 0) for row in rows] for name in ("removed", "removed_se"))
    ax.bar([f"A{row['bits']}" for row in rows], height, color=COLOURS["tdq"], width=0.55)
    if any(margin):
        ax.errorbar(range(len(rows)), height, [2 * value for value in margin], fmt="none", ecolor=INK, capsize=4, lw=1.2)
    ax.axhline(0, color=INK, lw=0.8)
    ax.set(xlabel="bits of activations", ylabel="removed of the constant's loss (%)")
    ax.grid(False, axis="x")
    return ax.figure


def error_over_t(found: Mapping[str, Any]) -> FigureBase:
    """The output's error on recorded calls against t, by method."""
    ax = axes_of(None, 9, 3.2)
    values = {
        method: [np.nan if row["error_db"] is None else row["error_db"] for row in rows]
        for method, rows in found["over_t"].items()
    }
    curves = {method: ([row["t"] for row in rows], values[method]) for method, rows in found["over_t"].items()}
    lines_over_t(curves, "error of the output (dB)", "", ax, markers=True)
    if found["t"][0] < found["t"][-1]:
        ax.invert_xaxis()
    ax.set_xlabel(T_AXIS)
    ax.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax.figure


def sensitivity_bars(found: Mapping[str, Any]) -> FigureBase:
    """Each layer alone quantized, and what it removes alone in full precision: those that matter most, the first on top."""
    rows = sorted(found["sensitivity"]["layers"], key=lambda row: row["removed"])[-SHOWN:]
    names, places = [row["layer"] for row in rows], np.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.1 + 0.17 * len(rows)), sharey=True, layout="constrained")
    whole = found["sensitivity"]["all_db"]
    alone = np.array([np.nan if row["alone_db"] is None else row["alone_db"] for row in rows])
    left.hlines(places, alone, whole or 0, color=LINES, lw=1)
    left.plot(alone, places, "o", color=PALETTE[0], ms=5)
    if whole is not None:
        left.axvline(whole, color=COLOURS["mse"], ls="--", lw=1.2)
        left.set_title("dashed: all layers quantized; lines: how far below it", fontsize=8)
    left.set_xlabel("error, this layer alone quantized (dB)", fontsize=9)
    left.set_yticks(places, names, fontsize=7)
    share = [100 * row["removed"] for row in rows]
    margin = [200 * (row["removed_se"] or 0) for row in rows]
    right.barh(places, share, color=PALETTE[0], height=0.65)
    right.errorbar(share, places, xerr=margin, fmt="none", ecolor=INK, lw=0.8)
    right.axvline(0, color=INK, lw=0.8)
    right.set_title("thin lines: two standard errors over calls", fontsize=8)
    right.set_xlabel("removed of the error, this layer alone kept (%)", fontsize=9)
    right.set_ylim(-0.7, len(rows) - 0.3)
    for ax in (left, right):
        ax.grid(False, axis="y")
        ax.tick_params(axis="x", labelsize=8)
    return figure


def strip(images: torch.Tensor, most: int = 8) -> tuple[bytes, int]:
    """Images ``"seed 1|3 height width"`` in [-1, 1] -> a PNG of the first ``most`` side by side, and how many they are."""
    images = images[:most].clamp(-1, 1).add(1).div(2)
    row = torch.cat([torch.nn.functional.pad(image, (0, 1)) for image in images], dim=2)[..., :-1]
    buffer = io.BytesIO()
    plt.imsave(buffer, row.expand(3, -1, -1).permute(1, 2, 0).numpy(), format="png")
    return buffer.getvalue(), len(images)
