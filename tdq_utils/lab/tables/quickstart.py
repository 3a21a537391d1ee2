"""The quickstart's table: a few intervals on the same seeds, small enough for a notebook; and what a table says of TDQ."""

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


def quickstart_jobs(methods: Iterable[str] = METHODS, weights: int = 8, activations: Iterable[int] = (5, 6), steps: int = 20
                    ) -> list[QuickJob]:  # fmt: skip
    """Full precision; every method at every number of bits of activations; real images."""
    jobs = [QuickJob(method, weights, bits, steps=steps) for bits in activations for method in methods]
    return [QuickJob("full precision", steps=steps), *jobs, QuickJob("real images", steps=steps)]


def compare(model: nn.Module, scheduler: SchedulerMixin, settings: Sequence[Setting], seeds: int | Iterable[int] = range(256),
            steps: int = 20, profile: Profile | None = None, batch_size: int = 16, progress: bool = True
            ) -> tuple[pd.DataFrame, dict[Setting, Tensor]]:  # fmt: skip
    """Sample the same seeds under each setting and measure how far the images move.

    Args:
        model: in full precision, and again so afterwards. scheduler, seeds, steps, batch_size: as for ``sample``.
        settings: list of ``(method, weights, activations)``, such as ``("tdq", 8, 5)``.
        profile: what calibration sees, to use instead of sampling the trajectories of ``CALIBRATION_SEEDS``.
        progress: show bars.

    Returns:
        ``(table, images)``. The table has a row for full precision, one for each setting, and one for real images
        (as many of the training set: the floor): columns ``method``, ``weights``, ``activations`` (bits), ``images``, ``steps``,
        ``mse`` and ``mse_se`` (mean and standard error over images of the squared pixel difference to full precision),
        ``psnr`` (dB), ``fcd`` (to the 10,000 test images), ``seconds`` (without calibration). ``images`` maps
        ``(method, weights, activations)`` to tensors, full precision under ``("full precision", None, None)``.

    Raises:
        TDQError: no more images than features (64), a calibration seed that is also evaluated.
    """
    seeds = checked_seeds(seeds)
    jobs: dict[Setting, QuickJob] = {("full precision", None, None): QuickJob("full precision", steps=steps)}
    jobs |= {(method, w, a): QuickJob(method, w or 0, a or 0, steps=steps) for method, w, a in settings}
    jobs["real images", None, None] = QuickJob("real images", steps=steps)
    rows = []
    with TemporaryDirectory() as cache:
        bench = Workbench(model, scheduler, seeds, Path(cache), batch_size, progress=False, keep=True)
        bench.check(jobs.values())
        how = dict(steps=steps, batch_size=batch_size, progress=progress)
        bench.profile = profile or profile_activations(model, scheduler, CALIBRATION_SEEDS, **how)
        for (method, w, a), job in tqdm(jobs.items(), desc="compare", disable=not progress):
            found = bench.measure(job)
            found["seconds"] -= found["calibration_seconds"]
            sampled = None if method == "real images" else steps
            rows.append(dict(method=method, weights=w, activations=a, images=len(seeds), steps=sampled, **found))
    return pd.DataFrame(rows)[[*COLUMNS]], {key: bench.images[job] for key, job in jobs.items() if job in bench.images}


def verdict(table: pd.DataFrame, measure: str = "fcd") -> pd.DataFrame:
    """Does TDQ beat every static interval, and how near is it to a free value per step? Judged repeat by repeat.

    Args:
        table: rows of :func:`tdq_utils.lab.reproduce.reproduce`. measure: ``"fcd"``, ``"kid"`` or ``"mse"``; lower is better.

    Returns:
        DataFrame, one row a pair of bits: ``repeats``; ``static``, the best static method by its mean; means ``static_mean``,
        ``tdq``, ``table``; ``margin``, the mean over repeats of static minus TDQ at the same seeds; ``margin_least``, the least
        of them; ``wins``, whether TDQ is better in every repeat; ``over_table``, TDQ over the per-step table, less 1.
    """
    rows = table[(table.weights > 0) & (table.weights_method == "nearest")]
    judged = []
    for (weights, activations), group in rows.groupby(["weights", "activations"], sort=False):
        by = group.pivot(index="repeat", columns="method", values=measure).dropna(axis="columns")
        static = by[[method for method in STATIC if method in by]]
        if "tdq" not in by or static.empty:
            continue
        best = static.mean().idxmin()
        margin = static.min(axis="columns") - by.tdq  # against whichever is best in that repeat
        judged.append(
            dict(weights=weights, activations=activations, repeats=len(by), static=best, static_mean=static[best].mean(),
                 tdq=by.tdq.mean(), table=by.table.mean() if "table" in by else float("nan"),
                 margin=margin.mean(), margin_least=margin.min(), wins=bool(margin.min() > 0))
        )  # fmt: skip
    frame = pd.DataFrame(judged)
    return frame.assign(over_table=frame.tdq / frame.table - 1) if len(frame) else frame
