"""Attention with or without its weights, and what a layer's attention hands to the mechanisms."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.models.layers import exact_dtype
from qs_jax.state import KVCache


class Attended(NamedTuple):
    """What a layer's attention hands to the mechanisms.

    Attributes:
      cache: With this layer's keys and values written.
      mask_BTS: Which keys each query saw.
      weights_BNTS: Attention weights, where they were made (masked engine); None otherwise.
      k_BSKH: Keys of this layer, after RoPE.
      q_BTNH: Queries.
      log_size_BS: Added to the keys' logits, or None.
    """

    cache: KVCache | None
    mask_BTS: Bool[Array, "B T S"]
    weights_BNTS: Float[Array, "B N T S"] | None
    k_BSKH: Float[Array, "B S K H"]
    q_BTNH: Float[Array, "B T N H"]
    log_size_BS: Float[Array, "B S"] | None

    def weights(self) -> Float[Array, "B N T S"]:
        """The attention weights of every query."""
        if self.weights_BNTS is not None:
            return self.weights_BNTS
        return attention_weights(self.q_BTNH, self.k_BSKH, self.mask_BTS, self.log_size_BS)

    def weights_at(self, index_BQ: Int[Array, "B Q"]) -> Float[Array, "B N Q S"]:
        """The attention weights of a few queries, by their slots."""
        if self.weights_BNTS is not None:
            return jnp.take_along_axis(self.weights_BNTS, index_BQ[:, None, :, None], axis=2)
        q_BQNH = jnp.take_along_axis(self.q_BTNH, index_BQ[:, :, None, None], axis=1)
        mask_BQS = jnp.take_along_axis(self.mask_BTS, index_BQ[:, :, None], axis=1)
        return attention_weights(q_BQNH, self.k_BSKH, mask_BQS, self.log_size_BS)


def attention_weights(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    log_size_BS: Float[Array, "B S"] | None,
) -> Float[Array, "B N T S"]:
    """Softmax of the query-key products; a masked key weighs exactly 0.

    Args:
      q_BTNH: Queries.
      k_BSKH: Keys.
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
    return jax.nn.softmax(logits, axis=-1).reshape(batch, heads, width, -1)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    log_size_BS: Float[Array, "B S"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Grouped-query attention that also returns its weights: see `attention_weights`."""
    batch, width, heads, _ = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    weights_BNTS = attention_weights(q_BTNH, k_BSKH, mask_BTS, log_size_BS)
    grouped = weights_BNTS.reshape(batch, kv_heads, heads // kv_heads, width, -1)
    context = jnp.einsum("bkgts,bskh->btkgh", grouped.astype(v_BSKH.dtype), v_BSKH)
    return context.reshape(q_BTNH.shape), weights_BNTS


def masked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    log_size_BS: Float[Array, "B S"] | None,
) -> Float[Array, "B T N H"]:
    """The same context by the fast path, without weights."""
    if q_BTNH.dtype == jnp.float64:  # the library's softmax is float32
        return attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, log_size_BS)[0]
    bias = None
    if log_size_BS is not None:
        bias = log_size_BS[:, None, None, :].astype(q_BTNH.dtype)
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, bias=bias, mask=mask_BTS[:, None])
