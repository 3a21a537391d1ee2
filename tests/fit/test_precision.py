"""Bits chosen over time: looked up as intervals are, kept and run; policies choose what they say; the rest is refused."""

import pytest
import torch

from tdq_utils import calibrate, freeze, load_quantized, quantize, restore, sample, save_quantized
from tdq_utils.errors import TDQError
from tdq_utils.fit.precision import (
    Hysteresis,
    Precisions,
    average_bits,
    bisected,
    by_snr,
    changes,
    constant,
    first_and_last,
    hysteresis,
)
from tdq_utils.run.integer import INT8_FLAGS, IntegerRunner, cpu_flags
from tdq_utils.run.runtime import Runner

T = [999, 749, 499, 249]
MIXED = {999: 8, 749: 4, 499: 4, 249: 6}
HOW = dict(seeds=range(2), steps=4, progress=False)


@pytest.fixture
def prepared(unet, profile):
    def make(method="table", bits=(4, 6, 8)):
        quantize(unet, 8, 8, method)
        return Precisions(unet, bits, profile=profile, progress=False, **(dict(iterations=3) if method == "tdq" else {}))

    return make


@pytest.mark.parametrize("method", ["table", "finite-set", "mse", "tdq"])
def test_each_t_has_the_intervals_of_its_bits(prepared, unet, profile, x, method):
    model = prepared(method)
    model.apply(MIXED)
    found = {t: unet(x, t).sample for t in T}
    together = unet(x, torch.tensor([999, 749, 249])).sample
    restore(unet)
    for t, bits in MIXED.items():
        quantize(unet, 8, bits, method)
        calibrate(unet, profile=profile, progress=False, **(dict(iterations=3) if method == "tdq" else {}))
        torch.testing.assert_close(found[t], unet(x, t).sample, atol=1e-6, rtol=1e-6)
        restore(unet)
    for i, t in enumerate((999, 749, 249)):
        torch.testing.assert_close(together[i], found[t][i], atol=1e-5, rtol=1e-5)


def test_one_number_for_all_and_back_again(prepared, unet, x):
    model = prepared()
    model.apply(8)
    fine = unet(x, 749).sample
    model.apply(4)
    assert not torch.equal(unet(x, 749).sample, fine)
    model.apply(constant(T, 8))
    assert torch.equal(unet(x, 749).sample, fine) and unet.quantization.activations == 8


def test_it_comes_back(prepared, comes_back):
    prepared().apply(MIXED)
    comes_back()


def test_it_is_kept(prepared, unet, scheduler, tmp_path):
    prepared().apply(MIXED)
    freeze(unet, scheduler, 4)
    save_quantized(unet, tmp_path, packed=True)
    assert torch.equal(sample(load_quantized(tmp_path), scheduler, **HOW), sample(unet, scheduler, **HOW))


KINDS = [Runner, pytest.param(IntegerRunner, marks=pytest.mark.skipif(not INT8_FLAGS & cpu_flags(), reason="no 8-bit products"))]


@pytest.mark.parametrize("kind", KINDS)
def test_one_packed_weight_serves_every_precision(prepared, unet, scheduler, x, kind):
    model = prepared()
    model.apply(8)
    runner = kind(unet, scheduler, 4, compiled=False)
    for precision in (MIXED, constant(T, 4)):
        model.apply(precision)
        runner.load(unet)
        for t in T:
            difference = (runner(x, t).sample - unet(x, t).sample).abs()
            assert difference.max() == 0 if kind is Runner else difference.mean() < 0.01
        levels = {t: (runner.table[i, 2] - runner.table[i, 1] + 1).unique().tolist() for i, t in enumerate(T)}
        assert levels == {t: [2.0**bits] for t, bits in precision.items()}


@pytest.mark.parametrize(("precision", "message"), [
    ({**MIXED, 500: 4}, "this one names 500"), ({999: 8}, "this one lacks 249"),
    ({**MIXED, 999: 5}, "prepared for, 4, 6, 8; got 5"),
    (3, "prepared for, 4, 6, 8; got 3"),
])  # fmt: skip
def test_bad_precisions_change_nothing(prepared, unet, x, precision, message):
    model = prepared()
    before = unet(x, 749).sample
    with pytest.raises(TDQError, match=message):
        model.apply(precision)
    assert torch.equal(unet(x, 749).sample, before)


def test_bad_preparations(unet, profile):
    with pytest.raises(TDQError, match="must be quantized"):
        Precisions(unet, (4, 8), profile=profile)
    quantize(unet, 8, None)
    with pytest.raises(TDQError, match="activations in full precision"):
        Precisions(unet, (4, 8), profile=profile)
    restore(unet)
    quantize(unet, 8, 8, "dynamic")
    with pytest.raises(TDQError, match="a dynamic method has none"):
        Precisions(unet, (4, 8))
    for bits, message in ((), "got none"), ((4, 16), "from 2 to 8; got 16"):
        with pytest.raises(TDQError, match=message):
            Precisions(unet, bits)


def test_first_and_last():
    assert first_and_last(T, 1) == {999: 8, 749: 4, 499: 4, 249: 8}
    assert first_and_last(T, 2, 16, 8, last=0) == {999: 16, 749: 16, 499: 8, 249: 8}
    assert average_bits(first_and_last(T, 1)) == 6 and first_and_last(T, 4) == constant(T, 8)
    with pytest.raises(TDQError, match="n must be a whole number from 0 to 4; got 5"):
        first_and_last(T, 5)


@pytest.mark.parametrize(("budget", "expected"), [(0, ()), (1, (3,)), (3.2, (2, 3)), (100, (0, 1, 2, 3))])
def test_bisection_spends_its_budget_and_no_more(budget, expected):
    errors, calls = dict(zip(T, (40.0, 8.0, 2.0, 0.5), strict=True)), []

    def error(low):
        calls.append(low)
        return sum(errors[t] for t in low)

    found = bisected(T, error, budget)
    low = {t for t, bits in found.items() if bits == 4}
    assert low == {T[i] for i in expected} and sum(errors[t] for t in low) <= budget
    assert len(calls) <= 2 * len(T) - 1 and list(found) == T
    with pytest.raises(TDQError, match="budget must be a finite number"):
        bisected(T, error, -1)


def test_hysteresis_does_not_flicker():
    proxy = dict(enumerate([0.1, 0.9, 0.6, 0.4, 0.6, 0.9]))
    assert list(hysteresis(proxy, up=0.8, down=0.5).values()) == [4, 8, 8, 4, 4, 8]
    assert list(hysteresis(proxy, up=0.5, down=0.5).values()) == [4, 8, 8, 4, 8, 8]
    follow = Hysteresis(0.8, 0.5)
    assert [follow(value) for value in proxy.values()] == list(hysteresis(proxy, 0.8, 0.5).values())
    with pytest.raises(TDQError, match="0 <= down <= up; got down = 0.9"):
        hysteresis(proxy, up=0.8, down=0.9)


def test_the_proxy_is_the_change_of_the_predicted_image(unet, scheduler):
    seen = {}
    sample(unet, scheduler, 3, 4, callback=lambda call: seen.update({call["t"]: call}), progress=False)

    def x_0(call):
        alpha = scheduler.alphas_cumprod[call["t"]].double()
        return (call["x_t"].double() - (1 - alpha).sqrt() * call["eps"].double()) / alpha.sqrt()

    found = changes(unet, scheduler, 3, 4, progress=False)
    expected = float((x_0(seen[499]) - x_0(seen[749])).norm() / x_0(seen[749]).norm())
    assert list(found) == T and found[999] == found[749] and found[499] == pytest.approx(expected, rel=1e-5)


def test_more_bits_at_a_higher_ratio(scheduler):
    assert by_snr(T, scheduler, (4, 8)) == {999: 4, 749: 4, 499: 8, 249: 8}
    assert by_snr(T[::-1], scheduler, (4, 6, 8), (0.5, 0.25, 0.25)) == {999: 4, 749: 4, 499: 6, 249: 8}
    with pytest.raises(TDQError, match="share must have a part for each of 2"):
        by_snr(T, scheduler, (4, 8), (1.0,))
    with pytest.raises(TDQError, match="has none"):
        by_snr(T, object(), (4, 8))
