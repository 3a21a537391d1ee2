# %% [markdown]
# # Exercises 00 · Levels, intervals, distances
#
# **Goal.** Compute by hand the three numbers that the quickstart shows: how many levels there are, how wide the interval is, how far two pictures lie apart.
#
# **Prerequisites.** [00](../00_quickstart.ipynb). **Minutes:** 15.
#
# Replace each `raise NotImplementedError` by your code, run the cell, then the check below it. A check compares your function with the kit's on hidden inputs, and says in one sentence what is wrong.
# %%
import torch

from tdq_utils.show.checks import quickstart as checks


# %% [markdown]
# ## 1. How many levels? (3 minutes)
# With *b* bits there are $2^b$ integer levels. The symmetric grid has one more below zero than above: 8 bits run from -128 to 127.
# %% tags=["solution"]
def levels(bits):
    """``(q_min, q_max)``, the least and the greatest level of the symmetric grid."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


# %%
checks.levels(levels)


# %% [markdown]
# ## 2. The interval that truncates nothing (7 minutes)
# Min-max calibration: the smallest step size *s* at which $s\,q_{min}$ lies at or below every value and $s\,q_{max}$ at or above. Mind that the two ends do not have equally many levels.
# %% tags=["solution"]
def minmax_step(x, bits):
    """The smallest step size that truncates no value of tensor ``x``."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.maximum(x.min() / q_min, x.max() / q_max)


# %%
checks.minmax_step(minmax_step)


# %% [markdown]
# ## 3. How far apart are two pictures? (5 minutes)
# The quickstart's *distance*: the mean squared difference of pixels, for each picture to its twin of the same seed. A screen shows pixels from -1 to 1, so both pictures are cut to that range before they are compared.
# %% tags=["solution"]
def pixel_distance(images, clean):
    """Distances ``"image"`` of pictures ``"image channel height width"``, seed by seed."""
    return (images.clamp(-1, 1) - clean.clamp(-1, 1)).square().mean(dim=(1, 2, 3))


# %%
checks.pixel_distance(pixel_distance)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 01](../01_diffusion_in_five_minutes.ipynb)
