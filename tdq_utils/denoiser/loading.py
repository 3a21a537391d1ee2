"""Load a denoiser and its scheduler by a short name, a folder or a hub id."""

import hashlib
import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tdq_utils.errors import DataError, TDQError, checked_path

DATA = Path(os.environ.get("TDQ_DATA", Path(__file__).resolve().parents[2] / "data"))  # wheels have none: TDQ_DATA points to it
CATALOGUE = {"fashion-mnist": DATA / "models" / "fashion-mnist"}
AWAY = "A wheel holds no models and data: clone the repository, or set TDQ_DATA to the folder data of a clone."
MODEL_PLACES, SCHEDULER_PLACES = ("unet", "transformer", None), ("scheduler", None)  # None: the top, as in google/ddpm-cifar10-32

NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def load_model(name: str | Path = "fashion-mnist", device: str | torch.device | None = None, scheduler: str | None = None,
               dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:  # fmt: skip
    """Load a time-step-conditioned denoiser and its scheduler; nothing else of its pipeline.

    Args:
        name: a name of the catalogue (``"fashion-mnist"`` ships), a folder in diffusers' layout (``unet/`` or
            ``transformer/``, and ``scheduler/``), or a hub id such as ``"google/ddpm-cifar10-32"`` (network or a filled cache).
        device: where to put the model; default: CUDA if there is one, else the CPU.
        scheduler: another than the model's own, as for :func:`scheduler_like`, such as ``"ddim"``.
        dtype: of the weights, such as ``torch.bfloat16``; default: as they are stored.

    Returns:
        ``(model, scheduler)``: the denoiser in eval mode, gradients off, channels-last if it is made for images.
        DataError: unknown name, a folder without a model or a scheduler, damaged files, or no network.
        TDQError: a scheduler that does not fit, a device that is not there, a dtype that is none of floats.
    """
    source, device = CATALOGUE.get(str(name), checked_path(name)), checked_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TDQError(f"dtype must be a floating-point dtype of torch, such as torch.bfloat16, or None; got {dtype!r}.")
    if str(name) in CATALOGUE and not source.is_dir():
        raise DataError(f"The model {str(name)!r} ships with the repository; {source} is no folder. {AWAY}")
    if not source.is_dir() and (len(Path(name).parts) != 2 or Path(name).is_absolute()):
        raise DataError(f"load_model takes one of {', '.join(CATALOGUE)}, an existing folder in diffusers' layout, or a hub id "
                        f"'owner/name'; got {str(name)!r}, and {source} is no folder.")  # fmt: skip
    if (source / "transformer_2").is_dir():
        raise DataError(f"load_model gives one denoiser; {source} has two that share a trajectory. Load its pipeline, and record "
                        "and quantize each: record(pipe.transformer), record(pipe.transformer_2).")  # fmt: skip
    model, own = _load(source if source.is_dir() else str(name), dtype)
    chosen = scheduler_like(own, scheduler) if scheduler else own
    flat = not any(parameter.dim() == 5 for parameter in model.parameters())  # that format knows four axes
    form = torch.channels_last if flat else torch.preserve_format
    return model.eval().requires_grad_(False).to(device, memory_format=form), chosen


def checked_device(device: Any) -> Any:
    """``device``, or CUDA if there is one, else the CPU. TDQError: this torch has none of that name."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TDQError(f"device must be one that this torch has, such as 'cpu'; got {device!r} ({reason}).") from error
    return device


def _load(source, dtype):
    import diffusers  # slow, here and below
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for two files says nothing, and notebooks would store it
    how = dict(torch_dtype=dtype) if dtype else {}  # not to(dtype): some layers of some models stay in float32
    model = _part(source, "denoiser", diffusers.UNet2DModel, MODEL_PLACES, **how)
    return model, _part(source, "scheduler", diffusers.DDIMScheduler, SCHEDULER_PLACES)


def _part(source, what, reader, folders, **how):
    """The denoiser, or the scheduler: of the class that its configuration names, from the first of ``folders`` that has one."""
    import diffusers

    local, errors = isinstance(source, Path), []
    for folder in folders:
        try:
            if local and not (source / (folder or "") / reader.config_name).is_file():
                raise OSError(f"no {reader.config_name} in {source / (folder or '')}")
            name = reader.load_config(source, subfolder=folder, local_files_only=local).get("_class_name")
        except (OSError, ValueError) as error:
            errors.append(error)
            continue
        if not hasattr(diffusers, str(name)):
            raise DataError(f"The {what} of {source} must be of a class of diffusers; its {reader.config_name} names {name}.")
        try:
            return getattr(diffusers, name).from_pretrained(source, subfolder=folder, local_files_only=local, **how)
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(source, what, error) from error
    raise _unreadable(source, what, errors[0]) from errors[0]


def _unreadable(source, what, error):
    if isinstance(source, Path):
        return DataError(f"{source} must hold a model in diffusers' layout, unet/ or transformer/, and its scheduler/; its "
                         f"{what} cannot be read: {error}. Write both by pipe.save_pretrained(folder).")  # fmt: skip
    offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
    return DataError(f"Could not load the {what} of {source!r} from the hub: {error}.{offline} Connect to the network once (the "
                     f"files are then cached), pass a folder, or use a shipped model: {', '.join(CATALOGUE)}.")  # fmt: skip


def matches_flow(scheduler: Any) -> bool:
    """Whether a scheduler is of flow matching: its model predicts a velocity, noise minus image, along a straight line."""
    straight = "use_flow_sigmas" in inspect.signature(type(scheduler)).parameters and scheduler.config.use_flow_sigmas
    return "FlowMatch" in type(scheduler).__name__ or bool(straight)


def scheduler_like(own: Any, name: str) -> Any:
    """Another scheduler for the model that ``own`` is for, from its configuration; DDIM with trailing spacing: from t = 999.

    ``name``: of a class of diffusers, in any case, with or without "Scheduler". TDQError: there is none, or it does not fit."""
    import diffusers

    if not isinstance(name, str):
        raise TDQError(f"scheduler must name a scheduler of diffusers, such as 'ddim'; got {name!r}.")
    plain = lambda text: text.lower().removesuffix("scheduler")  # noqa: E731
    kind = next((kind for kind in dir(diffusers) if kind.endswith("Scheduler") and plain(kind) == plain(name)), None)
    if kind is None:
        raise TDQError(f"scheduler must name a scheduler of diffusers, such as 'ddim'; got {name!r}.")
    # Spelt out: from_config drops what is at its default, and other classes have other defaults.
    told = {key: own.config[key] for key in NOISE if key in own.config}
    told |= {"timestep_spacing": "trailing"} if kind == "DDIMScheduler" else {}
    found = getattr(diffusers, kind).from_config(own.config, **told)
    noise, others = (getattr(one, "alphas_cumprod", None) for one in (own, found))
    alike = noise is not None and others is not None and noise.shape == others.shape and torch.allclose(noise, others, atol=1e-6)
    if type(own) is not type(found) and not (matches_flow(found) if matches_flow(own) else alike and not matches_flow(found)):
        raise TDQError(f"scheduler must be for the noise that the model was trained with, that of its {type(own).__name__}; got "
                       f"{kind}. Leave it out for the model's own.")  # fmt: skip
    return found


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
