"""The table of trials: what is tried, and that a variant is trained as its name says."""

import pandas as pd
import pytest
import torch

from tdq_utils.fit.finetuning import GENERATOR_RATE, STEP_RATE, finetune
from tdq_utils.fit.quantize import activation_quantizers
from tdq_utils.lab.tables.trials import VARIANTS, Trial, trial_jobs
from tdq_utils.method.rules import PACT_DECAY


def test_rates_to_choose_from_hold_the_one_chosen_and_others_on_both_sides():
    jobs = trial_jobs(iterations=7)
    assert len(set(jobs)) == len(jobs) and jobs[0].method == "full precision"
    for method in ("pact", "lsq", "nipq", "tdq"):
        tried = {(job.step_rate, job.generator_rate) for job in jobs if job.method == method and job.iterations == 7}
        wanted = {"step_rate": STEP_RATE, "generator_rate": GENERATOR_RATE * (method == "tdq")}
        assert tuple(wanted.values()) in tried
        for i, rate in enumerate(value for value in wanted.values() if value):
            others = [pair[i] for pair in tried if pair[1 - i] == [*wanted.values()][1 - i]]
            assert min(others) < rate < max(others)


def test_a_variant_differs_from_a_row_beside_it_in_nothing_else():
    jobs = pd.DataFrame(trial_jobs()).query("weights == 4")
    plain = jobs[(jobs.variant == "-") & ~jobs.split_skips]
    changed = jobs.drop(plain.index)
    assert set(changed.variant) == {*VARIANTS, "-"}
    beside = changed.assign(variant="-", split_skips=False).merge(plain, how="inner")
    assert len(beside) == len(changed) == 2 + 2 + 3 + 3  # grid and skips with LSQ, too; generators; decays


def test_trials_have_folders_of_their_own():
    assert len({job.name for job in trial_jobs()}) == len(trial_jobs())


def test_decays_are_those_of_pact():
    jobs = [job for job in trial_jobs() if job.variant.startswith("decay")]
    assert {job.method for job in jobs} == {"pact"}
    decays = [job.options["decay"] for job in jobs if job.weights == 4]
    assert min(decays) < PACT_DECAY < max(decays)
    assert {job.options["decay"] for job in jobs if job.weights == 8} < set(decays)


@pytest.mark.parametrize("variant", [name for name, (methods, _) in VARIANTS.items() if "tdq" in methods])
def test_a_variant_is_trained_as_it_says(unet, scheduler, profile, variant):
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    options = Trial("tdq", 4, 4, variant=variant).options
    assert options == VARIANTS[variant][1]
    finetune(unet, scheduler, images, "tdq", iterations=1, batch=2, warmup=1, profile=profile, progress=False, **options)
    quantizers = activation_quantizers(unet).values()
    settings = [quantizer.step.settings() for quantizer in quantizers]
    assert all(quantizer.grid.low is None for quantizer in quantizers) == (variant == "symmetric grid")
    assert {one["dropout"] for one in settings} == {0.0 if variant == "no dropout" else 0.2}
    assert {one["width"] for one in settings} == {1 if variant == "raw t" else 128}
