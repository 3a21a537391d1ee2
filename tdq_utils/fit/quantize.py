"""Put quantizers into any diffusers denoiser and take them out again; route t to them; freeze; save and load."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from tdq_utils.denoiser.sampling import timesteps
from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import TWINS, Clock, SplitQuantizer, twin
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import LearnedStep, StaticStep, TableStep

CALIBRATED = ("minmax", "momentum", "percentile", "mse", "ptq4dm", "learned", "table", "tdq")
DYNAMIC = {"dynamic": "tensor", "dynamic-sample": "sample"}
METHODS = (*CALIBRATED, *DYNAMIC)


@dataclass
class Quantization:
    """How a model is quantized: kept on the model as ``model.quantization``.

    Attributes:
        weights, activations: bits, or ``None`` for full precision. method: one of ``METHODS``.
        weights_per: ``"channel"`` or ``"tensor"``. kept: names of the layers left in full precision.
        split_skips: whether the halves of concatenated inputs have quantizers of their own.
        originals: the layers that were taken out, by name. clock: routes t. handles: the clock's hooks.
        frozen: whether :func:`freeze` has run. before: the parameters before fine-tuning, or ``None``.
    """

    weights: int | None
    activations: int | None
    method: str
    weights_per: str
    kept: list
    split_skips: bool = False
    originals: dict = field(default_factory=dict, repr=False)
    clock: Clock = field(default_factory=Clock, repr=False)
    handles: list = field(default_factory=list, repr=False)
    frozen: bool = False
    before: dict | None = field(default=None, repr=False)


def kept_layers(model):
    """Names of the layers that the paper keeps in full precision, found by structure.

    The model's own entry and exit layers (first and last conv or projection: the ones it holds directly or
    in an embedding module), and everything that carries t: time-embedding MLPs, the time projections of
    ResNet blocks, adaptive norms. (So et al. 2023, authors' code.)
    """
    names = []
    for parent_name, parent in model.named_modules():
        conditioning = type(parent).__module__ in ("diffusers.models.embeddings", "diffusers.models.normalization")
        for name, layer in parent.named_modules() if conditioning else parent.named_children():
            entry_or_exit = parent is model
            carries_t = conditioning or name == "time_emb_proj"
            if type(layer) in TWINS and (entry_or_exit or carries_t):
                names.append(f"{parent_name}.{name}".lstrip("."))
    return list(dict.fromkeys(names))


def quantize(model, weights=8, activations=8, method="tdq", keep=None, weights_per="channel", split_skips=False):
    """Replace the model's conv and linear layers by quantized twins, in place.

    The twins share the original parameters, which stay untouched; :func:`restore` puts the originals back.
    Weights get the MSE-optimal symmetric step; step sizes of activations come from
    :func:`tdq_utils.fit.calibration.calibrate`, except for the dynamic methods, which need none.

    Args:
        model: a diffusers denoiser called as ``model(sample, timestep, ...)``.
        weights, activations: bits, 2 to 8, or ``None`` for full precision.
        method: ``"minmax"``, ``"momentum"``, ``"percentile"``, ``"mse"``, ``"ptq4dm"`` or ``"learned"`` (static),
            ``"table"`` (one value a step), ``"tdq"`` (generator), ``"dynamic"`` (per tensor), ``"dynamic-sample"``.
        keep: dotted names or patterns (``"mid_block.*"``) of layers to leave in full precision;
            default: :func:`kept_layers`.
        weights_per: ``"channel"`` (output channel) or ``"tensor"``.
        split_skips: give the two halves of a concatenated skip input quantizers of their own, for activations and
            weights (Q-Diffusion, Li et al. 2023); see :func:`skip_splits`.

    Raises:
        TDQError: bits outside 2..8, unknown method, a pattern that names no layer, weights that are not
            finite, a model that is quantized already or has nothing to quantize.
    """
    names = _chosen_layers(model, method, keep, weights_per)
    grid = None if weights is None else Grid(weights)
    if activations is not None:
        Grid(activations)  # refuse wrong bits before any work
    splits = skip_splits(model) if split_skips else {}
    how = grid, activations, DYNAMIC.get(method), weights_per
    twins = {name: twin(layer, *how, splits.get(name)) for name, layer in names.items() if layer}
    kept = [name for name, layer in names.items() if not layer]
    model.quantization = state = Quantization(weights, activations, method, weights_per, kept, split_skips)
    for name, layer in twins.items():
        state.originals[name] = model.get_submodule(name)
        layer.clock = state.clock
    _install(model, twins)


def _chosen_layers(model, method, keep, weights_per):
    """Every conv and linear layer by name; ``None`` for those that are kept."""
    if hasattr(model, "quantization"):
        raise TDQError("quantize takes a full-precision model; this one is quantized already. Call restore(model) first.")
    if method not in METHODS:
        raise TDQError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if weights_per not in ("channel", "tensor"):
        raise TDQError(f"weights_per must be 'channel' or 'tensor'; got {weights_per!r}.")
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in TWINS}
    patterns = kept_layers(model) if keep is None else [keep] if isinstance(keep, str) else list(keep)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise TDQError(f"keep must name conv or linear layers of the model, or match some; got {pattern!r}.")
    chosen = {n: None if any(fnmatchcase(n, p) for p in patterns) else layer for n, layer in layers.items()}
    if not any(chosen.values()):
        raise TDQError(f"There must be a layer to quantize; the model has {len(layers)} and all are kept.")
    for name, layer in chosen.items():
        if layer and not torch.isfinite(layer.weight).all():
            raise TDQError(f"Weights must be finite; {name} holds NaN or infinity. Load the model again.")
    return chosen


def _install(model, twins):
    state = model.quantization
    for name, layer in twins.items():
        layer.train(model.training)
        model.set_submodule(name, layer)
    state.handles = [
        model.register_forward_pre_hook(state.clock.start, with_kwargs=True),
        model.register_forward_hook(state.clock.stop, always_call=True),
    ]


def _remove(model):
    """Put the originals back; return the twins."""
    state = checked_state(model)
    twins = quantized_layers(model)
    for name, original in state.originals.items():
        original.train(model.training)
        model.set_submodule(name, original)
    for handle in state.handles:
        handle.remove()
    return twins


def checked_state(model):
    """The model's :class:`Quantization`. TDQError: it is not quantized."""
    if not hasattr(model, "quantization"):
        raise TDQError("The model must be quantized; got a full-precision one. Call quantize(model, ...) first.")
    return model.quantization


def quantized_layers(model):
    """The quantized layers by dotted name. TDQError: the model is not quantized."""
    return {name: model.get_submodule(name) for name in checked_state(model).originals}


def activation_quantizers(model):
    """``{name: ActivationQuantizer}``; a layer with a split input has two, ``name[:64]`` and ``name[64:]``."""
    found = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.activation, SplitQuantizer):
            found |= zip(layer.activation.parts(name), layer.activation.halves, strict=True)
        elif layer.activation is not None:
            found[name] = layer.activation
    return found


def skip_splits(model):
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


def restore(model):
    """Take the quantizers out: the model that went in, bit for bit. TDQError: it is not quantized."""
    _remove(model)
    if model.quantization.before is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(model.quantization.before[name])
    del model.quantization


@contextmanager
def full_precision(model):
    """While open, a quantized model is its full-precision self."""
    twins = _remove(model)
    try:
        yield model
    finally:
        _install(model, twins)


def freeze(model, scheduler, steps=None, nearest=False):
    """Pre-compute all that inference needs: step sizes over t become a table, weights are rounded once.

    The frozen model gives exactly the outputs of the unfrozen one and has no generator left.

    Args:
        model: quantized and calibrated. scheduler: decides which t are visited.
        steps: sampling steps; default: every t that the scheduler was trained with.
        nearest: let a per-step table answer for steps it was not calibrated for by its nearest t, instead of refusing.

    Raises:
        TDQError: not quantized, not calibrated, or calibrated per step at other steps.
    """
    checked_state(model)
    visited = list(range(scheduler.config.num_train_timesteps)) if steps is None else timesteps(scheduler, steps)
    quantizers = activation_quantizers(model)
    frozen = {name: frozen_step(quantizer.step, visited, nearest) for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        quantizer.step = frozen[name]
    round_weights(model)


def round_weights(model):
    """The weights' part of :func:`freeze`: keep each layer's rounded weights instead of rounding at every call."""
    for layer in quantized_layers(model).values():
        if layer.weight_grid is not None:
            layer.rounded = layer.quantized_weight().detach().clone()
    checked_state(model).frozen = True


def frozen_step(step, visited, nearest=False):
    """What :func:`freeze` puts in the place of one step source: a constant, a table over ``visited``, or itself (dynamic)."""
    if step is None:
        raise TDQError("freeze takes a calibrated model; call calibrate(model, scheduler, ...) first.")
    if isinstance(step, StepGenerator):
        return step.freeze(visited)
    if isinstance(step, LearnedStep):
        return StaticStep(step.s.detach())
    if isinstance(step, TableStep) and nearest:
        return TableStep(visited, [step.s[(step.t - t).abs().argmin()] for t in visited])
    if isinstance(step, TableStep) and (missing := set(visited) - set(step.t.tolist())):
        raise TDQError(
            f"A table can be frozen only for the steps it was calibrated for; {len(missing)} of {len(visited)} time steps "
            f"are missing, t = {min(missing)} among them. Calibrate with these steps, pass nearest=True, or use method='tdq'."
        )
    return step
