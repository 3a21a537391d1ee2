"""Each training rule against its definition, by known answers."""

import pytest
import torch

from tdq_utils.method.grid import SILU_MIN, Grid, fake_quantize
from tdq_utils.method.rules import RULES, lsq, nipq, pact

GRIDS = {"symmetric": Grid(4), "unsigned": Grid(4, low=0.0), "shifted": Grid(4, low=SILU_MIN)}


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


def gradients(rule, x, s, grid, **options):
    x, s = x.clone().requires_grad_(), s.clone().requires_grad_()
    out = rule(x, s, grid, **options)
    out.sum().backward()
    return out.detach(), x.grad, s.grad


def inside(x, s, grid):
    zero = grid.zero(s)
    return (x > (grid.q_min - zero) * s) & (x < (grid.q_max - zero) * s)


def test_pact_learns_from_clipped_values_alone(grid):
    x, s = torch.linspace(-4, 8, 200), torch.tensor(0.2)
    out, to_x, to_s = gradients(pact, x, s, grid, decay=0)
    torch.testing.assert_close(out, fake_quantize(x, s, grid))
    assert torch.equal(to_x, inside(x, s, grid).float())
    zero = grid.zero(s)
    above, below = (x > (grid.q_max - zero) * s).sum(), (x < (grid.q_min - zero) * s).sum()
    torch.testing.assert_close(to_s, above * (grid.q_max - zero) + below * (grid.q_min - zero))
    assert gradients(pact, x[inside(x, s, grid)], s, grid, decay=0)[2] == 0


@pytest.mark.parametrize("samples", [1, 5])
def test_pact_adds_the_gradient_of_its_l2_decay(grid, samples):
    x, s = torch.linspace(-4, 8, 200).view(samples, -1), torch.linspace(0.1, 0.3, samples).squeeze()
    plain, decayed = (gradients(pact, x, s, grid, decay=decay)[2] for decay in (0, 0.5))
    s.requires_grad_()
    (0.5 / 2 * (s * grid.q_max).square().mean()).backward()
    torch.testing.assert_close(decayed - plain, s.grad, atol=1e-4, rtol=1e-4)


def test_lsq_scales_its_gradient(grid):
    x, s = torch.linspace(-4, 8, 200), torch.tensor(0.2)
    _, _, plain = gradients(fake_quantize, x, s, grid)
    _, _, scaled = gradients(lsq, x, s, grid)
    torch.testing.assert_close(scaled, plain / (200 * grid.q_max) ** 0.5)


def test_nipq_adds_uniform_noise_of_one_step(grid):
    s = torch.tensor(0.2)
    x = torch.full((100_000,), 0.5)  # inside all the grids
    noise = nipq(x, s, grid) - x
    assert -0.1 <= noise.min() < -0.0999 and 0.0999 < noise.max() <= 0.1
    assert noise.mean() == pytest.approx(0, abs=1e-3)
    assert noise.std() == pytest.approx(0.2 / 12**0.5, rel=0.01)
    shares = torch.histc(noise, 10, -0.1, 0.1) / len(x)
    assert (shares - 0.1).abs().max() < 0.005
    beyond = nipq(torch.full((1000,), 50.0), s, grid)
    assert (beyond - (grid.q_max - grid.zero(s)) * s).abs().max() <= 0.1 + 1e-6


def test_nipq_learns_the_strength_of_its_noise(grid):
    """Inside the grid the output is ``x + s noise``: the gradient to s is the noise."""
    x, s = torch.full((1000,), 0.5), torch.tensor(0.2)
    out, to_x, to_s = gradients(nipq, x, s, grid)
    torch.testing.assert_close(to_s, ((out - x) / s).sum(), atol=1e-3, rtol=1e-4)
    assert (to_x == 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_every_sample_has_its_own_step(rule, grid):
    x, s = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.2, 0.4])
    torch.manual_seed(1)
    out, _, to_s = gradients(RULES[rule], x, s, grid)
    assert to_s.shape == (3,) and (to_s != 0).any()
    if rule != "nipq":
        expected = torch.cat([RULES[rule](part, one, grid) for part, one in zip(x.split(1), s, strict=True)])
        torch.testing.assert_close(out, expected)
