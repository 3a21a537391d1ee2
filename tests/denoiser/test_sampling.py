"""Noise from seeds, the time steps, and DDIM against the formula."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, EulerDiscreteScheduler, UNet2DConditionModel

from tdq_utils import sample
from tdq_utils.denoiser.sampling import checked_seeds, noise, timesteps
from tdq_utils.errors import TDQError


def draw(model, scheduler, seeds=range(4), **options):
    return sample(model, scheduler, seeds, **{"steps": 4, "progress": False, **options})


def test_noise_depends_on_its_seed_alone():
    three = noise([5, 0, 7], (1, 8, 8))
    torch.randn(10)  # the global generator plays no part
    assert torch.equal(three[2], noise([7], (1, 8, 8))[0])
    assert not torch.equal(three[0], three[1])
    assert noise(range(200), (64,)).std() == pytest.approx(1, abs=0.03)


def test_same_seeds_same_bits(unet, scheduler):
    assert torch.equal(draw(unet, scheduler), draw(unet, scheduler))


@pytest.mark.parametrize("seeds", [[2], [2, 0], [1, 0, 2], [9, 8, 7, 2, 6]], ids=str)
def test_an_image_does_not_depend_on_its_neighbours(unet, scheduler, seeds):
    """Bit for bit: alone, in another place, among others, in the first batch or the last."""
    expected = draw(unet, scheduler, range(3), batch_size=4)[2]
    assert torch.equal(draw(unet, scheduler, seeds, batch_size=4)[seeds.index(2)], expected)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_the_last_bits_at_most(denoiser, scheduler, batch_size, pad):
    """The rounding of sums (5e-7 a call), which the first step from t = 999 multiplies by up to 150."""
    model, condition = denoiser
    together = draw(model, scheduler, range(3), condition=condition)
    apart = draw(model, scheduler, range(3), batch_size=batch_size, condition=condition, pad=pad)
    torch.testing.assert_close(apart, together, atol=2e-4, rtol=0)
    assert (together[0] - together[1]).abs().mean() > 0.1


def test_ddim_is_the_formula(unet, scheduler):
    """Song et al. 2021, eq. 12 with sigma = 0, on x_0 clipped to [-1, 1]."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    x = noise(range(4), (1, 8, 8)).to(memory_format=torch.channels_last)
    for t, t_next in [(999, 749), (749, 499), (499, 249), (249, -1)]:
        now, after = alpha_bar[t], alpha_bar[t_next] if t_next >= 0 else torch.tensor(1.0)
        eps = unet(x, t).sample
        x_0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        x = after.sqrt() * x_0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(draw(unet, scheduler), x, atol=1e-4, rtol=0)


def test_callback_sees_every_step(unet, scheduler):
    calls = []
    images = draw(unet, scheduler, [3, 1, 4], batch_size=2, callback=calls.append)
    assert [(call["step"], call["t"]) for call in calls] == [(0, 999), (1, 749), (2, 499), (3, 249)] * 2
    assert [call["seeds"] for call in calls[::4]] == [[3, 1], [4]]
    assert torch.equal(calls[0]["x_t"], noise([3, 1], (1, 8, 8)))
    assert all(torch.equal(a["x_prev"], b["x_t"]) for a, b in pairwise(calls[:4]))
    assert torch.equal(calls[0]["eps"], unet(calls[0]["x_t"], 999).sample)
    assert torch.equal(images, torch.cat([calls[3]["x_prev"], calls[7]["x_prev"]]))


def test_scheduler_is_left_alone(unet, scheduler):
    before = (dict(scheduler.config), scheduler.timesteps.clone(), scheduler.num_inference_steps)
    draw(unet, scheduler)
    assert scheduler.config == before[0] and torch.equal(scheduler.timesteps, before[1])
    assert scheduler.num_inference_steps is before[2] is None


@pytest.mark.parametrize("denoiser", [UNet2DConditionModel, DiTTransformer2DModel], indirect=True)
def test_condition_goes_with_its_seed(denoiser, scheduler):
    """Each sample gets its own row of the condition, in any batch; another condition gives another image."""
    model, condition = denoiser
    images = draw(model, scheduler, [0, 0, 0], condition=condition, batch_size=2)
    assert (images[0] - images[2]).abs().max() > 1e-3
    alone = draw(model, scheduler, [0], condition={key: value[2:] for key, value in condition.items()})
    torch.testing.assert_close(images[2:], alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize("denoiser", [DiTTransformer2DModel], indirect=True)
def test_a_predicted_variance_is_dropped(denoiser, scheduler):
    model, condition = denoiser
    calls = []
    draw(model, scheduler, range(3), condition=condition, callback=calls.append)
    output = model(calls[0]["x_t"], torch.tensor([999] * 3), **condition).sample
    assert output.shape == (3, 4, 8, 8)
    torch.testing.assert_close(calls[0]["eps"], output[:, :2], atol=1e-5, rtol=0)


def test_other_schedulers_have_no_eta(unet):
    images = draw(unet, DDPMScheduler(timestep_spacing="trailing"))
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all()


def test_a_fractional_time_step_is_not_cut_off(unet):
    euler = EulerDiscreteScheduler(timestep_spacing="linspace")
    assert timesteps(euler, 4) == [999, 666, 333, 0]
    expected, calls = [999, 749.25, 499.5, 249.75, 0], []
    draw(unet, euler, [0], steps=5, callback=calls.append)
    assert timesteps(euler, 5) == [call["t"] for call in calls] == expected


@pytest.mark.parametrize("give", [lambda eps: (eps, None), lambda eps: eps], ids=["tuple", "tensor"])
def test_a_model_may_return_a_tuple_or_a_tensor(unet, scheduler, monkeypatch, give):
    expected, plain = draw(unet, scheduler), unet.forward
    monkeypatch.setattr(unet, "forward", lambda sample, timestep: give(plain(sample, timestep).sample))
    assert torch.equal(draw(unet, scheduler), expected)


def test_a_model_in_training_mode_is_refused(unet, scheduler):
    with pytest.raises(TDQError, match=r"in eval mode; this one is in training mode. Call model.eval\(\)"):
        draw(unet.train(), scheduler)


def test_time_steps_and_seeds(scheduler):
    assert timesteps(scheduler, 4) == [999, 749, 499, 249]
    assert timesteps(scheduler, 1000) == list(range(999, -1, -1))
    assert timesteps(scheduler, np.int64(2)) == [999, 499]
    assert checked_seeds(7) == checked_seeds(torch.tensor(7)) == checked_seeds(np.int64(7)) == [7]
    assert checked_seeds(torch.arange(2)) == checked_seeds(np.arange(2)) == checked_seeds(iter([0, 1])) == [0, 1]
    assert checked_seeds([np.int64(3), torch.tensor(4)]) == [3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": range(0)}, r"at least one image; got an empty range. Pass for example range\(16\)"),
        ({"seeds": "12"}, "A seed must be a whole number from 0 up; got '1'"),
        ({"seeds": [0.9]}, "A seed must be a whole number from 0 up; got 0.9"),
        ({"seeds": torch.tensor([2.0])}, "A seed must be a whole number from 0 up; got 2.0"),
        ({"seeds": 3.0}, "A seed must be a whole number from 0 up; got 3.0"),
        ({"seeds": True}, "A seed must be a whole number from 0 up; got True"),
        ({"seeds": [4, -1]}, "A seed must be a whole number from 0 up; got -1"),
        ({"seeds": 2**63}, "A seed must be a whole number from 0 up; got 9223372036854775808"),
        ({"seeds": None}, "A seed must be a whole number from 0 up; got None"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000; got 0"),
        ({"steps": 1001}, "steps must be a whole number from 1 to 1000; got 1001"),
        ({"steps": 2.0}, "steps must be a whole number from 1 to 1000; got 2.0"),
        ({"steps": True}, "steps must be a whole number from 1 to 1000; got True"),
        ({"steps": "4"}, "steps must be a whole number from 1 to 1000; got '4'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 up; got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number from 1 up; got 2.5"),
        (
            {"condition": {"class_labels": torch.zeros(3)}},
            r"one row for each of the 4 seeds, or one for all; got .*\(3,\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(unet, scheduler, options, message):
    with pytest.raises(TDQError, match=message):
        draw(unet, scheduler, **options)
