import pandas as pd
import pytest
import torch

from tdq_utils.errors import TDQError
from tdq_utils.lab.tables import quickstart as experiments
from tdq_utils.lab.tables.quickstart import compare, headline, verdict


@pytest.fixture
def small_distances(monkeypatch):
    """8x8 images do not fit the classifier; a Frechet distance of pixels stands in for it."""
    pixels = lambda images, classifier=None: images.flatten(1)[:, :4].double()  # noqa: E731
    monkeypatch.setattr(experiments, "fcd", lambda images: float(pixels(images).mean() ** 2))
    monkeypatch.setattr(experiments, "_floor", lambda n: dict(method="real images", images=n, fcd=0.0))


@pytest.mark.usefixtures("small_distances")
def test_rows_and_images_pair_up(unet, scheduler):
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    settings = [("mse", 8, 4), ("mse", 8, 8)]
    table, images = compare(unet, scheduler, settings, range(3), 2, calibration_seeds=range(100, 102), progress=False)
    assert list(table.method) == ["full precision", "mse", "mse", "real images"]
    assert set(images) == {("full precision", None, None), *settings}
    assert table.mse[0] == 0
    assert table.mse[1] > table.mse[2] > 0
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


@pytest.mark.usefixtures("small_distances")
def test_a_setting_that_fails_leaves_the_model_restored(unet, scheduler, monkeypatch):
    monkeypatch.setattr(experiments, "freeze", lambda *a, **k: (_ for _ in ()).throw(TDQError("stop")))
    with pytest.raises(TDQError, match="stop"):
        compare(unet, scheduler, [("mse", 8, 4)], range(2), 2, calibration_seeds=range(100, 101), progress=False)
    assert not hasattr(unet, "quantization")


def test_calibration_seeds_may_not_be_evaluated(unet, scheduler):
    with pytest.raises(TDQError, match="both hold 3"):
        compare(unet, scheduler, [], seeds=range(4), calibration_seeds=range(3, 6))


def test_headline_rounds_to_two_digits():
    row = dict(method="tdq", weights=8, activations=5, images=256, steps=20, mse=0.012345, fcd=4.5678)
    real = dict(method="real images", weights=None, activations=None, images=256, steps=None, mse=None, fcd=2.0)
    shown = headline(pd.DataFrame([row, real]))
    assert shown.iloc[0].tolist() == ["TDQ", "W8A5", 256, "20", "0.012", "4.6"]
    assert shown.iloc[1].tolist() == ["real images", "-", 256, "-", "-", "2"]


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
