# %% [markdown]
# # Exercises 01 · Noise in, noise out
#
# **Goal.** Write all of DDIM: add noise, guess the picture, take a step, choose the steps.
#
# **Prerequisites.** [01](../01_diffusion_in_five_minutes.ipynb). **Minutes:** 35.
#
# The checks compare with diffusers' own scheduler.
# %%
import torch

from tdq_utils.show.checks import diffusion as checks


# %% [markdown]
# ## 1. The forward process (10 minutes)
# $x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$. Here each picture of the batch has a *t* of its own, as in training. `alpha_bar[t]` is then `"batch"`: give it a shape that meets the pictures along the right axis.
# %% tags=["solution"]
def add_noise(x_0, eps, t, alpha_bar):
    """Noisy pictures ``"batch channel height width"``, from pictures, noise, ``t`` ``"batch"`` and the table ``alpha_bar``."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


# %%
checks.forward_process(add_noise)


# %% [markdown]
# ## 2. The guess (5 minutes)
# Solve the same equation for $x_0$. From now on, *t* is one number for the whole batch.
# %% tags=["solution"]
def clean_guess(x_t, eps, t, alpha_bar):
    """The picture that noise ``eps`` was added to, if the model is right about it."""
    a = alpha_bar[t]
    return (x_t - (1 - a).sqrt() * eps) / a.sqrt()


# %%
checks.clean_guess(clean_guess)


# %% [markdown]
# ## 3. A step of DDIM (10 minutes)
# Guess the picture, clip it to [-1, 1], and put back the noise that belongs to `t_next`; `eps` stays as the model gave it. After the last step `t_next` is -1, and there $\bar\alpha = 1$.
# %% tags=["solution"]
def ddim_step(x_t, eps, t, t_next, alpha_bar):
    """``x`` at ``t_next``, from ``x`` at ``t`` and the noise that the model predicted."""
    guess = clean_guess(x_t, eps, t, alpha_bar).clamp(-1, 1)
    a = alpha_bar[t_next] if t_next >= 0 else torch.tensor(1.0)
    return a.sqrt() * guess + (1 - a).sqrt() * eps


# %%
checks.ddim_step(ddim_step)


# %% [markdown]
# ## 4. Which steps? (10 minutes)
# A model that was trained on 1000 time steps knows 0 to 999. Sampling with 20 steps and "trailing" spacing visits 999, 949, ..., 49: from noise to picture, evenly, beginning at the noisiest step of all. You may take `train_steps` to be a multiple of `steps`.
# %% tags=["solution"]
def visited_steps(train_steps, steps):
    """List of ``steps`` time steps, noise first."""
    return list(range(train_steps - 1, -1, -(train_steps // steps)))


# %%
checks.visited_steps(visited_steps)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 02](../02_activation_drift.ipynb)
