"""diffusers as a host: its ``from_pretrained`` quantizes, its ``save_pretrained`` keeps what was fitted, and pipelines follow.

diffusers has no public way to register a quantization method. So importing this module does two things to it: it enters
:class:`TDQConfig` and :class:`TDQQuantizer` in the two dictionaries of ``diffusers.quantizers.auto``, and it wraps
``ModelMixin.save_pretrained``, which for models that are not quantized by this kit does what it did.
``import tdq_utils`` sees to it (:mod:`tdq_utils.run.plugin`): at once if diffusers' models are there, else when they come.
"""

import hashlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.quantize import checked_grid, quantize, quantized_layers, restore, round_weights
from tdq_utils.method.step_sizes import TableStep
from tdq_utils.run.storage import FORMAT, HOW, describe, rebuild


class _Method(StrEnum):
    TDQ = "tdq"


@dataclass(repr=False, kw_only=True)
class TDQConfig(QuantizationConfigMixin):
    """``quantization_config=TDQConfig(weights=4, method="tdq")`` for diffusers' ``from_pretrained``; only by keyword.

    The model comes with its full-precision weights and is quantized as by :func:`tdq_utils.fit.quantize.quantize`: dynamic
    methods are ready, others are calibrated afterwards, which cannot be done while loading. ``save_pretrained`` of any quantized
    diffusers model, calibrated or not, writes the weights that it has (fine-tuned ones, if it was trained: ``restore`` after
    reading back gives these), the step sizes in float32, and this configuration, in config.json. ``from_pretrained(folder)``
    alone reads it back: the same outputs, bit for bit, in the dtype that each tensor had; ``torch_dtype`` casts it as any model.

    Args:
        weights, activations, method, keep, weights_per, split_skips, balance: as ``quantize`` takes them.
        saved: what ``save_pretrained`` adds to them; ``None`` for weights in full precision.
        quant_method: ``"tdq"``, for diffusers.

    Raises:
        TDQError: bits outside 2..8, unknown method or ``weights_per``. Loading a model raises it for all else that ``quantize``
            refuses, before weights are read, and ``DataError`` for a folder that is damaged, mixed or of another version.
    """

    quant_method: Any = _Method.TDQ
    weights: int | None = 8
    activations: int | None = 8
    method: str = "tdq"
    keep: Any = None
    weights_per: str = "channel"
    split_skips: bool = False
    balance: Any = None
    saved: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.quant_method = _Method.TDQ
        self.keep = self.keep if self.keep is None or isinstance(self.keep, (str, dict)) else list(self.keep)
        self.balance = "range" if self.balance is True else self.balance or None
        checked_grid(self.weights, self.activations, self.method, self.weights_per, self.balance)

    def to_dict(self) -> dict[str, Any]:
        """All but ``saved``: for ``print``, and for what some versions of diffusers tell the hub in a header."""
        return {name: value for name, value in vars(self).items() if name != "saved"}

    to_diff_dict = to_dict


class TDQQuantizer(DiffusersQuantizer):
    """What diffusers calls, with a :class:`TDQConfig`, while it loads a model: before the weights, for a tensor, after them."""

    quantization_config: Any
    use_keep_in_fp32_modules: bool = True
    is_serializable: bool = True
    is_trainable: bool = True

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """As asked; ``None``: each tensor comes as it was saved."""
        self.as_saved = torch_dtype is None and self.quantization_config.saved is not None
        return torch_dtype

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """As they are. DataError: what was saved quantized lacks any."""
        with _as_written():
            if self.quantization_config.saved and (lost := sorted(missing_keys)):
                raise ValueError(f"{len(lost)} tensors are missing, {lost[0]} among them; copy the whole folder again")
        return missing_keys

    def check_if_quantized_param(self, model: Any, param_value: Any, param_name: str, state_dict: Any, **_: Any) -> bool:
        """Whether a tensor is to come as it was saved. Step sizes always are: diffusers would round them to the model's dtype."""
        return self.as_saved or param_name in self.own

    def create_quantized_param(self, *args: Any, **_: Any) -> None:  # type: ignore[override]
        """Give the model one of these tensors. DataError: of another shape."""
        model, _rounded, path, device, tensors = args[:5]
        (module, name), value = _place(model, path), tensors[path]
        old = getattr(module, name)
        with _as_written():
            if old.shape != value.shape and not isinstance(module, TableStep):
                raise ValueError(f"{path} must have the shape {tuple(old.shape)}, got {tuple(value.shape)}")
        new = value.to(device)
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if path in self.own:
            self.read[path] = value

    def _process_model_before_weight_loading(self, model, **_):
        """The model is on the meta device: give it what the tensors to come need, or refuse before they are read."""
        del model.is_quantized, model.quantization_method  # diffusers would refuse model.to(dtype), which the kit can
        config, self.own, self.read = self.quantization_config, set(), {}
        if config.saved is None:
            quantize(model, **_how(config), search=False)
            return restore(model)
        with _as_written():
            if config.saved["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {config.saved['format']}; save it with this version")
            rebuild(model, config.saved | _how(config), defaultdict(lambda: torch.zeros(1)))
            for name in config.saved["levels"]:
                layer = quantized_layers(model)[name]
                layer.levels = torch.empty_like(layer.weight, dtype=torch.int8)
        self.own = set(_added(model))

    def _process_model_after_weight_loading(self, model, **_):
        # What quantizes a model is said in one place, ``model.quantization``: its config would not follow.
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != "quantization_config"})
        saved = self.quantization_config.saved
        if saved is None:
            return quantize(model, **_how(self.quantization_config))
        with _as_written():
            if (found := _sha256(self.read)) != saved["sha256"]:
                raise ValueError(f"sha256 of the step sizes must be {saved['sha256']}, got {found}; copy config.json and the "
                                 "tensors again, and load without offloading to a disk")  # fmt: skip
            self.read.clear()
            for path, dtype in saved["buffers"].items() if self.as_saved else ():
                module, name = _place(model, path)
                setattr(module, name, getattr(module, name).to(getattr(torch, dtype)))
            if saved["channels_last"]:
                nn.Module.to(model, memory_format=torch.channels_last)
            if saved["frozen"]:
                round_weights(model)

    def _dequantize(self, model):
        restore(model)
        return model


@contextmanager
def _as_written():
    try:
        yield
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"The folder must hold config.json and tensors as save_pretrained writes them: {error!r}") from error


def _how(config):
    """The arguments of ``quantize``."""
    return {name: getattr(config, name) for name in (*HOW, "keep")}


def _place(model, path):
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _added(model):
    """The tensors that quantization adds to the model and that are to be saved, by name; rounded weights follow from others."""
    states = {place: layer.state_dict().items() for place, layer in quantized_layers(model).items()}
    others = ("weight", "bias", "rounded")
    return {f"{place}.{name}": value for place, state in states.items() for name, value in state if name not in others}


def _sha256(tensors):
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(model):
    """The arguments of the :class:`TDQConfig` of a quantized model, as it is by now."""
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        raise TDQError("A model must be in memory to be saved; this one is offloaded. Call pipe.remove_all_hooks() first.")
    saved, layers = describe(model), quantized_layers(model)
    how = {name: saved.pop(name) for name in (*HOW, "keep")}
    buffers = {name: value for name, value in model.named_buffers() if name not in state}  # not saved, but cast with the model
    saved |= dict(
        levels=[name for name, layer in layers.items() if layer.levels is not None],
        buffers={name: str(value.dtype).removeprefix("torch.") for name, value in buffers.items()},
        sha256=_sha256(_added(model)),
    )
    return how | dict(quant_method="tdq", saved=saved)


def _describing(plain):
    """``save_pretrained``, of a quantized model with its description in config.json and without its rounded weights."""

    @wraps(plain)
    def save_pretrained(model, *args, **options):
        state = getattr(model, "quantization", None)
        if state is None or state.aside is not None:  # it is its full-precision self
            return plain(model, *args, **options)
        config, described = model._internal_dict, _described(model)
        hook = model.register_state_dict_post_hook(_less_rounded)
        try:
            model.register_to_config(quantization_config=described)
            return plain(model, *args, **options)
        finally:
            hook.remove()
            model._internal_dict = config

    return save_pretrained


def _less_rounded(model, tensors, prefix, metadata):
    for name in model.quantization.names:
        tensors.pop(f"{prefix}{name}.rounded", None)


AUTO_QUANTIZER_MAPPING["tdq"] = TDQQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["tdq"] = TDQConfig
ModelMixin.save_pretrained = _describing(ModelMixin.save_pretrained)  # type: ignore[method-assign]
