"""Where the step size of an activation quantizer comes from: a constant, the tensor at hand, a table over t."""

import torch
from torch import nn

from tdq_utils.errors import TDQError


class StepSize(nn.Module):
    """Where the step size of one activation quantizer comes from.

    ``forward(x, t, grid)`` takes the layer's input, the :class:`TimeSteps` of this call and the
    :class:`tdq_utils.method.grid.Grid`, and returns one value, or one for each sample.
    """

    def settings(self):
        """Keyword arguments that rebuild this source, less its tensors; JSON-able."""
        return {}


class StaticStep(StepSize):
    """A constant, measured by calibration."""

    def __init__(self, s=1.0):
        super().__init__()
        self.register_buffer("s", torch.as_tensor(s, dtype=torch.float32).clone())

    def forward(self, x, t, grid):
        """The constant, shape ``""``."""
        return self.s


class LearnedStep(StepSize):
    """A constant that gradients reach (LSQ). Its logarithm is the parameter: positive, and one rate fits any scale."""

    def __init__(self, s=1.0):
        super().__init__()
        self.log_s = nn.Parameter(torch.as_tensor(s, dtype=torch.float32).log())

    @property
    def s(self):
        """The step size, shape ``""``."""
        return self.log_s.exp()

    def at(self, t):
        """The same value for every time step of ``t``, ``"batch"``."""
        return self.s.expand(len(t))

    def forward(self, x, t, grid):
        """The step size, shape ``""``."""
        return self.s


class DynamicStep(StepSize):
    """The min-max step of the tensor at hand: per tensor, or per sample. Costs time at every call.

    ``per``: ``"tensor"`` or ``"sample"``.
    """

    def __init__(self, per="tensor"):
        super().__init__()
        self.per = per

    def settings(self):
        """``per``."""
        return dict(per=self.per)

    def forward(self, x, t, grid):
        """One value, or ``"sample"`` values, from the range of ``x``."""
        flat = x.detach().reshape(1 if self.per == "tensor" else len(x), -1)
        least, greatest = flat.aminmax(dim=1)
        return grid.widest_step(least, greatest).clamp_min(1e-8)


class TableStep(StepSize):
    """One value for each of a finite set of time steps, looked up by the value of t.

    Args:
        t: time steps, whole numbers. s: step sizes, one for each.
    """

    def __init__(self, t, s):
        super().__init__()
        t, order = torch.as_tensor(t, dtype=torch.int64).sort()
        self.register_buffer("t", t)
        self.register_buffer("s", torch.as_tensor(s, dtype=torch.float32)[order].clone())
        self._rows = {}

    def forward(self, x, t, grid):
        """``s`` at each sample's t; one value if they share it. TDQError: a t not in the table."""
        return t.spread(self.s[[self._row(value) for value in t.values]])

    def _row(self, value):
        if value not in self._rows:  # derived from the buffer, so a loaded table needs no other state
            self._rows = {int(v): row for row, v in enumerate(self.t)}
        if value not in self._rows:
            raise TDQError(
                f"This table holds {len(self.t)} time steps, {self.t[0]}..{self.t[-1]}, and t must be one of them; got "
                f"t = {value}. Sample with the number of steps that freeze or calibrate was called with, or call it again."
            )
        return self._rows[value]


class TimeSteps:
    """The time steps of one call of the model: distinct values, and which sample has which.

    Args:
        t: number, or tensor of one element or one for each sample. batch: number of samples.

    Raises:
        TDQError: ``t`` has neither 1 nor ``batch`` elements.
    """

    def __init__(self, t, batch):
        t = torch.as_tensor(t).reshape(-1)
        if len(t) not in (1, batch):
            raise TDQError(f"t must have 1 element or one for each of the {batch} samples; got {len(t)}.")
        values, index = t.cpu().unique(return_inverse=True)
        self.values = values.tolist()
        self.index = None if len(values) == 1 else index

    def spread(self, per_value):
        """Entries ``"distinct"``, in the order of ``values`` -> the one entry ``""``, or ``"batch"``."""
        return per_value[0] if self.index is None else per_value[self.index.to(per_value.device)]
