"""The look of all figures: colour-blind-safe, axes labelled; and the figures that need no profile and no table."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, NullFormatter

from tdq_utils.show.tables import NAMES

PALETTE = sns.color_palette("colorblind")
# Rules of training share the colours of static intervals: never both in one figure.
_CHOSEN = {"minmax": 1, "momentum": 8, "percentile": 7, "mse": 3, "ptq4dm": 9, "learned": 6, "table": 2, "tdq": 0, "dynamic": 4,
           "dynamic-sample": 5, "pact": 1, "lsq": 3, "nipq": 4, "tdq-pact": 9, "tdq-nipq": 2, "fine-tuned": 7}  # fmt: skip
COLOURS = {"full precision": "0.35", **{method: PALETTE[number] for method, number in _CHOSEN.items()}}
MARKERS = dict(zip(COLOURS, cycle("os^vD<>pPX*h"), strict=False))
T_AXIS = "time step t  (999 = noise, 0 = image)"


def set_style() -> None:
    """The kit's look; call once at the top of a notebook."""
    sns.set_theme(style="whitegrid", context="notebook", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 80, "savefig.dpi": 80, "axes.titlelocation": "left", "axes.titlesize": "medium"})


def axes_of(ax: Axes | None, width: float = 7.0, height: float = 3.2) -> Axes:
    """``ax``, or new axes of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def plain_log(axis: Axis) -> None:
    """Ticks 1, 2, 5, 10, ... on a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def time_axis(ax: Axes) -> None:
    """Sampling runs from noise to image, so t falls from left to right."""
    ax.set_xlabel(T_AXIS)
    if not ax.xaxis_inverted():
        ax.invert_xaxis()


def heading(fig: FigureBase, title: str | None) -> None:
    """A title above all panels, if there is one."""
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize="medium")


def image_rows(rows: Mapping[str, torch.Tensor], columns: int = 10, title: str | None = None,
               fig: FigureBase | None = None) -> FigureBase:  # fmt: skip
    """``{label: images "image 1 height width" in [-1, 1]}`` as rows, the same seeds in each column; ``fig`` or new."""
    if fig is None:
        fig = plt.figure(figsize=(0.75 * columns + 1.6, 0.8 * len(rows) + 0.4), layout="constrained")
    axes = fig.subplots(len(rows), 1, squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], rows.items(), strict=True):
        strip = torch.cat(list(images[:columns, 0].clamp(-1, 1)), dim=1)
        ax.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    heading(fig, title)
    return fig


def lines_over_t(curves: Mapping[str, tuple[Any, Any]], ylabel: str, title: str, ax: Axes | None = None,
                 markers: bool = False, log: bool = False) -> FigureBase:  # fmt: skip
    """Curves ``{label: (t, values)}``; labels that are methods get the method's name, colour and marker (``markers``: show the
    points), others a colour that is left."""
    ax, taken = axes_of(ax), [COLOURS[label] for label in curves if label in COLOURS]
    spare = (colour for colour in PALETTE if colour not in taken)
    styles = {"mse": "--", "minmax": "--", "learned": "--", "table": ":"}
    for label, (t, values) in curves.items():
        colour, style = COLOURS.get(label) or next(spare), styles.get(label, "-")
        marker = MARKERS.get(label, "o") if markers else None
        ax.plot(t, values, label=NAMES.get(label, label), color=colour, ls=style, marker=marker, ms=5)
    time_axis(ax)
    ax.set(ylabel=ylabel, title=title, yscale="log" if log else "linear")
    ax.legend(fontsize=8)
    return ax.figure
