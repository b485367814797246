"""Attention of one query a row, for decoding: over a cache and the token's own key and value.

A batched product over heads makes XLA transpose the whole cache at every step on CPU. With few
heads it is cheaper to read keys and values once, as they lie, against block-diagonal queries.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qs_jax.engine.cache import LayerCache
from qs_jax.halves import exact_dtype

# The block-diagonal product costs K times the arithmetic: with more query heads it is no longer
# hidden behind reading the cache.
MOST_HEADS = 16


def products(
    q_BKGH: Float[Array, "B K G H"], k_BCO: Float[Array, "B C O"], v_BCO: Float[Array, "B C O"]
):
    """Logits of the queries with the keys `[B, N, C]`, and the function that mixes the values."""
    batch, kv_heads, group, dim = q_BKGH.shape
    heads, slots, exact = kv_heads * group, k_BCO.shape[1], exact_dtype(q_BKGH.dtype)
    if heads <= MOST_HEADS and jax.default_backend() == "cpu":
        own_KJ = jnp.eye(kv_heads, dtype=q_BKGH.dtype)[None, :, None, :, None]
        q_BNO = (q_BKGH[:, :, :, None, :] * own_KJ).reshape(batch, heads, kv_heads * dim)
        # Slots last, in both products: with slots as rows of theirs, several rows are slower.
        logits_BNC = jnp.einsum("bno,bco->bnc", q_BNO, k_BCO, preferred_element_type=exact)

        def mix(weights_BNC: Array) -> Array:
            weights_BNC = weights_BNC.astype(v_BCO.dtype)
            mixed_BNO = jnp.einsum(
                "bnc,bco->bno", weights_BNC, v_BCO, preferred_element_type=exact
            ).astype(v_BCO.dtype)
            mixed_BKGJH = mixed_BNO.reshape(batch, kv_heads, group, kv_heads, dim)
            return (mixed_BKGJH * own_KJ).sum(3)

        return logits_BNC, mix
    k_BCKH, v_BCKH = (x.reshape(batch, slots, kv_heads, dim) for x in (k_BCO, v_BCO))
    logits_BCKG = jnp.einsum("bckh,bkgh->bckg", k_BCKH, q_BKGH, preferred_element_type=exact)

    def mix_heads(weights_BNC: Array) -> Array:
        weights_BKGC = weights_BNC.astype(v_BCO.dtype).reshape(batch, kv_heads, group, slots)
        mixed = jnp.einsum("bkgc,bckh->bkgh", weights_BKGC, v_BCKH, preferred_element_type=exact)
        return mixed.astype(v_BCO.dtype)

    return logits_BCKG.reshape(batch, slots, heads).swapaxes(1, 2), mix_heads


def attention(
    q_B1NH: Float[Array, "B 1 N H"],
    cache: LayerCache,
    mask_B1X: Bool[Array, "B 1 X"],
    log_size_BX: Float[Array, "B X"] | None,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B N 1 X"]]:
    """`attention.attention` over the slots of a cache and, last, the token itself."""
    k_B1KH, v_B1KH = cache.k_B1KH, cache.v_B1KH
    assert k_B1KH is not None
    assert v_B1KH is not None
    batch, _, heads, dim = q_B1NH.shape
    kv_heads, exact = k_B1KH.shape[2], exact_dtype(q_B1NH.dtype)
    q_BKGH = q_B1NH.reshape(batch, kv_heads, heads // kv_heads, dim)
    logits_BNC, mix = products(q_BKGH, *cache.of_layer())
    own_BKG = jnp.einsum("bkh,bkgh->bkg", k_B1KH[:, 0], q_BKGH, preferred_element_type=exact)
    logits_BNX = jnp.concatenate([logits_BNC, own_BKG.reshape(batch, heads, 1)], axis=2)
    logits_BNX = logits_BNX / math.sqrt(dim)
    if log_size_BX is not None:
        logits_BNX = logits_BNX + log_size_BX[:, None]
    logits_BNX = jnp.where(mask_B1X, logits_BNX, jnp.finfo(exact).min)
    weights_BNX = jax.nn.softmax(logits_BNX, axis=-1)
    own_BKG1 = weights_BNX[..., -1].reshape(batch, kv_heads, -1, 1).astype(v_B1KH.dtype)
    context_BKGH = mix(weights_BNX[..., :-1]) + own_BKG1 * v_B1KH[:, 0, :, None]
    return context_BKGH.reshape(q_B1NH.shape), weights_BNX[:, :, None]
