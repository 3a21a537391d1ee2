"""The loop of every training: its average, its rates, resuming, what it refuses; and what tells settings apart."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit import loop
from tdq_utils.fit.loop import Trainer, described, state_path


@pytest.fixture(autouse=True)
def saved_at_every_iteration(monkeypatch):
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count(step=100).__next__))


@pytest.fixture
def new(tmp_path):
    """``new(path)``: a trainer of a small network with dropout, always the same; and its loss."""

    def make(path=None, ema_decay=0.9, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=1.0), ema_decay, path, **options)

        def loss(generator):
            x = torch.randn(16, 4, generator=generator)
            return F.mse_loss(model(x), x.sum(1, keepdim=True))

        return trainer, loss

    return make


def run(trainer, loss, iterations=6, **options):
    return trainer.run(loss, lambda i: 1e-2, iterations, seed=0, title="test", progress=False, **options)


def values(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_the_model_ends_as_the_average_to_the_last_bit(new):
    """The sum that the shipped tables were made with: ``lerp_``, with a decay that grows to its value."""
    trainer, loss = new(ema_decay=0.9)
    average, step = values(trainer), trainer.optimizer.step
    iteration = itertools.count()

    @torch.no_grad()
    def spied():
        step()
        i = next(iteration)
        for one, now in zip(average, trainer.model.parameters(), strict=True):
            one.lerp_(now, 1 - min(0.9, (1 + i) / (10 + i)))

    trainer.optimizer.step = spied
    run(trainer, loss, 150)
    assert all(torch.equal(one, end) for one, end in zip(average, values(trainer), strict=True))


def test_a_killed_run_goes_on_with_the_same_losses_and_values(new, tmp_path):
    whole, loss = new(tmp_path / "whole.pt")
    losses = run(whole, loss)
    killed, loss = new(tmp_path / "parts.pt")
    calls = itertools.count()

    def until_the_fourth(generator):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return loss(generator)

    with pytest.raises(KeyboardInterrupt):
        run(killed, until_the_fourth)
    resumed, loss = new(tmp_path / "parts.pt")
    assert run(resumed, loss) == losses and len(losses) == 6
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))
    assert all(p.grad is None for p in resumed.model.parameters())
    assert not list(tmp_path.glob("*.part"))


def test_two_that_save_at_once_do_not_damage_each_other(new, tmp_path, monkeypatch):
    """The second saves, to its end, while the first has written half."""
    (first, loss), (second, _), original = new(tmp_path / "state.pt"), new(tmp_path / "state.pt"), torch.save
    run(first, loss, 1)

    def interrupted(state, path):
        monkeypatch.setattr(torch, "save", original)
        path.write_bytes(b"half")
        second._save(9, [])
        original(state, path)

    monkeypatch.setattr(torch, "save", interrupted)
    first._save(7, [])
    assert second._load() == (7, [])
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_groups_have_rates_of_their_own(new):
    trainer, loss = new()
    trainer.optimizer.param_groups[0]["rate"] = 0.5
    trainer.run(loss, lambda i: 0.1 * (i + 1), 3, seed=0, title="test", progress=False)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)


def test_a_loss_that_is_not_finite_reaches_no_parameter(new, tmp_path):
    trainer, loss = new(tmp_path / "state.pt")
    before = values(trainer)
    with pytest.raises(TDQError, match="The loss must stay finite; it is nan at iteration 0. Lower rate. The last good state"):
        run(trainer, lambda generator: loss(generator) * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, values(trainer), strict=True))


@pytest.mark.parametrize("damage", ["truncated", "of other parts"])
def test_a_damaged_state_says_so(new, tmp_path, damage):
    path = tmp_path / "state.pt"
    run(*new(path))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    else:
        torch.save({"iteration": 3, "log": [], "model": {}}, path)
    with pytest.raises(
        DataError, match=r"state\.pt must be a state of this training, as it was saved: .*Delete it to start anew"
    ):
        run(*new(path))


def test_settings_beside_a_state_must_agree_on_every_name(tmp_path):
    settings = dict(rate=0.1, seeds=range(3), data=torch.arange(3), nested=dict(a=(1, 2)))
    path = state_path(tmp_path / "run", settings)
    assert path.parent.is_dir() and not path.exists()
    state_path(tmp_path / "run", dict(rate=0.2))  # nothing was begun: any will do
    state_path(tmp_path / "run", settings)
    path.touch()
    assert state_path(tmp_path / "run", {**settings, "data": torch.arange(3), "seeds": [0, 1, 2]}) == path
    for changed, name in [
        (dict(rate=0.2), "rate"), (dict(data=torch.arange(3).float()), "data"), (dict(nested=dict(a=(1, 3))), r"nested\.a"),
        (dict(nested={}), r"nested\.a = \[1, 2\], this one has its default"), (dict(new=1), "new = its default, .* 1"),
    ]:  # fmt: skip
        with pytest.raises(TDQError, match=f"holds one with {name}.* Choose another out, or delete"):
            state_path(tmp_path / "run", {**settings, **changed})
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["nested.a"] == [1, 2]


def test_arrays_are_told_apart_by_type_shape_and_contents():
    variants = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0, 0, 0, 1.0])]
    assert len({described(one, "x")["x"] for one in variants}) == 4
    assert described(torch.zeros(2, 3).T.contiguous().T, "x") == described(torch.zeros(2, 3), "x")
    assert described(dict(x=torch.tensor(1.0).numpy())) == described(dict(x=torch.tensor(1.0).numpy()))
