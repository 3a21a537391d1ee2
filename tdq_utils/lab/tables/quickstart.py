"""The quickstart's table: a few intervals on the same seeds, small enough for a notebook; and what a table says of TDQ."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import pandas as pd
from diffusers import SchedulerMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.recording import profile_activations
from tdq_utils.denoiser.sampling import checked_seeds
from tdq_utils.fit.quantize import checked_grid
from tdq_utils.lab.reproduce import Workbench
from tdq_utils.lab.tables.ptq import Job

METHODS = ("minmax", "mse", "learned", "table", "tdq")
STATIC = ("minmax", "momentum", "percentile", "mse", "ptq4dm", "learned")
CALIBRATION_SEEDS = range(10_000, 10_032)
COLUMNS = ("method", "weights", "activations", "images", "steps", "mse", "mse_se", "psnr", "fcd", "seconds")
Setting = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class QuickJob(Job):
    """A row of the quickstart's table: calibrated on ``CALIBRATION_SEEDS``."""

    first_calibrated: ClassVar[int] = CALIBRATION_SEEDS.start


def quickstart_jobs(methods: Sequence[str] | None = None, weights: int = 8, activations: Sequence[int] = (5, 6), steps: int = 20
                    ) -> list[QuickJob]:  # fmt: skip
    """Full precision; every method (default: ``METHODS``) at every number of bits of activations; real images."""
    methods = METHODS if methods is None else methods
    for method, bits in itertools.product(methods, activations):
        checked_grid(weights, bits, method, "channel")
    jobs = [QuickJob(method, weights, bits, steps=steps) for bits in activations for method in methods]
    return [QuickJob("full precision", steps=steps), *jobs, QuickJob("real images", steps=steps)]


def compare(model: nn.Module, scheduler: SchedulerMixin, settings: Sequence[Setting], seeds: int | Iterable[int] = range(256),
            steps: int = 20, profile: Profile | None = None, batch_size: int = 16, progress: bool = True
            ) -> tuple[pd.DataFrame, dict[Setting, Tensor]]:  # fmt: skip
    """Sample the same seeds under each setting and measure how far the images move.

    Args:
        model: in full precision, and again so afterwards. scheduler, seeds, steps, batch_size, progress: as for ``sample``.
        settings: list of ``(method, weights, activations)``, such as ``("tdq", 8, 5)``.
        profile: what calibration sees, to use instead of sampling the trajectories of ``CALIBRATION_SEEDS``.

    Returns ``(table, images)``: a row for ``("full precision", None, None)``, one for each setting, one for as many real images
    (the floor), with columns of :class:`tdq_utils.lab.fid.Distances` and ``seconds`` (without calibration); the images of all but
    the last. TDQError: no more images than features (64), a calibration seed that is also evaluated."""
    chosen = checked_seeds(seeds)
    for method, w, a in settings:
        checked_grid(w, a, method, "channel")
    jobs: dict[Setting, QuickJob] = {("full precision", None, None): QuickJob("full precision", steps=steps)}
    jobs |= {(method, w, a): QuickJob(method, w or 0, a or 0, steps=steps) for method, w, a in settings}
    jobs["real images", None, None] = QuickJob("real images", steps=steps)
    rows = []
    with TemporaryDirectory() as cache:
        bench = Workbench(model, scheduler, chosen, Path(cache), batch_size, progress=False, keep=True)
        bench.check(jobs.values())
        bench.profile = profile or profile_activations(model, scheduler, CALIBRATION_SEEDS, steps, batch_size=batch_size,
                                                       progress=progress)  # fmt: skip
        for (method, w, a), job in tqdm(jobs.items(), desc="compare", disable=not progress):
            found = bench.measure(job)
            found["seconds"] -= found["calibration_seconds"]
            found["steps"] = None if method == "real images" else steps
            rows.append(dict(method=method, weights=w, activations=a, images=len(chosen), **found))
    return pd.DataFrame(rows)[[*COLUMNS]], {key: bench.images[job] for key, job in jobs.items() if job in bench.images}


def verdict(table: pd.DataFrame, measure: str = "fcd") -> pd.DataFrame:
    """Does TDQ beat every static interval, and how near is it to a free value per step? Judged repeat by repeat.

    From rows of :func:`tdq_utils.lab.reproduce.reproduce` and ``"fcd"``, ``"kid"`` or ``"mse"``, lower is better, one row a pair
    of bits: ``repeats``; ``static``, the best static method by its mean; means ``static_mean``, ``tdq``, ``table``; ``margin``,
    the mean over repeats of static minus TDQ at the same seeds; ``margin_least``, the least of them; ``wins``, whether TDQ is
    better in every repeat; ``over_table``, TDQ over the per-step table, less 1."""
    rows = table[(table.weights > 0) & (table.weights_method == "nearest")]
    judged = []
    for (weights, activations), group in rows.groupby(["weights", "activations"], sort=False):
        by = group.pivot(index="repeat", columns="method", values=measure).dropna(axis="columns")
        static = by[[method for method in STATIC if method in by]]
        if "tdq" in by and not static.empty:
            best, margin = static.mean().idxmin(), static.min(axis="columns") - by.tdq  # against the best of that repeat
            row = dict(weights=weights, activations=activations, repeats=len(by), static=best, static_mean=static[best].mean(),
                       tdq=by.tdq.mean(), table=by.table.mean() if "table" in by else float("nan"),
                       margin=margin.mean(), margin_least=margin.min(), wins=bool(margin.min() > 0))  # fmt: skip
            judged.append(row)
    frame = pd.DataFrame(judged)
    return frame.assign(over_table=frame.tdq / frame.table - 1) if len(frame) else frame
