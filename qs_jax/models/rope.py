"""Rotary position embedding (RoPE) and the scalings that Hugging Face configs carry.

Frequencies depend only on the configuration, so they are computed with NumPy when a program is
traced. Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (`linear`); Peng et al. 2023, "YaRN"
(`dynamic` NTK and `yarn`); the Llama 3.1 model card (`llama3`). The half-split rotation is the
convention of Hugging Face checkpoints.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig, RopeScaling
from qs_jax.models import cpu


def inverse_frequencies(model: ModelConfig) -> tuple[np.ndarray, float]:
    """Angular frequency of each rotated pair, in radians a token, and the factor on cos and sin.

    `dynamic` scaling changes frequencies only past the trained length, and there it would rotate
    every earlier key anew whenever the text grows: a later token would touch earlier predictions.
    Positions are therefore limited to `max_positions`, where `dynamic` equals plain RoPE.
    """
    assert model.rope_theta is not None
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float64) / model.head_dim
    freqs = model.rope_theta**-exponents
    scaling, factor = model.rope_scaling, 1.0
    if scaling is not None and scaling.rope_type == "linear":
        freqs = freqs / scaling.factor
    elif scaling is not None and scaling.rope_type == "llama3":
        freqs = stretch_llama3(freqs, scaling)
    elif scaling is not None and scaling.rope_type == "yarn":
        freqs, factor = _yarn(freqs, model.rope_theta, scaling), _yarn_attention_factor(scaling)
    return freqs, factor


def stretch_llama3(freqs: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretch long wavelengths fully, short ones not at all, and blend in between."""
    length, low = scaling.original_max_positions, scaling.low_freq_factor
    high = scaling.high_freq_factor
    assert length is not None
    assert low is not None
    assert high is not None
    rotations = length * freqs / (2 * math.pi)
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def _yarn(freqs: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN's "NTK-by-parts": a ramp over dimensions between `beta_fast` and `beta_slow` turns."""
    length, dim = scaling.original_max_positions, 2 * len(freqs)
    assert length is not None

    def dimension_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    stretched = np.clip((np.arange(len(freqs)) - first) / width, 0.0, 1.0)
    return stretched * freqs / scaling.factor + (1 - stretched) * freqs


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def rotate(x_BTXH: Float[Array, "B T X H"], pos_BT: Int[Array, "B T"], model: ModelConfig):
    """Rotate each head's pairs `(x[i], x[i + H/2])` by `position * frequency[i]`."""
    freqs, factor = inverse_frequencies(model)
    exact = jnp.promote_types(x_BTXH.dtype, jnp.float32)
    angle_BT1F = pos_BT[:, :, None, None].astype(exact) * freqs.astype(exact)[None, None, None, :]
    cos, sin = (cpu.unfused(turn(angle_BT1F) * factor) for turn in (jnp.cos, jnp.sin))
    x1, x2 = jnp.split(x_BTXH.astype(exact), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTXH.dtype)
