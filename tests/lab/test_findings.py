"""What the report refuses before work is lost, and its numbers, counted by hand."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from tdq_utils import calibrate, quantize, quantized_layers, record, restore, sample
from tdq_utils.errors import TDQError
from tdq_utils.lab.findings import Survey, cost, histogram, likeness, plain
from tdq_utils.run.storage import pack


@pytest.fixture
def recorded(unet, scheduler):
    with record(unet) as found:
        sample(unet, scheduler, range(2), 4, progress=False, pad=False)
    return found


@pytest.mark.parametrize(("options", "message"), [
    (dict(activations=9), "bits must be a whole number from 2 to 8; got 9"),
    (dict(bits=(4, 1)), "bits must be a whole number from 2 to 8; got 1"),
    (dict(weights=1), "bits must be a whole number from 2 to 8; got 1"),
    (dict(sampling=dict(shape=(1, 8, 8))), r"shape belongs to sampling; got no scheduler\. Pass scheduler="),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_measured(recorded, options, message):
    with pytest.raises(TDQError, match=message):
        Survey(recorded, **options)


def test_a_scheduler_that_visits_other_t_is_refused(recorded, scheduler):
    Survey(recorded, scheduler)
    with pytest.raises(TDQError, match=r"with 5 steps it visits 799\. Pass the scheduler and steps= of the recording"):
        Survey(recorded, scheduler, steps=5)
    with pytest.raises(TDQError, match="must visit the t that were recorded, 4 of them from 999 on"):
        Survey(recorded, EulerDiscreteScheduler())


def test_a_model_that_is_not_as_it_was_recorded_is_refused(recorded, scheduler):
    model = recorded.model
    quantize(model)
    with pytest.raises(TDQError, match=r"this one is quantized already\. Call restore\(model\) first"):
        Survey(recorded)
    restore(model)
    model.conv_in.weight.data.add_(1)
    with pytest.raises(TDQError, match="A recording serves the model that made it"):
        Survey(recorded)
    with record(model, layers=["conv_in", "mid_block.resnets.0.conv1"]) as few:
        sample(model, scheduler, range(2), 2, progress=False)
    with pytest.raises(TDQError, match=r"a recording of every layer that is quantized; .* Record without layers="):
        Survey(few)
    model.train()
    with pytest.raises(TDQError, match="evaluation mode"):
        Survey(few)


@pytest.mark.parametrize("weights", [8, 4])
def test_bytes_are_those_that_are_stored(unet, profile, weights):
    quantize(unet, weights, 6, "tdq")
    calibrate(unet, profile=profile, iterations=1, progress=False)
    rows = [row["bytes"] for row in cost(unet, profile)]
    layers = quantized_layers(unet).values()
    assert rows[0] == 4 * sum(layer.weight.numel() for layer in layers)
    assert rows[1] == sum(pack(layer.weight_levels(), weights).nbytes + layer.weight_step.nbytes for layer in layers)
    assert rows[3:5] == [4 * len(layers), 4 * len(layers) * 4]
    assert rows[5] == sum(v.nbytes for layer in layers for v in layer.activation.step.state_dict().values())
    restore(unet)
    assert rows[0] + rows[2] == sum(p.nbytes for p in unet.parameters())


def test_a_histogram_for_the_eye_has_the_shares_and_the_intervals(profile):
    layer = "mid_block.resnets.0.conv1"
    row, found = profile.row(layer), histogram(profile, layer, 4, bins=10)
    np.testing.assert_allclose(np.sum(found["share"], 1), 1, rtol=1e-5)
    assert found["edges"][0] == profile.least[row].min() and found["edges"][-1] == pytest.approx(profile.greatest[row].max())
    static, steps = profile.best_steps(layer, 4)
    assert found["static"][1] - found["static"][0] == pytest.approx(15 * float(static))
    assert found["over_t"].shape == (4, 2)
    np.testing.assert_allclose(found["over_t"][:, 1] - found["over_t"][:, 0], 15 * steps.numpy(), rtol=1e-5)


def test_likeness_is_of_pictures_as_they_are_seen():
    clean = torch.rand(3, 1, 16, 16) * 2 - 1
    off = clean.clamp(-0.8, 0.8)
    clean, off = clean.clamp(-0.8, 0.8), off + 0.1
    rows = {row["method"]: row for row in likeness({"full precision": clean, "mse": off, "tdq": clean + 0.01, "table": clean})}
    assert rows["mse"]["psnr"] == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-3)  # a range of 2, an error of 0.1
    assert 0 < rows["mse"]["ssim"] < rows["tdq"]["ssim"] < rows["table"]["ssim"] + 1e-6 and np.isinf(rows["table"]["psnr"])
    tokens = torch.randn(2, 16, 4)
    (row,) = likeness({"full precision": tokens, "mse": tokens + 1})
    assert row["psnr"] == pytest.approx(20 * np.log10(float(tokens.max() - tokens.min())), abs=1e-3)
    assert np.isnan(row["ssim"])
    assert np.isnan(likeness({"full precision": clean[..., :8], "mse": clean[..., :8]})[0]["ssim"])


def test_plain_numbers():
    tree = {1: np.float32(1 / 3), "b": [np.int64(3), True, float("nan"), np.inf], "c": np.ones((1, 2)), "d": None, "e": range(2)}
    assert plain(tree) == {"1": 0.333333, "b": [3, True, None, None], "c": [[1.0, 1.0]], "d": None, "e": [0, 1]}
