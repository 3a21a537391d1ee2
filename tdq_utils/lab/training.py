"""Train the networks that ship in data/: the denoiser; a transformer with classes, by flow matching; the feature classifier."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from tdq_utils.denoiser.loading import checked_device
from tdq_utils.errors import TDQError
from tdq_utils.fit.loop import Trainer, denoising_loss, drawn, iteration_generator, noised
from tdq_utils.lab.datasets import load_images
from tdq_utils.lab.fid import FeatureClassifier, Statistics, extract_features

# Scale-shift conditioning: activations depend on t the way larger models' do. Trailing: the first step is t = 999, pure noise.
UNET: dict[str, Any] = dict(
    sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64), layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), resnet_time_scale_shift="scale_shift",
)  # fmt: skip
SCHEDULER = dict(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon", timestep_spacing="trailing")
DIT: dict[str, Any] = dict(sample_size=28, in_channels=1, out_channels=1, patch_size=2, num_layers=6, num_attention_heads=4,
                           attention_head_dim=32, num_embeds_ada_norm=10)  # fmt: skip
FLOW = FlowMatchEulerDiscreteScheduler()
NO_CLASS = 10  # the label that stands for none: what guidance compares with
LABEL_DROPOUT = 0.1


def learning_rate(iteration: int, iterations: int, peak: float = 1e-3, warmup: int = 200, decay: float = 0.3) -> float:
    """Warm-up, constant, then a linear fall to zero over the last ``decay`` of the run.

    Up to the fall it does not depend on ``iterations``: a run that is lengthened or ended early is still that of its options."""
    fall = (iterations - iteration) / max(1, round(decay * iterations))
    return peak * min(1.0, (iteration + 1) / warmup, fall)


def train_unet(out: str | Path, iterations: int = 5400, batch: int = 128, seed: int = 0, ema_decay: float = 0.999,
               root: str | Path | None = None, compiled: bool = False, device: str = "cpu") -> Path:  # fmt: skip
    """Train the shipped denoiser on the 60,000 training images; resume if ``out`` holds a run.

    Randomness of iteration i depends on (seed, i) alone and the state is saved every minute: a killed run loses only that.

    Args:
        out: folder for ``state.pt`` (resume) and ``model/`` (EMA weights in diffusers' layout, ``loss.csv``), which is returned.
        iterations: optimizer steps. batch: images a step. seed: of weights, data order and noise.
        ema_decay: of the exponential moving average of the weights. root: as in :func:`tdq_utils.lab.datasets.load_images`.
        compiled: run the residual blocks through ``torch.compile``, after a check of their gradients. device: cpu or cuda."""
    checked_device(device)
    images = load_images(split="train", root=root).to(device)
    scheduler = DDIMScheduler(**SCHEDULER)
    torch.manual_seed(seed)
    model: Any = UNet2DModel(**UNET)
    model.to(device, memory_format=torch.channels_last)
    loss_of = partial(denoising_loss, model, images, scheduler, batch)
    if compiled:
        compile_blocks(model, lambda: loss_of(iteration_generator(seed, 0)))
    return _train(DDIMPipeline(model, scheduler), model, loss_of, Path(out), iterations, seed, ema_decay, "train-unet")


def flow_matching_loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int,
                       generator: torch.Generator) -> torch.Tensor:  # fmt: skip
    """Rectified flow (:func:`tdq_utils.fit.loop.noised`): images are flipped and labels dropped at random, the model runs in
    bfloat16."""
    pick, sigma, eps = drawn(FLOW, images, batch, generator)
    flip = torch.rand(batch, generator=generator) < 0.5
    y = torch.where(torch.rand(batch, generator=generator) < LABEL_DROPOUT, NO_CLASS, labels[pick])
    x_0 = torch.where(flip.view(-1, 1, 1, 1), images[pick].flip(3), images[pick])
    x_t, t, target = noised(FLOW, x_0, sigma, eps)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(x_t, t, class_labels=y).sample
    return F.mse_loss(velocity.float(), target)


def train_dit(out: str | Path, iterations: int = 8000, batch: int = 64, seed: int = 0, ema_decay: float = 0.999,
              root: str | Path | None = None) -> Path:  # fmt: skip
    """Train the shipped transformer on the 60,000 labelled training images; resume if ``out`` holds a run.

    As :func:`train_unet`, which explains the arguments, but for the loss and the model. The folder that is returned has no
    autoencoder: read it with ``DiTPipeline.from_pretrained(folder, vae=None)``."""
    images, labels = load_images(split="train", root=root, labels=True)
    torch.manual_seed(seed)
    model: Any = DiTTransformer2DModel(**DIT)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block would drop labels of its own: they are dropped before the model instead
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())  # plain products: the fused kernel of torch takes half of an iteration on a CPU
    loss_of = partial(flow_matching_loss, model, images, labels, batch)
    pipeline = DiTPipeline(model, None, FLOW)
    # foreach=False: so was the network that ships averaged, and the sum differs in its last bits.
    return _train(pipeline, model, loss_of, Path(out), iterations, seed, ema_decay, "train-dit", foreach=False)


def _train(pipeline: Any, model: Any, loss_of: Callable[[torch.Generator], torch.Tensor], out: Path, iterations: int, seed: int,
           ema_decay: float, title: str, foreach: bool = True) -> Path:  # fmt: skip
    """Train the model of a pipeline, or go on; leave its average in ``out/model``, in diffusers' layout, with ``loss.csv``:
    the loss curve as means of 50 steps."""
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    trainer = Trainer(model, optimizer, ema_decay, out / "state.pt")
    trainer.ema.foreach = foreach
    log = trainer.run(loss_of, lambda i: learning_rate(i, iterations), iterations, seed, title)
    model.cpu().to(memory_format=torch.contiguous_format).eval()
    pipeline.save_pretrained(out / "model")
    parts = {min(i + 50, len(log)): log[i : i + 50] for i in range(0, len(log), 50)}
    lines = [f"{last},{sum(part) / len(part):.5f}" for last, part in parts.items()]
    (out / "model" / "loss.csv").write_text("\r\n".join(["iteration,loss", *lines, ""]), newline="")
    return out / "model"


def compile_blocks(model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """Compile the residual blocks of ``model`` in place. TDQError: a gradient of ``loss()``, the same scalar each time, changes.

    Block by block, because torch 2.13 compiles the whole model to a backward pass on the CPU in which most convolution weights
    silently get gradient zero: the loss still falls, to 0.042 instead of below 0.04."""
    eager = _gradients(model, loss)
    torch._dynamo.config.recompile_limit = 64  # one variant for each shape of block
    for block in model.modules():
        if isinstance(block, ResnetBlock2D):
            block.compile()
    check_gradients(eager, _gradients(model, loss))


def check_gradients(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], tolerance: float = 1e-3) -> None:
    """TDQError: two dicts of gradients by name differ by more than ``tolerance`` of the largest norm of all."""
    largest = max(gradient.norm() for gradient in expected.values())
    errors = {name: ((actual[name] - expected[name]).norm() / largest).item() for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= tolerance:
        raise TDQError(f"compiled gradients must equal eager ones within {tolerance}; {worst} differs by {errors[worst]:.2g}: "
                       f"torch {torch.__version__} miscompiles this model here, train without --compile")  # fmt: skip


def _gradients(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    loss().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def train_classifier(out: str | Path, epochs: int = 8, batch: int = 128, seed: int = 0, root: str | Path | None = None) -> float:
    """Train the feature classifier on the 60,000 training images; return its accuracy on the 10,000 test images.

    AdamW with a one-cycle rate (peak 3e-3), random horizontal flips, label smoothing 0.05. ``out``: folder for
    ``model.safetensors``, ``metrics.json`` and ``fashion-mnist-test.npz``; ``root``: as for ``load_images``."""
    out, (images, labels) = Path(out), load_images(split="train", root=root, labels=True)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    classifier = FeatureClassifier().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    per_epoch = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * per_epoch)
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for rows in tqdm(order[: per_epoch * batch].split(batch), desc=f"epoch {epoch + 1}/{epochs}", mininterval=5):
            x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images[rows].flip(3), images[rows])
            loss = F.cross_entropy(classifier.logits(x), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval().requires_grad_(False)
    images, labels = load_images(split="test", labels=True)
    right = torch.cat([classifier.logits(part).argmax(1) for part in images.split(500)]) == labels
    accuracy = right.float().mean().item()
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, out / "model.safetensors")
    Statistics.of(extract_features(images, classifier)).save(out / "fashion-mnist-test.npz")
    (out / "metrics.json").write_text(json.dumps(dict(test_accuracy=accuracy, epochs=epochs, seed=seed), indent=1) + "\n")
    return accuracy
