"""Finite-set calibration: a step size and a zero level at each t; it truncates nothing, and 0 stays a level."""

import pytest
import torch

from tdq_utils import calibrate, freeze, quantize, quantized_layers
from tdq_utils.errors import TDQError
from tdq_utils.fit.quantize import activation_quantizers
from tdq_utils.method.step_sizes import TableStep, TimeSteps


def test_each_grid_holds_the_range_of_its_t(calibrated, profile):
    model = calibrated("finite-set", activations=4)
    zeros = set()
    for name, quantizer in activation_quantizers(model).items():
        row = profile.row(name)
        for t, least, greatest in zip(profile.t, profile.least[row], profile.greatest[row], strict=True):
            s, bottom, top = (v.item() for v in quantizer.step.interval_on([t], quantizer.grid)[0])
            assert (bottom, top) == (round(bottom), round(top)) and top - bottom == 15 and bottom <= 0 <= top
            assert s * bottom <= min(least, 0) + 0.501 * s and s * top >= max(greatest, 0) - 0.501 * s
            assert 15 * s <= (max(greatest, 0) - min(least, 0)) * 1.0001  # and is no wider
            zeros.add(bottom)
    assert len(zeros) > 3  # they do follow layers and t


def test_it_rounds_as_the_paper_says(calibrated):
    """clip(round(x / s) + z, 0, 2^b - 1), at the t of each sample."""
    quantizer = next(iter(activation_quantizers(calibrated("finite-set")).values()))
    x, t = torch.randn(3, 4, 2, 2) * 3, [999, 249, 999]
    found = quantizer(x, TimeSteps(torch.tensor(t), 3))
    for i, value in enumerate(t):
        s, bottom, _ = quantizer.step.interval_on([value], quantizer.grid)[0]
        expected = s * ((x[i] / s).round() - bottom).clamp(0, 31).add(bottom)
        torch.testing.assert_close(found[i], expected)
        assert torch.equal(quantizer(x[i : i + 1], TimeSteps(value, 1))[0], found[i])
    assert (quantizer(torch.zeros(1, 2), TimeSteps(499, 1)) == 0).all()


def test_a_gradient_goes_straight_through(calibrated):
    quantizer = next(iter(activation_quantizers(calibrated("finite-set")).values()))
    x = torch.randn(2, 3, requires_grad=True)
    quantizer(x, TimeSteps(999, 2)).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_an_input_that_is_always_positive_has_its_zero_at_the_bottom(drifting, unet):
    profile = drifting(**{"mid_block.resnets.0.conv1": [1.0, 0.5]})
    profile.least, profile.greatest = profile.least * 0 + 1.0, profile.greatest * 0 + [4.0, 2.0]
    name = "mid_block.resnets.0.conv1"
    quantize(unet, None, 4, "finite-set", keep=[n for n, m in unet.named_modules() if hasattr(m, "weight") and n != name
                                               and m.weight.dim() > 1])  # fmt: skip
    calibrate(unet, profile=profile, progress=False)
    step = quantized_layers(unet)[name].activation.step
    assert isinstance(step, TableStep)
    assert torch.equal(step.interval_on([999, 0], None), torch.tensor([[4 / 15, 0, 15], [2 / 15, 0, 15]]))


def test_it_comes_back(calibrated, comes_back):
    calibrated("finite-set")
    comes_back()


def test_another_t_is_refused(calibrated, scheduler, x):
    model = calibrated("finite-set")
    with pytest.raises(TDQError, match="t must be one of them; got t = 600"):
        model(x, 600)
    with pytest.raises(TDQError, match="only for the steps it was calibrated for"):
        freeze(model, scheduler, 10)


def test_hardware_without_zero_points_is_refused(unet, profile):
    quantize(unet, method="finite-set")
    with pytest.raises(TDQError, match="shifted=False is for hardware without zero points"):
        calibrate(unet, profile=profile, shifted=False)
