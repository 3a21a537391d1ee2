"""Record activation statistics over (layer, t) while a model runs: histograms of layers' inputs, in bounded memory."""

import itertools
import mmap
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from tdq_utils.denoiser.call import follow, now
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.profile import BINS, Profile
from tdq_utils.denoiser.sampling import sample
from tdq_utils.denoiser.trajectory import number
from tdq_utils.errors import TDQError
from tdq_utils.method.step_sizes import StepSize

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
MEMORY = 168_000_000  # bytes of all counts together; past it, neighbouring bins join: 1,024 remain for 800 layers and 50 t
BLOCK = 512  # histograms that are allocated, and given back, together


class Histogram:
    """A running histogram over [-limit, limit]; the limit, at first far below any activation, doubles when a value does not fit.

    It is a power of two and pairs of bins merge, so the counts do not depend on how the values were split into batches.
    """

    __slots__ = ("counts", "limit", "total")

    def __init__(self, counts: np.ndarray | None = None) -> None:
        self.counts = np.zeros(BINS, dtype=np.int32) if counts is None else counts
        self.limit, self.total = 2.0**-100, 0

    def add(self, x: torch.Tensor, greatest: float) -> None:
        """Count the values of tensor ``x``, none of which exceeds ``greatest`` in magnitude."""
        bins, empty = len(self.counts), not self.total  # then there is nothing to merge: most doublings are for the first batch
        while greatest >= self.limit:
            self.limit *= 2
            if not empty:
                self.counts[:] = np.pad(self.joined(), bins // 4)
        self.total += x.numel()
        if self.total >= 2**31:
            self.counts = self.counts.astype(np.int64)
        # Scaling by a power of two and floor are exact: no value changes its bin when the limit doubles. 16 bits hold a bin.
        index = _flat(x).mul(bins / 2 / self.limit).floor_().add_(bins // 2).to(torch.int16)
        self.counts += torch.bincount(index, minlength=bins).cpu().numpy().astype(self.counts.dtype)

    def joined(self) -> np.ndarray:
        """The counts of pairs of bins."""
        return self.counts.reshape(-1, 2).sum(1, dtype=self.counts.dtype)


def _flat(x):
    """All values as one axis of float32, in the order of memory: a view, also of a channels-last tensor."""
    return (x if x.is_contiguous() else x.movedim(1, -1)).reshape(-1).float()


class _Cell:
    """Running statistics of one layer at one t."""

    __slots__ = ("count", "greatest", "histogram", "least", "squares", "total", "vectors")

    def __init__(self, counts):
        self.least, self.greatest, self.total, self.squares, self.count = np.inf, -np.inf, 0.0, 0.0, 0
        self.histogram, self.vectors = Histogram(counts), True

    def add(self, x, batch):
        self.vectors &= x.dim() == 2 and len(x) == batch
        x = _flat(x)  # reductions over 4 axes are several times slower
        least, greatest = (float(v) for v in x.aminmax())
        if not np.isfinite([least, greatest]).all():
            raise TDQError(f"Activations must be finite; got values from {least} to {greatest}. Check the model's weights.")
        self.least, self.greatest = min(self.least, least), max(self.greatest, greatest)
        self.total += float(x.sum())
        self.squares += float(torch.linalg.vector_norm(x)) ** 2
        self.count += x.numel()
        self.histogram.add(x, max(-least, greatest))


class Cells(dict[tuple[str, float], Any]):
    """``{(layer, t): statistics}``, in the order in which they were first met."""

    bins = BINS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rows: Iterator[np.ndarray] = iter(())

    def _row(self):
        """Room for a histogram, in a block of many: the system gets a block back once none of it is in use."""
        if (row := next(self._rows, None)) is None:
            self._rows = iter(np.frombuffer(mmap.mmap(-1, BLOCK * self.bins * 4), np.int32).reshape(BLOCK, self.bins))
            row = next(self._rows)
        return row

    def add(self, layer: str, t: float, x: torch.Tensor, batch: int) -> None:
        """Count the values of an input ``x`` of a layer, in a call of ``batch`` samples at t."""
        if (layer, t) not in self:
            if (len(self) + 1) * self.bins * 4 > MEMORY:
                self.bins, self._rows = self.bins // 2, iter(())
                for histogram in (cell.histogram for cell in self.values()):
                    joined, histogram.counts = histogram.joined(), self._row().astype(histogram.counts.dtype, copy=False)
                    histogram.counts[:] = joined
            self[layer, t] = _Cell(self._row())
        self[layer, t].add(x, batch)


@contextmanager
def recording(model: nn.Module, layers: Container[str] | None = None,
              parts: dict[str, dict[str, slice]] | None = None,
              factors: dict[str, torch.Tensor] | None = None) -> Iterator[Cells]:  # fmt: skip
    """While open, count the inputs of the model's conv and linear layers; the hooks are gone afterwards.

    Yields :class:`Cells`, which :func:`as_profile` turns into a :class:`Profile`. The time step of each call is read from
    the call itself. ``parts`` maps layers to named ranges of channels that are counted apart; ``factors``, layers to what their
    inputs are divided by first. What a compiled model does cannot be seen: while open, it runs uncompiled.
    """
    cells = Cells()
    check_names(model, layers)

    def see_input(name):
        def hook(module, args):
            times, x = now(), args[0].detach()
            if times is None or not x.numel():  # called by itself, at no t
                return
            t, *others = times.values
            if others:
                raise TDQError(f"All samples of a profiled call must share one t; got {t:g} and {others[0]:g}.")
            if factors and name in factors:
                x = x * (1 / factors[name])
            for part, channels in (parts or {}).get(name, {name: ...}).items():
                cells.add(part, t, x if channels is ... else x[:, channels], times.batch)

        return hook

    # Generators have layers of their own, which are not the model's.
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, StepSize))
    handles = follow(model)
    try:
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) and not name.startswith(inside) and (layers is None or name in layers):
                handles.append(module.register_forward_pre_hook(see_input(name)))
        with torch.compiler.set_stance("force_eager"):
            yield cells
    finally:
        for handle in handles:
            handle.remove()


def check_names(model: nn.Module, layers: Any) -> None:
    """TDQError: ``layers``, unless it is ``None``, is no list of names, or names what the model has not."""
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise TDQError(f"layers must be a list of dotted names, or None for all; got {layers!r}.")
    if unknown := {*map(str, layers or ())} - {name for name, _ in model.named_modules()}:
        raise TDQError(f"layers must name layers of the model, by their dotted names; got {min(unknown)!r}, which it has not.")
    if layers is not None and not [*layers]:
        raise TDQError("layers must name at least one layer, or be None for all; got an empty list [].")


def as_profile(cells: Cells, model: str = "") -> Profile:
    """Statistics -> :class:`Profile`, which takes over the histograms; ``model``: fingerprint of the one that was recorded."""
    layers, times = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    rises = sum(later > earlier for earlier, later in itertools.pairwise(times))
    times.sort(reverse=2 * rises < len(times))  # in the direction of sampling, though a later run may have met others
    if missing := next(((layer, t) for layer in layers for t in times if (layer, t) not in cells), None):
        raise TDQError(f"Every recorded layer must run at every t; {missing[0]} did not at t = {missing[1]:g}. Turn off caches "
                       "that skip layers, or record other layers=.")  # fmt: skip

    def table(get):
        return np.array([[get(cells[layer, t]) for t in times] for layer in layers])

    least, greatest, mean = table(lambda c: c.least), table(lambda c: c.greatest), table(lambda c: c.total / c.count)
    std = np.sqrt(np.maximum(table(lambda c: c.squares / c.count) - mean**2, 0))
    limit, vectors = table(lambda c: c.histogram.limit), table(lambda c: c.vectors).all(1)
    kinds = {cell.histogram.counts.dtype for cell in cells.values()}
    counts = np.zeros((*limit.T.shape, cells.bins), max(kinds, key=lambda kind: kind.itemsize))
    for step, layer in np.ndindex(*limit.T.shape):  # in the order of the blocks, so that nothing is in memory twice
        counts[step, layer] = cells.pop((layers[layer], times[step])).histogram.counts
    counts = counts.transpose(1, 0, 2)
    # Where all layers get vectors, as in a model of points in the plane, that says nothing.
    carries_t = [] if vectors.all() else [layer for layer, only in zip(layers, vectors, strict=True) if only]
    return Profile(layers, np.array([number(t) for t in times]), least, greatest, mean, std, counts, limit, model, carries_t)


def made_by(model: nn.Module) -> str:
    """What a profile says of its model: the fingerprint; "quantized": it does not serve to choose step sizes."""
    return "quantized" if hasattr(model, "quantization") else fingerprint(model)


def profile_activations(model: nn.Module, scheduler: Any, seeds: int | Iterable[int] = range(64), steps: int = 50,
                        layers: Container[str] | None = None, **sampling: Any) -> Profile:  # fmt: skip
    """Record the input of every conv and linear layer along the model's own sampling trajectory.

    No activation is kept, but running sums and one histogram for each (layer, t): memory does not grow with the images, and
    histograms take at most 170 MB. ``layers``: dotted names to record, default all; the rest, and ``sampling``, as for
    :func:`tdq_utils.denoiser.sampling.sample`. TDQError: activations are not finite.
    """
    with recording(model, layers) as cells:
        sample(model, scheduler, seeds, steps, pad=False, **sampling)  # an image that fills a batch must not count
    return as_profile(cells, made_by(model))
