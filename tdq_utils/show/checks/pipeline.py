"""Judges of the exercises on lesson 12: time as models are told it, bits by t, and a round trip."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdq_utils.denoiser.call import read_call
from tdq_utils.denoiser.sampling import sample
from tdq_utils.fit.calibration import calibrate
from tdq_utils.fit.quantize import quantize, restore
from tdq_utils.method.generator import unit_of
from tdq_utils.show.checks.compare import Case, Check


def _seen_by_generator(told: list[float]) -> list[float]:
    scale = {"origin": 0.0, "unit": 1.0, **unit_of(told)}
    return [(t - scale["origin"]) * scale["unit"] for t in told]


def _stretched(told: list[float]) -> list[float]:
    return [1000 * t for t in told] if max(told) <= 1 else told


generator_time = Check(
    _seen_by_generator,
    lambda: [dict(told=told) for told in ([999.0, 499.5, 0.0], [1.0, 0.83, 0.35], [0.0, 0.1, 0.25, 0.5])],
    right="1000 is noise and 0 the image, whatever the model is told.",
    mistakes={
        "it does not turn t round where noise is told as 0": _stretched,
        "it rounds to whole numbers; t may be fractional": lambda told: [float(round(t)) for t in _seen_by_generator(told)],
        "it takes whole numbers first: all of 0..1 becomes 0 or 1": lambda told: _stretched([float(int(t)) for t in told]),
        "it stretches what runs to 1000 already": lambda told: [1000 * t for t in told],
        "it leaves 0..1 as it is": lambda told: list(told),
    },
)


class _Flux(nn.Module):
    """Called as Flux is: the time step is neither second nor always named."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, timestep: Any = None) -> Tensor:
        return hidden_states


class _UNet(nn.Module):
    """Called as UNets are."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Any = None) -> Tensor:
        return sample


class _Own(nn.Module):
    """Somebody's model."""

    def forward(self, tokens: Tensor, t: Any) -> Tensor:
        return tokens


def _told(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    return float(read_call(model, args, kwargs)[1])


def _calls() -> list[Case]:
    x, text = torch.zeros(1, 2), 3.0
    calls: list[tuple[nn.Module, tuple, dict]] = [
        (_UNet(), (x, 7.0), {}), (_UNet(), (x,), {"timestep": 8.0}), (_Flux(), (x, text, 0.5), {}),
        (_Flux(), (x,), {"timestep": 0.25, "encoder_hidden_states": text}), (_Own(), (x, 4.0), {}),
        (_Own(), (), {"t": 5.0, "tokens": x}),
    ]  # fmt: skip
    return [dict(model=model, args=args, kwargs=kwargs) for model, args, kwargs in calls]


def _second(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else next(kwargs[name] for name in ("timestep", "t") if name in kwargs)


read_time = Check(
    _told,
    _calls,
    right="by the signature, so by name, wherever it stands.",
    mistakes={
        "it takes the second argument; in many models that is the prompt": _second,
        "it reads named arguments alone; t may be passed by position": (
            lambda model, args, kwargs: kwargs.get("timestep", kwargs.get("t", 0.0))
        ),
        "it takes the last argument": lambda model, args, kwargs: [*args, *kwargs.values()][-1],
    },
)


def _policy(t: Tensor, edges: Tensor, bits: Tensor) -> Tensor:
    return bits[torch.bucketize(t, edges, right=True)]


bits_by_t = Check(
    _policy,
    lambda: [dict(t=torch.tensor([0, 250, 251, 249, 700, 999]), edges=torch.tensor([250, 700]), bits=torch.tensor([8, 6, 4])),
             dict(t=torch.tensor([10, 900]), edges=torch.tensor([500]), bits=torch.tensor([5, 4]))],
    right="each sample at its own t; many bits near the image, few in the noise.",
    mistakes={
        "a t that is an edge belongs to the upper range": lambda t, edges, bits: bits[torch.bucketize(t, edges)],
        "it gives many bits to noise; bits are listed from the image up": (
            lambda t, edges, bits: bits.flip(0)[torch.bucketize(t, edges, right=True)]
        ),
        "it takes the first sample's t for the batch": lambda t, edges, bits: _policy(t[:1], edges, bits).expand(len(t)),
        "it knows the first edge alone": lambda t, edges, bits: bits[(t >= edges[0]).long()],
        "it returns the number of the range; expected its bits": lambda t, edges, bits: torch.bucketize(t, edges, right=True),
    },
)  # fmt: skip

SEEDS, STEPS, HOW = range(2), 2, dict(weights=4, activations=4, method="minmax")


def _round_trip(model: Any, scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    draw = lambda: sample(model, scheduler, SEEDS, STEPS, progress=False)  # noqa: E731
    clean = draw()
    quantize(model, **HOW)  # type: ignore[arg-type]
    calibrate(model, scheduler, SEEDS, STEPS, progress=False)
    quantized = draw()
    restore(model)
    return clean, quantized, draw()


def _pictures(function, model, scheduler):
    """Three sets of pictures, and what is left in the model."""
    clean, quantized, restored = function(model, scheduler)
    left = sum(type(layer).__name__.startswith("Quantized") for layer in model.modules())
    return {"full precision": clean, "quantized": quantized, "restored": restored, "quantized layers that are left": left}


def _tiny() -> list[Case]:
    from diffusers import DDIMScheduler, UNet2DModel  # seconds to import

    sizes = dict(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, add_attention=False)
    blocks = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(16)
        model: Any = UNet2DModel(**sizes, **blocks)  # type: ignore[arg-type]
    return [dict(model=model.eval().requires_grad_(False), scheduler=DDIMScheduler(timestep_spacing="trailing"))]


def _forgetful(model: Any, scheduler: Any) -> tuple[Tensor, ...]:
    """Leaves the quantizers in."""
    pictures = _round_trip(model, scheduler)
    quantize(model, **HOW)  # type: ignore[arg-type]
    return pictures[0], pictures[1], pictures[1]


round_trip = Check(
    _round_trip,
    _tiny,
    right="the model that went in came back, bit for bit.",
    seen=_pictures,
    gives=tuple,
    mistakes={
        "it leaves the quantizers in; call restore": _forgetful,
        "its second pictures are those of full precision; draw them while the model is quantized": (
            lambda model, scheduler: [_round_trip(model, scheduler)[i] for i in (0, 2, 2)]
        ),
        "it returns the pictures in another order": lambda model, scheduler: [
            _round_trip(model, scheduler)[i] for i in (1, 0, 2)
        ],
    },
)
