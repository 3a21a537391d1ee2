"""Quantization-aware training: weights, step sizes and generators learn together; one loop, every method."""

import copy
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.calibration import calibrate
from tdq_utils.errors import TDQError
from tdq_utils.quantize import activation_quantizers, checked_state, quantize, quantized_layers
from tdq_utils.rules import RULES
from tdq_utils.step_sizes import LearnedStep
from tdq_utils.training import denoising_loss, iteration_generator, load_state, save_state

# method -> (rule of the gradient, where step sizes come from)
FINETUNED = {
    "pact": ("pact", "learned"),
    "lsq": ("lsq", "learned"),
    "nipq": ("nipq", "learned"),
    "tdq": ("lsq", "tdq"),
    "tdq-pact": ("pact", "tdq"),
    "tdq-nipq": ("nipq", "tdq"),
}


def finetune(model, scheduler, images, method="tdq", weights=4, activations=4, iterations=600, batch=64, rate=6e-4,
             step_rate=0.1, warmup=50, clip=1.0, ema_decay=0.99, distill=0.0, seed=0, split_skips=False, out=None,
             progress=True, **calibration):  # fmt: skip
    """Quantize a full-precision model, calibrate it, and train it on the ordinary denoising loss, in place.

    Each sample has its own t, so s(t) has one value a sample; afterwards :func:`tdq_utils.quantize.freeze` turns it into
    a table. AdamW; linear warm-up, cosine fall to zero.

    Args:
        model, scheduler: in full precision; :func:`tdq_utils.quantize.restore` gives it back bit for bit.
        images: training images ``"image channel height width"`` in [-1, 1].
        method: ``"pact"``, ``"lsq"``, ``"nipq"`` (:mod:`tdq_utils.rules`) with a learned constant a layer; ``"tdq"``,
            ``"tdq-pact"``, ``"tdq-nipq"``: the same with the constant replaced by a generator s(t).
        weights, activations: bits. iterations, batch: of training. rate: of weights and generators. step_rate: that of
            static step sizes, relative to ``rate`` (a tenth: So et al. 2023, authors' code). warmup: iterations.
            clip: norm of the gradient.
        ema_decay: of the average of weights, step sizes and generators that the model ends with.
        distill: share of the loss that is the error against the full-precision model's prediction, 0 to 1.
        seed: of data, noise, dropout and generators. split_skips: as for :func:`tdq_utils.quantize.quantize`.
        out: folder for the state, saved every minute; a run found there goes on, with the same losses bit for bit.
            progress: show bars.
        calibration: ``data`` or ``profile`` and other arguments of :func:`tdq_utils.calibration.calibrate`.

    Returns:
        The loss of each iteration.

    Raises:
        TDQError: unknown method, a quantized model, ``distill`` out of range, or a loss that is not finite (the last good
            state stays on disk).
    """
    if method not in FINETUNED:
        raise TDQError(f"method must be one of {', '.join(FINETUNED)}; got {method!r}.")
    if not 0 <= distill <= 1:
        raise TDQError(
            f"distill must be from 0 (the ordinary loss) to 1 (the full-precision model's prediction alone); got {distill}."
        )
    rule, source = FINETUNED[method]
    teacher = dict(teacher=copy.deepcopy(model), distill=distill) if distill else {}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize(model, weights, activations, source, split_skips=split_skips)
    calibrate(model, scheduler, progress=progress, **calibration)
    checked_state(model).before = before
    _learn(model, rule)
    trainer = _Trainer(model, _groups(model, rate, rate * step_rate), ema_decay, clip, out)
    try:
        return trainer.run(
            partial(denoising_loss, model, images, scheduler, batch, **teacher), iterations, warmup, seed, progress
        )
    finally:
        model.eval().requires_grad_(False)


def _learn(model, rule):
    """Make everything that QAT trains a parameter."""
    model.requires_grad_(True)
    for layer in quantized_layers(model).values():
        if layer.weight_grid is not None:
            s = layer.weight_step
            del layer.weight_step
            layer.weight_step = nn.Parameter(s.clone())
    for quantizer in activation_quantizers(model).values():
        quantizer.rule = RULES[rule]


def _groups(model, rate, step_rate):
    """Parameter groups: static step sizes learn at a rate of their own, without decay."""
    slow = [q.step.log_s for q in activation_quantizers(model).values() if isinstance(q.step, LearnedStep)]
    slow += [layer.weight_step for layer in quantized_layers(model).values() if layer.weight_grid is not None]
    ids = {id(parameter) for parameter in slow}
    fast = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [dict(params=fast, lr=rate, rate=rate), dict(params=slow, lr=step_rate, rate=step_rate, weight_decay=0.0)]


class _Trainer:
    """AdamW, an average of all parameters, and their state on disk."""

    def __init__(self, model, groups, ema_decay, clip, out):
        self.model, self.ema_decay, self.clip = model, ema_decay, clip
        self.optimizer = torch.optim.AdamW(groups)
        self.ema = copy.deepcopy(nn.ParameterList(model.parameters())).requires_grad_(False)
        self.path = Path(out) / "state.pt" if out else None

    def run(self, loss_of, iterations, warmup, seed, progress):
        """Train to the end; the losses. Resumes from the state on disk."""
        parts = dict(model=self.model, ema=self.ema, optimizer=self.optimizer)
        start, log = load_state(self.path, **parts) if self.path else (0, [])
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
            torch.manual_seed(seed * 10_000_000 + i)  # dropout and NIPQ's noise
            loss = loss_of(iteration_generator(seed, i))
        if not torch.isfinite(loss):
            kept = f" The last good state is in {self.path}." if self.path else ""
            raise TDQError(f"The loss must stay finite; it is {loss.item()} at iteration {i}. Lower rate.{kept}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        decay = min(self.ema_decay, (1 + i) / (10 + i))
        with torch.no_grad():
            for average, parameter in zip(self.ema, self.model.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        return loss.item()
