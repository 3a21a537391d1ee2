"""Record a model in its own pipeline, whoever calls it: what its layers get at each t, and, if asked, the calls themselves."""

import hashlib
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdq_utils.denoiser.call import each_tensor, now, read_call, time_argument, times_of
from tdq_utils.denoiser.profile import Profile
from tdq_utils.denoiser.recording import as_profile, made_by, recording
from tdq_utils.errors import TDQError, checked_whole

IN_MEMORY = 2**30  # bytes of kept calls; the tensors of later ones are mapped from files


class Calls:
    """Calls of a model as they were: what a pipeline passed, to run its model on it again. :func:`record` makes one.

    Serves as a calibration set, in the place of :class:`tdq_utils.fit.calibration_set.CalibrationSet`.

    Attributes:
        model: fingerprint of the model that was called. at: ``"recorded"``.
    """

    at = "recorded"

    def __init__(self, most: int) -> None:
        self.model, self.most, self.met = "", most, 0
        self._calls: list[tuple[Any, Any, dict[str, Any]]] = []
        self._generator, self._bytes, self._files = torch.Generator().manual_seed(0), 0, 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, sample: Any, t: Any, others: dict[str, Any]) -> None:
        """Keep a call, or not: of all that are met, each is among the ``most`` with equal chances (reservoir sampling)."""
        self.met += 1
        place = len(self) if len(self) < self.most else int(torch.randint(self.met, (), generator=self._generator))
        if place < self.most:
            self._calls[place : place + 1] = [each_tensor(self._kept, (sample, t, others))]

    def _kept(self, tensor):
        """A copy of a tensor on the CPU; past ``IN_MEMORY``, mapped from a file."""
        self._bytes += tensor.nbytes
        if self._bytes <= IN_MEMORY or not tensor.numel():
            return tensor.detach().to("cpu", copy=True)
        self._folder, self._files = self._folder or tempfile.TemporaryDirectory(prefix="calls-"), self._files + 1
        path = str(Path(self._folder.name) / str(self._files))
        mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return mapped.copy_(tensor.detach().flatten()).view(tensor.shape)

    def digest(self) -> str:
        """Twelve hex digits that tell sets of calls apart: a hash of all tensors."""
        found = hashlib.sha256()

        def add(tensor: torch.Tensor) -> torch.Tensor:
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return tensor

        each_tensor(add, self._calls)
        return found.hexdigest()[:12]

    def batches(self, batch_size: int = 0, device: str | torch.device = "cpu") -> Iterator[tuple]:
        """Every call, ``(sample, t, others by name)``, on ``device``: as large as it was, whatever ``batch_size``."""
        yield from (self._moved(call, device) for call in self._calls)

    def draw(self, batch_size: int, generator: torch.Generator, device: str | torch.device = "cpu") -> tuple:
        """One call at random, as :meth:`batches` gives it."""
        return self._moved(self._calls[int(torch.randint(len(self), (), generator=generator))], device)

    def _moved(self, call, device):
        return each_tensor(lambda tensor: tensor.to(device), call)


@dataclass
class Recorded:
    """What :func:`record` has seen; complete when it is closed.

    Attributes:
        model: that was recorded. t: time steps, as received, in the order of the calls, one a call. inputs: :class:`Calls`, if
            they were asked for.
    """

    model: nn.Module
    t: list[float] = field(default_factory=list)
    inputs: Calls | None = None
    _profile: Profile | None = None

    @property
    def profile(self) -> Profile:
        """Statistics of the layers' inputs, in less than 300 MB of memory. TDQError: still open, or no calls."""
        if self._profile is None:
            raise TDQError("A recording must be closed, and must have seen calls; this one is open, or was left by an error. "
                           "Read recorded.profile after the with block.")  # fmt: skip
        return self._profile


@contextmanager
def record(model: nn.Module, inputs: int = 0, layers: Container[str] | None = None) -> Iterator[Recorded]:
    """While open, record every call of ``model``: in its own pipeline, or in any other run.

    The time step of each call is read from the call itself, in the unit in which it comes; guided halves and separate calls
    count alike. The model is not changed. ::

        with record(pipe.transformer) as recorded:
            pipe(prompt, num_inference_steps=20)
        quantize(pipe.transformer, weights=8, activations=8, method="tdq")
        calibrate(pipe.transformer, profile=recorded.profile)
        freeze(pipe.transformer)

    Args:
        model: any module whose ``forward`` takes a time step (``timestep``, ``timesteps`` or ``t``).
        inputs: how many calls to keep as they were, a random choice of all, in ``recorded.inputs``; past 1 GiB on disk.
        layers: dotted names to record, default: every conv and linear layer.

    TDQError: no call was made, samples of one call at different t, activations that are not finite, a layer that did not run
    at every t.
    """
    time_argument(model)
    recorded = Recorded(model, inputs=Calls(checked_whole("inputs", inputs, 1)) if inputs else None)

    def see(module, args, kwargs):
        sample, t, others = read_call(module, args, kwargs)
        recorded.t += (now() or times_of(t, len(sample))).values
        if recorded.inputs is not None:
            recorded.inputs.add(sample, t, others)

    with recording(model, layers) as cells:
        handle = model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield recorded
        finally:
            handle.remove()
    if not cells:
        raise TDQError("The model must be called inside `with record(model)`, and its layers must run; it was called "
                       f"{len(recorded.t)} times. Run the pipeline there, and pass the module that it calls.")  # fmt: skip
    recorded._profile = as_profile(cells, made_by(model))
    if recorded.inputs is not None:
        recorded.inputs.model = recorded._profile.model
