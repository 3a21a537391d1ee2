"""Neighbouring t share an interval: which, how it is chosen, and that one bin a t changes nothing."""

import pytest
import torch

from tdq_utils import freeze, load_quantized, sample, save_quantized
from tdq_utils.errors import TDQError
from tdq_utils.fit.bins import binned
from tdq_utils.fit.quantize import activation_quantizers
from tdq_utils.method.grid import Grid, squared_error
from tdq_utils.method.step_sizes import TableStep
from tdq_utils.run.runtime import Runner

T = [249, 499, 749, 999]  # what the profile visited, as tables keep it


@pytest.mark.parametrize("method", ["table", "finite-set", "tdq"])
def test_as_many_bins_as_time_steps_change_nothing(calibrated, scheduler, x, method):
    model = calibrated(method)
    before = [model(x, t).sample for t in T]
    freeze(model, scheduler, 4, bins=4)
    assert all(torch.equal(model(x, t).sample, expected) for t, expected in zip(T, before, strict=True))


@pytest.mark.parametrize("method", ["table", "finite-set", "tdq"])
@pytest.mark.parametrize("bins", [1, 2, 3])
def test_so_many_intervals_of_neighbours(calibrated, scheduler, profile, method, bins):
    model = calibrated(method)
    before = {name: quantizer.step for name, quantizer in activation_quantizers(model).items()}
    freeze(model, scheduler, 4, bins=bins, profile=profile)
    for name, quantizer in activation_quantizers(model).items():
        s, old = quantizer.step.on(T), before[name].on(T)
        assert quantizer.step.t.tolist() == T and len(s.unique()) <= bins
        parts = torch.arange(4).tensor_split(bins)
        assert all(len(s[part].unique()) == 1 for part in parts)
        assert all(torch.equal(s[part], old[part]) for part in parts if len(part) == 1)


def test_with_a_profile_the_bin_has_the_least_error(calibrated, scheduler, profile):
    model, visited = calibrated("table"), profile.t.tolist()
    steps = {name: quantizer.step for name, quantizer in activation_quantizers(model).items()}
    freeze(model, scheduler, 4, bins=2, profile=profile)
    gains = []
    for name, quantizer in activation_quantizers(model).items():
        plain = binned(steps[name], 2, quantizer.grid)
        values, counts = profile.values(name)
        found, mean = (squared_error(values, counts, step.on(visited), quantizer.grid).sum() for step in (quantizer.step, plain))
        assert found <= 1.001 * mean  # a search over a grid, not to the last digit
        gains.append(mean / found)
    assert sum(gains) / len(gains) > 1.01


def test_without_one_it_is_the_geometric_mean():
    found = binned(TableStep([1, 2, 3], [1.0, 4.0, 7.0]), 2, Grid(8))
    torch.testing.assert_close(found.s, torch.tensor([2.0, 2.0, 7.0]))


def test_where_the_zero_level_follows_t_the_bin_holds_both_ranges():
    """[-1, 14] and [-8, 7] at 4 bits: together [-8, 14], 0 among the levels."""
    table = TableStep([1, 2], [1.0, 1.0], [[-1.0, 14.0], [-8.0, 7.0]])
    found = binned(table, 1, Grid(4, 0.0))
    assert torch.equal(found.s, torch.full((2,), 22 / 15))
    assert torch.equal(found.levels, torch.tensor([[-5.0, 10.0]] * 2))


def test_bins_have_their_edges_at_midpoints(calibrated, scheduler, profile):
    """A t that was not calibrated gets, if asked for, the bin of its nearest."""
    model = calibrated("table")
    freeze(model, scheduler, 4, bins=2)
    bins = {name: quantizer.step.on([249, 999]) for name, quantizer in activation_quantizers(model).items()}
    freeze(model, scheduler, 1000, nearest=True)
    for name, quantizer in activation_quantizers(model).items():
        assert torch.equal(quantizer.step.on([623, 625]), bins[name])  # the middle of 499 and 749 is 624


def test_it_is_kept_and_run(calibrated, scheduler, tmp_path):
    model, how = calibrated("finite-set"), dict(seeds=range(2), steps=4, progress=False)
    freeze(model, scheduler, 4, bins=2)
    images = sample(model, scheduler, **how)
    save_quantized(model, tmp_path)
    assert torch.equal(sample(load_quantized(tmp_path), scheduler, **how), images)
    assert torch.equal(sample(Runner(model, compiled=False), scheduler, **how), images)


@pytest.mark.parametrize("bins", [0, 5, 2.0, True, "2"])
def test_other_numbers_are_refused(calibrated, scheduler, bins):
    model = calibrated("table")
    with pytest.raises(TDQError, match=f"bins must be a whole number from 1 to .* 4; got {bins!r}"):
        freeze(model, scheduler, 4, bins=bins)
    assert not model.quantization.frozen


@pytest.mark.parametrize("method", ["mse", "dynamic"])
def test_what_does_not_follow_t_has_no_bins(calibrated, scheduler, method):
    model = calibrated(method)
    with pytest.raises(TDQError, match="bins group intervals that follow t"):
        freeze(model, scheduler, 4, bins=2)


def test_a_profile_must_hold_every_t(calibrated, scheduler, profile):
    with pytest.raises(TDQError, match="must be one of the profiled time steps"):
        freeze(calibrated("tdq"), scheduler, 5, bins=2, profile=profile)


def test_bins_come_before_bits_over_t():
    table = TableStep([1, 2], [1.0, 1.0], [[-8.0, 7.0], [-128.0, 127.0]])
    with pytest.raises(TDQError, match="one number of bits"):
        binned(table, 1, Grid(8))
