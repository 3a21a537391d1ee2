"""Running statistics against stored activations; drift with a known answer; nothing left behind."""

import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tdq_utils import Profile, calibrate, profile_activations, quantize, sample
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.recording import Cells, Histogram, as_profile, recording
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


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-5, 2.0**-7, 0.1, 1.0, 1000.0])
def test_histograms_are_as_fine_for_small_values(scale):
    """And for those that always had their own limit, 2**-6 at least, as they were: bin for bin, however they come in."""
    x = torch.cat([torch.randn(5_000) * scale, torch.zeros(100), torch.tensor([scale / 2, -scale / 2])])
    now, before = Histogram(), Histogram()
    before.limit = 2.0**-6
    for part in (x, x * 0.01, x * 1.5):
        for histogram in (now, before):
            histogram.add(part, float(part.abs().max()))
    greatest = float(x.abs().max()) * 1.5
    assert now.limit / 2 <= greatest < now.limit
    if greatest >= 2.0**-7:
        assert now.limit == before.limit and (now.counts == before.counts).all()


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


def test_parts_of_an_input_are_counted_apart(unet, scheduler, profile):
    name = "up_blocks.0.resnets.0.conv1"
    halves = {"below": slice(0, 16), "skip": slice(16, None)}
    with recording(unet, {name}, {name: halves}) as cells:
        sample(unet, scheduler, range(8), 4, progress=False, pad=False)
    apart, row = as_profile(cells), profile.row(name)
    assert apart.layers == ["below", "skip"]
    np.testing.assert_array_equal(apart.least.min(0), profile.least[row])
    np.testing.assert_array_equal(apart.greatest.max(0), profile.greatest[row])
    assert (apart.counts.sum((0, 2)) == profile.counts[row].sum(-1)).all()


def test_generators_have_no_layers_that_are_the_models(unet, scheduler, profile):
    """Profiling a model that is quantized and not frozen sees its own layers, and says that it was quantized."""
    quantize(unet, method="tdq")
    calibrate(unet, scheduler, profile=profile, iterations=1, progress=False)
    assert any(".mlp." in name for name in layers_of(unet))
    seen = profile_activations(unet, scheduler, range(1), 2, progress=False)
    assert set(seen.layers) == set(profile.layers) and seen.model == "quantized"


def test_fractional_time_steps_keep_their_fraction(unet):
    """And whole ones stay whole numbers, for tables and figures."""
    with recording(unet, {"conv_in"}) as cells:
        for t in (torch.tensor(999.0), 3, 749.25):
            unet(torch.randn(1, 1, 8, 8), t)
    whole = Cells({key: copy.deepcopy(cell) for key, cell in cells.items() if key[1] != 749.25})
    assert as_profile(cells).t.tolist() == [999.0, 749.25, 3.0]
    whole = as_profile(whole).t
    assert whole.tolist() == [999, 3] and whole.dtype == np.int64


def test_the_time_step_may_be_named(unet):
    with recording(unet, {"conv_in"}) as cells:
        unet(timestep=7, sample=torch.randn(1, 1, 8, 8))
    assert list(cells) == [("conv_in", 7)]


def test_a_model_in_training_mode_is_refused(unet, scheduler):
    with pytest.raises(TDQError, match=r"Call model.eval\(\)"):
        profile_activations(unet.train(), scheduler, range(2), 2, progress=False)
    assert not hooks_of(unet)


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


def test_save_and_load(unet, profile, tmp_path):
    profile.save(tmp_path / "profile.npz")
    loaded = Profile.load(tmp_path / "profile.npz")
    assert loaded.layers == profile.layers
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(profile, name))
        assert getattr(loaded, name).dtype == getattr(profile, name).dtype
    assert loaded.drift().equals(profile.drift())
    assert loaded.model == profile.model == fingerprint(unet)


def test_saved_under_the_very_name_and_whole(profile, tmp_path, monkeypatch):
    profile.save(tmp_path / "x")
    assert Profile.load(tmp_path / "x").layers == profile.layers
    before = (tmp_path / "x").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        profile.save(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == before


def test_profiles_from_before_they_knew_their_model(profile, tmp_path):
    arrays = {name: getattr(profile, name) for name in FIELDS}
    np.savez(tmp_path / "old.npz", layers=np.array(profile.layers), **arrays)
    assert Profile.load(tmp_path / "old.npz").model == ""


OTHERS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "garbage": lambda path: path.write_bytes(b"garbage"),
    "missing": lambda path: path.unlink(),
    "other-arrays": lambda path: np.savez(path, layers=np.array(["a"]), x_t=np.zeros(3)),
    "other-shape": lambda path: np.savez(path, layers=np.array(["a"]), **{name: np.zeros(3) for name in FIELDS}),
    "one-array": lambda path: np.save(path.open("wb"), np.zeros(3)),
}


@pytest.mark.parametrize("damage", OTHERS.values(), ids=OTHERS)
def test_what_is_no_profile_is_named(profile, tmp_path, damage):
    path = tmp_path / "profile.npz"
    profile.save(path)
    damage(path)
    with pytest.raises(DataError, match=rf"{path} must be a profile as Profile.save writes it; got .* Record it again"):
        Profile.load(path)


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


@pytest.mark.parametrize("scale", [0, 1e-25, 1e-12])
def test_a_layer_that_is_always_zero_has_nothing_to_gain(drifting, scale):
    drift = drifting(silent=[scale, scale], layer=[1, 2]).drift().set_index("layer")
    assert drift.gain_db["silent"] == pytest.approx(0, abs=1e-6) and drift.ratio["silent"] == pytest.approx(1)
    assert np.isfinite(drift).all(axis=None)


def test_small_layers_gain_as_much_as_large_ones(drifting):
    """Their histograms were too coarse to tell."""
    drift = drifting(large=[1, 2, 4], small=[1e-4, 2e-4, 4e-4]).drift(bits=8).set_index("layer")
    assert drift.gain_db["small"] == pytest.approx(drift.gain_db["large"], rel=0.02)
    assert drift.ratio["small"] == pytest.approx(4, rel=0.01)


def test_drift_at_a_single_step(drifting):
    drift = drifting(layer=[1]).drift()
    assert (drift.ratio[0], drift.correlation[0]) == (1, 0) and drift.gain_db[0] == pytest.approx(0, abs=0.02)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a program's peak memory")
def test_statistics_of_a_large_model_take_less_than_300_megabytes():
    """800 layers at 50 time steps, from the first value to the finished profile: more resident memory than before."""
    code = """
import re, torch
from tdq_utils.denoiser.recording import Cells, as_profile
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # KiB, of this program alone
cells, x, before = Cells(), torch.linspace(-1, 1, 16), peak()
for t in range(50):
    for layer in range(800):
        cells.add(f"layer {layer}", 999 - 20 * t, x, 1)
profile = as_profile(cells)
profile.percentile(99.9)
print(profile.counts.shape, (peak() - before) // 1024)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    shape, megabytes = shown.rsplit(maxsplit=1)
    assert shape == "(800, 50, 1024)" and 150 < int(megabytes) < 300
