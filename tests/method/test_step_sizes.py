"""Where a step size comes from: tables, the tensor at hand, learned constants."""

import pytest
import torch

from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import ActivationQuantizer
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import DynamicStep, LearnedStep, TableStep, TimeSteps


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
    with pytest.raises(TDQError, match=r"holds 3 time steps, 0\.\.999.*got t = 500\. Sample with the number of steps"):
        table(None, TimeSteps(500, 2), None)


@pytest.mark.parametrize(("per", "expected"), [("tensor", [8.0 / 7]), ("sample", [0.5, 8.0 / 7])])
def test_dynamic_step_is_the_range_at_hand(per, expected):
    x = torch.tensor([[[-4.0, 1.0]], [[2.0, 8.0]]])
    step = DynamicStep(per)(x, TimeSteps(0, 2), Grid(4))
    assert step.tolist() == pytest.approx(expected)
    torch.testing.assert_close(DynamicStep(per)(x.transpose(1, 2), None, Grid(4)), step)


def test_learned_step_takes_the_gradient_and_stays_positive():
    source = LearnedStep(0.25)
    quantizer = ActivationQuantizer(4, Grid(4), source)
    quantizer(torch.randn(2, 9), TimeSteps(0, 2)).square().sum().backward()
    (parameter,) = source.parameters()
    assert source.s.item() == pytest.approx(0.25) and parameter.grad.abs() > 0
    for wild in (-30.0, 0.0, 5.0):
        torch.nn.init.constant_(parameter, wild)
        assert source(None, None, None) > 0
