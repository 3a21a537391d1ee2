"""Figures of tables show the numbers that the tables hold."""

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tdq_utils.show import result_plots

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
    (whiskers,) = (line for line in ax.collections if len(line.get_segments()) == 2)
    ends = [segment[:, 0].tolist() for segment in whiskers.get_segments()]
    assert ends == [pytest.approx([0.2, 0.8]), pytest.approx([0.5, 2.0])]
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


@pytest.fixture
def trainings():
    """A calibrated and two trained methods, one with two kinds of constants, one trained longer, at W4A4; two repeats each."""
    kinds = [("mse", 0, 0.0, 9), ("lsq", 600, 100.0, 6), ("lsq", 600, 0.1, 5), ("tdq", 600, 100.0, 4),
             ("tdq", 2400, 100.0, 3)]  # fmt: skip
    rows = [
        dict(method=method, weights=4, activations=4, iterations=n, step_rate=rate, generator_rate=0.0, repeat=r, fcd=fcd + r,
             split_skips=False)
        for method, n, rate, fcd in kinds for r in (0, 1)
    ]  # fmt: skip
    full = dict(
        method="full precision",
        weights=0,
        activations=0,
        iterations=0,
        step_rate=0.0,
        generator_rate=0.0,
        repeat=0,
        fcd=1,
        split_skips=False,
    )
    split = dict(rows[-4], fcd=2, split_skips=True)
    return pd.DataFrame([*rows, full, split])


def test_a_bar_a_kind_of_training(trainings):
    ax = result_plots.training_bars(trainings, title="title").axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [
        "TDQ, split skips",
        "TDQ, 2400 iterations",
        "TDQ",
        "LSQ, step rate 0.1",
        "LSQ",
        "static, MSE: calibrated only",
    ]
    assert [bar.get_width() for bar in ax.patches] == [2, 3.5, 4.5, 5.5, 6.5, 9.5]


def test_a_line_a_training():
    curves = pd.DataFrame(
        dict(method=["lsq"] * 2 + ["tdq"] * 2, weights=4, activations=4, repeat=0, iteration=[20, 40] * 2, loss=[4, 3, 2, 1])
    )
    ax = result_plots.loss_lines(curves, title="title").axes[0]
    assert {line.get_label(): line.get_ydata().tolist() for line in ax.lines} == {"LSQ": [4, 3], "TDQ": [2, 1]}


def test_loss_lines_above_another_method():
    methods = ["fine-tuned", "lsq"]
    curves = pd.DataFrame(
        [
            dict(method=method, weights=4 * i, activations=4 * i, repeat=repeat, iteration=20, loss=[1, 4 + repeat][i])
            for i, method in enumerate(methods)
            for repeat in range(3 - i)  # a repeat without the other method does not count
        ]
    )
    (ax,) = result_plots.loss_lines(curves, above="fine-tuned").axes
    assert {line.get_label(): line.get_ydata().tolist() for line in ax.lines} == {"LSQ": [3.5]}
    assert "above full precision, fine-tuned" in ax.get_ylabel()
