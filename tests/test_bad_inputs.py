"""What is wrong going in ends in a message that states rule, value and fix, and leaves nothing behind.

One table, ``CASES``: bad values by kind, for every public name and command that takes such a kind.
"""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

import tdq_utils as tdq
from tdq_utils.__main__ import main
from tdq_utils.errors import TDQError

NAN = math.nan
# kind -> values that are wrong wherever that kind is asked for
BITS = (0, 1, 9, -4, 2.5, NAN, "8", [8], True)
COUNTS = (0, -1, 1.5, NAN, "4", None, [3], 10**30)
SEEDS = (-1, 1.5, NAN, "seven", [], [1, -2], [0, None], {"seed": 1}, 2**63)
STEPS = (0, -3, 1001, 2.5, NAN, "ten", [5])
NAMES = ("", "nothing", 3, None, ["mse"])
DEVICES = ("gpu", "cuda:99", "meta?", 3.5)
PLACES = ("", "no/such/place", "/dev/null", 3, None)
SHAPES = ((), (0, 8, 8), (1, -8, 8), "8", 8, (1, 2.5, 8))
FACTORS = (-1, NAN, "half", None, math.inf)


@dataclass(frozen=True)
class Case:
    """``act(world, bad)`` must be refused, and the message must hold ``shown``: the value, or its kind."""

    name: str
    kind: str
    bad: Any
    act: Any
    shown: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}-{str(self.bad)[:30]}"


CASES: list[Case] = []


def refused(name, kind, values, act, shown=None):
    """Add a case for each value. ``shown``: what the message must hold, if it is neither the value nor the name of its type."""
    for bad in values:
        said = (repr(bad), str(bad) or "''", type(bad).__name__) if shown is None else (shown,)
        said += tuple(map(str, bad)) if isinstance(bad, list) else ()
        said += ("seed",) if kind == "seeds" and not isinstance(bad, (int, float)) else ()  # one of them, not all
        CASES.append(Case(name, kind, bad, act, said))


def command(kind, line, values=("",), shown=None):
    """Add cases for a command line; ``{}`` in it is the value. They end with ``error: ...`` and status 2."""
    for bad in values:
        CASES.append(Case("command " + line.split()[0], kind, bad, line, (str(bad) if shown is None else shown,)))


# -- tensors and grids
X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
refused("Grid", "bits", BITS, lambda w, bad: tdq.Grid(bad))
refused("Grid", "number", (1.0, NAN, "0", -math.inf), lambda w, bad: tdq.Grid(8, bad))
refused("fake_quantize", "shape", (torch.ones(5),), lambda w, bad: tdq.fake_quantize(X, bad, tdq.Grid(8)), "5")
refused("fake_quantize", "dtype", (X.int(),), lambda w, bad: tdq.fake_quantize(bad, torch.tensor(1.0), tdq.Grid(8)), "int32")
refused("mse_step", "shape", (torch.zeros(0), torch.zeros(3, 0)), lambda w, bad: tdq.mse_step(bad, tdq.Grid(8)), "0")
refused("mse_step", "NaN", (torch.tensor([1.0, NAN]),), lambda w, bad: tdq.mse_step(bad, tdq.Grid(8)), "NaN")
refused("mse_step", "shape", (torch.ones(7),), lambda w, bad: tdq.mse_step(X, tdq.Grid(8), bad), "7")
refused("squared_error", "shape", (torch.ones(7),), lambda w, bad: tdq.squared_error(X, bad, torch.ones(2, 3), tdq.Grid(8)), "7")
refused("squared_error", "shape", (torch.ones(5),), lambda w, bad: tdq.squared_error(X, None, bad, tdq.Grid(8)), "5")
refused("balance", "bits", BITS, lambda w, bad: tdq.balance(X, torch.ones(5, 4), bad, 8))
refused("balance", "name", NAMES, lambda w, bad: tdq.balance(X, torch.ones(5, 4), 8, 8, bad))
refused("balance", "shape", (torch.ones(5, 3),), lambda w, bad: tdq.balance(X, bad, 8, 8), "3")
refused("balance", "shape", (torch.ones(4),), lambda w, bad: tdq.balance(bad, torch.ones(5, 4), 8, 8), "4")
refused("balance", "NaN", (X * NAN,), lambda w, bad: tdq.balance(bad, torch.ones(5, 4), 8, 8), "NaN")
refused("StaticStep", "number", (0.0, -1.0, NAN, math.inf, "one"), lambda w, bad: tdq.StaticStep(bad))
refused("StepGenerator", "number", (0.0, -1.0, NAN, math.inf, "one"), lambda w, bad: tdq.StepGenerator(bad))
refused("StepGenerator", "count", COUNTS, lambda w, bad: tdq.StepGenerator(depth=bad))
refused("StepGenerator", "count", COUNTS, lambda w, bad: tdq.StepGenerator(hidden=bad))
refused("StepGenerator", "share", (-0.1, 1.1, NAN, "half"), lambda w, bad: tdq.StepGenerator(dropout=bad))
refused("FourierFeatures", "count", (*COUNTS[:7], 3), lambda w, bad: tdq.FourierFeatures(bad))

# -- the layers that carry t, and bits over t
temporal = lambda w, **how: tdq.quantize_temporal(w.tdq, w.scheduler, 2, progress=False, **how)  # noqa: E731
refused("quantize_temporal", "bits", BITS[:7], lambda w, bad: temporal(w, weights=bad))
refused("quantize_temporal", "name", NAMES[:3], lambda w, bad: temporal(w, how=bad))
refused("quantize_temporal", "count", COUNTS[:4], lambda w, bad: temporal(w, iterations=bad))
refused("quantize_temporal", "other model", ("unet",), lambda w, bad: tdq.quantize_temporal(w.unet, w.scheduler, 2), "quantized")
refused("cache_temporal", "bits", BITS[:6], lambda w, bad: tdq.cache_temporal(w.tdq, w.scheduler, 2, bad))
refused("cache_temporal", "name", NAMES[:3], lambda w, bad: tdq.cache_temporal(w.tdq, w.scheduler, 2, choose=bad))
refused("cache_temporal", "steps", STEPS[:4], lambda w, bad: tdq.cache_temporal(w.tdq, w.scheduler, bad))
refused("temporal_errors", "other model", ("unet",), lambda w, bad: tdq.temporal_errors(w.unet, w.scheduler, 2), "quantized")
refused("Precisions", "bits", (0, 9, 2.5, "8"), lambda w, bad: tdq.Precisions(w.table, [bad], profile=w.profile))
refused("Precisions", "bits", ([],), lambda w, bad: tdq.Precisions(w.table, bad, profile=w.profile), "none")

# -- models and files by name
refused(
    "load_model", "name", ("nothing", "/no/such/folder", "a/b/c", "no/such\0name", 3, None), lambda w, bad: tdq.load_model(bad)
)
refused("load_model", "device", DEVICES, lambda w, bad: tdq.load_model(w.folder, bad))
refused("load_model", "name", ("nothing", 3, "UNet2DModel"), lambda w, bad: tdq.load_model(w.folder, "cpu", bad))
refused("load_model", "dtype", ("float32", torch.int8, 16), lambda w, bad: tdq.load_model(w.folder, "cpu", None, bad))
refused("load_model", "other kind", ("file", "empty", "quantized"), lambda w, bad: tdq.load_model(w.others[bad]))
refused("load_quantized", "path", ("", "no/such/place", "/dev/null"), lambda w, bad: tdq.load_quantized(bad), "")
refused("load_quantized", "path", (3, None), lambda w, bad: tdq.load_quantized(bad))
refused("load_quantized", "other kind", ("file", "empty", "float"), lambda w, bad: tdq.load_quantized(w.others[bad]), "must hold")
refused("load_images", "name", ("nothing", "no/such/place", 3), lambda w, bad: tdq.load_images(bad))
refused("load_images", "name", NAMES[1:], lambda w, bad: tdq.load_images(split=bad))
refused("load_images", "path", PLACES[1:4], lambda w, bad: tdq.load_images(root=bad))
refused("load_images", "other kind", ("empty",), lambda w, bad: tdq.load_images(w.others[bad]), "empty")
refused("Profile", "path", ("", "no/such/place", "/dev/null", 3, None), lambda w, bad: tdq.Profile.load(bad), "profile")
refused("Profile", "other kind", ("file", "set", "empty"), lambda w, bad: tdq.Profile.load(w.others[bad]), "profile")
refused("Profile", "name", ("nothing", None, 99, -1), lambda w, bad: w.profile.row(bad))
refused("Profile", "t", (998, NAN, "999", None), lambda w, bad: w.profile.step(bad))
refused("Profile", "percent", (-1, 101, NAN, "half"), lambda w, bad: w.profile.percentile(bad))
refused("Profile", "bits", BITS, lambda w, bad: w.profile.drift(bad))
refused("CalibrationSet", "path", ("", "no/such/place", "/dev/null", 3, None), lambda w, bad: tdq.CalibrationSet.load(bad), "set")
refused(
    "CalibrationSet", "other kind", ("file", "profile", "empty"), lambda w, bad: tdq.CalibrationSet.load(w.others[bad]), "set"
)
refused("CalibrationSet", "seeds", SEEDS, lambda w, bad: tdq.CalibrationSet.collect(w.unet, w.scheduler, bad, 2))
refused("CalibrationSet", "steps", STEPS, lambda w, bad: tdq.CalibrationSet.collect(w.unet, w.scheduler, 1, bad))
collected = lambda w, *asked, **how: tdq.CalibrationSet.collect(w.unet, w.scheduler, *asked, **how)  # noqa: E731
refused("CalibrationSet", "t", ([998], [], [NAN], "nothing", 3), lambda w, bad: collected(w, 1, 2, bad),
        "at must")  # fmt: skip
refused(
    "CalibrationSet",
    "count",
    (0, 3, 1.5, "1"),
    lambda w, bad: tdq.CalibrationSet.collect(w.unet, w.scheduler, 1, 2, per_seed=bad),
)

# -- sampling and recording
refused("noise", "seeds", SEEDS, lambda w, bad: tdq.noise(bad, (1, 8, 8)))
refused("noise", "shape", SHAPES[1:], lambda w, bad: tdq.noise([1], bad))
refused("timesteps", "steps", STEPS, lambda w, bad: tdq.timesteps(w.scheduler, bad))
refused("timesteps", "other thing", ("ddim", None, 3), lambda w, bad: tdq.timesteps(bad, 5))
refused("sample", "seeds", SEEDS, lambda w, bad: tdq.sample(w.unet, w.scheduler, bad, 2, progress=False))
refused("sample", "steps", STEPS, lambda w, bad: tdq.sample(w.unet, w.scheduler, 1, bad, progress=False))
refused("sample", "count", COUNTS[:7], lambda w, bad: tdq.sample(w.unet, w.scheduler, 1, 2, bad, progress=False))
refused("sample", "shape", SHAPES[1:], lambda w, bad: tdq.sample(w.unet, w.scheduler, 1, 2, progress=False, shape=bad))
refused(
    "sample",
    "other thing",
    ("unet", None, nn.Linear(2, 2).eval()),
    lambda w, bad: tdq.sample(bad, w.scheduler, 1, 2, progress=False),
)
refused("sample", "other thing", ("ddim", None), lambda w, bad: tdq.sample(w.unet, bad, 1, 2, progress=False))
refused(
    "sample", "number", ("two", NAN, math.inf), lambda w, bad: tdq.sample(w.unet, w.scheduler, 1, 2, guidance=bad, progress=False)
)
refused("sample", "other thing", ("print", 3), lambda w, bad: tdq.sample(w.unet, w.scheduler, 1, 2, callback=bad, progress=False))
refused("sample", "shape", (torch.zeros(2, 5, 12),), lambda w, bad: tdq.sample(
    w.text_unet, w.scheduler, range(3), 2, condition={"encoder_hidden_states": bad}, progress=False), "(2, 5, 12)")  # fmt: skip
refused(
    "sample",
    "state",
    ("uncalibrated",),
    lambda w, bad: tdq.sample(w.uncalibrated, w.scheduler, 1, 2, progress=False),
    "calibrate",
)
refused(
    "profile_activations", "seeds", SEEDS, lambda w, bad: tdq.profile_activations(w.unet, w.scheduler, bad, 2, progress=False)
)
refused(
    "profile_activations", "steps", STEPS, lambda w, bad: tdq.profile_activations(w.unet, w.scheduler, 1, bad, progress=False)
)
refused("profile_activations", "name", (["nothing"], [], 3), lambda w, bad: tdq.profile_activations(
    w.unet, w.scheduler, 1, 2, bad, progress=False))  # fmt: skip
refused("profile_activations", "NaN", ("NaN in the weights",), lambda w, bad: tdq.profile_activations(
    w.broken, w.scheduler, 1, 2, progress=False), "finite")  # fmt: skip
refused("record", "other thing", ("unet", None, nn.Linear(2, 2).eval()), lambda w, bad: tdq.record(bad).__enter__())
refused("record", "count", (-1, 1.5, NAN, "4", [3]), lambda w, bad: tdq.record(w.unet, bad).__enter__())


# -- quantizing
refused("quantize", "bits", BITS, lambda w, bad: tdq.quantize(w.unet, bad))
refused("quantize", "bits", BITS, lambda w, bad: tdq.quantize(w.unet, 8, bad))
refused("quantize", "name", NAMES, lambda w, bad: tdq.quantize(w.unet, method=bad))
refused(
    "quantize", "name", ("nothing.*", ["conv_in", "nothing"], [3], 3), lambda w, bad: tdq.quantize(w.unet, keep=bad), "keep must"
)
refused("quantize", "name", ("*",), lambda w, bad: tdq.quantize(w.unet, keep=bad), "all are kept")
refused("quantize", "name", NAMES, lambda w, bad: tdq.quantize(w.unet, weights_per=bad))
refused("quantize", "name", ("nothing", 3, ["mse"]), lambda w, bad: tdq.quantize(w.unet, balance=bad))
refused("quantize", "other thing", ("unet", None, nn.Linear(2, 2).eval()), lambda w, bad: tdq.quantize(bad))
refused("quantize", "state", ("quantized already",), lambda w, bad: tdq.quantize(w.tdq), "quantized already")
refused("quantize", "NaN", ("NaN in the weights",), lambda w, bad: tdq.quantize(w.broken), "NaN")
for name in ("restore", "activation_quantizers", "quantized_layers", "freeze", "calibrate", "to_integer"):
    refused(name, "state", ("full precision",), lambda w, bad, name=name: getattr(tdq, name)(w.unet), "full-precision")
    refused(name, "other thing", ("unet", None, 3), lambda w, bad, name=name: getattr(tdq, name)(bad), "quantized")
refused("kept_layers", "other thing", ("unet", None, 3), lambda w, bad: tdq.kept_layers(bad))
refused("freeze", "state", ("uncalibrated",), lambda w, bad: tdq.freeze(w.uncalibrated), "calibrate")
refused("freeze", "steps", STEPS, lambda w, bad: tdq.freeze(w.tdq, w.scheduler, bad))
refused("freeze", "other thing", ("ddim", 3), lambda w, bad: tdq.freeze(w.tdq, bad, 4))
refused("freeze", "steps", (5,), lambda w, bad: tdq.freeze(w.table, w.scheduler, bad), "of 5 time steps")
refused("to_integer", "steps", STEPS, lambda w, bad: tdq.to_integer(w.tdq, w.scheduler, bad, compiled=False))
refused("to_integer", "state", ("uncalibrated",), lambda w, bad: tdq.to_integer(w.uncalibrated, w.scheduler, 4, compiled=False),
        "calibrate")  # fmt: skip
refused("save_quantized", "state", ("full precision",), lambda w, bad: tdq.save_quantized(w.unet, "out"), "full-precision")
refused("save_quantized", "path", ("/dev/null", "/dev/null/below", 3, None), lambda w, bad: tdq.save_quantized(w.tdq, bad))

calibrated = lambda w, **how: tdq.calibrate(w.tdq, progress=False, **how)  # noqa: E731
refused("calibrate", "name", ("", "nothing", 3, ["mse"], "dynamic"), lambda w, bad: calibrated(w, method=bad, profile=w.profile))
refused("calibrate", "name", NAMES, lambda w, bad: calibrated(w, reconstruct=bad, data=w.set))
refused("calibrate", "name", ("nothing", 3, ["adaround"]), lambda w, bad: calibrated(w, weights_method=bad, data=w.set))
refused("calibrate", "count", COUNTS[:7], lambda w, bad: calibrated(w, iterations=bad, profile=w.profile))
refused("calibrate", "number", (0, *FACTORS), lambda w, bad: calibrated(w, rate=bad, profile=w.profile))
refused(
    "calibrate", "share", (-1, 1.5, NAN, "half"), lambda w, bad: calibrated(w, method="momentum", momentum=bad, profile=w.profile)
)
refused(
    "calibrate",
    "percent",
    (0, 101, NAN, "all"),
    lambda w, bad: calibrated(w, method="percentile", percentile=bad, profile=w.profile),
)
refused("calibrate", "name", ("start", "mse "), lambda w, bad: calibrated(w, start=bad, profile=w.profile))
refused("calibrate", "option", ("momentum", "nothing"), lambda w, bad: calibrated(w, profile=w.profile, **{bad: 1}))
refused("calibrate", "count", COUNTS[:7], lambda w, bad: calibrated(w, depth=bad, profile=w.profile))
refused("calibrate", "count", COUNTS[:7], lambda w, bad: calibrated(w, hidden=bad, profile=w.profile))
refused("calibrate", "seeds", (1.5, NAN, "seven", None), lambda w, bad: calibrated(w, seed=bad, profile=w.profile))
refused("calibrate", "seeds", SEEDS, lambda w, bad: calibrated(w, scheduler=w.scheduler, seeds=bad, steps=2))
refused("calibrate", "steps", STEPS, lambda w, bad: calibrated(w, scheduler=w.scheduler, seeds=1, steps=bad))
refused("calibrate", "other model's", ("profile",), lambda w, bad: calibrated(w, profile=w.foreign_profile), "this model is")
refused("calibrate", "other model's", ("set",), lambda w, bad: calibrated(w, data=w.foreign_set), "this model is")
refused("calibrate", "other thing", ("profile.npz", 3), lambda w, bad: calibrated(w, profile=bad))
refused("calibrate", "other thing", ("set.npz", 3, [1]), lambda w, bad: calibrated(w, data=bad))
refused("calibrate", "other thing", ("both",), lambda w, bad: calibrated(w, data=w.set, profile=w.profile), "data")

refused("decompose", "bits", BITS, lambda w, bad: tdq.decompose(w.unet, w.set, bad))
refused("decompose", "state", ("quantized",), lambda w, bad: tdq.decompose(w.tdq, w.set), "quantized")
refused("decompose", "name", (["nothing"], "conv_in", 3), lambda w, bad: tdq.decompose(w.unet, w.set, layers=bad))
refused("decompose", "count", COUNTS[:7], lambda w, bad: tdq.decompose(w.unet, w.set, batch_size=bad))
refused("decompose", "count", COUNTS[:7], lambda w, bad: tdq.decompose(w.unet, w.set, vectors=bad))
refused("decompose", "other thing", ("set.npz", None, 3), lambda w, bad: tdq.decompose(w.unet, bad))
refused("decompose", "other model's", ("set",), lambda w, bad: tdq.decompose(w.unet, w.foreign_set), "this model is")
refused("sampled_inputs", "name", (["nothing"], "conv_in", 3), lambda w, bad: tdq.sampled_inputs(w.unet, w.set, bad))
refused("sampled_inputs", "count", COUNTS[:7], lambda w, bad: tdq.sampled_inputs(w.unet, w.set, ["conv_in"], bad))
refused("sampled_inputs", "count", COUNTS[:7], lambda w, bad: tdq.sampled_inputs(w.unet, w.set, ["conv_in"], vectors=bad))
refused("sampled_inputs", "other thing", ("set.npz", None, 3), lambda w, bad: tdq.sampled_inputs(w.unet, bad, ["conv_in"]))
refused(
    "sampled_inputs",
    "other model's",
    ("set",),
    lambda w, bad: tdq.sampled_inputs(w.unet, w.foreign_set, ["conv_in"]),
    "this model is",
)

BLACK = torch.zeros(4, 1, 8, 8)
tuned = lambda w, images=BLACK, **how: tdq.finetune(  # noqa: E731
    w.unet, w.scheduler, images, seeds=1, steps=2, **{"out": "run", "progress": False, **how}
)
refused("finetune", "name", NAMES, lambda w, bad: tuned(w, method=bad))
refused("finetune", "bits", BITS, lambda w, bad: tuned(w, weights=bad))
refused("finetune", "bits", BITS, lambda w, bad: tuned(w, activations=bad))
for option in ("iterations", "batch", "warmup"):
    refused("finetune", "count", COUNTS[:7], lambda w, bad, option=option: tuned(w, **{option: bad}))
for option in ("rate", "step_rate", "clip", "distill", "ema_decay"):
    refused("finetune", "number", FACTORS, lambda w, bad, option=option: tuned(w, **{option: bad}))
refused("finetune", "seeds", (-1, 1.5, NAN, "seven", None), lambda w, bad: tuned(w, seed=bad))
refused(
    "finetune", "shape", (torch.zeros(4, 3, 8, 8), torch.zeros(4, 8), torch.zeros(0, 1, 8, 8)), lambda w, bad: tuned(w, bad), ""
)
refused("finetune", "NaN", (torch.full((4, 1, 8, 8), NAN),), lambda w, bad: tuned(w, bad), "finite")
refused("finetune", "other thing", ("images", 3, np.zeros((4, 1, 8, 8))), lambda w, bad: tuned(w, bad))
refused(
    "finetune",
    "state",
    ("quantized",),
    lambda w, bad: tdq.finetune(w.tdq, w.scheduler, torch.zeros(4, 1, 8, 8), out="run"),
    "quantized",
)
refused("finetune", "name", ("nothing", 3), lambda w, bad: tuned(w, balance=bad))
refused("finetune", "path", ("/dev/null", 3), lambda w, bad: tuned(w, out=bad))

# -- diffusers, results, pages
refused("TDQConfig", "bits", BITS, lambda w, bad: tdq.TDQConfig(weights=bad))
refused("TDQConfig", "bits", BITS, lambda w, bad: tdq.TDQConfig(activations=bad))
refused("TDQConfig", "name", NAMES, lambda w, bad: tdq.TDQConfig(method=bad))
refused("TDQConfig", "name", NAMES, lambda w, bad: tdq.TDQConfig(weights_per=bad))
compared = lambda w, setting: tdq.compare(w.larger, w.scheduler, [setting], range(65), 2, progress=False)  # noqa: E731
refused("compare", "bits", BITS, lambda w, bad: compared(w, ("mse", 8, bad)))
refused("compare", "name", NAMES[:4], lambda w, bad: compared(w, (bad, 8, 8)))
refused("compare", "seeds", SEEDS, lambda w, bad: tdq.compare(w.larger, w.scheduler, [("mse", 8, 8)], bad, 2, progress=False))
refused(
    "compare", "steps", STEPS, lambda w, bad: tdq.compare(w.larger, w.scheduler, [("mse", 8, 8)], range(65), bad, progress=False)
)
refused("layer_sensitivity", "bits", BITS, lambda w, bad: tdq.layer_sensitivity(w.recorded, activations=bad, progress=False))
refused("layer_sensitivity", "name", NAMES, lambda w, bad: tdq.layer_sensitivity(w.recorded, method=bad, progress=False))
refused("layer_sensitivity", "other thing", ("recorded", None, 3), lambda w, bad: tdq.layer_sensitivity(bad, progress=False))
refused(
    "layer_sensitivity", "state", ("no inputs",), lambda w, bad: tdq.layer_sensitivity(replace(w.recorded, inputs=None)), "none"
)
refused("report", "bits", BITS, lambda w, bad: tdq.report(w.recorded, "out", activations=bad, progress=False))
refused("report", "bits", ([9], ["8"], 8), lambda w, bad: tdq.report(w.recorded, "out", bits=bad, progress=False), "bits")
refused("report", "other thing", ("recorded", None, 3), lambda w, bad: tdq.report(bad, "out"))
refused("report", "path", ("/dev/null", "/dev/null/below", 3), lambda w, bad: tdq.report(w.recorded, bad, progress=False))
refused(
    "report", "seeds", SEEDS[:6], lambda w, bad: tdq.report(w.recorded, "out", w.scheduler, seeds=bad, steps=2, progress=False)
)
refused("report", "steps", STEPS, lambda w, bad: tdq.report(w.recorded, "out", w.scheduler, seeds=1, steps=bad, progress=False))
refused("fid", "name", NAMES[:4], lambda w, bad: tdq.fid.Distances(bad))
refused("fid", "path", ("no/such/place", "/dev/null", 3), lambda w, bad: tdq.fid.load_classifier(bad))
refused("fid", "path", ("no/such/place", "/dev/null", 3), lambda w, bad: tdq.fid.Statistics.load(bad), "")
refused(
    "onnx",
    "state",
    ("full precision",),
    lambda w, bad: tdq.onnx.export_onnx(w.unet, w.scheduler, 4, "out.onnx"),
    "full-precision",
)
refused("onnx", "steps", STEPS, lambda w, bad: tdq.onnx.export_onnx(w.tdq, w.scheduler, bad, "out.onnx"))
refused("onnx", "path", ("no/such/file", "/dev/null"), lambda w, bad: tdq.onnx.OnnxModel(bad))

# -- commands
command("name", "calibrate --out out --model={}", ("nothing", "/no/such/folder", "a/b/c"))
command("name", "calibrate --out out --model {folder} --method {}", ("nothing", "TDQ"))
command("bits", "calibrate --out out --model {folder} --weights {}", (1, 9, -4))
command("bits", "calibrate --out out --model {folder} --activations {}", (1, 9, -4))
command("count", "calibrate --out out --model {folder} --images {}", (0, -1))
command("seeds", "calibrate --out out --model {folder} --first-seed={}", (-1,))
command("steps", "calibrate --out out --model {folder} --steps={}", (0, -1, 1001))
command("name", "calibrate --out out --model {folder} --scheduler {}", ("nothing", "euler-ish"))
command("name", "calibrate --out out --model {folder} --reconstruct {}", ("nothing",))
command("name", "calibrate --out out --model {folder} --weights-method {}", ("nothing",))
command("path", "calibrate --model {folder} --out {}", ("/dev/null",))
command("count", "calibrate --out out --model {folder} --classes={}", (0, -3))
command("bits", "report --out out --model {folder} --weights={}", (1, 9))
command("bits", "report --out out --model {folder} --activations={}", (0, 9))
command("count", "report --out out --model {folder} --images={}", (0, -1))
command("steps", "report --out out --model {folder} --steps={}", (0, 1001))
command("name", "report --out out --model {}", ("nothing",))
command("path", "report --model {folder} --out {}", ("/dev/null",))
command("name", "explorer --out out.html --measure {}", ("nothing", "/no/such/folder"))
command("count", "explorer --out out.html --measure {folder} --images={}", (0, -1))
command("steps", "explorer --out out.html --measure {folder} --steps={}", (0, 1001))
command("path", "explorer --out {}", ("/dev/null/below.html",), "/dev/null")
command("path", "site --out {}", ("/dev/null/below",), "/dev/null")
command("path", "exercises --out out --check {}", ("nothing.ipynb", "/dev/null"))
command("name", "bench --out out --model {}", ("nothing",))
command("steps", "bench --out out --model {folder} --steps={}", (0, 1001))
command("count", "bench --out out --model {folder} --images={}", (0, -1))
command("count", "bench --out out --model {folder} --repeats={}", (0, -1))
for option in ("iterations", "batch"):
    command("count", f"train-unet --out out --{option}={{}}", (0, -1))
    command("count", f"train-dit --out out --{option}={{}}", (0, -1))
command("seeds", "train-unet --out out --seed={}", (-1,))
command("seeds", "train-dit --out out --seed={}", (-1,))
command("count", "train-classifier --out out --epochs={}", (0, -1))
command("seeds", "train-classifier --out out --seed={}", (-1,))
command("device", "train-unet --out out --device {}", ("gpu", "cuda:99"))
for line in ("train-unet", "train-dit", "train-classifier"):
    command("path", f"{line} --out out --root {{}}", ("/no/such/folder",))
measured = "reproduce quickstart --out out/table.csv "
command("name", measured + "--methods {}", ("nothing",))
command("bits", measured + "--weights={}", (1, 9, 0))
command("bits", measured + "--activations={}", (1, 9, 0))
command("count", measured + "--images={}", (0, -1))
command("count", measured + "--batch-size={}", (0, -1))
command("steps", measured + "--steps={}", (0, -1, 1001))
command("name", measured + "--features {}", ("nothing",))
command("name", measured + "--engine {}", ("nothing",))
command("name", measured + "--data {}", ("nothing", "/no/such/folder"))
command("path", measured + "--data cifar10 --root {}", ("/no/such/folder",))
command("count", measured + "--classes={}", (0, -2))
command("number", "calibrate --weights={}", ("eight", "2.5", "NaN"))
command("number", "reproduce ptq --guidance={}", ("two",))
command("name", "reproduce {}", ("nothing",))
command("name", "{}", ("nothing",))

# Public callables without a case, and why.
WITHOUT = {
    "RawTime": "takes nothing",
    "full_precision": "yields whatever is not quantized, as it is",
    "significant": "a way to write numbers",
    "headline": "shows a table that the kit has measured",
    "styled": "shows a table of pandas, which says itself what it lacks",
    **dict.fromkeys(("DataError", "TDQError"), "what is raised"),
    **dict.fromkeys(("NAMES", "METHODS", "NEIGHBOURS", "RULES"), "names, no function"),
    **dict.fromkeys(("tables", "plots", "profile_plots", "channel_plots", "result_plots", "widgets"), "draw what was measured"),
    **dict.fromkeys(("reproduce", "bench"), "by their commands"),
    "command demo": "takes a folder alone",
}


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny):
    """What the cases act on: no case may change any of it, so all share it."""
    place = tmp_path_factory.mktemp("world")
    scheduler, how = DDIMScheduler(timestep_spacing="trailing"), dict(progress=False)
    unet, other, text, broken = tiny(UNet2DModel), tiny(UNet2DModel), tiny(UNet2DConditionModel), tiny(UNet2DModel)
    with torch.no_grad():
        other.conv_out.bias += 1
        broken.mid_block.resnets[0].conv1.weight.fill_(NAN)
    profile, foreign = (tdq.profile_activations(model, scheduler, range(4), 4, **how) for model in (unet, other))
    sets = [tdq.CalibrationSet.collect(model, scheduler, range(2), 2, **how) for model in (unet, other)]
    with tdq.record(unet, 2) as recorded:
        tdq.sample(unet, scheduler, 1, 2, **how)
    made = {method: tiny(UNet2DModel) for method in ("tdq", "table", "uncalibrated")}
    for method, model in made.items():
        tdq.quantize(model, 8, 6, "tdq" if method == "uncalibrated" else method)
    tdq.calibrate(made["tdq"], profile=profile, iterations=2, **how)
    tdq.calibrate(made["table"], profile=profile, **how)
    larger = UNet2DModel.from_config({**unet.config, "sample_size": 28}).eval().requires_grad_(False)
    unet.save_pretrained(place / "model" / "unet")
    scheduler.save_pretrained(place / "model" / "scheduler")
    others = {name: place / name for name in ("file", "empty", "quantized", "profile", "set")} | {"float": place / "model"}
    others["file"].write_text("something else")
    others["empty"].mkdir()
    tdq.save_quantized(made["tdq"], others["quantized"])
    profile.save(others["profile"])
    sets[0].save(others["set"])
    models = dict(unet=unet, text_unet=text, broken=broken, larger=larger, **made)
    seen = dict(profile=profile, foreign_profile=foreign, set=sets[0], foreign_set=sets[1], recorded=recorded)
    return SimpleNamespace(**models, **seen, scheduler=scheduler, folder=place / "model", others=others)


def state_of(world):
    """All that a case could change of the models: values, classes, flags, hooks, what quantizes them."""
    found = {}
    for name, model in vars(world).items():
        if isinstance(model, nn.Module):
            found[name] = (
                repr(getattr(model, "quantization", None)),
                [
                    (id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._state_dict_hooks))
                    for m in model.modules()
                ],
            )
            values = list(model.state_dict().values())
            found[name, "values"] = float(torch.cat([v.flatten().double() for v in values]).nan_to_num(7).sum())
            found[name, "kinds"] = [v.dtype for v in values]
            found[name, "flags"] = [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()]
    return found


@pytest.fixture(scope="session")
def untouched(world):
    """The state that every case must leave."""
    return state_of(world)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_refused_and_leaves_nothing(case, world, untouched, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if case.name.startswith("command "):
        line = case.act.replace("{folder}", str(world.folder)).split()
        try:
            status = main([part.replace("{}", str(case.bad)) for part in line])
        except SystemExit as stop:  # argparse
            status = stop.code
        message = capsys.readouterr().err
        assert status == 2 and "error: " in message and "Traceback" not in message
    else:
        with pytest.raises(TDQError) as caught:
            case.act(world, case.bad)
        message = str(caught.value)
    assert any(said in message for said in case.shown), message
    assert len(message.split()) > 7, message
    assert state_of(world) == untouched
    assert sorted(tmp_path.rglob("*")) == []


def test_the_table_is_whole():
    """Every public name has a case, or a reason to have none; and there are as many as it takes."""
    named = {case.name for case in CASES}
    from tdq_utils.__main__ import parser

    commands = {f"command {name}" for name in parser()._subparsers._group_actions[0].choices}
    assert {*tdq.__all__, *commands} - named == set(WITHOUT)
    assert len(CASES) >= 150
