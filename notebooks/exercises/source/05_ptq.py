# %% [markdown]
# # Exercises 05 · Distances that can be trusted
#
# **Goal.** Compute a Frechet distance from its moments, see by an experiment why *n* is part of it, and state a gain honestly.
#
# **Prerequisites.** [05](../05_ptq.ipynb). **Minutes:** 45.
# %%
import torch

from tdq_utils.show.checks import ptq as checks


# %% [markdown]
# ## 1. Moments (10 minutes)
# A Frechet distance knows of a set of images only the mean and the covariance of their features. The covariance is the unbiased one: divided by *n* - 1.
# %% tags=["solution"]
def moments(features):
    """``(mean, covariance)``, ``"feature"`` and ``"feature feature"``, of features ``"image feature"``."""
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


# %%
checks.moments(moments)


# %% [markdown]
# ## 2. The Frechet distance (15 minutes)
# $|\mu_a - \mu_b|^2 + \mathrm{tr}\,(\Sigma_a + \Sigma_b - 2\,(\Sigma_a \Sigma_b)^{1/2})$. The root is that of a matrix, not of its entries. Its trace is easier than the root itself: the sum of the roots of the eigenvalues. `torch.linalg.eigvals` gives them as complex numbers; take the real part of their roots.
# %% tags=["solution"]
def frechet(mu_a, sigma_a, mu_b, sigma_b):
    """The distance of two Gaussians, a number."""
    roots = torch.linalg.eigvals(sigma_a @ sigma_b).sqrt().real
    return ((mu_a - mu_b).square().sum() + (sigma_a + sigma_b).trace() - 2 * roots.sum()).item()


# %%
checks.frechet(frechet)


# %% [markdown]
# ## 3. Why n matters (10 minutes)
# Two sets of one and the same distribution should be at distance 0. Measure the distance of the first *n* images to the whole reference, for several *n*. Print it for `torch.randn(1000, 8)` against another such set: how does it fall with *n*?
# %% tags=["solution"]
def distance_by_n(features, reference, sizes):
    """List of distances: of the first n features to all of ``reference``, for each n of ``sizes``."""
    return [frechet(*moments(features[:n]), *moments(reference)) for n in sizes]


# %%
checks.distance_by_n(distance_by_n)


# %% [markdown]
# ## 4. The gap that is closed (10 minutes)
# The README says: TDQ closes 22 % of the gap between the best static interval and full precision. Each argument holds one distance for each repeat. Take the means over repeats, then the share of the gap, in per cent.
# %% tags=["solution"]
def gap_closed(static, tdq, full):
    """Per cent of the gap from ``static`` to ``full`` that ``tdq`` closes; each ``"repeat"``."""
    static, tdq, full = static.mean(), tdq.mean(), full.mean()
    return (100 * (static - tdq) / (static - full)).item()


# %%
checks.gap_closed(gap_closed)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 06](../06_what_makes_it_work.ipynb)
