"""Record activation ranges over (layer, t) while a model samples, and measure how far they drift."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tdq_utils.denoiser.profile import BINS, Profile, bin_centres
from tdq_utils.denoiser.sampling import sample
from tdq_utils.errors import TDQError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Histogram:
    """A running histogram over [-limit, limit] whose limit doubles when a value does not fit.

    The limit is a power of two and pairs of bins merge when it doubles, so the counts do not depend
    on how the values were split into batches.
    """

    def __init__(self, counts=None, limit=2.0**-6):
        self.counts = np.zeros(BINS, dtype=np.int64) if counts is None else counts
        self.limit = limit

    def add(self, x, greatest):
        """Count the values of tensor ``x``, none of which exceeds ``greatest`` in magnitude."""
        empty = not self.counts.any()  # then there is nothing to merge: most doublings are for the first batch
        while greatest >= self.limit:
            self.limit *= 2
            if not empty:
                self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), BINS // 4)
        # Scaling by a power of two and floor are exact: no value changes its bin when the limit doubles. 16 bits hold a bin.
        index = _flat(x).mul(BINS / 2 / self.limit).floor_().add_(BINS // 2).to(torch.int16)
        self.counts += torch.bincount(index, minlength=BINS).cpu().numpy()

    @property
    def centres(self):
        """Centres of the bins, ``"bin"`` float64."""
        return bin_centres(self.limit)


def _flat(x):
    """All values as one axis of float32, in the order of memory: a view, also of a channels-last tensor."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).reshape(-1).float()


@dataclass
class _Cell:
    """Running statistics of one layer at one t."""

    least: float = np.inf
    greatest: float = -np.inf
    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    histogram: Histogram = field(default_factory=Histogram)

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


def half_names(layer, at):
    """Names of the two halves of a layer's input that is split after ``at`` channels."""
    return f"{layer}[:{at}]", f"{layer}[{at}:]"


@contextmanager
def recording(model, layers=None, splits=None):
    """While open, count the inputs of the model's conv and linear layers; the hooks are gone afterwards.

    Yields a dict ``{(layer, t): statistics}`` that :func:`as_profile` turns into a :class:`Profile`.
    The time step of each call is read from the call itself. ``splits`` maps layers to a number of channels: their
    first channels and the rest are counted apart, under the names of :func:`half_names`.
    """
    cells, clock = {}, {"t": None}

    def see_t(module, args, kwargs):
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).unique()
        if len(t) != 1:
            raise TDQError(f"All samples of a profiled call must share one t; got {len(t)} different ones.")
        clock["t"] = int(t)

    def see_input(name):
        def hook(module, args):
            x, at = args[0].detach(), (splits or {}).get(name)
            parts = {name: x} if at is None else dict(zip(half_names(name, at), (x[:, :at], x[:, at:]), strict=True))
            for part, values in parts.items():
                cells.setdefault((part, clock["t"]), _Cell()).add(values)

        return hook

    handles = [model.register_forward_pre_hook(see_t, with_kwargs=True)]
    try:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) and (layers is None or name in layers):
                handles.append(module.register_forward_pre_hook(see_input(name)))
        yield cells
    finally:
        for handle in handles:
            handle.remove()


def as_profile(cells):
    """Statistics ``{(layer, t): cell}`` -> :class:`Profile`."""
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    t = sorted({t for _, t in cells}, reverse=True)
    rows = [[cells[layer, value] for value in t] for layer in layers]

    def table(get):
        return np.array([[get(cell) for cell in row] for row in rows])

    mean = table(lambda c: c.total / c.count)
    return Profile(
        layers=layers,
        t=np.array(t),
        least=table(lambda c: c.least),
        greatest=table(lambda c: c.greatest),
        mean=mean,
        std=np.sqrt(np.maximum(table(lambda c: c.squares / c.count) - mean**2, 0)),
        counts=table(lambda c: c.histogram.counts),
        limit=table(lambda c: c.histogram.limit),
    )


def profile_activations(model, scheduler, seeds=range(64), steps=50, layers=None, **sampling):
    """Record the input of every conv and linear layer along the model's own sampling trajectory.

    No activation is kept: each (layer, t) has running sums and one histogram, so memory does not grow with
    the number of images.

    Args:
        model, scheduler, seeds, steps: as for :func:`tdq_utils.denoiser.sampling.sample`.
        layers: dotted names to record; default: all conv and linear layers.
        sampling: ``batch_size``, ``condition``, ``progress``, ``callback`` of ``sample``.

    Returns:
        :class:`Profile`.

    Raises:
        TDQError: no seeds, a step count out of range, or activations that are not finite.
    """
    with recording(model, layers) as cells:
        sample(model, scheduler, seeds, steps, pad=False, **sampling)  # an image that fills a batch must not count
    return as_profile(cells)
