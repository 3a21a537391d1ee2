"""Running statistics against stored activations; drift with a known answer; nothing left behind."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tdq_utils import Profile, profile_activations, sample
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.recording import Histogram, as_profile, recording
from tdq_utils.errors import DataError, TDQError

FIELDS = ("t", "least", "greatest", "mean", "std", "counts", "limit")


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


@pytest.fixture
def stored(unet, scheduler):
    """What ``profile`` summarizes: ``{layer: [input at each of the 4 steps]}``, recorded by plain hooks."""
    inputs = {name: [] for name in layers_of(unet)}
    for name, module in layers_of(unet).items():
        module.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0].numpy().copy()))
    sample(unet, scheduler, range(8), 4, batch_size=8, progress=False)
    return inputs


def test_statistics_are_those_of_the_activations(profile, stored):
    assert set(profile.layers) == set(stored) and profile.t.tolist() == [999, 749, 499, 249]
    for name, row in zip(profile.layers, range(len(stored)), strict=True):
        for step, x in enumerate(stored[name]):
            assert (profile.least[row, step], profile.greatest[row, step]) == (x.min(), x.max())
            assert profile.mean[row, step] == pytest.approx(x.mean(dtype=float), rel=1e-4, abs=1e-5)
            assert profile.std[row, step] == pytest.approx(x.std(dtype=float), rel=1e-3)
            assert profile.counts[row, step].sum() == x.size


@pytest.mark.parametrize("q", [0, 50, 99, 99.9, 100])
def test_percentiles_to_a_bin(profile, stored, q):
    exact = [[np.percentile(abs(x), q, method="inverted_cdf") for x in stored[name]] for name in profile.layers]
    bins = profile.limit / 2048
    assert (abs(profile.percentile(q) - exact) <= bins).all()


def test_histogram_does_not_depend_on_the_split():
    """Exactly: also where the limit doubles between the parts, and for values next to the edge of a bin."""
    beside_an_edge = 2.0**-6 * (1 - 2.0**-16)
    values = torch.cat([torch.tensor([beside_an_edge, 0.0, -1e-12]), torch.randn(9_000) * 0.001, torch.randn(9_000) * 5])
    values = torch.cat([values, torch.tensor([-16.0, 16.0])])
    counts = []
    for parts in (values[None], values.split(5_000), values.flip(0).split(1_000)):
        histogram = Histogram()
        for part in parts:
            histogram.add(part, float(part.abs().max()))
        counts.append(histogram.counts)
    assert histogram.limit == 32 and counts[0].sum() == len(values)
    assert (counts[0] == counts[1]).all() and (counts[0] == counts[2]).all()


@pytest.mark.parametrize("arrange", [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.flatten(2).transpose(1, 2)])
def test_histogram_takes_any_memory_layout(arrange):
    x = torch.randn(2, 3, 4, 5)
    plain, other = Histogram(), Histogram()
    plain.add(x, float(x.abs().max()))
    other.add(arrange(x), float(x.abs().max()))
    assert (plain.counts == other.counts).all()


def test_profile_does_not_depend_on_the_batch_size(unet, scheduler, profile):
    """Beyond the last bits of the activations, which move a few values to the next bin; the last batch is not filled up."""
    apart = profile_activations(unet, scheduler, range(8), 4, batch_size=3, progress=False)
    assert (apart.counts.sum(-1) == profile.counts.sum(-1)).all()
    same = np.minimum(apart.counts, profile.counts)[apart.limit == profile.limit].sum()
    assert same > 0.99 * profile.counts.sum()
    for name in ("least", "greatest", "mean", "std"):
        np.testing.assert_allclose(getattr(apart, name), getattr(profile, name), rtol=1e-2, atol=1e-3)


def test_profiling_works_on_every_kind_of_model(denoiser, scheduler):
    model, condition = denoiser
    profile = profile_activations(model, scheduler, range(3), 2, condition=condition, progress=False)
    assert set(profile.layers) <= set(layers_of(model))
    assert {"conv_in", "conv_out"} <= set(profile.layers) or "pos_embed.proj" in profile.layers
    assert not hooks_of(model)


def test_only_chosen_layers(unet, scheduler):
    profile = profile_activations(unet, scheduler, range(1), 2, layers={"conv_out"}, progress=False)
    assert profile.layers == ["conv_out"] and profile.counts.shape[:2] == (1, 2)


def test_no_activation_is_kept(unet, scheduler):
    seen = []
    for module in layers_of(unet).values():
        module.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    result = profile_activations(unet, scheduler, range(2), 2, progress=False)
    gc.collect()
    assert len(seen) == 2 * len(result.layers)
    assert not any(ref() is not None for ref in seen)


def test_hooks_are_gone_also_after_an_error(unet, scheduler):
    def fail(info):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        profile_activations(unet, scheduler, range(2), 4, callback=fail, progress=False)
    assert not hooks_of(unet)


def test_images_are_those_of_plain_sampling(unet, scheduler):
    plain = sample(unet, scheduler, range(2), 2, progress=False)
    with recording(unet):
        assert torch.equal(sample(unet, scheduler, range(2), 2, progress=False), plain)


def test_activations_that_are_not_finite(unet, scheduler):
    unet.conv_in.weight[0] = float("nan")
    with pytest.raises(TDQError, match=r"Activations must be finite; got values from nan.*Check the model's weights"):
        profile_activations(unet, scheduler, range(2), 2, progress=False)


def test_one_t_a_call(unet):
    with recording(unet), pytest.raises(TDQError, match="must share one t; got 3 and 4"):
        unet(torch.randn(2, 1, 8, 8), torch.tensor([3, 4]))


def test_no_seeds(unet, scheduler):
    with pytest.raises(TDQError, match="seeds must name at least one image"):
        profile_activations(unet, scheduler, range(0), 2)


def test_save_and_load(profile, tmp_path):
    profile.save(tmp_path / "profile.npz")
    loaded = Profile.load(tmp_path / "profile.npz")
    assert loaded.layers == profile.layers
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(profile, name))
        assert getattr(loaded, name).dtype == getattr(profile, name).dtype
    assert loaded.drift().equals(profile.drift())


def test_frame_is_tidy(profile):
    frame = profile.frame
    assert list(frame) == ["layer", "step", "t", "min", "max", "mean", "std", "p99", "p999"]
    assert len(frame) == len(profile.layers) * 4 and not frame.isna().any(axis=None)
    row = frame[(frame.layer == "conv_out") & (frame.t == 499)].squeeze()
    at = profile.layers.index("conv_out"), 2
    assert row.step == 2
    assert (row["min"], row["max"], row["mean"], row["std"]) == tuple(
        table[at] for table in (profile.least, profile.greatest, profile.mean, profile.std)
    )
    assert (row.p99, row.p999) == (profile.percentile(99)[at], profile.percentile(99.9)[at])


def test_rows_and_steps_by_name(profile):
    assert profile.row("conv_out") == profile.layers.index("conv_out") and profile.step(749) == 1
    with pytest.raises(TDQError, match=r"layer must be one of the \d+ profiled ones.*got 'conv_outt'"):
        profile.row("conv_outt")
    with pytest.raises(TDQError, match="t must be one of .*999, 749, 499, 249; got 500"):
        profile.step(500)


def test_percentile_out_of_range(profile):
    with pytest.raises(TDQError, match="from 0 to 100; got 101"):
        profile.percentile(101)


def test_drift_with_a_known_answer(drifting):
    """A range that does not move, one that grows 2-fold towards t = 999, one that grows 4-fold towards t = 0."""
    drift = (
        drifting(steady=[1, 1, 1, 1], doubles=[2, 5 / 3, 4 / 3, 1], swells=[0.1, 0.2, 0.3, 0.4]).drift(bits=4).set_index("layer")
    )
    assert list(drift) == ["ratio", "correlation", "gain_db"]
    np.testing.assert_allclose(drift.ratio, [1, 2, 4], rtol=0.01)
    np.testing.assert_allclose(drift.correlation, [0, 1, -1], atol=1e-4)
    assert drift.gain_db["steady"] == pytest.approx(0, abs=0.02)
    assert 0.3 < drift.gain_db["doubles"] < drift.gain_db["swells"]


def test_gain_is_what_an_interval_per_step_saves(drifting):
    """Two scales, far apart: one interval must serve the wide one, and the narrow one is lost below its first level."""
    profile = drifting(layer=[1, 1e-3])
    assert profile.drift(bits=4).ratio[0] == pytest.approx(1000, rel=0.01)
    static, per_step = profile.best_steps("layer", bits=4)
    assert static == pytest.approx(per_step[0].item(), rel=0.05)
    assert per_step[1] == pytest.approx(per_step[0].item() / 1000, rel=0.05)


def test_best_steps_are_searched_once_for_each_layer_and_bits(drifting):
    profile = drifting(layer=[1, 2], other=[3, 1])
    asked = [("layer", 4), ("other", 4), ("layer", 5)]
    found = [profile.best_steps(*one) for one in asked]
    assert profile.best_steps(0, 4) is found[0]
    for one, steps in zip(asked, found, strict=True):
        afresh = replace(profile).best_steps(*one)
        assert afresh is not steps and all(torch.equal(a, b) for a, b in zip(afresh, steps, strict=True))


def test_drift_at_a_single_step(drifting):
    drift = drifting(layer=[1]).drift()
    assert (drift.ratio[0], drift.correlation[0]) == (1, 0) and drift.gain_db[0] == pytest.approx(0, abs=0.02)


def test_the_generators_own_layers_are_not_the_models(calibrated, scheduler, profile):
    model = calibrated("tdq")
    own = profile_activations(model, scheduler, range(2), 4, progress=False)
    assert own.layers == profile.layers


def test_time_steps_between_whole_numbers_stay_what_they_are(unet, x):
    with recording(unet) as cells:
        for t in (999, 749.25, 0.5):
            unet(x, torch.tensor([t]))
    assert as_profile(cells).t.tolist() == [999, 749.25, 0.5]


def test_a_layer_that_is_always_zero_gains_nothing(unet, scheduler):
    unet.mid_block.resnets[0].conv2.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
    drift = profile_activations(unet, scheduler, range(2), 4, progress=False).drift().set_index("layer")
    assert drift.gain_db["mid_block.resnets.0.conv2"] == 0 and np.isfinite(drift.to_numpy()).all()


@pytest.mark.parametrize("scale", [1e-3, 1e-9, 1e3])
def test_resolution_does_not_depend_on_the_scale(scale):
    values, counts = torch.randn(10_000), []
    for factor in (1.0, scale):
        histogram = Histogram()
        histogram.add(values * factor, float(values.abs().max()) * factor)
        counts.append((histogram.counts > 0).sum())
    assert 0.4 < counts[1] / counts[0] < 2.5


def test_a_profile_knows_whose_it_is(unet, profile, tmp_path):
    assert profile.model == fingerprint(unet)
    profile.save(tmp_path / "a")
    assert Profile.load(tmp_path / "a").model == profile.model
    np.savez(tmp_path / "old.npz", **{k: v for k, v in np.load(tmp_path / "a").items() if k != "model"})
    assert Profile.load(tmp_path / "old.npz").model == ""


@pytest.mark.parametrize("content", [None, b"", b"no profile"])
def test_a_damaged_profile_is_named(profile, tmp_path, content):
    path = tmp_path / "p.npz"
    profile.save(path)
    path.write_bytes(path.read_bytes()[:-600] if content is None else content)
    with pytest.raises(DataError, match=r"p.npz must be a profile as Profile.save writes it.*record it again"):
        Profile.load(path)
