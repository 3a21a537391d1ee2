"""Time and memory as ratios, measured in one run: alternate the variants, take medians, show the spread."""

import copy
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import SchedulerMixin
from safetensors import safe_open
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from tdq_utils.denoiser.recording import profile_activations
from tdq_utils.denoiser.sampling import sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import DYNAMIC, freeze, quantize, quantized_layers
from tdq_utils.run.integer import IntegerRunner, to_integer
from tdq_utils.run.onnx import OnnxModel, export_float, export_onnx, needed, session
from tdq_utils.run.runtime import Compiled, Runner, interval_table
from tdq_utils.run.storage import save_quantized

KINDS = dict.fromkeys(("mkldnn_convolution", "qconv_pointwise", "addmm", "mm", "bmm"), "convolutions and matrix products")
KINDS["_scaled_dot_product_flash_attention_for_cpu"] = "attention"
REST = "norms, activation functions, quantization, copies"
INTEGER = {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"}
FLOAT = {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"}  # as onnxruntime names its kernels


def machine() -> str:
    """One line that says what was measured on."""
    info = Path("/proc/cpuinfo")
    cpu = (re.findall("model name\\s*: (.*)", info.read_text() if info.exists() else "") or [platform.machine()])[0]
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def time_rounds(variants: Mapping[str, Callable[[], Any]], repeats: int = 5, progress: bool = False) -> dict[str, list[float]]:
    """Seconds of functions in each of ``repeats`` rounds, after one to warm up; in turn, so that a slow phase meets all."""
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    for _ in tqdm(range(repeats + 1), desc="time", disable=not progress):
        for label, function in variants.items():
            start = time.perf_counter()
            function()
            seconds[label].append(time.perf_counter() - start)
    return {label: values[1:] for label, values in seconds.items()}


def ratios(seconds: dict[str, list[float]], to: str | None = None) -> pd.DataFrame:
    """Each round's seconds over those of ``to`` (default: the first): ``variant``, ``seconds``, ``ratio`` (medians over rounds),
    ``ratio_min``, ``ratio_max``."""
    rounds = pd.DataFrame(seconds)
    ratio = rounds.div(rounds[to or rounds.columns[0]], axis=0)
    frame = dict(seconds=rounds.median(), ratio=ratio.median(), ratio_min=ratio.min(), ratio_max=ratio.max())
    return pd.DataFrame(frame).rename_axis("variant").reset_index()


def _calibrated(model: nn.Module, scheduler: SchedulerMixin, method: str, steps: int, weights: int = 8, activations: int = 8,
                balance: bool = False) -> nn.Module:  # fmt: skip
    """A copy of a full-precision model, quantized and calibrated as well as a timing needs."""
    model = copy.deepcopy(model)
    quantize(model, weights, activations, method, balance=balance)
    calibrate(model, scheduler, range(8), steps, progress=False, **(dict(iterations=20) if method == "tdq" else {}))
    return model


def bench(model: nn.Module, scheduler: SchedulerMixin, images: int = 64, steps: int = 5, repeats: int = 5) -> pd.DataFrame:
    """What profiling and simulated quantization cost beside plain sampling, all of it eager: the frame of :func:`ratios`."""
    unfrozen, batch = _calibrated(model, scheduler, "tdq", steps, activations=5), (scheduler, range(images), steps, images)
    frozen = copy.deepcopy(unfrozen)
    freeze(frozen, scheduler, steps)
    variants = {
        "full precision": partial(sample, model, *batch, progress=False),
        "profiled": partial(profile_activations, model, scheduler, range(images), steps, batch_size=images, progress=False),
        "simulated, generator on the path": partial(sample, unfrozen, *batch, progress=False),
        "simulated, frozen table": partial(sample, frozen, *batch, progress=False),
    }
    return ratios(time_rounds(variants, repeats))


def generator_runner(model: nn.Module, scheduler: SchedulerMixin, steps: int, **options: Any) -> IntegerRunner:
    """Integers whose intervals the generators compute at every call: what freezing them into a table saves."""

    class Generators(IntegerRunner):
        def row(self, timestep: Tensor) -> Tensor:
            return interval_table(model, [int(timestep.flatten()[0])])[0]

    return Generators(model, scheduler, steps, **options)


def integer_variants(model: nn.Module, scheduler: SchedulerMixin, steps: int) -> dict[str, Any]:
    """``{label: model to sample}``: one W8A8 model in floats, simulated, and as integers with every kind of interval."""
    static, tdq = (_calibrated(model, scheduler, method, steps) for method in ("mse", "tdq"))
    frozen = copy.deepcopy(tdq)
    freeze(frozen, scheduler, steps)
    balanced = _calibrated(model, scheduler, "tdq", steps, balance=True)
    dynamic = {over: _calibrated(model, scheduler, method, steps) for method, over in DYNAMIC.items()}
    return {
        "fp32, eager": model, "fp32, compiled": Compiled(copy.deepcopy(model)),
        "int8, static": to_integer(static, scheduler, steps), "int8, TDQ table": to_integer(tdq, scheduler, steps),
        "int8, TDQ table, balanced": to_integer(balanced, scheduler, steps),
        "int8, TDQ generators on the path": generator_runner(tdq, scheduler, steps),
        "simulated, TDQ table, eager": frozen, "simulated, TDQ table, compiled": Runner(tdq, scheduler, steps),
        **_peers(frozen, scheduler, steps),
        **{f"int8, dynamic per {over}": to_integer(quantized, scheduler, steps) for over, quantized in dynamic.items()},
    }  # fmt: skip


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


def kernels(path: str | Path) -> pd.DataFrame:
    """The kernels that onnxruntime multiplies with on this machine: those in the file's graph after all fusions.

    Columns ``kernel``, ``arithmetic`` ("int8" or "float32"), ``layers`` ("quantized" or "full precision": also products of
    activations), ``count``. A float32 kernel of a quantized layer is one that is fed by DequantizeLinear. TDQError: onnx or
    onnxruntime is not installed.
    """
    with TemporaryDirectory() as folder:
        session(path, fused=f"{folder}/fused.onnx")
        nodes = needed("onnx")[0].load(f"{folder}/fused.onnx").graph.node
    dequantized = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    found: Counter[tuple[str, str, str]] = Counter()
    for node in nodes:
        if node.op_type in INTEGER:
            found[node.op_type, "int8", "quantized"] += 1
        elif node.op_type in FLOAT:
            found[node.op_type, "float32", "quantized" if dequantized & set(node.input) else "full precision"] += 1
    return pd.DataFrame([(*key, n) for key, n in sorted(found.items())], columns=["kernel", "arithmetic", "layers", "count"])


def bench_integer(variants: dict[str, nn.Module], scheduler: SchedulerMixin, images: int = 64, steps: int = 5, repeats: int = 15,
                  progress: bool = True) -> pd.DataFrame:  # fmt: skip
    """End-to-end sampling of one batch by :func:`integer_variants`; every variant in every round, after one that compiles.

    :func:`ratios`, ``baseline``: all to "fp32, eager", all to "fp32, compiled", those of integers to "int8, static"."""
    runs = {k: partial(sample, model, scheduler, range(images), steps, images, progress=False) for k, model in variants.items()}
    seconds = time_rounds(runs, repeats, progress)
    compared = {"fp32, eager": seconds, "fp32, compiled": seconds}
    compared["int8, static"] = {label: values for label, values in seconds.items() if label.startswith("int8")}
    tables = [ratios(rows, to).assign(baseline=to, images=images, steps=steps, rounds=repeats) for to, rows in compared.items()]
    return pd.concat(tables, ignore_index=True)


def where_time_goes(models: dict[str, nn.Module], table: pd.DataFrame, scheduler: SchedulerMixin,
                    images: int = 64, steps: int = 5) -> pd.DataFrame:  # fmt: skip
    """Processor time of sampling one batch: ``variant``, ``kind`` of work, ``share`` by the profiler, and ``seconds``.

    ``models``: by label; what compiles has compiled. ``table``: of :func:`bench_integer`, their seconds without the profiler."""
    rows, seconds = [], table.groupby("variant").seconds.first()
    for label, model in models.items():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            sample(model, scheduler, range(images), steps, images, progress=False)
        shares = dict.fromkeys([*KINDS.values(), REST], 0.0)
        total = sum(event.self_cpu_time_total for event in seen.key_averages())
        for event in seen.key_averages():
            shares[KINDS.get(event.key.split("::")[-1], REST)] += event.self_cpu_time_total / total
        rows += [dict(variant=label, kind=kind, share=share, seconds=share * seconds[label]) for kind, share in shares.items()]
    return pd.DataFrame(rows)


def peak_bytes(function: Callable[[], Any]) -> tuple[int, int]:
    """``(peak, left)``: the most bytes that tensors held at once while ``function`` ran on the CPU, and those at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _kept = function()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return max(0, *held), int(held[-1])


def stored_bytes(model: nn.Module, packed: bool = True) -> int:
    """Bytes on disk of everything that the quantized layers need for their weights, biases apart."""
    parts = ("weight", "packed", "levels", "weight_step")
    names = {f"{name}.{part}" for name in quantized_layers(model) for part in parts}
    with TemporaryDirectory() as folder:
        save_quantized(model, folder, packed=packed)
        with safe_open(next(Path(folder).glob("*.safetensors")), "pt") as file:
            return sum(file.get_tensor(name).nbytes for name in names & {*file.keys()})


def memory(model: nn.Module, scheduler: SchedulerMixin, runner: IntegerRunner, images: int = 64, steps: int = 5) -> pd.DataFrame:
    """Weights and working memory, 8 and 4 bits a weight: ``what``, ``fp32`` and ``integer`` in bytes, ``ratio``.

    ``runner``: W8A8 integers of the model, compiled or not. Weights: of quantized layers, with their step sizes; peak: of all
    tensors beside the weights, in a trajectory of one batch, of the eager full-precision model and of the runner."""
    batch = scheduler, range(images), steps, images

    def weights(bits: int) -> list[tuple]:
        quantized = _calibrated(model, scheduler, "mse", steps, bits)
        runner.load(quantized)
        sample(runner, *batch, progress=False)  # compiles, and keeps what it keeps from the first call on
        layers = [(runner.net.get_submodule(name), layer) for name, layer in quantized_layers(quantized).items()]
        _, held = peak_bytes(lambda: [type(mine)(layer, mine.quantizer) for mine, layer in layers])
        floats = sum(layer.weight.nbytes for _, layer in layers)
        sizes = {"on disk": stored_bytes(quantized), "in memory": held}
        return [(f"weights {where}, {bits} bits", floats, size) for where, size in sizes.items()]

    peaks = [peak_bytes(partial(sample, net, *batch, progress=False))[0] for net in (model, runner)]
    rows = [*weights(8), *weights(4), ("peak of sampling, beside weights", *peaks)]
    return pd.DataFrame(rows, columns=["what", "fp32", "integer"]).assign(ratio=lambda frame: frame.integer / frame.fp32)
