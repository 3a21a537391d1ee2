"""Activation statistics over (layer, t): ranges, drift, and what an interval per step could gain."""

from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tdq_utils.denoiser.files import write_arrays
from tdq_utils.errors import DataError, TDQError
from tdq_utils.method.grid import Grid, mse_step, squared_error

if TYPE_CHECKING:
    import pandas as pd

BINS = 4096  # over [-limit, limit], limit a power of two: 4 to 16 bins a step at 8 bits


def bin_centres(limit: Any, bins: int = BINS) -> np.ndarray:
    """Centres of the bins of a histogram over [-limit, limit]; ``limit`` may be an array ``"..."``."""
    return ((np.arange(bins) + 0.5) * 2 / bins - 1) * np.asarray(limit)[..., None]


@dataclass
class Profile:
    """Activation statistics of the input of every layer at every time step.

    Attributes:
        layers: dotted names, in the order of execution. t: time steps as the model received them, noise first, ``"step"``.
        least, greatest, mean, std: ``"layer step"`` float64, in the units of the activations.
        counts: histogram ``"layer step bin"`` over [-limit, limit]; 4,096 bins, or fewer for many layers and t.
            limit: ``"layer step"`` float64.
        model: fingerprint of the full-precision model that was recorded; "quantized"; "": not known.
        carries_t: layers that only ever got one vector a sample: t or pooled conditions, no position of the sample.
    """

    layers: list[str]
    t: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    counts: np.ndarray
    limit: np.ndarray
    model: str = ""
    carries_t: list[str] = field(default_factory=list)
    # What best_steps has searched for already: a profile does not change, and calibrators, drift and figures all ask.
    searched: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def bins(self) -> int:
        """Bins of a histogram."""
        return self.counts.shape[-1]

    def percentile(self, q: float) -> np.ndarray:
        """The q-th percentile (0..100) of the magnitude, ``"layer step"``, to the width of a bin."""
        if not isinstance(q, Real) or not 0 <= q <= 100:
            raise TDQError(f"A percentile must be a number from 0 to 100; got {q!r}.")
        half = self.bins // 2

        def upper_edge_of(counts: np.ndarray) -> np.ndarray:
            folded = counts[:, half:] + counts[:, half - 1 :: -1]
            share = folded.cumsum(-1) / folded.sum(-1, keepdims=True)
            return ((share < q / 100) | (share == 0)).sum(-1) + 1

        upper_edge = np.stack([upper_edge_of(counts) for counts in self.counts])  # a layer at a time: memory
        return np.minimum(upper_edge * self.limit / half, np.maximum(-self.least, self.greatest))

    @property
    def frame(self) -> "pd.DataFrame":
        """Tidy table, one row for each (layer, t): min, max, mean, std, and absolute percentiles p99, p999."""
        import pandas as pd

        step, layer = (rows.ravel() for rows in np.meshgrid(np.arange(len(self.t)), np.arange(len(self.layers))))
        statistics = dict(min=self.least, max=self.greatest, mean=self.mean, std=self.std)
        statistics |= dict(p99=self.percentile(99), p999=self.percentile(99.9))
        named = {"layer": np.array(self.layers, dtype=object)[layer], "step": step, "t": self.t[step]}
        return pd.DataFrame({**named, **{name: values.ravel() for name, values in statistics.items()}})

    def row(self, layer: str | int) -> int:
        """Number of a layer given by its dotted name (or its number). TDQError: not profiled."""
        if isinstance(layer, (int, np.integer)) and 0 <= layer < len(self.layers):
            return int(layer)
        if layer not in self.layers:
            raise TDQError(f"layer must be one of the {len(self.layers)} profiled ones, such as {self.layers[0]}; got {layer!r}.")
        return self.layers.index(layer)

    def step(self, t: float) -> int:
        """Index of time step ``t`` along the trajectory. TDQError: not visited."""
        if t not in self.t:
            raise TDQError(f"t must be one of the profiled time steps, {', '.join(map(str, self.t))}; got {t}.")
        return int(np.flatnonzero(self.t == t)[0])

    def grid(self, layer: str | int, bits: int, shifted: bool = True) -> Grid:
        """The :class:`Grid` that suits a layer over all t; the symmetric one, unless it may be ``shifted``."""
        row = self.row(layer)
        return Grid.for_range(bits, self.least[row].min(), self.greatest[row].max()) if shifted else Grid(bits)

    def values(self, layer: str | int, merge: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """``(values, counts)`` of a layer: tensors ``"step bin"``, float32, without the bins that are empty at every t.

        ``merge``: join so many neighbouring bins (a power of two), where speed matters more than resolution.
        """
        layer = self.row(layer)
        counts = self.counts[layer].reshape(len(self.t), -1, merge).sum(-1)
        centres = bin_centres(self.limit[layer], self.bins).reshape(len(self.t), -1, merge).mean(-1)
        used = counts.any(0)
        return torch.from_numpy(centres[:, used]).float(), torch.from_numpy(counts[:, used]).float()

    def finest_merge(self, layer: str | int, s: float | torch.Tensor, bins: int = 8) -> int:
        """How many bins can be joined so that a step of size ``s`` still spans at least ``bins`` of them."""
        joined = float(s) / bins / (2 * self.limit[self.row(layer)].max() / self.bins)
        return 2 ** int(np.clip(np.floor(np.log2(joined)), 0, 6))

    def drift(self, bits: int = 5) -> "pd.DataFrame":
        """How much each layer drifts over t, and what an interval per step could gain at so many ``bits``: one row a layer.

        ``ratio``, largest over smallest 99.9 % range; ``correlation``, Pearson's r of that range with t; ``gain_db``, by how
        many dB the quantization error falls when the MSE-optimal static interval is replaced by the MSE-optimal interval of
        each step: the most that any interval that depends on t alone can give at this layer's input.
        """
        import pandas as pd

        reach = self.percentile(99.9)
        table = pd.DataFrame({"layer": self.layers, "ratio": np.divide(*np.maximum([reach.max(1), reach.min(1)], 1e-12))})
        correlation = [np.corrcoef(row, self.t)[0, 1] if row.std() > 0 else 0.0 for row in reach]
        return table.assign(correlation=correlation, gain_db=[self.gain(row, bits) for row in range(len(table))])

    def best_steps(self, layer: str | int, bits: int | Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """MSE-optimal step sizes of a layer: ``(static, per step)``, tensors ``""`` and ``"step"``; searched for once.

        ``bits``: a number stands for the grid of so many bits that suits the layer, :meth:`grid`.
        """
        grid = bits if isinstance(bits, Grid) else self.grid(layer, bits)
        key = self.row(layer), grid
        if key not in self.searched:
            values, counts = self.values(layer)
            static = mse_step(values.reshape(1, -1), grid, counts.reshape(1, -1))[0]
            self.searched[key] = static, mse_step(values, grid, counts)
        return self.searched[key]

    def gain(self, layer: str | int, bits: int | Grid) -> float:
        """By how many dB the squared error of a layer falls with the best step size of each t; ``bits`` as for ``best_steps``."""
        grid, (values, counts) = bits if isinstance(bits, Grid) else self.grid(layer, bits), self.values(layer)
        fixed, free = (squared_error(values, counts, s.expand(len(values)), grid).sum() for s in self.best_steps(layer, grid))
        return 10 * float(torch.log10(fixed.clamp_min(1e-30) / free.clamp_min(1e-30)))  # a layer may always be zero

    def save(self, path: str | Path) -> None:
        """Write the profile as npz (no pickles)."""
        write_arrays(path, **{name: value for name, value in vars(self).items() if name != "searched"})

    @staticmethod
    def load(path: str | Path) -> "Profile":
        """Read a profile that :meth:`save` wrote. DataError: missing, damaged, or something else."""
        try:
            with np.load(path) as data:
                names = {name: data[name].tolist() for name in ("layers", "carries_t") if name in data}
                profile = Profile(**{**data, **names, "model": str(data.get("model", ""))})
            if profile.counts.shape != (shape := (len(profile.layers), len(profile.t), profile.bins)):
                raise ValueError(f"counts must have the shape {shape}, got {profile.counts.shape}")
            return profile
        except Exception as error:
            raise DataError(f"{path} must be a profile as Profile.save writes it; got {error!r}. Record it again.") from error
