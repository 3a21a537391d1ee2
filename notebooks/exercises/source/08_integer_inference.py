# %% [markdown]
# # Exercises 08 · Really integers
#
# **Goal.** Turn floats into bytes, multiply and add them as integers, and get the float result with one multiplication at the end.
#
# **Prerequisites.** [08](../08_integer_inference.ipynb). **Minutes:** 60.
# %%
import torch
from torch.nn import functional as F

from tdq_utils.show.checks import integers as checks


# %% [markdown]
# ## 1. Levels (10 minutes)
# $q = \mathrm{round}(x / s) + z$, cut to 0..255 and stored as a byte (`torch.uint8`). The zero point *z* is the level of the value 0. Cut before you cast: bytes wrap round.
# %% tags=["solution"]
def to_levels(x, s, zero):
    """Levels of ``x``, uint8, the same shape."""
    return ((x / s).round() + zero).clamp(0, 255).to(torch.uint8)


# %%
checks.to_levels(to_levels)


# %% [markdown]
# ## 2. A sum in integers (15 minutes)
# $\sum w x = s\,s_w\,(\sum q_w\,q - z \sum q_w)$. Both sums are sums of integers: `q` is uint8, `q_w` int8, and a product of two bytes does not fit a byte.
# %% tags=["solution"]
def integer_dot(q, q_w, zero, s, s_w):
    """The dot product of the values behind levels ``q`` and ``q_w``, a number."""
    products = (q.int() * q_w.int()).sum()
    correction = zero * q_w.int().sum()
    return s * s_w * (products - correction).item()


# %%
checks.integer_dot(integer_dot)


# %% [markdown]
# ## 3. A convolution with a zero point (20 minutes)
# The same for a 3 x 3 convolution with one pixel of padding. Padding is with the *value* 0. Which level is that? Weights have a step size for each output channel. `F.conv2d` of whole numbers in float32 is exact here and fast; `F.pad(q, [1] * 4, value=...)` pads.
# %% tags=["solution"]
def integer_conv(q, q_w, zero, s, s_w):
    """Floats ``"batch out height width"`` of levels ``q`` ``"batch in height width"``, ``q_w`` ``"out in 3 3"``, ``s_w`` ``"out"``."""
    padded = F.pad(q.float(), [1] * 4, value=zero)
    sums = F.conv2d(padded - zero, q_w.float())
    return s * s_w.view(-1, 1, 1) * sums


# %%
checks.integer_conv(integer_conv)


# %% [markdown]
# ## 4. Fold a balance (15 minutes)
# One loud channel widens the interval of all. Divide each input channel by a number of its own, *d*, and let the weights take it back: the layer's output stays the same, and the division can be folded into the layer before. Return the balanced input and the folded weights.
# %% tags=["solution"]
def fold_balance(x, weight, d):
    """``(x / d, folded weight)`` for ``x`` ``"batch in height width"``, ``weight`` ``"out in 3 3"``, ``d`` ``"in"``."""
    return x / d.view(1, -1, 1, 1), weight * d.view(1, -1, 1, 1)


# %%
checks.fold_balance(fold_balance)
# %% [markdown]
# **Solutions:** `make exercises` writes solved copies to `build/solutions/`. **Next:** [lesson 12](../12_your_own_pipeline.ipynb)
