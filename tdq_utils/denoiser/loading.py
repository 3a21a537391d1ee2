"""Load a denoiser and its scheduler by a short name, a folder or a hub id."""

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_utils.errors import DataError

DATA = Path(os.environ.get("TDQ_DATA", Path(__file__).resolve().parents[2] / "data"))  # wheels have none: TDQ_DATA points to it
CATALOGUE = {"fashion-mnist": DATA / "models" / "fashion-mnist"}


def load_model(name: str | Path = "fashion-mnist", device: str | torch.device | None = None) -> tuple[nn.Module, Any]:
    """Load a time-step-conditioned denoiser and a DDIM scheduler for it.

    Args:
        name: a name of the catalogue (``"fashion-mnist"`` ships), a folder in diffusers' pipeline layout,
            or a hub id such as ``"google/ddpm-cifar10-32"`` (needs the network or a filled cache).
        device: where to put the model; default: CUDA if there is one, else the CPU.

    Returns:
        ``(model, scheduler)``: the denoiser in eval mode, gradients off, channels-last; a ``DDIMScheduler`` with "trailing"
        spacing, so that sampling starts at t = 999. DataError: unknown name, a folder without a pipeline, or no network.
    """
    from diffusers import DDIMScheduler  # slow to import, here and below

    source = CATALOGUE.get(str(name), Path(name))
    if not source.is_dir() and (str(name) in CATALOGUE or len(Path(name).parts) != 2 or Path(name).is_absolute()):
        raise DataError(f"load_model takes one of {', '.join(CATALOGUE)}, an existing folder in diffusers' layout, or a hub id "
                        f"'owner/name'; got {str(name)!r}, and {source} is no folder.")  # fmt: skip
    pipeline = _load_pipeline(source if source.is_dir() else str(name))
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if model is None:
        raise DataError(f"{name} must be a pipeline with a 'unet' or a 'transformer'; got {type(pipeline).__name__}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return model, DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


def _load_pipeline(source):
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for two files says nothing, and notebooks would store it
    try:
        return DiffusionPipeline.from_pretrained(source, local_files_only=isinstance(source, Path))
    except (OSError, ValueError) as error:
        if isinstance(source, Path):
            raise DataError(f"{source} must hold a diffusers pipeline (model_index.json): {error}") from error
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(
            f"Could not load {source!r} from the hub: {error}.{offline} Connect to the network once (the files are then "
            f"cached), pass a folder, or use a shipped model: {', '.join(CATALOGUE)}."
        ) from error


def weights_at_hand(module: nn.Module) -> AbstractContextManager:
    """While open, the module's own weights are there, even if accelerate has offloaded them."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits that tell models apart: a hash of the weights. Of a quantized model, take it in full precision."""
    digest = hashlib.sha256()
    for name in sorted(name for name, _ in model.named_parameters()):
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        with weights_at_hand(module):
            value = getattr(module, own).detach().cpu().flatten().view(torch.uint8)
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]
