"""The denoisers of the zoo in their own pipelines of diffusers: prompts come embedded, so no text encoder is needed."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from denoisers import ZOO, Denoiser
from torch import nn

STEPS = 3
WITHOUT_TRANSFORMERS = {"DDIMPipeline", "DiTPipeline", "DanceDiffusionPipeline"}  # the others import it


@dataclass(frozen=True)
class Hosted:
    """A family in its pipeline.

    Attributes:
        family: key of ``ZOO``. pipeline: class in diffusers. call: arguments beside steps and generator; in a function, so
            that each run has its own. scheduler: makes one. unit: from a time step of the scheduler to what the model is told.
        calls: of the model in a step. parts: makes further parts of the pipeline. changed: in the denoiser's config.
        out: name of the pipeline's output.
    """

    family: str
    pipeline: str
    call: Callable[[], dict[str, Any]]
    scheduler: Callable[[], Any]
    unit: Callable[[float], float] = float
    calls: int = 1
    parts: Callable[[], dict[str, Any]] = dict
    changed: dict[str, Any] = field(default_factory=dict)
    out: str = "images"

    @property
    def denoiser(self) -> Denoiser:
        return ZOO[self.family]

    def build(self, scheduler=None):
        """``(pipeline, its denoiser)``; the same weights at every call."""
        kind, given = getattr(diffusers, self.pipeline), self.parts()
        slots = inspect.signature(kind.__init__).parameters
        part = "unet" if "unet" in slots else "transformer"
        model = self.denoiser.build(**self.changed)
        for value in given.values():
            if isinstance(value, nn.Module):
                value.eval().requires_grad_(False)
        missing = {n: None for n, slot in slots.items() if n != "self" and slot.default is slot.empty}
        pipe = kind(**missing | given | {part: model, "scheduler": scheduler or self.scheduler()})
        pipe.set_progress_bar_config(disable=True)
        return pipe, model

    def run(self, pipe, steps=STEPS):
        """What the pipeline makes of fixed prompts and seeds: latents, or pictures."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            call = _cast(self.call(), pipe.dtype)
        made = getattr(pipe(**call, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)), self.out)
        return torch.stack([torch.as_tensor(image) for image in made])


def _cast(tree, dtype):
    """What a user of a pipeline in half precision passes: embeddings of that precision."""
    if isinstance(tree, dict):
        return {key: _cast(value, dtype) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_cast(value, dtype) for value in tree]
    return tree.to(dtype) if isinstance(tree, torch.Tensor) and tree.is_floating_point() else tree


def vae(kind="AutoencoderKL", channels=4):
    """A tiny one that makes each latent a pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, kind)(
            block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), latent_channels=channels)  # fmt: skip


class Eye(diffusers.ModelMixin):
    """Stands for the image encoder of Stable Video Diffusion."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 12))

    def forward(self, image):
        return SimpleNamespace(image_embeds=image.mean((1, 2, 3))[:, None] * self.scale)


def see(images, **_):
    """Stands for its feature extractor."""
    return SimpleNamespace(pixel_values=images)


def flow(**config):
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**config)


def texts(negative=True, mask="", **pooled):
    """Embeddings of two prompts; with them masks and pooled embeddings, by the names that the pipeline has for them."""
    found = {}
    for sign in ("", "negative_") if negative else ("",):
        found[f"{sign}prompt_embeds"] = torch.randn(2, 5, 12)
        found |= {f"{sign}{name}": torch.randn(2, width) for name, width in pooled.items()}
        found |= {f"{sign}{mask}": torch.ones(2, 5, dtype=torch.bool)} if mask else {}
    return found


SIZE, LATENT = dict(height=64, width=64), dict(output_type="latent")
PICTURE = SIZE | LATENT
by_1000 = lambda t: t / 1000  # noqa: E731
from_noise = lambda t: 1 - t / 1000  # noqa: E731

HOSTED = {
    "UNet2D": Hosted(
        "UNet2D, additive", "DDIMPipeline", lambda: dict(batch_size=2, output_type="pt"), lambda: diffusers.DDIMScheduler(),
    ),
    "DiT": Hosted(
        "DiT", "DiTPipeline", lambda: dict(class_labels=[1, 2], guidance_scale=2.0, output_type="np"),
        lambda: diffusers.DDIMScheduler(), parts=lambda: dict(vae=vae(channels=2)),
        changed=dict(num_embeds_ada_norm=1000),  # the pipeline's label for "no class" is 1000
    ),
    "UNet1D": Hosted(
        "UNet1D", "DanceDiffusionPipeline", lambda: dict(batch_size=2, audio_length_in_s=1.0),
        lambda: diffusers.IPNDMScheduler(), changed=dict(sample_rate=16), out="audios",
    ),
    "Stable Diffusion": Hosted(
        "Stable Diffusion", "StableDiffusionPipeline",
        lambda: texts() | dict(guidance_scale=3.0, output_type="pt", height=8, width=8),
        lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        parts=lambda: dict(vae=vae(), requires_safety_checker=False),
    ),
    "SDXL": Hosted(
        "SDXL", "StableDiffusionXLPipeline", lambda: texts(pooled_prompt_embeds=12) | PICTURE,
        lambda: diffusers.EulerDiscreteScheduler(steps_offset=1),
    ),
    "PixArt": Hosted(
        "PixArt", "PixArtAlphaPipeline",
        lambda: texts(mask="prompt_attention_mask") | PICTURE | dict(negative_prompt=None, use_resolution_binning=False),
        lambda: diffusers.DPMSolverMultistepScheduler(),
    ),
    "SD 3": Hosted(
        "SD 3", "StableDiffusion3Pipeline", lambda: texts(pooled_prompt_embeds=10) | PICTURE, flow(shift=3.0),
    ),
    "Flux": Hosted(
        "Flux", "FluxPipeline", lambda: texts(negative=False, pooled_prompt_embeds=10) | PICTURE,
        flow(use_dynamic_shifting=True), by_1000,
    ),
    "Flux 2": Hosted(
        "Flux 2", "Flux2Pipeline", lambda: texts(negative=False) | PICTURE, flow(use_dynamic_shifting=True), by_1000,
    ),
    "Qwen-Image": Hosted(
        "Qwen-Image", "QwenImagePipeline", lambda: texts(mask="prompt_embeds_mask") | PICTURE | dict(true_cfg_scale=3.0),
        flow(use_dynamic_shifting=True), by_1000, calls=2,
    ),
    "Z-Image": Hosted(
        "Z-Image", "ZImagePipeline",
        lambda: {name: list(value) for name, value in texts().items()} | PICTURE, flow(shift=3.0), from_noise,
    ),
    "Lumina 2": Hosted(
        "Lumina 2", "Lumina2Pipeline", lambda: texts(mask="prompt_attention_mask") | PICTURE, flow(shift=6.0), from_noise,
        calls=2,
    ),
    "Sana": Hosted(
        "Sana", "SanaPipeline",
        lambda: texts(mask="prompt_attention_mask") | LATENT
        | dict(negative_prompt=None, height=256, width=256, use_resolution_binning=False),
        flow(shift=3.0),
    ),
    "AuraFlow": Hosted(
        "AuraFlow", "AuraFlowPipeline", lambda: texts(mask="prompt_attention_mask") | PICTURE, flow(shift=1.73), by_1000,
    ),
    "Wan": Hosted(
        "Wan", "WanPipeline", lambda: texts() | PICTURE | dict(num_frames=5), flow(shift=3.0), calls=2, out="frames",
    ),
    "Wan, t of tokens": Hosted(
        "Wan", "WanPipeline", lambda: texts() | PICTURE | dict(num_frames=5), flow(shift=3.0), calls=2, out="frames",
        parts=lambda: dict(expand_timesteps=True),
    ),
    "LTX": Hosted(
        "LTX", "LTXPipeline", lambda: texts(mask="prompt_attention_mask") | PICTURE | dict(num_frames=9), flow(), out="frames",
    ),
    "HunyuanVideo": Hosted(
        "HunyuanVideo", "HunyuanVideoPipeline",
        lambda: texts(negative=False, mask="prompt_attention_mask", pooled_prompt_embeds=8) | PICTURE | dict(num_frames=1),
        flow(shift=7.0), out="frames",
    ),
    "UNet3D": Hosted(
        "UNet3D", "TextToVideoSDPipeline", lambda: texts() | PICTURE | dict(num_frames=3),
        lambda: diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), out="frames",
    ),
    "SVD": Hosted(
        "SVD", "StableVideoDiffusionPipeline",
        lambda: dict(image=torch.rand(1, 3, 8, 8), height=8, width=8, num_frames=3, **LATENT),
        lambda: diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", timestep_spacing="leading", use_karras_sigmas=True,
            sigma_min=0.002, sigma_max=700.0,
        ),
        parts=lambda: dict(vae=vae("AutoencoderKLTemporalDecoder"), image_encoder=Eye(), feature_extractor=see), out="frames",
    ),
}  # fmt: skip
