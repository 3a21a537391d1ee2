"""Loading a denoiser and its scheduler: the catalogue, folders of any layout, the hub without network; other schedulers."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from tdq_utils import load_model, sample
from tdq_utils.denoiser.loading import matches_flow, scheduler_like
from tdq_utils.errors import DataError, TDQError


@pytest.fixture
def folder(unet, tmp_path):
    """``unet`` as a pipeline, with a scheduler that starts at t = 980."""
    DDIMPipeline(unet, DDIMScheduler(beta_end=0.03, timestep_spacing="leading")).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def equal(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_folder_that_diffusers_saved(unet, folder):
    model, scheduler = load_model(str(folder), device="cpu")
    assert type(model) is UNet2DModel and not model.training
    assert equal(model, unet) and not any(p.requires_grad for p in model.parameters())
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert type(scheduler) is DDIMScheduler  # the model's own, as it is
    assert (scheduler.config.timestep_spacing, scheduler.config.beta_end) == ("leading", 0.03)


def test_the_shipped_scheduler_starts_at_pure_noise():
    _, scheduler = load_model("fashion-mnist", device="cpu")
    assert type(scheduler) is DDIMScheduler and scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("layout", ["no index", "flat", "flat, scheduler apart"])
def test_folders_without_a_pipeline_around_them(unet, folder, layout):
    """As scripts of training leave them, and as google/ddpm-cifar10-32 lies on the hub."""
    (folder / "model_index.json").unlink()
    if "flat" in layout:
        shutil.copytree(folder / "unet", folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "unet")
    if layout == "flat":
        shutil.move(folder / "scheduler" / "scheduler_config.json", folder)
    model, scheduler = load_model(folder, device="cpu")
    assert equal(model, unet) and scheduler.config.beta_end == 0.03


@pytest.mark.parametrize("own", [FlowMatchEulerDiscreteScheduler(shift=3.0), DDPMScheduler(variance_type="learned_range")])
def test_a_transformer_without_its_autoencoder(denoiser, tmp_path, own):
    """Any kind of model; the rest of its pipeline is neither needed nor read."""
    model, _ = denoiser
    model.save_pretrained(tmp_path / ("unet" if "UNet" in type(model).__name__ else "transformer"))
    own.save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", type(own).__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded, scheduler = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert type(loaded) is type(model) and type(scheduler) is type(own) and equal(loaded, model.bfloat16())
    assert dict(scheduler.config).items() >= {k: v for k, v in own.config.items() if k in ("shift", "variance_type")}.items()


def test_video_keeps_its_five_axes(tmp_path):
    sizes = dict(num_attention_heads=1, attention_head_dim=12, in_channels=2, out_channels=2, text_dim=4, freq_dim=4, ffn_dim=4)
    model = diffusers.WanTransformer3DModel(**sizes, num_layers=1)
    model.save_pretrained(tmp_path / "transformer")
    diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").save_pretrained(
        tmp_path / "scheduler"
    )
    loaded, scheduler = load_model(tmp_path, device="cpu")
    assert equal(loaded, model) and matches_flow(scheduler)


@pytest.mark.parametrize("name", ["ddim", "DDIM", "DDIMScheduler"])
def test_another_scheduler_from_the_configuration_of_its_own(folder, name):
    own = DDPMScheduler(beta_end=0.03, prediction_type="v_prediction", timestep_spacing="leading")
    own.save_pretrained(folder / "scheduler")
    scheduler = load_model(folder, device="cpu", scheduler=name)[1]
    assert type(scheduler) is DDIMScheduler
    assert (scheduler.config.beta_end, scheduler.config.prediction_type) == (0.03, "v_prediction")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


FLOW, EPSILON = FlowMatchEulerDiscreteScheduler(), DDIMScheduler()
UNIPC = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
ZERO_SNR = DDIMScheduler(rescale_betas_zero_snr=True)


@pytest.mark.parametrize(("own", "name"), [
    (EPSILON, "HeunDiscrete"), (EPSILON, "unipcmultistep"), (FLOW, "FlowMatchHeunDiscrete"), (UNIPC, "FlowMatchEulerDiscrete"),
    (FLOW, "flowmatcheulerdiscrete"), (UNIPC, "dpmsolvermultistep"), (ZERO_SNR, "ddpm"),
])  # fmt: skip
def test_schedulers_that_fit(own, name):
    assert matches_flow(scheduler_like(own, name)) == matches_flow(own)


@pytest.mark.parametrize(("own", "name"), [
    (FLOW, "ddim"), (UNIPC, "ddim"), (EPSILON, "FlowMatchEulerDiscrete"), (EPSILON, "EDMEuler"), (ZERO_SNR, "pndm"),
])  # fmt: skip
def test_a_scheduler_of_other_noise_is_refused(own, name):
    with pytest.raises(TDQError, match=rf"(?i)trained with, that of its {type(own).__name__}; got {name}\w*\. Leave it out"):
        scheduler_like(own, name)


def test_an_unknown_scheduler_is_refused(folder):
    with pytest.raises(TDQError, match="must name a scheduler of diffusers, such as 'ddim'; got 'dim'"):
        load_model(folder, scheduler="dim")


@pytest.mark.parametrize("name", ["imagenet", "/no/such/folder", "some/deep/folder"])
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(DataError, match=f"one of fashion-mnist, an existing folder .*hub id.*got '{name}'"):
        load_model(name)


@pytest.mark.parametrize("there", ["", "unet", "scheduler"])
def test_a_folder_that_lacks_a_part_says_what_to_save(folder, tmp_path, there):
    shutil.copytree(folder / there, tmp_path / "part" / there) if there else (tmp_path / "part").mkdir()
    lacking = "scheduler" if there == "unet" else "denoiser"
    with pytest.raises(DataError, match=rf"its scheduler/; its {lacking} cannot be read: no .*\.json in .*pipe\.save_pretrained"):
        load_model(tmp_path / "part")


def test_two_denoisers_are_not_taken_for_one(folder):
    (folder / "transformer_2").mkdir()
    with pytest.raises(DataError, match="has two that share a trajectory. Load its pipeline"):
        load_model(folder)


def test_a_model_of_no_class_of_diffusers(folder):
    (folder / "unet" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(DataError, match=r"denoiser of .* must be of a class of diffusers; its config\.json names None"):
        load_model(folder)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("file", [WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_files(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{folder} must hold a model in diffusers' layout"):
        load_model(folder)


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    def refuse(source, **options):
        assert source == "google/ddpm-cifar10-32" and not options.get("local_files_only")
        raise OSError("no route to host")

    monkeypatch.setattr(UNet2DModel, "load_config", refuse)
    with pytest.raises(
        DataError, match=r"'google/ddpm-cifar10-32'.*no route.*Connect to the network.*pass a folder.*fashion-mnist"
    ):
        load_model("google/ddpm-cifar10-32")


def test_a_hub_id_is_read_from_where_its_files_lie(unet, folder, monkeypatch):
    """At the top, as those of google/ddpm-cifar10-32: no subfolder is named when the weights are fetched."""
    asked, load_config = [], UNet2DModel.load_config

    def config(source, subfolder=None, **options):
        asked.append(subfolder)
        if subfolder:
            raise OSError("no such file")
        return load_config(folder / "unet")

    monkeypatch.setattr(UNet2DModel, "load_config", config)
    fetched = lambda source, subfolder, **options: asked.append((source, subfolder)) or unet  # noqa: E731
    monkeypatch.setattr(UNet2DModel, "from_pretrained", fetched)
    monkeypatch.setattr(DDIMScheduler, "load_config", lambda *args, **options: {"_class_name": "DDPMScheduler"})
    monkeypatch.setattr(DDPMScheduler, "from_pretrained", lambda *args, **options: DDPMScheduler())
    assert type(load_model("owner/name", device="cpu")[1]) is DDPMScheduler
    assert asked == ["unet", "transformer", None, ("owner/name", None)]


def test_shipped_model_draws_pictures():
    """Smooth shapes on a black ground, each different: what random weights cannot do."""
    model, scheduler = load_model("fashion-mnist", device="cpu")
    images = sample(model, scheduler, seeds=range(8), steps=10, progress=False)
    assert images.shape == (8, 1, 28, 28)
    neighbours = torch.stack([images[..., :-1].flatten(), images[..., 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1] > 0.7
    assert images[..., 0].mean() < -0.7 < -0.4 < images[..., 14].mean()
    assert images.std(0).mean() > 0.2
