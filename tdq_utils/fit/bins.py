"""Fewer intervals than time steps: neighbours share one, as in the bins of Pruna's time-aware quantization."""

from typing import Any

import torch

from tdq_utils.denoiser.profile import Profile
from tdq_utils.errors import TDQError
from tdq_utils.method.grid import Grid, mse_step
from tdq_utils.method.step_sizes import StepSize, TableStep


def binned(step: StepSize, bins: int, grid: Grid, profile: Profile | None = None, layer: str = "") -> TableStep:
    """A table in which neighbouring t share one interval: ``bins`` groups of them, whose sizes differ by one at most.

    The interval of a bin is that of least squared error over all its activations, if a ``profile`` holds them; else the
    geometric mean of its step sizes. Where levels follow t, too ("finite-set"), it is the range that holds those of all its t.
    A bin of one t keeps the interval of this t, bit for bit; so do ``bins`` as many as t.

    The table still names every t of a bin. One that it does not name is refused as by any table; with ``nearest=True`` of
    :func:`tdq_utils.fit.quantize.freeze` it gets the interval of its nearest t: bins with their edges at midpoints between t.

    Args:
        step: the table of a frozen ``layer``, on ``grid``. profile: of the model in full precision, at every t of the table.

    TDQError: an interval that does not follow t, several precisions, ``bins`` out of range, a profile of other t or layers.
    """
    if not isinstance(step, TableStep):
        raise TDQError(f"bins group intervals that follow t; {layer} has {type(step).__name__}. Leave bins out, or calibrate by "
                       "'table', 'finite-set' or 'tdq'.")  # fmt: skip
    t = step.t.tolist()
    if type(bins) is not int or not 1 <= bins <= len(t):
        raise TDQError(f"bins must be a whole number from 1 to the number of visited t, {len(t)}; got {bins!r}.")
    s, levels, join = step.s.clone(), step.levels, _joiner(step, grid, profile, layer)
    for rows in torch.arange(len(t)).tensor_split(bins):
        if len(rows) > 1:
            s[rows], ends = join(rows)
            if levels is not None:
                levels = levels.index_copy(0, rows, ends.expand(len(rows), 2))
    return TableStep(t, s, levels)


def _joiner(step: TableStep, grid: Grid, profile: Profile | None, layer: str) -> Any:
    """A function of the rows of a bin that gives its step size and, where they follow t, its levels."""
    if step.levels is not None:
        return lambda rows: _union(step.s[rows], step.levels[rows])  # type: ignore[index]
    if profile is None:
        return lambda rows: (step.s[rows].log().mean().exp(), None)
    places = [profile.step(t) for t in step.t.tolist()]
    values, counts = (part[places] for part in profile.values(layer))
    return lambda rows: (mse_step(values[rows].reshape(1, -1), grid, counts[rows].reshape(1, -1))[0], None)


def _union(s: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = levels[:, 1] - levels[:, 0]
    if not torch.equal(width, width[:1].expand_as(width)):
        raise TDQError("bins need one number of bits at all t; got several. Choose the bits after the bins, or leave bins out.")
    least, greatest = (s * levels[:, 0]).min(), (s * levels[:, 1]).max()
    joined = (greatest - least) / width[0]
    bottom = (least / joined).round()
    return joined, torch.stack([bottom, bottom + width[0]])
