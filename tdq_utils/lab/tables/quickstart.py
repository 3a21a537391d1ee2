"""A grid of settings -> tidy rows of distances, each with its protocol."""

import time

import pandas as pd

from tdq_utils.denoiser.recording import profile_activations
from tdq_utils.denoiser.sampling import checked_seeds, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import freeze, quantize, restore
from tdq_utils.lab.datasets import load_images
from tdq_utils.lab.fid import Statistics, extract_features, fcd, frechet_distance, paired_mse, psnr
from tdq_utils.show.names import NAMES

CALIBRATION_SEEDS = range(10_000, 10_032)


def compare(model, scheduler, settings, seeds=range(256), steps=20, calibration_seeds=CALIBRATION_SEEDS, batch_size=16,
            profile=None, progress=True):  # fmt: skip
    """Sample the same seeds under each setting and measure how far the images move.

    Args:
        model: in full precision, and again so afterwards. scheduler, seeds, steps, batch_size: as for ``sample``.
        settings: list of ``(method, weights, activations)``, such as ``("tdq", 8, 5)``.
        calibration_seeds: of the trajectory that calibration sees; none of ``seeds`` may be among them.
        profile: of that trajectory, to use instead of sampling it. progress: show bars.

    Returns:
        ``(table, images)``. The table has a row for full precision, one for each setting, and one for real images
        (as many of the training set: the floor): columns ``method``, ``weights``, ``activations`` (bits), ``images``, ``steps``,
        ``mse`` and ``mse_se`` (mean and standard error over images of the squared pixel difference to full precision),
        ``psnr`` (dB), ``fcd`` (to the 10,000 test images), ``seconds`` (sampling). ``images`` maps
        ``(method, weights, activations)`` to tensors, full precision under ``("full precision", None, None)``.

    Raises:
        TDQError: a calibration seed that is also evaluated.
    """
    seeds, calibration_seeds = checked_seeds(seeds), checked_seeds(calibration_seeds)
    if both := set(seeds) & set(calibration_seeds):
        raise TDQError(f"Calibration and evaluation must use different seeds; both hold {min(both)}. Move calibration_seeds.")
    how = dict(steps=steps, batch_size=batch_size, progress=progress)
    if profile is None:
        profile = profile_activations(model, scheduler, calibration_seeds, **how)
    key = ("full precision", None, None)
    start = time.perf_counter()
    images = {key: sample(model, scheduler, seeds, **how)}
    rows = [_row(key, images[key], images[key], steps, time.perf_counter() - start)]
    for key in settings:
        method, weights, activations = key
        quantize(model, weights=weights, activations=activations, method=method)
        try:
            calibrate(model, scheduler, profile=profile, progress=progress)
            freeze(model, scheduler, steps=steps)
            start = time.perf_counter()
            images[key] = sample(model, scheduler, seeds, **how)
            rows.append(_row(key, images[key], images["full precision", None, None], steps, time.perf_counter() - start))
        finally:
            restore(model)
    rows.append(_floor(len(seeds)))
    return pd.DataFrame(rows), images


def _row(key, images, clean, steps, seconds):
    method, weights, activations = key
    error = paired_mse(images, clean)
    return dict(
        method=method,
        weights=weights,
        activations=activations,
        images=len(images),
        steps=steps,
        mse=error.mean().item(),
        mse_se=(error.std() / len(error) ** 0.5).item(),
        psnr=psnr(images, clean),
        fcd=fcd(images),
        seconds=seconds,
    )


def _floor(n):
    """Real against real: as many training images as a row has, against the reference."""
    real = extract_features(load_images(split="train-10k")[:n])
    return dict(method="real images", images=n, fcd=frechet_distance(Statistics.of(real), Statistics.load()))


def headline(table):
    """The table as a reader wants it: setting, bits, images, steps, distances to two significant digits."""
    bits = [
        f"W{w:.0f}A{a:.0f}" if w == w and w is not None else "-" for w, a in zip(table.weights, table.activations, strict=True)
    ]
    return pd.DataFrame(
        {
            "intervals": [NAMES.get(method, method) for method in table.method],
            "bits": bits,
            "images": table.images,
            "steps": [f"{s:.0f}" if s == s else "-" for s in table.steps],
            "distance to full precision": [f"{v:.2g}" if v == v else "-" for v in table.mse],
            "FCD": [f"{v:.2g}" for v in table.fcd],
        }
    )


STATIC = ("minmax", "momentum", "percentile", "mse", "ptq4dm", "learned")


def verdict(table, measure="fcd"):
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
