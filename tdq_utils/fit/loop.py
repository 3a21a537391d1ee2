"""What every training needs: the loss, averages of weights, and a state on disk to go on from."""

import torch
import torch.nn.functional as F


def iteration_generator(seed, iteration):
    """Random numbers that depend on the seed and the iteration alone, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 10_000_000 + iteration)


def denoising_loss(forward, images, scheduler, batch, generator, teacher=None, distill=0.0):
    """The ordinary DDPM loss (Ho et al. 2020, eq. 14): mean squared error of the predicted noise.

    With a ``teacher``, ``distill`` of it (0 to 1) is the error against what the teacher predicts from the same input.
    """
    pick = torch.randint(len(images), (batch,), generator=generator)
    t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
    eps = torch.randn(batch, *images.shape[1:], generator=generator)
    x_0, t, eps = (v.to(images.device) for v in (images[pick.to(images.device)], t, eps))
    x_t = scheduler.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
    predicted = forward(x_t, t).sample
    if teacher is None:
        return F.mse_loss(predicted, eps)
    with torch.no_grad():
        taught = teacher(x_t, t).sample
    return (1 - distill) * F.mse_loss(predicted, eps) + distill * F.mse_loss(predicted, taught)


@torch.no_grad()
def update_ema(ema, model, decay, iteration):
    """Move the average of the parameters on; ``decay`` grows from 0.1 to its value over the first iterations."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    for averaged, current in zip(ema.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def save_state(path, iteration, log, **parts):
    """Write the state of a run: iterations done, their losses, and the state dict of each part."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"iteration": iteration, "log": log, **state}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)  # a kill leaves the old state or the new, never half


def load_state(path, **parts):
    """Load a saved state into ``parts``; return the iteration to go on from and the loss log."""
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["iteration"], state["log"]
