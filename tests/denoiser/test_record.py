"""Any run of a model, recorded: time steps as they came, the calls kept, memory bounded, nothing changed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tdq_utils import calibrate, freeze, quantize, quantized_layers, record, restore, sample
from tdq_utils.denoiser import record as recording_file
from tdq_utils.denoiser import recording
from tdq_utils.denoiser.call import prediction, read_call
from tdq_utils.denoiser.recording import Histogram
from tdq_utils.errors import TDQError
from tdq_utils.method.generator import StepGenerator


def run(model, times=(999, 500, 1), n=2):
    """A pipeline of one's own: the model's outputs at each t."""
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.stack([prediction(model(x, t)) for t in times])


def test_the_whole_life_in_a_run_of_ones_own(unet):
    before = copy.deepcopy(unet.state_dict())
    clean = run(unet)
    with record(unet) as recorded:
        run(unet)
    assert recorded.t == recorded.profile.t.tolist() == [999, 500, 1]
    quantize(unet, 8, 8, "tdq")
    calibrate(unet, profile=recorded.profile, iterations=2, progress=False)
    quantized = run(unet)
    freeze(unet)
    assert torch.equal(run(unet), quantized) and not torch.equal(quantized, clean)
    restore(unet)
    assert torch.equal(run(unet), clean) and all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_a_recording_is_the_profile_of_the_same_run(unet, scheduler, profile):
    with record(unet) as recorded:
        sample(unet, scheduler, range(8), 4, progress=False, pad=False)
    assert recorded.profile.layers == profile.layers and recorded.profile.model == profile.model
    np.testing.assert_array_equal(recorded.profile.counts, profile.counts)
    assert not unet._forward_pre_hooks and not unet.conv_in._forward_pre_hooks


@pytest.mark.parametrize("times", [(1.0, 0.5, 0.02), (0.0, 0.5, 0.98), (1.6, 0.2, -1.5)], ids=["flow", "turned", "log sigma"])
def test_an_interval_follows_a_time_in_any_unit(unet, times):
    """The generator sees 0..1000: on the raw number, which hardly moves, it would be a constant."""
    with record(unet) as recorded:
        run(unet, times)
    assert recorded.t == pytest.approx(list(times)) and recorded.profile.t.tolist() == recorded.t
    quantize(unet, 8, 4, "tdq")
    calibrate(unet, profile=recorded.profile, iterations=1, progress=False)
    steps = [layer.activation.step for layer in quantized_layers(unet).values()]
    assert all(isinstance(step, StepGenerator) for step in steps)
    seen = [(torch.tensor(times, dtype=torch.float64) - step.origin) * step.unit for step in steps]
    assert all(s.min() >= 0 and s.max() <= 1000.0001 and s.max() - s.min() > 900 for s in seen)
    assert all(s[0] == s.max() for s in seen)  # noise at the upper end
    run(unet, times)


def test_calls_are_kept_as_they_were(text_unet):
    text, x = torch.randn(2, 5, text_unet.config.cross_attention_dim), torch.randn(2, 2, 8, 8)
    with record(text_unet, inputs=2) as recorded:
        for t in (900, 500, 100):
            text_unet(x + t, t, encoder_hidden_states=text)
    calls = list(recorded.inputs.batches())
    assert len(recorded.inputs) == 2 and recorded.inputs.model == recorded.profile.model
    for kept, t, others in calls:
        assert torch.equal(kept, x + t) and torch.equal(others["encoder_hidden_states"], text)
        text_unet(kept, t, **others)
    drawn = recorded.inputs.draw(1, torch.Generator().manual_seed(0))
    assert drawn[1] in [t for _, t, _ in calls]


def test_which_calls_are_kept_is_a_fair_choice(unet):
    kept = np.zeros(8)
    for seed in range(200):
        calls = recording_file.Calls(2)
        calls._generator.manual_seed(seed)
        for t in range(8):
            calls.add(torch.zeros(1), t, {})
        kept[[t for _, t, _ in calls.batches()]] += 1
    assert kept.sum() == 400 and kept.min() > 25 and kept.max() < 75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_past_the_bound_are_mapped_from_files(monkeypatch, dtype):
    monkeypatch.setattr(recording_file, "IN_MEMORY", 100)
    calls, x = recording_file.Calls(3), [torch.randn(4, 5).to(dtype) for _ in range(3)]
    for value in x:
        calls.add(value, 1, {"tree": {"list": [value * 2, "text"]}})
    assert calls._files and all(torch.equal(a, b) for (a, _, _), b in zip(calls.batches(), x, strict=True))
    assert torch.equal(list(calls.batches())[2][2]["tree"]["list"][0], x[2] * 2)


@pytest.mark.parametrize("how", [dict(reconstruct="block"), dict(reconstruct="noise"), dict(weights_method="adaround")], ids=str)
def test_recorded_calls_are_a_calibration_set(unet, how, monkeypatch):
    with record(unet, inputs=3) as recorded:
        clean = run(unet)
    quantize(unet, 4, 8, "learned")
    calibrate(unet, profile=recorded.profile, data=recorded.inputs, iterations=2, progress=False, **how)
    assert torch.isfinite(run(unet)).all() and not torch.equal(run(unet), clean)


def test_memory_of_histograms_is_bounded(unet, monkeypatch):
    """Past the bound neighbouring bins are joined: the counts are those of wider bins."""
    with record(unet) as recorded:
        run(unet)
    fine = recorded.profile
    monkeypatch.setattr(recording, "MEMORY", fine.limit.size * 4096 * 4 // 3)
    with record(unet) as recorded:
        run(unet)
    coarse = recorded.profile
    assert coarse.bins == 1024 and (coarse.limit == fine.limit).all()
    np.testing.assert_array_equal(coarse.counts, fine.counts.reshape(*fine.limit.shape, 1024, 4).sum(-1))
    for merged, exact in zip(coarse.best_steps("conv_in", 4), fine.best_steps("conv_in", 4), strict=True):
        torch.testing.assert_close(merged, exact, rtol=0.02, atol=0)


def test_counts_do_not_overflow():
    histogram = Histogram()
    histogram.add(torch.ones(10), 1.0)
    histogram.total, histogram.counts[3072] = 2**31 - 5, 2**31 - 5
    histogram.add(torch.ones(10), 1.0)
    assert histogram.counts.max() == 2**31 + 5


class Modulated(nn.Module):
    """A model whose modulation has a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.inner = nn.ModuleDict(dict(curious=nn.Linear(4, 6)))

    def forward(self, x, t):
        vector = t.reshape(-1, 1).expand(len(x), 4) / 1000
        return self.body(x + self.inner["curious"](vector)[:, None])


@pytest.mark.parametrize("method", ["mse", "dynamic"])
@pytest.mark.parametrize("keep", [None, "body.0"])
def test_what_carries_t_is_found_by_what_it_gets(keep, method):
    """One vector a sample, where others get tokens. Who names the layers to keep is obeyed."""
    model, x = Modulated().eval(), torch.randn(2, 3, 6)
    with record(model) as recorded, torch.no_grad():
        for t in (9.0, 5.0, 1.0):
            model(x, torch.tensor(t))
    assert recorded.profile.carries_t == ["inner.curious"]
    quantize(model, 4, 4, method, keep=keep)
    calibrate(model, profile=recorded.profile, progress=False)
    assert ("inner.curious" in quantized_layers(model)) == (keep is not None)
    assert keep or "one vector a sample" in model.quantization.kept["inner.curious"]
    model(x, torch.tensor(5.0))
    restore(model)
    assert type(model.inner["curious"]) is nn.Linear


def test_a_call_is_taken_apart_by_the_signature():
    class Model(nn.Module):
        def forward(self, x, text, timestep, **more): ...

    assert read_call(Model(), (1, 2), dict(timestep=3, other=4)) == (1, 3, {"text": 2, "other": 4})


def test_a_compiled_model_is_seen_through(unet):
    unet.compile(backend="eager")
    with record(unet) as recorded:
        run(unet)
    assert recorded.t == [999, 500, 1] and recorded.profile.layers


def test_bad_input(unet):
    with pytest.raises(TDQError, match="must be called inside"), record(unet):
        pass
    with pytest.raises(TDQError, match="inputs must be a whole number from 1 up"), record(unet, inputs=-1):
        pass
    with pytest.raises(TDQError, match=r"one of timestep, timesteps, t; Linear.forward takes input"), record(nn.Linear(2, 2)):
        pass
    with pytest.raises(TDQError, match="must be closed"), record(unet) as recorded:
        recorded.profile  # noqa: B018
    with pytest.raises(KeyError), record(unet):
        raise KeyError
    with pytest.raises(TDQError, match=r"must run at every t; conv_out did not at t = 3\. Turn off"), record(unet) as recorded:
        run(unet, (9, 5))
        unet.conv_out._forward_pre_hooks.clear()
        run(unet, (3,))
    assert not unet._forward_pre_hooks and not unet.conv_in._forward_pre_hooks


def test_a_list_of_samples_is_one_prediction():
    a, b = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    assert torch.equal(prediction(([a, b],)), torch.stack([a, b]))
    assert prediction(([a, b[:, :, :1]],)).shape == (24,)  # pictures of two sizes
