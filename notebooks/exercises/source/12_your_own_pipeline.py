# %% [markdown]
# # Exercises 12 · Other people's models
#
# **Goal.** Read the time of any model, choose bits by it, and leave a model as you found it.
#
# **Prerequisites.** [12](../12_your_own_pipeline.ipynb). **Minutes:** 60.
# %%
import inspect

import tdq_utils as tdq
from tdq_utils.show.checks import pipeline as checks


# %% [markdown]
# ## 1. 1000 is noise, 0 the image (10 minutes)
# A generator wants *t* from 1000 (noise) to 0 (image). Models are told it in three ways here: from about 1000 down; from 1 down; or from 0 up to 1, where 0 is noise. The list holds what a model was told, noise first. Keep fractions.
# %% tags=["solution"]
def generator_time(told):
    """The time steps for the generator, a list of floats."""
    if max(told) > 1:
        return told
    upwards = told[0] < told[-1]
    return [1000 * (1 - t if upwards else t) for t in told]


# %%
checks.generator_time(generator_time)


# %% [markdown]
# ## 2. Which argument is the time? (15 minutes)
# A hook gets the model and a call's `args` and `kwargs`. Find the time step: the argument called `timestep` or `t`, wherever it stands. `inspect.signature(model.forward).bind(*args, **kwargs).arguments` puts names to positions.
# %% tags=["solution"]
def read_time(model, args, kwargs):
    """The time step that ``model(*args, **kwargs)`` is told."""
    call = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return call["timestep"] if "timestep" in call else call["t"]


# %%
checks.read_time(read_time)


# %% [markdown]
# ## 3. Bits by t (15 minutes)
# A precision policy: few bits in the noise, many near the image. `edges` ascend and cut the time steps into ranges; `bits` has one entry more than `edges`, from the image up. A *t* that is an edge belongs to the range above it. With `edges` 250 and 700 and `bits` 8, 6, 4: t = 249 has 8 bits, 250 has 6, 700 has 4.
# %% tags=["solution"]
def bits_by_t(t, edges, bits):
    """Bits ``"batch"`` for time steps ``"batch"``."""
    ranges = (t[:, None] >= edges).sum(1)
    return bits[ranges]


# %%
checks.bits_by_t(bits_by_t)


# %% [markdown]
# ## 4. There and back (20 minutes)
# Draw pictures three times, with `tdq.sample(model, scheduler, seeds=range(2), steps=2, progress=False)`: in full precision; quantized to W4A4 with method `"minmax"`, calibrated on the same seeds and steps; and after `tdq.restore`. The check looks into the model afterwards.
# %% tags=["solution"]
def round_trip(model, scheduler):
    """Pictures ``(full precision, quantized, restored)``."""
    how = dict(seeds=range(2), steps=2, progress=False)
    clean = tdq.sample(model, scheduler, **how)
    tdq.quantize(model, weights=4, activations=4, method="minmax")
    tdq.calibrate(model, scheduler, **how)
    quantized = tdq.sample(model, scheduler, **how)
    tdq.restore(model)
    return clean, quantized, tdq.sample(model, scheduler, **how)


# %%
checks.round_trip(round_trip)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [README](../../README.md)
