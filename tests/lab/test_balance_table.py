"""The table of balance: which rows, and that a row is balanced as its name says."""

import pandas as pd
import pytest

from tdq_utils import CalibrationSet, quantized_layers
from tdq_utils.fit.calibration import profile_set
from tdq_utils.lab.tables.balance import BITS, BY_INPUT, METHODS, RULES, balance_jobs, with_plain
from tdq_utils.lab.tables.ptq import ptq_jobs


def test_every_method_at_every_bits_and_each_row_once():
    jobs = balance_jobs()
    assert len(set(jobs)) == len(jobs)
    found = {(job.method, job.weights, job.activations) for job in jobs if job.rule == "range" and job.repeat == 1}
    assert found >= {(method, *bits) for method in METHODS + BY_INPUT for bits in BITS}
    assert {job.rule for job in jobs} == {"-", "range", *RULES}


def test_rows_that_are_not_balanced_are_here_or_in_the_other_table():
    """So that every balanced row has its plain one, with the same calibration and noise."""
    plain = {(j.method, j.weights, j.activations, j.repeat) for j in ptq_jobs() if j.weights_method == "nearest"}
    jobs = balance_jobs()
    plain |= {(j.method, j.weights, j.activations, j.repeat) for j in jobs if j.rule == "-"}
    assert {(j.method, j.weights, j.activations, j.repeat) for j in jobs} - plain == set()
    elsewhere = {(j.method, j.weights, j.activations) for j in ptq_jobs()}
    assert not [j for j in jobs if j.weights and j.rule == "-" and (j.method, j.weights, j.activations) in elsewhere]


@pytest.mark.parametrize(("weights_method", "rule"), [("nearest", "-"), ("nearest", "range"), ("adaround", "smooth")])
def test_a_row_is_calibrated_as_it_says(unet, scheduler, tmp_path, monkeypatch, weights_method, rule):
    monkeypatch.setattr("tdq_utils.fit.reconstruction.adaround.__defaults__", (2, 1e-2, 2, 0.01, 0, True))
    data = CalibrationSet.collect(unet, scheduler, range(4), 4, progress=False)
    job = next(job for job in balance_jobs() if (job.method, job.weights) == ("mse", 4) and job.rule == "range")
    job = type(job)(**{**vars(job), "rule": rule, "weights_method": weights_method})
    job.prepare(unet, scheduler, lambda: (data, profile_set(unet, data)), tmp_path, None)
    for layer in quantized_layers(unet).values():
        assert (layer.balance is None) == (rule == "-") and (layer.levels is None) == (weights_method == "nearest")
    assert unet.quantization.balance == (None if rule == "-" else rule)


def test_plain_rows_stand_beside_those_of_the_same_bits_method_and_repeat():
    names = ["method", "weights", "activations", "repeat", "weights_method", "fcd"]
    balanced = pd.DataFrame([["mse", 8, 5, 0, "nearest", 3.5]], columns=names).assign(rule="range")
    ptq = pd.DataFrame([["mse", 8, 5, 0, "nearest", 7.5], ["mse", 8, 5, 1, "nearest", 7.6], ["minmax", 8, 5, 0, "nearest", 15.0]],
                       columns=names)  # fmt: skip
    joined = with_plain(balanced, ptq)
    assert list(zip(joined.rule, joined.fcd, strict=True)) == [("range", 3.5), ("-", 7.5)]
