"""The layers that carry t: found in the model's computations, rounded, reconstructed together, looked up; kept and taken out."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tdq_utils import (
    cache_temporal,
    calibrate,
    freeze,
    load_quantized,
    quantize,
    quantize_temporal,
    quantized_layers,
    restore,
    sample,
    save_quantized,
    temporal_errors,
)
from tdq_utils.errors import TDQError
from tdq_utils.fit.choice import kept_layers
from tdq_utils.fit.layers import QuantizedLinear
from tdq_utils.fit.quantize import activation_quantizers, full_precision
from tdq_utils.fit.reconstruction import adaround
from tdq_utils.fit.temporal_features import Temporal
from tdq_utils.run.integer import INT8_FLAGS, IntegerRunner, cpu_flags
from tdq_utils.run.runtime import Runner

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from denoisers import ZOO

FEW = dict(iterations=150, progress=False)
HOW = dict(seeds=range(2), steps=4, progress=False)
UNTRACED = "Lumina 2"  # reads the lengths of its texts while it runs


@pytest.fixture
def ready(calibrated, scheduler):
    """``ready(how)``: a calibrated model whose layers that carry t are quantized, too."""

    def make(how="nearest", weights=4, method="table", **options):
        model = calibrated(method)
        quantize_temporal(model, scheduler, 4, weights, how, **FEW, **options)
        return model

    return make


def kept_by_name(model):
    with full_precision(model):
        return {name for name, reason in kept_layers(model).items() if "carries t" in reason}


@pytest.mark.parametrize("family", sorted(set(ZOO) - {UNTRACED}))
def test_what_carries_t_is_found_in_other_peoples_models(family):
    """By the computations, not by names; and what t does not reach is none of it."""
    denoiser = ZOO[family]
    model, call = denoiser.build(), denoiser.call(denoiser.batch)
    first = call.pop(next(iter(call)))
    quantize(model, 8, None)
    found = Temporal(model, data=Once((first, torch.tensor(denoiser.times[: denoiser.batch]), call)))
    named = [name for name in denoiser.carries_t if not name.startswith("add_embedding")]  # SDXL's texts
    assert set(named) <= set(found.layers)
    assert set(found.blocks) <= set(found.layers) and set(found.alone) <= set(found.layers)
    assert any("embed" in name or name.startswith("t") for name in found.alone) and len(found.blocks) < len(found.layers)
    with torch.no_grad():  # and the graph says what the model does
        seen, handles = {}, []
        with full_precision(model):
            for name in found.layers:
                see = lambda layer, args, out, name=name: seen.update({name: out})  # noqa: E731
                handles.append(model.get_submodule(name).register_forward_hook(see))
            model(**{next(iter(denoiser.call(1))): first, denoiser.time: torch.tensor(denoiser.times[: denoiser.batch])}, **call)
            for handle in handles:
                handle.remove()
        for name, value in found.outputs().items():
            torch.testing.assert_close(value, seen[name], atol=1e-5, rtol=1e-5)


class Once:
    """Stands for a recording of one call."""

    def __init__(self, call):
        self.call = call

    def batches(self, batch_size, device):
        yield self.call


def test_nothing_of_the_sample_is_computed(unet, scheduler):
    temporal = Temporal(unet, scheduler, 4)
    assert temporal.t == [999, 749, 499, 249]
    assert temporal.layers == temporal.alone and set(temporal.layers) == kept_by_name(unet)
    assert temporal.blocks == [name for name in temporal.layers if name.endswith("time_emb_proj")]
    operations = {node.target.__name__ for node in temporal.calls[0][0]._graph.graph.nodes if node.op == "call_function"}
    assert not any("conv" in name or "norm" in name for name in operations)


def test_conditions_that_features_depend_on(denoiser, scheduler):
    """Of a DiT, the block's features depend on the class, too; every class is met at every t."""
    model, condition = denoiser
    temporal = Temporal(model, scheduler, 3, condition)
    assert len(temporal.rows) == (9 if condition else 3)
    if "class_labels" in condition:
        assert temporal.alone == [name for name in temporal.layers if "timestep_embedder" in name]
        one, other = temporal.outputs()["transformer_blocks.0.norm1.linear"][:2]
        assert not torch.equal(one, other)
    elif condition:
        assert temporal.alone == temporal.layers


@pytest.mark.parametrize("bits", [3, 4])
def test_reconstructed_is_nearer_than_the_nearest(unet, scheduler, bits):
    quantize(unet, 8, 8)
    errors = {}
    for how in ("nearest", "reconstructed"):
        quantize_temporal(unet, scheduler, 4, bits, how, **FEW)
        errors[how] = temporal_errors(unet, scheduler, 4)
    assert errors["nearest"].shape == (8, 4) and list(errors["nearest"].columns) == [999, 749, 499, 249]
    assert (errors["nearest"] > 0).all(axis=None)
    assert errors["reconstructed"].sum(axis=None) < 0.75 * errors["nearest"].sum(axis=None)
    quantize_temporal(unet, how="kept")
    assert (temporal_errors(unet, scheduler, 4) == 0).all(axis=None)


def test_levels_are_those_of_the_bits(ready, unet):
    model = ready("reconstructed", 3)
    for name in kept_by_name(unet):
        layer = quantized_layers(model)[name]
        assert type(layer) is QuantizedLinear and layer.activation is None
        assert layer.weight_levels().abs().max() <= 4 and layer.levels is not None
        scaled = (layer.weight / layer.spread_weight_step()).clamp(-4, 3)
        assert (layer.weight_levels() - scaled).abs().max() < 1.01  # up or down


def test_the_model_uses_them(calibrated, scheduler, x):
    model = calibrated("mse")
    before = model(x, 999).sample
    quantize_temporal(model, scheduler, 4, 3, "nearest")
    coarse = model(x, 999).sample
    assert not torch.equal(before, coarse)
    freeze(model, scheduler, 4)
    assert torch.equal(model(x, 999).sample, coarse)
    quantize_temporal(model, how="kept")
    assert torch.equal(model(x, 999).sample, before)
    assert set(model.quantization.kept) == set(kept_layers(model))


@pytest.mark.parametrize("how", ["nearest", "reconstructed", "cached", "both"])
def test_comes_back(calibrated, scheduler, comes_back, how):
    """Frozen, from disk, and restored: bit for bit."""
    model = calibrated("table")
    if how != "cached":
        quantize_temporal(model, scheduler, 4, 4, how if how != "both" else "nearest", **FEW)
    if how in ("cached", "both"):
        cache_temporal(model, scheduler, 4)
    comes_back()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])  # other bits than those of the model's other weights
def test_saved_with_the_model(ready, scheduler, tmp_path, packed, bits):
    model = ready("reconstructed", bits)
    cache_temporal(model, scheduler, 4, choose="better")
    freeze(model, scheduler, 4)
    save_quantized(model, tmp_path, packed=packed)
    loaded = load_quantized(tmp_path)
    assert torch.equal(sample(loaded, scheduler, **HOW), sample(model, scheduler, **HOW))
    assert loaded.quantization.temporal == {name: tuple(how) for name, how in model.quantization.temporal.items()}
    assert loaded.quantization.names == model.quantization.names and loaded.quantization.kept == model.quantization.kept


@pytest.mark.parametrize("cached", [False, True])
def test_hosted_by_diffusers(ready, scheduler, tmp_path, x, cached):
    model = ready("reconstructed")
    if cached:
        cache_temporal(model, scheduler, 4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 749).sample, model(x, 749).sample)
    quantize_temporal(loaded, how="kept")
    restore(loaded)
    restore(model)
    assert torch.equal(loaded(x, 749).sample, model(x, 749).sample)


KINDS = [Runner, pytest.param(IntegerRunner, marks=pytest.mark.skipif(not INT8_FLAGS & cpu_flags(), reason="no 8-bit products"))]


@pytest.mark.parametrize("method", ["table", "mse"])
@pytest.mark.parametrize("cached", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_run(ready, unet, scheduler, kind, cached, method):
    model = ready("reconstructed", method=method)
    if cached:
        cache_temporal(model, scheduler, 4, cached)
    freeze(model, scheduler, 4)
    runner = kind(model, compiled=False) if method == "table" or cached else kind(model, scheduler, 4, compiled=False)
    expected, found = (sample(each, scheduler, **HOW) for each in (model, runner))
    assert torch.equal(found, expected) if kind is Runner else (found - expected).abs().mean() < 0.002
    other = kind(model, scheduler, 4, compiled=False)
    with torch.no_grad():
        other.features.zero_()
    other.load(model)
    assert torch.equal(sample(other, scheduler, **HOW), found)


def test_exported(ready, scheduler, tmp_path):
    from tdq_utils.run.onnx import OnnxModel, export_onnx

    model = ready("nearest", method="table", weights=7)
    layers = [name for name in quantized_layers(model) if name not in model.quantization.temporal]
    x = torch.randn(2, 1, 8, 8)
    for cached in (False, True):
        if cached:
            cache_temporal(model, scheduler, 4, 4)
        export_onnx(model, scheduler, 4, tmp_path / "model.onnx")
        # Every rounding may tip: near, and nearer to this t than to another.
        found = OnnxModel(tmp_path / "model.onnx")(x, 749).sample
        assert (found - model(x, 749).sample).abs().mean() < 0.02 < (found - model(x, 249).sample).abs().mean() * 10
    assert layers


@pytest.mark.parametrize("bits", [8, 4, None])
def test_a_cache_holds_the_full_precision_features(calibrated, scheduler, x, bits):
    """Rounded to their bits; the layers do not run."""
    model = calibrated("mse")
    before = model(x, torch.tensor([999, 249, 499])).sample
    names = cache_temporal(model, scheduler, 4, bits)
    assert set(names) == kept_by_name(model)
    for name in names:
        with torch.no_grad():
            quantized_layers(model)[name].weight.fill_(float("nan"))  # so it would be seen
    found = model(x, torch.tensor([999, 249, 499])).sample
    if bits is None:
        torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()
    table = quantized_layers(model)[names[-1]].cached
    assert table.q.dtype is (torch.float32 if bits is None else torch.int8)
    assert bits is None or table.q.int().abs().max() <= 2 ** (bits - 1)
    mixed = model(x, torch.tensor([999, 249, 499])).sample
    assert torch.equal(mixed[1], model(x, 249).sample[1])


def test_another_t_is_refused_by_a_cache(calibrated, scheduler, x):
    model = calibrated("mse")
    cache_temporal(model, scheduler, 4)
    with pytest.raises(TDQError, match="This table holds 4 time steps.*got t = 600"):
        model(x, 600)
    with pytest.raises(TDQError, match="This table holds 4 time steps"):
        sample(model, scheduler, **HOW | dict(steps=5))
    freeze(model, scheduler, 4)
    with pytest.raises(TDQError, match="steps are missing"):
        Runner(model, scheduler, 5, compiled=False)


def test_a_block_is_looked_up_or_reconstructed_by_its_error(ready, scheduler):
    model = ready("reconstructed", 4)
    own = temporal_errors(model, scheduler, 4).sum(axis=1)
    assert cache_temporal(model, scheduler, 4, 8, "all") and (temporal_errors(model, scheduler, 4).sum(axis=1) < own).all()
    quantize_temporal(model, scheduler, 4, 8, "reconstructed", **FEW)
    fine = temporal_errors(model, scheduler, 4).sum(axis=1)
    assert cache_temporal(model, scheduler, 4, 2, "better") == []  # 8 bits of weights against 2 of features
    assert temporal_errors(model, scheduler, 4).sum(axis=1).equals(fine)
    everything = cache_temporal(model, scheduler, 4, None, "better")
    assert (temporal_errors(model, scheduler, 4) < 1e-10).all(axis=None) and set(everything) == kept_by_name(model)


def test_calibration_goes_on_beside_them(ready, scheduler, profile):
    model = ready("reconstructed")
    temporal = dict(model.quantization.temporal)
    levels = {name: quantized_layers(model)[name].levels.clone() for name in temporal}
    calibrate(model, scheduler, range(2), 4, progress=False)
    adaround(model, collected(model, scheduler), iterations=2, progress=False)
    assert model.quantization.temporal == temporal and not set(activation_quantizers(model)) & set(temporal)
    assert all(torch.equal(quantized_layers(model)[name].levels, levels[name]) for name in temporal)


def collected(model, scheduler):
    from tdq_utils import CalibrationSet

    return CalibrationSet.collect(model, scheduler, range(2), 4, progress=False)


def test_dynamic_intervals_have_none_for_them(unet, scheduler, x):
    quantize(unet, 8, 8, "dynamic")
    quantize_temporal(unet, scheduler, 4, 4, "nearest")
    calibrate(unet, method="dynamic-sample")
    assert torch.isfinite(unet(x, 999).sample).all()


@pytest.mark.parametrize(("given", "message"), [
    (dict(how="learned"), "how must be one of kept, nearest, reconstructed; got 'learned'"),
    (dict(weights=9), "bits must be a whole number from 2 to 8; got 9"), (dict(iterations=0), "iterations must be"),
    (dict(rate=0), "rate must be"), (dict(penalty=-1), "penalty must be"), (dict(steps=0), "steps must be"),
])  # fmt: skip
def test_refused_before_anything_is_changed(calibrated, scheduler, given, message):
    model = calibrated("mse")
    kept = dict(model.quantization.kept)
    with pytest.raises(TDQError, match=message):
        quantize_temporal(model, scheduler, **dict(steps=4) | given)
    assert model.quantization.kept == kept and not model.quantization.temporal


def test_what_cannot_be(unet, scheduler):
    with pytest.raises(TDQError, match="must be quantized"):
        quantize_temporal(unet, scheduler, 4)
    quantize(unet)
    with pytest.raises(TDQError, match="need the time steps to carry; got none"):
        quantize_temporal(unet)
    with pytest.raises(TDQError, match="choose must be 'all' or 'better'; got 'some'"):
        cache_temporal(unet, scheduler, 4, choose="some")
    with pytest.raises(TDQError, match="bits must be a whole number from 2 to 8; got 16"):
        cache_temporal(unet, scheduler, 4, bits=16)


def test_a_model_that_cannot_be_traced_or_has_none(scheduler):
    class Reads(nn.Module):
        config = type("", (), dict(in_channels=1, sample_size=4))

        def __init__(self, reads):
            super().__init__()
            self.layer, self.reads = nn.Linear(4, 4), reads

        def forward(self, sample, timestep):
            return self.layer(sample + (float(timestep[0]) if self.reads else 0))

    for reads, message in ((True, "must be traced to find what carries t; Reads cannot be"), (False, "Reads has none")):
        model = Reads(reads).eval()
        quantize(model, 8, None, keep=[])
        with pytest.raises(TDQError, match=message):
            quantize_temporal(model, scheduler, 4)
