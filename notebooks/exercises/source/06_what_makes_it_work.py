# %% [markdown]
# # Exercises 06 · Judge an ablation
#
# **Goal.** Write the rules by which the lesson calls a result a result, and the two ideas that it measures beside TDQ: a table with its nearest step, and a quantizer for each half of an input.
#
# **Prerequisites.** [06](../06_what_makes_it_work.ipynb). **Minutes:** 40.
# %%
import torch

from tdq_utils.show.checks import ablations as checks


# %% [markdown]
# ## 1. A change (5 minutes)
# Rows are variants, the default first; columns are repeats. By how many per cent does each variant change the *mean* over repeats, compared with the default?
# %% tags=["solution"]
def change_of_means(fcd):
    """Changes in per cent, ``"variant"``, of distances ``"variant repeat"``."""
    mean = fcd.mean(1)
    return 100 * (mean / mean[0] - 1)


# %%
checks.change_of_means(change_of_means)


# %% [markdown]
# ## 2. Better in every repeat (10 minutes)
# A mean can be better by one lucky repeat. The kit says that TDQ wins only if, in every single repeat, it beats whichever constant is best *in that repeat*. Lower is better.
# %% tags=["solution"]
def better_everywhere(static, tdq):
    """Whether TDQ ``"repeat"`` beats the best of the constants ``"method repeat"`` in every repeat: True or False."""
    return bool((tdq < static.amin(0)).all())


# %%
checks.better_everywhere(better_everywhere)


# %% [markdown]
# ## 3. Other numbers of steps (10 minutes)
# A table was calibrated for some time steps, noise first. Sampling asks for others. Answer each with the entry of the nearest step.
# %% tags=["solution"]
def nearest_step(table_t, table_s, t):
    """Step sizes at time steps ``t``, ``"asked"``, from a table ``"entry"``."""
    distance = (t[:, None] - table_t).abs()
    return table_s[distance.argmin(1)]


# %%
checks.nearest_step(nearest_step)


# %% [markdown]
# ## 4. Halves of a skip input (15 minutes)
# The largest effect of the lesson: an input that is joined from two sources, along the channels, gets a step size for each of them. Quantize the first `at` channels by `s[0]`, the rest by `s[1]`, both on the symmetric grid, and join them again.
# %% tags=["solution"]
def quantize_halves(x, at, s, bits):
    """``x`` ``"batch channel height width"`` on two grids."""
    q_min, q_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    halves = [step * (half / step).round().clamp(q_min, q_max) for half, step in zip((x[:, :at], x[:, at:]), s)]
    return torch.cat(halves, dim=1)


# %%
checks.quantize_halves(quantize_halves)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 07](../07_qat.ipynb)
