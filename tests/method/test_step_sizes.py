"""Where a step size comes from: tables, the tensor at hand, learned constants."""

import pytest
import torch

from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import ActivationQuantizer
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import DynamicStep, LearnedStep, TableStep, TimeSteps, nearest


def test_time_steps_of_a_call():
    for shared in (5, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 5, 5])):
        assert TimeSteps(shared, 3).values == [5]
        assert TimeSteps(shared, 3).spread(torch.tensor([0.5])).shape == ()
    mixed = TimeSteps(torch.tensor([9, 2, 9]), 3)
    assert mixed.spread(torch.tensor([0.2, 0.9])).tolist() == pytest.approx([0.9, 0.2, 0.9])
    with pytest.raises(TDQError, match="1 element or one for each of the 3 samples; got 2"):
        TimeSteps(torch.tensor([1, 2]), 3)


def test_table_is_looked_up_by_value():
    table = TableStep([999, 0, 499], [0.9, 0.1, 0.5])
    assert table(None, TimeSteps(499, 2), None) == 0.5
    torch.testing.assert_close(table(None, TimeSteps(torch.tensor([0, 999]), 2), None), torch.tensor([0.1, 0.9]))
    for t in (520, 300, 1010, -1, 1e-3):
        with pytest.raises(TDQError, match=rf"holds 3 time steps, 0\.\.999.*got t = {t:g}\. Sample with the number of steps"):
            table(None, TimeSteps(t, 2), None)


@pytest.mark.parametrize("t", [[999.0, 749.25, 499.5, 1.0], [0.999, 0.74925, 0.4995, 0.001], [1000 * i / 50 for i in range(51)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_rounds_no_entry_to_another(t, dtype):
    table = TableStep(t, range(len(t)))
    rounded = torch.tensor(t).to(dtype)
    assert table(None, TimeSteps(rounded, len(t)), None).tolist() == list(range(len(t)))


def test_a_pipeline_may_round_twice():
    for t in range(1, 1001):
        assert nearest([t / 1000], float(torch.tensor(float(t)).bfloat16() / 1000)) == 0


def test_entries_that_half_precision_cannot_tell_apart_are_refused():
    table = TableStep(range(1000), torch.ones(1000))
    with pytest.raises(
        TDQError, match="got t = 1000.*recorded in it"
    ):  # 999 in bfloat16, further from it than half of the gap to 998
        table(None, TimeSteps(torch.tensor(999.0, dtype=torch.bfloat16), 1), None)


@pytest.mark.parametrize(("per", "expected"), [("tensor", [8.0 / 7]), ("sample", [0.5, 8.0 / 15])])
def test_dynamic_step_is_the_range_at_hand(per, expected):
    x = torch.tensor([[[-4.0, 1.0]], [[2.0, 8.0]]])
    s, least, greatest = DynamicStep(per).interval(x, -8, 7)
    assert s.flatten().tolist() == pytest.approx(expected)
    torch.testing.assert_close(DynamicStep(per).interval(x.transpose(1, 2), -8, 7)[0], s)
    grids = [Grid.for_range(4, *(end.item() for end in part.aminmax())) for part in ([x] if per == "tensor" else x)]
    zeros = [int(grid.zero(step)) for grid, step in zip(grids, s.flatten(), strict=True)]
    assert least.flatten().tolist() == [grid.q_min - zero for grid, zero in zip(grids, zeros, strict=True)]
    assert greatest.flatten().tolist() == [grid.q_max - zero for grid, zero in zip(grids, zeros, strict=True)]


def test_learned_step_takes_the_gradient_and_stays_positive():
    source = LearnedStep(0.25)
    quantizer = ActivationQuantizer(4, Grid(4), source)
    quantizer(torch.randn(2, 9), TimeSteps(0, 2)).square().sum().backward()
    (parameter,) = source.parameters()
    assert source.s.item() == pytest.approx(0.25) and parameter.grad.abs() > 0
    for wild in (-30.0, 0.0, 5.0):
        torch.nn.init.constant_(parameter, wild)
        assert source(None, None, None) > 0
