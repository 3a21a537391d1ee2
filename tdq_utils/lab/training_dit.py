"""Train the second network that ships in data/: a small transformer with classes, by flow matching."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from torch import nn
from torch.nn import functional as F

from tdq_utils.fit.loop import Trainer
from tdq_utils.lab.datasets import load_images
from tdq_utils.lab.training import export, learning_rate

DIT: dict[str, Any] = dict(sample_size=28, in_channels=1, out_channels=1, patch_size=2, num_layers=6, num_attention_heads=4,
                           attention_head_dim=32, num_embeds_ada_norm=10)  # fmt: skip
NO_CLASS = 10  # the label that stands for none: what guidance compares with
LABEL_DROPOUT = 0.1


def flow_matching_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int,
                       generator: torch.Generator) -> torch.Tensor:  # fmt: skip
    """Rectified flow: ``x_t = (1 - sigma) x_0 + sigma eps``, the model predicts ``eps - x_0`` at ``t = 1000 sigma``.

    sigma is logit-normal (Esser et al. 2024); images are flipped and labels dropped at random; the model runs in bfloat16."""
    pick = torch.randint(len(images), (batch,), generator=generator)
    sigma = torch.randn(batch, generator=generator).sigmoid()
    eps = torch.randn(batch, *images.shape[1:], generator=generator)
    flip = torch.rand(batch, generator=generator) < 0.5
    y = torch.where(torch.rand(batch, generator=generator) < LABEL_DROPOUT, NO_CLASS, labels[pick])
    x_0 = torch.where(flip.view(-1, 1, 1, 1), images[pick].flip(3), images[pick])
    wide = sigma.view(-1, 1, 1, 1)
    x_t = (1 - wide) * x_0 + wide * eps
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(x_t, 1000 * sigma, class_labels=y).sample
    return F.mse_loss(velocity.float(), eps - x_0)


def train_dit(out: str | Path, iterations: int = 8000, batch: int = 128, seed: int = 0, ema_decay: float = 0.999,
              root: str | Path | None = None) -> Path:  # fmt: skip
    """Train the shipped transformer on the 60,000 labelled training images; resume if ``out`` holds a run.

    As :func:`tdq_utils.lab.training.train_unet`, which explains the arguments, but for the loss and the model. The folder
    that is returned has no autoencoder: read it with ``DiTPipeline.from_pretrained(folder, vae=None)``."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load_images(split="train", root=root, labels=True)
    torch.manual_seed(seed)
    model: Any = DiTTransformer2DModel(**DIT)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block would drop labels of its own: they are dropped before the model instead
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    trainer = Trainer(model, optimizer, ema_decay, out / "state.pt")
    trainer.ema.foreach = False  # so was the network that ships averaged: the sum differs in its last bits
    loss_of = partial(flow_matching_loss, model, images, labels, batch)
    log = trainer.run(loss_of, lambda i: learning_rate(i, iterations), iterations, seed, "train-dit")
    return export(out / "model", DiTPipeline(model.eval(), None, FlowMatchEulerDiscreteScheduler()), log)
