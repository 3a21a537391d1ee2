"""Where the step size of an activation quantizer comes from: a constant, the tensor at hand, a table over t."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tdq_utils.errors import TDQError, check
from tdq_utils.method.grid import SILU_MIN, Grid

# bfloat16 holds a number to 2^-8 of itself, 999 as 1000, 749.25 as 748; pipelines that pass t / 1000 round t and the quotient.
HALF_PRECISION = 2.0**-7


class TimeSteps:
    """The time steps of one call of the model: distinct values, and which sample has which.

    Args:
        t: number, or tensor of one element or one for each of ``batch`` samples; any unit. TDQError: another number of them.

    Attributes:
        values: distinct, as received, ascending floats. index: ``"batch"``, the value of each sample; ``None``: they share one.
        batch: number of samples.
    """

    def __init__(self, t: float | torch.Tensor, batch: int):
        t = torch.as_tensor(t).reshape(-1)
        if len(t) not in (1, batch):
            raise TDQError(f"t must have 1 element or one for each of the {batch} samples; got {len(t)}.")
        values, index = t.cpu().double().unique(return_inverse=True)
        self.values: list[float] = values.tolist()
        self.index: torch.Tensor | None = None if len(values) == 1 else index
        self.batch = batch

    def spread(self, per_value: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Entries ``"distinct"``, in the order of ``values`` -> the one entry ``""``, or ``"batch"``."""
        if self.index is None:
            return per_value[0]
        entries = per_value if isinstance(per_value, torch.Tensor) else torch.stack(list(per_value))
        return entries[self.index.to(entries.device)]


class StepSize(nn.Module):
    """Where the step size of one activation quantizer comes from.

    ``forward(x, t, grid)`` takes the layer's input, the :class:`TimeSteps` of this call and the
    :class:`tdq_utils.method.grid.Grid`, and returns one value ``""``, or one for each sample ``"batch"``.
    """

    over_time = False  # whether it depends on t, so that the call must be known

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this source, less its tensors; JSON-able."""
        return {}

    def on(self, t: Sequence[float], nearest: bool = False) -> torch.Tensor:
        """The step sizes at time steps ``t``, ``"t"``, as they are in any batch; ``nearest``: a table may answer for others."""
        return self.s.detach().expand(len(t))

    def interval_on(self, t: Sequence[float], grid: Grid) -> torch.Tensor:
        """``"t value"``: step size, least and greatest level, counted from the value 0, at time steps ``t``."""
        s = self.on(t)
        zero = grid.zero(s)
        return torch.stack([s, grid.q_min - zero, grid.q_max - zero], dim=1)

    def forward(self, x: torch.Tensor, t: Any, grid: Grid) -> Any:
        """Of a constant: itself, ``""``."""
        return self.s


class StaticStep(StepSize):
    """A constant, measured by calibration. TDQError: a number that is not positive."""

    s: torch.Tensor

    def __init__(self, s: float | torch.Tensor = 1.0):
        super().__init__()
        if not isinstance(s, torch.Tensor):
            check("positive", s=s)
        self.register_buffer("s", torch.as_tensor(s, dtype=torch.float32).clone())


class LearnedStep(StepSize):
    """A constant that gradients reach (LSQ). Its logarithm is the parameter: positive, and one rate fits any scale."""

    def __init__(self, s: float | torch.Tensor = 1.0):
        super().__init__()
        self.log_s = nn.Parameter(torch.as_tensor(s, dtype=torch.float32).log())

    @property
    def s(self) -> torch.Tensor:
        """The step size, shape ``""``."""
        return self.log_s.exp()

    def at(self, t: torch.Tensor) -> torch.Tensor:
        """The same value for every time step of ``t``, ``"batch"``."""
        return self.s.expand(len(t))


class DynamicStep(StepSize):
    """The min-max step of the tensor at hand, ``per`` ``"tensor"``, ``"sample"`` (first axis) or ``"token"`` (all but the last).

    Costs time at every call.
    """

    def __init__(self, per: str = "tensor"):
        super().__init__()
        self.per = per

    def settings(self) -> dict[str, Any]:
        """``per``."""
        return dict(per=self.per)

    def interval(self, x: torch.Tensor, below: Any, above: Any, balanced: bool = False) -> tuple[torch.Tensor, ...]:
        """The min-max interval of ``x`` on the grid that each range asks for (:meth:`tdq_utils.method.grid.Grid.for_range`).

        ``below``, ``above``: least and greatest level of the symmetric grid, numbers or tensors ``""``. ``balanced``: channels
        were divided by factors, so SiLU's minimum is not theirs: the grid lies between the ends of ``x``.

        Returns step size, least and greatest level, counted from the value 0; shapes that broadcast to ``x``. All in tensors:
        nothing waits for a device, and a compiler sees one graph.
        """
        shape: Sequence[int] = {"tensor": (), "sample": x.shape[:1], "token": x.shape[:-1]}[self.per]
        least, greatest = x.detach().reshape(math.prod(shape), -1).float().aminmax(dim=1)
        symmetric = (least < SILU_MIN - 1e-3) | ((least < 0) & (greatest < -2 * SILU_MIN))
        low, levels = torch.where(least < 0, SILU_MIN, 0.0), above - below
        if balanced:
            symmetric, low, greatest = torch.zeros_like(symmetric), least.clamp(max=0), greatest.clamp_min(0)
        s = torch.where(symmetric, torch.maximum(least / below, greatest / above), (greatest - low) / levels).clamp_min(1e-8)
        zero = torch.where(symmetric, -below, (-low / s).round().clamp(max=levels))
        s, bottom, top = (v.view(*(shape or (1,)), *[1] * (x.dim() - max(1, len(shape)))) for v in (s, -zero, levels - zero))
        return s, bottom, top


class TableStep(StepSize):
    """One value ``s`` for each of a finite set of time steps ``t``, any unit, looked up by the value of t (:func:`nearest`).

    ``levels``: ``"t end"``, least and greatest level at each t, counted from the value 0, where these follow t, too (a zero level
    of its own, or bits); ``None``: they are those of the layer's grid.
    """

    over_time = True
    t: torch.Tensor
    s: torch.Tensor
    levels: torch.Tensor | None

    def __init__(self, t: Any, s: Any, levels: Any = None):
        super().__init__()
        t, order = torch.as_tensor(t, dtype=torch.float64).sort()
        sorted_by_t = lambda v: torch.as_tensor(v, dtype=torch.float32)[order.to(torch.as_tensor(v).device)].clone()  # noqa: E731
        self.register_buffer("t", t)
        self.register_buffer("s", sorted_by_t(s))
        self.register_buffer("levels", None if levels is None else sorted_by_t(levels))
        self._rows: dict[float, int] = {}

    def settings(self) -> dict[str, Any]:
        """Whether it has ``levels``."""
        return {} if self.levels is None else dict(levels=True)

    def forward(self, x: torch.Tensor, t: TimeSteps, grid: Grid) -> torch.Tensor:
        """``s`` at each sample's t; one value if they share it. TDQError: a t not in the table."""
        # By whole numbers, so by views: nothing is copied to a device, or waited for.
        return t.spread([self.s[self._row(value)] for value in t.values])

    def on(self, t: Sequence[float], nearest: bool = False) -> torch.Tensor:
        """The entries at ``t``. TDQError: one is missing, and the ``nearest`` was not asked for."""
        if not nearest and (missing := set(t) - set(self.t.tolist())):
            lost = f"{len(missing)} of {len(t)} time steps are missing, t = {min(missing):g} among them"
            raise TDQError(f"A table can be frozen only for the steps it was calibrated for; {lost}. Calibrate with these steps, "
                           "pass nearest=True, or use method='tdq'.")  # fmt: skip
        return self.s[self._nearest(t)]

    def only(self, t: Sequence[float], nearest: bool = False) -> "TableStep":
        """A table for ``t`` alone; as for :meth:`on`."""
        return TableStep(t, self.on(t, nearest), None if self.levels is None else self.levels[self._nearest(t)])

    def interval_on(self, t: Sequence[float], grid: Grid) -> torch.Tensor:
        """As every source; with the ``levels`` of the table, if it has its own."""
        if self.levels is None:
            return super().interval_on(t, grid)
        return torch.cat([self.on(t)[:, None], self.levels[self._nearest(t)]], dim=1)

    def interval(self, x: torch.Tensor, t: TimeSteps) -> tuple[torch.Tensor, ...]:
        """Of a table with ``levels``: step size, least and greatest level, counted from the value 0; they broadcast to ``x``."""
        rows = [self._row(value) for value in t.values]
        found = t.spread([torch.cat([self.s[row : row + 1], self.levels[row]]) for row in rows])  # type: ignore[index]
        return found.view(-1, 3, *[1] * (x.dim() - 1)).unbind(1)

    def _nearest(self, t):
        return [int((self.t - value).abs().argmin()) for value in t]

    def _row(self, value: float) -> int:
        if value not in self._rows:  # derived from the buffer, so a loaded table needs no other state
            self._rows[value] = nearest(self.t.tolist(), value)
        return self._rows[value]


def nearest(table: list[float], value: float) -> int:
    """Row of an ascending table that answers for time step ``value``: the same number but for rounding to half precision, and
    nearer to it than to any other. TDQError: there is none."""
    right = bisect_left(table, value)
    row = min((row for row in (right - 1, right) if 0 <= row < len(table)), key=lambda row: abs(table[row] - value))
    gaps = [abs(table[row] - table[other]) for other in (row - 1, row + 1) if 0 <= other < len(table)]
    if abs(table[row] - value) > HALF_PRECISION * abs(table[row]) or any(2 * abs(table[row] - value) >= gap for gap in gaps):
        raise TDQError(
            f"This table holds {len(table)} time steps, {table[0]:g}..{table[-1]:g}, and t must be one of them; got "
            f"t = {value:g}. Sample with the number of steps that freeze or calibrate was called with, or call it again; in half "
            "precision, with a profile that was recorded in it, if steps are as close as numbers there."
        )
    return row
