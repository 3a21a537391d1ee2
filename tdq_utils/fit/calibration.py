"""Post-training quantization: measure the model's own trajectory, then choose every step size."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of, predict
from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.record import Calls
from tdq_utils.denoiser.recording import as_profile, recording
from tdq_utils.denoiser.sampling import SAMPLING
from tdq_utils.errors import TDQError, check, checked_whole
from tdq_utils.fit import reconstruction
from tdq_utils.fit.balancing import balance_layers
from tdq_utils.fit.calibration_set import CalibrationSet, check_data, check_eval, check_made_by, skewed_density
from tdq_utils.fit.loop import descend
from tdq_utils.fit.quantize import (
    DYNAMIC,
    activation_quantizers,
    checked_state,
    dynamic_step,
    full_precision,
    keep_too,
    quantized_layers,
)
from tdq_utils.method.generator import StepGenerator, unit_of
from tdq_utils.method.grid import Grid, mse_step, squared_error
from tdq_utils.method.step_sizes import LearnedStep, StaticStep, StepSize, TableStep

OPTIONS = dict(iterations="count", rate="positive", momentum="share", follow="share", percentile="percent")
OPTIONS |= dict(depth="count", hidden="count", dropout="share")  # of generators


def calibrate(model: nn.Module, scheduler: Any = None, seeds: int | Iterable[int] | None = None, steps: int | None = None,
              method: str | None = None, data: CalibrationSet | Calls | None = None, profile: Profile | None = None,
              reconstruct: str = "input", weights_method: str | None = None, shifted: bool = True, progress: bool = True,
              **options: Any) -> None:  # fmt: skip
    """Choose the step size of every quantized layer's input by the squared error of quantizing full-precision activations.

    The full-precision model runs on samples of its own trajectory, ``data``; each (layer, t) keeps a histogram, ``profile``.

    Args:
        model: quantized, in evaluation mode; its quantizers step aside while the trajectory is measured.
        scheduler, seeds, steps: a short way to ``data``, as for :func:`tdq_utils.denoiser.sampling.sample` (default: 64 images,
            20 steps); of ``options``, ``batch_size``, ``condition``, ``guidance`` and others of ``sample`` belong to it, too.
        method: a key of ``CHOOSERS``, which says what each does, or of ``DYNAMIC``; default: that of ``quantize``.
        data: a ``CalibrationSet``, or the inputs of a recording, to run the model on; the only way where channels are balanced.
        profile: of this model, instead of data; beside it where ``reconstruct`` or ``weights_method`` needs samples.
        reconstruct: for "learned" and "tdq", the error that is descended: of each layer's ``"input"``, or after that
            of each ``"block"``'s output or of the predicted ``"noise"`` (:func:`tdq_utils.fit.reconstruction.refine`).
        weights_method: ``"adaround"``: :func:`tdq_utils.fit.reconstruction.adaround`; default: to the nearest level.
        shifted: give inputs that follow SiLU, GELU or ReLU a shifted or unsigned grid (:class:`tdq_utils.method.grid.Grid`);
            ``False``: every grid is symmetric, for hardware without zero points. progress: show bars.
        options: of the method's chooser; "tdq" takes those of :class:`tdq_utils.method.generator.StepGenerator`, too.

    TDQError: not quantized, in training mode, unknown method or target, an option of another method (``shifted=False`` for
    a dynamic one) or out of range, an input that is missing, of another model, or more than is used.
    """
    state = checked_state(model)
    check_eval(model)
    method = state.method if method is None else method
    making = dict(seeds=seeds, steps=steps) | {name: options.pop(name, None) for name in SAMPLING}
    _check(state, method, reconstruct, weights_method, options, shifted)
    samples, chooses = bool(weights_method) or reconstruct != "input", method not in DYNAMIC and state.activations is not None
    source = _source(model, scheduler, making, data, profile, samples or bool(state.balance), chooses, progress)
    grids = balance_layers(model, source, shifted, progress=progress) if state.balance else {}
    if weights_method:
        reconstruction.adaround(model, source, progress=progress)
    skewed = method == "ptq4dm" and profile is None and getattr(source, "at", "") == "skewed"  # then t has its weight already
    profile = profile or (profile_set(model, source) if chooses else None)
    keep_too(model, profile.carries_t if profile else (), "measured: gets one vector a sample, so t or pooled conditions")
    if chooses:
        _choose(model, CHOOSERS["mse" if skewed else method], profile, shifted, progress, options, grids)
    elif state.activations is not None:
        _follow_input(model, method)
    state.method = method
    if reconstruct != "input":
        reconstruction.refine(model, source, reconstruct, progress=progress)


def _check(state, method, reconstruct, weights_method, options, shifted):
    if method not in (allowed := tuple(DYNAMIC if state.method in DYNAMIC else CHOOSERS)):
        raise TDQError(f"method must be one of {', '.join(allowed)} for this model; got {method!r}.")
    if reconstruct not in ("input", *reconstruction.TARGETS):
        raise TDQError(f"reconstruct must be 'input', {' or '.join(map(repr, reconstruction.TARGETS))}; got {reconstruct!r}.")
    if reconstruct != "input" and (method not in ("learned", "tdq") or state.activations is None):
        got = repr(method) if state.activations else "activations in full precision"
        raise TDQError(f"reconstruct={reconstruct!r} needs a step size that learns, 'learned' or 'tdq'; got {got}.")
    if weights_method not in (None, "adaround"):
        raise TDQError(f"weights_method must be None (nearest level) or 'adaround'; got {weights_method!r}.")
    if weights_method and state.weights is None:
        raise TDQError("'adaround' rounds quantized weights; these are in full precision. Call quantize(model, weights=4) first.")
    if method == "finite-set" and not shifted:
        raise TDQError("shifted=False is for hardware without zero points; 'finite-set' is a zero level for each t. Use 'table'.")
    if method in DYNAMIC and not shifted:
        raise TDQError(f"shifted=False belongs to methods that measure ranges; {method!r} chooses a grid for every input.")
    functions = (_tdq, StepGenerator) if method == "tdq" else () if method in DYNAMIC else (CHOOSERS[method],)
    accepted = [n for f in functions for n in inspect.signature(f).parameters if n not in ("p", "s_0", "generator")]
    if unknown := set(options) - set(accepted):
        raise TDQError(f"{method!r} takes {', '.join(accepted) or 'no options'}; got {min(unknown)!r}.")
    for name in OPTIONS.keys() & options:
        check(OPTIONS[name], **{name: options[name]})
    checked_whole("seed", options.get("seed", 0), 0)
    if options.get("start", "mse") not in ("mse", "std", "lsq"):
        raise TDQError(f"start must be 'mse', 'std' or 'lsq'; got {options['start']!r}.")


def _source(model, scheduler, making, data, profile, samples, chooses, progress):
    """The calibration set, given or made; ``None``: none is needed. What would be ignored, or is of another model, is refused."""
    making = {key: value for key, value in making.items() if value is not None}
    if profile is not None and checked_state(model).balance:
        raise TDQError("A balanced model is calibrated on calls: no profile has ranges after balancing; got a profile. Pass "
                       "data: a CalibrationSet, or recorded.inputs of record(model, inputs=n).")  # fmt: skip
    profiled = profile is not None and not samples
    unused = [*(making if data is not None or profiled else ()), *(["data"] if data is not None and profiled else ())]
    if unused:
        raise TDQError(f"calibrate takes one input: data (or what makes it), or a profile. Leave out {', '.join(unused)}.")
    if profile is not None and not isinstance(profile, Profile):
        raise TDQError(
            f"profile must be a Profile, as record or profile_activations makes it; got {profile!r}. Profile.load(file)?"
        )
    if data is not None:
        check_data(model, data)
    if profile is not None:
        check_made_by(model, profile.model, "profile")
    if data is not None or not (samples or (chooses and profile is None)):
        return data
    if scheduler is None:
        raise TDQError("calibrate needs samples to run the model on; got none. Pass data, or scheduler, seeds and steps.")
    return CalibrationSet.collect(model, scheduler, progress=progress, **making)


def profile_set(model: nn.Module, data: CalibrationSet | Calls, batch_size: int = 16) -> Profile:
    """The :class:`tdq_utils.denoiser.profile.Profile` of a quantized model's layers, in full precision, on a calibration set.

    Of balanced layers: of their inputs after the division.
    """
    layers, device = quantized_layers(model), device_of(model)
    parts = {name: layer.activation.parts(name) for name, layer in layers.items() if layer.split}
    factors = {name: layer.balance for name, layer in layers.items() if layer.balance is not None}
    with full_precision(model), torch.no_grad(), recording(model, set(layers), parts, factors) as cells:
        for batch in data.batches(batch_size, device):
            predict(model, *batch)
    return as_profile(cells, data.model)


def _follow_input(model, method):
    """Let every quantized layer take the interval of the input at hand."""
    for layer in (layer for layer in quantized_layers(model).values() if layer.activation is not None):
        for quantizer in getattr(layer.activation, "halves", [layer.activation]):
            quantizer.step = dynamic_step(layer, method).eval()


def _choose(model, chooser, profile, shifted, progress, options, grids):
    state, quantizers = checked_state(model), activation_quantizers(model)
    if missing := set(quantizers) - set(profile.layers):
        raise TDQError(f"profile must hold every quantized layer; {len(missing)} are missing, {min(missing)} among them. Record "
                       "all that run, and name those that do not: quantize(model, keep=[*kept_layers(model), ...]).")  # fmt: skip
    problems = {name: _Problem(profile, name, state.activations, shifted, grids.get(name)) for name in quantizers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.get("seed", 0))  # of weights and dropout
        names = tqdm(quantizers, desc="choose step sizes", disable=not progress, leave=False)
        chosen = {name: chooser(problems[name], **options) for name in names}
    state.frozen, state.visited, device = False, profile.t.tolist(), device_of(model)
    for layer in quantized_layers(model).values():
        layer.rounded = None
    for name, quantizer in quantizers.items():
        quantizer.grid, quantizer.step = problems[name].grid, chosen[name].to(device).eval()


class _Problem:
    """One layer's activations over t, as weighted values: all that any method here looks at."""

    def __init__(self, profile, layer, bits, shifted, grid):
        row, self.grid, self.t = profile.row(layer), grid or profile.grid(layer, bits, shifted), torch.from_numpy(profile.t)
        self.least, self.greatest = (torch.from_numpy(ends[row]).float() for ends in (profile.least, profile.greatest))
        self.best_steps = lambda: profile.best_steps(layer, self.grid)
        # Hundreds of iterations look at these: as coarse as the step size allows.
        self.values = lambda s_0: profile.values(layer, merge=profile.finest_merge(layer, s_0))
        self.all_values = lambda: profile.values(layer)

    def widest_step(self, least, greatest):
        return StaticStep(self.grid.widest_step(least, greatest).clamp_min(1e-8))


def _momentum(p, momentum=0.9, seed=0):
    """The min-max range, averaged over batches (the images at one t) by a moving average."""
    # In random order: in the order of sampling the last few t would decide.
    order = torch.randperm(len(p.t), generator=torch.Generator().manual_seed(seed))
    ends = torch.stack([p.least, p.greatest], 1)[order]
    return p.widest_step(*reduce(lambda average, pair: momentum * average + (1 - momentum) * pair, ends))


def _percentile(p, percentile=99.9):
    """Truncates what lies beyond a percentile of the magnitude."""
    values, counts = (part.flatten() for part in p.all_values())
    magnitude, order = values.abs().sort()
    share = counts.double()[order].cumsum(0) / counts.double().sum()
    reach = magnitude[(share < percentile / 100).sum().clamp(max=len(share) - 1)]
    return p.widest_step(-reach if p.grid.low is None else torch.tensor(0.0), reach)


def _ptq4dm(p):
    """Least squared error, with t weighted as PTQ4DM draws it."""
    values, counts = p.all_values()
    counts = counts * torch.from_numpy(skewed_density(p.t)).float()[:, None]
    return StaticStep(mse_step(values.reshape(1, -1), p.grid, counts.reshape(1, -1))[0])


def _learned(p, iterations=100, rate=5e-3, seed=0, start="mse"):
    """A constant, by descending the squared error."""
    return fit(p, LearnedStep, iterations, rate, start)


def _tdq(p, iterations=100, rate=5e-3, seed=0, start="mse", follow=0.5, **generator):
    """A generator s(t) (So et al. 2023), by descending the squared error."""
    return fit(p, partial(StepGenerator, **unit_of(p.t), **generator), iterations, rate, start, follow)


def _start(p, rule):
    if rule == "mse":
        return p.best_steps()[0]
    values, counts = p.all_values()
    mean = lambda x: (x * counts).sum() / counts.sum()  # noqa: E731
    if rule == "std":
        levels = (p.grid.q_max - p.grid.q_min + 1) / 2 - 1 if p.grid.low is None else p.grid.q_max
        reach = mean(values) + 3 * (values.square() * counts).sum().div(counts.sum()).sub(mean(values) ** 2).sqrt()
        return (reach - (p.grid.low or 0.0)) / levels
    return 2 * mean(values.abs()) / p.grid.q_max**0.5


def fit(p: _Problem, make: Callable[[float], Any], iterations: int = 100, rate: float = 5e-3, start: str = "mse",
        follow: float = 0.0) -> StepSize:  # fmt: skip
    """Fit a layer's source of step sizes by gradient descent on the squared quantization error, relative to the static error.

    Args:
        p: the layer's activations. make: function of a first step size that returns a source with ``at(t)``.
        iterations: of Adam with a cosine rate from ``rate``. start: first step size: ``"mse"``, the MSE-optimal constant;
            ``"std"``, ``(mean + 3 std)`` over the number of positive levels (So et al. 2023, authors' code); or ``"lsq"``,
            ``2 mean|x| / sqrt(q_max)`` (Esser et al. 2020, section 2.1).
        follow: share of the iterations, at the beginning, that descend the squared distance of log s(t) to the best
            value of each step instead. At few bits the error has several minima in s (the shift of the grid is
            rounded to whole steps), and a curve that starts as a constant stays in that constant's.
    """
    s_0, best = p.best_steps()
    values, counts = p.values(s_0)
    source = make(float(_start(p, start)))
    scale = squared_error(values, counts, s_0.expand(len(values)), p.grid).sum().clamp_min(1e-20)

    def error(i):
        s = source.at(p.t)
        near = i < follow * iterations
        return (s.log() - best.log()).square().mean() if near else squared_error(values, counts, s, p.grid).sum() / scale

    descend(error, list(source.parameters()), iterations, rate)
    return source


def _finite_set(p):
    """A step size and a zero level of its own at each t, so that the grid just holds [least, greatest] (TFMQ-DM's calibration).

    0 is a level at every t. TFMQ-DM averages the ends over batches; here they are those of all images.
    """
    p.grid = Grid(p.grid.bits, low=0.0)
    least, greatest = p.least.clamp(max=0), p.greatest.clamp(min=0)
    s = ((greatest - least) / p.grid.q_max).clamp_min(1e-8)
    zero = (-least / s).round().clamp(max=p.grid.q_max)
    return TableStep(p.t, s, torch.stack([-zero, p.grid.q_max - zero], dim=1))


# What chooses a layer's step size, of its activations; "mse" and "table", and "learned" and "tdq", differ in nothing but time.
CHOOSERS = {
    "minmax": lambda p: p.widest_step(p.least.min(), p.greatest.max()),  # truncates nothing
    "momentum": _momentum,
    "percentile": _percentile,
    "mse": lambda p: StaticStep(p.best_steps()[0]),  # least squared error, by exhaustive search
    "ptq4dm": _ptq4dm,
    "learned": _learned,
    "table": lambda p: TableStep(p.t, p.best_steps()[1]),  # the same as "mse" at each t visited
    "finite-set": _finite_set,
    "tdq": _tdq,
}
