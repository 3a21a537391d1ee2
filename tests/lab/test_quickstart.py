"""The comparison that a notebook makes: the rows of the table's engine, with pictures."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from tdq_utils import compare
from tdq_utils.errors import TDQError
from tdq_utils.lab import reproduce as module
from tdq_utils.lab.tables import ptq
from tdq_utils.lab.tables.quickstart import CALIBRATION_SEEDS, COLUMNS, QuickJob, quickstart_jobs, verdict


@pytest.mark.usefixtures("small")
def test_rows_and_images_pair_up(unet, scheduler):
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    settings = [("mse", 8, 4), ("mse", 8, None), ("mse", 8, 8)]
    table, images = compare(unet, scheduler, settings, range(3), 2, progress=False)
    assert list(table.method) == ["full precision", "mse", "mse", "mse", "real images"] and tuple(table.columns) == COLUMNS
    assert set(images) == {("full precision", None, None), *settings}
    assert table.mse[0] == 0
    assert table.mse[1] > table.mse[3] > table.mse[2] > 0
    assert table.weights.isna().tolist() == [True, False, False, False, True] and (table.images == 3).all()
    for row, sampled in enumerate(images.values()):
        assert table.fcd[row] == sampled.square().mean().item()
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


@pytest.mark.usefixtures("small")
def test_a_comparison_has_the_rows_of_the_table(unet, scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(ptq, "CALIBRATION", len(CALIBRATION_SEEDS))
    table, _ = compare(unet, scheduler, [("minmax", 8, 4), ("mse", 8, 4)], range(5), 2, progress=False)
    jobs = quickstart_jobs(["minmax", "mse"], 8, [4], steps=2)
    for job in jobs:
        assert job.calibration == (CALIBRATION_SEEDS, 2)
    measured = module.reproduce(jobs, unet, scheduler, tmp_path / "t.csv", 5, progress=False)
    pd.testing.assert_frame_equal(table[["method", "fcd"]], measured[["method", "fcd"]], rtol=1e-3)


@pytest.mark.usefixtures("small")
def test_a_profile_that_is_given_is_what_calibration_sees(unet, scheduler, profile):
    narrow, settings = replace(profile, limit=profile.limit / 8), [("mse", 8, 5)]
    given, other = (compare(unet, scheduler, settings, range(3), 4, seen, progress=False)[0] for seen in (profile, narrow))
    assert given.mse[1] < other.mse[1]


@pytest.mark.usefixtures("small")
def test_a_setting_that_fails_leaves_the_model_restored(unet, scheduler, monkeypatch):
    monkeypatch.setattr(module, "freeze", lambda *a, **k: (_ for _ in ()).throw(TDQError("stop")))
    with pytest.raises(TDQError, match="stop"):
        compare(unet, scheduler, [("mse", 8, 4)], range(2), 2, progress=False)
    assert not hasattr(unet, "quantization")


def test_calibration_seeds_may_not_be_evaluated(unet, scheduler):
    with pytest.raises(TDQError, match="both hold 10000"):
        compare(unet, scheduler, [], seeds=range(9_980, 10_060), progress=False)
    with pytest.raises(TDQError, match="images must exceed the 64 features of the classifier; got 64"):
        compare(unet, scheduler, [], seeds=range(64), progress=False)


def test_the_table_has_every_method_at_every_number_of_bits():
    jobs = quickstart_jobs()
    assert len(set(jobs)) == len(jobs) == 12
    assert jobs[0] == QuickJob("full precision") and jobs[-1] == QuickJob("real images")
    assert [job.method for job in quickstart_jobs([])] == ["full precision", "real images"]


def test_verdict_is_against_the_best_static_interval_of_each_repeat():
    values = {"mse": (3.0, 5.0), "learned": (4.0, 3.5), "tdq": (2.5, 3.6), "table": (2.0, 3.0), "dynamic": (0.1, 0.1)}
    rows = [
        dict(method=method, weights_method="nearest", weights=8, activations=5, repeat=repeat, fcd=value)
        for method, pair in values.items()
        for repeat, value in enumerate(pair)
    ]
    (row,) = verdict(pd.DataFrame(rows)).to_dict("records")
    assert (row["repeats"], row["static"], row["static_mean"]) == (2, "learned", 3.75)
    assert row["margin"] == pytest.approx((0.5 - 0.1) / 2)
    assert row["margin_least"] == pytest.approx(-0.1) and not row["wins"]
    assert row["over_table"] == pytest.approx(3.05 / 2.5 - 1)


def test_verdict_without_tdq_is_empty():
    row = dict(method="mse", weights_method="nearest", weights=8, activations=5, repeat=0, fcd=1.0)
    assert verdict(pd.DataFrame([row])).empty
