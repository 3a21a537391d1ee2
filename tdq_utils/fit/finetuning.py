"""Quantization-aware training: weights, step sizes and generators learn together; one loop, every method."""

import copy
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.loop import denoising_loss, iteration_generator, load_state, save_state, update_ema
from tdq_utils.fit.quantize import activation_quantizers, checked_state, quantize, quantized_layers, restore
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.rules import PACT_DECAY, RULES

# method -> (rule of the gradient, where step sizes come from)
FINETUNED = {
    "pact": ("pact", "learned"),
    "lsq": ("lsq", "learned"),
    "nipq": ("nipq", "learned"),
    "tdq": ("lsq", "tdq"),
    "tdq-pact": ("pact", "tdq"),
    "tdq-nipq": ("nipq", "tdq"),
}
# Rates relative to that of the weights (measured at W4A4 by "reproduce trials"; notebook 07). At a tenth, 600 iterations leave
# the constants of activations within 2 % of calibration's, and LSQ looks worse than it is.
STEP_RATE, GENERATOR_RATE = 100.0, 1.0


def finetune(model, scheduler, images, method="tdq", weights=4, activations=4, iterations=600, batch=64, rate=6e-4,
             step_rate=STEP_RATE, generator_rate=GENERATOR_RATE, warmup=50, clip=1.0, ema_decay=0.99, distill=0.0, seed=0,
             split_skips=False, decay=PACT_DECAY, out=None, progress=True, **calibration):  # fmt: skip
    """Quantize a full-precision model, calibrate it, and train it on the ordinary denoising loss, in place.

    Each sample has its own t, so s(t) has one value a sample; afterwards :func:`tdq_utils.fit.quantize.freeze` turns it into
    a table. AdamW; linear warm-up, cosine fall to zero.

    Args:
        model, scheduler: in full precision; :func:`tdq_utils.fit.quantize.restore` gives it back bit for bit.
        images: training images ``"image channel height width"`` in [-1, 1].
        method: ``"pact"``, ``"lsq"``, ``"nipq"`` (:mod:`tdq_utils.method.rules`) with a learned constant a layer; ``"tdq"``,
            ``"tdq-pact"``, ``"tdq-nipq"``: the same with the constant replaced by a generator s(t). That is for
            activations; the step sizes of weights learn by LSQ in all of them.
        weights, activations: bits. iterations, batch: of training. rate: of weights and of the logarithms of their step sizes.
        step_rate: of the logarithms of the step sizes of activations, relative to ``rate``: of the constants, and of the
            factor that each generator gets so that its s(t) can move as freely as a constant
            (:meth:`tdq_utils.method.generator.StepGenerator.learn_scale`); 0: there is none. (So et al. 2023, authors' code: no
            factor; constants at a tenth, on a linear scale, in far longer runs.)
        generator_rate: of the generators' networks, relative to ``rate`` (authors' code: 1).
        warmup: iterations. clip: norm of the gradient.
        ema_decay: of the average of weights, step sizes and generators that the model ends with.
        distill: share of the loss that is the error against the full-precision model's prediction, 0 to 1.
        seed: of data, noise, dropout and generators. split_skips: as for :func:`tdq_utils.fit.quantize.quantize`.
        decay: of PACT's alpha (:func:`tdq_utils.method.rules.pact`); the other rules have none.
        out: folder for the state, saved every minute; a run found there goes on, with the same losses bit for bit.
            progress: show bars.
        calibration: ``data`` or ``profile`` and other arguments of :func:`tdq_utils.fit.calibration.calibrate`.

    Returns:
        The loss of each iteration.

    Raises:
        TDQError: unknown method, a quantized model, a setting out of range, an ``out`` that holds a run with other
            settings, or a loss that is not finite (the last good state stays on disk). Whatever stops it, the model is the
            full-precision one again.
    """
    settings = dict(method=method, weights=weights, activations=activations, iterations=iterations, batch=batch, rate=rate,
                    step_rate=step_rate, generator_rate=generator_rate, warmup=warmup, clip=clip, ema_decay=ema_decay,
                    distill=distill, seed=seed, split_skips=split_skips, images=len(images))  # fmt: skip
    _check_settings(settings, decay)
    rule, source = FINETUNED[method]
    rule_options = dict(decay=decay) if rule == "pact" else {}
    path = _state_path(out, dict(model=fingerprint(model), **settings, **rule_options)) if out else None
    teacher = dict(teacher=copy.deepcopy(model), distill=distill) if distill else {}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize(model, weights, activations, source, split_skips=split_skips)
    checked_state(model).before = before
    try:
        calibrate(model, scheduler, progress=progress, seed=seed, **calibration)
        _learn(model, partial(RULES[rule], **rule_options), step_rate > 0)
        trainer = _Trainer(model, _groups(model, rate, step_rate, generator_rate), ema_decay, clip, path)
        images = images.to(next(model.parameters()).device)
        loss = partial(denoising_loss, model, images, scheduler, batch, **teacher)
        losses = trainer.run(loss, iterations, warmup, seed, progress)
        _stop_learning(model)
    except BaseException:
        restore(model)
        model.requires_grad_(False)
        raise
    finally:
        model.eval()
    return losses


def _check_settings(settings, decay):
    """Refuse bad values before any work."""
    if settings["method"] not in FINETUNED:
        raise TDQError(f"method must be one of {', '.join(FINETUNED)}; got {settings['method']!r}.")
    if not 0 <= (distill := settings["distill"]) <= 1:
        raise TDQError(
            f"distill must be from 0 (the ordinary loss) to 1 (the full-precision model's prediction alone); got {distill}."
        )
    for name in ("iterations", "batch", "warmup", "images"):
        if settings[name] < 1:
            raise TDQError(f"{name} must be 1 or more; got {settings[name]}.")
    for name in ("rate", "step_rate", "generator_rate"):
        if not settings[name] >= 0:
            raise TDQError(f"{name} must be 0 (learn nothing) or more; got {settings[name]}.")
    if not decay >= 0:
        raise TDQError(f"decay must be 0 (nothing holds PACT's grid) or more; got {decay}.")


def _state_path(out, settings):
    """Path of the state in ``out``, which keeps its settings beside it. TDQError: it holds a run with others."""
    state, kept = Path(out) / "state.pt", Path(out) / "settings.json"
    if state.exists():
        other = json.loads(kept.read_text()) if kept.exists() else {}
        for name, value in settings.items():
            if other.get(name) != value:
                raise TDQError(
                    f"A run goes on with the settings that it began with; {out} holds one with {name} = {other.get(name)!r}, "
                    f"this one has {value!r}. Choose another out, or delete that folder."
                )
    else:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(settings, indent=1) + "\n")
    return state


class _Exp(nn.Module):
    """A positive tensor, learned by its logarithm: it cannot reach zero, and one rate fits any scale."""

    def forward(self, logarithm):
        return logarithm.exp()

    def right_inverse(self, positive):
        return positive.log()


def _learn(model, rule, scaled):
    """Make everything that QAT trains a parameter; ``scaled``: give generators a factor."""
    for layer in _weighted(model):
        s = layer.weight_step
        del layer.weight_step
        layer.weight_step = nn.Parameter(s.clone())
        parametrize.register_parametrization(layer, "weight_step", _Exp())
    for quantizer in activation_quantizers(model).values():
        quantizer.rule = rule
        if scaled and isinstance(quantizer.step, StepGenerator):
            quantizer.step.learn_scale()
    model.requires_grad_(True)


def _stop_learning(model):
    for layer in _weighted(model):
        parametrize.remove_parametrizations(layer, "weight_step")
    model.requires_grad_(False)


def _weighted(model):
    """The layers whose weights are quantized."""
    return [layer for layer in quantized_layers(model).values() if layer.weight_grid is not None]


def _groups(model, rate, step_rate, generator_rate):
    """Parameter groups: weights; what decides on step sizes, without decay, at rates of its own."""
    weights = [layer.parametrizations.weight_step.original for layer in _weighted(model)]
    activations = [named for q in activation_quantizers(model).values() for named in q.step.named_parameters()]
    logarithms = [parameter for name, parameter in activations if name in ("log_s", "log_scale")]
    networks = [parameter for name, parameter in activations if name not in ("log_s", "log_scale")]
    ids = {id(parameter) for parameter in weights + logarithms + networks}
    groups = [
        dict(params=[parameter for parameter in model.parameters() if id(parameter) not in ids], rate=rate),
        dict(params=weights, rate=rate, weight_decay=0.0),
        dict(params=logarithms, rate=rate * step_rate, weight_decay=0.0),
        dict(params=networks, rate=rate * generator_rate, weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]


class _Trainer:
    """AdamW, an average of all parameters, and their state on disk."""

    def __init__(self, model, groups, ema_decay, clip, path):
        self.model, self.ema_decay, self.clip, self.path = model, ema_decay, clip, path
        self.optimizer = torch.optim.AdamW(groups)
        self.ema = copy.deepcopy(nn.ParameterList(model.parameters())).requires_grad_(False)

    def run(self, loss_of, iterations, warmup, seed, progress):
        """Train to the end; the losses. Resumes from the state on disk."""
        parts = dict(model=self.model, ema=self.ema, optimizer=self.optimizer)
        start, log = load_state(self.path, **parts) if self.path else (0, [])
        saved = time.monotonic()
        self.model.train()
        todo = range(start, iterations)
        for i in (bar := tqdm(todo, initial=start, total=iterations, desc="finetune", disable=not progress, leave=False)):
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * min((i + 1) / warmup, (1 + math.cos(math.pi * i / iterations)) / 2)
            log.append(self._step(loss_of, i, seed))
            if self.path and (time.monotonic() - saved > 60 or i + 1 == iterations):
                save_state(self.path, i + 1, log, **parts)
                saved = time.monotonic()
            bar.set_postfix(loss=f"{sum(log[-50:]) / len(log[-50:]):.4f}", refresh=False)
        with torch.no_grad():
            for parameter, average in zip(self.model.parameters(), self.ema, strict=True):
                parameter.copy_(average)
        return log

    def _step(self, loss_of, i, seed):
        with torch.random.fork_rng(devices=[]):
            # Dropout and NIPQ's noise: another stream than that of the batch, which seed and i alone would repeat.
            torch.manual_seed(seed * 10_000_000 + 5_000_000 + i)
            loss = loss_of(iteration_generator(seed, i))
        self._check_finite("loss", loss, i)
        self.optimizer.zero_grad()
        loss.backward()
        self._check_finite("norm of the gradient", nn.utils.clip_grad_norm_(self.model.parameters(), self.clip), i)
        self.optimizer.step()
        update_ema(self.ema, self.model, self.ema_decay, i)
        return loss.item()

    def _check_finite(self, what, value, i):
        if not torch.isfinite(value):
            kept = f" The last good state is in {self.path}." if self.path else ""
            raise TDQError(f"The {what} must stay finite; it is {value.item()} at iteration {i}. Lower rate.{kept}")
