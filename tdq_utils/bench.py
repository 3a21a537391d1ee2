"""Timings as ratios, measured in one run: alternate the variants, take medians, show the spread."""

import platform
import time

import numpy as np
import pandas as pd
import torch

from tdq_utils.calibration import calibrate
from tdq_utils.profiling import profile_activations
from tdq_utils.quantize import freeze, full_precision, quantize, restore
from tdq_utils.sampling import sample


def machine():
    """One line that says what was measured on."""
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def time_ratios(variants, repeats=5):
    """Time functions in turn and compare each with the first, round by round.

    Args:
        variants: ``{label: function}``; the first is the baseline. repeats: rounds after one to warm up.

    Returns:
        DataFrame: ``variant``, ``seconds`` (median), ``ratio`` (median over rounds), ``ratio_min``, ``ratio_max``.
    """
    seconds = {label: [] for label in variants}
    for round_ in range(repeats + 1):
        for label, function in variants.items():
            start = time.perf_counter()
            function()
            if round_:
                seconds[label].append(time.perf_counter() - start)
    baseline = np.array(next(iter(seconds.values())))
    rows = []
    for label, values in seconds.items():
        ratio = np.array(values) / baseline
        row = dict(variant=label, seconds=np.median(values), ratio=np.median(ratio), ratio_min=ratio.min(), ratio_max=ratio.max())
        rows.append(row)
    return pd.DataFrame(rows)


def bench(model, scheduler, images=64, steps=5, repeats=5):
    """What profiling and simulated quantization cost beside plain sampling.

    Args:
        model: in full precision, and again so afterwards. images, steps: of each timed run. repeats: timed rounds.

    Returns:
        DataFrame of :func:`time_ratios`.
    """
    how = dict(seeds=range(images), steps=steps, batch_size=images, progress=False)
    quantize(model, weights=8, activations=5, method="tdq")
    calibrate(model, scheduler, seeds=range(8), steps=steps, iterations=20, progress=False)

    def plain():
        with full_precision(model):
            sample(model, scheduler, **how)

    def profiled():
        with full_precision(model):
            profile_activations(model, scheduler, **how)

    def simulated():
        sample(model, scheduler, **how)

    try:
        unfrozen = {"full precision": plain, "profiled": profiled, "simulated, generator on the path": simulated}
        first = time_ratios(unfrozen, repeats)
        freeze(model, scheduler, steps=steps)
        second = time_ratios({"full precision": plain, "simulated, frozen table": simulated}, repeats)
    finally:
        restore(model)
    return pd.concat([first, second[1:]], ignore_index=True)
