"""A quantized model as a folder: safetensors for the numbers, JSON for the settings."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tdq_utils.denoiser.files import check_inside, read_json
from tdq_utils.errors import DataError, TDQError, check_folder, checked_path
from tdq_utils.fit.layers import blank_balance
from tdq_utils.fit.quantize import activation_quantizers, checked_state, quantize, quantized_layers, round_weights
from tdq_utils.fit.temporal_cache import FeatureTable
from tdq_utils.fit.temporal_features import attach_temporal
from tdq_utils.method.generator import FourierFeatures, RawTime, StepGenerator
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import DynamicStep, LearnedStep, StaticStep, TableStep

FORMAT = 1
KINDS = {kind.__name__: kind for kind in (StaticStep, LearnedStep, DynamicStep, TableStep, StepGenerator)}
HOW = ("weights", "activations", "method", "weights_per", "split_skips", "balance")  # quantize takes them


def save_quantized(model: Any, folder: str | Path, packed: bool = False) -> None:
    """Write a quantized model, calibrated or not, frozen or not, so that it round-trips exactly.

    ``folder`` gets ``quantization.json`` and ``model-....safetensors``; one that it holds already stays whole until they are.
    ``packed``: keep of the quantized weights only their levels: one byte each, or two in a byte from 4 bits down. The model that
    comes back gives the same outputs; the weights before rounding are gone.

    TDQError: the weights, or the model, not quantized; a place that is no folder.
    """
    state, folder = checked_state(model), checked_path(folder)
    check_folder(folder)
    if packed and state.weights is None:
        raise TDQError("packed needs weights on a grid; this model's are in full precision. Quantize them, or pass packed=False.")
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    settings = describe(model) | dict(model=type(model).__name__, config=config, packed=packed)
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if not name.endswith(".rounded"):  # they follow from the weights and their steps
            place = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()  # tied ones are copied
            seen.add(place)
    if packed:
        for name, layer in quantized_layers(model).items():
            if layer.weight_grid is not None:
                del tensors[f"{name}.weight"]
                tensors.pop(f"{name}.levels", None)
                tensors[f"{name}.packed"] = pack(layer.weight_levels(), layer.weight_grid.bits)
    _write(folder, tensors, settings)


def describe(model: Any) -> dict[str, Any]:
    """JSON for how a model is quantized, less the tensors. TDQError: it is not."""
    state = checked_state(model)
    return {name: getattr(state, name) for name in (*HOW, "asked", "frozen", "visited")} | dict(
        format=FORMAT,
        keep=state.kept,
        balanced=any(layer.balance is not None for layer in quantized_layers(model).values()),  # measured by now
        temporal={name: [*how, quantized_layers(model)[name].cached is not None] for name, how in state.temporal.items()},
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        channels_last=any(p.dim() == 4 and not p.is_contiguous() for p in model.parameters()),  # decides in which order sums go
        layers={name: _describe(quantizer) for name, quantizer in activation_quantizers(model).items()},
    )


def _write(folder, tensors, settings):
    """Both files are written beside their places; the JSON, which names the tensors, is moved last."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".part-", dir=folder) as beside:
        written, described, old = Path(beside) / "tensors", Path(beside) / "json", _named(folder)
        save_file(tensors, written)
        settings["sha256"] = _sha256(written)
        settings["tensors"] = f"model-{settings['sha256'][:12]}.safetensors"
        described.write_text(json.dumps(settings, indent=1) + "\n")
        written.replace(folder / settings["tensors"])
        described.replace(folder / "quantization.json")
    for path in {folder / old, *folder.glob(f"model-{'[0-9a-f]' * 12}.safetensors")} - {folder, folder / settings["tensors"]}:
        path.unlink(missing_ok=True)


def _named(folder):
    """The file of tensors that the folder's JSON names; before it had a name of its own, it was model.safetensors."""
    try:
        settings = read_json(folder / "quantization.json")
        return Path(settings.get("tensors", "model.safetensors")).name if "sha256" in settings else ""
    except (OSError, ValueError, AttributeError, TypeError):
        return ""


def load_quantized(folder: str | Path) -> nn.Module:
    """Read a model that :func:`save_quantized` wrote; on the CPU, in eval mode. DataError: missing, damaged, newer or mixed."""
    folder = checked_path(folder)
    try:
        check_inside(folder, "quantization.json")
        settings = read_json(folder / "quantization.json")
        if settings["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {settings['format']}; save it with this version")
        check_inside(folder, name := _named(folder))
        if (digest := _sha256(folder / name)) != settings["sha256"]:
            raise ValueError(f"sha256 of {name} must be {settings['sha256']}, got {digest}; copy both files again")
        return _build(settings, load_file(folder / name))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} must hold a JSON and its tensors, as save_quantized writes them: {error!r}") from error


def pack(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels of a grid of 2 to 8 ``bits``, int8: as they are, or two in a byte if 4 bits hold them, ``(a + 8) + 16 (b + 8)``."""
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


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(settings, tensors):
    import diffusers  # slow to import
    from accelerate import init_empty_weights

    if not issubclass(kind := getattr(diffusers, settings["model"]), diffusers.ModelMixin):
        raise ValueError(f"model must be a class of models of diffusers, got {settings['model']}")
    with init_empty_weights():  # random ones would be thrown away
        model = kind.from_config(settings["config"]).eval().requires_grad_(False)
    claimed, there = (sum(v.numel() for v in values) for values in (model.parameters(), tensors.values()))
    if claimed > 2 * there:  # before there is memory for them; packed weights are two in a byte
        raise ValueError(f"the model must be that of the tensors, which hold {there} numbers; its config asks for {claimed}")
    model._apply(lambda v: torch.zeros_like(v, device="cpu") if v.is_meta else v)
    dtype = getattr(torch, settings.get("dtype", "float32"))
    layout = torch.channels_last if settings["channels_last"] else torch.contiguous_format
    nn.Module.to(model, dtype, memory_format=layout)  # diffusers' own warns of what the next lines do
    for name, parameter in model.named_parameters():  # some may have been kept in another
        parameter.data = parameter.data.to(tensors[name].dtype if name in tensors else dtype)
    rebuild(model, settings, tensors)
    if bool(settings.get("packed")) != any(name.endswith(".packed") for name in tensors):
        raise ValueError(f"packed must be what the tensors are, got {settings.get('packed')!r}")
    for name, layer in quantized_layers(model).items():
        if f"{name}.packed" in tensors:
            tensors[f"{name}.levels"] = unpack(tensors.pop(f"{name}.packed"), layer.weight.shape)
            layer.weight_step, layer.balance = tensors[f"{name}.weight_step"], tensors.get(f"{name}.balance")
            tensors[f"{name}.weight"] = tensors[f"{name}.levels"] * layer.spread_weight_step()
        layer.levels = tensors.get(f"{name}.levels")
    model.load_state_dict(tensors)
    if settings["frozen"]:
        round_weights(model)
    return model


def rebuild(model: Any, settings: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Quantize a model as :func:`describe` says, still without the values; of ``tensors``, tables take their length."""
    temporal = settings.get("temporal", {})
    how = {name: settings[name] for name in HOW if name in settings}
    quantize(model, **how, keep=[*settings["keep"], *temporal], search=False)
    model.quantization.kept |= settings["keep"] if isinstance(settings["keep"], dict) else {}  # with the reasons
    model.quantization.visited, model.quantization.asked = settings.get("visited", []), settings.get("asked", True)
    for layer in quantized_layers(model).values() if settings.get("balanced") else ():
        layer.balance = blank_balance(layer)
    for name, (bits, reason, cached) in temporal.items():
        attach_temporal(model, name, bits, reason, search=False)
        model.get_submodule(name).cached = FeatureTable(*(tensors[f"{name}.cached.{part}"] for part in "tsq")) if cached else None
    places = {module: place for place, module in model.named_modules()}
    for name, quantizer in activation_quantizers(model).items():
        _rebuild(quantizer, settings["layers"][name], tensors, places[quantizer])


def _describe(quantizer):
    """JSON for an activation quantizer: its grid, and the kind and shape of its step source."""
    step = quantizer.step and dict(kind=type(quantizer.step).__name__, **quantizer.step.settings())
    return dict(grid=quantizer.grid and vars(quantizer.grid), step=step)


def _rebuild(quantizer, description, tensors, place):
    """The inverse of :func:`_describe`, still without the values."""
    quantizer.grid, settings = description["grid"] and Grid(**description["grid"]), dict(description["step"] or {})
    kind = settings.pop("kind", None)
    if kind == "TableStep":
        settings = {name: tensors[f"{place}.step.{name}"] for name in ("t", "s", *settings)}
    if kind == "StepGenerator":
        width = settings.pop("width")
        settings["features"] = RawTime() if width == 1 else FourierFeatures(width)
    quantizer.step = None if kind is None else KINDS[kind](**settings).eval()
