"""Write a calibrated model as an ONNX file whose intervals are gathered by t; run one in onnxruntime."""

import copy
import importlib
import logging
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tdq_utils.errors import DataError, TDQError
from tdq_utils.fit.layers import QuantizedConv2d, QuantizedLinear
from tdq_utils.fit.quantize import full_precision, quantized_layers
from tdq_utils.run.integer import saturates
from tdq_utils.run.runtime import CachedRow, RowQuantizer, Runner, bits_on_grid, one_time


def export_onnx(model: nn.Module, scheduler: Any, steps: int, path: str | Path,
                condition: dict[str, torch.Tensor] | None = None) -> None:  # fmt: skip
    """Write a quantized model as an ONNX file; each layer gives what the simulated one gives, but for the last bits of its sums.

    A quantized layer has QuantizeLinear and DequantizeLinear nodes on its input, with scale and zero point gathered from tables
    over the visited time steps by the value of t (another t stops the run), and a DequantizeLinear on its int8 weights. For a
    convolution between such nodes onnxruntime would want the output quantized too; so it is written as a product.

    Args:
        model: calibrated, frozen or not; left as it is. scheduler, steps: the time steps that the tables hold.
        path: of the file; its inputs are ``sample``, of the model's size, in batches of any, and ``timestep``, one for the batch:
            a whole number, or a float if any visited t is fractional.
        condition: an example of the model's further arguments, two rows or more each: further inputs of the file.

    TDQError: not quantized and calibrated, or for other steps; weights or inputs without a grid; intervals that depend on the
    input; halves of inputs quantized apart; other than linear and plain 2-D layers; onnx is not installed.
    """
    bits, _ = bits_on_grid(model)
    runner, clock = Runner(model, scheduler, steps, compiled=False), SimpleNamespace(row=None)
    for name in quantized_layers(model):
        layer = runner.net.get_submodule(name)
        if isinstance(layer, CachedRow):
            runner.net.set_submodule(name, _Gathered(runner.features[:, layer.part], clock))
        elif layer.activation is not None:  # else it is one that carries t, in floats
            runner.net.set_submodule(name, _checked_kind(name, layer)(layer, runner.table, clock))
    _write(_Timed(runner.net, clock, list(runner.rows)), path, condition or {}, bits)


def export_float(model: nn.Module, path: str | Path, condition: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model in full precision, a quantized one as it was before, with the same inputs: what to time against."""
    with full_precision(model):
        _write(_Timed(copy.deepcopy(model)), path, condition or {})


def _checked_kind(name, layer):
    if type(layer.activation) is not RowQuantizer or layer.activation.step is not None:
        what = "two, for halves of its input" if layer.split else "one that depends on the input"
        raise TDQError(f"An export needs one interval for each layer and t; {name} has {what}. Quantize it otherwise.")
    if type(layer) is QuantizedLinear:
        return _Product
    if type(layer) is QuantizedConv2d and layer.groups == 1 and layer.padding_mode == "zeros" and type(layer.padding) is tuple:
        return _Convolution
    raise TDQError(f"An export takes linear and plain 2-D layers; {name} is {layer.extra_repr()}. quantize(keep=...) keeps it.")


def _write(net, path, condition, weights=32):
    needed("onnx", "onnxscript")
    shape = (net.config.in_channels, *np.broadcast_to(net.config.sample_size, 2).tolist())
    rows = len(next(iter(condition.values()), (0, 0)))  # one row alone would be taken for a constant
    batch = {0: torch.export.Dim("batch", max=63)}  # diffusers copies tensors from 64 on: no difference to the file
    inputs = torch.zeros(rows, *shape), torch.zeros((), dtype=net.timesteps.dtype)
    log = logging.getLogger("torch.onnx")
    with ExitStack() as quiet, torch.no_grad():  # no notes about packages and functions that nothing here uses
        quiet.enter_context(warnings.catch_warnings(action="ignore"))
        quiet.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        program = torch.onnx.export(
            net.eval().cpu(), inputs, kwargs={"condition": condition}, input_names=["sample", "timestep", *condition],
            dynamic_shapes={"sample": batch, "timestep": {}, "condition": dict.fromkeys(condition, batch)},
            dynamo=True, verbose=False)  # fmt: skip  # the older exporter cannot be given nodes
    for node in program.model.graph:
        node.metadata_props.clear()  # where each came from: a third of the file, with paths of this machine
    program.model.metadata_props.update(timesteps=" ".join(map(repr, net.visited)), weights=str(weights))
    program.save(path)


class _Timed(nn.Module):
    """The model, and before it the search for the row of t that its layers gather from."""

    def __init__(self, net, clock=None, visited=()):
        super().__init__()
        self.net, self.config, self.clock, self.visited = net, net.config, clock, visited
        whole = all(float(t).is_integer() for t in visited)
        self.register_buffer("timesteps", torch.tensor(visited, dtype=torch.int64 if whole else torch.float32))

    def forward(self, sample, timestep, condition):
        if self.visited:
            found = _node("NonZero", self.timesteps == timestep, dtype=torch.int64, shape=(1, 1))
            # A t that no row holds is found 0 times, and an axis of length 0 cannot be squeezed: an error, not an answer.
            self.clock.row = _node("Squeeze", found, torch.tensor([0, 1]), dtype=torch.int64, shape=())
        return self.net(sample, timestep.expand(sample.shape[0]), **condition).sample  # len() would fix the batch


def _node(kind, *inputs, dtype, shape, **attributes):
    return torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=dtype, shape=shape)


def _dequantized(q, s, zero=None, **axis):
    return _node("DequantizeLinear", q, s, zero, dtype=torch.float32, shape=q.shape, **axis)


class _Product(nn.Module):
    """A quantized linear layer as ONNX nodes; ``table``: of :class:`Runner`, ``clock``: has the row."""

    def __init__(self, layer, table, clock):
        super().__init__()
        s, least, greatest = table[:, :, layer.activation.column].unbind(dim=1)
        tops = (greatest - least).to(torch.uint8)
        self.clock, self.whole = clock, bool((tops == 255).all())
        weight = layer.weight_levels()  # "out in ..."
        self.register_buffer("top", tops[0] if (tops == tops[0]).all() else tops)  # bits may follow t
        self.register_buffer("scale", s.clone())
        self.register_buffer("zero", (-least).to(torch.uint8))
        self.register_buffer("weight", weight.movedim(1, -1).flatten(1).T.contiguous())
        self.register_buffer("inverse", None if layer.balance is None else 1 / layer.balance.detach())
        self.register_buffer("weight_scale", layer.weight_step.detach().expand(len(weight)).clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x):
        return self.product(*self.quantized(x))

    def quantized(self, x):
        """Levels of the input, uint8; their scale and zero point at this t."""
        x = x if self.inverse is None else x * self.inverse
        s = _node("Gather", self.scale, self.clock.row, dtype=torch.float32, shape=())
        zero = _node("Gather", self.zero, self.clock.row, dtype=torch.uint8, shape=())
        q = _node("QuantizeLinear", x, s, zero, dtype=torch.uint8, shape=x.shape)
        if not self.whole:  # the node itself stops at 0 and 255
            top = _node("Gather", self.top, self.clock.row, dtype=torch.uint8, shape=()) if self.top.dim() else self.top
            q = _node("Min", q, top, dtype=torch.uint8, shape=x.shape)
        return q, s, zero

    def product(self, q, s, zero):
        y = _dequantized(q, s, zero) @ _dequantized(self.weight, self.weight_scale, axis=1)
        # Where onnxruntime knows all sizes, it would fuse an Add with the product, to floats, before it looks for integers.
        return y if self.bias is None else y - -self.bias


class _Gathered(nn.Module):
    """A layer whose output is looked up: the row of its ``table``, ``"t width"``, that the ``clock`` says."""

    def __init__(self, table, clock):
        super().__init__()
        self.clock = clock
        self.register_buffer("table", table.clone())

    def forward(self, x):
        row = _node("Gather", self.table, self.clock.row, dtype=torch.float32, shape=self.table.shape[1:])
        return row.expand(*x.shape[:-1], -1)


class _Convolution(_Product):
    """A quantized convolution as a product: the levels that an output pixel sees are gathered into a row."""

    def __init__(self, layer, table, clock):
        super().__init__(layer, table, clock)
        self.window, self.how = layer.kernel_size, (layer.stride, layer.padding, layer.dilation)

    def forward(self, x):
        q, s, zero = self.quantized(x)
        (places, size), pixels = self.seen(*x.shape[2:]), q.flatten(2).transpose(1, 2)
        batch, count, channels = pixels.shape
        if not np.array_equal(places[:, 0], np.arange(1, count + 1)):
            shape = (batch, count + 1, channels)  # one more pixel, of the level that stands for 0, serves as the border
            pixels = _node("Pad", pixels, torch.tensor([0, 1, 0, 0, 0, 0]), zero, dtype=torch.uint8, shape=shape)
            shape = (batch, *places.shape, channels)
            pixels = _node("Gather", pixels, torch.from_numpy(places), axis=1, dtype=torch.uint8, shape=shape).flatten(2)
        return self.product(pixels, s, zero).transpose(1, 2).unflatten(2, size)

    def seen(self, height, width):
        """The input pixels that each output pixel sees, ``"pixel window"``, from 1; 0: the border; and the output's size."""
        stride, padding, dilation = self.how
        image = np.pad(np.arange(1, height * width + 1).reshape(height, width), [(pad, pad) for pad in padding])
        reach = [(size - 1) * step + 1 for size, step in zip(self.window, dilation, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(image, reach)
        windows = windows[tuple(slice(None, None, step) for step in (*stride, *dilation))]
        return windows.reshape(-1, np.prod(self.window)).astype(np.int32), windows.shape[:2]


class OnnxModel(nn.Module):
    """A written file run by onnxruntime on the CPU, sampled like any model: ``sample(OnnxModel(path), scheduler, ...)``.

    ``threads``: default, those of torch. TDQError: onnxruntime is not installed; 8-bit weights where an x86 processor adds
    their products in 16 bits; at a call, several t in a batch, or a t that the file has no interval for.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        super().__init__()
        self.session = session(path, threads or torch.get_num_threads())
        (_, channels, *size), about = self.session.get_inputs()[0].shape, self.session.get_modelmeta().custom_metadata_map
        self.config = SimpleNamespace(in_channels=channels, sample_size=size)
        self.visited = sorted(float(t) for t in about["timesteps"].split())
        self.time_dtype = torch.int64 if all(t.is_integer() for t in self.visited) else torch.float32
        self.eval()
        self.device = nn.Parameter(torch.empty(0), requires_grad=False)  # samplers ask a parameter for it
        if saturates(int(about["weights"])):
            raise TDQError("8-bit weights need 8-bit dot products; this processor names none. Quantize weights to 7 bits.")

    def forward(self, sample: torch.Tensor, timestep: Any, **condition: torch.Tensor) -> SimpleNamespace:
        """An object whose ``sample`` is the output, float32."""
        t = torch.tensor(one_time(torch.as_tensor(timestep), self.visited))
        given = {"sample": sample, "timestep": t.to(self.time_dtype), **condition}
        (out,) = self.session.run(None, {name: np.ascontiguousarray(value.numpy()) for name, value in given.items()})
        return SimpleNamespace(sample=torch.from_numpy(out))


def session(path: str | Path, threads: int = 1, fused: str = "") -> Any:
    """The file in onnxruntime, on the CPU; ``fused``: where to write its graph after all fusions.

    TDQError: not installed, or no such file."""
    (onnxruntime,) = needed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.optimized_model_filepath, options.log_severity_level = threads, fused, 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of classes of its own, one for each thing that may be wrong
        raise DataError(
            f"{path} must be an ONNX file that onnxruntime can run: {error}. Write it again by export_onnx."
        ) from error


def needed(*names: str) -> list[Any]:
    """These modules, imported. TDQError: one is not installed."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise TDQError(f"ONNX files need the packages {', '.join(names)}; {error}. pip install 'tdq-utils[onnx]'") from error
