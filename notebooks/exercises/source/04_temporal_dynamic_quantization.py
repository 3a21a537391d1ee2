# %% [markdown]
# # Exercises 04 · A step size that knows the time
#
# **Goal.** Write the four pieces of TDQ: how *t* is encoded, where s(t) starts, what it learns from, and how it vanishes.
#
# **Prerequisites.** [04](../04_temporal_dynamic_quantization.ipynb) and exercise 3 of [03](03_quantizers.ipynb). **Minutes:** 50.
# %%
import math

import torch

from tdq_utils.show.checks import generator as checks


# %% [markdown]
# ## 1. Fourier features (10 minutes)
# $[\cos(t\,w_i), \sin(t\,w_i)]$ with $w_i = 10000^{-i/\mathrm{half}}$, $i = 0 \ldots \mathrm{half} - 1$, half = width / 2. First all cosines, then all sines.
# %% tags=["solution"]
def fourier_features(t, width):
    """Time steps ``"batch"`` -> features ``"batch width"``."""
    half = width // 2
    angles = t[:, None] * 10_000 ** (-torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


# %%
checks.fourier_features(fourier_features)


# %% [markdown]
# ## 2. Start at s_0 (10 minutes)
# The generator ends in softplus, $\log(1 + e^z)$. Which *z* gives $s_0$? The formula is short; written down as it is, it fails for large $s_0$ (the exponential overflows) or loses digits for small ones. `math.expm1` and the rule $\log(e^s - 1) = s + \log(1 - e^{-s})$ help.
# %% tags=["solution"]
def inverse_softplus(s):
    """The number ``z`` with ``softplus(z) = s``, for a positive float ``s``."""
    return s + math.log(-math.expm1(-s))


# %%
checks.inverse_softplus(inverse_softplus)


# %% [markdown]
# ## 3. The gradient goes on (15 minutes)
# Let $s = \mathrm{softplus}(z)$, and *z* what the generator's last layer gives. By the chain rule, what does the sum of all quantized values tell *z*? Take LSQ's gradient from exercise 3 of lesson 03, and the derivative of softplus, which is the sigmoid. By hand once more.
# %% tags=["solution"]
def generator_gradient(x, z, bits):
    """The derivative of ``fake_quantize(x, softplus(z), bits).sum()`` with respect to ``z``, shape ``""``."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    u = x / torch.nn.functional.softplus(z)
    level = u.round()
    to_s = torch.where(level > q_max, q_max, torch.where(level < q_min, q_min, level - u)).sum()
    return to_s * torch.sigmoid(z)


# %%
checks.generator_gradient(generator_gradient)


# %% [markdown]
# ## 4. Freeze (15 minutes)
# Sampling visits a few known time steps. Evaluate the generator (a `StepGenerator` of the kit) at each of them and keep plain numbers. It has dropout, which must be off while you do that; and whoever is training it wants it back in the mode it was in (`generator.training`). `generator.at(tensor)` gives s(t) for a batch of *t*.
# %% tags=["solution"]
def freeze(generator, t):
    """``{t: s(t)}`` for a list of time steps, as numbers, in the order of the list."""
    was_training = generator.training
    generator.eval()
    with torch.no_grad():
        s = generator.at(torch.tensor(t)).tolist()
    generator.train(was_training)
    return dict(zip(t, s, strict=True))


# %%
checks.freeze(freeze)
# %% [markdown]
# Try it on a generator of your own: `from tdq_utils import StepGenerator`, then `freeze(StepGenerator(0.1), [999, 499, 0])`.
#
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 05](../05_ptq.ipynb)
