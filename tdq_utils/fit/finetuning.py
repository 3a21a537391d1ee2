"""Quantization-aware training: weights, step sizes and generators learn together; one loop, every method."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.record import Calls
from tdq_utils.denoiser.sampling import Condition, checked_seeds, rows_of
from tdq_utils.errors import TDQError, check, checked_path, checked_whole
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.calibration_set import check_eval, check_made_by
from tdq_utils.fit.loop import Trainer, denoising_loss, objective, recorded_loss, state_path
from tdq_utils.fit.quantize import (
    activation_quantizers,
    check_plain,
    checked_grid,
    checked_state,
    quantize,
    quantized_layers,
    restore,
)
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.rules import PACT_DECAY, RULES, pact

# method -> (rule of the gradient, where step sizes come from)
FINETUNED = dict(pact=("pact", "learned"), lsq=("lsq", "learned"), nipq=("nipq", "learned"), tdq=("lsq", "tdq"))
FINETUNED |= {"tdq-pact": ("pact", "tdq"), "tdq-nipq": ("nipq", "tdq")}
SETTINGS = dict(iterations="count", batch="count", warmup="count", rate="amount", step_rate="amount", generator_rate="amount")
SETTINGS |= dict(balance_rate="amount", decay="amount", distill="share", ema_decay="share", clip="positive")
# Rates relative to that of the weights (measured at W4A4 by "reproduce trials"; notebook 07). At a tenth, 600 iterations leave
# the constants of activations within 2 % of calibration's, and LSQ looks worse than it is. (So et al. 2023, authors' code: 1 for
# generators, without a factor; constants at a tenth, on a linear scale, in far longer runs.)
STEP_RATE, GENERATOR_RATE = 100.0, 1.0


def finetune(model: nn.Module, scheduler: Any, images: torch.Tensor | Calls, method: str = "tdq", weights: int | None = 4,
             activations: int | None = 4, iterations: int = 600, batch: int = 64, rate: float = 6e-4,
             step_rate: float = STEP_RATE, generator_rate: float = GENERATOR_RATE, warmup: int = 50, clip: float = 1.0,
             ema_decay: float = 0.99, distill: float = 0.0, seed: int = 0, split_skips: bool = False,
             balance: bool | str | None = None, balance_rate: float = 1.0, decay: float = PACT_DECAY, condition: Condition = None,
             out: str | Path | None = None, progress: bool = True, **calibration: Any) -> list[float]:  # fmt: skip
    """Quantize a full-precision model, calibrate it, and train it, in place, on the loss of what its scheduler says it predicts.

    AdamW; linear warm-up, cosine fall to zero; all random numbers follow from ``seed``. Returns the loss of each iteration.

    Args:
        model: full precision, evaluation mode; ``restore`` gives it back. images: ``"image channel height width"`` in [-1, 1]; or
            ``recorded.inputs`` of a pipeline: then the loss is the error against full precision, and no scheduler is needed.
        method: for activations: ``"pact"``, ``"lsq"``, ``"nipq"`` (:mod:`tdq_utils.method.rules`) with a learned constant a
            layer; ``"tdq"``, ``"tdq-pact"``, ``"tdq-nipq"``: with a generator s(t) instead. Steps of weights learn by LSQ.
        weights, activations, split_skips, balance: of ``quantize``. iterations, batch, warmup, clip: of training. decay: PACT's.
        rate: of weights and of the logarithms of their steps. step_rate: relative to it, of the logarithms of activations'
            constants, and of the factor of each s(t) (:meth:`tdq_utils.method.generator.StepGenerator.learn_scale`; 0: none).
        generator_rate, balance_rate: relative to ``rate``, of generators' networks and of the balance's logarithms (0: it stays).
        ema_decay: of the average that the model ends as. distill: share (0 to 1) of the loss that is against full precision.
        condition: as for ``sample``, a row an image; calibration samples with the first. For guidance, let some be the null one.
        out: folder for the state, saved every minute; a run found there goes on, bit for bit. calibration: of ``calibrate``.

    TDQError: unknown method or prediction type, quantized model, a setting out of range, an ``out`` that holds a run with others,
    a loss that is not finite (the last good state stays). Whatever stops it, the model is the full-precision one again.
    """
    path = _checked({name: value for name, value in locals().items() if name not in ("out", "progress")}, out)
    teacher = copy.deepcopy(model) if distill or isinstance(images, Calls) else None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rule, source = FINETUNED[method]
    quantize(model, weights, activations, source, split_skips=split_skips, balance=balance)
    checked_state(model).before = before
    try:
        calibrate(model, scheduler, progress=progress, seed=seed, **_seen(calibration, condition, images))
        _learn(model, partial(pact, decay=decay) if rule == "pact" else RULES[rule], step_rate > 0)
        trainer = Trainer(model, _optimizer(model, rate, step_rate, generator_rate, balance_rate), ema_decay, path, clip)
        loss_of = _loss(model, scheduler, images, batch, teacher, distill, condition)
        rate_of = lambda i: min((i + 1) / warmup, (1 + math.cos(math.pi * i / iterations)) / 2)  # noqa: E731
        losses = trainer.run(loss_of, rate_of, iterations, seed, "finetune", progress)
    except BaseException:
        _stop_learning(model)
        restore(model)
        raise
    _stop_learning(model)
    return losses


def _checked(given, out):
    """Refuse what :func:`finetune` was given; the path of the state of such a run in ``out``, or ``None``."""
    if given["method"] not in tuple(FINETUNED):
        raise TDQError(f"method must be one of {', '.join(FINETUNED)}; got {given['method']!r}.")
    check_plain(given["model"], "finetune")
    checked_grid(
        given["weights"], given["activations"], "tdq", "channel", given["balance"] if given["balance"] is not True else None
    )
    _check_images(given["model"], given["images"])
    checked_whole("seed", given["seed"], 0)
    for name, kind in SETTINGS.items():
        check(kind, **{name: given[name]})
    model, scheduler = given["model"], given["scheduler"]
    check_eval(model)
    if isinstance(given["images"], Calls):
        if given["condition"] or given["distill"]:
            raise TDQError("Recorded calls have their own conditions, and a loss against full precision alone; got condition or "
                           "distill, too. Leave it out.")  # fmt: skip
        check_made_by(model, given["images"].model, "set of recorded calls")
        given["images"] = given["images"].digest()
    else:
        objective(scheduler)
        rows_of(given["condition"], len(given["images"]), "condition", "images")
    if not given["condition"]:
        del given["condition"]  # as in the settings of runs from before there were any
    if not given["balance"]:
        del given["balance"], given["balance_rate"]
    if FINETUNED[given["method"]][0] != "pact":
        given["decay"] = None
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")} if scheduler else {}
    given |= dict(model=fingerprint(model), scheduler={"class": type(scheduler).__name__, **config})
    return None if out is None else state_path(checked_path(out), given)


def _check_images(model, images):
    """Refuse what is no set of finite images, or has other channels than the model's entry."""
    if not isinstance(images, (torch.Tensor, Calls)) or not len(images):
        raise TDQError(f"images must be a tensor of one image or more, or recorded.inputs; got a {type(images).__name__}.")
    if isinstance(images, torch.Tensor):
        channels = getattr(getattr(model, "conv_in", None), "in_channels", images.shape[1:2].numel())
        if images.dim() < 3 or images.shape[1] != channels or not images.is_floating_point():
            raise TDQError(f"images must be floats, image first, then the {channels} channels of the model; got {images.dtype} "
                           f"{tuple(images.shape)}.")  # fmt: skip
        if not torch.isfinite(images).all():
            raise TDQError("images must be finite; got NaN or infinity among them. Look at how they were read.")


def _seen(calibration, condition, images):
    """Arguments of calibration, which sees the recorded calls, or samples with the conditions of the first images, unless it
    is told what to see."""
    if isinstance(images, Calls):
        return calibration if calibration.keys() & {"data", "profile"} else calibration | dict(data=images)
    if not condition or calibration.keys() & {"data", "profile", "condition"}:
        return calibration
    seeds, n = checked_seeds(calibration.get("seeds") or range(64)), len(images)
    rows = rows_of(condition, n, "condition", "images")([i % n for i in range(len(seeds))])
    return calibration | dict(seeds=seeds, condition=rows)


def _loss(model, scheduler, images, batch, teacher, distill, condition):
    """What :func:`finetune` descends: a function of the random numbers of an iteration."""
    if isinstance(images, Calls):
        return partial(recorded_loss, model, images, teacher)
    more: dict[str, Any] = dict(condition=condition) if condition else {}
    more |= dict(teacher=teacher, distill=distill) if distill else {}
    return partial(denoising_loss, model, images.to(next(model.parameters()).device), scheduler, batch, **more)


class _Exp(nn.Module):
    """A positive tensor, learned by its logarithm: it cannot reach zero, and one rate fits any scale."""

    def forward(self, logarithm):
        return logarithm.exp()

    def right_inverse(self, positive):
        return positive.log()


def _learn(model, rule, scaled):
    """Make everything that QAT trains a parameter; ``scaled``: give generators a factor."""
    for layer, name in _learned(model):
        value = getattr(layer, name)
        delattr(layer, name)
        setattr(layer, name, nn.Parameter(value.clone()))
        parametrize.register_parametrization(layer, name, _Exp())
    for quantizer in activation_quantizers(model).values():
        quantizer.rule = rule
        if scaled and isinstance(quantizer.step, StepGenerator):
            quantizer.step.learn_scale()
    model.requires_grad_(True)


def _stop_learning(model):
    for layer, name in _learned(model):
        if parametrize.is_parametrized(layer, name):  # else it failed before that
            parametrize.remove_parametrizations(layer, name)
    model.requires_grad_(False).eval()


def _learned(model):
    """``(layer, name)``: step sizes of weights, and what balances channels."""
    layers = quantized_layers(model).values()
    steps = [(layer, "weight_step") for layer in layers if layer.weight_grid is not None]
    return steps + [(layer, "balance") for layer in layers if layer.balance is not None]


def _optimizer(model, rate, step_rate, generator_rate, balance_rate):
    """AdamW over groups of parameters: weights; what decides on step sizes, without decay, at rates of its own."""
    weights, balances = ([layer.parametrizations[name].original for layer, name in _learned(model) if name == kind]
                         for kind in ("weight_step", "balance"))  # fmt: skip
    activations = [named for q in activation_quantizers(model).values() for named in q.step.named_parameters()]
    logarithms = [parameter for name, parameter in activations if name in ("log_s", "log_scale")]
    networks = [parameter for name, parameter in activations if name not in ("log_s", "log_scale")]
    ids = {id(parameter) for parameter in weights + balances + logarithms + networks}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    rates = ((weights, rate), (balances, rate * balance_rate), (logarithms, rate * step_rate), (networks, rate * generator_rate))
    groups = [dict(params=others, rate=rate), *(dict(params=part, rate=own, weight_decay=0.0) for part, own in rates)]
    return torch.optim.AdamW([group for group in groups if group["params"]])
