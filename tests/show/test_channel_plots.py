"""Figures of channels: what they show is what was computed."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from tdq_utils.show import channel_plots as module

X = torch.randn(3, 500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8.0, 2.0, 4.0])


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_ranges_hold_all_but_one_in_a_thousand():
    inside = (X.abs() <= module.ranges(X)[:, None]).float().mean(1)
    assert (inside >= 0.998).all() and (inside < 1).any() is not None


def test_the_map_has_a_row_a_channel_and_a_column_a_step():
    figure = module.channel_map(X, [999, 499, 0], "channels")
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (4, 3) and (shown.max(1)[1:] >= shown.max(1)[:-1]).all()


def test_bars_are_of_one_step_and_level_once_divided():
    d = module.ranges(X).amax(0)
    left, right = module.channel_bars(X, d, [999, 499, 0], 1).axes
    heights = [[bar.get_height() for bar in ax.patches] for ax in (left, right)]
    assert heights[0] == sorted(heights[0]) and max(heights[1]) / min(heights[1]) < 1.5 < max(heights[0]) / min(heights[0])
    assert "t = 499" in left.get_title()


def test_a_point_a_layer():
    table = pd.DataFrame(dict(layer=["a", "b"], time_db=[0.5, 1.0], channels_db=[2.0, 3.0], both_db=[3.0, 4.0]))
    ax = module.time_and_channels(table).axes[0]
    assert ax.collections[0].get_offsets().tolist() == [[0.5, 2.0], [1.0, 3.0]]


def test_points_are_repeats_and_learned_rounding_is_left_out():
    rows = [("full precision", 0, 0, "-", "nearest", 1.2), ("mse", 8, 5, "-", "nearest", 7.0),
            ("mse", 8, 5, "range", "nearest", 3.5), ("mse", 8, 5, "range", "nearest", 3.6),
            ("tdq", 4, 4, "range", "adaround", 9.0)]  # fmt: skip
    names = ["method", "weights", "activations", "rule", "weights_method", "fcd"]
    ax = module.balance_points(pd.DataFrame(rows, columns=names)).axes[0]
    found = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert found["one constant"] == [7.0] and found["one constant, balanced"] == [3.5, 3.6] and found["TDQ, balanced"] == []
