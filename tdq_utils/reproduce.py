"""The paper's tables, measured here: a grid of settings -> a CSV that grows by a row at a time and survives a kill."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from tdq_utils.calibration import calibrate, profile_set
from tdq_utils.calibration_set import CalibrationSet
from tdq_utils.datasets import load_images
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fid import Distances, feature_extractor
from tdq_utils.models import fingerprint
from tdq_utils.quantize import METHODS, freeze, quantize, restore
from tdq_utils.sampling import sample_batches

BITS = ((8, 8), (8, 6), (8, 5), (8, 4), (4, 8), (4, 5))
HEADLINE = ((8, 6), (8, 5), (4, 5))  # these get a third repeat
QUICK_BITS = ((8, 5), (4, 5))
CALIBRATION = 32  # trajectories
SEEDS = 1_000_000  # repeat r samples the seeds from r * SEEDS and calibrates on others of the same million
PROTOCOL = ("images", "steps", "sampler", "model", "features")  # must agree in all rows of one table
KEY = ("method", "weights_method", "weights", "activations", "repeat")


@dataclass(frozen=True)
class Job:
    """One row to measure: ``method`` is one of ``METHODS``, "full precision" or "real images"; bits 0: full precision."""

    method: str
    weights: int = 0
    activations: int = 0
    repeat: int = 0
    weights_method: str = "nearest"

    @property
    def key(self):
        """What tells rows of one table apart."""
        return tuple(getattr(self, name) for name in KEY)


def ptq_jobs(quick=False, repeats=2, methods=METHODS):
    """The jobs of the table of post-training quantization, most wanted first.

    Full precision and real images once a repeat; then every method at every pair of bits, ``repeats`` times and
    once more at the headline settings. ``quick``: one repeat of W8A5 and W4A5.
    """
    bits, repeats = (QUICK_BITS, 1) if quick else (BITS, repeats)
    jobs = []
    for repeat in range(repeats + (not quick)):
        wanted = bits if repeat < repeats else HEADLINE
        jobs += [Job("full precision", repeat=repeat), Job("real images", repeat=repeat)]
        jobs += [
            Job(method, w, a, repeat) for w, a in sorted(wanted, key=lambda pair: pair not in HEADLINE) for method in methods
        ]
        if not quick:  # learned rounding of weights matters where they have few bits
            jobs += [Job(method, w, a, repeat, "adaround") for w, a in wanted if w < 8 for method in ("mse", "tdq")]
    return jobs


class Table:
    """Rows on disk, one a job; written whole and renamed, so that a kill at any moment leaves a valid file.

    Several processes each write a file of their own, ``name.rank.csv``, and all read them all.

    Args:
        path: of the CSV. rank: of this process.
    """

    def __init__(self, path, rank=0, world=1):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.own = self.path if world == 1 else self.path.with_suffix(f".{rank}.csv")
        self.rows = read_rows(self.own) if self.own.exists() else []

    def everything(self):
        """The rows of all processes, earlier runs' too."""
        files = [self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.[0-9]*.csv"))]
        rows = [row for file in files if file.exists() for row in read_rows(file)]
        return list({_key(row): row for row in rows}.values())

    def add(self, row):
        """Write one row more."""
        self.rows.append(row)
        _write(self.own, self.rows)

    def merge(self, jobs):
        """Gather the rows of all processes in the one file, in the order of ``jobs``; remove the others."""
        rank = {job.key: i for i, job in enumerate(jobs)}
        rows = sorted(self.everything(), key=lambda row: rank.get(_key(row), len(rank)))
        _write(self.path, rows)
        for file in self.path.parent.glob(f"{self.path.stem}.[0-9]*.csv"):
            file.unlink()
        return pd.DataFrame(rows)


def _key(row):
    return tuple(row[name] for name in KEY)


def read_rows(path):
    """The rows of a results file as dicts. DataError: a line that was cut or does not fit the header."""
    try:
        text = Path(path).read_text()
        header, *lines = text.splitlines()
        for number, line in enumerate(lines, start=2):
            if line.count(",") != header.count(",") or (number == len(lines) + 1 and not text.endswith("\n")):
                raise ValueError(f"line {number} was cut: {line[:60]!r}; delete that line, and it is measured again")
        frame = pd.read_csv(path, dtype={"model": str})
        if missing := set(KEY + PROTOCOL) - set(frame):
            raise ValueError(f"columns {sorted(missing)} are missing")
        return frame.to_dict("records")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a results table as `reproduce` writes it: {error}") from error


def _write(path, rows):
    part = path.with_suffix(".part")
    pd.DataFrame(rows).to_csv(part, index=False, float_format="%.6g")
    with open(part) as file:
        os.fsync(file.fileno())
    part.replace(path)


def reproduce(jobs, model, scheduler, out, images=1000, steps=20, batch_size=16, features="classifier", cache=None,
              progress=True):  # fmt: skip
    """Measure the jobs that ``out`` does not hold yet.

    Under ``accelerate launch`` the jobs are dealt out to the processes; two give the rows of one.

    Args:
        jobs: list of :class:`Job`. model, scheduler: in full precision. out: CSV.
        images: a row; at equal seeds in all rows of a repeat. steps, batch_size: as for ``sample``.
        features: ``"classifier"`` (FCD) or ``"inception"`` (FID), as for :class:`tdq_utils.fid.Distances`.
        cache: folder for the full-precision images that rows are paired with; default: beside ``out``.
        progress: show bars.

    Returns:
        DataFrame of all rows of the table.

    Raises:
        TDQError: rows in ``out`` with another protocol, no more images than features. DataError: a damaged ``out``.
    """
    state = PartialState(timeout=timedelta(days=1))  # the first to finish waits for the last
    table = Table(out, state.process_index, state.num_processes)
    protocol = dict(images=images, steps=steps, sampler="DDIM", model=fingerprint(model), features=features)
    _check_images(images, features)
    _check_protocol(table.everything(), protocol, out)
    done = {_key(row) for row in table.everything()}
    # Dealt out before looking at what is done: processes that start seconds apart still agree.
    mine = [job for job in jobs[state.process_index :: state.num_processes] if job.key not in done]
    bench = _Bench(model, scheduler, images, steps, batch_size, features, Path(cache or Path(out).parent / "cache"))
    bar = tqdm(mine, desc=f"reproduce {Path(out).name}", disable=not progress)
    for job in bar:
        bar.set_postfix_str(f"{job.method} W{job.weights}A{job.activations} #{job.repeat}")
        table.add({**dict(zip(KEY, job.key, strict=True)), **protocol, **bench.measure(job)})
    state.wait_for_everyone()
    merged = table.merge(jobs) if state.is_main_process else pd.DataFrame(table.everything())
    state.wait_for_everyone()
    return merged


def _check_images(images, features):
    if images <= (width := feature_extractor(features).num_features):
        raise TDQError(f"images must exceed the {width} features of the {features}; got {images}.")


def _check_protocol(rows, protocol, out):
    for row in rows:
        if differing := [name for name in PROTOCOL if str(row[name]) != str(protocol[name])]:
            name = differing[0]
            raise TDQError(
                f"All rows of a table must share images, steps and model; {out} holds {name} = {row[name]}, this run has "
                f"{protocol[name]}. Write to another --out."
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
    """Measures one job after the other; keeps what jobs of one repeat share."""

    def __init__(self, model, scheduler, images, steps, batch_size, features, cache):
        self.model, self.scheduler, self.images, self.steps, self.batch_size = model, scheduler, images, steps, batch_size
        self.features, self.cache, self.repeat = features, cache, None

    def measure(self, job):
        """The measured columns of a job's row."""
        distances, start, calibration = Distances(self.features), time.perf_counter(), 0.0
        clean = None if job.method == "real images" else self._clean(job.repeat)
        if clean is None:
            self._real(job, distances)
        elif job.method == "full precision":
            _stream(distances, (torch.from_numpy(part.copy()) for part in _parts(clean)), clean)
        else:
            quantize(self.model, job.weights or None, job.activations or None, job.method)
            try:
                self._calibrate(job)
                calibration = time.perf_counter() - start
                freeze(self.model, self.scheduler, self.steps)
                _stream(distances, self._batches(job.repeat), clean)
            finally:
                restore(self.model)
        found = distances.compute()
        return {
            **{
                name: found.get(name, np.nan)
                for name in (distances.frechet, "kid", "kid_se", "inception_score", "mse", "mse_se", "psnr")
            },
            "calibration_seconds": round(calibration, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "threads": torch.get_num_threads(),
            "device": next(self.model.parameters()).device.type,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }

    def _calibrate(self, job):
        """With the data and the profile of the repeat: all methods see the same activations."""
        if self.repeat != job.repeat:
            first = job.repeat * SEEDS + SEEDS - CALIBRATION
            how = dict(batch_size=self.batch_size, progress=False)
            self.data = CalibrationSet.collect(self.model, self.scheduler, range(first, first + CALIBRATION), self.steps, **how)
            self.profile, self.repeat = profile_set(self.model, self.data, self.batch_size), job.repeat
        weights_method = "adaround" if job.weights_method == "adaround" else None
        options = dict(seed=job.repeat) if job.method in ("learned", "tdq") else {}
        calibrate(self.model, self.scheduler, data=self.data, profile=self.profile, weights_method=weights_method,
                  progress=False, **options)  # fmt: skip

    def _batches(self, repeat):
        seeds = range(repeat * SEEDS, repeat * SEEDS + self.images)
        yield from sample_batches(self.model, self.scheduler, seeds, self.steps, self.batch_size, progress=False)

    def _clean(self, repeat):
        """The full-precision images of a repeat, from the cache or made now; memory-mapped."""
        self.cache.mkdir(parents=True, exist_ok=True)
        name = f"{fingerprint(self.model)}-{self.images}-{self.steps}-{self.batch_size}-{repeat}"
        path = self.cache / f"{name}.npy"
        if not path.exists():
            part, rows = self.cache / f"{name}.{os.getpid()}.part", 0
            for batch in self._batches(repeat):
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
