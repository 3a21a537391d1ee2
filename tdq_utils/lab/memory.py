"""What a quantized model weighs: on disk, in memory, and at the peak of sampling."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile

from tdq_utils.denoiser.sampling import sample
from tdq_utils.fit.quantize import full_precision, quantized_layers
from tdq_utils.run.storage import save_quantized


def peak_bytes(function):
    """The most memory that tensors held at once while ``function`` ran, above what they held before; on the CPU.

    Returns:
        ``(peak, left)``: bytes; what was still held at the end.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = function()
    held = peak = 0
    for event in sorted(_allocations(seen), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak, held


def _allocations(seen):
    return (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")


def stored_bytes(model, packed=True):
    """Bytes on disk of everything that the quantized layers need for their weights, biases apart."""
    with TemporaryDirectory() as folder:
        save_quantized(model, folder, packed=packed)
        with safe_open(next(Path(folder).glob("*.safetensors")), "pt") as file:
            names = [
                f"{name}.{part}" for name in quantized_layers(model) for part in ("weight", "packed", "levels", "weight_step")
            ]
            return sum(file.get_tensor(name).nbytes for name in file.keys() if name in names)  # noqa: SIM118


def sizes(model, scheduler, runner, steps=2, images=64):
    """Weights and working memory of a calibrated model, in floats and as integers.

    Args:
        model: quantized, weights and activations. runner: its :class:`tdq_utils.run.integer.IntegerRunner`.
        scheduler, steps, images: of the one batch that is sampled.

    Returns:
        DataFrame: ``what``, ``fp32`` and ``integer`` in bytes, ``ratio``. Weights are those of the quantized layers, with
        their step sizes; the peak is that of all tensors beside the weights, in a trajectory of the eager full-precision model
        and of the runner.
    """
    floats = sum(layer.weight.nbytes for layer in quantized_layers(model).values())
    how = dict(seeds=range(images), steps=steps, batch_size=images, progress=False)
    sample(runner, scheduler, **how)  # compiles, and keeps what it keeps from the first call on
    _, held = peak_bytes(lambda: [type(layer)(twin, layer.quantizer) for layer, twin in _pairs(runner, model)])
    with full_precision(model):
        plain, _ = peak_bytes(lambda: sample(model, scheduler, **how))
    integer, _ = peak_bytes(lambda: sample(runner, scheduler, **how))
    rows = [
        (f"weights on disk, {model.quantization.weights} bits", floats, stored_bytes(model)),
        (f"weights in memory, {model.quantization.weights} bits", floats, held),
        ("peak of sampling, beside weights", plain, integer),
    ]
    return pd.DataFrame(rows, columns=["what", "fp32", "integer"]).assign(ratio=lambda rows: rows.integer / rows.fp32)


def _pairs(runner, model):
    return [(runner.net.get_submodule(name), layer) for name, layer in quantized_layers(model).items()]
