"""Time, channels, levels: what each is to the error, on inputs where the answer is known, and on a model."""

import pytest
import torch

from tdq_utils import CalibrationSet, TDQError, mse_step, quantize, squared_error
from tdq_utils.fit.decomposition import decompose, errors, gains
from tdq_utils.method.grid import Grid

NOISE = torch.randn(6, 2000, 8, generator=torch.Generator().manual_seed(0))
SIZES = torch.logspace(-1.5, 1.5, 8)


def test_what_drifts_over_time_is_of_time():
    time, channels, both = gains(errors(NOISE * SIZES[:6, None, None], 5))
    assert time > 3 and channels < 0.3 and both - time < 0.4


def test_what_differs_by_channel_is_of_channels():
    time, channels, both = gains(errors(NOISE * SIZES, 5))
    assert channels > 3 and time < 0.1 and both - channels < 0.4


def test_what_is_alike_everywhere_is_of_levels():
    assert max(gains(errors(NOISE, 5))) < 0.15


def test_with_few_vectors_chance_is_worth_half_a_decibel_of_both():
    """As a report says of its own."""
    assert 0.3 < gains(errors(NOISE[:, :512], 5))[2] < 0.7


def test_both_is_more_than_each_alone():
    time, channels, both = gains(errors(NOISE * SIZES * SIZES[2:, None, None], 4))
    assert both > max(time, channels) + 1


def test_one_interval_is_that_of_the_search():
    x = NOISE * SIZES
    values = x.reshape(1, -1)
    exact = squared_error(values, None, mse_step(values, Grid(5)), Grid(5))[0] / 2000
    assert errors(x, 5).sum((1, 2)).amin() == pytest.approx(exact.item(), rel=0.03)


def test_of_a_model(unet, scheduler):
    data = CalibrationSet.collect(unet, scheduler, range(8), 4, progress=False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    table = decompose(unet, data, 5)
    assert table.both_db.mean() > table[["time_db", "channels_db"]].mean().max() > 0
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert set(decompose(unet, data, 5, layers=["conv_in"]).layer) == {"conv_in"}
    quantize(unet)
    with pytest.raises(TDQError, match="full-precision model"):
        decompose(unet, data)
