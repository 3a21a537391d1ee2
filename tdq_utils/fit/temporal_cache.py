"""What depends on t alone, computed once and looked up by t (Temporal Feature Matters: Huang et al. 2025, arXiv 2407.19547)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdq_utils.denoiser.record import Calls
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.layers import less_dtype
from tdq_utils.fit.quantize import checked_state, quantized_layers
from tdq_utils.fit.temporal_features import Temporal, attach_temporal, squared_errors, temporal_outputs
from tdq_utils.method.grid import Grid, mse_step
from tdq_utils.method.step_sizes import TableStep, TimeSteps


class FeatureTable(TableStep):
    """What a layer puts out at each of a finite set of time steps ``t``: levels ``q``, ``"t width"``, times a step size a t.

    ``q``: int8; or the features themselves, as floats, with step sizes of 1.
    """

    q: Tensor

    def __init__(self, t: Any, s: Any, q: Tensor):
        super().__init__(t, s)
        self.register_buffer("q", q[torch.as_tensor(t, dtype=torch.float64).argsort().to(q.device)].clone())

    def at(self, t: Sequence[float]) -> Tensor:
        """``"t width"``, float32. TDQError: one of ``t`` is not held."""
        self.on(t)  # refuses
        return torch.stack([self._features(row) for row in self._nearest(t)])

    def forward(self, x: Tensor, t: TimeSteps | None, grid: Any = None) -> Tensor:
        """``"batch ... width"`` for an input ``"batch ... in"``, whose values do not matter. TDQError: a t that is not held."""
        if t is None:
            raise TDQError("A cached layer must know the call that it is in; got none. Call the model itself, not a part of it.")
        found = t.spread([self._features(self._row(value)) for value in t.values]).to(x.dtype)
        return found.view(-1, *[1] * (x.dim() - 2), found.shape[-1]).expand(*x.shape[:-1], -1)

    def _features(self, row):
        return self.q[row] * self.s[row]

    def _apply(self, fn, recurse=True):
        return super()._apply(less_dtype(fn), recurse)


def cache_temporal(model: nn.Module, scheduler: Any = None, steps: int | None = None, bits: int | None = 8,
                   choose: str = "all", condition: dict[str, Any] | None = None,
                   data: CalibrationSet | Calls | None = None) -> list[str]:  # fmt: skip
    """Compute what depends on t alone once, for every t that is visited, and look it up from now on: those layers do not run.

    The table holds the features of the full-precision model. It is saved, run and exported with the model; ``restore``, and
    ``quantize_temporal(model, how="kept")``, take it out. Another t is refused.

    Args:
        model: quantized; the layers that carry t may be (:func:`tdq_utils.fit.temporal_features.quantize_temporal`).
        scheduler, steps, condition, data: as there.
        bits: of the stored features, 2 to 8, with the step size of least error at each t; ``None``: floats, exact.
        choose: ``"all"``: every layer that depends on t alone. ``"better"``: the paper's selection, whose criterion was not
            found; here, a block is looked up unless the layer as it is now has the smaller squared error of its features, summed
            over all t, and the time MLP is, if all blocks are. Call it after ``quantize_temporal``.

    Returns: names of the layers that are looked up now.

    TDQError: not quantized, bits or ``choose`` unknown, nothing that depends on t alone.
    """
    state = checked_state(model)
    if choose not in ("all", "better"):
        raise TDQError(f"choose must be 'all' or 'better'; got {choose!r}.")
    grid = None if bits is None else Grid(bits)
    temporal = Temporal(model, scheduler, steps, condition, data)
    with torch.no_grad():
        exact = temporal.outputs()
    first = [temporal.rows.index(t) for t in temporal.t]  # what depends on t alone is the same in all rows of one t
    tables = {name: _table(temporal.t, exact[name][first], grid) for name in temporal.alone}
    names = temporal.alone if choose == "all" else _better(model, temporal, tables)
    if not names and choose == "all":
        raise TDQError(f"A cache holds what depends on t alone; in a {type(model).__name__}, no layer does. Leave it out.")
    for name in tables:
        if name in names and name not in state.names:
            attach_temporal(model, name, None)
        if name in state.names:
            quantized_layers(model)[name].cached = tables[name] if name in names else None
    return list(names)


def _table(t: list[float], features: Tensor, grid: Grid | None) -> FeatureTable:
    if features.dim() != 2:
        raise TDQError(f"A cache takes one vector a t; these features have the shape {[*features.shape]}. Leave it out.")
    if grid is None:
        return FeatureTable(t, torch.ones(len(t)), features.float())
    s = mse_step(features.float(), grid)
    return FeatureTable(t, s, (features / s[:, None]).round().clamp(grid.q_min, grid.q_max).to(torch.int8))


def _better(model, temporal, tables):
    now = squared_errors(temporal, temporal_outputs(model, temporal)).sum(1)
    found = temporal_outputs(model, temporal) | {name: table.at(temporal.rows) for name, table in tables.items()}
    cached = squared_errors(temporal, found).sum(1)
    blocks = [name for name, a, b in zip(temporal.blocks, cached, now, strict=True) if name in tables and a <= b]
    others = [name for name in temporal.alone if name not in temporal.blocks]
    return [*others, *blocks] if len(blocks) == len(temporal.blocks) else blocks
