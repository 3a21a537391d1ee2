"""Post-training quantization: measure the model's own trajectory, then choose every step size."""

import torch
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.errors import TDQError
from tdq_utils.profiling import profile_activations
from tdq_utils.quantize import CALIBRATED, DYNAMIC, METHODS, checked_state, full_precision, quantized_layers
from tdq_utils.quantizers import LearnedStep, StaticStep, TableStep, squared_error
from tdq_utils.temporal import StepGenerator


def calibrate(model, scheduler, seeds=range(64), steps=20, method=None, profile=None, progress=True, **options):
    """Choose the step size of every quantized layer's input from full-precision activations.

    The full-precision model samples along its own trajectory while each (layer, t) keeps a histogram
    (:func:`tdq_utils.profiling.profile_activations`). All methods then look at the squared error of quantizing those
    same activations:

    * ``"minmax"``: one value that truncates nothing.
    * ``"mse"``: one value, least squared error over the whole trajectory, by exhaustive search.
    * ``"learned"``: one value, by descending that error with LSQ's gradient.
    * ``"table"``: one value for each t visited, least squared error at that t, by exhaustive search.
    * ``"tdq"``: a generator s(t) for each layer (So et al. 2023), by descending that error with LSQ's gradient.

    "mse" and "table", and "learned" and "tdq", differ in nothing but the dependence on t. LSQ's gradient treats rounding
    as a constant offset and settles at slightly smaller steps than the search, so compare within these pairs.

    * ``"dynamic"``, ``"dynamic-sample"``: nothing to do.

    Args:
        model: quantized; its quantizers step aside while the trajectory is measured.
        scheduler, seeds, steps: the trajectory, as for :func:`tdq_utils.sampling.sample`.
        method: default, the method that :func:`tdq_utils.quantize.quantize` was given.
        profile: a :class:`tdq_utils.profiling.Profile` of this model to use instead of sampling again.
        progress: show bars.
        options: ``batch_size`` and ``condition`` of ``sample``; for "learned" and "tdq",
            ``iterations``, ``rate`` and ``seed`` of :func:`fit`; for "tdq", the arguments of
            :class:`tdq_utils.temporal.StepGenerator`.

    Raises:
        TDQError: not quantized, unknown method, no seeds, a profile that lacks a layer.
    """
    state = checked_state(model)
    method = method or state.method
    if method not in METHODS or (method in DYNAMIC) != (state.method in DYNAMIC):
        allowed = DYNAMIC if state.method in DYNAMIC else CALIBRATED
        raise TDQError(f"method must be one of {', '.join(allowed)} for this model; got {method!r}.")
    if method in DYNAMIC or state.activations is None:
        return
    sampling = {key: options.pop(key) for key in ("batch_size", "condition") if key in options}
    if options and method not in ("learned", "tdq"):
        raise TDQError(f"method {method!r} takes no further options; got {', '.join(options)}. They are for learned and tdq.")
    layers = quantized_layers(model)
    if profile is None:
        with full_precision(model):
            profile = profile_activations(model, scheduler, seeds, steps, layers=set(layers), progress=progress, **sampling)
    if missing := set(layers) - set(profile.layers):
        raise TDQError(f"profile must hold every quantized layer; {len(missing)} are missing, {min(missing)} among them.")
    problems = {name: _Problem(profile, name, state.activations) for name in layers}
    chosen = CHOOSERS[method](problems, progress=progress, **options)
    state.frozen = False
    for name, layer in layers.items():
        layer.rounded = None
        layer.activation.grid = problems[name].grid
        layer.activation.step = chosen[name].to(layer.weight.device).eval()
    state.method = method


class _Problem:
    """One layer's activations over t, as weighted values: all that any method here looks at."""

    def __init__(self, profile, layer, bits):
        row = profile.row(layer)
        self.grid = profile.grid(layer, bits)
        self.t = torch.from_numpy(profile.t)
        self.range = torch.tensor([profile.least[row].min(), profile.greatest[row].max()], dtype=torch.float32)
        self.best_steps = lambda: profile.best_steps(layer, bits)
        # Hundreds of iterations look at these: as coarse as the step size allows.
        self.values = lambda s_0: profile.values(layer, merge=profile.finest_merge(layer, s_0))


def _minmax(problems, progress):
    return {name: StaticStep(p.grid.widest_step(*p.range).clamp_min(1e-8)) for name, p in problems.items()}


def _mse(problems, progress):
    return {name: StaticStep(p.best_steps()[0]) for name, p in problems.items()}


def _table(problems, progress):
    return {name: TableStep(p.t, p.best_steps()[1]) for name, p in problems.items()}


def _learned(problems, progress, **fitting):
    return fit(problems, LearnedStep, progress, **fitting)


def _tdq(problems, progress, iterations=200, rate=3e-3, seed=0, **generator):
    def make(s_0):
        return StepGenerator(s_0, **generator)

    return fit(problems, make, progress, iterations, rate, seed)


def fit(problems, make, progress=True, iterations=200, rate=3e-3, seed=0):
    """Fit one source of step sizes a layer by gradient descent on the squared quantization error.

    Each starts at the layer's static MSE-optimal step size. The loss of a layer is its error over all t, relative to
    the static error, so that layers of any scale learn at one rate. Histograms stand for the activations, so every
    iteration sees all of them.

    Args:
        problems: ``{layer: activations}``. make: function of ``s_0`` that returns a source with ``at(t)``.
        iterations: of Adam with a cosine rate from ``rate``. seed: of weights and dropout.

    Returns:
        ``{layer: source}``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = tqdm(problems, desc="fit step sizes", disable=not progress, leave=False)
        return {name: _fit_layer(problems[name], make, iterations, rate) for name in names}


def _fit_layer(problem, make, iterations, rate):
    s_0, _ = problem.best_steps()
    values, counts = problem.values(s_0)
    source = make(float(s_0))
    scale = squared_error(values, counts, s_0.expand(len(values)), problem.grid).sum().clamp_min(1e-20)
    optimizer = torch.optim.Adam(source.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        error = squared_error(values, counts, source.at(problem.t), problem.grid).sum() / scale
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(source.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return source


CHOOSERS = {"minmax": _minmax, "mse": _mse, "learned": _learned, "table": _table, "tdq": _tdq}
