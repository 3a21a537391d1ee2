import ipywidgets
import matplotlib.pyplot as plt
import pytest

from tdq_utils.errors import TDQError
from tdq_utils.show import widgets


def draw(value=1):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.plot([0, value])
    ax.set_ylim(0, 10)
    return fig


def test_frames_hold_one_picture_a_value_and_follow_the_slider():
    panel = widgets.frames(draw, [1, 5, 9])
    slider, stack = panel.children
    assert list(slider.options) == ["1", "5", "9"]
    assert len({bytes(picture.value) for picture in stack.children}) == 3
    assert all(bytes(picture.value).startswith(b"\x89PNG") for picture in stack.children)
    assert not plt.get_fignums()  # nothing left open


def test_frames_need_a_value():
    with pytest.raises(TDQError, match="at least one"):
        widgets.frames(draw, [])


def test_live_redraws_when_a_control_moves():
    panel = widgets.live(draw, value=ipywidgets.IntSlider(1, 1, 9))
    before = bytes(panel.picture.value)
    panel.controls["value"].value = 7
    assert bytes(panel.picture.value) != before
