"""Attention: fast, block of queries by block; or showing its weights to the mechanisms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.halves import exact_dtype, from_bits, to_bits

# Queries of a block, at least; and blocks of a row, at most: each is compiled on its own. Measured
# on CPU: at 512 tokens blocks of 64 to 128 cost a quarter of one block of 512, which computes twice
# what causality leaves and whose logits leave the cache between the passes over them.
QUERY_BLOCK = 128
MOST_BLOCKS = 16
# Bytes of logits of one block of queries, at most, on CPU: where all rows and heads have more, rows
# go one after the other, and heads if need be. Several passes are made over them, which a cache
# should hold.
MOST_LOGITS = 6 * 2**20


class Places(NamedTuple):
    """Which queries see a key, by their positions.

    Attributes:
      query_BT: Of the queries.
      first_BS: Of the first query that sees each key.
      until_BS: Of the first that does not any more; None where all later ones do.
    """

    query_BT: Int[Array, "B T"]
    first_BS: Int[Array, "B S"]
    until_BS: Int[Array, "B S"] | None

    def seen(self, start: int, end: int, keys: int) -> Bool[Array, "B Q C"]:
        """Which of the first `keys` keys the queries from `start` to `end` see."""
        query_BQ1, first_B1C = self.query_BT[:, start:end, None], self.first_BS[:, None, :keys]
        if self.until_BS is None:
            return first_B1C <= query_BQ1
        # One comparison for two: what lies before the first is a large number without a sign.
        span_B1C = jnp.maximum(self.until_BS[:, None, :keys] - first_B1C, 0)
        return (query_BQ1 - first_B1C).astype(jnp.uint32) < span_B1C.astype(jnp.uint32)


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

    cache: Any
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
    grouped, exact = grouped.astype(v_BSKH.dtype), exact_dtype(v_BSKH.dtype)
    context = jnp.einsum("bkgts,bskh->btkgh", grouped, v_BSKH, preferred_element_type=exact)
    return context.astype(v_BSKH.dtype).reshape(q_BTNH.shape), weights_BNTS


def blocked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"] | None = None,
    *,
    places: Places | None = None,
    prefix: int = 0,
    log_size_BS: Float[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention whose keys are in the order of its queries, softmax in float32.

    Slots are causal: query slot i looks at the key slots below `prefix + i + 1` only, and a block
    of queries computes those below its own last one. Of what causality masks, half a block a query
    is computed, and logits of one block exist at a time: memory grows with S, not with T * S.

    Args:
      q_BTNH: Queries.
      k_BSKH: Keys: `prefix` slots that every query may see, then one slot a query.
      v_BSKH: Values.
      mask_BTS: Which of those keys each query sees; None is all of them. A query that sees none
        returns a mean of values: finite, and for the caller to ignore.
      places: Instead of a mask, which each head would read and work out anew.
      prefix: Key slots before the first query's own.
      log_size_BS: Added to a key's logits (proportional attention), or None.
    """
    batch, width, heads, dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    # Heads that share keys become rows of one product; T stays inside, for the blocks to cut.
    q_BKGTH = q_BTNH.reshape(batch, width, kv_heads, heads // kv_heads, dim)
    q_BKGTH = q_BKGTH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    seen = _Seen(mask_BTS, places, log_size_BS)
    apart = _logits_bytes(q_BKGTH, k_BKSH) > MOST_LOGITS and jax.default_backend() == "cpu"
    attend = _attend_apart if apart else _attend_tile
    context_BKGTH = attend(q_BKGTH, k_BKSH, v_BKSH, seen, prefix)
    return context_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


class _Seen(NamedTuple):
    """What says which keys of a row its queries see, and what is added to their logits."""

    mask_BTS: Array | None
    places: Places | None
    log_size_BS: Array | None


def _block_size(width: int) -> int:
    """Queries of a block; blocks are of equal size."""
    return -(-width // min(-(-width // QUERY_BLOCK), MOST_BLOCKS))


def _logits_bytes(q_BKGTH: Array, k_BKSH: Array) -> int:
    """Most bytes of logits that exist at a time."""
    batch, kv_heads, groups, width, _ = q_BKGTH.shape
    heads = batch * kv_heads * groups
    each = jnp.dtype(exact_dtype(q_BKGTH.dtype)).itemsize
    return heads * _block_size(width) * k_BKSH.shape[2] * each


def _attend_apart(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, seen: _Seen, prefix: int) -> Array:
    """`_attend_tile` of one row after the other, and of its heads if its logits are still many.

    Loops take and fill arrays of bits (`qs_jax.halves`): of bfloat16, XLA on CPU would convert the
    whole result to float32 and back for each row of it.
    """
    heads_apart = _logits_bytes(q_BKGTH[:1], k_BKSH) > MOST_LOGITS

    def tile(q: Array, k: Array, v: Array, seen: _Seen) -> Array:
        q, k, v = from_bits((q, k, v))
        return to_bits(_attend_tile(q, k, v, seen, prefix))

    def of_row(row: tuple[Array, Array, Array, _Seen]) -> Array:
        q_1KGTH, k_1KSH, v_1KSH, seen_1 = jax.tree.map(lambda leaf: leaf[None], row)
        if not heads_apart:
            return tile(q_1KGTH, k_1KSH, v_1KSH, seen_1)[0]

        def of_head(head: tuple[Array, Array, Array]) -> Array:
            q_11GTH, k_11SH, v_11SH = (leaf[None, None] for leaf in head)
            return tile(q_11GTH, k_11SH, v_11SH, seen_1)[0, 0]

        return lax.map(of_head, (q_1KGTH[0], k_1KSH[0], v_1KSH[0]))

    held = (to_bits(leaf) for leaf in (q_BKGTH, k_BKSH, v_BKSH))
    return from_bits(lax.map(of_row, (*held, seen)))


def _attend_tile(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, seen: _Seen, prefix: int) -> Array:
    """Attention of a few rows and heads, block of queries by block."""
    width, slots = q_BKGTH.shape[3], k_BKSH.shape[2]
    size = _block_size(width)
    blocks = []
    for start in range(0, width, size):
        end = min(start + size, width)
        keys = min(prefix + end, slots)
        if seen.places is not None:
            mask = seen.places.seen(start, end, keys)
        elif seen.mask_BTS is None:
            last_T1 = prefix + jnp.arange(start, end)[:, None]
            mask = (jnp.arange(keys)[None, :] <= last_T1)[None]
        else:
            mask = seen.mask_BTS[:, start:end, :keys]
        bias_BS = None if seen.log_size_BS is None else seen.log_size_BS[:, :keys]
        q, k, v = q_BKGTH[:, :, :, start:end], k_BKSH[:, :, :keys], v_BKSH[:, :, :keys]
        blocks.append(_attend_block(q, k, v, mask, bias_BS))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _attend_block(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, mask: Array, bias_BS: Array | None):
    """One block of queries over all its keys; `mask` is `[B or 1, T, S]`.

    Products have one leading axis, rows and heads in one: with two, XLA on CPU converts bfloat16
    operands to float32 and multiplies those, at less than half the speed.
    """
    batch, kv_heads, groups, width, dim = q_BKGTH.shape
    exact, both = exact_dtype(q_BKGTH.dtype), batch * kv_heads
    q_XRH = q_BKGTH.reshape(both, groups * width, dim)
    k_XSH, v_XSH = (leaf.reshape(both, -1, dim) for leaf in (k_BKSH, v_BKSH))
    logits = jnp.einsum("xrh,xsh->xrs", q_XRH, k_XSH, preferred_element_type=exact)
    logits = logits.reshape(batch, kv_heads, groups, width, -1) / math.sqrt(dim)
    if bias_BS is not None:
        logits = logits + bias_BS[:, None, None, None, :]
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(exact).min)
    # Normalised after the product with the values: S divisions a query become H.
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights_XRS = weights.astype(v_BKSH.dtype).reshape(both, groups * width, -1)
    context = jnp.einsum("xrs,xsh->xrh", weights_XRS, v_XSH, preferred_element_type=exact)
    return (context.reshape(q_BKGTH.shape) / total).astype(v_BKSH.dtype)
