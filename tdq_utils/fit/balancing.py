"""Balance the layers of a quantized model: measure the channels of their inputs, and fold factors into their weights."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of, follow, now, predict
from tdq_utils.denoiser.loading import weights_at_hand
from tdq_utils.denoiser.record import Calls
from tdq_utils.denoiser.recording import check_names
from tdq_utils.errors import TDQError, check
from tdq_utils.fit.calibration_set import CalibrationSet, check_data
from tdq_utils.fit.layers import QuantizedLayer, SplitQuantizer, blank_balance, search_weight_step
from tdq_utils.fit.quantize import checked_state, full_precision, quantized_layers
from tdq_utils.method.balance import balance
from tdq_utils.method.grid import Grid

VECTORS = 48  # of a layer's input that are kept of each call
ROOM = 2**28  # bytes of all of them together: fewer are kept of larger models


def balance_layers(model: nn.Module, data: CalibrationSet | Calls, shifted: bool = True, batch_size: int = 16,
                   progress: bool = True) -> dict[str, Grid]:  # fmt: skip
    """Balance every quantized layer by the rule that :func:`quantize` was given; return the grid of each part of its input.

    The full-precision model runs on ``data``; of each call a few vectors of each layer's input are kept. Afterwards layers have
    a ``balance``, weights the step sizes of least error for it, and no learned rounding.
    """
    state, grids = checked_state(model), {}
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.activation is not None}
    vectors = sampled_inputs(model, data, list(layers), batch_size)
    for name, layer in tqdm(layers.items(), desc="balance channels", disable=not progress, leave=False):
        x, factors = vectors.pop(name), []
        with weights_at_hand(layer):
            for part, channels in parts_of(name, layer).items():
                weight = layer.weight.detach().float().cpu()
                weight = weight if layer.split is None else weight[:, channels]
                values = x[..., channels]
                plain = Grid.for_range(state.activations, float(values.min()), float(values.max()))
                how = (state.activations, state.weights, state.balance, shifted and plain.low is not None)
                d, grids[part] = balance(values, weight, *how, groups=getattr(layer, "groups", 1))
                factors.append(d)
            layer.balance = torch.cat(factors).view_as(blank := blank_balance(layer)).to(blank.device)
            layer.levels = layer.rounded = None
            state.frozen = False
            if layer.weight_grid is not None:
                folded = layer.folded_weight()
                layer.weight_step = search_weight_step(folded, layer.weight_grid, state.weights_per, layer.split)
    return grids


def parts_of(name: str, layer: QuantizedLayer) -> dict[str, Any]:
    """Names and channels of what is quantized apart of a layer's input."""
    return layer.activation.parts(name) if isinstance(layer.activation, SplitQuantizer) else {name: slice(None)}


@torch.no_grad()
def sampled_inputs(model: nn.Module, data: CalibrationSet | Calls, names: Sequence[str],
                   batch_size: int = 16, vectors: int = VECTORS) -> dict[str, Tensor]:  # fmt: skip
    """Vectors of the input of layers in full precision, drawn at random: ``"t vector channel"`` float32, on the CPU.

    ``vectors``: of each call, fewer where all would take more than ``ROOM``. TDQError: names of no layer, or of one that does not
    run; no calls or those of another model; counts below 1.
    """
    check("count", batch_size=batch_size, vectors=vectors)
    check_names(model, names)
    check_data(model, data)
    device = device_of(model)
    kept: dict[str, dict[float, list[Tensor]]] = {name: defaultdict(list) for name in names}
    widths: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    calls = max(1, sum(1 for _ in data.batches(batch_size)))

    def keep(name):
        def hook(layer, args):
            x = args[0].detach()
            x = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
            x, widths[name] = x.reshape(-1, x.shape[-1]), x.shape[-1]
            most = max(1, min(vectors, ROOM // (4 * calls * sum(widths.values()))))
            rows = torch.randint(len(x), (most,), generator=generator)
            kept[name][now().values[0]].append(x[rows.to(x.device)].float().cpu())

        return hook

    with full_precision(model):
        handles = follow(model) + [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
        try:
            for batch in data.batches(batch_size, device):
                predict(model, *batch)
        finally:
            for handle in handles:
                handle.remove()
    if idle := [name for name in names if not kept[name]]:
        raise TDQError(f"Every layer must run in the calls that are given; {idle[0]} does not. Leave it in full precision: "
                       "quantize(model, keep=[*kept_layers(model), ...]), or give calls in which it runs.")  # fmt: skip
    return {name: _stacked(at_t) for name, at_t in kept.items()}


def _stacked(at_t):
    """The same number of vectors at each t."""
    joined = [torch.cat(parts) for parts in at_t.values()]
    return torch.stack([vectors[: min(map(len, joined))] for vectors in joined])
