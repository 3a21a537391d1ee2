"""Ratios of timings; bytes that are counted by hand."""

from types import SimpleNamespace

import pandas as pd
import torch

from tdq_utils import calibrate, quantize, quantized_layers, restore, sample
from tdq_utils.lab.bench import (
    bench,
    bench_integer,
    generator_runner,
    kernels,
    machine,
    memory,
    peak_bytes,
    ratios,
    stored_bytes,
    time_rounds,
    where_time_goes,
)
from tdq_utils.run.integer import IntegerRunner, to_integer


def test_ratios_are_to_the_first_variant():
    rows = ratios(time_rounds({"short": lambda: sum(range(20_000)), "long": lambda: sum(range(2_000_000))}, repeats=3))
    assert rows.ratio[0] == rows.ratio_min[0] == 1
    assert rows.ratio[1] > 5
    assert (rows.ratio_min <= rows.ratio).all()
    assert (rows.ratio <= rows.ratio_max).all()


def test_bench_leaves_the_model_as_it_was(unet, scheduler):
    rows = bench(unet, scheduler, images=2, steps=2, repeats=1)
    assert list(rows.variant)[:2] == ["full precision", "profiled"]
    assert not hasattr(unet, "quantization")


def test_the_machine_is_named():
    assert "torch" in machine()


def test_integer_variants_are_compared_with_each_baseline(scheduler):
    class Nothing(torch.nn.Module):
        config = SimpleNamespace(in_channels=1, sample_size=2)

        def __init__(self, work):
            super().__init__()
            self.eval()
            self.work, self.p = work, torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            torch.ones(self.work).sum()
            return SimpleNamespace(sample=x)

    variants = {"fp32, eager": Nothing(1), "fp32, compiled": Nothing(1), "int8, static": Nothing(1), "int8, slow": Nothing(10**7)}
    rows = bench_integer(variants, scheduler, images=1, steps=2, repeats=2, progress=False)
    assert (rows[rows.variant == rows.baseline].ratio == 1).all()
    assert list(rows.baseline.unique()) == ["fp32, eager", "fp32, compiled", "int8, static"]
    by = rows.set_index(["variant", "baseline"])
    assert by.ratio["int8, slow", "int8, static"] > 1
    assert ("fp32, eager", "int8, static") not in by.index


def test_shares_of_time_add_up(unet, scheduler):
    rows = where_time_goes({"eager": unet}, pd.DataFrame(dict(variant=["eager"], seconds=2.0)), scheduler, images=2, steps=2)
    assert abs(rows.share.sum() - 1) < 1e-9
    assert (rows.share >= 0).all()
    assert rows.seconds.tolist() == (2 * rows.share).tolist()
    assert rows.share[0] > 0.02  # convolutions were found under the names they have


def test_peak_and_what_is_left():
    def work():
        first = torch.ones(1000)  # 4000 bytes
        second = torch.ones(500)  # 2000 more
        del second
        return [first, torch.ones(100)]  # 400 beside the first

    peak, left = peak_bytes(work)
    assert 6000 <= peak < 6500
    assert 4400 <= left < 4900


def test_bytes_on_disk(unet, scheduler, profile):
    for weights, a_byte in ((8, 1), (4, 2), (3, 2)):
        quantize(unet, weights, 8, "mse")
        layers = quantized_layers(unet).values()
        expected = sum(-(-layer.weight.numel() // a_byte) + 4 * len(layer.weight) for layer in layers)
        assert stored_bytes(unet) == expected
        assert stored_bytes(unet, packed=False) == sum(4 * layer.weight.numel() + 4 * len(layer.weight) for layer in layers)
        restore(unet)


def test_memory_of_8_and_4_bits(unet, scheduler):
    quantize(unet, 8, 8, "mse")
    calibrate(unet, scheduler, range(2), 2, progress=False)
    runner = to_integer(unet, scheduler, 2, compiled=False)
    weights = sum(layer.weight.numel() for layer in quantized_layers(unet).values())
    restore(unet)
    rows = memory(unet, scheduler, runner, images=2, steps=2).set_index("what")
    assert rows.ratio["weights on disk, 4 bits"] < rows.ratio["weights on disk, 8 bits"] < 1
    assert len(rows) == 5 and (rows.fp32 > 0).all() and (rows.ratio == rows.integer / rows.fp32).all()
    for bits in (8, 4):
        assert (
            weights <= rows.integer[f"weights in memory, {bits} bits"] < 4 * weights == rows.fp32[f"weights on disk, {bits} bits"]
        )


def test_generators_on_the_path_give_the_table_s_images(unet, scheduler):
    quantize(unet, 8, 8, "tdq")
    calibrate(unet, scheduler, range(2), 2, iterations=3, progress=False)
    table, generators = (make(unet, scheduler, 2, compiled=False) for make in (IntegerRunner, generator_runner))
    how = dict(seeds=range(2), steps=2, progress=False)
    assert torch.equal(sample(table, scheduler, **how), sample(generators, scheduler, **how))


def test_float_kernels_of_quantized_layers_are_counted_as_such(tmp_path):
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["x_hat"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["w_hat"]),
        helper.make_node("Conv", ["x_hat", "w_hat"], ["y"]),  # onnxruntime wants its output quantized too
    ]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("zero", TensorProto.UINT8, [], [128]),
        helper.make_tensor("w", TensorProto.INT8, [1, 1, 1, 1], [3]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "plain", [x], [y], constants)
    path = tmp_path / "plain.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    assert kernels(path)[["arithmetic", "layers", "count"]].values.tolist() == [["float32", "quantized", 1]]
