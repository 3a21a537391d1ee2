"""Timings as ratios, measured in one run: alternate the variants, take medians, show the spread."""

import copy
import platform
import time
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from tdq_utils.denoiser.recording import profile_activations
from tdq_utils.denoiser.sampling import sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import freeze, full_precision, quantize, restore
from tdq_utils.lab.memory import sizes
from tdq_utils.run.integer import IntegerRunner, to_integer
from tdq_utils.run.onnx import OnnxModel, export_float, export_onnx
from tdq_utils.run.runtime import Compiled, Runner, interval_table


def machine():
    """One line that says what was measured on."""
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def time_rounds(variants, repeats=5, progress=False):
    """Time functions in turn, round by round, so that a slow phase of the machine meets all of them.

    Args:
        variants: ``{label: function}``. repeats: rounds after one to warm up. progress: show a bar over calls.

    Returns:
        ``{label: seconds of each round}``.
    """
    seconds = {label: [] for label in variants}
    with tqdm(total=(repeats + 1) * len(variants), desc="time", disable=not progress) as bar:
        for round_ in range(repeats + 1):
            for label, function in variants.items():
                bar.set_postfix_str(label)
                start = time.perf_counter()
                function()
                if round_:
                    seconds[label].append(time.perf_counter() - start)
                bar.update()
    return seconds


def time_ratios(variants, repeats=5, progress=False):
    """:func:`time_rounds`, each function compared with the first: the frame of :func:`ratios`."""
    return ratios(time_rounds(variants, repeats, progress))


def ratios(seconds, to=None):
    """Compare timings round by round.

    Args:
        seconds: ``{label: seconds of each round}``. to: label of the baseline; default: the first.

    Returns:
        DataFrame: ``variant``, ``seconds`` (median), ``ratio`` (median over rounds), ``ratio_min``, ``ratio_max``.
    """
    baseline = np.array(seconds[to or next(iter(seconds))])
    rows = []
    for label, values in seconds.items():
        ratio = np.array(values) / baseline
        row = dict(variant=label, seconds=np.median(values), ratio=np.median(ratio), ratio_min=ratio.min(), ratio_max=ratio.max())
        rows.append(row)
    return pd.DataFrame(rows)


def bench(model, scheduler, images=64, steps=5, repeats=5):
    """What profiling and simulated quantization cost beside plain sampling, all of it eager.

    Args:
        model: in full precision, and again so afterwards. images, steps: of each timed run. repeats: timed rounds.

    Returns:
        DataFrame of :func:`time_ratios`.
    """
    how = dict(seeds=range(images), steps=steps, batch_size=images, progress=False)
    with _calibrated(model, scheduler, "tdq", steps, activations=5):

        def plain():
            with full_precision(model):
                sample(model, scheduler, **how)

        def profiled():
            with full_precision(model):
                profile_activations(model, scheduler, **how)

        def simulated():
            sample(model, scheduler, **how)

        unfrozen = {"full precision": plain, "profiled": profiled, "simulated, generator on the path": simulated}
        first = time_ratios(unfrozen, repeats)
        freeze(model, scheduler, steps=steps)
        second = time_ratios({"full precision": plain, "simulated, frozen table": simulated}, repeats)
    return pd.concat([first, second[1:]], ignore_index=True)


@contextmanager
def _calibrated(model, scheduler, method, steps, weights=8, activations=8):
    """While open, the model is quantized and calibrated, as well as a timing needs."""
    quantize(model, weights, activations, method)
    try:
        options = dict(iterations=20) if method == "tdq" else {}
        calibrate(model, scheduler, range(8), steps, progress=False, **options)
        yield
    finally:
        restore(model)


class GeneratorRunner(IntegerRunner):
    """Integers whose intervals the generators compute at every call: what freezing them into a table saves."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.source = [model]  # in a list: not a part of this module

    def row(self, timestep):
        """Every generator, evaluated at t."""
        return interval_table(self.source[0], [int(timestep.flatten()[0])])[0]


def integer_variants(model, scheduler, steps):
    """``{label: model to sample}``: one W8A8 model in floats, simulated, and as integers with every kind of interval."""
    variants = {"fp32, eager": model, "fp32, compiled": Compiled(copy.deepcopy(model))}
    model = copy.deepcopy(model)  # timed as it came in, quantized as a copy
    with _calibrated(model, scheduler, "mse", steps):
        variants["int8, static"] = to_integer(model, scheduler, steps)
    with _calibrated(model, scheduler, "tdq", steps):
        variants["int8, TDQ table"] = to_integer(model, scheduler, steps)
        variants["int8, TDQ generators on the path"] = GeneratorRunner(copy.deepcopy(model), scheduler, steps)
        freeze(model, scheduler, steps)
        variants["simulated, TDQ table, eager"] = copy.deepcopy(model)
        variants["simulated, TDQ table, compiled"] = Runner(model, scheduler, steps)
        variants |= _peers(model, scheduler, steps)
    for method, label in (("dynamic", "tensor"), ("dynamic-sample", "sample")):
        with _calibrated(model, scheduler, method, steps):
            variants[f"int8, dynamic per {label}"] = to_integer(model, scheduler, steps)
    return variants


def _peers(model, scheduler, steps):
    """The same model run by onnxruntime, if that is installed."""
    with TemporaryDirectory() as folder:
        try:
            export_float(model, f"{folder}/float.onnx")
            export_onnx(model, scheduler, steps, f"{folder}/integer.onnx")
            return {f"onnxruntime, {kind}": OnnxModel(f"{folder}/{file}.onnx") for kind, file in
                    (("fp32", "float"), ("int8, TDQ table", "integer"))}  # fmt: skip
        except TDQError as error:
            print(f"Without onnxruntime: {error}")
            return {}


def bench_integer(variants, scheduler, images=64, steps=5, repeats=15, progress=True):
    """End-to-end sampling in floats, simulated and in integers; every variant in every round, in turn.

    Args:
        variants: from :func:`integer_variants`. scheduler. images: a batch, and all there are. steps: of the trajectory.
        repeats: timed rounds, after one that compiles. progress: show a bar.

    Returns:
        DataFrame of :func:`time_ratios` with a column ``baseline``: every variant to "fp32, eager", again to "fp32, compiled",
        and those of integers again to "int8, static".
    """
    how = dict(seeds=range(images), steps=steps, batch_size=images, progress=False)
    seconds = time_rounds({k: lambda m=m: sample(m, scheduler, **how) for k, m in variants.items()}, repeats, progress)
    integers = {label: values for label, values in seconds.items() if label.startswith("int8")}
    tables = {"fp32, eager": seconds, "fp32, compiled": seconds, "int8, static": integers}
    return pd.concat(
        [ratios(rows, to).assign(baseline=to, images=images, steps=steps, rounds=repeats) for to, rows in tables.items()],
        ignore_index=True,
    )


def memory(model, scheduler, runner, images=64, steps=5):
    """:func:`tdq_utils.lab.memory.sizes` of the model with 8 and 4 bits a weight; ``runner``: of the first, compiled or not."""
    rows = []
    for weights in (8, 4):
        with _calibrated(model, scheduler, "mse", steps, weights):
            runner.load(model)
            rows.append(sizes(model, scheduler, runner, steps, images))
    return pd.concat(rows).drop_duplicates("what").reset_index(drop=True)


KINDS = {
    "convolutions and matrix products": (
        "aten::mkldnn_convolution",
        "onednn::qconv_pointwise",
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
    ),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}
REST = "norms, activation functions, quantization, copies"


def where_time_goes(models, seconds, scheduler, images=64, steps=5):
    """Processor time of sampling by kind of work, as the profiler sees it.

    Args:
        models: ``{label: model}``; what compiles has compiled. seconds: ``{label: seconds}`` of each, without the profiler.
        scheduler, images, steps: of the one batch that is sampled.

    Returns:
        DataFrame: ``variant``, ``kind``, ``share`` of that variant's time, and ``seconds``.
    """
    rows = []
    for label, model in models.items():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            sample(model, scheduler, seeds=range(images), steps=steps, batch_size=images, progress=False)
        spent = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
        shares = {kind: sum(spent.get(name, 0) for name in names) / sum(spent.values()) for kind, names in KINDS.items()}
        shares[REST] = 1 - sum(shares.values())
        rows += [dict(variant=label, kind=kind, share=share, seconds=share * seconds[label]) for kind, share in shares.items()]
    return pd.DataFrame(rows)
