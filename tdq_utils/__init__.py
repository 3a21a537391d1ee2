"""Temporal Dynamic Quantization of diffusion models: profile, quantize, calibrate, compare."""
# ruff: noqa: F401

import importlib
from typing import Any

from tdq_utils.denoiser.loading import load_model
from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.record import record
from tdq_utils.denoiser.recording import profile_activations
from tdq_utils.denoiser.sampling import noise, sample, timesteps
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.balancing import sampled_inputs
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.choice import kept_layers
from tdq_utils.fit.decomposition import decompose
from tdq_utils.fit.finetuning import finetune
from tdq_utils.fit.methods import METHODS, NEIGHBOURS
from tdq_utils.fit.precision import Precisions
from tdq_utils.fit.quantize import activation_quantizers, freeze, full_precision, quantize, quantized_layers, restore
from tdq_utils.fit.temporal_cache import cache_temporal
from tdq_utils.fit.temporal_features import quantize_temporal, temporal_errors
from tdq_utils.method.balance import balance
from tdq_utils.method.generator import FourierFeatures, RawTime, StepGenerator
from tdq_utils.method.grid import Grid, fake_quantize, mse_step, squared_error
from tdq_utils.method.rules import RULES
from tdq_utils.method.step_sizes import StaticStep
from tdq_utils.run import plugin
from tdq_utils.run.integer import to_integer
from tdq_utils.run.storage import load_quantized, save_quantized

# What needs torchmetrics, onnx, matplotlib or pandas is imported when it is first used: name, or name:module, by wing.
_HEAVY = {
    "lab": "bench compare:tables.quickstart fid layer_sensitivity:sensitivity load_images:datasets reproduce tables",
    "run": "TDQConfig:hosting onnx",
    "show": "NAMES:tables channel_plots headline:tables plots profile_plots report:report result_plots significant:tables "
    "styled:tables widgets",
}
_HOMES = {name: (wing, *home) for wing, names in _HEAVY.items() for name, *home in (entry.split(":") for entry in names.split())}
_IMPORTED = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__)]
__all__ = ["METHODS", "NEIGHBOURS", "RULES", *_IMPORTED, *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tdq_utils' has no attribute {name!r}")
    wing, *home = _HOMES[name]
    try:
        module = importlib.import_module(".".join(["tdq_utils", wing, *(home or [name])]))
    except ModuleNotFoundError as error:  # an extra is not installed
        raise TDQError(f"tdq_utils.{name} needs the package {error.name}, which is not installed. Run pip install "
                       f"'tdq-utils[{'onnx' if name == 'onnx' else wing}]'.") from error  # fmt: skip
    return getattr(module, name) if home else module


def __dir__() -> list[str]:
    return sorted(__all__)
