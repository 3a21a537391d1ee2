"""Bits chosen over time: one model whose activations have several precisions, and the policies that say which t gets which."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tdq_utils.denoiser.sampling import sample
from tdq_utils.errors import TDQError, check, checked_whole
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.loop import objective
from tdq_utils.fit.quantize import activation_quantizers, checked_state, full_precision
from tdq_utils.method.grid import Grid
from tdq_utils.method.step_sizes import DynamicStep, TableStep

Precision = dict[float, int]


class Precisions:
    """A quantized model, calibrated for several numbers of bits of activations; its weights are the same for all.

    :meth:`apply` puts a table in each quantizer that looks up step size and levels by t, as intervals are: what is saved, frozen,
    run in integers or exported then follows it. Runners of one model take over another precision by ``runner.load(model)``.

    Args:
        model: quantized, in evaluation mode; it ends at the most bits. bits: 2 to 8, different ones.
        calibration: arguments of :func:`tdq_utils.fit.calibration.calibrate`: data, a profile, or what makes it; ``method`` is a
            calibrated one. The same for each number of bits.

    Attributes:
        t: time steps that calibration saw, as it met them. bits: prepared, ascending.

    TDQError: no bits, bits out of range, a dynamic method, and what ``calibrate`` refuses.
    """

    def __init__(self, model: nn.Module, bits: Iterable[int], scheduler: Any = None, **calibration: Any):
        self.bits, state = sorted({checked_whole("bits", each, 2, 8) for each in bits}), checked_state(model)
        if not self.bits or state.activations is None:
            got = "none" if not self.bits else "activations in full precision"
            raise TDQError(f"Precisions need numbers of bits, and activations that are quantized; got {got}. Pass bits=(4, 8), "
                           "and quantize(model, activations=8).")  # fmt: skip
        if any(isinstance(quantizer.step, DynamicStep) for quantizer in activation_quantizers(model).values()):
            raise TDQError("Precisions are looked up by t; a dynamic method has none to look up. Quantize by 'table' or 'tdq'.")
        self.model, self.intervals = model, {}
        for each in self.bits:  # the most at last
            self._set_bits(each)
            calibrate(model, scheduler, **calibration)
            self.t = list(state.visited)
            self.intervals[each] = {
                name: quantizer.step.interval_on(self.t, quantizer.grid)
                for name, quantizer in activation_quantizers(model).items()
            }

    def _set_bits(self, bits):
        checked_state(self.model).activations = bits
        for quantizer in activation_quantizers(self.model).values():
            quantizer.bits = bits

    def apply(self, precision: int | Mapping[float, int]) -> None:
        """Quantize at each t with so many bits: ``{t: bits}`` for every t, or one number for all. TDQError: other t or bits."""
        chosen = dict.fromkeys(self.t, precision) if isinstance(precision, int) else dict(precision)
        self.check(chosen)
        self._set_bits(max(chosen.values()))
        for name, quantizer in activation_quantizers(self.model).items():
            rows = torch.stack([self.intervals[chosen[t]][name][i] for i, t in enumerate(self.t)])
            quantizer.grid = Grid(max(chosen.values()), quantizer.grid.low)
            quantizer.step = TableStep(self.t, rows[:, 0], rows[:, 1:]).to(rows.device).eval()

    def check(self, precision: Mapping[float, int]) -> None:
        """TDQError: a t that is not visited, one that is missing, or bits that the model was not prepared for."""
        known = ", ".join(f"{t:g}" for t in self.t)
        for what, wrong in {"names": set(precision) - set(self.t), "lacks": set(self.t) - set(precision)}.items():
            if wrong:
                raise TDQError(f"A precision names every visited t, {known}, and no other; this one {what} {min(wrong):g}. Make "
                               "it for the steps of the calibration, or prepare the model for others.")  # fmt: skip
        if unknown := set(precision.values()) - set(self.bits):
            raise TDQError(f"bits must be of those that the model was prepared for, {', '.join(map(str, self.bits))}; got "
                           f"{sorted(unknown)[0]!r}. Prepare them: Precisions(model, bits=...).")  # fmt: skip


def average_bits(precision: Mapping[float, int]) -> float:
    """Mean bits of activations over the steps of a trajectory."""
    return sum(precision.values()) / len(precision)


def constant(t: Sequence[float], bits: int) -> Precision:
    """The same bits at every t."""
    return dict.fromkeys(t, bits)


def first_and_last(t: Sequence[float], n: int = 3, high: int = 8, low: int = 4, last: int | None = None) -> Precision:
    """``high`` bits in the first ``n`` and the ``last`` (default: n) steps, ``low`` between (NVIDIA's step policy in diffusers,
    3 and 3). ``t``: in the order of sampling. TDQError: n is no whole number from 0 to that of the steps."""
    ends = [checked_whole(name, v, 0, len(t)) for name, v in (("n", n), ("last", n if last is None else last))]
    return {each: high if i < ends[0] or i >= len(t) - ends[1] else low for i, each in enumerate(t)}


def bisected(t: Sequence[float], error: Callable[[set[float]], float], budget: float, high: int = 8, low: int = 4) -> Precision:
    """``low`` bits at as many t as an error allows, found by halving (after TMPDiff, arXiv 2603.14062; its code was not read).

    The errors of steps are taken to add up. A part of the trajectory whose own error fits in its share of the budget gets low
    bits; another is halved, and what its first half leaves of the share goes to the second. At most ``2 len(t) - 1`` calls.

    Args:
        t: in the order of sampling. error: of the images, if these t are at low bits and all others at high.
        budget: of the sum of errors, 0 or more, in the same unit. TDQError: it is not.
    """
    check("amount", budget=budget)
    chosen = constant(t, high)

    def spend(part: list[float], share: float) -> float:
        if (cost := error(set(part))) <= share:
            chosen.update(constant(part, low))
            return cost
        if len(part) == 1:
            return 0.0
        half = (len(part) + 1) // 2
        spent = spend(part[:half], share / 2)
        return spent + spend(part[half:], share - spent)

    spend(list(t), budget)
    return chosen


def changes(model: nn.Module, scheduler: Any, seeds: Any = range(16), steps: int = 20, **sampling: Any) -> dict[float, float]:
    """Relative change of the predicted x_0 since the step before, ``{t: |x_0 - before| / |before|}``, a mean over seeds: a
    proxy of how much a step decides, known offline. The first step has that of the second. Arguments as for ``sample``.

    TDQError: a scheduler without ``alphas_cumprod``, or of another prediction than epsilon, sample and v.
    """
    x_0_of = _prediction(scheduler)
    before: dict[int, torch.Tensor] = {}
    found: dict[float, list[float]] = {}

    def measure(call):
        x_0 = x_0_of(call["x_t"].double(), call["eps"].double(), call["t"]).flatten(1).cpu()
        for seed, now in zip(call["seeds"], x_0, strict=True):
            old = before.get(seed, now)
            found.setdefault(call["t"], []).append(float((now - old).norm() / old.norm().clamp_min(1e-20)))
            before[seed] = now

    with full_precision(model):
        sample(model, scheduler, seeds, steps, callback=measure, **sampling)
    proxy = {t: sum(values) / len(values) for t, values in found.items()}
    first, *others = proxy
    return proxy | ({first: proxy[others[0]]} if others else {})


def _prediction(scheduler):
    """x_0 by what the model is trained to predict."""
    kind = objective(scheduler)
    if kind == "flow":
        raise TDQError(f"x_0 is read by alphas_cumprod; {type(scheduler).__name__} has none. Pass a proxy of your own.")

    def x_0(x_t, out, t):
        alpha = scheduler.alphas_cumprod[int(t)].double()
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        return {"epsilon": lambda: (x_t - b * out) / a, "sample": lambda: out, "v_prediction": lambda: a * x_t - b * out}[kind]()

    return x_0


def hysteresis(proxy: Mapping[float, float], up: float, down: float, high: int = 8, low: int = 4) -> Precision:
    """Bits that follow a proxy with hysteresis (after DyQ-VLA, arXiv 2603.07904): ``high`` once it reaches ``up``, until it falls
    below ``down``; ``low`` else. ``proxy``: in the order of sampling. TDQError: not 0 <= down <= up."""
    follow = Hysteresis(up, down, high, low)
    return {t: follow(value) for t, value in proxy.items()}


class Hysteresis:
    """The same, a value at a time, for a proxy that is measured while sampling: ``bits = follow(value)``."""

    def __init__(self, up: float, down: float, high: int = 8, low: int = 4):
        if not 0 <= down <= up:
            raise TDQError(f"A hysteresis needs 0 <= down <= up; got down = {down!r}, up = {up!r}.")
        self.up, self.down, self.high, self.low, self.raised = up, down, high, low, False

    def __call__(self, value: float) -> int:
        """Bits for the step after this value."""
        self.raised = value >= self.down if self.raised else value >= self.up
        return self.high if self.raised else self.low


def by_snr(t: Sequence[float], scheduler: Any, bits: Sequence[int], share: Sequence[float] | None = None) -> Precision:
    """More bits at a higher signal-to-noise ratio, as PTQD orders them: few at the noisy steps, many at the clean ones.

    ``bits``: few to many. ``share``: of the steps that each gets, in this order; default: equal ones.
    TDQError: a scheduler without ``alphas_cumprod``, shares that are not one for each of the bits, or do not add up to 1.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TDQError(
            f"The ratio is read from alphas_cumprod; {type(scheduler).__name__} has none. Choose bits by another policy."
        )
    share = [1 / len(bits)] * len(bits) if share is None else list(share)
    if len(share) != len(bits) or min(share) < 0 or abs(sum(share) - 1) > 1e-6:
        raise TDQError(f"share must have a part for each of {len(bits)} numbers of bits, 0 or more, together 1; got {share}.")
    alphas = scheduler.alphas_cumprod.double().numpy()
    noisy_first = sorted(t, key=lambda each: float(np.interp(each, np.arange(len(alphas)), alphas)))
    ends = np.round(np.cumsum(share) * len(t)).astype(int)
    place = {each: int(np.searchsorted(ends, i, side="right")) for i, each in enumerate(noisy_first)}
    return {each: bits[place[each]] for each in t}
