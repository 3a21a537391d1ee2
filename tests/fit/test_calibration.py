"""What each calibrator promises: nothing truncated, least error, least error at every t, a curve that follows the drift."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tdq_utils import CalibrationSet, calibrate, freeze, quantize, restore
from tdq_utils.errors import TDQError
from tdq_utils.fit import reconstruction
from tdq_utils.fit.calibration import profile_set
from tdq_utils.fit.methods import CALIBRATED
from tdq_utils.fit.quantize import quantized_layers
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.grid import SILU_MIN, fake_quantize, squared_error
from tdq_utils.method.step_sizes import LearnedStep, StaticStep, TableStep, TimeSteps


def steps_of(layer, t):
    """The step size of a layer's input at each t."""
    return torch.stack([layer.activation.step(None, TimeSteps(int(value), 1), layer.activation.grid) for value in t]).detach()


def errors(model, profile):
    """Squared quantization error of each layer's input at every t, ``"layer step"``, on the profiled activations."""
    return torch.stack([
        squared_error(*profile.values(name), steps_of(layer, profile.t), layer.activation.grid)
        for name, layer in quantized_layers(model).items()
    ])  # fmt: skip


class OneLayer(nn.Module):
    """A denoiser of one layer, which t does not change."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, sample, timestep):
        return self.layer(sample)


def one_layer(profile, method, bits=4, **options):
    """A model with one layer, calibrated on a synthetic profile: its relative error, and the model."""
    model = OneLayer().eval()
    quantize(model, None, bits, method, keep=[])
    calibrate(model, None, profile=profile, progress=False, **options)
    return errors(model, profile).sum().item(), model


def test_minmax_truncates_nothing(calibrated, profile):
    for name, layer in quantized_layers(calibrated("minmax")).items():
        row, s = profile.row(name), layer.activation.step.s
        ends = torch.tensor([profile.least[row].min(), profile.greatest[row].max()]).float()
        assert ((fake_quantize(ends, s, layer.activation.grid) - ends).abs() <= 0.501 * s).all()


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_errors_are_in_the_order_of_freedom(unet, profile, bits):
    """At every layer: the table at each of its steps, the best static value over all, the widest."""
    quantize(unet, None, bits, "minmax")
    found = {}
    for method in ("minmax", "mse", "table"):
        calibrate(unet, None, method=method, profile=profile)
        found[method] = errors(unet, profile)
    assert (found["table"] <= 1.03 * found["mse"]).all()  # the search is to a few per cent at 8 bits
    assert (found["table"].sum(1) <= 1.01 * found["mse"].sum(1)).all()
    assert (found["mse"].sum(1) <= 1.01 * found["minmax"].sum(1)).all()
    assert found["table"].sum() < 0.99 * found["mse"].sum() < 0.95 * found["minmax"].sum()


def test_tdq_follows_a_drifting_range(drifting):
    """Range four times as wide at t = 0: the generator gets nearly what a free value at each step would."""
    profile = drifting(**{"layer": torch.linspace(1, 4, 8).tolist()})
    static, learned, table = (one_layer(profile, method)[0] for method in ("mse", "learned", "table"))
    tdq, model = one_layer(profile, "tdq", iterations=150)
    assert static <= learned < 1.02 * static  # the search finds the least; LSQ's gradient settles nearby
    assert table < static / 1.1
    assert 0.99 * table <= tdq < table + 0.1 * (static - table)
    s = steps_of(model.layer, profile.t)
    assert 3 < s[-1] / s[0] < 5 and (s.diff() > 0).all()


def test_tdq_transfers_to_other_steps(drifting):
    """Fitted at every other t, s(t) beats the static value also at the t between; a table has nothing to say there."""
    profile = drifting(**{"layer": torch.linspace(1, 4, 15).tolist()})
    tables = {key: getattr(profile, key)[:, ::2] for key in ("least", "greatest", "mean", "std", "counts", "limit")}
    half = replace(profile, t=profile.t[::2], **tables)
    static, tdq = (errors(one_layer(half, method)[1], profile)[:, 1::2].sum() for method in ("mse", "tdq"))
    assert tdq < 0.97 * static  # the fast features are free between the t that were seen: some of the gain is lost
    with pytest.raises(TDQError, match="t must be one of them"):
        errors(one_layer(half, "table")[1], profile)


def test_tdq_without_drift_is_static(drifting):
    profile = drifting(**{"layer": [1.0] * 8})
    static, tdq = one_layer(profile, "mse")[0], one_layer(profile, "tdq", iterations=100)[0]
    assert tdq < 1.02 * static


def test_layers_of_any_scale_learn_alike(drifting):
    """The loss is relative: activations 1000 times as small are fitted as well."""
    ratios = []
    for scale in (1, 1e-3):
        profile = drifting(**{"layer": (scale * torch.linspace(1, 4, 4)).tolist()})
        ratios.append(one_layer(profile, "tdq", iterations=60)[0] / one_layer(profile, "mse")[0])
    assert ratios[0] == pytest.approx(ratios[1], abs=0.1) and max(ratios) < 1


@pytest.mark.parametrize(
    ("method", "kind"), [("mse", StaticStep), ("learned", LearnedStep), ("table", TableStep), ("tdq", StepGenerator)]
)
def test_grids_come_from_the_recorded_range(calibrated, method, kind):
    """Convolutions behind SiLU get the shifted grid; those that see the residual stream the symmetric one."""
    layers = quantized_layers(calibrated(method))
    assert {type(layer.activation.step) for layer in layers.values()} == {kind}
    assert not any(module.training for layer in layers.values() for module in layer.modules())
    behind_silu = {name for name, layer in layers.items() if layer.activation.grid.low == SILU_MIN}
    assert behind_silu == {name for name in layers if name.endswith((".conv1", ".conv2"))}


@pytest.mark.parametrize("method", sorted({*CALIBRATED} - {"finite-set"}))
def test_without_shifts_every_grid_is_symmetric(unet, profile, method):
    quantize(unet, None, 4, method)
    options = {"iterations": 3} if method in ("learned", "tdq") else {}
    found = {}
    for shifted in (True, False):
        calibrate(unet, None, profile=profile, shifted=shifted, progress=False, **options)
        behind_silu = torch.tensor([name.endswith((".conv1", ".conv2")) for name in quantized_layers(unet)])
        found[shifted] = errors(unet, profile).sum(1)
    assert all(layer.activation.grid.low is None for layer in quantized_layers(unet).values())
    assert (found[True] == found[False])[~behind_silu].all()
    if method == "mse":  # half of the levels lie where these inputs never are
        assert (found[True] < 0.7 * found[False])[behind_silu].all()


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_profile_stands_for_sampling(calibrated, unet, scheduler, method):
    """Whatever the model was before: the trajectory is the full-precision model's."""
    model = calibrated(method)
    visited = [999, 749, 499, 249]
    expected = {name: steps_of(layer, visited) for name, layer in quantized_layers(model).items()}
    calibrate(model, scheduler, method="minmax", seeds=range(2), steps=1, progress=False)
    options = {"iterations": 3} if method in ("learned", "tdq") else {}
    calibrate(model, scheduler, seeds=range(8), steps=4, method=method, progress=False, **options)
    for name, layer in quantized_layers(model).items():  # the size of a batch moves the last bits
        torch.testing.assert_close(steps_of(layer, visited), expected[name], rtol=0.1, atol=0)


def test_generators_depend_on_their_seed_alone(drifting):
    """And fitting them leaves the global random numbers alone."""
    profile = drifting(**{"layer": [1.0, 2.0]})
    model = one_layer(profile, "mse")[1]
    weights, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        calibrate(model, None, method="tdq", profile=profile, iterations=3, seed=seed, progress=False)
        weights.append(model.layer.activation.step.mlp[-1].weight)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(7)
        state = torch.get_rng_state()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_dynamic_methods_need_no_calibration(unet, scheduler):
    quantize(unet, method="dynamic")
    before = unet(torch.ones(1, 1, 8, 8), 5).sample
    calibrate(unet, scheduler)
    assert torch.equal(unet(torch.ones(1, 1, 8, 8), 5).sample, before)


def test_a_dynamic_model_changes_to_the_other_dynamic_method(unet):
    x, outputs = torch.randn(2, 1, 8, 8) * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1), {}
    for method in ("dynamic", "dynamic-sample"):
        quantize(unet, method=method)
        outputs[method] = unet(x, 5).sample
        restore(unet)
    quantize(unet, method="dynamic")
    for method in ("dynamic-sample", "dynamic"):
        calibrate(unet, method=method)
        assert unet.quantization.method == method and torch.equal(unet(x, 5).sample, outputs[method])
    assert not torch.equal(outputs["dynamic"], outputs["dynamic-sample"])


@pytest.mark.parametrize(
    ("prepared", "options", "message"),
    [
        (None, {}, r"must be quantized; got a full-precision one. Call quantize\(model"),
        ("tdq", {"method": "magic"}, r"method must be one of minmax, momentum, .*, tdq for this model; got 'magic'"),
        ("tdq", {"method": "dynamic"}, r"method must be one of minmax, momentum, .*, tdq for this model; got 'dynamic'"),
        ("dynamic", {"method": "mse"}, "method must be one of dynamic, dynamic-sample, dynamic-token for this model; got 'mse'"),
        ("mse", {"seeds": range(0)}, "seeds must name at least one image"),
        ("dynamic", {"shifted": False}, "shifted=False belongs to methods that measure ranges; 'dynamic' chooses a grid"),
        ("mse", {"steps": 0}, "steps must be .*from 1 to 1000; got 0"),
        ("tdq", {"iterations": 0}, "iterations must be a whole number, 1 or more; got 0"),
        ("learned", {"iterations": -1}, "iterations must be a whole number, 1 or more; got -1"),
        ("tdq", {"rate": 0.0}, "rate must be a finite number above 0; got 0.0"),
        ("tdq", {"rate": float("nan")}, "rate must be a finite number above 0; got nan"),
        ("tdq", {"follow": 2}, "follow must be a number from 0 to 1; got 2"),
        ("momentum", {"momentum": 5}, "momentum must be a number from 0 to 1; got 5"),
        ("percentile", {"percentile": 0}, "percentile must be a number above 0 and at most 100; got 0"),
        ("mse", {"scheduler": None}, "needs samples to run the model on; got none. Pass data, or scheduler"),
    ],
)
def test_bad_input(unet, scheduler, prepared, options, message):
    if prepared:
        quantize(unet, method=prepared)
    with pytest.raises(TDQError, match=message):
        calibrate(unet, **{"scheduler": scheduler, "progress": False, **options})


def test_a_model_in_training_mode_is_refused(unet, scheduler, profile):
    quantize(unet, method="mse")
    unet.mid_block.attentions.train()
    with pytest.raises(TDQError, match=r"in evaluation mode; mid_block.attentions is in training mode. Call model.eval\(\)"):
        calibrate(unet, scheduler, profile=profile)


@pytest.fixture
def data(unet, scheduler):
    return CalibrationSet.collect(unet, scheduler, range(4), 2, progress=False)


def test_seeds_data_and_a_profile_are_one_path(unet, scheduler, data):
    """The short way, the set that it makes, and the profile of that set give the same step sizes."""
    quantize(unet, 8, 4, "mse")
    found = []
    for how in (dict(scheduler=scheduler, seeds=range(4), steps=2), dict(data=data), dict(profile=profile_set(unet, data))):
        calibrate(unet, progress=False, **how)
        found.append([layer.activation.step.s for layer in quantized_layers(unet).values()])
    assert found[0] == found[1] == found[2]
    assert unet.quantization.visited == [999, 499]


def test_more_than_is_used_is_refused(unet, scheduler, data):
    quantize(unet, 4, 4, "learned")
    profile = profile_set(unet, data)
    for given, unused in [
        (dict(data=data, profile=profile), "data"), (dict(data=data, seeds=range(2)), "seeds"),
        (dict(data=data, steps=3, batch_size=4), "steps, batch_size"), (dict(profile=profile, steps=3), "steps"),
        (dict(data=data, profile=profile, seeds=range(2)), "seeds, data"),
        (dict(data=data, profile=profile, seeds=range(2), weights_method="adaround"), "seeds"),
    ]:  # fmt: skip
        with pytest.raises(TDQError, match=f"takes one input: data .*, or a profile. Leave out {unused}."):
            calibrate(unet, scheduler, progress=False, **given)


def test_a_profile_to_start_from_and_data_to_learn_on(unet, data, monkeypatch):
    monkeypatch.setattr(reconstruction.refine, "__defaults__", ("block", 2, *reconstruction.refine.__defaults__[2:]))
    quantize(unet, 8, 4, "learned")
    calibrate(unet, data=data, profile=profile_set(unet, data), reconstruct="block", iterations=2, progress=False)
    assert unet.quantization.method == "learned"


def test_a_profile_or_data_of_another_model_is_refused(unet, data):
    quantize(unet, 8, 4, "mse")
    profile = profile_set(unet, data)
    assert profile.model == data.model
    calibrate(unet, profile=profile)  # quantized, it is the same model
    unet.conv_in.bias.add_(1e-3)
    for what, given in (("profile", dict(profile=profile)), ("calibration set", dict(data=data))):
        with pytest.raises(TDQError, match=f"A {what} serves the model that made it, {data.model}; this model is "):
            calibrate(unet, **given)
    calibrate(unet, profile=replace(profile, model=""))  # of unknown origin


def test_ptq4dm_weights_t_once(unet, scheduler, data):
    """A skewed set holds more samples of the t that weigh more: to weight its histograms, too, would count that twice."""
    skewed = CalibrationSet.collect(unet, scheduler, range(6), 6, at="skewed", progress=False)
    steps = {}
    quantize(unet, 8, 3, "ptq4dm")
    for at, method in ((a, m) for a in (data, skewed) for m in ("mse", "ptq4dm")):
        calibrate(unet, method=method, data=at, progress=False)
        assert unet.quantization.method == method
        steps[at.at, method] = torch.stack([layer.activation.step.s for layer in quantized_layers(unet).values()])
    assert torch.equal(steps["skewed", "ptq4dm"], steps["skewed", "mse"])
    assert not torch.equal(steps["uniform", "ptq4dm"], steps["uniform", "mse"])


def test_profile_of_other_layers(unet, drifting):
    quantize(unet, method="mse", keep="down_blocks.*")
    with pytest.raises(TDQError, match=r"profile must hold every quantized layer; \d+ are missing, conv_in among them"):
        calibrate(unet, None, profile=drifting(other=[1.0]))


def test_an_error_on_the_way_leaves_the_model_quantized(unet, scheduler):
    quantize(unet, method="mse")
    before = list(unet.named_modules())
    unet.conv_in.bias[0] = float("nan")
    with pytest.raises(TDQError, match="Activations must be finite"):
        calibrate(unet, scheduler, seeds=range(1), steps=1, progress=False)
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in before]
    assert quantized_layers(unet) and unet._forward_pre_hooks


def test_calibrating_a_frozen_model_again(calibrated, scheduler, profile):
    model = calibrated("tdq")
    freeze(model, scheduler, steps=4)
    calibrate(model, scheduler, method="mse", profile=profile)
    assert model.quantization.method == "mse"
    assert {type(layer.activation.step) for layer in quantized_layers(model).values()} == {StaticStep}
