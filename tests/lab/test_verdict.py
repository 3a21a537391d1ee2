"""Two sentences that never say more than the numbers."""

import pytest

from tdq_utils.lab.verdict import certain, listed, verdict


def found(gains, layers=(), measured="output", gain=()):
    rows = [dict(bits=bits, removed=share, removed_se=error) for bits, share, error in gains]
    sensitivity = dict(layers=[dict(layer=name, removed=share, removed_se=error) for name, share, error in layers])
    drift = [dict(layer=name, kept=kept, gain_db_6=db) for name, kept, db in gain]
    return dict(gains=rows, measured=measured, activations=6, sensitivity=sensitivity, drift=drift)


LAYERS = [("a", 0.31, 0.02), ("b", 0.12, 0.01), ("c", 0.05, 0.01)]
START = "Of what the best constant loses in the model's output, an interval over t "


@pytest.mark.parametrize(("gains", "says"), [
    ([(6, 0.09, 0.01), (8, 0.001, 0.002)], "removes 9 % at A6, and nothing at A8."),
    ([(4, 0.21, 0.03), (5, 0.15, 0.02), (6, 0.004, 0.001)], "removes 21 % at A4 and 15 % at A5, and nothing at A6."),
    ([(4, 0.0, 0.001), (8, -0.001, 0.001)], "removes nothing at A4 and A8."),
    ([(6, 0.2, 0.15)], "removes nothing sure at A6."),
    ([(6, 0.2, 0.05), (8, -0.03, 0.005)], "removes 20 % at A6; it adds 3 % at A8."),
    ([(8, -0.03, 0.005)], "adds 3 % at A8."),
])  # fmt: skip
def test_what_an_interval_over_t_removes(gains, says):
    assert verdict(found(gains, LAYERS))[0] == START + says


@pytest.mark.parametrize(("layers", "says"), [
    (LAYERS, "Layers a and b decide: in full precision, one at a time, they remove 31 % and 12 % of the error at A6."),
    (LAYERS[:1], "Layer a decides: in full precision it removes 31 % of the error at A6."),
    (LAYERS[2:], "No single layer decides: c in full precision removes 5 % of the error at A6."),
    ([("a", 0.3, 0.2)], "No single layer decides: in full precision, none removes a part of the error at A6 that is sure."),
    ([("a", 0.3, 0.01), ("b", 0.4, 0.01), ("c", 0.2, 0.01), ("d", 0.9, 0.01)],
     "Layers d, b and a decide: in full precision, one at a time, they remove 90 %, 40 % and 30 % of the error at A6."),
])  # fmt: skip
def test_which_layers_decide(layers, says):
    assert verdict(found([(6, 0.1, 0.01)], layers))[1] == says


def test_without_the_output_it_says_what_could_be_gained_at_most():
    gain = [("t", True, 9.0), ("a", False, 3.14), ("b", False, 1.0), ("c", False, 0.2)]
    assert verdict(found([(4, 0.12, None), (6, 0.001, None)], measured="inputs", gain=gain)) == [
        "Of what the best constant loses at the layers' inputs, the best interval for each t can remove at most 12 % at A4, and "
        "nothing at A6.",
        "Layers a and b could gain 3.1 dB and 1.0 dB at A6; the median of all is 1.0 dB.",
    ]
    second = verdict(found([(6, 0.0, None)], measured="inputs", gain=[("t", True, 9.0), ("a", False, 0.04)]))[1]
    assert second == "No layer stands out: at A6 the most that one could gain is 0.0 dB (a)."


@pytest.mark.parametrize(("static", "tdq", "says"), [
    ((0.4, 0.05), (0.5, 0.05), "with one constant removes 40 %; with TDQ removes 50 %"),
    ((0.1, 0.2), (-0.2, 0.05), "with one constant changes nothing that is sure; with TDQ adds 20 %"),
])  # fmt: skip
def test_time_or_channels(static, tdq, says):
    layers = [dict(layer=name, time_db=db, channels_db=4 * db, both_db=5 * db) for name, db in (("a", 0.1), ("b", 0.5), ("c", 9))]
    balanced = [dict(method=name, removed=share, removed_se=se) for name, (share, se) in (("mse", static), ("tdq", tdq))]
    assert verdict(found([(6, 0.1, 0.01)], LAYERS) | dict(channels=layers, balanced=balanced))[2:] == [
        "At a layer's input the error at A6 falls by 0.5 dB if its interval follows time, by 2.0 dB if it follows channels, by "
        "2.5 dB if both (medians of 3 layers).",
        f"Balanced over channels, the model at A6 {says} of what the best constant loses.",
    ]


def test_something_is_half_a_per_cent_and_two_standard_errors():
    assert [certain(0.006, None), certain(0.004, None), certain(0.1, 0.06), certain(-0.1, 0.04)] == [1, 0, 0, -1]
    assert certain(0.1, float("nan")) == 1
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
