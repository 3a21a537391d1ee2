"""Temporal Dynamic Quantization of diffusion models: profile, quantize, calibrate, compare."""

from tdq_utils.calibration import calibrate
from tdq_utils.datasets import load_images
from tdq_utils.models import load_model
from tdq_utils.profiling import Profile, profile_activations
from tdq_utils.quantize import freeze, quantize, restore
from tdq_utils.sampling import sample
from tdq_utils.storage import load_quantized, save_quantized

__all__ = [
    "Profile",
    "calibrate",
    "freeze",
    "load_images",
    "load_model",
    "load_quantized",
    "profile_activations",
    "quantize",
    "restore",
    "sample",
    "save_quantized",
]
