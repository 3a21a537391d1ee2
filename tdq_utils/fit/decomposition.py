"""Where the error of quantizing a layer's input comes from: from time, from channels, or from too few levels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tdq_utils.denoiser.record import Calls
from tdq_utils.errors import TDQError
from tdq_utils.fit.balancing import sampled_inputs
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.choice import chosen_layers
from tdq_utils.method.grid import Grid, fake_quantize

if TYPE_CHECKING:
    import pandas as pd

STEPS = 80  # step sizes that are tried, each this share of the one before:
RATIO = 0.9


def decompose(model: nn.Module, data: CalibrationSet | Calls, bits: int = 5, layers: Sequence[str] | None = None,
              batch_size: int = 16) -> "pd.DataFrame":  # fmt: skip
    """By how many dB the squared error at each layer's input falls when its one interval follows time, channels, or both.

    Columns: ``layer``; ``time_db``, the best interval for each t instead of the best for all; ``channels_db``, for each channel;
    ``both_db``, for each channel at each t. What is left is the error of too few levels. Step sizes, ``RATIO`` apart, are chosen
    on one half of the vectors and measured on the other: else the more intervals there are, the more would seem to be gained.

    Args:
        model: full precision. data: calls to run it on; samples of one batch share a t. bits: of activations.
        layers: default: those that ``quantize`` would quantize. batch_size: of a calibration set.
    """
    if hasattr(model, "quantization"):
        raise TDQError("decompose takes a full-precision model; this one is quantized. Call restore(model) first.")
    import pandas as pd

    names = list(chosen_layers(model, None)[0]) if layers is None else list(layers)
    found = {name: gains(errors(x, bits)) for name, x in sampled_inputs(model, data, names, batch_size).items()}
    return pd.DataFrame([dict(layer=name, time_db=time, channels_db=channels, both_db=both)
                         for name, (time, channels, both) in found.items()])  # fmt: skip


def errors(x: Tensor, bits: int) -> Tensor:
    """Squared error of quantizing vectors ``"t vector channel"`` with many step sizes, by halves: ``"half step t channel"``."""
    least, greatest = x.aminmax()
    grid = Grid.for_range(bits, float(least), float(greatest))
    widest = grid.widest_step(least, greatest).clamp_min(1e-8)

    def of_half(half):
        return torch.stack([(fake_quantize(half, widest * RATIO**i, grid) - half).square().mean(1) for i in range(STEPS)])

    return torch.stack([of_half(half) for half in (x[:, ::2], x[:, 1::2])])


def gains(error: Tensor) -> tuple[float, float, float]:
    """dB by which errors of :func:`errors` fall with a step size for each t, for each channel, for both, against one for all."""
    one, time, channels, both = (_chosen(error, shared) for shared in ((2, 3), (3,), (2,), ()))
    return tuple(10 * float(torch.log10(one / part)) for part in (time, channels, both))  # type: ignore[return-value]


def _chosen(error, shared):
    """The error on each half with the step sizes that are best on the other; one for all of the axes ``shared``."""
    summed = error.sum(shared, keepdim=True)
    best = summed.argmin(1, keepdim=True).flip(0).expand(-1, -1, *error.shape[2:])
    return error.gather(1, best).sum().clamp_min(1e-30)
