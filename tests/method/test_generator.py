"""The TDQ generator: features, initialization, dropout, gradients, freezing."""

import math

import numpy as np
import pytest
import torch

from tdq_utils.errors import TDQError
from tdq_utils.method.generator import FourierFeatures, RawTime, StepGenerator
from tdq_utils.method.grid import Grid, fake_quantize
from tdq_utils.method.step_sizes import TableStep, TimeSteps

ALL_T = torch.arange(1000)


def test_fourier_features_are_the_formula():
    t, half = np.array([0, 1, 499, 999]), 64
    angles = t[:, None] * 10_000.0 ** (-np.arange(half) / half)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(FourierFeatures(128)(torch.from_numpy(t)), expected, atol=2e-4)


@pytest.mark.parametrize("width", [0, -2, 7])
def test_width_must_be_even(width):
    with pytest.raises(TDQError, match=f"width must be .*; got {width}"):
        FourierFeatures(width)


@pytest.mark.parametrize("s_0", [1e-3, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("features", [FourierFeatures, RawTime])
def test_generator_starts_at_the_static_step(s_0, features):
    for seed in range(3):
        torch.manual_seed(seed)
        s = StepGenerator(s_0, features()).eval().at(ALL_T)
        assert (s / s_0 - 1).abs().max() < 0.05


def test_steps_stay_positive_whatever_the_weights():
    generator = StepGenerator(1.0).eval()
    torch.nn.init.constant_(generator.mlp[-1].bias, -1000)
    assert generator.at(ALL_T).min() > 0


@pytest.mark.parametrize("s_0", [0.0, -1.0, float("nan")])
def test_bad_start(s_0):
    with pytest.raises(TDQError, match="s_0 must be a finite number above 0; got"):
        StepGenerator(s_0)


def test_shape_of_the_network():
    """Paper: 128 -> 64 -> 64 -> 64 -> 1; and the settings rebuild it."""
    generator = StepGenerator(0.1)
    weights = [tuple(p.shape) for p in generator.parameters() if p.dim() == 2]
    assert weights == [(64, 128), (64, 64), (64, 64), (1, 64)]
    assert generator.settings() == {"width": 128, "depth": 4, "hidden": 64, "dropout": 0.2}
    other = StepGenerator(0.1, RawTime(), depth=2, hidden=8, dropout=0.5)
    assert other.settings() == {"width": 1, "depth": 2, "hidden": 8, "dropout": 0.5}


def test_a_learned_factor_changes_nothing_until_it_learns():
    generator, t = StepGenerator(0.3).eval(), torch.arange(0, 1000, 37)
    before = generator.at(t)
    generator.learn_scale()
    assert torch.equal(generator.at(t), before)
    generator.log_scale.data.fill_(math.log(2))
    generator.learn_scale()  # it has one, and keeps it
    torch.testing.assert_close(generator.at(t), 2 * before)
    torch.testing.assert_close(generator.on([0, 37]), 2 * before[:2])
    generator.at(t).log().mean().backward()
    assert generator.log_scale.grad == 1
    assert StepGenerator(**{"scaled": True}).settings()["scaled"] and "scaled" not in StepGenerator().settings()


def test_dropout_in_training_only():
    generator, t = StepGenerator(1.0), torch.tensor([10, 500])
    assert not torch.equal(generator.train().at(t), generator.at(t))
    assert torch.equal(generator.eval().at(t), generator.at(t))


def test_gradient_reaches_every_weight():
    """Through the quantized activations of samples with different t."""
    generator, grid = StepGenerator(0.3, dropout=0.0).train(), Grid(4)
    x, t = torch.randn(3, 50), TimeSteps(torch.tensor([900, 100, 500]), 3)
    s = generator(x, t, grid)
    assert len(s.unique()) == 3
    (fake_quantize(x, s, grid) - x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


def test_frozen_is_exactly_the_generator():
    """In any batch: t shared, mixed, or repeated."""
    generator = StepGenerator(0.3).eval()
    generator.mlp[-1].weight.data *= 100  # s(t) far from constant, as after a fit
    table = TableStep(range(0, 1000, 37), generator.on(range(0, 1000, 37)))
    assert len(table.s.unique()) == len(table.s) == 28
    for t in (37, torch.tensor([0, 999, 37]), torch.tensor([74, 74, 0, 999, 74, 111, 148])):
        steps = TimeSteps(t, torch.as_tensor(t).numel())
        assert torch.equal(generator(None, steps, None), table(None, steps, None))


def test_freezing_ignores_and_keeps_the_training_mode():
    generator = StepGenerator(0.3).train()
    assert torch.equal(generator.on([5, 6]), generator.on([5, 6]))
    assert generator.training
