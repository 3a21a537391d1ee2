"""Where the error of quantizing a layer's input comes from: from time, from channels, or from too few levels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tdq_utils.denoiser.record import Calls
from tdq_utils.fit.balancing import sampled_inputs
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.choice import chosen_layers
from tdq_utils.fit.quantize import check_plain
from tdq_utils.method.grid import Grid, fake_quantize

if TYPE_CHECKING:
    import pandas as pd

STEPS = 80  # step sizes that are tried, each this share of the one before:
RATIO = 0.9


def decompose(model: nn.Module, data: CalibrationSet | Calls, bits: int = 5, layers: Sequence[str] | None = None,
              batch_size: int = 16, vectors: int = 512) -> "pd.DataFrame":  # fmt: skip
    """By how many dB the squared error at each layer's input falls when its one interval follows time, channels, or both.

    Columns: ``layer``; ``time_db``, the best interval for each t instead of the best for all; ``channels_db``, for each channel;
    ``both_db``, for each channel at each t. What is left is the error of too few levels. The same vectors and
    step sizes, ``RATIO`` apart, are compared throughout; with 2,000 vectors at each t, chance is worth 0.1 dB of both.

    Args:
        model: full precision. data: calls to run it on; samples of one batch share a t. bits: of activations.
        layers: default: those that ``quantize`` would quantize. batch_size: of a calibration set. vectors: drawn from each call.

    TDQError: a quantized model, bits outside 2..8, and what :func:`sampled_inputs` refuses.
    """
    check_plain(model, "decompose")
    Grid(bits)  # refuses what is none, before the model runs
    import pandas as pd

    names = list(chosen_layers(model, None)[0]) if layers is None else layers
    found = {name: gains(errors(x, bits)) for name, x in sampled_inputs(model, data, names, batch_size, vectors).items()}
    return pd.DataFrame([dict(layer=name, time_db=time, channels_db=channels, both_db=both)
                         for name, (time, channels, both) in found.items()])  # fmt: skip


def errors(x: Tensor, bits: int) -> Tensor:
    """Mean squared error of quantizing vectors ``"t vector channel"`` with each of many step sizes: ``"step t channel"``."""
    least, greatest = x.aminmax()
    grid = Grid.for_range(bits, float(least), float(greatest))
    widest = grid.widest_step(least, greatest).clamp_min(1e-8)
    return torch.stack([(fake_quantize(x, widest * RATIO**i, grid) - x).square().mean(1) for i in range(STEPS)])


def gains(error: Tensor) -> tuple[float, ...]:
    """dB by which errors ``"step t channel"`` fall with a step size for each t, each channel, both, instead of one."""
    one = error.sum((1, 2)).amin()
    time, channels, both = error.sum(2).amin(0).sum(), error.sum(1).amin(0).sum(), error.amin(0).sum()
    return tuple(10 * float(torch.log10(one.clamp_min(1e-30) / part.clamp_min(1e-30))) for part in (time, channels, both))
