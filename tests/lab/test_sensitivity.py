"""The error of the output: of all layers, of one, of all but one, as quantizing just those by hand gives it."""

import copy

import numpy as np
import pytest
import torch

from tdq_utils import calibrate, kept_layers, layer_sensitivity, quantize, quantized_layers, record, restore, sample
from tdq_utils.errors import TDQError
from tdq_utils.lab.sensitivity import (
    by_layer,
    class_labels,
    decibels,
    in_full_precision,
    output_errors,
    outputs,
    quantized,
    record_sampling,
    removed,
)


@pytest.fixture
def recorded(unet, scheduler):
    with record(unet, inputs=4) as found:
        sample(unet, scheduler, range(2), 4, progress=False, pad=False)
    return found


def errors_of(recorded, keep):
    """By hand: the whole model quantized, but for ``keep``."""
    model = recorded.model
    clean = outputs(model, recorded.inputs)
    quantize(model, 8, 4, "mse", keep=[*kept_layers(model), *keep])
    calibrate(model, profile=recorded.profile, progress=False)
    found = output_errors(model, recorded.inputs, clean)
    restore(model)
    return found


def test_one_layer_and_all_but_one_are_what_quantizing_them_by_hand_gives(recorded):
    model, clean = recorded.model, outputs(recorded.model, recorded.inputs)
    with quantized(model, recorded.profile, 8, 4, "mse"):
        names, seen = list(quantized_layers(model)), []
        table = by_layer(model, recorded.inputs, clean, lambda: seen.append(1)).set_index("layer")
    assert list(table.index) == names and len(seen) == len(names)
    name = names[3]
    alone, spared, whole = (errors_of(recorded, keep) for keep in ([n for n in names if n != name], [name], []))
    assert table.alone_db[name] == pytest.approx(decibels(alone.mean()))
    assert table.spared_db[name] == pytest.approx(decibels(spared.mean()))
    assert [*table.loc[name, ["removed", "removed_se"]]] == pytest.approx(removed(whole, spared))
    frame = layer_sensitivity(recorded, 8, 4, progress=False).set_index("layer")
    assert frame.equals(table)


def test_layers_in_full_precision_give_the_model_back_and_then_its_quantized_self(recorded):
    model, clean = recorded.model, outputs(recorded.model, recorded.inputs)
    with quantized(model, recorded.profile, 4, 4, "tdq"):
        before = outputs(model, recorded.inputs)
        with pytest.raises(RuntimeError, match="stop"), in_full_precision(quantized_layers(model).values()):
            assert all(map(torch.equal, outputs(model, recorded.inputs), clean))
            raise RuntimeError("stop")
        assert all(map(torch.equal, outputs(model, recorded.inputs), before))
        assert not torch.equal(before[0], clean[0])
    assert all(map(torch.equal, outputs(model, recorded.inputs), clean))


def test_an_error_leaves_the_model_as_it_was(recorded, monkeypatch):
    model, before = recorded.model, copy.deepcopy(recorded.model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), quantized(model, recorded.profile, 4, 4, "mse"):
        raise RuntimeError("stop")
    monkeypatch.setattr("tdq_utils.lab.sensitivity.calibrate", lambda *args, **how: 1 / 0)
    with pytest.raises(ZeroDivisionError), quantized(model, recorded.profile, 4, 4, "mse"):
        pass
    assert not hasattr(model, "quantization")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_method_keeps_the_same_layers(recorded):
    """Also one that calibration measures nothing for."""
    recorded.profile.carries_t = ["mid_block.resnets.0.conv1"]
    kept = []
    for method in ("mse", "dynamic"):
        with quantized(recorded.model, recorded.profile, 8, 8, method) as model:
            kept.append(dict(model.quantization.kept))
    assert kept[0] == kept[1] and "mid_block.resnets.0.conv1" in kept[0]


def test_a_share_and_its_standard_error():
    before, after = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 1.5])
    assert removed(before, after) == pytest.approx((0.5, 0.0))
    share, error = removed(before, np.array([1.0, 1.0, 1.0]))
    assert share == pytest.approx(0.5)
    assert error == pytest.approx(np.sqrt((0.5**2 + 0 + 0.5**2) * 3 / 2) / 6)
    assert np.isnan(removed(before[:1], after[:1])[1])
    assert removed(np.zeros(2), np.zeros(2)) == (0.0, 0.0)
    assert decibels(0.01) == pytest.approx(-20) and np.isnan(decibels(0.0))


def test_without_calls_the_fix_is_named(unet, scheduler):
    with record(unet) as recorded:
        sample(unet, scheduler, range(2), 2, progress=False)
    with pytest.raises(TDQError, match=r"kept none\. Record again, with record\(model, inputs=24\)"):
        layer_sensitivity(recorded)


def test_the_commands_recording_keeps_calls_that_calibration_has_not_seen(unet, scheduler):
    recorded = record_sampling(unet, scheduler, 4, 6, progress=False)
    assert len(recorded.inputs) == 4 and sorted(float(t.max()) for _, t, _ in recorded.inputs.batches()) == [249, 499, 749, 999]
    assert {len(x) for x, *_ in recorded.inputs.batches()} == {4}
    again = record_sampling(unet, scheduler, 4, 6, progress=False)
    assert np.array_equal(recorded.profile.counts, again.profile.counts)
    assert recorded.profile.counts[recorded.profile.row("conv_in"), 0].sum() == 6 * 64  # none of the four
    assert class_labels(unet) is None


def test_classes_are_sampled_in_turn_and_what_needs_more_is_refused(denoiser, scheduler):
    model, condition = denoiser
    labels = class_labels(model)
    if "class_labels" in condition:
        assert labels([0, 3, 12])["class_labels"].tolist() == [0, 3, 2]
    if "encoder_hidden_states" in condition:
        with pytest.raises(TDQError, match="UNet2DConditionModel needs more .*Record its own pipeline"):
            record_sampling(model, scheduler, 2, 2, labels, progress=False)
    else:
        assert len(record_sampling(model, scheduler, 2, 2, labels, progress=False).inputs) == 2
