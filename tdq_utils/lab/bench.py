"""Time and memory as ratios, measured in one run: alternate the variants, take medians, show the spread."""

import copy
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import SchedulerMixin
from safetensors import safe_open
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from tdq_utils.denoiser.recording import profile_activations
from tdq_utils.denoiser.sampling import sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import DYNAMIC, freeze, quantize, quantized_layers
from tdq_utils.run.integer import IntegerRunner, to_integer
from tdq_utils.run.onnx import OnnxModel, export_float, export_onnx
from tdq_utils.run.runtime import Compiled, Runner, interval_table
from tdq_utils.run.storage import save_quantized

KINDS = {
    "convolutions and matrix products": ["mkldnn_convolution", "qconv_pointwise", "addmm", "mm", "bmm"],
    "attention": ["_scaled_dot_product_flash_attention_for_cpu"],
}
REST = "norms, activation functions, quantization, copies"


def machine() -> str:
    """One line that says what was measured on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search("model name\\s*: (.*)", info.read_text() if info.exists() else "")
    cpu = cpu[1] if cpu else platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def time_rounds(variants: dict[str, Callable[[], Any]], repeats: int = 5, progress: bool = False) -> dict[str, list[float]]:
    """Time functions in turn, round by round, so that a slow phase of the machine meets all of them.

    Args:
        variants: by label. repeats: rounds after one to warm up; the seconds of each are returned. progress: show a bar.
    """
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    for _ in tqdm(range(repeats + 1), desc="time", disable=not progress):
        for label, function in variants.items():
            start = time.perf_counter()
            function()
            seconds[label].append(time.perf_counter() - start)
    return {label: values[1:] for label, values in seconds.items()}


def ratios(seconds: dict[str, list[float]], to: str | None = None) -> pd.DataFrame:
    """Compare the seconds of each round with those of the baseline ``to``; default: the first.

    Returns:
        DataFrame: ``variant``, ``seconds`` (median), ``ratio`` (median over rounds), ``ratio_min``, ``ratio_max``.
    """
    rounds = pd.DataFrame(seconds)
    ratio = rounds.div(rounds[to or rounds.columns[0]], axis=0)
    frame = dict(seconds=rounds.median(), ratio=ratio.median(), ratio_min=ratio.min(), ratio_max=ratio.max())
    return pd.DataFrame(frame).rename_axis("variant").reset_index()


def _one_batch(images: int, steps: int) -> dict[str, Any]:
    return dict(seeds=range(images), steps=steps, batch_size=images, progress=False)


def _calibrated(model: nn.Module, scheduler: SchedulerMixin, method: str, steps: int, weights: int = 8, activations: int = 8
                ) -> nn.Module:  # fmt: skip
    """A copy of a full-precision model, quantized and calibrated as well as a timing needs."""
    model = copy.deepcopy(model)
    quantize(model, weights, activations, method)
    calibrate(model, scheduler, range(8), steps, progress=False, **(dict(iterations=20) if method == "tdq" else {}))
    return model


def bench(model: nn.Module, scheduler: SchedulerMixin, images: int = 64, steps: int = 5, repeats: int = 5) -> pd.DataFrame:
    """What profiling and simulated quantization cost beside plain sampling, all of it eager: the frame of :func:`ratios`.

    Args:
        model: in full precision. images, steps: of each timed run. repeats: timed rounds.
    """
    how, unfrozen = _one_batch(images, steps), _calibrated(model, scheduler, "tdq", steps, activations=5)
    frozen = copy.deepcopy(unfrozen)
    freeze(frozen, scheduler, steps)
    variants = {
        "full precision": lambda: sample(model, scheduler, **how),
        "profiled": lambda: profile_activations(model, scheduler, **how),
        "simulated, generator on the path": lambda: sample(unfrozen, scheduler, **how),
        "simulated, frozen table": lambda: sample(frozen, scheduler, **how),
    }
    return ratios(time_rounds(variants, repeats))


def generator_runner(model: nn.Module, scheduler: SchedulerMixin, steps: int, **options: Any) -> IntegerRunner:
    """Integers whose intervals the generators compute at every call: what freezing them into a table saves."""
    runner = IntegerRunner(model, scheduler, steps, **options)
    runner.row = lambda timestep: interval_table(model, [int(timestep.flatten()[0])])[0]
    return runner


def integer_variants(model: nn.Module, scheduler: SchedulerMixin, steps: int) -> dict[str, nn.Module]:
    """``{label: model to sample}``: one W8A8 model in floats, simulated, and as integers with every kind of interval."""
    static, tdq = (_calibrated(model, scheduler, method, steps) for method in ("mse", "tdq"))
    frozen = copy.deepcopy(tdq)
    freeze(frozen, scheduler, steps)
    variants = {
        "fp32, eager": model,
        "fp32, compiled": Compiled(copy.deepcopy(model)),
        "int8, static": to_integer(static, scheduler, steps),
        "int8, TDQ table": to_integer(tdq, scheduler, steps),
        "int8, TDQ generators on the path": generator_runner(tdq, scheduler, steps),
        "simulated, TDQ table, eager": frozen,
        "simulated, TDQ table, compiled": Runner(tdq, scheduler, steps),
        **_peers(frozen, scheduler, steps),
    }
    for method, over in DYNAMIC.items():
        variants[f"int8, dynamic per {over}"] = to_integer(_calibrated(model, scheduler, method, steps), scheduler, steps)
    return variants


def _peers(model: nn.Module, scheduler: SchedulerMixin, steps: int) -> dict[str, nn.Module]:
    """The same model run by onnxruntime, if that is installed."""
    with TemporaryDirectory() as folder:
        floats, integers = f"{folder}/float.onnx", f"{folder}/integer.onnx"
        try:
            export_float(model, floats)
            export_onnx(model, scheduler, steps, integers)
            return {"onnxruntime, fp32": OnnxModel(floats), "onnxruntime, int8, TDQ table": OnnxModel(integers)}
        except TDQError as error:
            print(f"Without onnxruntime: {error}")
            return {}


def bench_integer(variants: dict[str, nn.Module], scheduler: SchedulerMixin, images: int = 64, steps: int = 5, repeats: int = 15,
                  progress: bool = True) -> pd.DataFrame:  # fmt: skip
    """End-to-end sampling of one batch by :func:`integer_variants`; every variant in every round, after one that compiles.

    Returns:
        DataFrame of :func:`ratios` with a column ``baseline``: every variant to "fp32, eager", again to "fp32, compiled",
        and those of integers again to "int8, static".
    """
    how = _one_batch(images, steps)
    seconds = time_rounds({k: lambda m=m: sample(m, scheduler, **how) for k, m in variants.items()}, repeats, progress)
    integers = {label: values for label, values in seconds.items() if label.startswith("int8")}
    compared = {"fp32, eager": seconds, "fp32, compiled": seconds, "int8, static": integers}
    tables = [ratios(rows, to).assign(baseline=to, images=images, steps=steps, rounds=repeats) for to, rows in compared.items()]
    return pd.concat(tables, ignore_index=True)


def where_time_goes(models: dict[str, nn.Module], seconds: dict[str, float] | pd.Series, scheduler: SchedulerMixin,
                    images: int = 64, steps: int = 5) -> pd.DataFrame:  # fmt: skip
    """Processor time of sampling by kind of work, as the profiler sees it.

    Args:
        models: by label; what compiles has compiled. seconds: of each, without the profiler. images, steps: of the one batch.

    Returns:
        DataFrame: ``variant``, ``kind``, ``share`` of that variant's time, and ``seconds``.
    """
    rows = []
    for label, model in models.items():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            sample(model, scheduler, **_one_batch(images, steps))
        spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
        of = lambda names, spent=spent: sum(time for key, time in spent.items() if key.split("::")[-1] in names)  # noqa: E731
        shares = {kind: of(names) / sum(spent.values()) for kind, names in KINDS.items()}
        shares[REST] = 1 - sum(shares.values())
        rows += [dict(variant=label, kind=kind, share=share, seconds=share * seconds[label]) for kind, share in shares.items()]
    return pd.DataFrame(rows)


def peak_bytes(function: Callable[[], Any]) -> tuple[int, int]:
    """``(peak, left)``: the most bytes that tensors held at once while ``function`` ran on the CPU, and those at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = function()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    del kept
    return max(0, *held), held[-1]


def stored_bytes(model: nn.Module, packed: bool = True) -> int:
    """Bytes on disk of everything that the quantized layers need for their weights, biases apart."""
    parts = ("weight", "packed", "levels", "weight_step")
    names = {f"{name}.{part}" for name in quantized_layers(model) for part in parts}
    with TemporaryDirectory() as folder:
        save_quantized(model, folder, packed=packed)
        with safe_open(next(Path(folder).glob("*.safetensors")), "pt") as file:
            return sum(file.get_tensor(name).nbytes for name in names & {*file.keys()})


def memory(model: nn.Module, scheduler: SchedulerMixin, runner: IntegerRunner, images: int = 64, steps: int = 5) -> pd.DataFrame:
    """Weights and working memory of a model in floats and as integers, with 8 and with 4 bits a weight.

    Args:
        model: in full precision. runner: W8A8 integers of it, compiled or not. images, steps: of the one batch that is sampled.

    Returns:
        DataFrame: ``what``, ``fp32`` and ``integer`` in bytes, ``ratio``. Weights are those of the quantized layers, with
        their step sizes; the peak is that of all tensors beside the weights, in a trajectory of the eager full-precision model
        and of the runner.
    """
    how, rows = _one_batch(images, steps), []
    for bits in (8, 4):
        quantized = _calibrated(model, scheduler, "mse", steps, bits)
        layers = quantized_layers(quantized)
        runner.load(quantized)
        sample(runner, scheduler, **how)  # compiles, and keeps what it keeps from the first call on
        twins = [(runner.net.get_submodule(name), layer) for name, layer in layers.items()]
        _, held = peak_bytes(lambda twins=twins: [type(twin)(layer, twin.quantizer) for twin, layer in twins])
        floats = sum(layer.weight.nbytes for layer in layers.values())
        rows += [(f"weights on disk, {bits} bits", floats, stored_bytes(quantized))]
        rows += [(f"weights in memory, {bits} bits", floats, held)]
    peaks = [peak_bytes(lambda net=net: sample(net, scheduler, **how))[0] for net in (model, runner)]
    frame = pd.DataFrame([*rows, ("peak of sampling, beside weights", *peaks)], columns=["what", "fp32", "integer"])
    return frame.assign(ratio=frame.integer / frame.fp32)
