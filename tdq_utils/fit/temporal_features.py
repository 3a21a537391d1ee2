"""The layers that carry t, quantized, too: rounded to nearest, or reconstructed together (TFMQ-DM, Huang et al. 2024)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdq_utils.denoiser.call import device_of, each_tensor, times_of
from tdq_utils.denoiser.record import Calls
from tdq_utils.denoiser.sampling import image_shape, timesteps
from tdq_utils.errors import TDQError, check
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.layers import attach, detach, search_weight_step
from tdq_utils.fit.loop import descend
from tdq_utils.fit.quantize import checked_state, full_precision, quantized_layers, round_weights
from tdq_utils.fit.reconstruction import SoftRounding, sharpness
from tdq_utils.fit.time_graph import TimeGraph
from tdq_utils.method.grid import Grid

if TYPE_CHECKING:
    import pandas as pd

WAYS = ("kept", "nearest", "reconstructed")
ROWS = 64  # of a call that is traced


class Temporal:
    """What a model computes of t (and of conditions), and not of the sample, at every time step that it visits.

    Args:
        model: quantized or not. scheduler, steps: what it visits; default: those that calibration saw.
        condition: further arguments of the model, as for ``sample``: of all their rows, each is met at every t.
        data: calls or a calibration set instead of these: for models whose input only a pipeline knows.

    Attributes:
        t: visited, in the order given. layers: dotted names of the linear layers that carry t. blocks: those that no other of
        them follows: the projections of blocks. alone: those that depend on t alone, on no condition.

    TDQError: no layer carries t, the model's computations cannot be traced, no time steps.
    """

    def __init__(self, model: nn.Module, scheduler: Any = None, steps: int | None = None,
                 condition: dict[str, Any] | None = None, data: CalibrationSet | Calls | None = None):  # fmt: skip
        visited = getattr(getattr(model, "quantization", None), "visited", [])
        visited = visited if scheduler is None else timesteps(scheduler, steps, model)
        if data is None and not visited:
            raise TDQError("The layers that carry t need the time steps to carry; got none. Pass scheduler and steps, or data.")
        graphs: dict[Any, TimeGraph] = {}
        self.calls: list[tuple[TimeGraph, Any, list[float]]] = []
        with full_precision(model), torch.no_grad():
            for call in _calls(model, visited, condition) if data is None else data.batches(1, device_of(model)):
                times = times_of(call[1], len(call[0]))
                rows = times.values * times.batch if times.index is None else [times.values[i] for i in times.index.tolist()]
                if (shapes := tuple(v.shape for v in tree_leaves(call) if isinstance(v, Tensor))) not in graphs:
                    graphs[shapes] = TimeGraph(model, call)
                self.calls.append((graphs[shapes], call, rows))
        first = next(iter(graphs.values()))
        self.layers, self.blocks, self.alone = first.layers, first.blocks, first.alone
        self.t = list(dict.fromkeys(t for _, _, rows in self.calls for t in rows))
        self.weights = {name: model.get_submodule(name).weight.detach() for name in self.layers}

    def outputs(self, weights: dict[str, Tensor] | None = None, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the layers put out, ``"row width"`` by name, a row for each t and condition (:meth:`rows`).

        ``weights``: of some of the layers, in place of their own. ``given``: outputs ``"row width"`` of some, in place of these.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        start = 0
        for graph, call, rows in self.calls:
            part = {name: value[start : start + len(rows)] for name, value in (given or {}).items()}
            for name, value in graph.run(self.weights | (weights or {}), call, part).items():
                found[name].append(value)
            start += len(rows)
        return {name: torch.cat(parts) for name, parts in found.items()}

    @property
    def rows(self) -> list[float]:
        """t of each row."""
        return [t for _, _, rows in self.calls for t in rows]


def _calls(model: nn.Module, visited: list[float], condition: dict[str, Any] | None) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Calls with every t and every row of the condition; the sample, which does not matter, is zero."""
    n = max([1, *(len(v) for v in tree_leaves(condition) if isinstance(v, Tensor))])
    parameter = next(model.parameters())
    pairs = [(t, row) for t in visited for row in range(n)]
    for part in (pairs[i : i + ROWS] for i in range(0, len(pairs), ROWS)):
        rows = [row for _, row in part]
        pick = lambda v, rows=rows: v[[row % len(v) for row in rows]].to(parameter.device)  # type: ignore[misc]  # noqa: E731
        given = each_tensor(pick, condition or {})
        sample = torch.zeros(len(part), *image_shape(model), dtype=parameter.dtype, device=parameter.device)
        yield sample, torch.tensor([t for t, _ in part], device=parameter.device), given


def quantize_temporal(model: nn.Module, scheduler: Any = None, steps: int | None = None, weights: int = 8,
                      how: str = "reconstructed", condition: dict[str, Any] | None = None,
                      data: CalibrationSet | Calls | None = None, iterations: int = 1000, rate: float = 3e-2,
                      penalty: float = 0.01, progress: bool = True) -> None:  # fmt: skip
    """Quantize the weights of the layers that carry t, too, which ``quantize`` keeps; their inputs, a vector a sample, stay.

    They are found in the model's own computations (:class:`tdq_utils.fit.time_graph.TimeGraph`). ``restore`` takes them out
    with all others; they are saved, run and exported with the model.

    Args:
        model: quantized, calibrated or not. scheduler, steps, condition, data: as for :class:`Temporal`.
        weights: bits, 2 to 8, in every output channel with the step size of least error.
        how: ``"nearest"``; ``"reconstructed"``: whether each weight is rounded up or down is learned (AdaRound) for all layers
            together, by ``sum_i ||g_i(h(t)) - g_i^(h^(t))||^2`` over every visited t at once, relative to that of the nearest,
            which stays if it is better; or ``"kept"``: in full precision again.
        iterations: of Adam, with a cosine rate from ``rate``. penalty: weight of AdaRound's, a sum over weights,
            in their last four fifths.

    TDQError: not quantized, an unknown ``how``, bits, iterations or rates out of range, and what :class:`Temporal` refuses.
    """
    state = checked_state(model)
    if how not in WAYS:
        raise TDQError(f"how must be one of {', '.join(WAYS)}; got {how!r}.")
    check("count", iterations=iterations)
    check("positive", rate=rate)
    check("amount", penalty=penalty)
    Grid(weights)
    if how != "kept":
        temporal = Temporal(model, scheduler, steps, condition, data)
    for name in list(state.temporal):
        detach_temporal(model, name)
    if how == "kept":
        return
    for name in (own := [name for name in temporal.layers if name not in state.names]):
        attach_temporal(model, name, weights)
    if how == "reconstructed":
        _reconstruct(temporal, {name: quantized_layers(model)[name] for name in own}, iterations, rate, penalty, progress)
    if state.frozen:
        round_weights(model)


def attach_temporal(model: nn.Module, name: str, weights: int | None, reason: str = "", search: bool = True) -> None:
    """Put a kept layer that carries t among the quantized ones; ``weights``: bits; ``reason``: that it was kept for."""
    state, layer, step = checked_state(model), model.get_submodule(name), None
    grid = None if weights is None else Grid(weights)
    if grid is not None:
        step = search_weight_step(layer.weight, grid, "channel") if search else torch.ones(len(layer.weight))
    attach(layer, weight_grid=grid, weight_step=step)
    kept = state.kept.pop(name, "carries t")
    state.temporal[name] = weights, reason or kept
    state.names.append(name)


def detach_temporal(model: nn.Module, name: str) -> None:
    """The inverse of :func:`attach_temporal`."""
    state = checked_state(model)
    detach(quantized_layers(model)[name])
    state.names.remove(name)
    _, state.kept[name] = state.temporal.pop(name)


def squared_errors(temporal: Temporal, found: dict[str, Tensor]) -> Tensor:
    """``"block row"``: squared distance of the blocks' features to those in full precision."""
    with torch.no_grad():
        exact = temporal.outputs()
    return torch.stack([(found[name] - exact[name]).float().square().flatten(1).sum(1) for name in temporal.blocks])


def _reconstruct(temporal, layers, iterations, rate, penalty, progress):
    soft = {name: SoftRounding(layer) for name, layer in layers.items()}
    of = lambda weights: squared_errors(temporal, temporal.outputs(weights)).sum()  # noqa: E731
    nearest = of({name: layer.quantized_weight() for name, layer in layers.items()}).clamp_min(1e-20)

    def loss(i):
        error = of({name: rounding.weight(rounding.h) for name, rounding in soft.items()}) / nearest
        if (beta := sharpness(i, iterations)) is None:
            return error
        return error + penalty * sum(rounding.penalty(beta) * rounding.v.numel() for rounding in soft.values())

    descend(loss, [rounding.v for rounding in soft.values()], iterations, rate, "reconstruct temporal features", progress)
    with torch.no_grad():
        chosen = {name: rounding.weight((rounding.h >= 0.5).float()) for name, rounding in soft.items()}
        if of(chosen) < nearest:
            for name, layer in layers.items():
                layer.levels = (chosen[name] / soft[name].s).round().to(torch.int8)


def temporal_outputs(model: nn.Module, temporal: Temporal) -> dict[str, Tensor]:
    """What the layers that carry t put out in the model as it is: quantized, looked up, or kept."""
    layers = {name: layer for name, layer in quantized_layers(model).items() if name in temporal.layers}
    weights = {name: layer.quantized_weight().detach() for name, layer in layers.items()}
    given = {name: layer.cached.at(temporal.rows) for name, layer in layers.items() if layer.cached is not None}
    with torch.no_grad():
        return temporal.outputs(weights, given)


def temporal_errors(model: nn.Module, scheduler: Any = None, steps: int | None = None,
                    condition: dict[str, Any] | None = None, data: CalibrationSet | Calls | None = None
                    ) -> "pd.DataFrame":  # fmt: skip
    """Squared error of the features of each block (rows) at each t (columns), relative to their square: ``"block t"``.

    Arguments as for :func:`quantize_temporal`. A mean over the rows of conditions. 0: kept in full precision.
    """
    import pandas as pd

    checked_state(model)
    temporal = Temporal(model, scheduler, steps, condition, data)
    error = squared_errors(temporal, temporal_outputs(model, temporal))
    power = squared_errors(temporal, {name: torch.zeros(()) for name in temporal.blocks})
    table = pd.DataFrame((error / power.clamp_min(1e-20)).T.double().cpu().numpy(), columns=temporal.blocks)
    return table.groupby(pd.Index(temporal.rows, name="t"), sort=False).mean().T
