"""Which layers are quantized, and which are left in full precision and why."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tdq_utils.denoiser.call import check_module
from tdq_utils.denoiser.loading import weights_at_hand
from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import QUANTIZED, forward_slots

LAYERS = (nn.Linear, nn.Bilinear, _ConvNd)
CONDITIONING = ("diffusers.models.embeddings", "diffusers.models.normalization")
# img_mod, adaLN_modulation, double_stream_modulation_img, time_proj, time_emb_proj, t_embedder, ...
CARRIES_T = re.compile(r"(^|[._])(time_emb\w*|time_proj|time_mlp|t_embedder|\w*mod|\w*modulation\w*)(\.|$)", re.IGNORECASE)
ENDS = re.compile(r"^(all_)?(x_embedder|pos_embed|patch_embed|final_layer)\.")  # first and last layers

FUSED = dict(to_qkv=("to_q", "to_k", "to_v"), to_kv=("to_k", "to_v"), to_added_qkv=("add_q_proj", "add_k_proj", "add_v_proj"))
BYPASSED = "does not run: fused with its neighbours"


def kept_layers(model: nn.Module) -> dict[str, str]:
    """The layers that the paper keeps in full precision, found by structure: ``{name: reason}``.

    The model's entry and exit layers (those it holds directly or in an embedding), and everything that carries t: time embeddings
    and projections, adaptive norms (So et al. 2023, authors' code); modulations of transformers, by the names they go by.
    """
    check_module(model)
    inside = tuple(f"{name}." for name, module in model.named_modules() if type(module).__module__ in CONDITIONING)
    kept = {}
    for name, layer in model.named_modules():
        if type(layer) in QUANTIZED and (name.startswith(inside) or CARRIES_T.search(name)):
            kept[name] = "embeds the input or carries t"
        elif type(layer) in QUANTIZED and ("." not in name or ENDS.search(name)):
            kept[name] = "entry or exit"
    return kept


def chosen_layers(model: nn.Module, keep: str | Iterable[str] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers to quantize, by name, and those that are kept, by name with the reason.

    TDQError: a pattern that names no layer, nothing to quantize, weights that are not finite, an adapter, or a layer whose
    quantizer would be there but not run.
    """
    everything = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    keep = [keep] if isinstance(keep, str) else [*keep] if isinstance(keep, Iterable) else keep
    if keep is not None and not (isinstance(keep, list) and all(isinstance(pattern, str) for pattern in keep)):
        raise TDQError(f"keep must be names or patterns of layers, such as 'mid_block.*', or None; got {keep!r}.")
    kept = kept_layers(model) if keep is None else {}
    for pattern in keep or ():
        asked = {name: "as asked" for name in everything if fnmatchcase(name, pattern)}
        if not asked:
            raise TDQError(f"keep must name conv or linear layers of the model, or match some; got {pattern!r}.")
        kept |= asked
    kept |= dict.fromkeys(_bypassed(model), BYPASSED)
    kept |= {name: reason for name, layer in everything.items() if name not in kept and (reason := _cannot(name, layer))}
    chosen = {name: layer for name, layer in everything.items() if name not in kept}
    if not chosen:
        raise TDQError(f"There must be a layer to quantize; the model has {len(everything)} and all are kept.")
    for name, layer in chosen.items():
        with weights_at_hand(layer):
            if not layer.weight.is_meta and not torch.isfinite(layer.weight.float()).all():
                raise TDQError(f"Weights must be finite; {name} holds NaN or infinity. Load the model again.")
    return chosen, {name: kept[name] for name in everything if name in kept}


def _bypassed(model):
    """Projections of attention that diffusers has fused into one layer, which runs instead."""
    fused = {name: module for name, module in model.named_modules() if getattr(module, "fused_projections", False)}
    return [f"{name}.{part}" for name, module in fused.items() for one in FUSED if hasattr(module, one) for part in FUSED[one]]


def _cannot(name, layer):
    """Why a layer cannot be quantized, or ``None``. TDQError: it would be there, but not run."""
    kind = type(layer)
    if name.endswith("base_layer") or kind.__module__.startswith("peft.") or ".lora_" in name:
        raise TDQError(f"Adapters must be fused before quantize; got {name}. pipe.fuse_lora(); pipe.unload_lora_weights().")
    if kind not in QUANTIZED:
        return f"{kind.__name__} may compute otherwise than {', '.join(k.__name__ for k in QUANTIZED)}"
    if "weight" not in layer._parameters:
        return "its weight is computed (weight norm or another parametrization)"
    if "forward" in vars(layer) and not forward_slots(layer, kind):
        raise TDQError(f"A layer's forward must be that of its class, or under hooks of accelerate or diffusers; {name} has "
                       "another one on the instance, that hides the quantizer. Remove it, or name it in keep=.")  # fmt: skip
    if getattr(getattr(layer, "_hf_hook", None), "offload_buffers", False):
        raise TDQError(f"Layers must be offloaded without buffers; {name} is with them. Offload with offload_buffers=False.")
    return None


def skip_splits(model: Any) -> dict[str, int]:
    """``{layer: channels}`` that come from below, where an up-block's residual block gets them joined with a skip.

    By structure: each such block's input has more channels than the block before put out; the rest is the skip.
    TDQError: the model is no UNet of diffusers.
    """
    if not hasattr(model, "up_blocks"):
        raise TDQError(f"split_skips needs a UNet with up_blocks; {type(model).__name__} concatenates no skips.")
    splits, below = {}, (model.mid_block or model.down_blocks[-1]).resnets[-1].out_channels
    for i, block in enumerate(model.up_blocks):
        for j, resnet in enumerate(block.resnets):
            for name in ("conv1", "conv_shortcut"):
                if getattr(resnet, name) is not None and resnet.in_channels > below:
                    splits[f"up_blocks.{i}.resnets.{j}.{name}"] = below
            below = resnet.out_channels
    return splits
