"""Run a frozen quantized model with integer arithmetic: int8 kernels of oneDNN, reached through torch, on x86 CPUs."""

import platform
import warnings
from pathlib import Path

import torch
from torch import nn

from tdq_utils.errors import TDQError
from tdq_utils.layers import QuantizedConv2d, QuantizedLinear
from tdq_utils.quantize import checked_state
from tdq_utils.runtime import Runner

INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # instructions that add products of 8 bits in 32 bits
SAFE_LEVEL = 63  # of 7-bit weights: two products of a weight and a uint8 fit the 16 bits of older instructions


class IntegerRunner(Runner):
    """A copy of a frozen model that multiplies and adds integers.

    Activations are uint8 with the zero of their grid, weights int8 with a step size for each output channel, sums int32; one packed
    weight serves every t, because the interval of the activations enters as a number at each call. The layers that
    quantization left in full precision stay so, and so do norms, activation functions and the attention product.

    Args, Attributes, Raises: as :class:`tdq_utils.runtime.Runner`; and

    Raises:
        TDQError: weights or activations are not quantized; halves of inputs are quantized apart; a kind of layer without an integer
            kernel; a processor that is not x86, or has no instruction for 8-bit sums and weights of 8 bits.
    """

    def __init__(self, model, scheduler, steps, compiled=True):
        state = checked_state(model)
        if state.weights is None or state.activations is None:
            raise TDQError(
                f"Integers need weights and activations on a grid; got W{state.weights}A{state.activations}. Quantize both."
            )
        _check_processor(state.weights)
        super().__init__(model, scheduler, steps, compiled)

    @staticmethod
    def make_layer(name, layer, activation):
        """An integer layer for a quantized one. TDQError: there is no kernel for it."""
        kind = {QuantizedConv2d: IntegerConv2d, QuantizedLinear: IntegerLinear}.get(type(layer))
        if kind is None or layer.split is not None or getattr(layer, "padding_mode", "zeros") != "zeros":
            what = "halves quantized apart" if layer.split is not None else str(layer)
            raise TDQError(f"There is no integer kernel for {name} ({what}); keep it in full precision: quantize(..., keep=...).")
        return kind(layer, activation)

    def load(self, model):
        """Take over the weights and intervals of another frozen model of equal structure, without compiling again."""
        raise NotImplementedError


def to_integer(model, scheduler, steps, compiled=True):
    """An :class:`IntegerRunner` of ``model``, sampled like any model: ``sample(to_integer(...), scheduler, ...)``."""
    return IntegerRunner(model, scheduler, steps, compiled)


def cpu_flags():
    """Instruction sets of this processor, as Linux names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def _check_processor(weight_bits):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise TDQError(
            f"Integer kernels are there for x86-64; this processor is {platform.machine()}. Sample the frozen model: the simulation "
            "gives the same images."
        )
    if not INT8_FLAGS & cpu_flags() and weight_bits == 8:
        raise TDQError(
            f"8-bit weights need one of {', '.join(sorted(INT8_FLAGS))}, or sums saturate; this processor has none. Quantize weights "
            "to 7 bits or fewer, or sample the frozen model: the simulation."
        )
    if not INT8_FLAGS & cpu_flags():
        warnings.warn("This processor has no 8-bit dot product: integers are right here, but not faster.", stacklevel=4)


def weight_levels(layer):
    """The integer levels of a quantized layer's weights: int8, shaped as the weights."""
    if layer.levels is not None:
        return layer.levels
    return (layer.quantized_weight().detach() / layer.spread_weight_step()).round().to(torch.int8)


class IntegerConv2d(nn.Module):
    """Quantize the input, multiply and add integers, return floats.

    Args:
        layer: frozen and quantized. quantizer: has ``levels(x)``, as :class:`tdq_utils.runtime.RowQuantizer`.
        weight: int8 levels, ``"out in/groups height width"``. shape: strides, padding, dilation, groups.

    Attributes:
        packed: weights as the kernel wants them. weight_step: of each output channel.
    """

    def __init__(self, layer, quantizer, weight=None, shape=None):
        super().__init__()
        self.quantizer, self.shape = quantizer, shape or (layer.stride, layer.padding, layer.dilation, layer.groups)
        weight = weight_levels(layer) if weight is None else weight
        self.register_buffer("weight_step", layer.weight_step.detach().expand(len(weight)).clone())
        self.register_buffer("weight_zero", torch.zeros(len(weight), dtype=torch.int32))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.packed = torch.ops.onednn.qconv_prepack(weight, self.weight_step, 1.0, 0, *self.shape, None)

    def forward(self, x):
        """Floats: what the simulated layer gives, but for the last bits of its sums."""
        q, s, zero = self.quantizer.levels(x)
        if s.numel() == 1:
            return self.kernel(q, s.reshape(()), zero.reshape(()), self.bias)
        # The kernel takes one interval. sum w s (q - zero) = s (sum w q - zero sum w), and the last sum knows the border.
        one, none = torch.ones((), device=x.device), torch.zeros((), dtype=torch.int32, device=x.device)
        sums = self.kernel(torch.ones_like(q[:1]), one, none, None)
        out = (self.kernel(q, one, none, None) - zero * sums) * s
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)

    def kernel(self, q, s, zero, bias):
        """uint8 in, float32 out."""
        weight = self.packed, self.weight_step, self.weight_zero
        return torch.ops.onednn.qconv_pointwise.tensor(
            q, s, zero, *weight, bias, *self.shape, 1.0, 0, torch.float32, "none", [], ""
        )


class IntegerLinear(IntegerConv2d):
    """A matrix product of integers: a convolution over single pixels (torch's compiler takes the other kernel with constants only)."""

    def __init__(self, layer, quantizer):
        super().__init__(layer, quantizer, weight_levels(layer)[:, :, None, None], ([1, 1], [0, 0], [1, 1], 1))

    def forward(self, x):
        """Floats ``"batch ... out"`` for floats ``"batch ... in"``."""
        pixels = x.reshape(len(x), 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last, as it lies in memory
        return super().forward(pixels).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
