# %% [markdown]
# # Exercises 03 · Quantizers
#
# **Goal.** Write a quantizer, both of its gradients, and the search for its step size.
#
# **Prerequisites.** [03](../03_quantizers.ipynb). **Minutes:** 50.
# %%
import torch

from tdq_utils.show.checks import quantizers as checks


# %% [markdown]
# ## 1. A uniform quantizer (10 minutes)
# $\hat x = s \cdot \mathrm{clip}(\mathrm{round}(x / s),\ q_{min},\ q_{max})$ on the symmetric grid. Ties go to the even level, as in torch and in hardware: 2.5 becomes 2, and 1.5 too.
# %% tags=["solution"]
def fake_quantize(x, s, bits):
    """``x`` on the grid of step size ``s``, as floats."""
    return s * (x / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# %%
checks.fake_quantize(fake_quantize)


# %% [markdown]
# ## 2. Straight through (10 minutes)
# The gradient of `round` is zero almost everywhere, so nothing learns through it. The straight-through estimator rounds forward and pretends backward that it did not: $\mathrm{round}(x) = x + [\mathrm{round}(x) - x]$, with the bracket held fixed. `detach` holds it.
# %% tags=["solution"]
def straight_through(x):
    """``x`` rounded to whole numbers, with gradient 1."""
    return x + (x.round() - x).detach()


# %%
checks.straight_through(straight_through)


# %% [markdown]
# ## 3. LSQ's gradient by hand (15 minutes)
# What does each value tell the step size? With $u = x / s$: inside the grid $\mathrm{round}(u) - u$, outside the level of the end. No autograd here: write the derivative. A value is inside if its rounded level is on the grid.
# %% tags=["solution"]
def step_gradient(x, s, bits):
    """The derivative of each quantized value with respect to ``s``, ``"value"``."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    u = x / s
    level = u.round()
    return torch.where(level > q_max, q_max, torch.where(level < q_min, q_min, level - u))


# %%
checks.step_gradient(step_gradient)


# %% [markdown]
# ## 4. The step of least error (15 minutes)
# Search: try step sizes between a fiftieth of the min-max step and all of it, and keep the one with the least squared error. The check asks for an error within two per cent of the least, so try enough of them.
# %% tags=["solution"]
def best_step(x, bits):
    """The step size with (nearly) the least squared error on the symmetric grid."""
    widest = max(x.min() / -(2 ** (bits - 1)), x.max() / (2 ** (bits - 1) - 1))
    tried = [widest * share for share in torch.linspace(0.02, 1, 200)]
    return min(tried, key=lambda s: (fake_quantize(x, s, bits) - x).square().sum())


# %%
checks.best_step(best_step)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 04](../04_temporal_dynamic_quantization.ipynb)
