"""The table of training: its rows, its controls, and what a row leaves behind."""

from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from tdq_utils import load_quantized, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.finetuning import FINETUNED
from tdq_utils.fit.loop import Trainer
from tdq_utils.fit.quantize import METHODS, quantized_layers
from tdq_utils.lab import reproduce as module
from tdq_utils.lab.tables.qat import BITS, FEWEST, HEADLINE, LONGER, QatJob, add_losses, default_trainings, qat_jobs


def test_every_method_at_every_pair_of_bits_with_controls_and_each_row_once():
    jobs = qat_jobs()
    assert len(set(jobs)) == len(jobs)
    first = {(job.method, job.weights, job.activations) for job in jobs if job.iterations and job.repeat == 0}
    assert {(method, *bits) for method in ("pact", "lsq", "nipq", "tdq") for bits in BITS} <= first
    assert {("tdq-pact", 4, 4), ("tdq-nipq", 4, 4), ("fine-tuned", 0, 0)} <= first
    second = {(job.method, job.weights, job.activations) for job in jobs if job.iterations and job.repeat == 1}
    assert second == {row for row in first if row[1:] in (HEADLINE, (0, 0))} | {("lsq", *FEWEST), ("tdq", *FEWEST)}
    assert {job.method for job in jobs if job.iterations} <= {*FINETUNED, "fine-tuned"}
    assert {job.method for job in jobs if not job.iterations} <= {*METHODS, "full precision", "real images"}
    assert all(job.batch >= 64 for job in jobs if job.iterations)
    assert {(job.method, job.weights, job.repeat) for job in jobs if job.iterations == LONGER * 600} == {
        ("lsq", 4, 0),
        ("tdq", 4, 0),
    }
    assert {(job.method, job.steps) for job in jobs if job.steps != 20} == {
        (method, steps) for method in ("full precision", "lsq", "tdq") for steps in (10, 50, 100)
    }


def test_default_trainings_are_those_of_the_planned_comparison():
    table = pd.DataFrame([asdict(job) for job in qat_jobs()])
    default = table[default_trainings(table) & (table.steps == 20)]
    assert set(default.method) == {*FINETUNED, "fine-tuned"}
    assert not default.duplicated(["method", "weights", "activations", "repeat"]).any()
    rest = table[(table.iterations > 0) & ~default_trainings(table)]
    assert len(rest) == 4 + 2  # other rates, longer


def test_one_training_serves_every_number_of_sampling_steps():
    job = QatJob("lsq", 4, 4)
    assert replace(job, steps=50).name == job.name != replace(job, repeat=1).name


def test_calibration_alone_has_its_seed_and_training_passes_its_own():
    assert QatJob("tdq", 4, 4, repeat=3, iterations=0).options == dict(seed=3) and QatJob("tdq", 4, 4).options == {}


@pytest.fixture
def trained(small, unet, scheduler, monkeypatch, tmp_path):
    """Measure jobs on the tiny model, with its own noise for training images."""
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    monkeypatch.setattr(module.Protocol, "training", lambda protocol, model: (images, {}))
    return lambda jobs: module.reproduce(jobs, unet, scheduler, tmp_path / "qat.csv", 3, batch_size=3, progress=False)


def test_trainings_and_controls_side_by_side(trained, unet, tmp_path):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    training = dict(steps=2, iterations=2, batch=4)
    jobs = [QatJob("full precision", steps=2, iterations=0, batch=0), QatJob("mse", 4, 4, steps=2, iterations=0, batch=0)]
    jobs += [QatJob(method, 4, 4, **training) for method in ("lsq", "tdq")] + [QatJob("fine-tuned", **training)]
    table = trained(jobs).set_index("method")
    assert (table.loss.notna() == (table.iterations > 0)).all()
    assert table.fcd.nunique() == len(jobs)  # nothing was measured in place of another
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    folder = jobs[3].folder(tmp_path / "cache", unet)
    assert len(pd.read_csv(folder / "loss.csv")) == 2
    add_losses(tmp_path / "losses.csv", jobs, tmp_path / "cache", unet, every=2)
    curves = pd.read_csv(tmp_path / "losses.csv")
    assert curves.method.tolist() == ["lsq", "tdq", "fine-tuned"]
    assert (curves.iteration == 2).all() and (curves.iterations == 2).all()
    assert curves.loss.tolist() == pytest.approx(table.loss.dropna().tolist(), rel=1e-3)
    assert load_quantized(folder / "model").quantization.weights == 4


def test_losses_add_to_those_of_other_trainings(unet, tmp_path):
    jobs = [QatJob("lsq", 4, 4), QatJob("tdq", 4, 4)]
    path = tmp_path / "losses.csv"
    add_losses(path, jobs, tmp_path, unet)
    assert not path.exists()  # nothing was trained
    for job, loss in zip(jobs, (1.0, 2.0), strict=True):
        folder = job.folder(tmp_path / job.method, unet)
        folder.mkdir(parents=True)
        pd.DataFrame(dict(loss=[loss] * 4)).to_csv(folder / "loss.csv", index_label="iteration")
    for cache in ("lsq", "tdq", "nowhere", "tdq"):
        add_losses(path, jobs, tmp_path / cache, unet, every=3)
    known = pd.read_csv(path)  # the last mean is of one iteration, the fourth
    assert known[["method", "iteration", "loss"]].to_numpy().tolist() == [
        ["lsq", 3, 1.0], ["lsq", 4, 1.0], ["tdq", 3, 2.0], ["tdq", 4, 2.0],
    ]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3, 12])
def test_trainings_that_rows_share_belong_to_one_process(world):
    jobs = qat_jobs()
    shares = [module.deal(jobs, rank, world) for rank in range(world)]
    assert sorted(str(job) for share in shares for job in share) == sorted(map(str, jobs))
    names = [{job.name for job in share} for share in shares]
    assert sum(map(len, names)) == len(set.union(*names))


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_every_row_once_at_any_number_of_steps(steps):
    jobs = qat_jobs(steps=steps)
    assert len(set(jobs)) == len(jobs)


def test_trained_models_are_frozen_for_the_steps_they_are_sampled_with():
    with pytest.raises(TDQError, match="steps must divide 100, .*; got 30"):
        qat_jobs(steps=30)


def test_a_row_names_what_sampled_it(unet, scheduler, tmp_path):
    bench = module.Workbench(unet, scheduler, range(3), tmp_path, engine="integer")
    engines = [bench._engine(job) for job in (QatJob("lsq", 4, 4), QatJob("lsq", 4, 4, split_skips=True), QatJob("fine-tuned"))]
    assert engines == ["integer", "compiled", "eager"]


def test_sampling_a_trained_model_with_other_steps_trains_nothing(trained, monkeypatch):
    job = QatJob("lsq", 4, 4, steps=2, iterations=2, batch=4, calibrated_steps=2)
    original, trained_by = Trainer._step, []

    def step(trainer, loss_of, i, seed):
        trained_by.append(i)
        return original(trainer, loss_of, i, seed)

    monkeypatch.setattr(Trainer, "_step", step)
    table = trained([job, replace(job, steps=4)])
    assert trained_by == [0, 1]
    assert table.loss[0] == table.loss[1] and table.fcd[0] != table.fcd[1]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("method", ["lsq", "tdq"])
def test_a_model_left_behind_is_the_one_that_was_measured(trained, scheduler, tmp_path, method, split):
    table = trained([QatJob("full precision", steps=2), QatJob(method, 4, 4, steps=2, iterations=2, batch=4, split_skips=split)])
    model = load_quantized(next((tmp_path / "cache").glob(f"*-{method}-*")) / "model")
    assert any(layer.split for layer in quantized_layers(model).values()) == split
    images = sample(model, scheduler, range(3), 2, batch_size=3, progress=False)
    assert images.square().mean().item() == pytest.approx(table.fcd[1], rel=1e-4)
