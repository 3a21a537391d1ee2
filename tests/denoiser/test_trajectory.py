"""Any model by any scheduler: its own noise, its unit of t, its conditions, guided or not."""

import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tdq_utils import CalibrationSet, calibrate, freeze, noise, profile_activations, quantize, record, restore, sample, timesteps
from tdq_utils.denoiser.call import prediction
from tdq_utils.errors import TDQError

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from denoisers import ZOO

DRAWN = ("DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
FRACTIONAL = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler")
OTHERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "PNDMScheduler")
flow = FlowMatchEulerDiscreteScheduler


def of(name):
    return getattr(diffusers, name)()


def draw(model, scheduler, seeds=range(3), steps=4, **options):
    return sample(model, scheduler, seeds, steps, progress=False, **{"batch_size": 3, **options})


@pytest.mark.parametrize("name", (*DRAWN, *FRACTIONAL, *OTHERS))
def test_same_seed_same_bits(unet, name):
    """Whoever is in the batch, and though the global generator was used; noise that is drawn follows the seed."""
    scheduler = of(name)
    images = draw(unet, scheduler)
    torch.randn(7)
    assert torch.equal(draw(unet, scheduler, [7, 2, 0]), torch.cat([draw(unet, scheduler, 7), images[[2, 0]]]))
    assert torch.isfinite(images).all() and not torch.equal(images[0], images[1])


@pytest.mark.parametrize("name", FRACTIONAL)
def test_fractional_time_steps_from_profile_to_table(unet, name):
    scheduler = of(name)
    profile = profile_activations(unet, scheduler, range(2), 3, progress=False)
    assert profile.t.tolist() == timesteps(scheduler, 3) and not all(float(t).is_integer() for t in profile.t)
    quantize(unet, 8, 6, "table")
    calibrate(unet, scheduler, range(2), 3, progress=False)
    before = draw(unet, scheduler, steps=3)
    freeze(unet, scheduler, 3)
    assert torch.equal(draw(unet, scheduler, steps=3), before)
    restore(unet)
    assert not torch.equal(draw(unet, scheduler, steps=3), before)


def test_a_calibration_set_holds_what_the_model_got(unet):
    """Not x_t before the scheduler scaled it: with Euler they differ by a factor of up to 15."""
    scheduler, seen = of("EulerDiscreteScheduler"), []
    handle = unet.register_forward_pre_hook(lambda model, args, kwargs: seen.append(kwargs["sample"]), with_kwargs=True)
    data = CalibrationSet.collect(unet, scheduler, range(3), 4, batch_size=3, progress=False)
    handle.remove()
    assert torch.equal(data.x_t, torch.cat(seen).contiguous())
    assert data.t.tolist() == [t for t in timesteps(scheduler, 4) for _ in range(3)]


@pytest.mark.parametrize("denoiser", [DiTTransformer2DModel], indirect=True)
def test_flow_matching_is_euler_along_the_velocity(denoiser):
    """x + (sigma' - sigma) v, with t = 1000 sigma (Liu et al. 2022)."""
    (model, condition), x, scheduler = denoiser, noise(range(3), (2, 8, 8)), flow()
    scheduler.set_timesteps(4)
    for t, now, after in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        assert t == pytest.approx(1000 * now)
        x = x + (after - now) * prediction(model(x, t.expand(3), **condition))[:, :2]
    torch.testing.assert_close(draw(model, flow(), condition=condition), x, atol=1e-5, rtol=1e-4)


def test_v_prediction_is_noise_prediction_in_other_terms(unet, scheduler, monkeypatch):
    """v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans and Ho 2022): a model of v, made of one of noise, draws the same."""
    plain = DDIMScheduler.from_config(scheduler.config, clip_sample=False, beta_end=0.01)
    forward, alphas = type(unet).forward, plain.alphas_cumprod

    def v(self, sample, timestep, **more):
        a = alphas[timestep].view(-1, 1, 1, 1)
        eps = forward(self, sample, timestep, **more).sample
        return (a.sqrt() * eps - (1 - a).sqrt() * (sample - (1 - a).sqrt() * eps) / a.sqrt(),)

    expected = draw(unet, plain)
    monkeypatch.setattr(type(unet), "forward", v)
    found = draw(unet, DDIMScheduler.from_config(plain.config, prediction_type="v_prediction"))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("denoiser", [DiTTransformer2DModel], indirect=True)
def test_guidance_is_the_formula(denoiser, scheduler):
    """The null label of a class-conditional transformer is the one after its classes; weight 1 changes nothing but bits."""
    model, labels = denoiser[0], torch.tensor([1, 2, 3])
    asked, x = {"class_labels": labels}, noise(range(3), (2, 8, 8))
    seen = []
    draw(model, scheduler, condition=asked, guidance=3.0, callback=seen.append)
    t = torch.full((3,), 999)
    with torch.no_grad():
        guided, against = (model(x, t, class_labels=y).sample[:, :2] for y in (labels, torch.full((3,), 10)))
    torch.testing.assert_close(seen[0]["eps"], against + 3 * (guided - against))
    given = draw(model, scheduler, condition=asked, guidance=3.0, negative={"class_labels": torch.tensor([10])})
    assert torch.equal(draw(model, scheduler, condition=asked, guidance=3.0), given)
    torch.testing.assert_close(draw(model, scheduler, condition=asked, guidance=1.0), draw(model, scheduler, condition=asked))


def test_calibration_sees_both_calls_of_a_guided_trajectory(text_unet, scheduler):
    text = torch.randn(3, 5, text_unet.config.cross_attention_dim)
    how = dict(condition={"encoder_hidden_states": text}, guidance=2.0, batch_size=3, progress=False)
    with record(text_unet) as recorded:
        sample(text_unet, scheduler, range(3), 2, **how)
    assert recorded.t == [999, 999, 499, 499]
    data = CalibrationSet.collect(text_unet, scheduler, range(3), 2, **how)
    assert len(data) == 12 and sorted(data.t.tolist()) == [499] * 6 + [999] * 6
    states = data.condition["encoder_hidden_states"]
    assert torch.equal(states[:6], text.repeat(2, 1, 1)) and not states[6:].any()
    quantize(text_unet, 8, 8, "mse")
    calibrate(text_unet, scheduler, range(3), 2, **how)
    assert torch.isfinite(sample(text_unet, scheduler, range(3), 2, **how)).all()


@pytest.mark.parametrize(
    ("family", "scheduler", "options"),
    [
        ("SDXL", DDIMScheduler, {}),
        ("PixArt", DDIMScheduler, {}),
        ("SD 3", flow, {}),
        ("Flux", flow, dict(shape=(16, 4))),
        ("AuraFlow", flow, {}),
        ("Sana", flow, {}),
        ("Wan", flow, dict(shape=(4, 2, 8, 8))),
        ("LTX", flow, dict(shape=(8, 4))),
        ("UNet3D", DDIMScheduler, dict(shape=(4, 3, 8, 8))),
        ("UNet1D", DDIMScheduler, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_family(family, scheduler, options, dtype):
    """Trees of conditions, ids without rows, latents of tokens, video and audio; and each in half precision."""
    family = ZOO[family]
    model = family.build().to(dtype)

    def conditions(rows):
        call = family.call(len(rows))
        return {name: value for name, value in call.items() if name != next(iter(call))}

    images = draw(model, scheduler(), range(2), 2, condition=conditions, batch_size=2, **options)
    assert images.dtype == torch.float32 and torch.isfinite(images).all() and len(images) == 2


@pytest.mark.parametrize(("family", "told"), [("Flux", [1.0, 0.001]), ("SD 3", [1000, 1]), ("AuraFlow", [1.0, 0.001])])
def test_a_model_is_told_t_in_its_unit(family, told):
    family = ZOO[family]
    model, shape = family.build(), dict(shape=(16, 4)) if family is ZOO["Flux"] else {}
    call = family.call(2)
    call.pop(next(iter(call)))
    with record(model) as recorded:
        draw(model, flow(), range(2), 2, condition=lambda rows: call, batch_size=2, **shape)
    assert recorded.t == pytest.approx(told) and timesteps(flow(), 2, model) == pytest.approx(recorded.t)


def test_what_the_scheduler_needs_is_passed_on(unet):
    scheduler = flow(use_dynamic_shifting=True)
    near, far = (draw(unet, scheduler, scheduling={"mu": mu}) for mu in (0.5, 2.0))
    assert not torch.equal(near, far)
    assert timesteps(scheduler, 4, mu=2.0)[1] > timesteps(scheduler, 4, mu=0.5)[1]


def test_channels_beside_the_noise(scheduler):
    """Super-resolution: more channels in than out."""
    family = ZOO["UNet2D, additive"]
    model = diffusers.UNet2DModel(**family.config | dict(in_channels=3)).eval().requires_grad_(False)
    low = torch.randn(3, 2, 8, 8)
    images = draw(model, scheduler, beside=low, shape=(1, 8, 8))
    assert images.shape == (3, 1, 8, 8) and not torch.equal(images, draw(model, scheduler, beside=low + 1, shape=(1, 8, 8)))
    data = CalibrationSet.collect(model, scheduler, range(3), 2, beside=low, shape=(1, 8, 8), progress=False)
    assert torch.equal(data.x_t[:3, 1:], low)


@pytest.mark.parametrize("denoiser", [DiTTransformer2DModel], indirect=True)
def test_a_learned_variance_is_used_by_who_learned_it(denoiser):
    model, condition = denoiser
    drawn = draw(model, DDPMScheduler(variance_type="learned_range"), condition=condition, steps=3)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, draw(model, DDPMScheduler(), condition=condition, steps=3))


class Restless(DDIMScheduler):
    """Draws noise that no generator is asked for."""

    def step(self, *args, **kwargs):
        torch.randn(1)
        return super().step(*args, **kwargs)


def test_bad_input(unet, scheduler):
    labels = {"class_labels": torch.zeros(3).long()}
    with pytest.raises(TDQError, match=r"condition must have one row for each of the 3 seeds, or one for all; got .*\(2,\)"):
        draw(unet, scheduler, condition={"a": torch.zeros(2)})
    with pytest.raises(TDQError, match="negative must have one row"):
        draw(unet, scheduler, negative={"a": torch.zeros(2)})
    with pytest.raises(TDQError, match="negative must name the null label of a UNet2DModel"):
        draw(unet, scheduler, guidance=2.0, condition=labels)
    with pytest.raises(TDQError, match="noise must follow the seeds; Restless draws its own"):
        draw(unet, Restless())


def test_what_only_a_pipeline_knows_is_refused():
    for family, message in (("Z-Image", "turns t and the output round"), ("Flux", "shape must be given where the config")):
        with pytest.raises(TDQError, match=message):
            draw(ZOO[family].build(), flow(), shape=(4, 8, 8) if family == "Z-Image" else None)
    with pytest.raises(TDQError, match="steps must be given for FlowMatchEuler"):
        timesteps(flow())
    with pytest.raises(TDQError, match="conditions with a row a seed; got a function"):
        CalibrationSet.collect(ZOO["UNet1D"].build(), DDIMScheduler(), range(2), 2, condition=lambda rows: {}, progress=False)
