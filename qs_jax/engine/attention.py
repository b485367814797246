"""Attention that shows its weights, and what a layer's attention hands to the mechanisms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qs_jax.models.layers import exact_dtype


class Attended(NamedTuple):
    """What a layer's attention hands to the mechanisms.

    Attributes:
      cache: With this layer's keys and values written.
      mask_BTS: Which keys each query saw.
      weights_BNTS: Attention weights.
      k_BSKH: Keys of this layer, after RoPE.
      q_BTNH: Queries.
    """

    cache: Any
    mask_BTS: Bool[Array, "B T S"]
    weights_BNTS: Float[Array, "B N T S"]
    k_BSKH: Float[Array, "B S K H"]
    q_BTNH: Float[Array, "B T N H"]


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    log_size_BS: Float[Array, "B S"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Grouped-query attention that also returns its weights; a masked key weighs exactly 0.

    Args:
      q_BTNH: Queries.
      k_BSKH: Keys.
      v_BSKH: Values.
      mask_BTS: Each query sees at least one key.
      log_size_BS: Added to a key's logits (proportional attention), or None.
    """
    batch, width, heads, dim = q_BTNH.shape
    kv_heads, exact = k_BSKH.shape[2], exact_dtype(q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(batch, width, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=exact)
    logits = logits / math.sqrt(dim)
    if log_size_BS is not None:
        logits = logits + log_size_BS[:, None, None, None, :]
    logits = jnp.where(mask_BTS[:, None, None], logits, jnp.finfo(exact).min)
    weights = jax.nn.softmax(logits, axis=-1)
    context = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH)
    return context.reshape(q_BTNH.shape), weights.reshape(batch, heads, width, -1)
