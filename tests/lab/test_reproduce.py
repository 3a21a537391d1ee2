"""The tables: rows survive kills, are not measured twice, refuse to be mixed; streams equal what they stream."""

import copy
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tdq_utils.errors import TDQError
from tdq_utils.lab import reproduce as module
from tdq_utils.lab.reproduce import reproduce
from tdq_utils.lab.results import Table, read_rows
from tdq_utils.lab.tables.ablations import Ablation, ablation_jobs
from tdq_utils.lab.tables.balance import balance_jobs
from tdq_utils.lab.tables.ptq import BITS, HEADLINE, Job, ptq_jobs
from tdq_utils.lab.tables.qat import qat_jobs
from tdq_utils.lab.tables.quickstart import quickstart_jobs
from tdq_utils.lab.tables.trials import trial_jobs

KEY = ("method", "weights", "activations", "repeat", "weights_method", "steps")
JOBS = [
    Job("full precision", steps=2),
    Job("real images", steps=2),
    Job("mse", 8, 4, steps=2),
    Job("dynamic", 8, 4, steps=2),
    Job("mse", 4, 4, 1, steps=2),
]


def measure(unet, scheduler, out, jobs=JOBS, images=5, **options):
    return reproduce(jobs, unet, scheduler, out, images, batch_size=2, progress=False, **options)


RESULTS = Path(__file__).parents[2] / "data" / "results"
TABLES = {  # jobs, threads and images of the committed tables
    "quickstart": (quickstart_jobs(), 2, 256),
    "full_precision": (quickstart_jobs([]), 2, 5000),
    "ptq": (ptq_jobs(), 2, 1000),
    "ablations": (ablation_jobs(), 2, 1000),
    "balance": (balance_jobs(), 2, 1000),
    "qat": (qat_jobs(), 1, 1000),
    "trials": (trial_jobs(), 1, 256),
}


BEGUN = ("balance",)  # tables that hold the first of their rows: the rest takes hours


@pytest.mark.usefixtures("small")
def test_rows_carry_their_protocol_and_the_model_comes_back(unet, scheduler, tmp_path):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    table = measure(unet, scheduler, tmp_path / "t.csv")
    assert [tuple(row) for row in table[list(KEY)].to_numpy()] == [tuple(asdict(job).values()) for job in JOBS]
    assert set(table.images) == {5} and set(table.steps) == {2} and table.model.nunique() == 1
    assert table.mse[0] == 0 and np.isnan(table.mse[1]) and (table.mse[2:] > 0).all()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert read_rows(tmp_path / "t.csv")[2]["mse"] == pytest.approx(table.mse[2], rel=1e-4)


@pytest.mark.usefixtures("small")
def test_a_killed_table_goes_on_and_measures_nothing_twice(unet, scheduler, tmp_path, monkeypatch):
    whole = measure(unet, scheduler, tmp_path / "whole.csv")
    measured, original = [], module.Workbench.measure

    def killed(self, job):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(job)
        return original(self, job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Workbench, "measure", killed)
        measure(unet, scheduler, tmp_path / "parts.csv")
    assert len(read_rows(tmp_path / "parts.csv")) == 2
    measured.clear()
    monkeypatch.setattr(module.Workbench, "measure", lambda self, job: (measured.append(job), original(self, job))[1])
    parts = measure(unet, scheduler, tmp_path / "parts.csv")
    assert measured == JOBS[2:] and not list(tmp_path.glob("*/*.begun"))
    pd.testing.assert_frame_equal(parts[["fcd", "mse"]], whole[["fcd", "mse"]], rtol=1e-4)
    assert measure(unet, scheduler, tmp_path / "parts.csv").equals(parts) and measured == JOBS[2:]


class State:
    """Of one process of two."""

    num_processes = 2

    def __init__(self, rank):
        self.process_index, self.is_main_process = rank, rank == 0

    def wait_for_everyone(self):
        pass


@pytest.mark.usefixtures("small")
def test_two_ranks_give_the_rows_of_one(unet, scheduler, tmp_path, monkeypatch):
    whole = measure(unet, scheduler, tmp_path / "one.csv")
    for rank in (1, 0):
        monkeypatch.setattr(module, "processes", lambda rank=rank: State(rank))
        table = measure(unet, scheduler, tmp_path / "two.csv")
        assert len(table) == (2 if rank else len(JOBS))
    pd.testing.assert_frame_equal(table[["method", "fcd", "mse"]], whole[["method", "fcd", "mse"]], rtol=1e-4)
    assert len(list((tmp_path / "two.rows").iterdir())) == len(JOBS)


@pytest.mark.usefixtures("small")
def test_plain_processes_take_the_next_row_that_is_not_there(unet, scheduler, tmp_path, monkeypatch):
    """A second process comes while the first measures its second row: each row is measured once, by one of them."""
    out, original, measured = tmp_path / "t.csv", module.Workbench.measure, []

    def interrupted(bench, job):
        measured.append(job)
        if len(measured) == 2:
            other = copy.deepcopy(bench.model)
            table = reproduce(JOBS[:4], other, scheduler, out, 5, batch_size=2, progress=False)
            assert measured == [*JOBS[:2], *JOBS[2:4], JOBS[1]]  # what is begun comes last: whoever began it may be dead
            assert len(table) == 4
        return original(bench, job)

    monkeypatch.setattr(module.Workbench, "measure", interrupted)
    table = measure(unet, scheduler, out)
    assert measured == [*JOBS[:2], *JOBS[2:4], JOBS[1], JOBS[4]]
    assert table.method.tolist() == [job.method for job in JOBS]
    assert [file.suffix for file in (tmp_path / "t.rows").iterdir()] == [".csv"] * len(JOBS)


SCRIPT = """
import sys
from unittest.mock import patch
from tdq_utils import fid, load_images, load_model, reproduce as module
from tdq_utils.lab.tables import ptq

def few_features(features, *others):  # the KID's reference, of 500 images instead of 10,000
    return fid.extract_features(load_images(split="test")[:500]).float()

jobs = [ptq.Job(method, *bits, steps=1) for method, *bits in (("full precision",), ("mse", 8, 8), ("minmax", 8, 8))]
with patch.object(ptq, "CALIBRATION", 2), patch.object(fid, "reference_features", few_features):
    module.reproduce(jobs, *load_model(), sys.argv[1], images=65, progress=False)
"""


def test_two_real_processes_of_equal_threads_give_the_rows_of_one(tmp_path, monkeypatch):
    """Launched as a user would on a CPU; slow to start, so few and small rows, and this process is the one."""
    script = tmp_path / "table.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one.csv")])
    runpy.run_path(str(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path / "two.csv")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    one, two = (pd.read_csv(tmp_path / name)[["method", "fcd", "kid", "mse"]] for name in ("one.csv", "two.csv"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-3)
    assert sorted(path.name for path in tmp_path.glob("two*")) == ["two.csv", "two.rows"]


@pytest.mark.usefixtures("small")
def test_other_protocols_are_refused_before_any_work(unet, scheduler, tmp_path):
    measure(unet, scheduler, tmp_path / "t.csv", JOBS[:1])
    text = (tmp_path / "t.csv").read_text()
    with pytest.raises(TDQError, match=r"must share images, steps, model, .* and threads; .* holds images = 5, this run has 6"):
        measure(unet, scheduler, tmp_path / "t.csv", images=6)
    with pytest.raises(TDQError, match="holds steps = 2, this run has 3"):
        measure(unet, scheduler, tmp_path / "t.csv", [replace(job, steps=3) for job in JOBS])
    unet.conv_in.bias.add_(1e-3)
    with pytest.raises(TDQError, match="holds model = "):
        measure(unet, scheduler, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == text


@pytest.mark.usefixtures("small")
def test_rows_of_other_threads_are_refused_unless_asked_for(unet, scheduler, tmp_path, monkeypatch):
    out = tmp_path / "t.csv"
    measure(unet, scheduler, out, JOBS[:1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert len(measure(unet, scheduler, out, JOBS[:1])) == 1  # nothing is left to measure
    with pytest.raises(TDQError, match=r"holds threads = 1, this run has 7. Set OMP_NUM_THREADS=1, pass --mix-threads, or"):
        measure(unet, scheduler, out, JOBS[:3])
    table = measure(unet, scheduler, out, JOBS[:3], mix_threads=True)
    assert table.threads.tolist() == [1, 7, 7]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # no row is paired with images of other threads


@pytest.mark.usefixtures("small")
def test_a_training_goes_on_with_equal_threads_alone(unet, tmp_path, monkeypatch):
    folder = JOBS[2].folder(tmp_path, unet)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert JOBS[2].folder(tmp_path, unet) != folder


@pytest.mark.usefixtures("small")
def test_images_of_another_engine_are_not_taken_for_these(unet, scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Compiled", lambda model: model)
    paths = []
    for engine in module.ENGINES:
        module.Workbench(unet, scheduler, range(2), tmp_path, engine=engine)._clean(Job("full precision", steps=2))
        paths.append(len(list(tmp_path.iterdir())))
    assert paths == [1, 2, 2]  # both kernels and simulation are paired with the compiled model


@pytest.mark.usefixtures("small")
def test_a_table_meets_steps_that_it_was_not_calibrated_for(unet, scheduler, tmp_path):
    jobs = [Ablation("table", 8, 4, steps=3, question="sampling steps", calibrated_steps=2), Ablation("mse", 8, 4, steps=3)]
    table = measure(unet, scheduler, tmp_path / "t.csv", jobs)
    assert (table.mse > 0).all()


def test_too_few_images(unet, scheduler, tmp_path):
    with pytest.raises(TDQError, match="images must exceed the 64 features of the classifier; got 64"):
        reproduce(JOBS, unet, scheduler, tmp_path / "t.csv", images=64)
    assert not list(tmp_path.iterdir())


def test_the_table_has_every_setting():
    jobs = ptq_jobs()
    assert len(set(jobs)) == len(jobs)
    for weights, activations in BITS:
        found = {(job.method, job.repeat) for job in jobs if (job.weights, job.activations) == (weights, activations)}
        repeats = 3 if (weights, activations) in HEADLINE else 2
        assert {("tdq", r) for r in range(repeats)} | {("dynamic-sample", 0), ("ptq4dm", 1)} <= found
        assert ("tdq", repeats) not in found
    assert jobs[0] == Job("full precision") and len(ptq_jobs(quick=True)) < len(jobs) / 5


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_committed_table_is_whole_and_of_one_number_of_threads(name):
    """Its command has nothing left to measure (but of tables that are begun), and would go on from the CSV alone."""
    jobs, threads, images = TABLES[name]
    table = Table(RESULTS / f"{name}.csv", [asdict(job) for job in jobs])
    rows = table.rows()
    wanted = [tuple(asdict(job).values()) for job in jobs]
    assert list(rows) == [key for key in wanted if key in rows or name not in BEGUN]
    assert {row["threads"] for row in rows.values()} == {threads} and {row["images"] for row in rows.values()} == {images}


def test_a_committed_table_gathers_to_itself(tmp_path):
    for name, (jobs, *_) in TABLES.items():
        shutil.copy(RESULTS / f"{name}.csv", tmp_path)
        Table(tmp_path / f"{name}.csv", [asdict(job) for job in jobs]).gather()
        assert (tmp_path / f"{name}.csv").read_text() == (RESULTS / f"{name}.csv").read_text()
