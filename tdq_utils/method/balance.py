"""Balance the channels of a layer's input: ``(x / d) @ (d W)`` is ``x @ W``, and one interval serves channels of any size."""

import itertools

import torch
from torch import Tensor

from tdq_utils.errors import TDQError
from tdq_utils.method.grid import Grid, fake_quantize, mse_step, squared_error

# rule -> exponents (a, b) to choose from: d = reach^a / max|W|^b, "reach" the end of a channel's range.
RULES: dict[str, tuple[tuple[float, float], ...]] = {
    "range": ((1.0, 0.0),),  # every channel fills the grid
    "smooth": ((0.5, 0.5),),  # SmoothQuant (Xiao et al. 2023, eq. 4, a = 0.5)
    "ptq4dit": ((0.5, 0.5),),  # the same, with t weighted (Wu et al. 2024, eq. 7-8)
    "mse": ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.5), (0.75, 0.25)),  # least error of the layer's output
}
SHIFTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # share of a shifted grid that lies below 0
SHARE = 0.999  # of a channel's values that lie within its reach
LEAST = 1e-3  # of the largest reach: what a channel that is hardly ever in use is taken for
SEARCHED = 512  # vectors that candidates are compared on


@torch.no_grad()
def balance(x: Tensor, weight: Tensor, bits: int, weight_bits: int | None, rule: str = "range", shifted: bool = False,
            groups: int = 1) -> tuple[Tensor, Grid]:  # fmt: skip
    """The factors ``d``, ``"channel"``, positive, of geometric mean 1, and the grid that suits ``x / d``.

    Candidates are compared by the squared error of the layer's output, channels taken as independent: that of activations,
    ``sum_c |W_c|^2 (x_c - x_hat_c)^2``, and that of weights, ``sum_c x_c^2 |W_c - W_hat_c|^2``, quantized per output channel.
    Channels are not independent: with 4-bit weights "mse", which has exponents to choose from, can be worse than "range".

    Args:
        x: inputs of the layer at each t, ``"t vector channel"``. weight: ``"out in ..."``; ``groups``: of a convolution.
        bits, weight_bits: of activations and of weights (``None``: full precision).
        rule: key of ``RULES``. TDQError: another; tensors that do not fit each other, or are not finite.
        shifted: the input follows SiLU, GELU or ReLU. One shift serves all channels, so that the level of 0, which pads images,
            is one: d lets both ends of a channel fit, and the share of the grid below 0 is searched for.
    """
    if rule not in tuple(RULES):
        raise TDQError(f"balance must be one of {', '.join(RULES)}; got {rule!r}.")
    if x.dim() != 3 or weight.dim() < 2 or x.shape[2] != groups * weight.shape[1]:
        raise TDQError(f"balance takes inputs (t, vector, channel) and weights (out, in, ...) of as many channels; got "
                       f"{tuple(x.shape)} and {tuple(weight.shape)} in {groups} groups. Reshape them.")  # fmt: skip
    if not (torch.isfinite(x).all() and torch.isfinite(weight).all()):
        raise TDQError("balance takes finite inputs and weights; got NaN or infinity. Leave out what is broken.")
    for number in (bits, *(() if weight_bits is None else (weight_bits,))):
        Grid(number)  # refuses what is none, before the search
    weight, columns = weight.float(), per_input(weight.float(), groups)
    few = x.flatten(0, 1)[:: max(1, x.shape[0] * x.shape[1] // SEARCHED)]
    power = columns.square().sum(1)
    best: tuple[Tensor, Tensor, Grid] | None = None
    for (a, b), share in itertools.product(RULES[rule], SHIFTS if shifted else (None,)):
        reach = _reach(x, columns, share, rule)
        d = reach.pow(a) / columns.abs().amax(1).clamp_min(1e-8).pow(b)
        d /= d.log().mean().exp()
        grid = Grid(bits, None if share is None else -share * float((reach / d).max()))
        counts, values = (power * d.square()).expand_as(few).reshape(1, -1), (few / d).reshape(1, -1)
        error = squared_error(values, counts, mse_step(values, grid, counts), grid)[0] / len(few)
        if weight_bits is not None:
            error = error + (few.square().mean(0) * _weight_error(weight, d, weight_bits, groups)).sum()
        if best is None or error < best[0]:
            best = error, d, grid
    assert best is not None
    return best[1:]


def per_input(weight: Tensor, groups: int = 1) -> Tensor:
    """Weights ``"out in ..."``, a row for each input channel: ``"channel rest"``."""
    inputs = groups * weight.shape[1]
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).transpose(1, 2).reshape(inputs, -1)


def for_weight(d: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Factors of input channels, ``"channel"``, in a shape that broadcasts to weights ``"out in ..."``."""
    rows = d if groups == 1 else d.reshape(groups, 1, -1).expand(groups, len(weight) // groups, -1).reshape(len(weight), -1)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def _reach(x, columns, share, rule):
    """The end of each channel's range, ``"channel"``; with a ``share`` of the grid below 0, the end that both sides need."""

    def end(values):
        return values.kthvalue(max(1, round(SHARE * len(values))), dim=0).values.clamp_min(0)

    def ends(values):
        if share is None:
            return end(values.abs())
        above = end(values) / (1 - share)
        return torch.maximum(above, end(-values) / share) if share else above

    if rule == "ptq4dit":
        each = torch.stack([ends(values) for values in x])
        weights = torch.softmax(-_rank_correlation(each, columns.abs().amax(1)), 0)
        reach = (weights[:, None] * each).sum(0)
    else:
        reach = ends(x.flatten(0, 1))
    return reach.clamp_min(LEAST * float(reach.max())).clamp_min(1e-8)


def _rank_correlation(rows: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation of each of the ``rows`` ``"t channel"`` with ``other`` ``"channel"``: ``"t"``."""
    ranks = [values.argsort(-1).argsort(-1).double() for values in (rows, other.expand_as(rows))]
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-12)).float()


def _weight_error(weight, d, bits, groups):
    """Squared error of each input channel's weights, quantized per output channel after folding ``d`` in: ``"channel"``."""
    grid, wide = Grid(bits), for_weight(d, weight, groups)
    folded = (weight * wide).flatten(1)
    error = fake_quantize(folded, mse_step(folded, grid), grid) - folded
    return per_input(error.view_as(weight) / wide, groups).square().sum(1)
