"""The paper's setting by two commands, on a random model of the architecture of google/ddpm-cifar10-32, reduced."""

import hashlib
import io
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from tdq_utils import load_quantized
from tdq_utils.__main__ import main, parser
from tdq_utils.fit import finetuning
from tdq_utils.lab import datasets, fid
from tdq_utils.lab.tables import ptq, qat

COMMANDS = [
    "reproduce ptq --model google/ddpm-cifar10-32 --scheduler ddim --data cifar10 --download --features inception --steps 100 "
    "--images 50000 --batch-size 500 --out runs/cifar10/ptq.csv",
    "reproduce qat --model google/ddpm-cifar10-32 --scheduler ddim --data cifar10 --download --features inception --steps 100 "
    "--images 50000 --batch-size 500 --out runs/cifar10/qat.csv",
]
# As its config says, but for 128, 256, 256, 256 channels, two layers a block and 32 groups.
CONFIG = dict(
    sample_size=32, in_channels=3, out_channels=3, act_fn="silu", block_out_channels=(4, 8, 8, 8), layers_per_block=1,
    norm_num_groups=4, norm_eps=1e-6, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


class FewFeatures(nn.Module):
    """Stands for Inception, whose weights are not at hand: the means of quarters of a picture."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 10)

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def scores(self, features):
        return self.head(features)


@pytest.fixture
def model(tmp_path):
    """The pipeline, its files at the top as they lie on the hub."""
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(**CONFIG), DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder := tmp_path / "ddpm")
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    return folder


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """What a download brings: a small archive that passes for the official one."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for i, stem in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
            rows = np.random.default_rng(i).integers(0, 10, (20 if i == 0 else 4, 3073), dtype=np.uint8) * 25
            rows[:, 0] //= 25
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{stem}.bin")
            entry.size = rows.size
            tar.addfile(entry, io.BytesIO(rows.tobytes()))
    monkeypatch.setattr("urllib.request.urlretrieve", lambda url, path: path.write_bytes(out.getvalue()))
    monkeypatch.setattr(datasets, "CIFAR_MD5", hashlib.md5(out.getvalue()).hexdigest())
    monkeypatch.setenv("TDQ_CACHE", str(tmp_path / "downloads"))


def fitted(model):
    """Options of calibration: what is fitted is hardly so."""
    return dict(iterations=3) if model.quantization.method in ("learned", "tdq") else {}


@pytest.fixture
def quick(monkeypatch):
    """Few features, few methods, calibrated on few images."""
    for cached in (fid.feature_extractor, fid.reference_features, fid._reference_statistics):
        cached.cache_clear()
    monkeypatch.setitem(fid.FEATURES, "inception", FewFeatures)
    monkeypatch.setattr(ptq, "METHODS", ("minmax", "tdq"))
    for where in (ptq, finetuning):
        original = where.calibrate
        hardly = lambda *args, original=original, **how: original(*args, **how, **fitted(args[0]))  # noqa: E731
        monkeypatch.setattr(where, "calibrate", hardly)
    monkeypatch.setattr(ptq, "CALIBRATION", 2)
    monkeypatch.setattr(qat, "UNTRAINED", ("minmax",))
    monkeypatch.setattr(qat, "METHODS", ("lsq", "tdq"))
    yield
    for cached in (fid.feature_extractor, fid.reference_features, fid._reference_statistics):
        cached.cache_clear()


@pytest.mark.usefixtures("quick", "downloaded")
@pytest.mark.parametrize("command", COMMANDS, ids=["ptq", "qat"])
def test_the_commands_of_the_papers_setting(command, model, tmp_path, monkeypatch, capsys):
    """The same commands; a small model, few steps and images, and less of the table."""
    monkeypatch.chdir(tmp_path)
    given = command.replace("google/ddpm-cifar10-32", str(model)).replace("--steps 100", "--steps 2")
    given = given.replace("--images 50000 --batch-size 500", "--images 16 --batch-size 8") + " --quick"
    given += " --iterations 2" if " qat " in given else ""
    assert main(shlex.split(given)) == 0, capsys.readouterr().err
    out = Path(parser().parse_args(shlex.split(command)).out)
    table = pd.read_csv(tmp_path / out)
    assert set(table.data) == {"cifar10"} and set(table.features) == {"inception"} and set(table.prediction) == {"epsilon"}
    assert set(table.sampler) == {"DDIM"} and set(table.images) == {16} and set(table.steps) == {2}
    assert table.fid.notna().all() and (table.fid > 0).all() and table.fid.nunique() == len(table)
    assert {"full precision", "real images"} < set(table.method)
    if " qat " in given:
        assert table.loss.notna().sum() == 2
        folder = next((tmp_path / "runs/cifar10/cache").glob("*/*-lsq-*"))
        assert load_quantized(folder / "model").config.in_channels == 3
        assert set(pd.read_csv(tmp_path / "runs/cifar10/qat_loss.csv").method) == {"lsq", "tdq"}
    assert main(shlex.split(given)) == 0  # nothing is left to measure
    assert pd.read_csv(tmp_path / out).equals(table)


def test_the_readme_gives_the_commands():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    found = [
        re.sub(r"\s*\\\n\s*", " ", line) for line in re.findall(r"-m tdq_utils (reproduce (?:[^`\n]|\\\n)*cifar10[^`\n]*)", text)
    ]
    assert not found or found == COMMANDS


@pytest.mark.usefixtures("downloaded")
def test_images_of_another_size_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(fid.FEATURES, "inception", FewFeatures)
    fid.feature_extractor.cache_clear()
    command = ["reproduce", "ptq", "--data", "cifar10", "--download", "--features", "inception", "--out", str(tmp_path / "t.csv")]
    assert main([*command, "--images", "20"]) == 2
    assert "cifar10 has (3, 32, 32), the model makes (1, 28, 28). Pass --data" in capsys.readouterr().err
    assert not (tmp_path / "t.csv").exists() and not (tmp_path / "cache").exists()
    fid.feature_extractor.cache_clear()


@pytest.mark.usefixtures("quick", "downloaded")
@pytest.mark.parametrize("table", ["ptq", "qat"])
def test_a_guided_transformer_of_flow_matching_in_half_precision(table, tmp_path):
    """Conditions, guidance, dtype and another scheduler, through the same commands; trained on images with their classes."""
    sizes = dict(sample_size=32, in_channels=3, out_channels=3, patch_size=8, num_layers=1, norm_num_groups=1)
    dit = DiTTransformer2DModel(**sizes, num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=10)
    dit.save_pretrained(tmp_path / "dit" / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "dit" / "scheduler")
    command = f"reproduce {table} --quick --model {tmp_path / 'dit'} --data cifar10 --download --features inception --steps 2 "
    command += f"--images 16 --batch-size 8 --guidance 2 --dtype bfloat16 --out {tmp_path / 't.csv'}"
    assert main(shlex.split(command + (" --iterations 2" if table == "qat" else ""))) == 0
    rows = pd.read_csv(tmp_path / "t.csv")
    assert rows.fid.notna().all() and {*rows.dtype} == {"bfloat16"} and {*rows.classes} == {10} and {*rows.guidance} == {2}
    assert {*rows.prediction} == {"flow"} and {*rows.sampler} == {"FlowMatchEulerDiscrete"}
    assert main(shlex.split(command.replace("--guidance 2", "--guidance 3"))) == 2
