# %% [markdown]
# # Exercises 02 · Measure drift
#
# **Goal.** Write the measures by which the lesson tells drifting layers from calm ones, and compute one of them without keeping an activation.
#
# **Prerequisites.** [02](../02_activation_drift.ipynb). **Minutes:** 45.
# %%
import torch

import tdq_utils as tdq
from tdq_utils.show.checks import drift as checks


# %% [markdown]
# ## 1. The range of a step (5 minutes)
# The lesson's *range* is the 99.9th percentile of the magnitude |x|: what lies beyond is one value in a thousand.
# %% tags=["solution"]
def reach(x):
    """Ranges ``"step"`` of recorded values ``"step value"``."""
    return x.abs().quantile(0.999, dim=1)


# %%
checks.reach(reach)


# %% [markdown]
# ## 2. How far, and how steadily? (10 minutes)
# *Ratio*: the largest range over the smallest. *Correlation*: Pearson's *r* of the range with *t*, the covariance divided by both standard deviations.
# %% tags=["solution"]
def drift(reach, t):
    """``(ratio, correlation)`` of ranges ``"step"`` at time steps ``"step"``."""
    t = t.float()
    covariance = ((reach - reach.mean()) * (t - t.mean())).mean()
    r = covariance / (reach.std(correction=0) * t.std(correction=0))
    return (reach.max() / reach.min()).item(), r.item()


# %%
checks.drift(drift)


# %% [markdown]
# ## 3. What could be gained? (15 minutes)
# By how many dB does the squared error fall if the best constant is replaced by the best step size of each step? A gain in dB is $10 \log_{10}$ of the ratio of two errors, each summed over all steps.
#
# You need `profile.best_steps(layer, bits)`, which gives `(constant, per step)`; `profile.values(layer)`, which gives `(values, counts)`; `profile.grid(layer, bits)`; and `tdq.squared_error(values, counts, s, grid)`, with one *s* for each step (`s.expand(len(values))` for a constant).
# %% tags=["solution"]
def gain_db(profile, layer, bits):
    """The gain of a layer, a number in dB."""
    (values, counts), grid = profile.values(layer), profile.grid(layer, bits)
    fixed, free = (tdq.squared_error(values, counts, s.expand(len(values)), grid).sum() for s in profile.best_steps(layer, bits))
    return (10 * torch.log10(fixed / free)).item()


# %%
checks.gain_db(gain_db)


# %% [markdown]
# ## 4. A percentile without the data (15 minutes)
# `profile_activations` keeps counts alone: an even number of equal bins over [-limit, limit]. Find the q-th percentile of the *magnitude*: fold the negative half onto the positive one, add up, and give the upper edge of the first bin at which the share reaches q / 100.
# %% tags=["solution"]
def histogram_percentile(counts, limit, q):
    """The q-th percentile (0..100) of |x|, to the width of a bin, from ``counts`` ``"bin"``."""
    half = len(counts) // 2
    folded = counts[half:] + counts[:half].flip(0)
    share = folded.cumsum(0) / folded.sum()
    return (1 + (share < q / 100).sum().item()) * limit / half


# %%
checks.histogram_percentile(histogram_percentile)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 03](../03_quantizers.ipynb)
