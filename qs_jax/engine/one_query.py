"""Attention of one query a row, for decoding.

A batched product over heads makes XLA transpose the whole cache at every step on CPU. With few
heads it is cheaper to read keys and values once, as they lie, against block-diagonal queries.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qs_jax.engine import attention as general
from qs_jax.models.layers import exact_dtype

# The block-diagonal product costs K times the arithmetic: from here on it is no longer hidden
# behind reading the cache.
MOST_HEADS = 16


def attention(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_B1S: Bool[Array, "B 1 S"],
    log_size_BS: Float[Array, "B S"] | None,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B N 1 S"]]:
    """`attention.attention` for one query a row."""
    batch, _, heads, dim = q_B1NH.shape
    slots, kv_heads = k_BSKH.shape[1:3]
    if heads > MOST_HEADS or jax.default_backend() != "cpu":
        return general.attention(q_B1NH, k_BSKH, v_BSKH, mask_B1S, log_size_BS)
    exact, group = exact_dtype(q_B1NH.dtype), heads // kv_heads
    own_KJ = jnp.eye(kv_heads, dtype=q_B1NH.dtype)
    q_BKGH = q_B1NH.reshape(batch, kv_heads, group, dim)
    q_BKGJH = q_BKGH[:, :, :, None, :] * own_KJ[None, :, None, :, None]
    k_BSO = k_BSKH.reshape(batch, slots, kv_heads * dim)
    v_BSO = v_BSKH.reshape(batch, slots, kv_heads * dim)
    q_BNO = q_BKGJH.reshape(batch, heads, kv_heads * dim)
    logits_BSN = jnp.einsum("bso,bno->bsn", k_BSO, q_BNO, preferred_element_type=exact)
    logits_BSN = logits_BSN / math.sqrt(dim)
    if log_size_BS is not None:
        logits_BSN = logits_BSN + log_size_BS[..., None]
    logits_BSN = jnp.where(mask_B1S[:, 0, :, None], logits_BSN, jnp.finfo(exact).min)
    weights_BSN = jax.nn.softmax(logits_BSN, axis=1)
    mixed_BNO = jnp.einsum("bsn,bso->bno", weights_BSN.astype(v_BSO.dtype), v_BSO)
    mixed_BKGJH = mixed_BNO.reshape(batch, kv_heads, group, kv_heads, dim)
    context_BKGH = (mixed_BKGJH * own_KJ[None, :, None, :, None]).sum(3)
    return context_BKGH.reshape(q_B1NH.shape), weights_BSN.swapaxes(1, 2)[:, :, None]
