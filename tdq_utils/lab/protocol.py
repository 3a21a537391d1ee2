"""What the numbers of a table are measured against, and how images are asked for: all that its rows must share."""

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdq_utils.denoiser.loading import matches_flow
from tdq_utils.denoiser.sampling import image_shape
from tdq_utils.denoiser.trajectory import opposite
from tdq_utils.errors import TDQError, checked_whole
from tdq_utils.lab.datasets import SPLITS, load_images, splits_of, to_uint8
from tdq_utils.lab.results import SHIPPED, Row

CLASSES = ("num_embeds_ada_norm", "num_class_embeds")  # what configurations call the number of classes
LABEL_DROPOUT = 10  # of so many images that a guided model is trained on, one has no class


@dataclass(frozen=True)
class Reference:
    """A data set as :func:`tdq_utils.lab.datasets.load_images` names it: what distances compare with.

    Attributes:
        data: name or folder. root, download: as for ``load_images``."""

    data: str = "fashion-mnist"
    root: str | None = None
    download: bool = False

    def images(self, split: str | None = None, labels: bool = False) -> Any:
        """Its images, of a split (default: the one that distances compare with), and their labels."""
        return load_images(self.data, split or splits_of(self.data)[0], self.root, self.download, labels)

    @cached_property
    def identity(self) -> str:
        """What tells it apart: its name; of a folder, also digits of its pictures."""
        if self.data in SPLITS:
            return self.data
        return f"{Path(self.data).resolve().name}-{sha256(to_uint8(self.images()).numpy().tobytes()).hexdigest()[:8]}"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.images().shape[1:])

    @cached_property
    def others(self) -> int:
        """How many real images there are beside those that are compared with."""
        split = splits_of(self.data)[1]
        return len(self.images(split)) if split else 0

    def real(self, n: int, first: int) -> Tensor:
        """``n`` of the others, from number ``first`` on, around the end."""
        return self.images(splits_of(self.data)[1])[[(first + i) % self.others for i in range(n)]]


@dataclass(frozen=True)
class Protocol:
    """How a table is measured, beside its jobs.

    Attributes:
        reference: what distances compare with. guidance: w of ``sample``, or none.
        classes: of a class-conditional model: image i is of class ``seed % classes``; default: as many as its config names."""

    reference: Reference = Reference()
    guidance: float | None = None
    classes: int | None = None

    def row(self, model: Any, scheduler: Any) -> Row:
        """The columns that say so."""
        prediction = "flow" if matches_flow(scheduler) else scheduler.config.get("prediction_type", "-")
        guidance, dtype = "-" if self.guidance is None else f"{self.guidance:g}", next(model.parameters()).dtype
        how = dict(classes=self._classes(model), guidance=guidance, dtype=str(dtype).removeprefix("torch."))
        return dict(sampler=sampler_name(scheduler), data=self.reference.identity, prediction=prediction, **how)

    def folder(self, cache: Path, model: Any, scheduler: Any) -> Path:
        """Where a cache keeps what was made so; the cache itself for what the shipped tables were made with."""
        row = self.row(model, scheduler)
        if row == SHIPPED | dict(sampler="DDIM"):
            return cache
        return cache / sha256("\n".join(f"{name}={row[name]}" for name in sorted(row)).encode()).hexdigest()[:12]

    def asking(self, model: Any, seeds: Sequence[int]) -> dict[str, Any]:
        """Further arguments of ``sample`` for these seeds."""
        classes = self._classes(model)
        condition = dict(condition=dict(class_labels=torch.tensor(seeds) % classes)) if classes else {}
        return condition | (dict(guidance=self.guidance) if self.guidance is not None else {})

    def training(self, model: Any) -> tuple[Tensor, dict[str, Any]]:
        """``(images, further arguments)`` of ``finetune``: where it is guided, some images are without their class."""
        split = splits_of(self.reference.data)[2]
        if not self._classes(model):
            return self.reference.images(split), {}
        images, labels = self.reference.images(split, labels=True)
        if labels.max() >= (classes := self._classes(model)):
            raise TDQError(f"Training images must be of the model's {classes} classes; {self.reference.data} has "
                           f"{int(labels.max()) + 1}. Pass other --data, or --classes 0 to train without.")  # fmt: skip
        condition = dict(class_labels=labels)
        if self.guidance is not None:
            labels[::LABEL_DROPOUT] = opposite(model, condition)["class_labels"][::LABEL_DROPOUT]
        return images, dict(condition=condition)

    def check(self, model: Any, features: str) -> None:
        """TDQError: images of another shape than the reference's, features for others, guidance of what has no classes."""
        made, real = tuple(image_shape(model)), self.reference.shape
        if made != real:
            raise TDQError(f"The reference set must have images like the model's; {self.reference.data} has {real}, the model "
                           f"makes {made}. Pass --data with another set: a name or a folder of pictures.")  # fmt: skip
        if features == "classifier" and real != (1, 28, 28):
            raise TDQError(f"features='classifier' knows images (1, 28, 28); {self.reference.data} has {real}. Pass "
                           "--features inception.")  # fmt: skip
        classes = self._classes(model)
        if self.guidance is not None:
            if not classes:
                raise TDQError(f"guidance={self.guidance:g} needs a model with classes; this one has none. Leave it out.")
            opposite(model, dict(class_labels=torch.zeros(1, dtype=torch.int64)))

    def _classes(self, model: Any) -> int:
        if self.classes is not None:
            return checked_whole("classes", self.classes, 0)
        named = (getattr(model.config, name, None) for name in CLASSES)
        return next((number for number in named if number), 0)


def sampler_name(scheduler: Any) -> str:
    """A scheduler in a word, and what of its configuration is not at its default; "DDIM": trailing, as the shipped tables."""
    name, config = type(scheduler).__name__.removesuffix("Scheduler"), scheduler.config
    usual = {key: p.default for key, p in inspect.signature(type(scheduler).__init__).parameters.items()}
    usual = usual | dict(prediction_type=config.get("prediction_type"))  # has a column of its own
    usual |= dict(timestep_spacing="trailing") if "timestep_spacing" in usual else {}
    other = [f"{key}={config[key]}" for key in sorted(usual.keys() & config.keys()) if config[key] != usual[key]]
    return " ".join([name, *other]).replace(",", ";")  # a cell of a CSV


def without_missing(jobs: Sequence[Any], reference: Reference, images: int) -> list[Any]:
    """The jobs, less the rows of real images if ``reference`` has no others of that number, with a warning."""
    kept = [job for job in jobs if job.method != "real images"]
    if len(kept) == len(jobs) or reference.others >= images:
        return list(jobs)
    warnings.warn(f"No rows of real images: {reference.data} has {reference.others} beside those that are compared with, fewer "
                  f"than {images}.", stacklevel=3)  # fmt: skip
    return kept
