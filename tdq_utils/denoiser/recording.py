"""Record activation ranges over (layer, t) while a model samples, and measure how far they drift."""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from tdq_utils.denoiser.call import follow, now
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.profile import BINS, Profile
from tdq_utils.denoiser.sampling import number, sample
from tdq_utils.errors import TDQError
from tdq_utils.method.step_sizes import StepSize

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Histogram:
    """A running histogram over [-limit, limit]; the limit, at first far below any activation, doubles when a value does not fit.

    It is a power of two and pairs of bins merge, so the counts do not depend on how the values were split into batches.
    """

    def __init__(self) -> None:
        self.counts, self.limit = np.zeros(BINS, dtype=np.int64), 2.0**-100

    def add(self, x: torch.Tensor, greatest: float) -> None:
        """Count the values of tensor ``x``, none of which exceeds ``greatest`` in magnitude."""
        empty = not self.counts.any()  # then there is nothing to merge: most doublings are for the first batch
        while greatest >= self.limit:
            self.limit *= 2
            if not empty:
                self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 4)
        # Scaling by a power of two and floor are exact: no value changes its bin when the limit doubles. 16 bits hold a bin.
        index = _flat(x).mul(BINS / 2 / self.limit).floor_().add_(BINS // 2).to(torch.int16)
        self.counts += torch.bincount(index, minlength=BINS).cpu().numpy()


def _flat(x):
    """All values as one axis of float32, in the order of memory: a view, also of a channels-last tensor."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).reshape(-1).float()


class _Cell:
    """Running statistics of one layer at one t."""

    def __init__(self):
        self.least, self.greatest, self.total, self.squares, self.count = np.inf, -np.inf, 0.0, 0.0, 0
        self.histogram = Histogram()

    def add(self, x):
        x = _flat(x)  # reductions over 4 axes are several times slower
        least, greatest = (float(v) for v in x.aminmax())
        if not np.isfinite([least, greatest]).all():
            raise TDQError(f"Activations must be finite; got values from {least} to {greatest}. Check the model's weights.")
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        self.total += float(x.sum())
        self.squares += float(torch.linalg.vector_norm(x)) ** 2
        self.count += x.numel()
        self.histogram.add(x, max(-least, greatest))


@contextmanager
def recording(model: nn.Module, layers: Container[str] | None = None,
              parts: dict[str, dict[str, slice]] | None = None) -> Iterator[dict[tuple[str, float], _Cell]]:  # fmt: skip
    """While open, count the inputs of the model's conv and linear layers; the hooks are gone afterwards.

    Yields a dict ``{(layer, t): statistics}`` that :func:`as_profile` turns into a :class:`Profile`. The time step of each
    call is read from the call itself. ``parts`` maps layers to named ranges of channels that are counted apart.
    """
    cells: dict[tuple[str, float], _Cell] = {}

    def see_input(name):
        def hook(module, args):
            (t, *others), x = now().values, args[0].detach()
            if others:
                raise TDQError(f"All samples of a profiled call must share one t; got {t:g} and {others[0]:g}.")
            for part, channels in (parts or {}).get(name, {name: ...}).items():
                cells.setdefault((part, t), _Cell()).add(x if channels is ... else x[:, channels])

        return hook

    # Generators have layers of their own, which are not the model's.
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, StepSize))
    handles = follow(model)
    try:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) and not name.startswith(inside) and (layers is None or name in layers):
                handles.append(module.register_forward_pre_hook(see_input(name)))
        yield cells
    finally:
        for handle in handles:
            handle.remove()


def as_profile(cells: dict[tuple[str, float], _Cell], model: str = "") -> Profile:
    """Statistics ``{(layer, t): cell}`` -> :class:`Profile`; ``model``: fingerprint of the one that was recorded."""
    layers, times = list(dict.fromkeys(layer for layer, _ in cells)), sorted({t for _, t in cells}, reverse=True)

    def table(get):
        return np.array([[get(cells[layer, t]) for t in times] for layer in layers])

    least, greatest, mean = table(lambda c: c.least), table(lambda c: c.greatest), table(lambda c: c.total / c.count)
    std = np.sqrt(np.maximum(table(lambda c: c.squares / c.count) - mean**2, 0))
    counts, limit = table(lambda c: c.histogram.counts), table(lambda c: c.histogram.limit)
    return Profile(layers, np.array([number(t) for t in times]), least, greatest, mean, std, counts, limit, model)


def profile_activations(model: nn.Module, scheduler: Any, seeds: int | Iterable[int] = range(64), steps: int = 50,
                        layers: Container[str] | None = None, **sampling: Any) -> Profile:  # fmt: skip
    """Record the input of every conv and linear layer along the model's own sampling trajectory.

    No activation is kept, but running sums and one histogram for each (layer, t): memory does not grow with the images.
    ``layers``: dotted names to record, default all; the rest, and ``sampling``, as for
    :func:`tdq_utils.denoiser.sampling.sample`. TDQError: activations are not finite.
    """
    with recording(model, layers) as cells:
        sample(model, scheduler, seeds, steps, pad=False, **sampling)  # an image that fills a batch must not count
    # The inputs of a quantized model's layers are not those to choose its step sizes by.
    return as_profile(cells, "quantized" if hasattr(model, "quantization") else fingerprint(model))
