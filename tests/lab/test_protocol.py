"""What rows were measured with: told apart in rows and caches, the same for the shipped tables, refused where it cannot fit."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image

from tdq_utils import load_model
from tdq_utils.errors import TDQError
from tdq_utils.lab import protocol as module
from tdq_utils.lab import reproduce as engine
from tdq_utils.lab.fid import feature_extractor
from tdq_utils.lab.protocol import Protocol, Reference, sampler_name, without_missing
from tdq_utils.lab.results import SHIPPED, Table, read_rows
from tdq_utils.lab.tables.ptq import Job, ptq_jobs

PTQ = Path(__file__).parents[2] / "data" / "results" / "ptq.csv"


@pytest.fixture
def pictures(tmp_path):
    """``pictures(n, folder)``: a folder with so many small grey pictures."""

    def make(n=4, folder="pictures", size=8, seed=0):
        (tmp_path / folder).mkdir(parents=True)
        for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
        return str(tmp_path / folder)

    return make


@pytest.fixture
def dit():
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, patch_size=2, num_layers=1, norm_num_groups=1)
    return DiTTransformer2DModel(**sizes, num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=5).eval()


def test_the_shipped_model_is_measured_as_its_tables_were(tmp_path):
    model, scheduler = load_model("fashion-mnist", device="cpu")
    assert Protocol().row(model, scheduler) == SHIPPED | dict(sampler="DDIM")
    assert Protocol().folder(tmp_path, model, scheduler) == tmp_path
    Protocol().check(model, "classifier")
    assert Protocol().asking(model, range(3)) == {}


@pytest.mark.parametrize(("scheduler", "name"), [
    (DDIMScheduler(timestep_spacing="trailing"), "DDIM"), (DDIMScheduler(), "DDIM timestep_spacing=leading"),
    (DDPMScheduler(variance_type="fixed_large"), "DDPM timestep_spacing=leading variance_type=fixed_large"),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), "FlowMatchEulerDiscrete shift=3.0"),
    (DDIMScheduler(timestep_spacing="trailing", trained_betas=[0.1, 0.2]), "DDIM trained_betas=[0.1; 0.2]"),
])  # fmt: skip
def test_a_scheduler_is_named_by_what_is_not_at_its_default(scheduler, name):
    assert sampler_name(scheduler) == name


def test_everything_that_rows_must_share_is_in_the_key_of_caches(unet, dit, scheduler, pictures, tmp_path):
    v, half = DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"), UNet2DModel(**unet.config).bfloat16()
    one, other = Protocol(Reference(pictures())), Protocol(Reference(pictures(folder="others/pictures", seed=1)))
    assert one.reference.identity != other.reference.identity and one.reference.identity.startswith("pictures-")
    told_apart = [
        (Protocol(), unet, scheduler), (Protocol(), unet, v), (Protocol(), unet, DDIMScheduler()), (Protocol(), half, scheduler),
        (one, unet, scheduler), (other, unet, scheduler), (Protocol(), dit, scheduler), (Protocol(guidance=2.0), dit, scheduler),
        (Protocol(guidance=4.0), dit, scheduler), (Protocol(classes=3), dit, scheduler),
        (Protocol(), unet, FlowMatchEulerDiscreteScheduler()),
    ]  # fmt: skip
    assert len({protocol.folder(tmp_path, *rest) for protocol, *rest in told_apart}) == len(told_apart)


JOBS = [Job("full precision", steps=2), Job("mse", 8, 4, steps=2)]


def measure(model, scheduler, out, protocol, jobs=JOBS):
    return engine.reproduce(jobs, model, scheduler, out, 3, batch_size=3, progress=False, protocol=protocol)


@pytest.mark.usefixtures("small")
def test_rows_of_another_protocol_are_not_mixed(dit, scheduler, pictures, tmp_path):
    out, protocol = tmp_path / "t.csv", Protocol(Reference(pictures()), guidance=2.0)
    table = measure(dit, scheduler, out, protocol)
    assert set(table.guidance) == {"2"} and set(table.classes) == {5} and set(table.data) == {protocol.reference.identity}
    assert set(table.prediction) == {"epsilon"} and set(table.dtype) == {"float32"}
    assert measure(dit, scheduler, out, protocol).equals(table)  # and its own rows are known again
    text = out.read_text()
    for other, name in [
        (Protocol(Reference(pictures(folder="b", seed=1)), guidance=2.0), "data"), (Protocol(protocol.reference), "guidance"),
        (Protocol(protocol.reference, 3.0), "guidance"), (Protocol(protocol.reference, 2.0, 4), "classes"),
    ]:  # fmt: skip
        with pytest.raises(TDQError, match=f"must share .*holds {name} = .*another --out"):
            measure(dit, scheduler, out, other)
    with pytest.raises(TDQError, match="holds sampler = DDIM, this run has DDIM timestep_spacing=leading"):
        measure(dit, DDIMScheduler(), out, protocol)
    assert out.read_text() == text
    measure(dit, scheduler, tmp_path / "unguided.csv", Protocol(protocol.reference))
    caches = list((tmp_path / "cache").glob("*/*.npy"))
    assert len(caches) == 2 and not np.array_equal(*map(np.load, caches))  # guidance moved the full-precision images, too


def test_a_committed_table_has_the_protocol_of_the_shipped_model(tmp_path):
    """It lacks the columns: another protocol is told from it all the same, and its text stays."""
    rows = read_rows(PTQ)
    assert all(SHIPPED.items() <= row.items() for row in rows)
    shutil.copy(PTQ, tmp_path / "ptq.csv")
    table = Table(tmp_path / "ptq.csv", [asdict(job) for job in ptq_jobs()])
    table.add(rows[3])
    assert table.path.read_text() == PTQ.read_text()
    (row,) = (tmp_path / "ptq.rows").iterdir()
    assert not SHIPPED.keys() & pd.read_csv(row).columns.to_series().to_dict().keys()
    mine, shared = ptq_jobs()[:1], {name: rows[0][name] for name in ("images", "sampler", "model", "features", *SHIPPED)}
    assert engine._left(table, mine, shared, {20}, True) == []
    with pytest.raises(TDQError, match="holds data = fashion-mnist, this run has cifar10"):
        engine._left(table, mine, shared | dict(data="cifar10"), {20}, True)


@pytest.mark.parametrize(("features", "protocol", "message"), [
    ("inception", Protocol(), r"fashion-mnist has \(1, 28, 28\), the model makes \(1, 8, 8\). Pass --data"),
    ("classifier", "pictures", r"knows images \(1, 28, 28\); .* has \(1, 8, 8\). Pass --features inception"),
    ("inception", 2.0, "guidance=2 needs a model with classes; this one has none"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_any_work(unet, scheduler, tmp_path, pictures, features, protocol, message,
                                                            monkeypatch):  # fmt: skip
    monkeypatch.setattr(engine, "feature_extractor", lambda *args: feature_extractor())
    if not isinstance(protocol, Protocol):
        protocol = Protocol(Reference(pictures()), guidance=protocol if isinstance(protocol, float) else None)
    out = tmp_path / "out" / "t.csv"
    with pytest.raises(TDQError, match=message):
        engine.reproduce(JOBS, unet, scheduler, out, 65, features=features, progress=False, protocol=protocol)
    assert not out.parent.exists()


def test_integer_kernels_are_the_cpus(unet, scheduler, tmp_path):
    bench = engine.Workbench(unet, scheduler, range(65), tmp_path, engine="integer")
    bench.device = torch.device("cuda")
    with pytest.raises(TDQError, match="engine='integer' runs on the CPU; this model is on cuda. Pass --engine compiled"):
        bench.check(JOBS)


def test_guidance_without_a_known_null_label_is_refused(unet, pictures):
    classes = UNet2DModel(**{**unet.config, "num_class_embeds": 4})
    with pytest.raises(TDQError, match="negative must name the null label"):
        Protocol(Reference(pictures()), 2.0).check(classes, "inception")


def test_each_seed_has_its_class(dit, unet):
    assert Protocol().asking(dit, range(7, 11))["condition"]["class_labels"].tolist() == [2, 3, 4, 0]
    assert Protocol(classes=2, guidance=3.0).asking(dit, [4, 5]).keys() == {"condition", "guidance"}
    assert Protocol(classes=0).asking(dit, [4]) == {} == Protocol().asking(unet, [4])


def test_training_images_go_with_their_classes(dit, unet, monkeypatch):
    given = dict(images=torch.zeros(25, 1, 8, 8), labels=torch.arange(25) % 5)
    load = lambda *args: (given["images"], given["labels"].clone()) if args[-1] else given["images"]  # noqa: E731
    monkeypatch.setattr(module, "load_images", load)
    images, further = Protocol().training(dit)
    assert len(images) == 25 and further["condition"]["class_labels"].tolist() == given["labels"].tolist()
    labels = Protocol(guidance=2.0).training(dit)[1]["condition"]["class_labels"]
    assert (labels == 5).nonzero().flatten().tolist() == [0, 10, 20]  # the null label, for guidance to compare with
    assert Protocol().training(unet)[1] == {}
    with pytest.raises(TDQError, match="must be of the model's 3 classes; fashion-mnist has 5. Pass other --data"):
        Protocol(classes=3).training(dit)


def test_real_images_that_are_not_there_are_no_row(pictures):
    jobs = [*JOBS, Job("real images", steps=2)]
    folder = Path(pictures(4, "set/train")).parent
    with pytest.warns(UserWarning, match="has 0 beside those that are compared with, fewer than 3"):
        assert without_missing(jobs, Reference(str(folder)), 3) == JOBS
    pictures(3, "set/test", seed=1)
    assert without_missing(jobs, Reference(str(folder)), 3) == jobs
    real = Reference(str(folder)).real(3, 2)
    assert torch.equal(real, Reference(str(folder)).images("test")[[2, 0, 1]])


def test_an_extractor_is_built_once():
    assert feature_extractor("classifier", "cpu") is feature_extractor("classifier", "cpu")
