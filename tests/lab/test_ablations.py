"""One question at a time: what the jobs of a variant are calibrated with."""

import pytest

from tdq_utils import calibrate, quantize
from tdq_utils.errors import TDQError
from tdq_utils.fit.quantize import quantized_layers
from tdq_utils.lab.tables.ablations import CALIBRATED_STEPS, SAMPLED_STEPS, VARIANTS, ablation_jobs


def test_every_variant_of_every_question_and_each_row_once():
    jobs = ablation_jobs(repeats=2)
    assert len(set(jobs)) == len(jobs)
    asked = {(job.question, job.variant) for job in jobs if job.method == "tdq" and job.repeat == 1}
    assert {(question, variant) for question, variants in VARIANTS.items() for variant in variants} <= asked
    moved = [job for job in jobs if job.question == "sampling steps" and job.method == "table" and job.repeat == 0]
    assert [job.steps for job in moved] == list(SAMPLED_STEPS)
    assert {job.calibration for job in moved} == {(range(500_000, 500_032), CALIBRATED_STEPS)}


def test_calibration_images_are_the_variant():
    images = {job.variant: len(job.calibration[0]) for job in ablation_jobs(1) if job.question == "calibration images"}
    assert images == {str(n): n for n in (2, 8, 32, 128)}
    assert {"trajectories", "split_skips"} <= {name for job in ablation_jobs(1) for name in job.choices}
    assert not {"trajectories", "split_skips"} & {name for job in ablation_jobs(1) for name in job.options}
    assert {job.variant for job in ablation_jobs(1) if job.split_inputs} == {"one for each half"}


def test_variants_reach_the_generator(unet, scheduler, profile):
    quantize(unet, 8, 5, "tdq")
    layer = next(iter(quantized_layers(unet)))
    for job in ablation_jobs(1):
        if job.question in ("encoding of t", "linear layers"):
            calibrate(unet, scheduler, profile=profile, iterations=1, progress=False, **job.options)
            settings = quantized_layers(unet)[layer].activation.step.settings()
            assert (settings["width"] == 1) == (job.variant == "raw t")
            assert settings["depth"] == (int(job.variant) if job.question == "linear layers" else 4)


@pytest.mark.parametrize("start", ["mse", "std", "lsq"])
def test_starts_are_of_the_right_size(drifting, unet, scheduler, profile, start):
    quantize(unet, 8, 5, "learned")
    calibrate(unet, scheduler, profile=profile, method="mse", progress=False)
    best = {name: layer.activation.step.s.item() for name, layer in quantized_layers(unet).items()}
    calibrate(unet, scheduler, profile=profile, method="learned", iterations=1, rate=1e-9, start=start, progress=False)
    for name, layer in quantized_layers(unet).items():
        assert 1 / 8 < layer.activation.step.s.item() / best[name] < 8


def test_unknown_start(unet, scheduler, profile):
    quantize(unet, 8, 5, "tdq")
    with pytest.raises(TDQError, match="start must be 'mse', 'std' or 'lsq'; got 'best'"):
        calibrate(unet, scheduler, profile=profile, start="best", progress=False)
