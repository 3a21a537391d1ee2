"""The explorer: one page on which a reader drags the interval of any layer at any t, without a kernel and without a network."""

import json
import lzma
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from tdq_utils.denoiser.loading import load_model
from tdq_utils.denoiser.profile import Profile
from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import activation_quantizers, quantize, restore
from tdq_utils.lab.sensitivity import class_labels, record_sampling
from tdq_utils.show.tables import NAMES

ASSETS = Path(__file__).parent / "assets"
BITS = range(3, 9)
BINS = 256  # of an exported histogram, at most; the density inside of a bin counts as even
OCTAVE = 11  # codes of a share: 255 - 11 log2(1 / share), so 6.5 % apart, down to 1e-7; 0: an empty bin


def encoded(counts: np.ndarray, limit: float, bins: int = BINS) -> tuple[float, float, str]:
    """A histogram ``"bin"`` over [-limit, limit] -> left edge, width of a bin, and the shares of at most ``bins`` joined ones.

    The shares are logarithms, a byte each, in base 64. Bins left and right of all values are dropped.
    """
    used = np.flatnonzero(counts)
    first, span = int(used[0]), int(used[-1] - used[0] + 1)
    merge = -(-span // bins)
    joined = np.add.reduceat(counts[first : first + span].astype(float), range(0, span, merge)) / counts.sum()
    with np.errstate(divide="ignore"):
        codes = np.where(joined > 0, (255 + OCTAVE * np.log2(joined)).round().clip(1), 0)
    width = 2 * limit / len(counts)
    return -limit + first * width, merge * width, b64encode(codes.astype(np.uint8).tobytes()).decode()


def decoded(start: float, width: float, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """What :func:`encoded` gave -> edges ``"bin + 1"`` and shares ``"bin"`` of the values; they add up to 1."""
    read = np.frombuffer(b64decode(codes), dtype=np.uint8).astype(float)
    share = np.where(read > 0, 2 ** ((read - 255) / OCTAVE), 0)
    return start + width * np.arange(len(read) + 1), share / share.sum()


def _digits(values: Any, digits: int = 5) -> Any:
    return [_digits(value, digits) for value in values] if np.ndim(values) else float(f"{float(values):.{digits}g}")


def statistics(
    profile: Profile, generated: Mapping[int, Mapping[str, torch.Tensor]], title: str, note: str = ""
) -> dict[str, Any]:
    """What the page needs of one model, JSON-able; about 350 kB for 50 layers and 20 time steps.

    Args:
        profile: of the model's layers. generated: ``{bits: {layer: s(t)}}``, each ``"step"`` in the order of ``profile.t``, as
            :func:`generated_steps` gives them: their layers and bits are shown. title: of the model. note: how it was recorded.

    TDQError: no bits, no layers, or layers that differ between bits.
    """
    layers = [name for name in profile.layers if any(name in steps for steps in generated.values())]
    if not layers or any(set(steps) != set(layers) for steps in generated.values()):
        raise TDQError("generated must hold s(t) of the same layers, at least one, for each of the bits; got "
                       f"{ {bits: len(steps) for bits, steps in generated.items()} } layers by bits.")  # fmt: skip
    shown = []
    for name in layers:
        row, best = profile.row(name), {bits: profile.best_steps(name, bits) for bits in generated}
        cells = [encoded(profile.counts[row, i], float(profile.limit[row, i])) for i in range(len(profile.t))]
        shown.append({
            "name": name, "low": profile.grid(name, 8).low, "least": _digits(profile.least[row].min()),
            "greatest": _digits(profile.greatest[row].max()), "cells": [[_digits(a, 7), _digits(b, 7), c] for a, b, c in cells],
            "mse": {bits: _digits(found[0]) for bits, found in best.items()},
            "table": {bits: _digits(found[1]) for bits, found in best.items()},
            "tdq": {bits: _digits(steps[name]) for bits, steps in generated.items()},
        })  # fmt: skip
    return {"title": title, "note": note, "t": _digits(profile.t), "bits": list(generated), "octave": OCTAVE, "layers": shown}


def generated_steps(model: Any, profile: Profile, bits: Iterable[int] = BITS) -> dict[int, dict[str, torch.Tensor]]:
    """``{bits: {layer: s(t)}}`` of TDQ, calibrated on a profile of ``model``, which comes back as it was."""
    found = {}
    for number in bits:
        quantize(model, 8, number, "tdq")
        try:
            calibrate(model, profile=profile, progress=False)
            found[number] = {name: q.step.on(profile.t.tolist()) for name, q in activation_quantizers(model).items()}
        finally:
            restore(model)
    return found


def measure(name: str = "fashion-mnist", images: int = 64, steps: int = 20, bits: Iterable[int] = BITS) -> dict[str, Any]:
    """Load a model, record it while it samples, calibrate TDQ at each of ``bits``: the :func:`statistics`. About a minute."""
    model, scheduler = load_model(name)
    profile = record_sampling(model, scheduler, steps, images, class_labels(model)).profile
    note = f"{images} images, {steps} steps of {type(scheduler).__name__.removesuffix('Scheduler')}"
    title = f"{name} ({type(model).__name__.removesuffix('Model').removesuffix('2D')})"
    return statistics(profile, generated_steps(model, profile, bits), title, note)


def shipped() -> list[dict[str, Any]]:
    """The statistics of every model that ships. DataError: there are none."""
    files = sorted(ASSETS.glob("explorer-*.json.xz"))
    if not files:
        raise DataError(f"{ASSETS} must hold the statistics of a model, as measure gives them; it holds none. Measure one: "
                        "python -m tdq_utils explorer --measure fashion-mnist")  # fmt: skip
    return [json.loads(lzma.decompress(file.read_bytes())) for file in files]


def page(models: Sequence[Mapping[str, Any]], home: str = "") -> str:
    """The page over the :func:`statistics` of one model or more: HTML that needs no other file; with a link to ``home``."""
    back = f'<a class="home" href="{home}">← All lessons</a>' if home else ""
    data = json.dumps(list(models), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    names = {name: NAMES[name] for name in ("minmax", "mse", "table", "tdq")}
    style, script = ((ASSETS / f"explorer.{kind}").read_text() for kind in ("css", "js"))
    return Template((ASSETS / "explorer.html").read_text()).substitute(
        style=style, script=script, data=data, names=json.dumps(names), back=back
    )


def write(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The page, or, of one model and where ``path`` ends in ``.xz``, its statistics. TDQError: several in one such file."""
    if path.suffix == ".xz" and len(models) != 1:
        raise TDQError(f"A .json.xz file holds the statistics of one model; got {len(models)}. Write one file a model.")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(models[0], separators=(",", ":"), allow_nan=False).encode()
    content = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if path.suffix == ".xz" else page(models).encode()
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
