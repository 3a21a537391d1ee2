"""Loading a denoiser and its scheduler: the catalogue, folders, the hub without network."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

from tdq_utils import load_model, sample
from tdq_utils.errors import DataError


@pytest.fixture
def folder(unet, tmp_path):
    """``unet`` as a pipeline, with a scheduler that would start at t = 980."""
    DDIMPipeline(unet, DDIMScheduler(beta_end=0.03, timestep_spacing="leading")).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_folder_that_diffusers_saved(unet, folder):
    model, scheduler = load_model(str(folder), device="cpu")
    assert type(model) is UNet2DModel and not model.training
    assert all(torch.equal(p, q) and not p.requires_grad for p, q in zip(model.parameters(), unet.parameters(), strict=True))
    assert type(scheduler) is DDIMScheduler
    assert (scheduler.config.timestep_spacing, scheduler.config.beta_end) == ("trailing", 0.03)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("name", ["imagenet", "/no/such/folder", "some/deep/folder"])
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(DataError, match=f"one of fashion-mnist, an existing folder .*hub id.*got '{name}'"):
        load_model(name)


def test_folder_without_a_pipeline(tmp_path):
    with pytest.raises(DataError, match="must hold a diffusers pipeline"):
        load_model(tmp_path)


def test_damaged_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=f"{folder} must hold a diffusers pipeline"):
        load_model(folder)


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    def refuse(source, **options):
        assert source == "google/ddpm-cifar10-32" and not options.get("local_files_only")
        raise OSError("no route to host")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(
        DataError, match=r"'google/ddpm-cifar10-32'.*no route.*Connect to the network.*pass a folder.*fashion-mnist"
    ):
        load_model("google/ddpm-cifar10-32")


def test_pipeline_without_a_denoiser(monkeypatch, folder):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *args, **options: object())
    with pytest.raises(DataError, match="'unet' or a 'transformer'; got object"):
        load_model(folder)


def test_shipped_model_draws_pictures():
    """Smooth shapes on a black ground, each different: what random weights cannot do."""
    model, scheduler = load_model("fashion-mnist", device="cpu")
    images = sample(model, scheduler, seeds=range(8), steps=10, progress=False)
    assert images.shape == (8, 1, 28, 28)
    neighbours = torch.stack([images[..., :-1].flatten(), images[..., 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1] > 0.7
    assert images[..., 0].mean() < -0.7 < -0.4 < images[..., 14].mean()
    assert images.std(0).mean() > 0.2
