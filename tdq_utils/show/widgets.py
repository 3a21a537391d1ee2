"""Every slider panel. Frames are drawn by ``plots``; each panel has a static twin beside it in the notebook."""

import io

import ipywidgets as w
import matplotlib.pyplot as plt

from tdq_utils.errors import TDQError


def as_png(figure):
    """A figure -> PNG bytes; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def frames(draw, values, label="t"):
    """A slider over pre-drawn figures: moves without a kernel, too.

    Args:
        draw: function of one value that returns a figure. values: one frame for each.
        label: name of the slider.

    Returns:
        A widget; put it last in a cell tagged ``nbval-ignore-output``.
    """
    values = list(values)
    if not values:
        raise TDQError("frames needs at least one value to draw; got none.")
    pictures = [w.Image(value=as_png(draw(value)), format="png") for value in values]
    slider = w.SelectionSlider(
        options=[(str(v), i) for i, v in enumerate(values)], description=label, layout=w.Layout(width="90%")
    )
    stack = w.Stack(pictures, selected_index=0)
    w.jslink((slider, "index"), (stack, "selected_index"))
    return w.VBox([slider, stack])


def live(draw, **controls):
    """A panel redrawn by the kernel whenever a control moves.

    Args:
        draw: function of the controls' values, by name, that returns a figure.
        controls: ipywidgets with a ``value``.

    Returns:
        A widget; its ``picture`` attribute is the image, its ``controls`` the dict, for tests.
    """
    picture = w.Image(format="png")

    def redraw(change=None):
        picture.value = as_png(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    panel = w.VBox([*controls.values(), picture])
    panel.picture, panel.controls = picture, controls
    return panel
