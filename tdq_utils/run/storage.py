"""A quantized model as a folder: safetensors for the numbers, JSON for the settings."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.quantize import activation_quantizers, checked_state, quantize, quantized_layers, round_weights
from tdq_utils.method.generator import FourierFeatures, RawTime, StepGenerator
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import DynamicStep, LearnedStep, StaticStep, TableStep

FORMAT = 1
KINDS = {kind.__name__: kind for kind in (StaticStep, LearnedStep, DynamicStep, TableStep, StepGenerator)}


def save_quantized(model: Any, folder: str | Path, packed: bool = False) -> None:
    """Write a quantized model, calibrated or not, frozen or not, so that it round-trips exactly.

    A model that the folder holds already stays whole until the new one is: the JSON names its tensors and is replaced last.

    Args:
        model: quantized in place by :func:`tdq_utils.fit.quantize.quantize`.
        folder: gets ``quantization.json`` and ``model-....safetensors``.
        packed: keep of the quantized weights only their levels: one byte each, or two in a byte from 4 bits down. The model that
            comes back gives the same outputs; the weights before rounding are gone. TDQError: weights are not quantized.
    """
    state = checked_state(model)
    if packed and state.weights is None:
        raise TDQError("packed needs weights on a grid; this model's are in full precision. Quantize them, or pass packed=False.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = dict(
        format=FORMAT, model=type(model).__name__, config={k: v for k, v in model.config.items() if not k.startswith("_")},
        weights=state.weights, activations=state.activations, method=state.method, weights_per=state.weights_per,
        keep=state.kept, visited=state.visited, frozen=state.frozen,
        # Convolutions in another memory format sum in another order.
        channels_last=any(p.dim() == 4 and not p.is_contiguous() for p in model.parameters()),
        split_skips=state.split_skips, packed=packed,
        layers={name: _describe(quantizer) for name, quantizer in activation_quantizers(model).items()})  # fmt: skip
    # Rounded weights of a frozen model follow from the weights and their steps: not stored twice. Tied ones are stored twice.
    tensors = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items() if not k.endswith(".rounded")}
    if packed:
        for name, layer in quantized_layers(model).items():
            del tensors[f"{name}.weight"]
            tensors.pop(f"{name}.levels", None)
            tensors[f"{name}.packed"] = pack(layer.weight_levels(), state.weights or 8)
    data = save(tensors)
    settings["sha256"] = hashlib.sha256(data).hexdigest()
    settings["tensors"] = f"model-{settings['sha256'][:12]}.safetensors"
    for name, content in ((settings["tensors"], data), ("quantization.json", json.dumps(settings, indent=1).encode() + b"\n")):
        (folder / f"{name}.part").write_bytes(content)
        (folder / f"{name}.part").replace(folder / name)
    for other in folder.glob("model*.safetensors"):
        if other.name != settings["tensors"]:
            other.unlink()


def load_quantized(folder: str | Path) -> nn.Module:
    """Read a model that :func:`save_quantized` wrote; on the CPU, in eval mode.

    DataError: a missing or damaged file, a newer format, or weights that are not those the settings were saved with.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "quantization.json").read_text())
        if settings["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {settings['format']}; save it with this version")
        name = settings.get("tensors", "model.safetensors")
        data = (folder / Path(name).name).read_bytes()
        if (digest := hashlib.sha256(data).hexdigest()) != settings["sha256"]:
            raise ValueError(f"sha256 of {name} must be {settings['sha256']}, got {digest}; copy both files again")
        return _build(settings, load(data))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        rule = "must hold quantization.json and the tensors it names, as save_quantized writes them"
        raise DataError(f"{folder} {rule}: {error!r}") from error


def pack(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer levels, int8 of any shape, as bytes: as they are, or uint8 ``"bytes"`` of two each where ``bits`` (2 to 8) of the
    grid are at most 4, as ``(a + 8) + 16 (b + 8)``."""
    if bits > 4:
        return levels.contiguous()
    flat = torch.nn.functional.pad((levels.flatten() + 8).to(torch.uint8), (0, levels.numel() % 2))
    return flat[::2] + 16 * flat[1::2]


def unpack(values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of :func:`pack`: int8 levels of this shape."""
    if values.dtype == torch.int8:
        return values
    flat = torch.stack([values % 16, values // 16], dim=1).flatten()[: shape.numel()]
    return (flat.to(torch.int8) - 8).view(shape)


def _build(settings, tensors):
    """The quantized model that the contents of the two files describe."""
    import diffusers  # slow to import

    model = getattr(diffusers, settings["model"]).from_config(settings["config"]).eval().requires_grad_(False)
    model.to(memory_format=torch.channels_last if settings["channels_last"] else torch.contiguous_format)
    how = {k: settings[k] for k in ("weights", "activations", "method", "weights_per", "split_skips")}
    quantize(model, **how, keep=list(settings["keep"]), search=False)
    if isinstance(settings["keep"], dict):  # with the reasons
        model.quantization.kept = settings["keep"]
    model.quantization.visited = settings.get("visited", [])
    for name, layer in quantized_layers(model).items():
        if settings.get("packed"):
            tensors[f"{name}.levels"] = unpack(tensors.pop(f"{name}.packed"), layer.weight.shape)
            layer.weight_step = tensors[f"{name}.weight_step"]
            layer.levels = tensors[f"{name}.levels"]
            tensors[f"{name}.weight"] = layer.levels * layer.spread_weight_step()
        layer.levels = tensors.get(f"{name}.levels")
    places = {module: place for place, module in model.named_modules()}
    for name, quantizer in activation_quantizers(model).items():
        _rebuild(quantizer, settings["layers"][name], tensors, places[quantizer])
    model.load_state_dict(tensors)
    if settings["frozen"]:
        round_weights(model)
    return model


def _describe(quantizer):
    """JSON for an activation quantizer: its grid, and the kind and shape of its step source."""
    grid, step = quantizer.grid, quantizer.step
    shape = grid and dict(bits=grid.bits, low=grid.low)
    return dict(grid=shape, step=None if step is None else dict(kind=type(step).__name__, **step.settings()))


def _rebuild(quantizer, description, tensors, place):
    """Give a quantizer a grid and a step source of the described kind, still without its values."""
    quantizer.grid = description["grid"] and Grid(**description["grid"])
    settings = dict(description["step"] or {})
    kind = settings.pop("kind", None)
    if kind == "TableStep":
        settings = {name: tensors[f"{place}.step.{name}"] for name in "ts"}
    if kind == "StepGenerator":
        width = settings.pop("width")
        settings["features"] = RawTime() if width == 1 else FourierFeatures(width)
    quantizer.step = None if kind is None else KINDS[kind](**settings).eval()
