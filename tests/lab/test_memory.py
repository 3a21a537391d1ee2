"""Bytes that are counted by hand."""

import torch

from tdq_utils import calibrate, quantize, restore
from tdq_utils.fit.quantize import quantized_layers
from tdq_utils.lab.memory import peak_bytes, sizes, stored_bytes
from tdq_utils.run.integer import to_integer


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


def test_sizes_of_a_model(unet, scheduler, profile):
    quantize(unet, 4, 8, "mse")
    calibrate(unet, scheduler, profile=profile, progress=False)
    rows = sizes(unet, scheduler, to_integer(unet, scheduler, 2, compiled=False), images=2).set_index("what")
    assert (rows.fp32 > 0).all()
    assert (rows.ratio == rows.integer / rows.fp32).all()
    weights = sum(layer.weight.numel() for layer in quantized_layers(unet).values())
    assert weights <= rows.integer["weights in memory, 4 bits"] < 4 * weights
