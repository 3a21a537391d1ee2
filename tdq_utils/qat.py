"""The table of quantization-aware training: every method in one loop, with its controls."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd

from tdq_utils.datasets import load_images
from tdq_utils.finetuning import finetune
from tdq_utils.reproduce import Job
from tdq_utils.storage import save_quantized

BITS = ((4, 4), (3, 3), (4, 8), (8, 8))
HEADLINE = (4, 4)  # gets a second repeat, and TDQ on the other rules
METHODS = ("pact", "lsq", "nipq", "tdq")
UNTRAINED = ("mse", "tdq")  # what post-training quantization does at the same bits


@dataclass(frozen=True)
class QatJob(Job):
    """A row of the table: a training, or a control.

    Attributes:
        iterations: of training; 0 for post-training quantization, where ``method`` is one of calibrate's; else it is one of
            ``FINETUNED``, or "fine-tuned": the full-precision model, trained for as long. batch: images an iteration.
    """

    iterations: int = 600
    batch: int = 64

    def prepare(self, model, scheduler, calibration, folder):
        """Train in place, or calibrate. Goes on from ``folder``; leaves there ``model/``, quantized, and ``loss.csv``."""
        if self.iterations == 0:
            return super().prepare(model, scheduler, calibration, folder)
        data, _ = calibration()
        bits = dict(weights=self.weights or None, activations=self.activations or None)
        method = "lsq" if self.method == "fine-tuned" else self.method
        how = dict(iterations=self.iterations, batch=self.batch, seed=self.repeat, out=folder)
        losses = finetune(model, scheduler, _training_images(), method, **bits, **how, data=data, progress=False)
        pd.DataFrame({"loss": losses}).to_csv(folder / "loss.csv", index_label="iteration", float_format="%.5g")
        save_quantized(model, folder / "model", packed=self.weights > 0)
        return dict(loss=np.mean(losses[-100:]))


@cache
def _training_images():
    """The 10,000 training images that ship: what every clone has."""
    return load_images(split="train-10k")


def qat_jobs(quick=False, steps=20, iterations=600, batch=64):
    """The jobs of the table, most wanted first. ``quick``: W4A4 with LSQ and TDQ, 30 iterations."""
    base = QatJob("full precision", steps=steps, iterations=0, batch=0)
    trained = replace(base, iterations=30 if quick else iterations, batch=batch)
    jobs = []
    for repeat in range(1 if quick else 2):
        jobs += [replace(base, method=name, repeat=repeat) for name in ("full precision", "real images")]
        for weights, activations in BITS if not quick and repeat == 0 else (HEADLINE,):
            bits = dict(weights=weights, activations=activations, repeat=repeat)
            methods = ("lsq", "tdq") if quick else METHODS
            if (weights, activations) == HEADLINE and not quick:
                methods += ("tdq-pact", "tdq-nipq")
            jobs += [replace(base, method=method, **bits) for method in UNTRAINED]
            jobs += [replace(trained, method=method, **bits) for method in methods]
        if not quick:
            jobs.append(replace(trained, method="fine-tuned", repeat=repeat))
    return jobs
