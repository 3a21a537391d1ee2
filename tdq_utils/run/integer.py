"""Run a calibrated model with integer arithmetic: int8 kernels of oneDNN, reached through torch, on x86 CPUs."""

import platform
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_utils.errors import TDQError
from tdq_utils.fit.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from tdq_utils.run.runtime import Runner, bits_on_grid

INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # instructions that add products of 8 bits in 32 bits
X86 = ("x86_64", "amd64")


class IntegerRunner(Runner):
    """A :class:`tdq_utils.run.runtime.Runner` that multiplies and adds integers.

    Activations are uint8 with the zero of their grid, weights int8 with a step size for each output channel, sums int32.
    One packed weight serves every t, because the interval of the activations enters as a number at each call.

    Further TDQError: weights or activations not quantized; halves of inputs quantized apart; a kind of layer without an integer
    kernel; a processor that is not x86, or weights of 8 bits where no instruction adds products of 8 bits.
    """

    def __init__(self, model: nn.Module, scheduler: Any = None, steps: int | None = None, compiled: bool = True):
        bits, _ = bits_on_grid(model)
        if platform.machine().lower() not in X86:
            raise TDQError(f"Integer kernels are there for x86-64; this processor is {platform.machine()}. Sample the frozen "
                           "model: the simulation gives the same images.")  # fmt: skip
        if not sums_are_exact(bits):
            raise TDQError(f"Sums of products must be exact; with {bits}-bit weights they saturate here (tried). That needs one "
                           f"of {', '.join(sorted(INT8_FLAGS))}, and oneDNN must be let use it (ONEDNN_MAX_CPU_ISA). Quantize "
                           "weights to 7 bits or fewer, or sample the frozen model: the simulation.")  # fmt: skip
        if not INT8_FLAGS & cpu_flags():
            warnings.warn("This processor has no 8-bit dot product: integers are right here, but not faster.", stacklevel=2)
        super().__init__(model, scheduler, steps, compiled)

    @staticmethod
    def make_layer(name: str, layer: QuantizedLayer, activation: nn.Module | None) -> nn.Module:
        """An integer layer for a quantized one. TDQError: there is no kernel for it."""
        if activation is None:  # floats on rounded weights: what carries t, a vector a sample
            return Runner.make_layer(name, layer, activation)
        kind = {QuantizedConv2d: IntegerConv2d, QuantizedLinear: IntegerLinear}.get(type(layer))
        if kind is None or layer.split is not None or getattr(layer, "padding_mode", "zeros") != "zeros":
            what = "halves quantized apart" if layer.split is not None else str(layer)
            raise TDQError(f"There is no integer kernel for {name} ({what}); keep it in full precision: quantize(..., keep=...).")
        return kind(layer, activation)

    @staticmethod
    def load_layer(mine: Any, layer: QuantizedLayer) -> None:
        """Give ``mine`` the weights of another quantized layer."""
        (mine.load if isinstance(mine, IntegerConv2d) else lambda layer: Runner.load_layer(mine, layer))(layer)


to_integer = IntegerRunner  # sampled like any model: sample(to_integer(model), scheduler, ...)


def cpu_flags() -> set[str]:
    """Instruction sets of this processor, as Linux names them; empty where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def saturates(weight_bits: int) -> bool:
    """Whether sums may be cut here: older instructions of x86 add two products in 16 bits; 2 * 255 * 64 fits, * 128 does not."""
    return weight_bits == 8 and platform.machine().lower() in X86 and not INT8_FLAGS & cpu_flags()


@cache
def sums_are_exact(weight_bits: int) -> bool:
    """Whether the kernel adds the largest products of 8-bit inputs and weights of so many bits right: tried, once.

    What a processor lists is not what the kernel uses: a setting of oneDNN, or a virtual machine, may hide instructions from it.
    """
    least, geometry = -(2 ** (weight_bits - 1)), ([1, 1], [0, 0], [1, 1], 1)
    one, none = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(torch.full((16, 64, 1, 1), least, dtype=torch.int8), one, 1.0, 0, *geometry, None)
    x = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    rest: Any = packed, one, none, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
    return bool((torch.ops.onednn.qconv_pointwise.tensor(x, one[0], none[0], *rest) == 255 * 64 * least).all())


class IntegerConv2d(nn.Module):
    """Quantizes its input with ``quantizer.levels(x)``, multiplies and adds integers, and returns floats.

    ``packed``: weights of the frozen ``layer`` as the kernel wants them, one byte each; ``weight_step``: of each output channel;
    ``inverse``: of the balance of its input.
    """

    weight_step: torch.Tensor
    weight_zero: torch.Tensor
    bias: torch.Tensor | None
    inverse: torch.Tensor | None

    def __init__(self, layer: QuantizedLayer, quantizer: Any):
        super().__init__()
        self.quantizer = quantizer
        pixel = ([1, 1], [0, 0], [1, 1], 1)  # a linear layer's: strides, padding, dilation, groups
        strided = type(layer) is QuantizedConv2d
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups) if strided else pixel
        for name in ("weight_step", "weight_zero", "bias", "inverse"):
            self.register_buffer(name, None)
        self.load(layer)

    def load(self, layer: QuantizedLayer) -> None:
        """Take the weights of a frozen layer, as levels."""
        levels = layer.weight_levels()
        levels = levels if levels.dim() == 4 else levels[:, :, None, None]
        self.weight_step = layer.weight_step.detach().expand(len(levels)).clone()
        self.weight_zero = torch.zeros(len(levels), dtype=torch.int32)
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self.inverse = None if layer.balance is None else 1 / layer.balance.detach()
        self.packed = torch.ops.onednn.qconv_prepack(levels, self.weight_step, 1.0, 0, *self.geometry, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floats: what the simulated layer gives, but for the last bits of its sums."""
        return self._product(*self.quantizer.levels(x, self.inverse))

    def _product(self, q, s, zero):
        if s.numel() == 1:
            return self._kernel(q, s.reshape(()), zero.reshape(()), self.bias)
        # The kernel takes one interval. sum w s (q - zero) = s (sum w q - zero sum w), and the last sum knows the border.
        one, none = torch.ones((), device=q.device), torch.zeros((), dtype=torch.int32, device=q.device)
        sums = self._kernel(torch.ones_like(q[:1]), one, none, None)
        out = (self._kernel(q, one, none, None) - zero * sums) * s
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)

    def _kernel(self, q, s, zero, bias):
        """uint8 in, float32 out."""
        rest = bias, *self.geometry, 1.0, 0, torch.float32, "none", [], ""
        return torch.ops.onednn.qconv_pointwise.tensor(q, s, zero, self.packed, self.weight_step, self.weight_zero, *rest)


class IntegerLinear(IntegerConv2d):
    """A product as a convolution over pixels: the kernel for matrices compiles constant weights only (torch 2.13)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floats ``"batch ... out"`` for floats ``"batch ... in"``."""
        pixels = lambda v: v.reshape(len(x), 1, -1, v.shape[-1]).permute(0, 3, 1, 2)  # noqa: E731  channels last, as they lie
        levels = (v if v.numel() == 1 else pixels(v) for v in self.quantizer.levels(x, self.inverse))
        return self._product(*levels).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
