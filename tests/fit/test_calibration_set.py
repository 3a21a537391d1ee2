"""The calibration set: which samples are in it, that it is reproducible, and whom it serves."""

import numpy as np
import pytest
import torch

from tdq_utils import profile_activations, quantize, restore
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.sampling import noise
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.calibration import profile_set
from tdq_utils.fit.calibration_set import CalibrationSet, skewed_density
from tdq_utils.fit.quantize import quantized_layers

HOW = dict(steps=4, progress=False, batch_size=2)


def collect(unet, scheduler, seeds=range(3), **options):
    return CalibrationSet.collect(unet, scheduler, seeds, **{**HOW, **options})


def test_uniform_holds_every_step_of_every_seed(unet, scheduler):
    data = collect(unet, scheduler)
    assert len(data) == 12
    assert data.t.tolist() == [999] * 3 + [749] * 3 + [499] * 3 + [249] * 3
    assert data.seeds.tolist() == [0, 1, 2] * 4
    assert torch.equal(data.x_t[:3], noise(range(3), (1, 8, 8)))


def test_same_arguments_same_set_and_a_seed_does_not_see_its_neighbours(unet, scheduler):
    for how in (dict(at="uniform", per_seed=2), dict(at="skewed")):
        first, again, alone = (collect(unet, scheduler, seeds, **how) for seeds in (range(3), range(3), [1]))
        assert torch.equal(first.x_t, again.x_t) and torch.equal(first.t, again.t)
        assert first.t[first.seeds == 1].tolist() == alone.t.tolist()
        assert len(first) == 6


def test_skewed_prefers_the_clean_end(unet, scheduler):
    data = CalibrationSet.collect(unet, scheduler, range(40), steps=10, at="skewed", per_seed=3, progress=False)
    assert (data.t < 600).sum() > 1.5 * (data.t >= 600).sum()
    assert skewed_density([400]) == 1 and skewed_density([0]) == skewed_density([800]) == pytest.approx(np.exp(-0.5))


def test_chosen_steps(unet, scheduler):
    assert set(collect(unet, scheduler, at=[999, 249]).t.tolist()) == {999, 249}


@pytest.mark.parametrize(("options", "message"), [
    (dict(at="late"), "at must be 'uniform', 'skewed' or a list"), (dict(at=[998]), "visited time steps, 999, 749"),
    (dict(per_seed=5), "from 1 to the 4 steps"), (dict(seeds=[]), "at least one image"),
    (dict(per_seed=0), "from 1 to the 4 steps of a trajectory; got 0"), (dict(per_seed=1.5), "from 1 to the 4 steps"),
    (dict(at=[]), "at must name the time steps to keep, such as 999; got an empty list"),
    (dict(at=[999], per_seed=1), "got per_seed=1, too, which is for 'uniform' and 'skewed'"),
])  # fmt: skip
def test_bad_input(unet, scheduler, options, message):
    with pytest.raises(TDQError, match=message):
        collect(unet, scheduler, **options)


def test_a_batch_shares_its_t_and_a_draw_mixes_it(unet, scheduler):
    data = collect(unet, scheduler)
    batches = list(data.batches(2))
    assert [len(x_t) for x_t, _, _ in batches] == [2, 1] * 4
    assert all(len(t.unique()) == 1 for _, t, _ in batches)
    assert torch.equal(torch.cat([x_t for x_t, _, _ in batches]), data.x_t)
    _, t, _ = data.draw(8, torch.Generator().manual_seed(0))
    assert len(t) == 8 and len(t.unique()) > 1


def test_save_and_load(unet, scheduler, tmp_path):
    data = collect(unet, scheduler)
    data.condition["class_labels"] = torch.arange(12)
    data.save(tmp_path / "set.npz")
    loaded = CalibrationSet.load(tmp_path / "set.npz")
    assert loaded.model == data.model and loaded.condition["class_labels"].tolist() == list(range(12))
    assert all(torch.equal(getattr(loaded, key), getattr(data, key)) for key in ("x_t", "t", "seeds"))
    data.save(tmp_path / "set")  # the name that was given, with or without an ending
    assert torch.equal(CalibrationSet.load(tmp_path / "set").x_t, data.x_t)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.npz"]
    (tmp_path / "set.npz").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"set\.npz must be a calibration set"):
        CalibrationSet.load(tmp_path / "set.npz")


def test_conditions_follow_their_sample(denoiser, scheduler):
    model, condition = denoiser
    data = CalibrationSet.collect(model, scheduler, [5, 6, 7], condition=condition, **HOW)
    for key, value in data.condition.items():
        assert torch.equal(value, condition[key].repeat(4, *[1] * (value.dim() - 1)))


def test_a_set_serves_the_model_that_made_it(unet, scheduler):
    data = collect(unet, scheduler)
    quantize(unet, 8, 4, "mse")
    data.check(unet)  # quantized, it is the same model
    assert torch.equal(collect(unet, scheduler).x_t, data.x_t)  # and makes the same set
    restore(unet)
    unet.conv_in.bias.add_(1e-3)
    with pytest.raises(TDQError, match=rf"serves the model that made it, {data.model}; this model is {fingerprint(unet)}"):
        data.check(unet)


def test_its_profile_is_that_of_the_trajectory(unet, scheduler):
    data = collect(unet, scheduler, range(4))
    expected = profile_activations(unet, scheduler, range(4), steps=4, batch_size=2, progress=False)
    quantize(unet, 8, 4, "mse")
    profile = profile_set(unet, data, batch_size=2)
    for name in quantized_layers(unet):
        row, other = profile.row(name), expected.row(name)
        assert (profile.counts[row].sum(1) == expected.counts[other].sum(1)).all()
        np.testing.assert_allclose(profile.std[row], expected.std[other], rtol=1e-4)
        np.testing.assert_allclose(profile.greatest[row], expected.greatest[other], rtol=1e-4, atol=1e-5)


def test_how_t_was_drawn_is_kept(unet, scheduler, tmp_path):
    for at, kept in (("uniform", "uniform"), ("skewed", "skewed"), ([999, 249], "chosen")):
        data = collect(unet, scheduler, at=at)
        data.save(tmp_path / "set")
        assert data.at == CalibrationSet.load(tmp_path / "set").at == kept
    with np.load(tmp_path / "set") as written:
        older = {key: written[key] for key in written.files if key != "at"}
    np.savez(tmp_path / "older.npz", **older)
    assert CalibrationSet.load(tmp_path / "older.npz").at == "uniform"


def test_an_interrupted_save_leaves_the_older_set(unet, scheduler, tmp_path, monkeypatch):
    data = collect(unet, scheduler)
    data.save(tmp_path / "set.npz")
    monkeypatch.setattr(np, "savez_compressed", lambda file, **arrays: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        data.save(tmp_path / "set.npz")
    assert torch.equal(CalibrationSet.load(tmp_path / "set.npz").x_t, data.x_t)


def test_a_model_in_training_mode_is_refused(unet, scheduler):
    unet.train()
    with pytest.raises(TDQError, match="must be in evaluation mode; the whole is in training mode"):
        collect(unet, scheduler)
