"""The one engine of all tables: a grid of settings -> rows on disk, each measured once, by any number of processes."""

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from diffusers import SchedulerMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.call import device_of
from tdq_utils.denoiser.files import beside
from tdq_utils.denoiser.loading import fingerprint
from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.sampling import sample_batches, timesteps
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import profile_set
from tdq_utils.fit.calibration_set import CalibrationSet
from tdq_utils.fit.quantize import DYNAMIC, freeze, restore
from tdq_utils.lab.fid import Distances, feature_extractor
from tdq_utils.lab.protocol import Protocol, without_missing
from tdq_utils.lab.results import Row, Table, read_rows
from tdq_utils.lab.tables.ptq import SEEDS, Job
from tdq_utils.run.integer import IntegerRunner
from tdq_utils.run.runtime import Compiled, Runner

PROTOCOL = Protocol()  # of the shipped tables
ENGINES: dict[str, type[Runner] | None] = {"eager": None, "compiled": Runner, "integer": IntegerRunner}


def reproduce(jobs: Sequence[Job], model: nn.Module, scheduler: SchedulerMixin, out: str | Path, images: int = 1000,
              batch_size: int = 16, features: str = "classifier", cache: str | Path | None = None, engine: str = "eager",
              mix_threads: bool = False, progress: bool = True, protocol: Protocol = PROTOCOL) -> pd.DataFrame:  # fmt: skip
    """Measure the jobs that ``out`` does not hold yet; return all its rows.

    Any number of processes, on machines that share a folder, can work on one table: each takes the next job whose row is not
    there; under ``accelerate launch`` (GPUs) or ``torchrun`` (CPUs) jobs are dealt out. Rows are the same if threads are as many.

    Args:
        jobs: all of one class. model, scheduler: in full precision. out: CSV, kept as :class:`tdq_utils.lab.results.Table` does.
        images: a row; at equal seeds in all rows of a repeat. batch_size: as for ``sample``.
        features: ``"classifier"`` (FCD) or ``"inception"`` (FID), as for :class:`tdq_utils.lab.fid.Distances`.
        cache: folder for the full-precision images that rows are paired with, and for trainings; default: beside ``out``.
        engine: what samples the quantized models: ``"eager"``, the simulation; ``"compiled"``, the same; ``"integer"``, int8
            kernels (but simulated where halves of inputs are quantized apart). The last two compile once for all rows.
        mix_threads: add to rows that were measured with another number of threads. progress: show bars.
        protocol: reference set, classes and guidance; rows of real images are left out where the set has too few others.

    TDQError: as :meth:`Workbench.check`; rows in ``out`` of another protocol or other threads. DataError: damage to ``out``."""
    state, cache = processes(), Path(cache or Path(out).parent / "cache")
    bench = Workbench(model, scheduler, range(images), cache, batch_size, features, engine, progress, protocol=protocol)
    bench.check(jobs)
    jobs = without_missing(jobs, protocol.reference, images)
    table = Table(out, [asdict(job) for job in jobs])
    shared = dict(images=images, sampler="", model=fingerprint(model), features=features) | protocol.row(model, scheduler)
    mine = deal(jobs, state.process_index, state.num_processes)  # before looking at what is done: all agree, whoever starts late
    left = partial(_left, table, mine, shared, {job.steps for job in jobs}, mix_threads)
    with tqdm(total=len(left()), desc=f"reproduce {Path(out).name}", disable=not progress) as bar:
        while todo := left():
            begun = ((job, mark) for job in todo if (mark := table.begin(job.name)))
            job, mark = next(begun, (todo[0], None))  # all are begun elsewhere, maybe by a process that was killed
            bar.set_postfix_str(f"{job.method} W{job.weights}A{job.activations} #{job.repeat}")
            try:
                table.add({**asdict(job), **shared, **bench.measure(job)})
            finally:
                if mark:
                    mark.unlink(missing_ok=True)
            mine.remove(job)
            bar.update()
    state.wait_for_everyone()
    if state.is_main_process:
        table.gather()
    state.wait_for_everyone()
    return pd.DataFrame(read_rows(out))


def deal(jobs: Sequence[Job], rank: int, world: int) -> list[Job]:
    """The jobs of one process of ``world``, in turn; those that share a folder go to the same."""
    turn = {name: i for i, name in enumerate(dict.fromkeys(job.name for job in jobs))}
    return [job for job in jobs if turn[job.name] % world == rank]


def processes() -> PartialState:
    """How many processes share the work, and which is this one; the first to finish waits for the last, however long."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def _left(table: Table, mine: list[Job], protocol: Row, steps: set[int], mix_threads: bool) -> list[Job]:
    """What of ``mine`` is not measured yet. TDQError: it may not stand beside the rows that are there."""
    rows = table.rows()
    todo = [job for job in mine if tuple(asdict(job).values()) not in rows]
    threads = dict(threads=torch.get_num_threads()) if todo and not mix_threads else {}
    for row in rows.values():
        shared = protocol | threads | dict(steps=row["steps"] if row["steps"] in steps else min(steps))
        for name, value in shared.items():
            if str(row[name]) != str(value):
                way = f"Set OMP_NUM_THREADS={row[name]}, pass --mix-threads, or write" if name == "threads" else "Write"
                raise TDQError(f"All rows of a table must share images, steps, model, features, data, scheduler, guidance and "
                               f"threads; {table.path} holds {name} = {row[name]}, this run has {value}. {way} to another "
                               "--out.")  # fmt: skip
    return todo


class Workbench:
    """Measures one job after the other; keeps what several share. Arguments as for :func:`reproduce`, and:

    ``seeds``: of the noise of repeat 0; those of repeat r are ``SEEDS`` times r greater. ``profile``: what calibration sees,
    instead of sampling. ``keep``: the images of every job, in ``images``, but no kernel distance and no inception score.
    What is cached lies in a folder of the ``protocol``, unless that is the one of the shipped tables."""

    def __init__(self, model: nn.Module, scheduler: SchedulerMixin, seeds: Sequence[int], cache: Path, batch_size: int = 16,
                 features: str = "classifier", engine: str = "eager", progress: bool = True, profile: Profile | None = None,
                 keep: bool = False, protocol: Protocol = PROTOCOL) -> None:  # fmt: skip
        self.model, self.scheduler, self.seeds, self.batch_size, self.protocol = model, scheduler, seeds, batch_size, protocol
        self.cache, self.device = protocol.folder(cache, model, scheduler), device_of(model)
        self.features, self.engine, self.progress, self.profile, self.keep = features, engine, progress, profile, keep
        self.images: dict[Job, Tensor] = {}
        self.calibrated: tuple[tuple, CalibrationSet, dict[bool, Profile]] | None = None  # of the last repeat
        self.runners: dict[tuple, Runner] = {}

    def check(self, jobs: Iterable[Job]) -> None:
        """TDQError before any work: unknown engine, too few images, steps out of range, seeds that are calibrated on, too."""
        if self.engine not in ENGINES:
            raise TDQError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}.")
        if self.engine == "integer" and self.device.type != "cpu":
            raise TDQError(f"engine='integer' runs on the CPU; this model is on {self.device}. Pass --engine compiled, or "
                           "hide the GPU: CUDA_VISIBLE_DEVICES= .")  # fmt: skip
        for job in jobs:
            timesteps(self.scheduler, job.steps, self.model)
        if len(self.seeds) <= (width := feature_extractor(self.features, self.device).num_features):
            raise TDQError(f"images must exceed the {width} features of the {self.features}; got {len(self.seeds)}.")
        noise = {repeat * SEEDS + seed for repeat in {job.repeat for job in jobs} for seed in self.seeds}
        if both := noise & {seed for seeds, _ in {job.calibration for job in jobs} for seed in seeds}:
            raise TDQError(f"Calibration and evaluation must use different seeds; both hold {min(both)}. Take others, or fewer.")
        self.protocol.check(self.model, self.features)

    def measure(self, job: Job) -> Row:
        """The measured columns of a job's row."""
        start, calibration, further, real = time.perf_counter(), 0.0, {}, job.method == "real images"
        clean = None if real else self._clean(job)
        distances = Distances(self.features, clean, not self.keep, self.protocol.reference, self.device)
        try:
            if clean is None or job.method == "full precision":
                batches = self._real(job) if clean is None else clean.split(500)
            else:
                ready, folder = time.perf_counter(), job.folder(self.cache, self.model)
                training = partial(self.protocol.training, self.model)
                calibrated = partial(self._calibration, job)
                further = job.prepare(self.model, self.scheduler, calibrated, folder, training, self.progress)
                calibration = time.perf_counter() - ready
                freeze(self.model, self.scheduler, job.steps, nearest=job.calibration[1] != job.steps)
                batches = self._batches(job, self._runner(job))
            for batch in batches:
                distances.update(batch)
        finally:
            if hasattr(self.model, "quantization"):
                restore(self.model)
        columns = (distances.frechet, "kid", "kid_se", "inception_score", "mse", "mse_se", "psnr")
        found = dict.fromkeys(columns, np.nan) | distances.compute() | further
        seconds = dict(calibration_seconds=round(calibration, 1), seconds=round(time.perf_counter() - start, 1))
        how = dict(batch_size=self.batch_size, engine=self._engine(job), device=next(self.model.parameters()).device.type)
        versions = dict(torch=torch.__version__, diffusers=diffusers.__version__)
        return found | seconds | dict(threads=torch.get_num_threads()) | how | versions

    def _calibration(self, job: Job) -> tuple[CalibrationSet | None, Profile | None]:
        """``(data, profile)``: all methods of a repeat see the same; a profile is that of quantized layers."""
        if self.profile is not None:
            return None, self.profile
        if self.calibrated is None or self.calibrated[0] != job.calibration:
            how = dict(batch_size=self.batch_size, progress=False, **self.protocol.asking(self.model, job.calibration[0]))
            self.calibrated = job.calibration, CalibrationSet.collect(self.model, self.scheduler, *job.calibration, **how), {}
        _, data, profiles = self.calibrated
        if job.split_inputs not in profiles and hasattr(self.model, "quantization"):
            profiles[job.split_inputs] = profile_set(self.model, data, self.batch_size)
        return data, profiles.get(job.split_inputs)

    def _engine(self, job: Job) -> str:
        """What samples this job: as wished, but no kernel takes an input whose halves are quantized apart."""
        return "eager" if not job.weights else "compiled" if self.engine == "integer" and job.split_inputs else self.engine

    def _runner(self, job: Job) -> nn.Module:
        """What samples the calibrated model: itself, or a compiled graph that all models of its structure share."""
        if (kind := ENGINES[self._engine(job)]) is None:
            return self.model
        structure = kind, job.steps, DYNAMIC.get(job.method), job.split_inputs, job.balance is not None
        if structure not in self.runners:
            self.runners[structure] = kind(self.model, self.scheduler, job.steps)
        self.runners[structure].load(self.model)
        return self.runners[structure]

    @cached_property
    def _plain(self) -> nn.Module:
        """What samples the full-precision model."""
        return self.model if self.engine == "eager" else Compiled(copy.deepcopy(self.model))

    def _batches(self, job: Job, model: nn.Module) -> Iterable[Tensor]:
        noise = [job.repeat * SEEDS + seed for seed in self.seeds]
        asking = self.protocol.asking(self.model, noise)
        batches = sample_batches(model, self.scheduler, noise, job.steps, self.batch_size, False, **asking)
        if not self.keep:
            return batches
        self.images[job] = torch.cat(list(batches))
        return [self.images[job]]

    def _clean(self, job: Job) -> Tensor:
        """The full-precision images of a repeat, from the cache or made now; memory-mapped."""
        told_apart = (fingerprint(self.model), len(self.seeds), job.steps, self.batch_size, job.repeat, torch.get_num_threads(),
                      "eager" if self.engine == "eager" else "compiled")  # fmt: skip
        path, rows = self.cache / f"{'-'.join(map(str, told_apart))}.npy", 0
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with beside(path) as part:
                for batch in self._batches(job, self._plain):
                    if not rows:
                        images = np.lib.format.open_memmap(part, "w+", np.float32, (len(self.seeds), *batch.shape[1:]))
                    images[rows : rows + len(batch)] = batch
                    rows += len(batch)
                images.flush()
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    def _real(self, job: Job) -> Iterable[Tensor]:
        """Training images, others in each repeat: what a perfect model of as many images would get."""
        n = len(self.seeds)
        return self.protocol.reference.real(n, job.repeat * n).split(500)
