"""Every slider panel: last in a cell tagged ``nbval-ignore-output``, with a static twin in the cell after it."""

import io
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets as w
import matplotlib.pyplot as plt
from matplotlib.figure import FigureBase

from tdq_utils.errors import TDQError


def as_png(figure: Any) -> bytes:
    """A figure -> PNG; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def frames(draw: Callable[..., FigureBase], values: Iterable, label: str = "t") -> w.VBox:
    """A slider over pre-drawn figures, ``draw(value)`` for each value: moves without a kernel, too. TDQError: no values."""
    values = list(values)
    if not values:
        raise TDQError("frames needs at least one value to draw; got none.")
    pictures = [w.Image(value=as_png(draw(value)), format="png") for value in values]
    slider = w.SelectionSlider(options=list(map(str, values)), description=label, layout=w.Layout(width="90%"))
    stack = w.Stack(pictures, selected_index=0)
    w.jslink((slider, "index"), (stack, "selected_index"))
    return w.VBox([slider, stack])


def live(draw: Callable[..., FigureBase], **controls: w.ValueWidget) -> w.VBox:
    """A panel redrawn by the kernel when a control moves; ``draw`` takes their values by name. For tests: its ``picture`` and
    ``controls``."""
    picture = w.Image(format="png", layout=w.Layout(align_self="flex-start"))  # as large as it is

    def redraw(change: object = None) -> None:
        picture.value = as_png(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    panel = w.VBox([*controls.values(), picture])
    panel.picture, panel.controls = picture, controls
    return panel
