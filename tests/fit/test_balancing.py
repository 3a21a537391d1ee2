"""Balanced models: measured, folded, frozen, trained, taken out again."""

import pytest
import torch

from tdq_utils import CalibrationSet, TDQError, calibrate, finetune, freeze, quantize, quantized_layers, record, restore, sample
from tdq_utils.fit.balancing import sampled_inputs
from tdq_utils.fit.reconstruction import adaround, refine


@pytest.fixture
def data(unet, scheduler):
    return CalibrationSet.collect(unet, scheduler, range(4), 4, progress=False)


def call(model):
    return model(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor(749)).sample


def balanced(model, data, method="mse", rule="range", **options):
    quantize(model, options.pop("weights", 8), 4, method, balance=rule, **options)
    calibrate(model, data=data, progress=False)


def test_restore_gives_the_model_back_bit_for_bit(unet, data):
    before, expected = {name: value.clone() for name, value in unet.state_dict().items()}, call(unet)
    balanced(unet, data)
    assert not torch.equal(call(unet), expected)
    restore(unet)
    assert unet.state_dict().keys() == before.keys() and torch.equal(call(unet), expected)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize("method", ["mse", "table", "tdq", "dynamic", "dynamic-sample", "dynamic-token"])
@pytest.mark.parametrize("split", [False, True])
def test_frozen_is_the_same(unet, data, method, split):
    balanced(unet, data, method, weights=4, split_skips=split)
    expected = call(unet)
    assert all(layer.balance.numel() == layer.weight.shape[1] for layer in quantized_layers(unet).values())
    freeze(unet)
    assert torch.equal(call(unet), expected)


def test_weights_in_full_precision_stay_the_same(unet, data):
    balanced(unet, data, weights=None)
    layer = next(iter(quantized_layers(unet).values()))
    assert layer.quantized_weight() is layer.weight


def test_a_balanced_layer_divides_folds_and_keeps_its_product(unet, data):
    """On a grid so fine that nothing is lost, a balanced layer is the plain layer."""
    quantize(unet, None, 8, "minmax", balance="range")
    calibrate(unet, data=data, progress=False)
    fine = call(unet)
    restore(unet)
    assert (fine - call(unet)).abs().max() < 0.05 * call(unet).abs().max()


def test_dynamic_intervals_wait_for_the_factors(unet, scheduler, data):
    quantize(unet, 8, 5, "dynamic-sample", balance=True)
    with pytest.raises(TDQError, match="must be calibrated"):
        call(unet)
    calibrate(unet, data=data, progress=False)
    call(unet)


def test_a_profile_is_refused(unet, drifting):
    quantize(unet, 8, 5, balance=True)
    with pytest.raises(TDQError, match="calibrated on calls"):
        calibrate(unet, profile=drifting, progress=False)


def test_bad_rules_are_refused_before_anything_is_changed(unet):
    with pytest.raises(TDQError, match="balance must be one of range"):
        quantize(unet, balance="best")
    with pytest.raises(TDQError, match="activations on a grid"):
        quantize(unet, 8, None, balance=True)
    assert not hasattr(unet, "quantization")


def test_recorded_calls_of_a_pipeline_serve(unet, scheduler):
    with record(unet, inputs=4) as recorded:
        sample(unet, scheduler, range(4), 4, progress=False)
    quantize(unet, 8, 5, "mse", balance="smooth")
    calibrate(unet, data=recorded.inputs, progress=False)
    assert torch.isfinite(call(unet)).all()


def test_vectors_are_those_of_the_full_precision_model(unet, data):
    quantize(unet, 2, 2, "mse", balance=True)
    names = list(quantized_layers(unet))
    vectors = sampled_inputs(unet, data, names, 2)
    for name, layer in quantized_layers(unet).items():
        assert vectors[name].shape[0] == 4 and vectors[name].shape[2] == layer.weight.shape[1]
    assert all(torch.equal(a, b) for a, b in zip(vectors.values(), sampled_inputs(unet, data, names, 2).values(), strict=True))


def test_adaround_rounds_the_folded_weights(unet, data):
    balanced(unet, data, weights=4)
    adaround(unet, data, iterations=4, progress=False)
    for layer in quantized_layers(unet).values():
        nearest = layer.folded_weight() / layer.weight_step.view(-1, *[1] * (layer.weight.dim() - 1))
        inside = (nearest > -8) & (nearest < 7)
        assert ((layer.levels - nearest).abs()[inside] <= 1.001).all()
    expected = call(unet)
    freeze(unet)
    assert torch.equal(call(unet), expected)


def test_refined_step_sizes_keep_the_factors(unet, data):
    balanced(unet, data, "tdq")
    before = [layer.balance.clone() for layer in quantized_layers(unet).values()]
    refine(unet, data, iterations=2, progress=False)
    assert all(torch.equal(a, layer.balance) for a, layer in zip(before, quantized_layers(unet).values(), strict=True))


@pytest.mark.parametrize(("rate", "moves"), [(1.0, True), (0.0, False)])
def test_training_starts_from_the_balance_and_may_move_it(unet, scheduler, data, rate, moves):
    balanced(unet, data, "learned", weights=4)
    measured = [layer.balance.clone() for layer in quantized_layers(unet).values()]
    restore(unet)
    how = dict(iterations=3, batch=4, warmup=1, rate=1e-2, balance="range", balance_rate=rate, data=data, progress=False)
    losses = finetune(unet, scheduler, torch.randn(8, 1, 8, 8), "lsq", **how)
    layers = quantized_layers(unet).values()
    same = [torch.allclose(a, layer.balance, rtol=1e-5) for a, layer in zip(measured, layers, strict=True)]
    assert len(losses) == 3 and (not any(same) if moves else all(same))
    restore(unet)


def test_a_layer_that_does_not_run_is_named(unet, data, monkeypatch):
    quantize(unet, 8, 5, "mse", balance=True)
    resnet = unet.mid_block.resnets[0]
    monkeypatch.setattr(resnet, "forward", lambda x, *others: x)
    with pytest.raises(TDQError, match=r"Every layer must run in the calls .* mid_block\.resnets\.0\.conv1 does not"):
        calibrate(unet, data=data, progress=False)
