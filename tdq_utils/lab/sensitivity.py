"""What quantization does to a model's output on recorded calls: in all layers, in one layer alone, in all but one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of, predict
from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.record import Calls, Recorded, record
from tdq_utils.denoiser.sampling import Condition, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import (
    check_plain,
    checked_grid,
    checked_state,
    keep_too,
    quantize,
    quantized_layers,
    restore,
    round_weights,
)

SWITCHED = ("activation", "weight_grid", "rounded")  # without these, a quantized layer computes as it did before
MEASURED = "measured: gets one vector a sample, so t or pooled conditions"


def check_recorded(recorded: Any) -> None:
    """TDQError: not what :func:`tdq_utils.denoiser.record.record` gives."""
    if not isinstance(recorded, Recorded):
        raise TDQError(f"A recording must be what `with record(model) as recorded` gives; got {recorded!r}.")


def recorded_calls(recorded: Recorded) -> Calls:
    """The calls that :func:`tdq_utils.denoiser.record.record` kept. TDQError: it was not asked to, or this is no recording."""
    check_recorded(recorded)
    if recorded.inputs is None:
        raise TDQError("The model's output can be measured only on calls that were kept; this recording kept none. Record again, "
                       "with record(model, inputs=24).")  # fmt: skip
    return recorded.inputs


@contextmanager
def quantized(model: nn.Module, profile: Profile, weights: int, activations: int, method: str,
              balanced: Calls | None = None) -> Iterator[nn.Module]:  # fmt: skip
    """While open, the model is quantized and calibrated by a profile of it; afterwards it is what it was, bit for bit.

    The same layers are kept for every method, also for those that calibration measures nothing for. ``balanced``: calls to
    measure a balance of channels on, and what comes after it."""
    quantize(model, weights, activations, method, balance=balanced is not None)
    try:
        keep_too(model, profile.carries_t, MEASURED)
        seen: dict[str, Any] = dict(profile=profile) if balanced is None else dict(data=balanced)
        calibrate(model, **seen, progress=False)
        round_weights(model)
        yield model
    finally:
        restore(model)


def outputs(model: nn.Module, calls: Calls) -> list[Tensor]:
    """The model's output for each call, all of it in one axis: float32 on the CPU."""
    device = device_of(model)
    with torch.no_grad():
        return [_flat(predict(model, *call)) for call in calls.batches(device=device)]


def _flat(out):
    parts = out if isinstance(out, (list, tuple)) else [out]
    return torch.cat([part.detach().float().flatten().cpu() for part in parts])


def output_errors(model: nn.Module, calls: Calls, clean: list[Tensor]) -> np.ndarray:
    """Squared error of the output in each call over the squared ``clean`` output: ``"call"`` float64. 0: equal, 1: as large."""
    pairs = zip(outputs(model, calls), clean, strict=True)
    squares = [((out.double() - right).square().sum(), right.double().square().sum()) for out, right in pairs]
    return np.array([float(error / whole.clamp_min(1e-30)) for error, whole in squares])


def decibels(error: float) -> float:
    """A relative squared error in dB; of none at all: NaN."""
    return 10 * float(np.log10(error)) if error > 0 else float("nan")


def removed(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Which share of the errors ``before`` is gone ``after``, both ``"call"``: in the sum, and its standard error over calls.

    The standard error is that of a ratio of sums of pairs (Cochran 1977, section 2.11); of one call: NaN."""
    if not (whole := before.sum()):
        return 0.0, 0.0
    ratio, n = after.sum() / whole, len(before)
    spread = np.sqrt(np.square(after - ratio * before).sum() * n / (n - 1)) / whole if n > 1 else float("nan")
    return float(1 - ratio), float(spread)


@contextmanager
def in_full_precision(layers: Iterable[Any]) -> Iterator[None]:
    """While open, these layers of a quantized model compute as they did before."""
    found = [(layer, {name: getattr(layer, name) for name in SWITCHED}) for layer in layers]
    try:
        for layer, parts in found:
            for name in parts:
                setattr(layer, name, None)
        yield
    finally:
        for layer, parts in found:
            for name, part in parts.items():
                setattr(layer, name, part)


def by_layer(model: nn.Module, calls: Calls, clean: list[Tensor], seen: Callable[[], Any] = lambda: None) -> pd.DataFrame:
    """Each layer alone quantized, and each alone in full precision while all others are quantized: two runs a layer.

    Args:
        model: quantized and calibrated. calls: recorded inputs. clean: its :func:`outputs` in full precision.
        seen: called after every layer.

    Columns ``layer``; ``alone_db``, error of the output with this layer alone quantized; ``spared_db``, with this layer alone in
    full precision, both relative and in dB; ``removed``, the share of the error of all that is gone then, and its standard error
    ``removed_se``. As in AIMET's quant analyzer, which knows no t. TDQError: not quantized.
    """
    checked_state(model)
    layers, rows = quantized_layers(model), []
    whole = output_errors(model, calls, clean)
    for name, layer in layers.items():
        with in_full_precision(other for other in layers.values() if other is not layer):
            alone = output_errors(model, calls, clean)
        with in_full_precision([layer]):
            spared = output_errors(model, calls, clean)
        share, error = removed(whole, spared)
        rows.append(dict(layer=name, alone_db=decibels(alone.mean()), spared_db=decibels(spared.mean()), removed=share,
                         removed_se=error))  # fmt: skip
        seen()
    return pd.DataFrame(rows)


def layer_sensitivity(recorded: Recorded, weights: int = 8, activations: int = 6, method: str = "mse", progress: bool = True
                      ) -> pd.DataFrame:  # fmt: skip
    """:func:`by_layer` of a full-precision model, as it was recorded; it comes back bit-identical.

    ``recorded``: with ``inputs=n``. The rest as for :func:`tdq_utils.fit.quantize.quantize`. TDQError: no calls were kept."""
    calls = recorded_calls(recorded)
    check_plain(recorded.model, "layer_sensitivity")
    checked_grid(weights, activations, method, "channel")
    clean = outputs(recorded.model, calls)
    bar = tqdm(desc="layers", disable=not progress, leave=False)
    with bar, quantized(recorded.model, recorded.profile, weights, activations, method) as model:
        bar.reset(len(quantized_layers(model)))
        return by_layer(model, calls, clean, bar.update)


def record_sampling(model: nn.Module, scheduler: Any, steps: int = 20, images: int = 32, condition: Condition = None,
                    progress: bool = True) -> Recorded:  # fmt: skip
    """A recording for the report, of a model that needs no pipeline: statistics of ``images`` trajectories, seeds from 10,000 on;
    the kept calls, one a step, are of four other seeds, so that errors are measured on what calibration has not seen.

    TDQError: the model needs conditions that are not given."""
    try:
        with record(model) as recorded:
            sample(model, scheduler, range(10_000, 10_000 + images), steps, pad=False, condition=condition, progress=progress)
        with record(model, inputs=steps, layers=recorded.profile.layers[:1]) as others:
            sample(model, scheduler, range(20_000, 20_004), steps, 4, pad=False, condition=condition, progress=False)
    except TypeError as error:  # a call without an argument that the model needs
        raise TDQError(
            f"The command samples models that take nothing but x_t, t and classes; {type(model).__name__} needs more "
            f"({error}). Record its own pipeline: with tdq.record(model, inputs=24), then tdq.report."
        ) from error
    recorded.inputs = others.inputs
    return recorded


def class_labels(model: nn.Module) -> Condition:
    """Conditions of a model with classes: class after class, by row. ``None``: it has none."""
    config = getattr(model, "config", {})
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    return (lambda rows: {"class_labels": torch.tensor([row % classes for row in rows])}) if classes else None
