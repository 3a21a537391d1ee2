"""What other libraries do to a model: hooks on layers, shared and tied layers, adapters, fused projections, threads."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading
from torch import nn

from tdq_utils import calibrate, freeze, full_precision, quantize, quantized_layers, record, restore, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import QuantizedLayer

HOW = {"seeds": range(3), "steps": 4, "progress": False}


def hook_every_layer(model):
    for layer in model.modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            add_hook_to_module(layer, ModelHook())


GUESTS = {
    "accelerate's hooks": hook_every_layer,
    "accelerate's hooks, taken off again": lambda model: (hook_every_layer(model), remove_hook_from_submodules(model)),
    "dispatched": lambda model: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "sequential offload": lambda model: cpu_offload(model, "cpu"),
    "layerwise casting": lambda model: model.enable_layerwise_casting(torch.float32, torch.float32),
    "group offload of leaves": lambda model: apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("guest", GUESTS.values(), ids=GUESTS)
@pytest.mark.parametrize("first", [True, False], ids=["hooks first", "quantizers first"])
def test_layers_under_hooks_are_quantized_all_the_same(unet, scheduler, profile, guest, first):
    plain = copy.deepcopy(unet)
    clean = sample(plain, scheduler, **HOW)
    quantize(plain, 2, 2, "table")
    calibrate(plain, scheduler, profile=profile)
    expected = sample(plain, scheduler, **HOW)
    assert not torch.equal(expected, clean)

    if first:
        guest(unet)
    modules = list(unet.named_modules())
    quantize(unet, 2, 2, "table")
    calibrate(unet, scheduler, profile=profile)
    if not first:
        guest(unet)
    assert torch.equal(sample(unet, scheduler, **HOW), expected)
    with full_precision(unet):
        assert torch.equal(sample(unet, scheduler, **HOW), clean)
    freeze(unet, scheduler, 4)
    assert torch.equal(sample(unet, scheduler, **HOW), expected)
    restore(unet)
    assert torch.equal(sample(unet, scheduler, **HOW), clean)
    assert all(a is b for (_, a), (_, b) in zip(unet.named_modules(), modules, strict=True))


def test_storage_in_eight_bits_leaves_step_sizes_in_float32(unet, scheduler, profile):
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    quantize(unet, 8, 5, "table")
    calibrate(unet, profile=replace(profile, model=""))
    sample(unet, scheduler, **HOW)
    for layer in quantized_layers(unet).values():
        assert layer.weight_step.dtype == layer.activation.step.s.dtype == torch.float32


def test_a_forward_on_the_instance_that_hides_the_quantizer_is_refused(unet):
    layer = unet.mid_block.resnets[0].conv1
    layer.forward = lambda x: nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    with pytest.raises(TDQError, match=r"mid_block.resnets.0.conv1 has another one on the instance.*keep="):
        quantize(unet)
    assert not hasattr(unet, "quantization")


class Denoiser(nn.Module):
    """Layers of every awkward kind."""

    def __init__(self):
        super().__init__()

        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        self.first = nn.Linear(8, 8)
        self.second = self.first  # one module, two names
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.scaled = Scaled(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.old_normed = nn.utils.weight_norm(nn.Linear(8, 8))
        self.up = nn.ConvTranspose1d(8, 8, 1)

    def forward(self, sample, timestep):
        x = self.scaled(self.tied(self.second(self.first(sample))))
        return self.up(self.old_normed(self.normed(x))[..., None])[..., 0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_no_layer_is_skipped_in_silence():
    model, x = Denoiser().eval().requires_grad_(False), torch.randn(4, 8)
    clean = model(x, 0)
    quantize(model, weights=2, activations=None, keep=[])
    assert isinstance(model.second, QuantizedLayer) and isinstance(model.tied, QuantizedLayer)
    kept = model.quantization.kept
    assert set(kept) == {"scaled", "normed", "old_normed", "up"}
    assert "Scaled may compute otherwise" in kept["scaled"] and "ConvTranspose1d may compute" in kept["up"]
    assert "weight is computed" in kept["old_normed"]
    assert not torch.equal(model(x, 0), clean)
    restore(model)
    assert torch.equal(model(x, 0), clean)


class Adapter(nn.Module):
    """As an adapter library wraps a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_a = layer, nn.Linear(layer.in_features, 2)

    def forward(self, x):
        return self.base_layer(x)


def test_an_adapter_must_be_fused_first(unet):
    attention = unet.down_blocks[1].attentions[0]
    attention.to_q = Adapter(attention.to_q)
    with pytest.raises(TDQError, match=r"Adapters must be fused before quantize.*to_q.base_layer.*fuse_lora"):
        quantize(unet)


def test_an_adapter_that_comes_later_is_neither_run_nor_thrown_away(calibrated, x):
    model = calibrated("mse")
    attention = model.down_blocks[1].attentions[0]
    layer = attention.to_q
    attention.to_q = Adapter(layer)
    with pytest.raises(TDQError, match="must keep its layers"):
        model(x, 999)
    with pytest.raises(TDQError, match=r"to_q must be the layer that was quantized; it is a Adapter now.*unload"):
        restore(model)
    assert isinstance(attention.to_q, Adapter)
    attention.to_q = layer
    restore(model)


def test_projections_fused_later_are_refused_and_before_are_quantized(text_unet):
    model, x, text = text_unet, torch.randn(2, 2, 8, 8), torch.randn(2, 5, 12)
    quantize(model, 2, None)
    model.fuse_qkv_projections()
    with pytest.raises(TDQError, match=r"must keep its layers.*restore\(model\), then pipe.fuse_qkv_projections"):
        model(x, 999, text)
    restore(model)
    clean = model(x, 999, text).sample
    quantize(model, 2, None)
    assert any(name.endswith("to_qkv") for name in quantized_layers(model))
    assert not torch.equal(model(x, 999, text).sample, clean)


def test_one_model_in_two_threads_at_different_t(calibrated, x):
    model = calibrated("table")
    expected = {t: model(x, t).sample for t in (999, 749, 499, 249)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda t: (t, model(x, t).sample), [999, 749, 499, 249] * 14))
    assert all(torch.equal(out, expected[t]) for t, out in found)


@pytest.mark.parametrize("call", [
    lambda model, x: model.forward(x, 999),
    lambda model, x: model.mid_block.resnets[0].conv1(torch.randn(1, 16, 4, 4)),
])  # fmt: skip
def test_outside_of_a_call_t_is_not_known(calibrated, x, call):
    with pytest.raises(TDQError, match="must know the call that it is in; got none. Call the model itself"):
        call(calibrated("table"), x)


def test_gradient_checkpointing_is_refused_with_the_way_out(calibrated, x):
    model = calibrated("table")
    model.enable_gradient_checkpointing()
    model.train().requires_grad_(True)
    with pytest.raises(TDQError, match="gradient checkpointing off"):
        model(x, 999).sample.sum().backward()


def test_full_precision_may_be_nested_and_left_by_restore(calibrated, x):
    model = calibrated("mse")
    quantized = model(x, 999).sample
    with full_precision(model), full_precision(model):
        clean = model(x, 999).sample
    assert torch.equal(model(x, 999).sample, quantized)
    with full_precision(model), full_precision(model):
        restore(model)
    assert torch.equal(model(x, 999).sample, clean)
    assert not model._forward_hooks and not model._forward_pre_hooks and not hasattr(model, "quantization")
    with full_precision(model):
        assert torch.equal(model(x, 999).sample, clean)


def test_restore_gives_back_flags_and_gradients(unet, scheduler, profile, x):
    first, second, *_ = unet.parameters()
    first.requires_grad_(True)
    unet(x, 999).sample.sum().backward()
    gradient = first.grad
    quantize(unet)
    calibrate(unet, scheduler, profile=profile, iterations=3, progress=False)
    unet.requires_grad_(True)
    unet(x, 999).sample.sum().backward()
    assert second.grad is not None
    restore(unet)
    assert [parameter.requires_grad for parameter in unet.parameters()].count(True) == 1
    assert first.grad is gradient and second.grad is None


def test_sampling_a_frozen_model_waits_for_no_number_in_its_layers(unet, scheduler, profile):
    """On a GPU each would be a halt: as many reads of single numbers as the model in full precision makes."""

    def reads():
        with torch.profiler.profile() as seen:
            sample(unet, scheduler, **HOW)
        return sum(event.count for event in seen.key_averages() if event.key == "aten::_local_scalar_dense")

    plain = reads()
    for method in ("tdq", "mse", "dynamic-sample"):
        quantize(unet, 8, 5, method)
        calibrate(unet, scheduler, profile=profile, progress=False, **({"iterations": 3} if method == "tdq" else {}))
        freeze(unet, scheduler, 4)
        assert reads() == plain
        restore(unet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(unet, scheduler, profile, x, dtype):
    unet.to(dtype)
    x = x.to(dtype)
    quantize(unet, 8, 8, "tdq")
    calibrate(unet, profile=replace(profile, model=""), iterations=3, progress=False)
    out = unet(x, 999).sample
    freeze(unet, scheduler, 4)
    assert out.dtype == dtype and torch.equal(unet(x, 999).sample, out)
    restore(unet)
    clean = unet(x, 999).sample
    assert 0 < (out - clean).abs().mean() < 0.3 * clean.abs().mean()


@pytest.mark.parametrize("guest", GUESTS.values(), ids=GUESTS)
def test_a_model_under_hooks_is_recorded_all_the_same(unet, scheduler, guest):
    with record(unet) as alone:
        clean = sample(unet, scheduler, **HOW)
    guest(unet)
    with record(unet) as recorded:
        assert torch.equal(sample(unet, scheduler, **HOW), clean)
    assert recorded.t == alone.t and (recorded.profile.counts == alone.profile.counts).all()
    quantize(unet, 8, 5, "table")
    calibrate(unet, profile=recorded.profile, progress=False)
    assert not torch.equal(sample(unet, scheduler, **HOW), clean)


def outputs(model, x):
    with torch.no_grad():
        return torch.stack([model(x, t).sample for t in (999, 749, 499, 249)])


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "quantized first"])
def test_a_compiled_model_follows_t(calibrated, x, first):
    """No interval of a t that was seen while compiling stays in the graph, and no graph of before the quantizers is run."""
    model = calibrated("table")
    expected = outputs(model, x)
    with full_precision(model):
        clean = outputs(model, x)
        if first:
            model.compile(backend="eager")
            assert torch.equal(outputs(model, x), clean)
    if not first:
        model.compile(backend="eager")
    assert torch.equal(outputs(model, x), expected) and not torch.equal(expected, clean)
    freeze(model)
    assert torch.equal(outputs(model, x), expected)
    restore(model)
    assert torch.equal(outputs(model, x), clean)


def test_the_wrapper_of_torch_compile_is_refused_with_the_way_out(unet):
    for refused in (lambda: quantize(torch.compile(unet)), lambda: record(torch.compile(unet)).__enter__()):
        with pytest.raises(TDQError, match=r"got an OptimizedModule. Pass what it wraps, model\._orig_mod"):
            refused()


def test_two_models_that_share_a_trajectory_are_recorded_each_at_its_t(unet):
    """As in Wan 2.2: one at high noise, one at low."""
    high, low, x = unet, copy.deepcopy(unet), torch.randn(2, 1, 8, 8)
    with record(high) as early, record(low) as late, torch.no_grad():
        for t in (999, 749, 499, 249):
            (high if t > 500 else low)(x, t)
    assert (early.t, late.t) == ([999, 749], [499, 249])
    for model, recorded in ((high, early), (low, late)):
        quantize(model, 8, 5, "table")
        calibrate(model, profile=recorded.profile, progress=False)
        freeze(model)
        with pytest.raises(TDQError, match="t must be one of them"):
            model(x, 10)
    assert high(x, 999).sample.isfinite().all() and low(x, 249).sample.isfinite().all()
