"""Post-training quantization: measure the model's own trajectory, then choose every step size."""

import inspect

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.recording import as_profile, recording
from tdq_utils.errors import TDQError
from tdq_utils.fit import reconstruction
from tdq_utils.fit.calibration_set import CalibrationSet, skewed_density
from tdq_utils.fit.quantize import (
    CALIBRATED,
    DYNAMIC,
    METHODS,
    activation_quantizers,
    checked_state,
    full_precision,
    quantized_layers,
)
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.grid import mse_step, squared_error
from tdq_utils.method.step_sizes import LearnedStep, StaticStep, TableStep


def calibrate(model, scheduler, seeds=range(64), steps=20, method=None, data=None, profile=None, reconstruct="input",
              weights_method=None, shifted=True, progress=True, **options):  # fmt: skip
    """Choose the step size of every quantized layer's input from full-precision activations.

    The full-precision model runs on samples of its own trajectory (``data``) while each (layer, t) keeps a histogram
    (:mod:`tdq_utils.denoiser.recording`). All methods then look at the squared error of quantizing those same activations.
    One value a layer:

    * ``"minmax"``: truncates nothing. ``"momentum"``: the same range, averaged over batches by a moving average.
    * ``"percentile"``: truncates what lies beyond a percentile of the magnitude (option ``percentile``, default 99.9).
    * ``"mse"``: least squared error, by exhaustive search. ``"ptq4dm"``: the same, with t weighted as PTQ4DM draws it.
    * ``"learned"``: by descending the squared error.

    A value that depends on t:

    * ``"table"``: one for each t visited, least squared error at that t, by exhaustive search.
    * ``"tdq"``: a generator s(t) for each layer (So et al. 2023), by descending the error.

    "mse" and "table", and "learned" and "tdq", differ in nothing but the dependence on t.

    * ``"dynamic"``, ``"dynamic-sample"``: nothing to do.

    Args:
        model: quantized; its quantizers step aside while the trajectory is measured.
        scheduler, seeds, steps: the trajectory, as for :func:`tdq_utils.denoiser.sampling.sample`.
        method: default, the method that :func:`tdq_utils.fit.quantize.quantize` was given.
        data: a :class:`tdq_utils.fit.calibration_set.CalibrationSet` to use instead of sampling one.
        profile: a :class:`tdq_utils.denoiser.profile.Profile` of this model to use instead of running it on the data.
        reconstruct: for "learned" and "tdq", the error that is descended: of each layer's ``"input"``, or after that
            of each ``"block"``'s output or of the predicted ``"noise"`` (:func:`tdq_utils.fit.reconstruction.refine`).
        weights_method: ``"adaround"`` to learn whether each weight is rounded up or down
            (:func:`tdq_utils.fit.reconstruction.adaround`); default: to the nearest level.
        shifted: give inputs that follow SiLU, GELU or ReLU a shifted or unsigned grid (:class:`tdq_utils.method.grid.Grid`);
            ``False``: every grid is symmetric, for hardware without zero points.
        progress: show bars.
        options: ``batch_size`` and ``condition`` of ``sample``; those of the method, such as ``percentile``;
            for "learned" and "tdq", ``iterations``, ``rate``, ``seed`` and ``start`` of :func:`fit`; for "tdq", the arguments
            of :class:`tdq_utils.method.generator.StepGenerator`.

    Raises:
        TDQError: not quantized, unknown method or target, an option of another method (``shifted=False`` for a
            dynamic one), no seeds, a profile that lacks a layer, data of another model.
    """
    state = checked_state(model)
    method = _checked_method(state, method or state.method, reconstruct, weights_method)
    sampling = {key: options.pop(key) for key in ("batch_size", "condition") if key in options}
    chooser = None if method in DYNAMIC else CHOOSERS[method]
    if chooser is None and not shifted:
        raise TDQError(f"shifted=False belongs to methods that measure ranges; {method!r} chooses a grid for every input.")
    _check_options(method, chooser, options)
    if data is not None:
        data.check(model)
    elif weights_method or reconstruct != "input" or (profile is None and chooser and state.activations):
        data = CalibrationSet.collect(model, scheduler, seeds, steps, progress=progress, **sampling)
    if weights_method:
        reconstruction.adaround(model, data, progress=progress)
    if chooser is None or state.activations is None:
        return
    _choose(model, chooser, profile or profile_set(model, data), shifted, progress, options)
    state.method = method
    if reconstruct != "input":
        reconstruction.refine(model, data, reconstruct, progress=progress)


def _checked_method(state, method, reconstruct, weights_method):
    if method not in METHODS or (method in DYNAMIC) != (state.method in DYNAMIC):
        allowed = DYNAMIC if state.method in DYNAMIC else CALIBRATED
        raise TDQError(f"method must be one of {', '.join(allowed)} for this model; got {method!r}.")
    if reconstruct not in ("input", *reconstruction.TARGETS):
        raise TDQError(f"reconstruct must be 'input', {' or '.join(map(repr, reconstruction.TARGETS))}; got {reconstruct!r}.")
    if reconstruct != "input" and method not in ("learned", "tdq"):
        raise TDQError(f"reconstruct={reconstruct!r} needs a step size that learns, 'learned' or 'tdq'; got {method!r}.")
    if weights_method not in (None, "adaround"):
        raise TDQError(f"weights_method must be None (nearest level) or 'adaround'; got {weights_method!r}.")
    return method


def _check_options(method, chooser, options):
    functions = {"tdq": (_tdq, StepGenerator)}.get(method, (chooser,) if chooser else ())
    accepted = [name for function in functions for name in inspect.signature(function).parameters]
    accepted = [name for name in accepted if name not in ("problems", "progress", "s_0", "generator")]
    if unknown := set(options) - set(accepted):
        raise TDQError(f"{method!r} takes {', '.join(accepted) or 'no options'}; got {min(unknown)!r}.")


def profile_set(model, data, batch_size=16):
    """The :class:`tdq_utils.denoiser.profile.Profile` of a quantized model's layers, in full precision, on a calibration set."""
    parts = {name: layer.activation.parts(name) for name, layer in quantized_layers(model).items() if layer.split}
    device = next(model.parameters()).device
    with full_precision(model), torch.no_grad(), recording(model, set(quantized_layers(model)), parts) as cells:
        for x_t, t, condition in data.batches(batch_size, device):
            model(x_t, t, **condition)
        made_by = fingerprint(model)
    return as_profile(cells, made_by)


def _choose(model, chooser, profile, shifted, progress, options):
    """Give every quantized layer the step size that ``chooser`` finds."""
    state, quantizers = checked_state(model), activation_quantizers(model)
    if missing := set(quantizers) - set(profile.layers):
        raise TDQError(f"profile must hold every quantized layer; {len(missing)} are missing, {min(missing)} among them.")
    problems = {name: _Problem(profile, name, state.activations, shifted) for name in quantizers}
    chosen = chooser(problems, progress=progress, **options)
    state.frozen = False
    device = next(model.parameters()).device
    for layer in quantized_layers(model).values():
        layer.rounded = None
    for name, quantizer in quantizers.items():
        quantizer.grid, quantizer.step = problems[name].grid, chosen[name].to(device).eval()


class _Problem:
    """One layer's activations over t, as weighted values: all that any method here looks at."""

    def __init__(self, profile, layer, bits, shifted):
        row = profile.row(layer)
        self.grid = profile.grid(layer, bits, shifted)
        self.t = torch.from_numpy(profile.t)
        # "step 2": least and greatest value at each t
        self.ranges = torch.from_numpy(np.stack([profile.least[row], profile.greatest[row]], 1)).float()
        self.best_steps = lambda: profile.best_steps(layer, bits, shifted)
        # Hundreds of iterations look at these: as coarse as the step size allows.
        self.values = lambda s_0: profile.values(layer, merge=profile.finest_merge(layer, s_0))
        self.all_values = lambda: profile.values(layer)

    def widest_step(self, least, greatest):
        return StaticStep(self.grid.widest_step(least, greatest).clamp_min(1e-8))


def _minmax(problems, progress):
    return {name: p.widest_step(p.ranges[:, 0].min(), p.ranges[:, 1].max()) for name, p in problems.items()}


def _momentum(problems, progress, momentum=0.9, seed=0):
    """Batches are the images at one t, in random order: in the order of sampling the last few t would decide."""
    chosen = {}
    for name, p in problems.items():
        order = torch.randperm(len(p.t), generator=torch.Generator().manual_seed(seed))
        average = p.ranges[order[0]]
        for row in order[1:]:
            average = momentum * average + (1 - momentum) * p.ranges[row]
        chosen[name] = p.widest_step(*average)
    return chosen


def _percentile(problems, progress, percentile=99.9):
    if not 0 < percentile <= 100:
        raise TDQError(f"percentile must be above 0 and at most 100; got {percentile}.")
    chosen = {}
    for name, p in problems.items():
        values, counts = (part.flatten() for part in p.all_values())
        magnitude, order = values.abs().sort()
        share = counts.double()[order].cumsum(0) / counts.double().sum()
        reach = magnitude[(share < percentile / 100).sum().clamp(max=len(share) - 1)]
        chosen[name] = p.widest_step(-reach if p.grid.low is None else torch.tensor(0.0), reach)
    return chosen


def _mse(problems, progress):
    return {name: StaticStep(p.best_steps()[0]) for name, p in problems.items()}


def _ptq4dm(problems, progress):
    chosen = {}
    for name, p in problems.items():
        values, counts = p.all_values()
        counts = counts * torch.from_numpy(skewed_density(p.t)).float()[:, None]
        chosen[name] = StaticStep(mse_step(values.reshape(1, -1), p.grid, counts.reshape(1, -1))[0])
    return chosen


def _table(problems, progress):
    return {name: TableStep(p.t, p.best_steps()[1]) for name, p in problems.items()}


def _learned(problems, progress, iterations=100, rate=5e-3, seed=0, start="mse"):
    return fit(problems, LearnedStep, progress, iterations, rate, seed, start)


def _tdq(problems, progress, iterations=100, rate=5e-3, seed=0, start="mse", follow=0.5, **generator):
    def make(s_0):
        return StepGenerator(s_0, **generator)

    return fit(problems, make, progress, iterations, rate, seed, start, follow)


def _start(problem, rule):
    """Step size that a fit starts from."""
    if rule == "mse":
        return problem.best_steps()[0]
    values, counts = problem.all_values()
    mean = lambda x: (x * counts).sum() / counts.sum()  # noqa: E731
    if rule == "std":  # So et al. 2023, authors' code
        levels = (problem.grid.q_max - problem.grid.q_min + 1) / 2 - 1 if problem.grid.low is None else problem.grid.q_max
        reach = mean(values) + 3 * (values.square() * counts).sum().div(counts.sum()).sub(mean(values) ** 2).sqrt()
        return (reach - (problem.grid.low or 0.0)) / levels
    if rule == "lsq":  # Esser et al. 2020, section 2.1
        return 2 * mean(values.abs()) / problem.grid.q_max**0.5
    raise TDQError(f"start must be 'mse', 'std' or 'lsq'; got {rule!r}.")


def fit(problems, make, progress=True, iterations=100, rate=5e-3, seed=0, start="mse", follow=0.0):
    """Fit one source of step sizes a layer by gradient descent on the squared quantization error.

    The loss of a layer is its error over all t, relative to
    the static error, so that layers of any scale learn at one rate. Histograms stand for the activations, so every
    iteration sees all of them.

    Args:
        problems: ``{layer: activations}``. make: function of ``s_0`` that returns a source with ``at(t)``.
        iterations: of Adam with a cosine rate from ``rate``. seed: of weights and dropout.
        start: first step size of a layer: ``"mse"``, the MSE-optimal constant; ``"std"``, ``(mean + 3 std)`` over the
            number of positive levels (authors' code); or ``"lsq"``, ``2 mean|x| / sqrt(q_max)`` (Esser et al. 2020).
        follow: share of the iterations, at the beginning, that descend the squared distance of log s(t) to the best
            value of each step instead. At few bits the error has several minima in s (the shift of the grid is
            rounded to whole steps), and a curve that starts as a constant stays in that constant's.

    Returns:
        ``{layer: source}``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = tqdm(problems, desc="fit step sizes", disable=not progress, leave=False)
        return {name: _fit_layer(problems[name], make, iterations, rate, start, follow) for name in names}


def _fit_layer(problem, make, iterations, rate, start, follow):
    s_0, best = problem.best_steps()
    values, counts = problem.values(s_0)
    source = make(float(_start(problem, start)))
    scale = squared_error(values, counts, s_0.expand(len(values)), problem.grid).sum().clamp_min(1e-20)
    optimizer = torch.optim.Adam(source.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        s = source.at(problem.t)
        if i < follow * iterations:
            error = (s.log() - best.log()).square().mean()
        else:
            error = squared_error(values, counts, s, problem.grid).sum() / scale
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(source.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return source


CHOOSERS = {
    "minmax": _minmax,
    "momentum": _momentum,
    "percentile": _percentile,
    "mse": _mse,
    "ptq4dm": _ptq4dm,
    "learned": _learned,
    "table": _table,
    "tdq": _tdq,
}
