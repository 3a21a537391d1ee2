"""The paper's tables, measured here: a grid of settings -> a CSV that grows by a row at a time and survives a kill."""

import copy
import os
import time
from dataclasses import asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.sampling import sample_batches
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import profile_set
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.quantize import DYNAMIC, freeze, restore
from tdq_utils.lab.datasets import load_images
from tdq_utils.lab.fid import Distances, feature_extractor
from tdq_utils.lab.results import Table
from tdq_utils.run.integer import IntegerRunner
from tdq_utils.run.runtime import Compiled, Runner

ENGINES = ("eager", "compiled", "integer")
SEEDS = 1_000_000  # repeat r samples the seeds from r * SEEDS and calibrates on others of the same million


def reproduce(jobs, model, scheduler, out, images=1000, batch_size=16, features="classifier", cache=None, engine="eager",
              progress=True):  # fmt: skip
    """Measure the jobs that ``out`` does not hold yet.

    Under ``accelerate launch`` (GPUs) or ``torchrun`` (CPUs) the jobs are dealt out to the processes; two give the rows
    of one.

    Args:
        jobs: list of :class:`tdq_utils.lab.tables.ptq.Job`, all of one class. model, scheduler: in full precision. out: CSV.
        images: a row; at equal seeds in all rows of a repeat. batch_size: as for ``sample``.
        features: ``"classifier"`` (FCD) or ``"inception"`` (FID), as for :class:`tdq_utils.lab.fid.Distances`.
        cache: folder for the full-precision images that rows are paired with, and for trainings; default: that of
            :func:`default_cache`.
        engine: what samples the quantized models: ``"eager"``, the simulation; ``"compiled"``, the same through
            :class:`tdq_utils.run.runtime.Runner`; ``"integer"``, through :class:`tdq_utils.run.integer.IntegerRunner` (but
            simulated where halves of inputs are quantized apart). The last two compile once for all rows.
        progress: show bars.

    Returns:
        DataFrame of all rows of the table.

    Raises:
        TDQError: rows in ``out`` with another protocol, no more images than features, an unknown engine.
        DataError: a damaged ``out``.
    """
    state = processes()
    _check_images(images, features)
    if engine not in ENGINES:
        raise TDQError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
    table = Table(out, tuple(field.name for field in fields(jobs[0])), state.process_index, state.num_processes)
    protocol = dict(images=images, sampler="DDIM", model=fingerprint(model), features=features)
    done = table.everything()
    _check_protocol(done.values(), protocol, {job.steps for job in jobs}, out)
    # Dealt out before looking at what is done: processes that start seconds apart still agree.
    mine = deal(jobs, state.process_index, state.num_processes)
    mine = [job for job in mine if tuple(asdict(job).values()) not in done]
    cache = default_cache(out) if cache is None else Path(cache)
    bench = _Bench(model, scheduler, images, batch_size, features, cache, engine, progress)
    bar = tqdm(mine, desc=f"reproduce {Path(out).name}", disable=not progress)
    for job in bar:
        bar.set_postfix_str(f"{job.method} W{job.weights}A{job.activations} #{job.repeat}")
        table.add({**asdict(job), **protocol, **bench.measure(job)})
    state.wait_for_everyone()
    if state.is_main_process:
        table.merge([tuple(asdict(job).values()) for job in jobs])
    state.wait_for_everyone()
    return pd.DataFrame(table.everything().values())


def default_cache(out):
    """The folder ``cache`` beside a table."""
    return Path(out).parent / "cache"


def deal(jobs, rank, world):
    """The jobs of one process of ``world``, in turn; those that share a folder go to the same."""
    turn = {name: i for i, name in enumerate(dict.fromkeys(job.name for job in jobs))}
    return [job for job in jobs if turn[job.name] % world == rank]


def processes():
    """How many processes share the work, and which is this one (accelerate's state)."""
    # The first to finish waits for the last, however long that takes.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def _check_images(images, features):
    if images <= (width := feature_extractor(features).num_features):
        raise TDQError(f"images must exceed the {width} features of the {features}; got {images}.")


def _check_protocol(rows, protocol, steps, out):
    for row in rows:
        wanted = {**protocol, "steps": row["steps"] if row["steps"] in steps else min(steps)}
        for name, value in wanted.items():
            if str(row[name]) != str(value):
                raise TDQError(
                    f"All rows of a table must share images, steps, model and features; {out} holds {name} = {row[name]}, "
                    f"this run has {value}. Write to another --out."
                )


def _parts(images, size=500):
    return (images[start : start + size] for start in range(0, len(images), size))


def _stream(distances, batches, clean):
    """Feed batches of images to ``distances``, each with its rows of the full-precision images."""
    rows = 0
    for batch in batches:
        distances.update(batch, torch.from_numpy(clean[rows : rows + len(batch)].copy()))
        rows += len(batch)


class _Bench:
    """Measures one job after the other; keeps what several share."""

    def __init__(self, model, scheduler, images, batch_size, features, cache, engine, progress):
        self.model, self.scheduler, self.images, self.batch_size = model, scheduler, images, batch_size
        self.features, self.cache, self.engine, self.progress = features, cache, engine, progress
        self.calibrated_on, self.profiles, self.runners, self.compiled = None, {}, {}, None

    def measure(self, job):
        """The measured columns of a job's row."""
        distances, start, calibration, further = Distances(self.features), time.perf_counter(), 0.0, {}
        clean = None if job.method == "real images" else self._clean(job)
        if clean is None:
            self._real(job, distances)
        elif job.method == "full precision":
            _stream(distances, (torch.from_numpy(part.copy()) for part in _parts(clean)), clean)
        else:
            try:
                calibrated = partial(self._calibration, job)
                further = job.prepare(self.model, self.scheduler, calibrated, job.folder(self.cache, self.model), self.progress)
                calibration = time.perf_counter() - start
                freeze(self.model, self.scheduler, job.steps, nearest=job.transfers)
                _stream(distances, self._batches(job, self._runner(job)), clean)
            finally:
                if hasattr(self.model, "quantization"):
                    restore(self.model)
        found = distances.compute()
        return {
            **{name: found.get(name, np.nan) for name in (distances.frechet, "kid", "kid_se", "inception_score")},
            **{name: found.get(name, np.nan) for name in ("mse", "mse_se", "psnr")},
            **further,
            "calibration_seconds": round(calibration, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "engine": self._engine(job),
            "device": next(self.model.parameters()).device.type,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }

    def _calibration(self, job):
        """``(data, profile)``: all methods of a repeat see the same; a profile is that of quantized layers."""
        trajectories, steps = job.calibration
        source = job.repeat, trajectories, steps
        if self.calibrated_on != source:
            first = job.repeat * SEEDS + SEEDS // 2
            how = dict(batch_size=self.batch_size, progress=False)
            self.data = CalibrationSet.collect(self.model, self.scheduler, range(first, first + trajectories), steps, **how)
            self.calibrated_on, self.profiles = source, {}
        structure = tuple(job.quantization.items())
        if structure not in self.profiles and hasattr(self.model, "quantization"):
            self.profiles[structure] = profile_set(self.model, self.data, self.batch_size)
        return self.data, self.profiles.get(structure)

    def _engine(self, job):
        """What samples this job: as wished, but no kernel takes an input whose halves are quantized apart."""
        if not job.weights:
            return "eager"
        return "compiled" if self.engine == "integer" and job.quantization.get("split_skips") else self.engine

    def _runner(self, job):
        """What samples the calibrated model: itself, or a compiled graph that all models of its structure share."""
        if (engine := self._engine(job)) == "eager":
            return self.model
        kind = dict(compiled=Runner, integer=IntegerRunner)[engine]
        structure = kind, job.steps, DYNAMIC.get(job.method), *job.quantization.items()
        if structure not in self.runners:
            self.runners[structure] = kind(self.model, self.scheduler, job.steps)
        self.runners[structure].load(self.model)
        return self.runners[structure]

    def _plain(self):
        """What samples the full-precision model."""
        if self.engine == "eager":
            return self.model
        if self.compiled is None:
            self.compiled = Compiled(copy.deepcopy(self.model))
        return self.compiled

    def _batches(self, job, model):
        seeds = range(job.repeat * SEEDS, job.repeat * SEEDS + self.images)
        yield from sample_batches(model, self.scheduler, seeds, job.steps, self.batch_size, progress=False)

    def _clean(self, job):
        """The full-precision images of a repeat, from the cache or made now; memory-mapped."""
        self.cache.mkdir(parents=True, exist_ok=True)
        name = f"{fingerprint(self.model)}-{self.images}-{job.steps}-{self.batch_size}-{job.repeat}"
        path = self.cache / f"{name}.npy"
        if not path.exists():
            part, rows = self.cache / f"{name}.{os.getpid()}.part", 0
            for batch in self._batches(job, self._plain()):
                if not rows:
                    shape = (self.images, *batch.shape[1:])
                    images = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
                images[rows : rows + len(batch)] = batch.numpy()
                rows += len(batch)
            images.flush()
            part.replace(path)
        return np.load(path, mmap_mode="r")

    def _real(self, job, distances):
        """Training images, others in each repeat: what a perfect model of as many images would get."""
        images = load_images(split="train-10k")
        first = job.repeat * self.images % len(images)
        rows = [(first + i) % len(images) for i in range(min(self.images, len(images)))]
        for part in images[rows].split(500):
            distances.update(part)
