"""Balance over channels: exact in full precision, and better where channels differ."""

import pytest
import torch
from torch.nn import functional as F

from tdq_utils import TDQError, fake_quantize, mse_step
from tdq_utils.method.balance import RULES, balance, for_weight, per_input
from tdq_utils.method.grid import Grid

SIZES = torch.tensor([0.1, 0.5, 1.0, 4.0, 20.0, 0.3])


@pytest.fixture
def x():
    return torch.randn(5, 200, 6, generator=torch.Generator().manual_seed(0)) * SIZES


@pytest.fixture
def weight():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rule", RULES)
def test_the_product_is_the_same_in_full_precision(x, weight, rule):
    d, _ = balance(x, weight, 4, 8, rule)
    assert (d > 0).all() and abs(d.log().mean()) < 1e-5  # geometric mean 1
    assert torch.allclose((x / d) @ (weight * d).T, x @ weight.T, atol=1e-4)


def test_grouped_convolutions_fold_by_their_own_channels():
    conv = torch.nn.Conv2d(6, 4, 3, padding=1, groups=2).requires_grad_(False)
    d = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25, 3.0])
    x, expected = (image := torch.randn(2, 6, 5, 5)) / d.view(-1, 1, 1), conv(image)
    wide = for_weight(d, conv.weight, groups=2)
    assert torch.allclose(F.conv2d(x, conv.weight * wide, conv.bias, padding=1, groups=2), expected, atol=1e-5)
    assert torch.equal(per_input(conv.weight, 2)[4], conv.weight[2:, 1].reshape(-1))  # second of the second group


@pytest.mark.parametrize("rule", ["range", "mse"])
@pytest.mark.parametrize("silu", [False, True])
def test_the_output_is_closer_than_with_one_interval_alone(x, weight, rule, silu):
    x = F.silu(x) if silu else x
    flat, expected = x.flatten(0, 1), x.flatten(0, 1) @ weight.T
    plain = Grid(4, -0.2785) if silu else Grid(4)
    alone = fake_quantize(flat, mse_step(flat.reshape(1, -1), plain)[0], plain) @ weight.T
    d, grid = balance(x, weight, 4, None, rule, shifted=silu)
    assert (grid.low is not None) == silu
    balanced = fake_quantize(flat / d, mse_step((flat / d).reshape(1, -1), grid)[0], grid) * d @ weight.T
    assert (balanced - expected).square().mean() < 0.5 * (alone - expected).square().mean()


def test_a_channel_of_equal_range_needs_no_factor(weight):
    x = torch.rand(4, 500, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    d, _ = balance(x, weight, 4, 8, "range")
    assert torch.allclose(d, torch.ones(6), atol=0.02)


def test_dead_channels_stay_in_reach(x, weight):
    x[..., 2] = 0
    d, _ = balance(x, weight, 4, 8, "range")
    assert torch.isfinite(d).all() and d[2] == d.min() and d.max() / d[2] <= 1001


def test_time_steps_where_channels_and_weights_rank_alike_count_less(weight):
    order = weight.abs().amax(0).argsort()
    alike, unlike = torch.ones(6), torch.ones(6)
    alike[order], unlike[order.flip(0)] = torch.arange(1.0, 7), torch.arange(1.0, 7)
    noise = torch.rand(2, 400, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    d, _ = balance(noise * torch.stack([alike, unlike])[:, None], weight, 4, 8, "ptq4dit")
    target = (unlike / weight.abs().amax(0)).sqrt()
    other = (alike / weight.abs().amax(0)).sqrt()
    distance = lambda a: (d / a).log().std()  # noqa: E731
    assert distance(target) < distance(other)


def test_unknown_rules_are_refused(x, weight):
    with pytest.raises(TDQError, match="balance must be one of range, smooth"):
        balance(x, weight, 4, 8, "best")
