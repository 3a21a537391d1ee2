"""Post-training quantization: measure the model's own trajectory, then choose every step size."""

import torch
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.errors import TDQError
from tdq_utils.profiling import profile_activations
from tdq_utils.quantize import CALIBRATED, DYNAMIC, METHODS, checked_state, full_precision, quantized_layers
from tdq_utils.quantizers import StaticStep, TableStep, mse_step, squared_error
from tdq_utils.temporal import StepGenerator


def calibrate(model, scheduler, seeds=range(64), steps=20, method=None, profile=None, progress=True, **options):
    """Choose the step size of every quantized layer's input from full-precision activations.

    The full-precision model samples along its own trajectory while each (layer, t) keeps a histogram
    (:func:`tdq_utils.profiling.profile_activations`). All methods then minimize, or bound, the squared error of
    quantizing those same activations, so they differ only in what the step size may depend on:

    * ``"minmax"``: one value that truncates nothing.
    * ``"mse"``: one value, least squared error over the whole trajectory.
    * ``"table"``: one value for each t visited, least squared error at that t.
    * ``"tdq"``: a generator s(t) for each layer (So et al. 2023), fitted by :func:`fit_generators`.
    * ``"dynamic"``, ``"dynamic-sample"``: nothing to do.

    Args:
        model: quantized; its quantizers step aside while the trajectory is measured.
        scheduler, seeds, steps: the trajectory, as for :func:`tdq_utils.sampling.sample`.
        method: default, the method that :func:`tdq_utils.quantize.quantize` was given.
        profile: a :class:`tdq_utils.profiling.Profile` of this model to use instead of sampling again.
        progress: show bars.
        options: ``batch_size`` and ``condition`` of ``sample``; for "tdq", ``iterations``, ``rate``, ``seed`` and the
            arguments of :class:`tdq_utils.temporal.StepGenerator`.

    Returns:
        The model, calibrated, in eval mode.

    Raises:
        TDQError: not quantized, unknown method, no seeds, a profile that lacks a layer.
    """
    state = checked_state(model)
    method = method or state.method
    if method not in METHODS or (method in DYNAMIC) != (state.method in DYNAMIC):
        allowed = DYNAMIC if state.method in DYNAMIC else CALIBRATED
        raise TDQError(f"method must be one of {', '.join(allowed)} for this model; got {method!r}.")
    if method in DYNAMIC or state.activations is None:
        return model
    sampling = {key: options.pop(key) for key in ("batch_size", "condition") if key in options}
    layers = quantized_layers(model)
    if profile is None:
        with full_precision(model):
            profile = profile_activations(model, scheduler, seeds, steps, layers=set(layers), progress=progress, **sampling)
    if missing := set(layers) - set(profile.layers):
        raise TDQError(f"profile must hold every quantized layer; {len(missing)} are missing, {min(missing)} among them.")
    problems = {name: _Problem(profile, profile.layers.index(name), state.activations) for name in layers}
    chosen = CHOOSERS[method](problems, progress=progress, **options)
    for name, layer in layers.items():
        layer.activation.grid = problems[name].grid
        layer.activation.step = chosen[name].to(layer.weight.device).eval()
    state.method = method
    return model


class _Problem:
    """One layer's activations over t, as weighted values: all that any method here looks at."""

    def __init__(self, profile, layer, bits):
        self.grid = profile.grid(layer, bits)
        self.t = torch.from_numpy(profile.t)
        self.values, counts = profile.values(layer)
        self.counts = counts / counts.sum()  # so that the error is a mean over all activations
        self.range = torch.tensor([profile.least[layer].min(), profile.greatest[layer].max()], dtype=torch.float32)

    def static(self):
        return mse_step(self.values.reshape(1, -1), self.grid, self.counts.reshape(1, -1))[0]

    def per_step(self):
        return mse_step(self.values, self.grid, self.counts)


def _minmax(problems, progress):
    return {name: StaticStep(p.grid.widest_step(*p.range).clamp_min(1e-8)) for name, p in problems.items()}


def _mse(problems, progress):
    return {name: StaticStep(p.static()) for name, p in problems.items()}


def _table(problems, progress):
    return {name: TableStep(p.t, p.per_step()) for name, p in problems.items()}


def fit_generators(problems, progress=True, iterations=400, rate=3e-3, seed=0, **generator):
    """Fit one :class:`StepGenerator` a layer by gradient descent on the squared quantization error.

    Each starts at the layer's static MSE-optimal step size. The loss of a layer is its error over all t,
    relative to the static error, so that layers of any scale learn at one rate; LSQ's gradient of the step
    size goes on into the generator. Histograms stand for the activations, so every iteration sees all of them.

    Args:
        problems: ``{layer: activations}``. iterations: of Adam with a cosine rate from ``rate``.
        seed: of the generators' weights and dropout. generator: arguments of :class:`StepGenerator`.

    Returns:
        ``{layer: StepGenerator}``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = tqdm(problems, desc="fit generators", disable=not progress, leave=False)
        return {name: _fit_generator(problems[name], iterations, rate, generator) for name in names}


def _fit_generator(problem, iterations, rate, settings):
    s_0 = problem.static()
    generator = StepGenerator(float(s_0), **settings)
    scale = squared_error(problem.values, problem.counts, s_0.expand(len(problem.t)), problem.grid).sum().clamp_min(1e-20)
    optimizer = torch.optim.Adam(generator.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        error = squared_error(problem.values, problem.counts, generator.at(problem.t), problem.grid).sum() / scale
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return generator


CHOOSERS = {"minmax": _minmax, "mse": _mse, "table": _table, "tdq": fit_generators}
