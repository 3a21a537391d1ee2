"""Will it help this model? All numbers of the report on a recorded model, measured once; the model comes back as it went in."""

import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import torchmetrics
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.record import Recorded
from tdq_utils.denoiser.sampling import Seeds, checked_seeds, sample, timesteps
from tdq_utils.errors import TDQError
from tdq_utils.fit.calibration_set import check_eval, check_made_by
from tdq_utils.fit.choice import chosen_layers
from tdq_utils.fit.decomposition import decompose
from tdq_utils.fit.quantize import activation_quantizers, check_plain, checked_grid, quantized_layers
from tdq_utils.lab.bench import machine
from tdq_utils.lab.sensitivity import MEASURED, by_layer, check_recorded, decibels, output_errors, outputs, quantized, removed
from tdq_utils.lab.verdict import verdict
from tdq_utils.method.generator import StepGenerator
from tdq_utils.method.grid import Grid

METHODS = ("mse", "tdq", "table", "dynamic")  # the first is the best constant
DRAWN = 64  # layers with histograms, those that could gain most: a page of 800 x 50 would be too large
WINDOW = 11  # pixels of SSIM's window (Wang et al. 2004)


class Clock:
    """The seconds of each part, by name, and a bar that moves with them."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.seconds = bar, {"all": 0.0}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """While open, time counts for the part of this name."""
        self.bar.set_description(f"report: {name}")
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.seconds["all"] += spent
        self.bar.update()


@dataclass
class Survey:
    """What the report says of a recorded model; see :func:`tdq_utils.show.report.report` for the arguments.

    Attributes:
        found: every number, by section; JSON-able after :meth:`run`. images: of the same seeds, by method, where there is a
            scheduler.
    """

    recorded: Recorded
    scheduler: Any = None
    weights: int = 8
    activations: int = 6
    bits: Sequence[int] = (4, 5, 6, 8)
    seeds: Seeds = range(8)
    steps: int | None = None
    progress: bool = True
    sampling: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict, init=False)
    images: dict[str, Tensor] = field(default_factory=dict, init=False)
    errors: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        check_recorded(self.recorded)
        self.model, self.profile, self.calls = self.recorded.model, self.recorded.profile, self.recorded.inputs
        check_plain(self.model, "A report")
        check_eval(self.model)
        check_made_by(self.model, self.profile.model, "recording")
        if isinstance(self.bits, str) or not isinstance(self.bits, Iterable):
            raise TDQError(f"bits must be a list of numbers of bits, such as (4, 5, 6, 8); got {self.bits!r}.")
        for bits in (asked := [*self.bits, self.activations]):
            Grid(bits)
        self.bits = sorted(set(asked))
        checked_grid(self.weights, self.activations, "tdq", "channel")
        chosen, kept = chosen_layers(self.model, None)
        self.kept = kept | {name: MEASURED for name in self.profile.carries_t if name in chosen}
        if missing := set(chosen) - set(self.profile.layers):
            raise TDQError(f"A report needs a recording of every layer that is quantized; {len(missing)} are missing, "
                           f"{min(missing)} among them. Record without layers=.")  # fmt: skip
        self.names = [name for name in chosen if name not in self.kept]
        if not self.names:
            raise TDQError(f"There must be a layer to quantize; all {len(self.kept)} are kept, as they carry t or are at an end.")
        self._check_scheduler()

    def _check_scheduler(self):
        """Before minutes of work: can the pictures be sampled by a table of the recorded t?"""
        if self.scheduler is None:
            if self.sampling:
                raise TDQError(f"{', '.join(self.sampling)} belongs to sampling; got no scheduler. Pass scheduler=, too.")
            return
        self.seeds, self.steps = checked_seeds(self.seeds), len(self.profile.t) if self.steps is None else self.steps
        visited = timesteps(self.scheduler, self.steps, self.model, **(self.sampling.get("scheduling") or {}))
        if unknown := [t for t in visited if np.abs(self.profile.t - t).min() > 2**-8 * abs(t)]:
            raise TDQError(f"The scheduler must visit the t that were recorded, {len(self.profile.t)} of them from "
                           f"{self.profile.t[0]:g} on; with {self.steps} steps it visits {unknown[0]:g}. Pass the scheduler and "
                           "steps= of the recording.")  # fmt: skip

    def run(self) -> "Survey":
        """Measure it all. TDQError: as sampling and calibration raise it; the model is in full precision then, too."""
        settings = [(method, bits) for bits in self.bits for method in METHODS if self._wanted(method, bits)]
        layers = 0 if self.calls is None else len(self.names)
        parts = len(self.bits) + 1 + len(settings) + layers + 3 * (layers > 0)
        with tqdm(total=parts, desc="report", disable=not self.progress) as bar:
            clock = Clock(bar)
            self._look_at_profile(clock)
            with clock.part("full precision"):
                self.clean = None if self.calls is None else outputs(self.model, self.calls)
                self._sample("full precision")
            for method, bits in settings:
                self._measure(method, bits, clock)
            if self.calls is not None:
                self._look_at_channels(clock)
        self._conclude(clock.seconds)
        return self

    def _wanted(self, method, bits):
        """The best constant and TDQ at all bits; the others, and pictures, at those of ``activations``."""
        if bits == self.activations:
            return method in METHODS[:2] or self.calls is not None or self.scheduler is not None
        return method in METHODS[:2] and self.calls is not None

    def _look_at_profile(self, clock):
        """Drift, ranges and histograms: needs no model."""
        table, profile = None, self.profile
        for bits in self.bits:
            with clock.part("drift"):
                found = profile.drift(bits)
                table = found.drop(columns="gain_db") if table is None else table
                table[f"gain_db_{bits}"] = found.gain_db
        table.insert(1, "kept", [name not in self.names for name in profile.layers])
        largest = set(table.sort_values(f"gain_db_{self.activations}", ascending=False).layer[:DRAWN])
        self.found |= dict(
            t=profile.t, layers=profile.layers, range=profile.percentile(99.9), drift=table.to_dict("records"),
            histograms={name: histogram(profile, name, self.activations) for name in profile.layers if name in largest},
        )  # fmt: skip

    def _measure(self, method, bits, clock):
        main = bits == self.activations
        alone = main and method == "mse" and self.calls is not None
        with (
            clock.part(f"A{bits}, {method}{', single layers' * alone}"),
            quantized(self.model, self.profile, self.weights, bits, method),
        ):
            if self.calls is not None:
                self.errors[method, bits] = output_errors(self.model, self.calls, self.clean)
            if main:
                self._sample(method)
            if main and method == "tdq":
                self.found["cost"] = cost(self.model, self.profile)
            if alone:
                table = by_layer(self.model, self.calls, self.clean, clock.bar.update)
                self.found["sensitivity"] = dict(
                    all_db=decibels(self.errors[method, bits].mean()), layers=table.to_dict("records")
                )

    def _look_at_channels(self, clock):
        """What an interval over t could give, and over channels; what a balance of channels does to the output."""
        bits, balanced = self.activations, {}
        with clock.part("channels"):
            self.found["channels"] = decompose(self.model, self.calls, bits, self.names).to_dict("records")
        for method in METHODS[:2]:
            with (
                clock.part(f"A{bits}, balanced, {method}"),
                quantized(self.model, self.profile, self.weights, bits, method, self.calls),
            ):
                balanced[method] = removed(self.errors["mse", bits], output_errors(self.model, self.calls, self.clean))
        self.found["balanced"] = [dict(method=method, removed=share, removed_se=se) for method, (share, se) in balanced.items()]

    def _sample(self, method):
        if self.scheduler is not None:
            self.images[method] = sample(self.model, self.scheduler, self.seeds, self.steps, progress=False, **self.sampling)

    def _conclude(self, seconds):
        found = self.found
        found |= dict(weights=self.weights, activations=self.activations, kept=self.kept, seconds=seconds)
        if self.calls is not None:
            found["outputs"] = [dict(method=method, bits=bits, error_db=decibels(errors.mean()))
                                for (method, bits), errors in self.errors.items()]  # fmt: skip
            found["over_t"] = self._over_t()
            gains = {bits: removed(self.errors["mse", bits], self.errors["tdq", bits]) for bits in self.bits}
        else:
            gains = {bits: (self._removable(bits), None) for bits in self.bits}
        found["measured"] = "inputs" if self.calls is None else "output"
        found["gains"] = [dict(bits=bits, removed=share, removed_se=error) for bits, (share, error) in gains.items()]
        if self.images:
            found["pictures"] = likeness(self.images)
        found["protocol"] = self._protocol()
        found["verdict"] = verdict(found)
        self.found = plain(found)

    def _removable(self, bits):
        """The share of the squared error at a layer's input that the best interval for each t removes: the mean over layers."""
        return float(np.mean([1 - 10 ** (-row[f"gain_db_{bits}"] / 10) for row in self.found["drift"] if not row["kept"]]))

    def _over_t(self):
        """The output's error at each t of the calls, by method."""
        told = [float(torch.as_tensor(t).double().max()) for _, t, _ in self.calls.batches()]
        near = np.array([np.abs(self.profile.t - t).argmin() for t in told])
        return {method: [dict(t=self.profile.t[i], error_db=decibels(self.errors[method, self.activations][near == i].mean()))
                         for i in sorted(set(near))] for method in METHODS}  # fmt: skip

    def _protocol(self):
        scheduler = None if self.scheduler is None else type(self.scheduler).__name__
        held = dict(
            torch=torch.__version__, diffusers=diffusers.__version__, numpy=np.__version__, torchmetrics=torchmetrics.__version__
        )
        return dict(
            model=type(self.model).__name__, fingerprint=self.profile.model, dtype=str(next(self.model.parameters()).dtype),
            weights=self.weights, activations=self.activations, bits=self.bits, methods=METHODS,
            recorded_calls=len(self.recorded.t), kept_calls=None if self.calls is None else len(self.calls),
            t=self.profile.t, scheduler=scheduler, steps=self.steps, seeds=None if scheduler is None else self.seeds,
            versions=held, python=platform.python_version(), machine=machine(),
        )  # fmt: skip


def histogram(profile: Profile, layer: str, bits: int, bins: int = 48) -> dict[str, Any]:
    """One layer for the eye.

    ``edges`` ``"bin + 1"`` over its range at all t; ``share`` of its values in each bin, ``"step bin"``; the ends of the best
    constant interval at ``bits`` bits, ``static`` ``"end"``, and of the best one for each step, ``over_t`` ``"step end"``."""
    row, grid = profile.row(layer), profile.grid(layer, bits)
    edges = np.linspace(profile.least[row].min(), profile.greatest[row].max() + 1e-12, bins + 1)
    values, counts = (part.numpy() for part in profile.values(layer))
    share = [
        np.histogram(np.clip(v, edges[0], edges[-1]), edges, weights=c)[0] / c.sum() for v, c in zip(values, counts, strict=True)
    ]
    ends = [
        torch.stack([(end - grid.zero(s)) * s for end in (grid.q_min, grid.q_max)], -1) for s in profile.best_steps(layer, bits)
    ]
    return dict(edges=edges, share=share, static=ends[0].numpy(), over_t=ends[1].numpy())


def cost(model: Any, profile: Profile) -> list[dict[str, Any]]:
    """Bytes of a model quantized with generators: weights before and after, the rest, and each kind of interval, four bytes a
    value. Rows of ``what`` and ``bytes``."""
    layers, quantizers = quantized_layers(model), activation_quantizers(model)
    floats = sum(layer.weight.nbytes for layer in layers.values())
    half = 2 if model.quantization.weights <= 4 else 1  # as storage.pack: two levels in a byte
    packed = sum(-(-layer.weight.numel() // half) + layer.weight_step.nbytes for layer in layers.values())
    inside = {id(layer.weight) for layer in layers.values()}
    rest = sum(p.nbytes for name, p in model.named_parameters() if id(p) not in inside and ".activation." not in name)
    steps = [q.step for q in quantizers.values() if isinstance(q.step, StepGenerator)]
    generators = sum(v.nbytes for step in steps for v in step.state_dict().values())
    rows = {"weights of quantized layers, as they came": floats,
            f"the same on {model.quantization.weights} bits, packed, with their step sizes": packed,
            "all other parameters, left as they are": rest, "intervals: one constant a layer": 4 * len(quantizers),
            f"intervals: a table of {len(profile.t)} t": 4 * len(quantizers) * len(profile.t),
            "intervals: generators (needed until they are frozen into a table)": generators}  # fmt: skip
    return [dict(what=what, bytes=number) for what, number in rows.items()]


def likeness(images: dict[str, Tensor]) -> list[dict[str, Any]]:
    """How like the pictures in full precision those of each method are, seed by seed: a row a method.

    ``psnr`` (dB) and ``ssim``, means over seeds (torchmetrics). The range of values is 2 where pictures have one or three
    channels, which are cut to [-1, 1]; else that of the pictures in full precision. NaN: equal, or smaller than SSIM's window."""
    clean, *_ = images.values()
    seen = clean.dim() == 4 and clean.shape[1] in (1, 3)
    cut = (lambda x: x.clamp(-1, 1)) if seen else (lambda x: x)
    span, rows, right = 2.0 if seen else float(clean.max() - clean.min()), [], cut(clean)
    for method, found in images.items():
        if method != "full precision":
            pair = cut(found), right
            one, other = (part.flatten(1) for part in pair)
            psnr = peak_signal_noise_ratio(one, other, data_range=span, dim=1, reduction="none")
            wide = clean.dim() == 4 and min(clean.shape[2:]) >= WINDOW
            ssim = float(structural_similarity_index_measure(*pair, data_range=span)) if wide else float("nan")
            rows.append(dict(method=method, psnr=float(psnr.mean()), ssim=ssim))
    return rows


def plain(value: Any) -> Any:
    """A tree as JSON takes it: numbers to 6 significant digits, what is not finite as ``None``."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, range, np.ndarray)):
        return [plain(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, (np.integer, np.bool_)) else value
