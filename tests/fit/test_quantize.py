"""Quantizers go in, run, and come out again: on three kinds of model, with every method, without side effects."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from tdq_utils import calibrate, freeze, profile_activations, quantize, restore, sample
from tdq_utils.denoiser.call import now
from tdq_utils.errors import TDQError
from tdq_utils.fit.choice import kept_layers
from tdq_utils.fit.quantize import METHODS, full_precision, quantized_layers
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.grid import Grid, fake_quantize

T = (999, 749, 499, 249)  # what the fixtures are calibrated for
every_method = pytest.mark.parametrize("method", METHODS)


def hooks_of(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def modules_and_tensors(model):
    """What restore must give back: the very modules, and copies of all tensors."""
    return list(model.named_modules()), {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model, before):
    modules, tensors = before
    now = list(model.named_modules())
    assert [name for name, _ in now] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(now, modules, strict=True))
    assert list(model.state_dict()) == list(tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert not hooks_of(model) and not hasattr(model, "quantization")


@pytest.mark.parametrize("method", ["table", "tdq", "dynamic-sample"])
def test_whole_life_on_every_kind_of_model(denoiser, scheduler, method):
    """quantize, calibrate, freeze, sample, restore; the last gives back the model that went in, bit for bit."""
    model, condition = denoiser
    before = modules_and_tensors(model)
    trajectory = {"seeds": range(3), "steps": 2, "condition": condition, "progress": False}
    clean = sample(model, scheduler, **trajectory)

    quantize(model, weights=8, activations=8, method=method)
    calibrate(model, scheduler, **trajectory, **({"iterations": 3} if method == "tdq" else {}))
    calibrated = sample(model, scheduler, **trajectory)
    freeze(model, scheduler, steps=2)
    quantized = sample(model, scheduler, **trajectory)
    restore(model)

    assert torch.equal(calibrated, quantized)
    assert 0 < (quantized - clean).abs().mean() < 0.2 * clean.abs().mean()
    assert_untouched(model, before)
    assert torch.equal(sample(model, scheduler, **trajectory), clean)


def test_kept_layers_are_the_papers(denoiser):
    """First and last layer, the time embedding and all that projects it; nothing else."""
    model, _ = denoiser
    unet = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    up_and_down = {
        f"{part}.resnets.{i}.time_emb_proj" for part, n in (("down_blocks.0", 1), ("up_blocks.0", 2)) for i in range(n)
    }
    deeper = {f"{part}.resnets.{i}.time_emb_proj" for part, n in (("down_blocks.1", 1), ("up_blocks.1", 2), ("mid_block", 2))
              for i in range(n)}  # fmt: skip
    block = "transformer_blocks.0.norm1."
    dit = {"pos_embed.proj", "proj_out_1", "proj_out_2", block + "linear", block + "emb.timestep_embedder.linear_1",
           block + "emb.timestep_embedder.linear_2"}  # fmt: skip
    expected = {UNet2DModel: unet | up_and_down | deeper, UNet2DConditionModel: unet | up_and_down}.get(type(model), dit)
    assert set(kept_layers(model)) == expected

    all_layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    quantize(model)
    assert set(model.quantization.kept) == expected
    assert set(quantized_layers(model)) == all_layers - expected


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("mid_block.*", lambda name: name.startswith("mid_block.")),
        (["conv_in", "*.attentions.*"], lambda name: name == "conv_in" or ".attentions." in name),
        ([], lambda name: False),
    ],
    ids=["pattern", "list", "nothing"],
)
def test_keep_is_the_callers_choice(unet, keep, kept):
    names = [name for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    quantize(unet, keep=keep)
    assert list(quantized_layers(unet)) == [name for name in names if not kept(name)]
    assert list(unet.quantization.kept) == [name for name in names if kept(name)]


@pytest.mark.parametrize("bits", [2, 8])
def test_weights_have_their_own_step_in_every_channel(unet, bits):
    quantize(unet, weights=bits, activations=None)
    for layer in quantized_layers(unet).values():
        assert layer.weight_step.shape == (len(layer.weight),)
        assert torch.equal(layer.quantized_weight(), fake_quantize(layer.weight, layer.weight_step, Grid(bits)))
        assert max(len(channel.unique()) for channel in layer.quantized_weight()) <= 2**bits


def test_weights_per_tensor_share_one_step(unet):
    per_channel, per_tensor = copy.deepcopy(unet), unet
    quantize(per_channel, weights=4, activations=None)
    quantize(per_tensor, weights=4, activations=None, weights_per="tensor")
    for fine, coarse in zip(quantized_layers(per_channel).values(), quantized_layers(per_tensor).values(), strict=True):
        assert coarse.weight_step.shape == (1,)
        errors = [(layer.quantized_weight() - layer.weight).square().sum() for layer in (fine, coarse)]
        assert errors[0] < errors[1]


def test_weights_or_activations_alone(unet, scheduler, profile, x):
    clean = unet(x, 999).sample
    quantize(unet, weights=4, activations=None)
    coarse = unet(x, 999).sample  # there is nothing to calibrate
    assert not torch.equal(coarse, clean)
    calibrate(unet, scheduler, profile=profile)
    freeze(unet, scheduler)
    assert torch.equal(unet(x, 999).sample, coarse)

    restore(unet)
    quantize(unet, weights=None, activations=4, method="mse")
    calibrate(unet, scheduler, profile=profile)
    assert all(layer.quantized_weight() is layer.weight for layer in quantized_layers(unet).values())
    assert not torch.equal(unet(x, 999).sample, clean)


@every_method
def test_frozen_is_exactly_the_unfrozen(calibrated, scheduler, x, method):
    """At a shared t and at mixed ones; and no generator is left, no weight is rounded again."""
    model = calibrated(method)
    calls = [*T, torch.tensor([249, 999, 249])]
    before = [model(x, t).sample for t in calls]
    freeze(model, scheduler, steps=4)
    assert all(torch.equal(model(x, t).sample, expected) for t, expected in zip(calls, before, strict=True))
    assert not any(isinstance(module, StepGenerator) for module in model.modules())
    assert all(layer.quantized_weight() is layer.rounded for layer in quantized_layers(model).values())
    freeze(model, scheduler, steps=2)  # 999 and 499 are among the four
    assert torch.equal(model(x, 499).sample, before[2])


def test_tdq_freezes_for_every_t(unet, scheduler, profile, x):
    quantize(unet, keep=[name for name in profile.layers if name != "mid_block.resnets.0.conv1"])
    calibrate(unet, scheduler, profile=profile, iterations=3, progress=False)
    before = unet(x, torch.tensor([0, 123, 998])).sample
    freeze(unet, scheduler)
    assert torch.equal(unet(x, torch.tensor([0, 123, 998])).sample, before)


@pytest.mark.parametrize("method", ["mse", "table", "tdq", "dynamic-sample"])
def test_samples_of_a_batch_may_differ_in_t(calibrated, x, method):
    """Each gets what it would get at its own t."""
    model = calibrated(method)
    mixed = model(x, torch.tensor([999, 249, 999])).sample
    shared = {t: model(x, t).sample for t in (999, 249)}
    assert torch.equal(mixed, torch.stack([shared[999][0], shared[249][1], shared[999][2]]))


@pytest.mark.parametrize("call", [
    lambda model, x: model(x, 499), lambda model, x: model(x, torch.tensor(499)), lambda model, x: model(x, timestep=499),
    lambda model, x: model(timestep=torch.tensor([499]), sample=x), lambda model, x: model(x, torch.tensor([499] * 3)),
])  # fmt: skip
def test_t_may_come_by_position_or_by_name(calibrated, x, call):
    model = calibrated("table")
    assert torch.equal(call(model, x).sample, model(x, 499).sample)
    assert not torch.equal(call(model, x).sample, model(x, 999).sample)


def test_two_models_do_not_disturb_each_other(unet, calibrated, scheduler, profile, x):
    """One is called in the middle of the other's call, at another t."""
    other = copy.deepcopy(unet)
    model = calibrated("table")
    quantize(other, method="table")
    calibrate(other, scheduler, profile=profile)
    expected, expected_other = model(x, 999).sample, other(x, 249).sample
    seen = []
    middle = model.get_submodule("mid_block.resnets.0")
    middle.register_forward_hook(lambda *_: seen.append(other(x, 249).sample))
    assert torch.equal(model(x, 999).sample, expected)
    assert len(seen) == 1 and torch.equal(seen[0], expected_other)


def test_a_deep_copy_is_independent(calibrated, scheduler, unet, x):
    model = calibrated("tdq")
    twin, expected = copy.deepcopy(model), model(x, 749).sample
    restore(model)
    clean = model(x, 749).sample
    assert torch.equal(twin(x, 749).sample, expected)
    freeze(twin, scheduler, steps=4)
    assert torch.equal(twin(x, 749).sample, expected)
    restore(twin)
    assert torch.equal(twin(x, 749).sample, clean) and not hooks_of(twin)


def test_an_exception_leaves_the_clock_reset(calibrated, x):
    model = calibrated("table")
    expected = model(x, 499).sample

    def fail(*_):
        raise RuntimeError("broken layer")

    with (
        model.get_submodule("mid_block.resnets.0").register_forward_pre_hook(fail),
        pytest.raises(RuntimeError, match="broken layer"),
    ):
        model(x, 999)
    assert now() is None
    with pytest.raises(TDQError, match="t must have 1 element"):
        model(x, torch.tensor([1, 2]))
    assert now() is None
    assert torch.equal(model(x, 499).sample, expected)


def test_full_precision_for_a_while(calibrated, x):
    model = calibrated("mse")
    expected = model(x, 499).sample
    original = copy.deepcopy(model)
    restore(original)
    clean = original(x, 499).sample
    with pytest.raises(RuntimeError, match="on the way"), full_precision(model):
        assert torch.equal(model(x, 499).sample, clean)
        raise RuntimeError("on the way")
    assert torch.equal(model(x, 499).sample, expected)


def test_nothing_is_measured_while_predicting(calibrated, x):
    """A forward pass changes no tensor of the model, whatever it is given."""
    model = calibrated("tdq")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(100 * x, 999)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_quantizers_follow_train_and_eval(unet):
    quantize(unet.train(), activations=None)
    assert all(layer.training for layer in quantized_layers(unet).values())
    restore(unet.eval())
    assert not any(module.training for module in unet.modules())


# Bad input: each error states the rule, the value received and the fix.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 1}, "bits must be a whole number from 2 to 8; got 1"),
        ({"activations": 9}, "bits must be a whole number from 2 to 8; got 9"),
        ({"activations": 4.0}, "bits must be a whole number from 2 to 8; got 4.0"),
        ({"method": "magic"}, "method must be one of minmax, momentum, .*, dynamic-token; got 'magic'"),
        ({"weights_per": "row"}, "weights_per must be 'channel' or 'tensor'; got 'row'"),
        ({"keep": ["conv_in", "no.such.*"]}, r"keep must name conv or linear layers of the model.*got 'no\.such\.\*'"),
        ({"keep": "*"}, r"must be a layer to quantize; the model has 39 and all are kept"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_arguments_leave_the_model_alone(unet, options, message):
    before = modules_and_tensors(unet)
    with pytest.raises(TDQError, match=message):
        quantize(unet, **options)
    assert_untouched(unet, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(unet, value):
    unet.mid_block.resnets[0].conv1.weight[0, 0] = value
    with pytest.raises(TDQError, match=r"Weights must be finite; mid_block.resnets.0.conv1 holds NaN.*Load the model again"):
        quantize(unet)
    assert not hasattr(unet, "quantization")


def test_quantizing_twice(unet):
    quantize(unet)
    with pytest.raises(TDQError, match=r"quantized already. Call restore\(model\) first"):
        quantize(unet)


@pytest.mark.parametrize(
    "action", [restore, lambda model: freeze(model, None), quantized_layers], ids=["restore", "freeze", "layers"]
)
def test_a_model_that_is_not_quantized(unet, action):
    with pytest.raises(TDQError, match=r"must be quantized; got a full-precision one. Call quantize\(model"):
        action(unet)


@pytest.mark.parametrize("method", ["minmax", "tdq"])
def test_before_calibration(unet, scheduler, x, method):
    quantize(unet, method=method)
    with pytest.raises(TDQError, match=r"must be calibrated before it runs; call calibrate\(model"):
        sample(unet, scheduler, range(2), 2, progress=False)
    with pytest.raises(TDQError, match=r"freeze takes a calibrated model; call calibrate\(model"):
        freeze(unet, scheduler)
    assert not unet.quantization.frozen


def test_frozen_for_other_steps(calibrated, scheduler):
    model = calibrated("tdq")
    freeze(model, scheduler, steps=4)
    with pytest.raises(
        TDQError, match=r"holds 4 time steps, 249\.\.999.*got t = 799. Sample with the number of steps that freeze"
    ):
        sample(model, scheduler, range(2), 5, progress=False)


def test_table_calibrated_for_other_steps(calibrated, scheduler):
    model = calibrated("table")
    with pytest.raises(TDQError, match=r"4 of 5 time steps are missing, t = 199 among them.*use method='tdq'"):
        freeze(model, scheduler, steps=5)
    with pytest.raises(TDQError, match="got t = 799"):
        sample(model, scheduler, range(2), 5, progress=False)


def test_freezing_for_too_many_steps(calibrated, scheduler):
    with pytest.raises(TDQError, match="steps must be a whole number from 1 to 1000; got 1001"):
        freeze(calibrated("tdq"), scheduler, steps=1001)


def test_t_of_the_wrong_length(calibrated, x):
    with pytest.raises(TDQError, match="t must have 1 element or one for each of the 3 samples; got 2"):
        calibrated("mse")(x, torch.tensor([999, 499]))


def test_profiling_a_quantized_model_sees_its_inputs(calibrated, scheduler, profile):
    """The quantized model's own trajectory, before its quantizers: near the full-precision one at 8 bits."""
    model = calibrated("mse", activations=8)
    own = profile_activations(model, scheduler, range(8), 4, progress=False)
    assert own.layers == profile.layers
    first = own.layers.index("conv_in"), 0
    assert own.least[first] == profile.least[first]
    assert abs(own.std / profile.std - 1).max() < 0.1


def test_a_table_answers_for_other_steps_by_its_nearest_t_on_request(calibrated, scheduler):
    model = calibrated("table")  # t = 999, 749, 499, 249
    before = {name: layer.activation.step.s.flip(0) for name, layer in quantized_layers(model).items()}
    with pytest.raises(TDQError, match="pass nearest=True"):
        freeze(model, scheduler, steps=5)
    freeze(model, scheduler, steps=5, nearest=True)  # t = 999, 799, 599, 399, 199
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.activation.step.s.flip(0), before[name][[0, 1, 2, 2, 3]])
