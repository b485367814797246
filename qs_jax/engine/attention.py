"""Attention: with its weights (the definition), by blocks of queries, and of new tokens."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qs_jax.models import cpu
from qs_jax.state import exact_dtype

# Queries of a block, at least; and blocks of a row, at most: each is compiled on its own. Measured
# on CPU: at 512 tokens blocks of 64 to 128 cost a quarter of one block of 512, which computes twice
# what causality leaves and whose logits leave the processor's cache between the passes over them.
QUERY_BLOCK = 128
MOST_BLOCKS = 16


def in_window(query_pos_BT: Array, key_pos_BS: Array, window: int | None) -> Any:
    """Keys that a sliding window leaves to each query, `[B, T, S]`; True where there is none.

    A query at position i sees those after i - window (Jiang et al. 2023).
    """
    if window is None:
        return True
    return key_pos_BS[:, None, :] > query_pos_BT[:, :, None] - window


def attention_weights(
    q_BTNH: Array, k_BSKH: Array, mask_BTS: Array, log_size_BS: Array | None = None
) -> Array:
    """Softmax of the query-key products; a masked key weighs exactly 0.

    `log_size_BS` is added to the keys' logits (proportional attention).
    """
    batch, width, heads, dim = q_BTNH.shape
    kv_heads, exact = k_BSKH.shape[2], exact_dtype(q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(batch, width, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=exact)
    logits = logits / math.sqrt(dim)
    if log_size_BS is not None:
        logits = logits + log_size_BS[:, None, None, None, :]
    logits = jnp.where(mask_BTS[:, None, None], logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1).reshape(batch, heads, width, -1)


def attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, log_size_BS: Array | None = None
) -> tuple[Array, Array]:
    """Grouped-query attention that also returns its weights: see `attention_weights`."""
    batch, width, heads, _ = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    weights_BNTS = attention_weights(q_BTNH, k_BSKH, mask_BTS, log_size_BS)
    grouped = weights_BNTS.reshape(batch, kv_heads, heads // kv_heads, width, -1)
    grouped, exact = grouped.astype(v_BSKH.dtype), exact_dtype(v_BSKH.dtype)
    context = jnp.einsum("bkgts,bskh->btkgh", grouped, v_BSKH, preferred_element_type=exact)
    return context.astype(v_BSKH.dtype).reshape(q_BTNH.shape), weights_BNTS


def blocked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    query_pos_BT: Int[Array, "B T"] | None = None,
    first_BS: Int[Array, "B S"] | None = None,
    *,
    window: int | None = None,
    rising: bool = True,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention, block of queries by block, softmax in at least float32.

    Logits of one block exist at a time: memory grows with S, not with T * S. A query that sees no
    key returns a mean of values, which the caller ignores.

    Args:
      q_BTNH: Queries.
      k_BSKH: Keys, in the order of their positions.
      v_BSKH: Values.
      query_pos_BT: Positions of the queries; None where queries and keys are whole rows.
      first_BS: Position of the first query that sees each key, which is its own, or never; None
        with `query_pos_BT`.
      window: Of sliding attention: see `in_window`.
      rising: Query positions rise strictly: slot i is at most at position S - T + i, and a block
        reads the keys from its first query's window up to its last query only.
    """
    width, slots = q_BTNH.shape[1], k_BSKH.shape[1]
    attend = _attend_block if cpu.on_cpu() else jax.nn.dot_product_attention
    # Much fewer queries than keys leave little to cut: larger blocks compile sooner.
    queries = QUERY_BLOCK if 2 * width > slots else 4 * QUERY_BLOCK
    size = -(-width // min(-(-width // queries), MOST_BLOCKS))
    spans = [(start, min(start + size, width)) for start in range(0, width, size)]

    out = []
    for start, end in spans:
        first, last = (0, slots - width + end) if rising else (0, slots)
        if rising and window is not None:  # a key's slot is at most as far back as its position
            first = max(start - window + 1, 0)
        if query_pos_BT is None or first_BS is None:
            pos_BT, pos_BS = jnp.arange(start, end)[None], jnp.arange(first, last)[None]
        else:
            pos_BT, pos_BS = query_pos_BT[:, start:end], first_BS[:, first:last]
        mask_BTS = pos_BS[:, None, :] <= pos_BT[:, :, None]
        mask_BTS &= in_window(pos_BT, pos_BS, window)
        block = (q_BTNH[:, start:end], k_BSKH[:, first:last], v_BSKH[:, first:last])
        out.append(attend(*block, mask=mask_BTS[:, None]))
    return jnp.concatenate(out, axis=1)


def _attend_block(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Array) -> Array:
    """One block of queries over all its keys; `mask` is `[B or 1, 1, T, S]`.

    Products have one leading axis, rows and heads in one: with two, XLA on CPU converts bfloat16
    operands to float32 and multiplies those, at less than half the speed.
    """
    batch, width, heads, dim = q_BTNH.shape
    kv_heads, exact = k_BSKH.shape[2], exact_dtype(q_BTNH.dtype)
    both, groups = batch * kv_heads, heads // kv_heads
    q_BTKGH = q_BTNH.reshape(batch, width, kv_heads, groups, dim)
    q_XRH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(both, groups * width, dim)
    k_XSH, v_XSH = (x.transpose(0, 2, 1, 3).reshape(both, -1, dim) for x in (k_BSKH, v_BSKH))
    logits = jnp.einsum("xrh,xsh->xrs", q_XRH, k_XSH, preferred_element_type=exact)
    logits = logits.reshape(batch, kv_heads, groups, width, -1) / math.sqrt(dim)
    # Not the least number: it would outweigh a key that is seen and whose logit overflowed.
    hidden = jnp.where(mask.any(-1, keepdims=True), -jnp.inf, jnp.finfo(exact).min)
    logits = jnp.where(mask[:, :, None], logits, hidden[:, :, None])
    # Normalised after the product with the values: S divisions a query become H.
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights_XRS = weights.astype(v_BSKH.dtype).reshape(both, groups * width, -1)
    context = jnp.einsum("xrs,xsh->xrh", weights_XRS, v_XSH, preferred_element_type=exact)
    context = context.reshape(batch, kv_heads, groups, width, dim) / total
    return context.astype(v_BSKH.dtype).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def step_attention(
    q_BTNH: Array, cached: tuple[Array, Array], new: tuple[Array, Array] | None, mask_BTX: Array
) -> Array:
    """Attention of a few new tokens over a cache's slots `[B, C, K * H]` and over themselves.

    `mask_BTX` says which of the X = C + T keys each query sees, the new tokens' last. Without `new`
    the slots hold them, and X = C.
    """
    batch, width, heads, dim = q_BTNH.shape
    (k_BCO, v_BCO), exact = cached, exact_dtype(q_BTNH.dtype)
    kv_heads, slots = k_BCO.shape[2] // dim, k_BCO.shape[1]
    if not cpu.block_diagonal(heads):
        k, v = (old.reshape(batch, slots, kv_heads, dim) for old in cached)
        if new is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip((k, v), new, strict=True))
        return jax.nn.dot_product_attention(q_BTNH, k, v, mask=mask_BTX[:, None])
    # Keys and values are read once, as they lie: a product over heads would transpose the cache.
    groups = heads // kv_heads
    own_KJ = jnp.eye(kv_heads, dtype=q_BTNH.dtype)[None, None, :, None, :, None]
    q_BTKGH = q_BTNH.reshape(batch, width, kv_heads, groups, dim)
    q_BRO = (q_BTKGH[..., None, :] * own_KJ).reshape(batch, width * heads, kv_heads * dim)

    def logits_of(k_BXO: Array) -> Array:
        return jnp.einsum("bro,bxo->brx", q_BRO, k_BXO, preferred_element_type=exact)

    keys, values = [k_BCO], [v_BCO]
    if new is not None:
        keys.append(new[0].reshape(batch, width, -1))
        values.append(new[1].reshape(batch, width, -1))
    logits_BRX = jnp.concatenate([logits_of(k) for k in keys], axis=2) / math.sqrt(dim)
    mask_BRX = jnp.repeat(mask_BTX, heads, axis=1)
    logits_BRX = jnp.where(mask_BRX, logits_BRX, -jnp.inf)
    weights_BRX = jax.nn.softmax(logits_BRX, axis=-1).astype(v_BCO.dtype)

    def mix(weights_BRX: Array, v_BXO: Array) -> Array:
        return jnp.einsum("brx,bxo->bro", weights_BRX, v_BXO, preferred_element_type=exact)

    parts = (weights_BRX[..., :slots], weights_BRX[..., slots:])
    mixed_BRO = functools.reduce(jnp.add, map(mix, parts, values)).astype(v_BCO.dtype)
    mixed = mixed_BRO.reshape(batch, width, kv_heads, groups, kv_heads, dim)
    own = [mixed[:, :, head, :, head] for head in range(kv_heads)]
    return jnp.stack(own, axis=2).reshape(q_BTNH.shape)
