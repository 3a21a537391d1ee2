# %% [markdown]
# # Exercises 07 · Train through the rounding
#
# **Goal.** Write the loss that is trained, and what each method puts in the place of rounding.
#
# **Prerequisites.** [07](../07_qat.ipynb), exercises of [01](01_diffusion_in_five_minutes.ipynb) and [03](03_quantizers.ipynb). **Minutes:** 50.
# %%
import torch

from tdq_utils.show.checks import training as checks


# %% [markdown]
# ## 1. The denoising loss (15 minutes)
# Make the pictures noisy, each at its own *t*; ask the model for the noise, `model(x_t, t)`; take the mean squared error.
# %% tags=["solution"]
def denoising_loss(model, x_0, eps, t, alpha_bar):
    """The loss, shape ``""``, of pictures and noise ``"batch channel height width"`` at ``t`` ``"batch"``."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    return (model(x_t, t) - eps).square().mean()


# %%
checks.denoising_loss(denoising_loss)


# %% [markdown]
# ## 2. LSQ's factor (5 minutes)
# A step size hears the sum of *n* values, a weight hears its own. So LSQ multiplies the gradient of the step size by $1 / \sqrt{n\,q_{max}}$.
# %% tags=["solution"]
def lsq_factor(n, q_max):
    """The factor, a number."""
    return (n * q_max) ** -0.5


# %%
checks.lsq_factor(lsq_factor)


# %% [markdown]
# ## 3. PACT's gradient (15 minutes)
# PACT clips *x* to $[s\,q_{min}, s\,q_{max}]$ and rounds straight through. So only clipped values have a gradient with respect to *s*: that of the end which they were cut to. A value is clipped if it lies beyond the end itself, however little; compare with LSQ, where half a step beyond is still inside.
# %% tags=["solution"]
def pact_gradient(x, s, bits):
    """The derivative of each clipped value with respect to ``s``, ``"value"``."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    above, below = x > q_max * s, x < q_min * s
    return q_max * above.float() + q_min * below.float()


# %%
checks.pact_gradient(pact_gradient)


# %% [markdown]
# ## 4. NIPQ's noise (15 minutes)
# NIPQ does not round in training. It clips to the ends of the grid, then adds noise that is uniform over one step. `noise` is given, uniform over [-0.5, 0.5].
# %% tags=["solution"]
def noisy_quantize(x, s, bits, noise):
    """Clipped ``x`` plus noise one step wide."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.minimum(torch.maximum(x, q_min * s), q_max * s) + s * noise


# %%
checks.noisy_quantize(noisy_quantize)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 08](../08_integer_inference.ipynb)
