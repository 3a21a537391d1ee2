"""Figures of tables show the numbers that the tables hold."""

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tdq_utils import result_plots

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def table():
    """Two methods at two widths of weights, two repeats, and the two references."""
    rows = [
        dict(method=method, weights_method="nearest", weights=w, activations=a, repeat=r, fcd=10 - a + r + (method == "mse"))
        for method in ("mse", "tdq") for w, a in ((8, 5), (8, 6), (4, 5)) for r in (0, 1)
    ]  # fmt: skip
    rows += [
        dict(method=name, weights_method="nearest", weights=0, activations=0, repeat=0, fcd=1)
        for name in ("full precision", "real images")
    ]
    return pd.DataFrame(rows)


def test_distance_bars_name_the_full_precision_line():
    rows = [dict(method="full precision", fcd=1.0), dict(method="tdq", weights=8, activations=5, fcd=2.0)]
    ax = result_plots.distance_bars(pd.DataFrame(rows)).axes[0]
    assert "full precision" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_line_a_method_a_panel_a_width(table):
    fig = result_plots.quality_against_bits(table)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes] == ["8-bit weights", "4-bit weights"]
    ax = fig.axes[0]
    names = [text.get_text() for text in fig.axes[-1].get_legend().get_texts()]
    assert set(names) == {"static, MSE", "TDQ", "full precision"}
    means = {container.get_label(): container.lines[0].get_ydata().tolist() for container in ax.containers}
    assert means == {"static, MSE": [6.5, 5.5], "TDQ": [5.5, 4.5]}
    assert ax.get_xlabel() and ax.get_ylabel()


def test_relative_to_a_method_repeat_by_repeat(table):
    ax = result_plots.quality_against_bits(table, relative_to="mse").axes[0]
    means = {container.get_label(): container.lines[0].get_ydata().tolist() for container in ax.containers}
    assert means["static, MSE"] == [1, 1]
    assert means["TDQ"] == pytest.approx([(5 / 6 + 6 / 7) / 2, (4 / 5 + 5 / 6) / 2])
    assert "static, MSE" in ax.get_ylabel()


def test_only_the_wanted_methods(table):
    fig = result_plots.quality_against_bits(table, methods=["tdq"], title="title")
    assert [container.get_label() for container in fig.axes[0].containers] == ["TDQ"]


def test_time_is_stacked_to_the_whole():
    rows = [dict(variant=v, kind=k, seconds=s) for v, s in (("floats", 2.0), ("integers", 0.5)) for k in ("conv", "rest")]
    ax = result_plots.time_bars(pd.DataFrame(rows), title="A").axes[0]
    ends = {round(patch.get_x() + patch.get_width(), 6) for patch in ax.patches}
    assert ends == {2.0, 4.0, 0.5, 1.0}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["integers", "floats"]  # the first on top


def test_ratios_to_the_chosen_baseline():
    rows = [
        dict(variant=v, baseline=b, ratio=r, ratio_min=r / 2, ratio_max=2 * r)
        for b, v, r in (("floats", "floats", 1.0), ("floats", "integers", 0.4), ("integers", "integers", 1.0))
    ]
    ax = result_plots.ratio_bars(pd.DataFrame(rows), "floats").axes[0]
    assert [patch.get_width() for patch in ax.patches] == [0.4, 1.0]
    assert "floats" in ax.get_xlabel()


def test_a_bar_a_variant_and_method():
    rows = [
        dict(question="images", variant=v, method=m, repeat=r, fcd=f + r)
        for v, m, f in (("2", "mse", 3.0), ("2", "tdq", 2.0), ("32", "mse", 2.5), ("32", "tdq", 1.0)) for r in (0, 1)
    ]  # fmt: skip
    ax = result_plots.variant_bars(pd.DataFrame(rows), "images").axes[0]
    bars = {c.get_label(): [patch.get_width() for patch in c.patches] for c in ax.containers if hasattr(c, "patches")}
    assert bars == {"static, MSE": [3.5, 3.0], "TDQ": [2.5, 1.5]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "32"]


def test_a_line_a_method_over_steps():
    rows = [dict(method=m, steps=s, repeat=0, fcd=f) for m, s, f in (("tdq", 10, 3.0), ("tdq", 50, 2.0), ("mse", 10, 4.0))]
    ax = result_plots.quality_against_steps(pd.DataFrame(rows)).axes[0]
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in ax.containers}
    assert lines == {"TDQ": [3.0, 2.0], "static, MSE": [4.0]}
