"""Record activation ranges over (layer, t) while a model samples, and measure how far they drift."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn

from tdq_utils.errors import TDQError
from tdq_utils.quantizers import Grid, mse_step, squared_error
from tdq_utils.sampling import sample

BINS = 4096  # over [-limit, limit], limit a power of two: 4 to 16 bins a step at 8 bits
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


def bin_centres(limit):
    """Centres of the bins of a histogram over [-limit, limit]; ``limit`` may be an array ``"..."``."""
    return ((np.arange(BINS) + 0.5) * 2 / BINS - 1) * np.asarray(limit)[..., None]


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


@dataclass
class Profile:
    """Activation statistics of the input of every layer at every time step.

    Attributes:
        layers: dotted names, in the order of execution. t: time steps, descending, ``"step"``.
        least, greatest, mean, std: ``"layer step"`` float64, in the units of the activations.
        counts: histogram ``"layer step bin"`` int64 over [-limit, limit].
        limit: ``"layer step"`` float64.
    """

    layers: list
    t: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    counts: np.ndarray
    limit: np.ndarray
    # What best_steps has searched for already: a profile does not change, and calibrators, drift and figures all ask.
    searched: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def percentile(self, q):
        """The q-th percentile (0..100) of the magnitude, ``"layer step"``, to the width of a bin."""
        if not 0 <= q <= 100:
            raise TDQError(f"A percentile must be from 0 to 100; got {q}.")
        half = BINS // 2
        folded = self.counts[..., half:] + self.counts[..., half - 1 :: -1]
        share = folded.cumsum(-1) / folded.sum(-1, keepdims=True)
        upper_edge = ((share < q / 100) | (share == 0)).sum(-1) + 1
        return np.minimum(upper_edge * self.limit / half, np.maximum(-self.least, self.greatest))

    @property
    def frame(self):
        """Tidy table, one row for each (layer, t): min, max, mean, std, and absolute percentiles p99, p999."""
        step, layer = np.meshgrid(np.arange(len(self.t)), np.arange(len(self.layers)))
        columns = {
            "layer": np.array(self.layers, dtype=object)[layer.ravel()],
            "step": step.ravel(),
            "t": self.t[step.ravel()],
            "min": self.least.ravel(),
            "max": self.greatest.ravel(),
            "mean": self.mean.ravel(),
            "std": self.std.ravel(),
            "p99": self.percentile(99).ravel(),
            "p999": self.percentile(99.9).ravel(),
        }
        return pd.DataFrame(columns)

    def row(self, layer):
        """Number of a layer given by its dotted name (or its number). TDQError: not profiled."""
        if isinstance(layer, (int, np.integer)):
            return layer
        if layer not in self.layers:
            raise TDQError(f"layer must be one of the {len(self.layers)} profiled ones, such as {self.layers[0]}; got {layer!r}.")
        return self.layers.index(layer)

    def step(self, t):
        """Index of time step ``t`` along the trajectory. TDQError: not visited."""
        if t not in self.t:
            raise TDQError(f"t must be one of the profiled time steps, {', '.join(map(str, self.t))}; got {t}.")
        return int(np.flatnonzero(self.t == t)[0])

    def grid(self, layer, bits, shifted=True):
        """The :class:`Grid` that suits a layer over all t; the symmetric one, unless it may be ``shifted``."""
        if not shifted:
            return Grid(bits)
        row = self.row(layer)
        return Grid.for_range(bits, float(self.least[row].min()), float(self.greatest[row].max()))

    def values(self, layer, merge=1):
        """``(values, counts)`` of a layer: tensors ``"step bin"``, float32, without the bins that are empty at every t.

        Args:
            merge: join so many neighbouring bins (a power of two), where speed matters more than resolution.
        """
        layer = self.row(layer)
        counts = self.counts[layer].reshape(len(self.t), -1, merge).sum(-1)
        centres = bin_centres(self.limit[layer]).reshape(len(self.t), -1, merge).mean(-1)
        used = counts.any(0)
        return torch.from_numpy(centres[:, used]).float(), torch.from_numpy(counts[:, used]).float()

    def finest_merge(self, layer, s, bins=8):
        """How many bins can be joined so that a step of size ``s`` still spans at least ``bins`` of them."""
        joined = float(s) / bins / (2 * self.limit[self.row(layer)].max() / BINS)
        return 2 ** int(np.clip(np.floor(np.log2(joined)), 0, 6))

    def drift(self, bits=5):
        """How much each layer drifts over t, and what an interval per step could gain.

        Args:
            bits: of the activations, for the gain.

        Returns:
            DataFrame, one row a layer: ``ratio``, largest over smallest 99.9 % range; ``correlation``,
            Pearson's r of that range with t; ``gain_db``, by how many dB the quantization error falls when the
            MSE-optimal static interval is replaced by the MSE-optimal interval of each step: the most
            that any interval that depends on t alone can give at this layer's input.
        """
        reach = self.percentile(99.9)
        rows = []
        for i, layer in enumerate(self.layers):
            varies = reach[i].std() > 0 and len(self.t) > 1
            rows.append(
                dict(
                    layer=layer,
                    ratio=reach[i].max() / max(reach[i].min(), 1e-12),
                    correlation=np.corrcoef(reach[i], self.t)[0, 1] if varies else 0.0,
                    gain_db=self._gain(i, bits),
                )
            )
        return pd.DataFrame(rows)

    def best_steps(self, layer, bits, shifted=True):
        """MSE-optimal step sizes of a layer: ``(static, per step)``, tensors ``""`` and ``"step"``; searched for once."""
        key = self.row(layer), bits, shifted
        if key not in self.searched:
            grid, (values, counts) = self.grid(layer, bits, shifted), self.values(layer)
            static = mse_step(values.reshape(1, -1), grid, counts.reshape(1, -1))[0]
            self.searched[key] = static, mse_step(values, grid, counts)
        return self.searched[key]

    def _gain(self, layer, bits):
        grid, (values, counts) = self.grid(layer, bits), self.values(layer)
        static, per_step = self.best_steps(layer, bits)
        fixed, free = (squared_error(values, counts, s.expand(len(values)), grid).sum() for s in (static, per_step))
        return 10 * float(torch.log10(fixed / free.clamp_min(1e-30)))

    def save(self, path):
        """Write the profile as npz (no pickles)."""
        arrays = {name: value for name, value in vars(self).items() if name != "searched"}
        np.savez_compressed(path, **{**arrays, "layers": np.array(self.layers, dtype=str)})

    @staticmethod
    def load(path):
        """Read a profile that :meth:`save` wrote."""
        with np.load(path) as data:
            return Profile(**{**dict(data), "layers": data["layers"].tolist()})


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
        model, scheduler, seeds, steps: as for :func:`tdq_utils.sampling.sample`.
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
