"""Tiny random models, the same in every test, and profiles of them."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

from tdq_utils import Profile, calibrate, profile_activations, quantize
from tdq_utils.denoiser.recording import Histogram

CONFIGS = {
    UNet2DModel: {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (8, 16),
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "resnet_time_scale_shift": "scale_shift",
    },
    UNet2DConditionModel: {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (8,),
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    },
    DiTTransformer2DModel: {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 4,  # noise and variance
        "patch_size": 2,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "norm_num_groups": 2,
        "num_embeds_ada_norm": 10,
    },
}
STEPS = 4  # of the profile: t = 999, 749, 499, 249

torch.set_num_threads(1)  # models this small gain nothing from more, and wait for them on a busy machine


def build(kind):
    """A random model of this kind, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**CONFIGS[kind]).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny():
    """``tiny(kind)``: a random model of this kind, for what outlives a test."""
    return build


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture
def unet():
    """A UNet2DModel with scale-shift conditioning and attention, called as ``unet(sample, t)``."""
    return build(UNet2DModel)


@pytest.fixture
def text_unet():
    """A UNet2DConditionModel with attention to text, called as ``text_unet(sample, t, text)``."""
    return build(UNet2DConditionModel)


@pytest.fixture(params=CONFIGS, ids=lambda kind: kind.__name__)
def denoiser(request):
    """Each kind of model in turn, with the further arguments that it needs for three samples: ``(model, condition)``."""
    conditions = {
        UNet2DModel: {},
        UNet2DConditionModel: {"encoder_hidden_states": torch.randn(3, 5, 12)},
        DiTTransformer2DModel: {"class_labels": torch.tensor([1, 2, 9])},
    }
    return build(request.param), conditions[request.param]


@pytest.fixture
def x():
    """Three samples for ``unet``."""
    return torch.randn(3, 1, 8, 8)


@pytest.fixture(scope="session")
def scheduler():
    """DDIM over 1000 time steps, from t = 999 down."""
    return DDIMScheduler(timestep_spacing="trailing")


@pytest.fixture(scope="session")
def profile(scheduler):
    """The profile of ``unet``: 8 images, 4 steps."""
    return profile_activations(build(UNet2DModel), scheduler, range(8), STEPS, progress=False)


@pytest.fixture
def calibrated(unet, scheduler, profile):
    """``calibrated(method)``: ``unet``, quantized and calibrated; step sizes that are fitted are hardly so."""

    def make(method, weights=8, activations=5):
        quantize(unet, weights, activations, method)
        options = {"iterations": 3} if method in ("learned", "tdq") else {}
        calibrate(unet, scheduler, profile=profile, progress=False, **options)
        return unet

    return make


@pytest.fixture
def drifting():
    """``drifting(layer=scales)``: profile of normal activations whose standard deviation at step i is ``scales[i]``."""

    def make(**layers):
        names, scales = list(layers), np.array(list(layers.values()), dtype=float)
        base = torch.randn(20_000).clamp(-4, 4)
        histograms = [[Histogram() for _ in row] for row in scales]
        for row, factors in zip(histograms, scales, strict=True):
            for histogram, factor in zip(row, factors, strict=True):
                histogram.add(base * factor, float(base.abs().max()) * factor)
        return Profile(
            layers=names,
            t=np.linspace(999, 0, scales.shape[1]).round().astype(int),
            least=float(base.min()) * scales,
            greatest=float(base.max()) * scales,
            mean=float(base.mean()) * scales,
            std=float(base.std()) * scales,
            counts=np.array([[histogram.counts for histogram in row] for row in histograms]),
            limit=np.array([[histogram.limit for histogram in row] for row in histograms]),
        )

    return make
