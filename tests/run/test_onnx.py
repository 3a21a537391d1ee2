"""An ONNX file computes what the simulation computes, looks t up, and multiplies integers."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tdq_utils import calibrate, freeze, quantize, sample
from tdq_utils.errors import TDQError
from tdq_utils.fit.quantize import activation_quantizers, full_precision
from tdq_utils.lab.bench import kernels
from tdq_utils.method.grid import SILU_MIN, Grid
from tdq_utils.method.step_sizes import TableStep
from tdq_utils.run import integer
from tdq_utils.run import onnx as export
from tdq_utils.run.onnx import OnnxModel, export_float, export_onnx

VISITED = {999: 0.02, 749: 0.03, 499: 0.05, 249: 0.1}  # t, and the step size at it
WEIGHTS = 7  # bits whose sums are right on any processor


class Layers(nn.Module):
    """Every kind of layer beside each other, so that no rounding meets the next: what differs here, differs in a layer."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=3, sample_size=8)
        padded = nn.Conv2d(3, 8, 3, padding=1)
        uneven = nn.Conv2d(3, 8, (3, 1), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False)
        self.images = nn.ModuleList([padded, uneven, nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, stride=2)])
        self.rows = nn.ModuleList([nn.Linear(64, 5), nn.Linear(64, 5, bias=False)])
        self.vectors = nn.ModuleList([nn.Linear(192, 10)])

    def forward(self, sample, timestep, shift=0):
        out = [layer(sample) for layer in self.images]
        out += [layer(sample.flatten(2)) for layer in self.rows] + [layer(sample.flatten(1)) for layer in self.vectors]
        return SimpleNamespace(sample=torch.cat([part.flatten(1) for part in out], dim=1) + shift)


GRIDS = [Grid(8), Grid(5, SILU_MIN), Grid(8, 0.0), Grid(5), Grid(8, SILU_MIN), Grid(5, 0.0), Grid(2)]  # one a layer

LEVELS = [[-3, 28], [-16, 15], [-100, 155], [-8, 7]]  # the last layer's: zero level and bits follow t


def quantized_layers(seed=0):
    """With intervals that drift, and end well before inputs of deviation 2 do."""
    torch.manual_seed(seed)
    model = Layers().eval().requires_grad_(False)
    quantize(model, WEIGHTS, 8, "table")
    for quantizer, grid in zip(activation_quantizers(model).values(), GRIDS, strict=True):
        quantizer.bits, quantizer.grid = grid.bits, grid
        quantizer.step = TableStep(list(VISITED), list(VISITED.values()))
    quantizer.step = TableStep(list(VISITED), list(VISITED.values()), LEVELS)
    return model


@pytest.fixture(scope="module")
def layers(scheduler, tmp_path_factory):
    """``(model, path)``: the frozen model, and what was written of it before it was frozen."""
    model, path = quantized_layers(), tmp_path_factory.mktemp("onnx") / "layers.onnx"
    export_onnx(model, scheduler, len(VISITED), path)
    freeze(model, scheduler, len(VISITED))
    return model, path


@pytest.mark.parametrize("t", VISITED)
def test_each_layer_gives_at_each_t_what_the_simulation_gives(layers, t):
    model, path = layers
    x = 2 * torch.randn(3, 3, 8, 8)
    expected = model(x, t).sample
    assert torch.allclose(OnnxModel(path)(x, t).sample, expected, atol=1e-5, rtol=0)
    others = [model(x, other).sample for other in VISITED if other != t]
    assert all((other - expected).abs().mean() > 1e-2 for other in others)  # so the row of another t would be seen


@pytest.mark.parametrize("x", [100.0, -100.0])
def test_levels_end_where_their_bits_end(layers, x):
    model, path = layers
    x = torch.full((1, 3, 8, 8), x)
    assert torch.allclose(OnnxModel(path)(x, 999).sample, model(x, 999).sample, atol=1e-5, rtol=0)


def test_the_graph_itself_refuses_a_t_that_it_has_no_interval_for(layers):
    session = OnnxModel(layers[1]).session
    given = {"sample": np.zeros((1, 3, 8, 8), np.float32), "timestep": np.array(999)}
    session.run(None, given)
    with pytest.raises(Exception, match="Squeeze"):
        session.run(None, given | {"timestep": np.array(600)})


@pytest.mark.parametrize(
    ("t", "message"), [(600, "must be one of them; got t = 600"), (torch.tensor([999, 749]), "one t a call")]
)
def test_the_model_says_which_t_it_takes(layers, t, message):
    with pytest.raises(TDQError, match=message):
        OnnxModel(layers[1])(torch.randn(2, 3, 8, 8), t)


def test_scales_and_zero_points_are_gathered_from_tables(layers):
    import onnx

    graph = onnx.load(layers[1]).graph
    made_by, tables = {out: node for node in graph.node for out in node.output}, {t.name: t for t in graph.initializer}
    quantizing = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizing) >= 3
    for node in quantizing:
        gathers = [made_by[name] for name in node.input[1:]]
        assert [gather.op_type for gather in gathers] == ["Gather", "Gather"]
        assert [list(tables[gather.input[0]].dims) for gather in gathers] == [[len(VISITED)]] * 2
    levels = [tables.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"]
    assert sum(table is not None and table.data_type == onnx.TensorProto.INT8 for table in levels) == len(GRIDS)


def test_every_quantized_layer_is_an_integer_kernel(layers):
    found = kernels(layers[1])
    assert found.values.tolist() == [["MatMulIntegerToFloat", "int8", "quantized", 7]]


def frozen(model, scheduler, profile=None, method="table", weights=WEIGHTS, activations=5, **options):
    quantize(model, weights, activations, method, **options)
    made = dict(profile=profile) if profile else dict(seeds=range(2), steps=4)
    calibrate(model, scheduler, **made, progress=False)
    freeze(model, scheduler, 4)
    return model


def test_a_whole_model(unet, scheduler, profile, tmp_path):
    model, path = frozen(unet, scheduler, profile), tmp_path / "unet.onnx"
    x = torch.randn(8, 1, 8, 8)
    before = model(x, 749).sample
    export_onnx(model, scheduler, 4, path)
    assert torch.equal(model(x, 749).sample, before)
    written = OnnxModel(path)
    for t in (999, 249):
        simulated = model(x, t).sample
        with full_precision(model):
            quantization = (model(x, t).sample - simulated).square().mean()
        # Last bits of sums may move an activation to the next level, and so all that follow; most often none does.
        assert (written(x, t).sample - simulated).square().mean() < 0.01 * quantization
    found = kernels(path).groupby(["arithmetic", "layers"])["count"].sum()
    assert found["int8", "quantized"] == len(model.quantization.names)
    assert ("float32", "quantized") not in found.index
    how = {"seeds": range(3), "steps": 4, "batch_size": 2, "progress": False}
    assert (sample(written, scheduler, **how) - sample(model, scheduler, **how)).abs().mean() < 0.01
    assert b"site-packages" not in path.read_bytes()  # nothing of the machine it was written on


def test_full_precision_with_a_condition(tmp_path):
    model, x, shift = quantized_layers(), torch.randn(3, 3, 8, 8), torch.randn(3, 1)
    export_float(model, tmp_path / "float.onnx", {"shift": shift})
    with full_precision(model):
        expected = model(x, 500, shift=shift).sample
    written = OnnxModel(tmp_path / "float.onnx")
    assert torch.allclose(written(x, 500, shift=shift).sample, expected, atol=1e-5)
    assert torch.allclose(written(x[:1], 7, shift=shift[:1]).sample, expected[:1], atol=1e-5)  # any t, any number of samples
    assert set(kernels(tmp_path / "float.onnx")["arithmetic"]) == {"float32"}


@pytest.mark.parametrize(("weights", "activations"), [(None, 8), (8, None)])
def test_refuses_layers_without_a_grid(unet, scheduler, profile, tmp_path, weights, activations):
    frozen(unet, scheduler, profile, "mse", weights, activations)
    with pytest.raises(TDQError, match="Quantize both"):
        export_onnx(unet, scheduler, 4, tmp_path / "file.onnx")


def test_refuses_what_is_not_quantized_or_not_calibrated_for_these_steps(unet, scheduler, profile, tmp_path):
    with pytest.raises(TDQError, match="must be quantized"):
        export_onnx(unet, scheduler, 4, tmp_path / "file.onnx")
    quantize(unet, 8, 5, "table")
    with pytest.raises(TDQError, match="calibrate"):
        export_onnx(unet, scheduler, 4, tmp_path / "file.onnx")
    calibrate(unet, scheduler, profile=profile, progress=False)
    freeze(unet, scheduler, 4)
    with pytest.raises(TDQError, match="steps"):
        export_onnx(unet, scheduler, 5, tmp_path / "file.onnx")


def test_refuses_two_intervals_for_a_layer(unet, scheduler, tmp_path):
    frozen(unet, scheduler, method="table", split_skips=True)
    with pytest.raises(TDQError, match="two, for halves"):
        export_onnx(unet, scheduler, 4, tmp_path / "file.onnx")


@pytest.mark.parametrize("method", ["dynamic", "dynamic-sample"])
def test_refuses_intervals_that_depend_on_the_input(unet, scheduler, tmp_path, method):
    frozen(unet, scheduler, method=method)
    with pytest.raises(TDQError, match="depends on the input"):
        export_onnx(unet, scheduler, 4, tmp_path / "file.onnx")


def test_refuses_layers_that_it_cannot_write(scheduler, tmp_path):
    model = quantized_layers()
    model.images[0].groups = 3
    with pytest.raises(TDQError, match="images.0 is .*groups=3.*keep"):
        export_onnx(model, scheduler, 4, tmp_path / "file.onnx")


def test_refuses_8_bit_weights_where_their_sums_saturate(layers, monkeypatch):
    monkeypatch.setattr(integer.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(integer, "cpu_flags", lambda: {"avx2"})
    OnnxModel(layers[1])  # 7 bits
    meta = SimpleNamespace(custom_metadata_map={"timesteps": "999", "weights": "8"})
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(shape=["batch", 3, 8, 8])], get_modelmeta=lambda: meta)
    monkeypatch.setattr(export, "session", lambda *_: session)
    with pytest.raises(TDQError, match="7 bits"):
        OnnxModel("file.onnx")


def test_says_what_to_install(layers, scheduler, tmp_path, monkeypatch):
    model, path = layers
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TDQError, match="pip install"):
        OnnxModel(path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TDQError, match="pip install"):
        export_onnx(model, scheduler, 4, tmp_path / "file.onnx")
