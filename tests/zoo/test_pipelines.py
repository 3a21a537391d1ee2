"""The contract on other people's models, in their own pipelines of diffusers: recorded, quantized, frozen, saved, restored."""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.utils import is_transformers_available

import tdq_utils as tdq
from tdq_utils import TDQError
from tdq_utils.fit.reconstruction import refine

sys.path.insert(0, str(Path(__file__).parent))
from denoisers import unchanged
from pipelines import HOSTED, STEPS, WITHOUT_TRANSFORMERS


def needing(name):
    missing = HOSTED[name].pipeline not in WITHOUT_TRANSFORMERS and not is_transformers_available()
    return pytest.param(
        name, marks=pytest.mark.skipif(missing, reason="its pipeline imports transformers: pip install transformers")
    )


def recorded_run(how, scheduler=None, steps=STEPS):
    """A pipeline, what it makes, and its recording."""
    pipe, model = how.build(scheduler)
    with tdq.record(model, inputs=2) as recorded:
        clean = how.run(pipe, steps)
    return SimpleNamespace(
        how=how, pipe=pipe, model=model, clean=clean, recorded=recorded, run=lambda *args: how.run(pipe, *args)
    )


def calibrated(case, weights=4, method="table", **options):
    """The case, quantized by its recording."""
    tdq.quantize(case.model, weights, 8, method)
    tdq.calibrate(case.model, profile=case.recorded.profile, progress=False, **options)
    return case


@pytest.fixture(scope="module")
def cases():
    """Every family's recorded pipeline, made when it is first asked for."""
    return cache(lambda name: recorded_run(HOSTED[name]))


@pytest.fixture
def case(cases, name):
    """The recorded pipeline of the family ``name``, which gets its full-precision model back afterwards."""
    yield cases(name)
    if hasattr(cases(name).model, "quantization"):
        tdq.restore(cases(name).model)


each_family = pytest.mark.parametrize("name", [*map(needing, HOSTED)])


@each_family
def test_the_recorded_time_steps_are_those_of_the_pipeline(case):
    told = [case.how.unit(t) for t in case.pipe.scheduler.timesteps.tolist() for _ in range(case.how.calls)]
    assert case.recorded.t == pytest.approx(told, rel=1e-6, abs=1e-7)
    assert case.recorded.profile.t.tolist() == list(dict.fromkeys(case.recorded.t))
    assert len(case.recorded.profile.t) == STEPS and len(case.recorded.inputs) == 2
    assert torch.equal(case.run(), case.clean)  # recording leaves nothing behind


@each_family
def test_the_whole_life_of_a_pipeline(case, tmp_path):
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    model = calibrated(case).model
    assert all(model.quantization.kept[layer] for layer in case.how.denoiser.carries_t)  # with the reason
    assert model.quantization.visited == case.recorded.profile.t.tolist()
    assert unchanged(model, case.run) == []
    quantized = case.run()
    assert torch.isfinite(quantized).all() and not torch.equal(quantized, case.clean)
    tdq.freeze(model)
    assert torch.equal(case.run(), quantized)

    tdq.save_quantized(model, tmp_path)
    part = next(part for part, value in case.pipe.components.items() if value is model)
    setattr(case.pipe, part, tdq.load_quantized(tmp_path))
    loaded = case.run()
    setattr(case.pipe, part, model)
    assert torch.equal(loaded, quantized)

    tdq.restore(model)
    assert torch.equal(case.run(), case.clean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@each_family
def test_the_kept_calls_calibrate(case):
    tdq.quantize(case.model, None, 8, "mse")
    tdq.calibrate(case.model, data=case.recorded.inputs, progress=False)
    assert torch.isfinite(case.run()).all()


@pytest.mark.parametrize("name", map(needing, ["DiT", "Z-Image", "Qwen-Image"]))
def test_the_kept_calls_serve_reconstruction(case):
    tdq.quantize(case.model, 4, 4, "tdq")
    tdq.calibrate(case.model, profile=case.recorded.profile, progress=False, iterations=1)
    before = case.run()
    refine(case.model, case.recorded.inputs, "noise", iterations=2, progress=False)
    assert torch.isfinite(case.run()).all() and not torch.equal(case.run(), before)


@each_family
def test_half_precision_finds_its_time_steps(name):
    case = calibrated(recorded_run(HOSTED[name]), weights=None)
    tdq.freeze(case.model)
    case.pipe.to(torch.bfloat16)  # which may round t, after the recording
    assert torch.isfinite(case.run().float()).all()
    tdq.restore(case.model)
    with tdq.record(case.model) as case.recorded:  # or before it
        clean = case.run()
    quantized = calibrated(case).run()
    assert case.model.dtype == torch.bfloat16 and not torch.equal(quantized, clean)
    tdq.freeze(case.model)
    assert torch.equal(case.run(), quantized)
    tdq.restore(case.model)
    assert torch.equal(case.run(), clean)


@pytest.mark.parametrize("name", map(needing, ["Flux"]))
def test_many_steps_are_told_apart_in_half_precision(name):
    case = recorded_run(HOSTED[name], steps=20)  # t = 150 is rounded to half precision, then divided by 1000 and rounded again
    calibrated(case, weights=None)
    case.pipe.to(torch.bfloat16)
    assert torch.isfinite(case.run(20).float()).all()


@pytest.mark.parametrize("name", map(needing, ["Flux", "Z-Image", "SVD"]))
def test_the_generator_sees_noise_at_1000_and_its_interval_follows_t(case):
    model = calibrated(case, method="tdq", iterations=1).model
    t = case.recorded.profile.t
    for quantizer in tdq.activation_quantizers(model).values():
        seen = ((torch.from_numpy(t) - quantizer.step.origin) * quantizer.step.unit).tolist()
        noise_levels = case.pipe.scheduler.timesteps.tolist() if case.how.unit(1000) in (0, 1) else [1000, seen[1], 0]
        assert seen == pytest.approx(noise_levels, rel=1e-5) and sorted(seen, reverse=True) == seen
        assert len(set(quantizer.step.on(t.tolist()).tolist())) == STEPS
    quantized = case.run()
    tdq.freeze(model)
    assert torch.equal(case.run(), quantized)


SCHEDULERS = {
    "Heun": (lambda: diffusers.HeunDiscreteScheduler(steps_offset=1), True),
    "LMS": (lambda: diffusers.LMSDiscreteScheduler(steps_offset=1), True),
    "KDPM2": (lambda: diffusers.KDPM2DiscreteScheduler(steps_offset=1), True),
    "EulerAncestral": (lambda: diffusers.EulerAncestralDiscreteScheduler(steps_offset=1), True),
    "DPM++": (lambda: diffusers.DPMSolverMultistepScheduler(steps_offset=1, use_karras_sigmas=True), False),
    "DPM++ SDE": (lambda: diffusers.DPMSolverMultistepScheduler(steps_offset=1, algorithm_type="sde-dpmsolver++"), False),
    "UniPC": (lambda: diffusers.UniPCMultistepScheduler(steps_offset=1), False),
    "LCM": (lambda: diffusers.LCMScheduler(steps_offset=1, clip_sample=False), False),
}


@pytest.mark.parametrize("name", map(needing, ["Stable Diffusion"]))
@pytest.mark.parametrize("scheduler, fractional", SCHEDULERS.values(), ids=SCHEDULERS)
def test_any_scheduler_of_the_pipeline(name, scheduler, fractional):
    case = recorded_run(HOSTED[name], scheduler=scheduler())
    visited = list(dict.fromkeys(case.pipe.scheduler.timesteps.tolist()))
    assert any(t % 1 for t in visited) == fractional
    assert list(dict.fromkeys(case.recorded.t)) == visited == case.recorded.profile.t.tolist()
    quantized = calibrated(case, weights=None).run()
    tdq.freeze(case.model)
    assert torch.equal(case.run(), quantized) and not torch.equal(quantized, case.clean)
    tdq.restore(case.model)
    assert torch.equal(case.run(), case.clean)


@pytest.mark.parametrize("name", map(needing, ["Wan"]))
def test_two_transformers_share_a_trajectory(name):
    how = HOSTED[name]
    pipe, high = how.build()
    low = how.denoiser.build()
    pipe.register_modules(transformer_2=low)
    pipe.register_to_config(boundary_ratio=0.5)
    with tdq.record(high) as noisy, tdq.record(low) as clear:
        clean = how.run(pipe)
    t = pipe.scheduler.timesteps.tolist()
    assert (noisy.profile.t.tolist(), clear.profile.t.tolist()) == (t[:2], t[2:])
    for model, recorded in ((high, noisy), (low, clear)):
        tdq.quantize(model, None, 8, "table")
        tdq.calibrate(model, profile=recorded.profile, progress=False)
    quantized = how.run(pipe)
    for model in (high, low):
        tdq.freeze(model)
    assert torch.equal(how.run(pipe), quantized)
    for model in (high, low):
        tdq.restore(model)
    assert torch.equal(how.run(pipe), clean) and not torch.equal(quantized, clean)


@pytest.mark.parametrize("name", map(needing, ["DiT", "Flux", "Z-Image"]))
def test_another_number_of_steps_is_refused_and_nothing_is_lost(case):
    tdq.freeze(calibrated(case, weights=None).model)
    quantized = case.run()
    with pytest.raises(TDQError, match=r"holds 3 time steps, .* got t = .*Sample with the number of steps"):
        case.run(5)
    assert torch.equal(case.run(), quantized)


@pytest.mark.parametrize("name", map(needing, ["DiT", "SVD"]))
def test_what_does_not_fit_the_pipeline_is_refused(case):
    with pytest.raises(TDQError, match="was called 0 times. Run the pipeline there"), tdq.record(case.model):
        pass
    with pytest.raises(TDQError, match="time step as one of .* Wrap it"), tdq.record(case.pipe.vae):
        pass
    other = case.how.denoiser.build(**case.how.changed)
    next(other.parameters()).data += 1
    tdq.quantize(other, None, 8, "table")
    with pytest.raises(TDQError, match=f"serves the model that made it, {case.recorded.profile.model}; this model is"):
        tdq.calibrate(other, profile=case.recorded.profile, progress=False)
    tdq.quantize(case.model, None, 8, "table")
    with pytest.raises(TDQError, match="must be calibrated"):
        case.run()
    tdq.calibrate(case.model, profile=case.recorded.profile, progress=False)  # nothing is lost
    assert torch.isfinite(case.run()).all()


@pytest.mark.parametrize("name", map(needing, ["Stable Diffusion", "SD 3", "Flux"]))
def test_projections_are_fused_before_they_are_quantized(name):
    case = calibrated(recorded_run(HOSTED[name]), weights=None)
    case.model.fuse_qkv_projections()
    with pytest.raises(TDQError, match=r"must keep its layers; .* restore\(model\).* model.eval\(\)"):
        case.run()
    tdq.restore(case.model)
    case.model.eval()  # diffusers makes fused layers in training mode
    with tdq.record(case.model) as case.recorded:
        case.run()
    kept = calibrated(case).model.quantization.kept
    idle = {name.rpartition(".")[2] for name, reason in kept.items() if reason.startswith("does not run")}
    assert {"to_q", "to_k", "to_v"} <= idle <= {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    assert unchanged(case.model, case.run) == []
    case.model.unfuse_qkv_projections()
    with pytest.raises(TDQError, match="must stay fused|must keep its layers"):
        case.run()


@pytest.mark.parametrize("name", map(needing, ["Stable Diffusion", "SDXL", "Flux"]))
def test_an_adapter_must_be_fused(name):
    peft = pytest.importorskip("peft")
    case = recorded_run(HOSTED[name])
    case.model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(TDQError, match=r"must be fused .* pipe.fuse_lora\(\); pipe.unload_lora_weights\(\)"):
        tdq.quantize(case.model)
    case.pipe.fuse_lora(components=[next(part for part in ("unet", "transformer") if hasattr(case.pipe, part))])
    case.pipe.unload_lora_weights()
    with tdq.record(case.model) as case.recorded:
        fused = case.run()
    assert not torch.equal(fused, case.clean)
    calibrated(case)
    assert unchanged(case.model, case.run) == []
    tdq.restore(case.model)
    assert torch.equal(case.run(), fused)
