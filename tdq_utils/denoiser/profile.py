"""Activation statistics over (layer, t): ranges, drift, and what an interval per step could gain."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from tdq_utils.errors import TDQError
from tdq_utils.method.grid import Grid, mse_step, squared_error

BINS = 4096  # over [-limit, limit], limit a power of two: 4 to 16 bins a step at 8 bits


def bin_centres(limit):
    """Centres of the bins of a histogram over [-limit, limit]; ``limit`` may be an array ``"..."``."""
    return ((np.arange(BINS) + 0.5) * 2 / BINS - 1) * np.asarray(limit)[..., None]


@dataclass
class Profile:
    """Activation statistics of the input of every layer at every time step.

    Attributes:
        layers: dotted names, in the order of execution. t: time steps, descending, ``"step"``.
        least, greatest, mean, std: ``"layer step"`` float64, in the units of the activations.
        counts: histogram ``"layer step bin"`` int64 over [-limit, limit].
        limit: ``"layer step"`` float64.
        model: fingerprint of the model that it was recorded on; "": unknown.
    """

    layers: list
    t: np.ndarray
    least: np.ndarray
    greatest: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    counts: np.ndarray
    limit: np.ndarray
    model: str = ""
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
            return Profile(**{**dict(data), "layers": data["layers"].tolist(), "model": str(data.get("model", ""))})
