"""Every figure can be drawn, has labelled axes, and shows the numbers that it claims to show."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from tdq_utils import profile_activations
from tdq_utils.denoiser.profile import bin_centres
from tdq_utils.method.grid import squared_error
from tdq_utils.show import plots, profile_plots

matplotlib.use("Agg")


@pytest.fixture
def profile(unet, scheduler):
    return profile_activations(unet, scheduler, seeds=range(4), steps=3, progress=False)


@pytest.fixture(autouse=True)
def style_and_close():
    plots.set_style()
    yield
    plt.close("all")


FIGURES = {
    "drift_heatmap": lambda p: profile_plots.drift_heatmap(p, p.layers[:5]),
    "range_ribbon": lambda p: profile_plots.range_ribbon(p, p.layers[2], static_bits=5),
    "range_boxes": lambda p: profile_plots.range_boxes(p, p.layers[2]),
    "drift_scatter": lambda p: profile_plots.drift_scatter(p.drift()),
    "histogram_with_grid": lambda p: profile_plots.histogram_with_grid(p, p.layers[2], t=p.t[1], bits=4),
    "histogram_panels": lambda p: profile_plots.histogram_panels(p, p.layers[2], t=p.t[:2], bits=4, s=[0.1, 0.2]),
    "error_over_t": lambda p: profile_plots.error_over_t(p, p.layers[2], 0.1, p.grid(p.layers[2], 4)),
    "error_over_s": lambda p: profile_plots.error_over_s(p, p.layers[2], t=p.t[0], bits=4),
    "lines_over_t": lambda p: plots.lines_over_t({"mse": ([3, 2], [1, 2]), "tdq": ([3, 2], [2, 3])}, "s", "title"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled(name, profile):
    ax = FIGURES[name](profile).axes[0]
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_title(loc="left")


def test_image_rows_shows_the_same_columns_in_every_row():
    fig = plots.image_rows({"a": torch.zeros(5, 1, 4, 4), "b": torch.ones(5, 1, 4, 4)}, columns=3)
    assert [ax.images[0].get_array().shape for ax in fig.axes] == [(4, 12), (4, 12)]
    assert [ax.get_ylabel() for ax in fig.axes] == ["a", "b"]


def test_truncation_and_rounding_add_up_to_the_error(profile):
    layer = profile.layers[2]
    grid, (values, counts) = profile.grid(layer, 4), profile.values(layer)
    s = profile.best_steps(layer, 4)[0].expand(len(values)) * 0.4
    truncation, rounding = profile_plots.split_error(values, counts, s, grid)
    assert truncation[0] > 0
    np.testing.assert_allclose(truncation + rounding, squared_error(values, counts, s, grid) / counts.sum(1), rtol=1e-5)


def test_histograms_of_all_t_have_bars_of_one_width_and_exact_shares(profile):
    drifting = max(profile.layers, key=lambda layer: np.ptp(profile.limit[profile.row(layer)]))
    i, s, widths = profile.row(drifting), profile.best_steps(drifting, 4)[0], set()
    assert len(set(profile.limit[i])) > 1  # so that their bins differ
    for step, t in enumerate(profile.t):
        ax = profile_plots.histogram_with_grid(profile, drifting, t, bits=4, s=s).axes[0]
        widths |= {round(width, 9) for patch in ax.patches for width in np.diff(patch.get_data().edges)}
        levels = profile_plots.levels(s, profile.grid(drifting, 4))
        centres = bin_centres(profile.limit[i, step])
        outside = (centres < levels[0] - s.item() / 2) | (centres > levels[-1] + s.item() / 2)
        share = profile.counts[i, step][outside].sum() / profile.counts[i, step].sum()
        assert f"truncated: {share:.1%}" in [text.get_text() for text in ax.get_legend().get_texts()]
        assert sum(np.nansum(patch.get_data().values) for patch in ax.patches) == pytest.approx(1)
        plt.close(ax.figure)
    assert len(widths) == 1


def test_logarithmic_ticks_are_plain_numbers():
    ax = plots.axes_of(None)
    ax.plot([1, 2], [0.003, 0.4])
    ax.set_yscale("log")
    plots.plain_log(ax.yaxis)
    ax.figure.draw_without_rendering()
    assert {"0.005", "0.01", "0.2"} <= {label.get_text() for label in ax.get_yticklabels()}
    assert not any(label.get_text() for label in ax.get_yticklabels(minor=True))
    plt.close(ax.figure)


def test_lines_over_t_never_share_a_colour():
    t = [999, 499]
    ax = plots.lines_over_t({label: (t, [1, 2]) for label in ("calibrated", "tdq", "raw t", "mse")}, "s", "title").axes[0]
    colours = [line.get_color() for line in ax.lines]
    assert len(set(colours)) == 4 and colours[1] == plots.COLOURS["tdq"]
    assert [line.get_label() for line in ax.lines] == ["calibrated", "TDQ", "raw t", "static, MSE"]
