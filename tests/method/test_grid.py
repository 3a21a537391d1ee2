"""The number format, fake quantization and its gradients, the search for a step size."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import ActivationQuantizer
from tdq_utils.method import grid as grid_module
from tdq_utils.method.grid import SILU_MIN, Grid, fake_quantize, mse_step, squared_error
from tdq_utils.method.step_sizes import DynamicStep, TimeSteps

GRIDS = [Grid(bits, low) for bits in (2, 4, 8) for low in (None, 0.0, SILU_MIN)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}bits-low{g.low}")
SHAPES = {"per-tensor": (), "per-sample": (3,)}
every_step_shape = pytest.mark.parametrize("s_shape", SHAPES.values(), ids=SHAPES)


def inputs(grid, s_shape=(), ties=False):
    """Values in and beyond the grid, and step sizes with an exact inverse: ``(x, s)``."""
    s = torch.tensor([0.125, 0.25, 0.5]) if s_shape else torch.tensor(0.25)
    x = torch.randn(3, 5, 7) * 0.3 * grid.q_max
    if ties:  # for values only: where the gradient jumps, torch's operators take either side
        x[:, 0] = torch.arange(-3, 4) * 0.5 * s.reshape(-1, 1)
    return x, s


def reference(x, s, grid):
    """The definition, in numpy: ``(x_hat, round(x / s), zero)``, step sizes along the first axis."""
    x, s = x.double().numpy(), s.double().numpy().reshape(-1, 1, 1)
    q, zero = np.round(x / s), np.clip(np.round(-(grid.low or 0) / s), 0, grid.q_max)
    return s * (np.clip(q + zero, grid.q_min, grid.q_max) - zero), q, zero


@every_grid
@every_step_shape
@pytest.mark.parametrize("grad", [False, True])
def test_fake_quantize_is_the_definition(grid, s_shape, grad):
    x, s = inputs(grid, s_shape, ties=True)
    x_hat = fake_quantize(x, s.clone().requires_grad_(grad), grid)
    assert x_hat.requires_grad == grad
    np.testing.assert_allclose(x_hat.detach().numpy(), reference(x, s, grid)[0], rtol=1e-5, atol=1e-6)


@every_grid
@every_step_shape
def test_values_do_not_depend_on_gradients(grid, s_shape):
    x, s = inputs(grid, s_shape, ties=True)
    assert torch.equal(fake_quantize(x, s, grid), fake_quantize(x, s.clone().requires_grad_(), grid).detach())


@every_grid
@every_step_shape
def test_gradients_are_those_of_lsq(grid, s_shape):
    """To s: round(x/s) - x/s inside the grid, the end level outside. To x: 1 inside, 0 outside."""
    x, s = inputs(grid, s_shape)
    weights = torch.randn_like(x)
    s_leaf, x_leaf = s.clone().requires_grad_(), x.clone().requires_grad_()
    (fake_quantize(x_leaf, s_leaf, grid) * weights).sum().backward()

    x_hat, q, zero = reference(x, s, grid)
    inside = (grid.q_min <= q + zero) & (q + zero <= grid.q_max)
    s_wide = s.numpy().reshape(-1, 1, 1)
    to_s = weights.numpy() * np.where(inside, q - x.numpy() / s_wide, x_hat / s_wide)
    np.testing.assert_allclose(s_leaf.grad.numpy(), to_s.sum((1, 2)) if s_shape else to_s.sum(), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(x_leaf.grad.numpy(), weights.numpy() * inside)
    assert 0 < inside.mean() < 1


@every_grid
def test_step_gradient_against_finite_differences(grid):
    """LSQ differentiates s * clip(x/s + r) with the rounding residual r = round(x/s) - x/s held constant."""
    x, s = inputs(grid)
    _, q, zero = reference(x, s, grid)
    x, s = x.double().numpy(), float(s)
    ends = np.isin(q + zero, (grid.q_min, grid.q_max))  # at the very end the clip has two derivatives
    weights = torch.where(torch.from_numpy(ends), 0, torch.randn(x.shape))

    def loss(step):
        level = np.clip(x / step + (q - x / s), grid.q_min - zero, grid.q_max - zero)
        return (step * level * weights.numpy()).sum()

    leaf = torch.tensor(s, requires_grad=True)
    (fake_quantize(torch.from_numpy(x).float(), leaf, grid) * weights).sum().backward()
    assert leaf.grad.item() == pytest.approx((loss(s + 1e-6) - loss(s - 1e-6)) / 2e-6, rel=1e-3, abs=1e-3)


@every_step_shape
def test_grad_factor_scales_the_step_gradient(s_shape):
    x, s = inputs(Grid(4), s_shape)
    grads = [torch.autograd.grad(fake_quantize(x, leaf, Grid(4), f).sum(), leaf)[0]
             for f in (1.0, 0.25) for leaf in [s.clone().requires_grad_()]]  # fmt: skip
    torch.testing.assert_close(grads[0] * 0.25, grads[1])


@every_grid
def test_zero_is_a_level(grid):
    """So that zero padding is exact, at any step size."""
    s = torch.logspace(-4, 2, 50)
    assert not fake_quantize(torch.zeros(50, 3), s, grid).any()


@pytest.mark.parametrize("grid", [Grid(5), Grid(5, SILU_MIN)])
def test_memory_format_and_number_of_axes(grid):
    x, s = torch.randn(3, 4, 6, 6), torch.tensor([0.1, 0.2, 0.3])
    plain = fake_quantize(x, s, grid)
    last = fake_quantize(x.to(memory_format=torch.channels_last), s, grid)
    assert torch.equal(plain, last) and last.is_contiguous(memory_format=torch.channels_last)
    tokens = x.flatten(2).transpose(1, 2)  # batch, token, channel; not contiguous
    assert torch.equal(plain.flatten(2).transpose(1, 2), fake_quantize(tokens, s, grid))
    assert torch.equal(plain, torch.cat([fake_quantize(x[i : i + 1], s[i], grid) for i in range(3)]))


def test_input_is_left_alone():
    x, s = torch.randn(2, 8), torch.tensor(0.3)
    before = x.clone()
    fake_quantize(x, s, Grid(4))
    assert torch.equal(x, before) and s == 0.3


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_must_be_a_whole_number_from_2_to_8(bits):
    with pytest.raises(TDQError, match="bits must be a whole number from 2 to 8; got"):
        Grid(bits)


def test_grid_ranges_and_choice():
    assert (Grid(4).q_min, Grid(4).q_max) == (-8, 7)
    assert (Grid(4, SILU_MIN).q_min, Grid(4, 0.0).q_max) == (0, 15)
    assert Grid.for_range(4, -1.0) == Grid(4)
    assert Grid.for_range(4, float(F.silu(torch.linspace(-5, 5, 9999)).min())) == Grid(4, SILU_MIN)
    assert Grid.for_range(4, -0.2, 0.25) == Grid(4)  # both signs, too small for SiLU's shift
    assert Grid.for_range(4, 0.0) == Grid.for_range(4, 0.5) == Grid(4, 0.0)
    with pytest.raises(TDQError, match=r"low must be .*<= 0; got 0.1"):
        Grid(4, 0.1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("least", "greatest"), [(-3.0, 2.0), (-1.0, 5.0), (-0.2, 3.0), (-0.2, 0.2), (0.0, 0.7)])
def test_widest_step_truncates_nothing_and_is_the_smallest_such(bits, least, greatest):
    grid = Grid.for_range(bits, least, greatest)
    x = torch.linspace(least, greatest, 999)
    s = grid.widest_step(x.min(), x.max())
    assert (fake_quantize(x, s, grid) - x).abs().max() <= 0.501 * s
    smaller = s * 0.85
    assert (fake_quantize(x, smaller, grid) - x).abs().max() > 0.501 * smaller


SAMPLES = {
    "normal": lambda: torch.randn(2000),
    "laplace": lambda: torch.distributions.Laplace(0.0, 3.0).sample((2000,)),
    "silu": lambda: F.silu(2 * torch.randn(2000)),
    "relu": lambda: F.relu(torch.randn(2000)) * 0.01,
}


@pytest.mark.parametrize("draw", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize(("bits", "slack"), [(2, 1.01), (4, 1.01), (6, 1.01), (8, 1.03)])
def test_mse_step_is_as_good_as_brute_force(draw, bits, slack):
    values = draw()
    grid = Grid.for_range(bits, float(values.min()), float(values.max()))
    widest = grid.widest_step(values.min(), values.max())

    def error(s):
        return squared_error(values.expand(len(s), -1), None, s, grid)

    finest = min(error(part).min() for part in (widest * torch.linspace(0.02, 1.05, 1500)).split(100))
    assert error(mse_step(values, grid)[None])[0] <= slack * finest


def test_mse_step_is_never_worse_than_the_widest():
    """Also for the few weights of a small channel, whose error jumps from step size to step size."""
    values = torch.randn(300, 9)
    grid = Grid(8)
    found, widest = mse_step(values, grid), grid.widest_step(values.amin(1), values.amax(1))
    assert (squared_error(values, None, found, grid) <= squared_error(values, None, widest, grid)).all()


def test_mse_step_of_every_row_is_its_own():
    """One step size an output channel: what one channel holds does not matter to another."""
    weights = torch.randn(4, 60) * torch.tensor([[0.01], [0.1], [1.0], [10.0]])
    steps = mse_step(weights, Grid(4))
    assert torch.equal(steps, torch.stack([mse_step(row, Grid(4)) for row in weights]))
    per_tensor = mse_step(weights.reshape(1, -1), Grid(4)).expand(4)
    gain = squared_error(weights, None, per_tensor, Grid(4)) / squared_error(weights, None, steps, Grid(4))
    assert gain[0] > 10 and gain.min() > 0.99


def plain_search(values, grid, counts=None):
    """The search as it is defined: every candidate, all rows at once, no short cut."""
    present = values if counts is None else torch.where(counts > 0, values, 0)
    best = grid.widest_step(present.amin(-1), present.amax(-1)).clamp_min(1e-8)
    ratios = torch.logspace(-1.7, 0, 48)
    for _ in range(2):
        trials = torch.stack([best * r for r in ratios])
        errors = torch.stack([squared_error(values, counts, s, grid) for s in trials])
        best = trials.gather(0, errors.argmin(0, keepdim=True))[0]
        spread = (ratios[-1] / ratios[-2]).log10().item()
        ratios = torch.logspace(-spread, spread, 25)
    return best


ROWS = {
    "normal": lambda x: x,
    "heavy-tailed": lambda x: x / torch.rand_like(x).clamp_min(1e-3),
    "one-outlier": lambda x: torch.cat([x[:, :1] * 1000, x[:, 1:]], dim=1),
    "constant": lambda x: x[:, :1].repeat(1, x.shape[1]),
    "zero": lambda x: x * 0,
    "tiny": lambda x: x * 1e-11,
    "sparse": lambda x: x * (torch.rand_like(x) < 0.05),
    "on-a-grid": lambda x: (x * 8).round() * 0.0137,
    "silu": F.silu,
    "any-scale": lambda x: x * torch.logspace(-12, 4, len(x))[:, None],
}
SHAPES_OF_ROWS = [(24, 144), (7, 27), (30, 9), (5, 1), (1, 3000), (3, 2000)]  # convolutions, linear layers, one tensor


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("weighted", [False, True], ids=["values", "counts"])
def test_mse_step_is_the_plain_search_bit_for_bit(monkeypatch, kind, weighted):
    """Whatever is left out, however the rows are divided: few at a time, or all."""
    for i, shape in enumerate(SHAPES_OF_ROWS):
        values = ROWS[kind](torch.randn(shape))
        counts = torch.randint(0, 5, shape).float() if weighted else None
        if i % 2:  # as cut out of a histogram by numpy: the first axis is the fast one
            values, counts = (v if v is None else v.t().contiguous().t() for v in (values, counts))
        grid = Grid(2 + (i + len(kind)) % 7, (None, 0.0, SILU_MIN)[(i // 2 + weighted) % 3])
        expected = plain_search(values, grid, counts)
        for cache in (700, 2**17):
            monkeypatch.setattr(grid_module, "CACHE", cache)
            assert torch.equal(mse_step(values, grid, counts), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_step_is_the_plain_search_with_any_bits_and_threads(bits, threads):
    torch.set_num_threads(threads)
    try:
        for values in (torch.randn(60, 1152), torch.randn(3, 33_000), torch.randn(1, 40_000)):
            assert torch.equal(mse_step(values, Grid(bits)), plain_search(values, Grid(bits)))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_rows_do_not_depend_on_how_many_are_added_up_together(threads):
    """What the search rests on, where it divides rows; torch doesn't promise it."""
    torch.set_num_threads(threads)
    try:
        for length in (*range(1, 40), 144, 576, 1000, 1152, 4097, 5120, 9999, 33_000, 70_001):
            x = torch.randn(11, length)
            for parts in (2, 3, 5):
                assert torch.equal(x.sum(-1), torch.cat([part.sum(-1) for part in x.tensor_split(parts)])), length
    finally:
        torch.set_num_threads(1)


def test_mse_step_leaves_most_candidates_out(monkeypatch):
    tried = []
    rounded = grid_module._rounded
    monkeypatch.setattr(grid_module, "_rounded", lambda *args: tried.append(1) or rounded(*args))
    mse_step(torch.randn(16, 4000), Grid(8))
    assert len(tried) < 35  # of 48 + 25


def test_counts_weigh_values():
    """A count of n is the value n times; a value that is counted 0 times is not there."""
    values, counts = torch.tensor([-0.9, 0.1, 0.35, 50.0]), torch.tensor([1.0, 3.0, 2.0, 0.0])
    repeated = values.repeat_interleave(counts.long())
    assert mse_step(values, Grid(3), counts) == pytest.approx(mse_step(repeated, Grid(3)).item(), rel=1e-5)
    s = torch.tensor(0.2)
    assert squared_error(values, counts, s, Grid(3)) == pytest.approx(squared_error(repeated, None, s, Grid(3)).item())


def test_all_zero_input_gets_a_positive_step():
    assert mse_step(torch.zeros(2, 10), Grid(4)).min() > 0


def test_activation_quantizer_needs_a_step():
    with pytest.raises(TDQError, match=r"must be calibrated.*call calibrate"):
        ActivationQuantizer(4)(torch.randn(2, 3), TimeSteps(0, 2))


@pytest.mark.parametrize(("x", "grid"), [(torch.tensor([[-2.0, 3.0]]), Grid(4)), (torch.tensor([[0.0, 3.0]]), Grid(4, 0.0))])
def test_without_a_grid_the_input_decides(x, grid):
    quantizer = ActivationQuantizer(4, step=DynamicStep("tensor"))
    assert torch.equal(quantizer(x, None), fake_quantize(x, grid.widest_step(x.min(), x.max()), grid))


def test_dynamic_grid_of_a_sample_is_its_own():
    """Whatever lies beside it in the batch."""
    x = torch.tensor([[-0.2, 0.0, 1.0], [-3.0, 0.0, 1.0], [0.0, 0.5, 4.0]])
    quantizer = ActivationQuantizer(3, step=DynamicStep("sample"))
    alone = [quantizer(sample, TimeSteps(0, 1)) for sample in x.split(1)]
    assert torch.equal(quantizer(x, TimeSteps(0, 3)), torch.cat(alone))
