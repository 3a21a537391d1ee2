"""Put quantizers into any diffusers denoiser and take them out again; freeze what inference needs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tdq_utils.denoiser.call import follow, time_argument
from tdq_utils.denoiser.loading import weights_at_hand
from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.sampling import timesteps
from tdq_utils.errors import TDQError
from tdq_utils.fit import layers
from tdq_utils.fit.bins import binned
from tdq_utils.fit.choice import BYPASSED, LAYERS, chosen_layers, skip_splits
from tdq_utils.fit.layers import ActivationQuantizer, QuantizedLayer, SplitQuantizer
from tdq_utils.fit.methods import DYNAMIC, METHODS
from tdq_utils.method.balance import RULES as BALANCES
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import DynamicStep, StaticStep, StepSize, TableStep


@dataclass
class Quantization:
    """How a model is quantized: kept on the model as ``model.quantization``.

    ``weights`` to ``split_skips``: as :func:`quantize` was given them, but ``kept``: layers left in full precision, each with
    the reason. ``names``: of the quantized layers. ``visited``: time steps that calibration saw. ``frozen``: by :func:`freeze`.
    ``asked``: whether ``keep`` was given, so that calibration adds nothing to ``kept``.
    ``balance``: rule of the balance over channels, or ``None``.
    ``temporal``: those of ``names`` that carry t (:mod:`tdq_utils.fit.temporal_features`): bits of weights, why it was kept.
    ``before``: the parameters before fine-tuning, or ``None``. The rest is for :func:`restore` and :func:`full_precision`.
    """

    weights: int | None
    activations: int | None
    method: str
    weights_per: str
    kept: dict[str, str]
    split_skips: bool = False
    balance: str | None = None
    asked: bool = False
    names: list[str] = field(default_factory=list, repr=False)
    visited: list[float] = field(default_factory=list, repr=False)
    frozen: bool = False
    temporal: dict[str, tuple[int | None, str]] = field(default_factory=dict, repr=False)
    before: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    found: dict[str, tuple[bool, Any]] = field(default_factory=dict, repr=False)  # requires_grad and grad, by parameter
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)  # hooks that follow the model's calls
    aside: dict[str, dict[str, Any]] | None = field(default=None, repr=False)  # what was on the layers: in full precision


def quantize(model: Any, weights: int | None = 8, activations: int | None = 8, method: str = "tdq",
             keep: str | Iterable[str] | None = None, weights_per: str = "channel", split_skips: bool = False,
             balance: bool | str | None = None, search: bool = True) -> None:  # fmt: skip
    """Make the model's conv and linear layers quantized ones, in place; :func:`restore` takes the quantizers out.

    The layers stay the same modules; their parameters are not touched. Weights get the MSE-optimal symmetric step; step sizes
    of activations come from :func:`tdq_utils.fit.calibration.calibrate`, but dynamic methods need none.

    Args:
        model: a diffusers denoiser, called with a sample and a time step.
        weights, activations: bits, 2 to 8, or ``None`` for full precision.
        method: a key of :data:`tdq_utils.fit.methods.METHODS`, which says what each is: static (``"minmax"`` to ``"learned"``),
            over t (``"table"``, ``"finite-set"``, ``"tdq"``), or of the input at hand (``"dynamic"``; ``"dynamic-token"`` of
            convolutions, which have no tokens, is per sample).
        keep: dotted names or patterns (``"mid_block.*"``) of layers to leave in full precision; default: :func:`kept_layers`.
            What cannot be quantized (subclasses, computed weights) is left, too; ``model.quantization.kept`` says why.
        weights_per: ``"channel"`` (output channel) or ``"tensor"``. split_skips: give the two halves of a concatenated skip
            input quantizers of their own, for activations and weights (Q-Diffusion, Li et al. 2023).
        balance: divide channels of inputs by factors that ``calibrate`` measures and folds into the weights, so that one interval
            serves all: a rule of :mod:`tdq_utils.method.balance`, ``True`` for "range".
        search: look for the step sizes of weights; ``False``: leave them at 1, for a caller who has them.

    TDQError: bits outside 2..8, unknown method, a pattern that names no layer, weights that are not finite, a model that is
    quantized already, has an adapter, takes no time step or has nothing to quantize.
    """
    check_plain(model, "quantize")
    balance = "range" if balance is True else balance or None
    grid = checked_grid(weights, activations, method, weights_per, balance)
    time_argument(model)
    chosen, kept = chosen_layers(model, keep)
    splits, added = skip_splits(model) if split_skips else {}, {}
    for name, layer in chosen.items():
        step, split = None, splits.get(name)
        if grid is not None:
            with weights_at_hand(layer):
                rows = len(layer.weight) if weights_per == "channel" else 1
                blank = torch.ones(rows if split is None else (2, rows))
                step = layers.search_weight_step(layer.weight, grid, weights_per, split) if search else blank
        quantizer = _new_quantizer(layer, activations, method if balance is None else "", split)
        added[name] = dict(weight_grid=grid, weight_step=step, activation=quantizer, split=split)
    found = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    model.quantization = Quantization(
        weights, activations, method, weights_per, kept, split_skips, balance, keep is not None, list(chosen), found=found
    )
    _put_on(model, added)


def check_plain(model: Any, what: str) -> None:
    """TDQError: ``what`` takes a full-precision model, and this one is quantized."""
    if hasattr(model, "quantization"):
        raise TDQError(f"{what} takes a full-precision model; this one is quantized already. Call restore(model) first.")


def checked_grid(weights: int | None, activations: int | None, method: str, weights_per: str,
                 balance: str | None = None) -> Grid | None:  # fmt: skip
    """The grid of the weights, from what :func:`quantize` takes. TDQError: it would refuse one of these."""
    if not isinstance(method, str) or method not in METHODS:
        raise TDQError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if weights_per not in ("channel", "tensor"):
        raise TDQError(f"weights_per must be 'channel' or 'tensor'; got {weights_per!r}.")
    if balance is not None and balance not in tuple(BALANCES):
        raise TDQError(f"balance must be one of {', '.join(BALANCES)}, True ('range') or None; got {balance!r}.")
    if balance is not None and activations is None:
        raise TDQError("balance serves activations on a grid; these are in full precision. Pass activations=8, or no balance.")
    grid, _ = (None if bits is None else Grid(bits) for bits in (weights, activations))
    return grid


def _new_quantizer(layer, bits, method, split):
    if bits is None:
        return None
    halves = [ActivationQuantizer(bits, step=dynamic_step(layer, method) if method in DYNAMIC else None) for _ in range(2)]
    quantizer = halves[0] if split is None else SplitQuantizer(split, halves)
    return quantizer if layer.weight.is_meta else quantizer.to(layer.weight.device)


def dynamic_step(layer: nn.Module, method: str) -> DynamicStep:
    """Where a layer's step sizes come from in one of the methods ``DYNAMIC``."""
    return DynamicStep("sample" if method == "dynamic-token" and not isinstance(layer, nn.Linear) else DYNAMIC[method])


def _put_on(model, added):
    for name, parts in added.items():
        layer = model.get_submodule(name)
        layers.attach(layer, **parts)
        layer.train(layer.training)
    idle = [model.get_submodule(name) for name, reason in model.quantization.kept.items() if reason == BYPASSED]
    model.quantization.handles = [*follow(model), model.register_forward_pre_hook(_check_path)]
    model.quantization.handles += [layer.register_forward_pre_hook(_check_idle) for layer in idle]


def _take_off(model):
    """Make the layers plain again; what quantized them, by name."""
    added = {name: layers.detach(layer) for name, layer in quantized_layers(model).items()}
    for handle in model.quantization.handles:
        handle.remove()
    return added


def keep_too(model: nn.Module, names: Iterable[str], reason: str) -> None:
    """Leave further layers in full precision, those of ``names`` that are quantized; unless ``keep`` was given to quantize."""
    state, layers_now = checked_state(model), quantized_layers(model)
    for name in () if state.asked else set(names) & (set(state.names) - set(state.temporal)):
        layers.detach(layers_now[name])
        state.names.remove(name)
        state.kept[name] = reason


def _check_path(model, args):
    """A hook: no layer may have come in since, and run unquantized."""
    modules = list(model.modules())
    own = {part for module in modules if isinstance(module, ActivationQuantizer) for part in module.modules()}  # of generators
    had = len(model.quantization.kept) + len(model.quantization.names)
    has = sum(isinstance(module, LAYERS) and module not in own for module in modules)
    if had != has:
        raise TDQError(f"A quantized model must keep its layers; it had {had} conv and linear ones, now {has}. Fused projections "
                       "or an adapter: call restore(model), then pipe.fuse_qkv_projections() or pipe.fuse_lora() and "
                       "pipe.unload_lora_weights(), then model.eval() and quantize.")  # fmt: skip


def _check_idle(layer, args):
    """A hook on a layer that was left in full precision because it does not run."""
    raise TDQError(f"Fused projections must stay fused while the model is quantized; {layer} runs again. Fuse them, or load the "
                   "model again and quantize it without pipe.fuse_qkv_projections().")  # fmt: skip


def checked_state(model: Any) -> Quantization:
    """The model's :class:`Quantization`. TDQError: it is not quantized."""
    if not hasattr(model, "quantization"):
        raise TDQError("The model must be quantized; got a full-precision one. Call quantize(model, ...) first.")
    return model.quantization


def quantized_layers(model: Any) -> dict[str, QuantizedLayer]:
    """The quantized layers by dotted name. TDQError: the model is not quantized, or a layer is no longer where it was."""
    found: dict[str, Any] = {name: model.get_submodule(name) for name in checked_state(model).names}
    for name, layer in found.items() if model.quantization.aside is None else ():
        if not isinstance(layer, QuantizedLayer):
            raise TDQError(f"{name} must be the layer that was quantized; it is a {type(layer).__name__} now. If an adapter "
                           "wrapped it, unload that first (pipe.unload_lora_weights()), then restore(model).")  # fmt: skip
    return found


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """``{name: ActivationQuantizer}``; a layer with a split input has two, ``name[:64]`` and ``name[64:]``."""
    found: dict[str, ActivationQuantizer] = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.activation, SplitQuantizer):
            found |= zip(layer.activation.parts(name), layer.activation.halves, strict=True)
        elif layer.activation is not None:
            found[name] = layer.activation
    return found


def restore(model: nn.Module) -> None:
    """Take the quantizers out: the model that went in, bit for bit, with its gradients and flags. TDQError: not quantized."""
    state = checked_state(model)
    if state.aside is None:
        _take_off(model)
        _swap(model, state.before)
    del model.quantization
    for name, parameter in model.named_parameters():
        if name in state.found:
            parameter.requires_grad_(state.found[name][0])
            parameter.grad = state.found[name][1]


@contextmanager
def full_precision(model: nn.Module) -> Iterator[nn.Module]:
    """While open, a quantized model is its full-precision self, with the weights from before any fine-tuning; may be nested."""
    state = getattr(model, "quantization", None)
    if state is None or state.aside is not None:  # it is already
        yield model
        return
    state.aside = added = _take_off(model)
    _swap(model, state.before)
    try:
        yield model
    finally:
        state.aside = None
        if getattr(model, "quantization", None) is state:  # else it was restored meanwhile
            _swap(model, state.before)
            _put_on(model, added)


def _swap(model, others):
    """Exchange the values of the model's parameters with ``others``, by name; ``None``: with nothing."""
    for name, parameter in model.named_parameters() if others else ():
        if name in others:
            parameter.data, others[name] = others[name], parameter.data


def freeze(model: nn.Module, scheduler: Any = None, steps: int | None = None, nearest: bool = False,
           scheduling: dict[str, Any] | None = None, bins: int | None = None, profile: Profile | None = None
           ) -> None:  # fmt: skip
    """Pre-compute all that inference needs: step sizes over t become a table, weights are rounded once; outputs stay.

    Args:
        model: quantized and calibrated. scheduler: decides which t are visited; default: those that calibration saw.
        steps: sampling steps; default: every t that the scheduler was trained with. scheduling: as for ``sample``.
        nearest: let a per-step table answer for steps it was not calibrated for by its nearest t, instead of refusing.
        bins: let neighbouring t share an interval, so many intervals a layer; ``profile``: of the model, to choose these by
            least error (:func:`tdq_utils.fit.bins.binned`, which says how else). Default: one for each t.

    TDQError: not quantized, not calibrated, or calibrated per step at other steps; ``bins`` that are not from 1 to the number
    of visited t, or for intervals that do not follow t.
    """
    state = checked_state(model)
    visited = state.visited if scheduler is None else timesteps(scheduler, steps, model, **(scheduling or {}))
    quantizers = activation_quantizers(model)
    frozen = {name: frozen_step(quantizer.step, visited, nearest) for name, quantizer in quantizers.items()}
    if bins is not None:
        frozen = {name: binned(step, bins, quantizers[name].grid, profile, name) for name, step in frozen.items()}
    for name, step in frozen.items():  # all are there before any is replaced
        quantizers[name].step = step
    round_weights(model)


def round_weights(model: nn.Module) -> None:
    """The weights' part of :func:`freeze`: keep each layer's rounded weights instead of rounding at every call."""
    for layer in quantized_layers(model).values():
        if layer.weight_grid is not None:
            with weights_at_hand(layer):
                layer.rounded = layer.quantized_weight().detach().clone()
    checked_state(model).frozen = True


def frozen_step(step: StepSize | None, visited: list[float], nearest: bool = False) -> StepSize:
    """What :func:`freeze` puts in the place of one step source: a constant, a table over ``visited``, or itself (dynamic)."""
    if step is None:
        raise TDQError("freeze takes a calibrated model; call calibrate(model, scheduler, ...) first.")
    if isinstance(step, DynamicStep):
        return step
    if isinstance(step, TableStep):
        return step.only(visited, nearest)
    return TableStep(visited, step.on(visited, nearest)) if step.over_time else StaticStep(step.on([0])[0])
