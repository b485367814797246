"""Contextual token fusion (paper 2.3, D; read causally: docs/mechanisms.md).

A pair (t, u), t before u, is decided when u is there: u absorbs t, takes the weighted mean of both
as its state, and t's keys are gone for queries at or after u. A run of adjacent pairs therefore
gives each member the mean of the run up to itself, and the last member is the super-token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import FusionConfig
from qs_jax.halves import as_state, exact_dtype
from qs_jax.mechanisms.plan import NEVER, Numbers


class Tokens(NamedTuple):
    """Tokens that may fuse, along an axis of X positions.

    Attributes:
      pos_BX: Positions.
      h_BXD: States after the layer, before fusion.
      ready_BX: Real, neither halted nor exempt.
      hidden_from_BX: Queries from here on have lost the token (absorbed at an earlier layer).
      context_BXD: Mean input embedding of the last tokens; None without the context filter.
    """

    pos_BX: Int[Array, "B X"]
    h_BXD: Float[Array, "B X D"]
    ready_BX: Bool[Array, "B X"]
    hidden_from_BX: Int[Array, "B X"]
    context_BXD: Float[Array, "B X D"] | None


class Merged(NamedTuple):
    """States after fusion, along X positions.

    Attributes:
      h_BXD: Weighted means; a token that absorbed nothing keeps its state, bit for bit.
      mass_BX: Sum of the weights in it.
      size_BX: Tokens in it.
    """

    h_BXD: Float[Array, "B X D"]
    mass_BX: Float[Array, "B X"]
    size_BX: Float[Array, "B X"]


def back(array_BX: Array, distance: int, width: int) -> Array:
    """What lies `distance` positions before each of the last `width` positions."""
    start = array_BX.shape[1] - width - distance
    return array_BX[:, start : start + width]


def distances(a: Array, b: Array, kind: str, norms: tuple[Array, Array] | None = None) -> Array:
    """||a - b||_2, or that over the mean of the two norms.

    Args:
      a: Vectors, `[..., D]`.
      b: Likewise.
      kind: "raw", or "relative".
      norms: Of a and b, where they are known.
    """
    exact = exact_dtype(a.dtype)
    a, b = a.astype(exact), b.astype(exact)
    apart = jnp.linalg.norm(a - b, axis=-1)
    if kind == "raw":
        return apart
    of_a, of_b = norms or (jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(b, axis=-1))
    return apart / jnp.maximum((of_a + of_b) / 2, 1e-12)


def similarity(
    q_BTNH: Float[Array, "B T N H"],
    k_BXKH: Float[Array, "B X K H"],
    pos_BX: Int[Array, "B X"],
    window: int,
) -> Float[Array, "B T W"]:
    """Cosine of each query with the keys 1..W positions back, mean over heads; X = W + T.

    Where tokens are left out, one that lies d positions back is at most d slots back; entry d - 1
    is 0 if it is not there.
    """
    exact = exact_dtype(q_BTNH.dtype)
    q, k = q_BTNH.astype(exact), k_BXKH.astype(exact)
    q = q / jnp.maximum(jnp.linalg.norm(q, axis=-1, keepdims=True), 1e-12)
    k = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    width = q.shape[1]
    steps_W = jnp.arange(1, window + 1)[None, None]
    found_BTW = jnp.zeros((*q.shape[:2], window), exact)
    for d in range(1, window + 1):
        cosine_BT = (q * back(k, d, width)).sum(-1).mean(-1)
        apart_BT = pos_BX[:, -width:] - back(pos_BX, d, width)
        found_BTW += jnp.where(apart_BT[..., None] == steps_W, cosine_BT[..., None], 0)
    return found_BTW


def pairs(
    tokens: Tokens,
    width: int,
    similarity_BTW: Float[Array, "B T W"] | None,
    tau_fuse: Float[Array, ""],
    fusion: FusionConfig,
    numbers: Numbers,
) -> Bool[Array, "B T W"]:
    """Which of the W tokens before each of the last `width` tokens it may absorb (2.3, D.8).

    The W tokens before it are slots; tokens further back than W positions never fuse.

    Args:
      tokens: W earlier tokens, then `width` tokens; X = W + T.
      width: T.
      similarity_BTW: Running mean over layers of query-key cosines; None for adjacency only.
      tau_fuse: Of this layer.
      fusion: Distance and filters.
      numbers: `tau_attn`, `tau_ctx`.
    """
    pos_BT, found = tokens.pos_BX[:, -width:], []

    def apart_from(x_BXD: Array) -> Callable[[int], Array]:
        norm_BX = jnp.linalg.norm(x_BXD.astype(exact_dtype(x_BXD.dtype)), axis=-1)

        def of(d: int) -> Array:
            norms = norm_BX[:, -width:], back(norm_BX, d, width)
            mine, theirs = x_BXD[:, -width:], back(x_BXD, d, width)
            return distances(mine, theirs, fusion.distance, norms)

        return of

    states_apart = apart_from(tokens.h_BXD)
    for d in range(1, fusion.window + 1):
        near_BT = states_apart(d) < tau_fuse
        both_BT = tokens.ready_BX[:, -width:] & back(tokens.ready_BX, d, width)
        still_BT = pos_BT < back(tokens.hidden_from_BX, d, width)
        apart_BT = pos_BT - back(tokens.pos_BX, d, width)
        ok_BT = near_BT & both_BT & still_BT & (apart_BT <= fusion.window)
        if similarity_BTW is not None:
            index_BT1 = jnp.clip(apart_BT - 1, 0, fusion.window - 1)[..., None]
            alike_BT = jnp.take_along_axis(similarity_BTW, index_BT1, axis=-1)[..., 0]
            ok_BT &= (apart_BT == 1) | (alike_BT > numbers.tau_attn)
        if tokens.context_BXD is not None:
            ok_BT &= apart_from(tokens.context_BXD)(d) < numbers.tau_ctx
        found.append(ok_BT)
    return jnp.stack(found, axis=-1)


def merge(
    h_BTD: Float[Array, "B T D"],
    pairs_BTW: Bool[Array, "B T W"],
    weight_BT: Float[Array, "B T"],
    paid_BTW: Float[Array, "B T W"] | None,
    size_BT: Float[Array, "B T"],
    earlier: Merged,
    dtype: Any,
) -> tuple[Merged, Bool[Array, "B T W"]]:
    """What a decoder would do along the row: each token absorbs what nobody has absorbed before.

    The mean is (w_u h_u + sum_t w_t m_t) / (w_u + sum_t w_t), where m_t is t's state with all it
    has absorbed. With weights of their own (`paid_BTW` None), w_t is the sum over t's members; else
    it is what u pays to t.

    A token waits for those that it absorbs and for no others: a pass merges every token whose own
    are done, so there are as many passes as the longest chain has links, not tokens in a row.

    Args:
      h_BTD: States before fusion.
      pairs_BTW: From `pairs`.
      weight_BT: A token's own weight.
      paid_BTW: Weights u gives to the W tokens before it, or None.
      size_BT: Tokens each state stands for already.
      earlier: The W tokens before the first, oldest first.
      dtype: Of the model: means are rounded to it.

    Returns:
      States after fusion, and which pairs took place.
    """
    window, width = pairs_BTW.shape[-1], h_BTD.shape[1]
    distances_W = range(1, window + 1)
    takes_BTW = first_takers(pairs_BTW)
    level_BT = levels(takes_BTW)

    def one_pass(number: Array, merged: Merged) -> Merged:
        joined = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), earlier, merged)
        mass_BT, size_BT = merged.mass_BX, merged.size_BX
        sum_BTD = mass_BT[..., None] * merged.h_BXD
        for d in distances_W:
            take_BT, theirs = takes_BTW[..., d - 1], [back(leaf, d, width) for leaf in joined]
            paid_BT = theirs[1] if paid_BTW is None else paid_BTW[..., d - 1]
            paid_BT = jnp.where(take_BT, paid_BT, 0)
            # Not weighed where not taken: what is not a number times 0 is none either.
            their_BTD = jnp.where(take_BT[..., None], theirs[0], 0)
            sum_BTD = sum_BTD + paid_BT[..., None] * their_BTD
            mass_BT = mass_BT + paid_BT
            size_BT = size_BT + jnp.where(take_BT, theirs[2], 0)
        mean_BTD = sum_BTD / jnp.maximum(mass_BT, 1e-30)[..., None]
        due_BT = level_BT == number
        return Merged(
            jnp.where(due_BT[..., None], as_state(mean_BTD, dtype), merged.h_BXD),
            jnp.where(due_BT, mass_BT, merged.mass_BX),
            jnp.where(due_BT, size_BT, merged.size_BX),
        )

    # Without a pair, no pass: unlike a branch, a loop hands states on without a copy.
    before = Merged(h_BTD, weight_BT, size_BT)
    return lax.fori_loop(1, level_BT.max() + 1, one_pass, before), takes_BTW


def first_takers(pairs_BTW: Bool[Array, "B T W"]) -> Bool[Array, "B T W"]:
    """The pairs that take place: a token goes to the nearest later one that may absorb it."""
    batch, width, window = pairs_BTW.shape
    slots_BT = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
    first_BX = absorbers(pairs_BTW, slots_BT)
    firsts = [back(first_BX, d, width) == slots_BT for d in range(1, window + 1)]
    return pairs_BTW & jnp.stack(firsts, axis=-1)


def levels(takes_BTW: Bool[Array, "B T W"]) -> Int[Array, "B T"]:
    """Links of the longest chain of absorptions that ends in a token; 0 where it takes nobody."""
    window, width = takes_BTW.shape[-1], takes_BTW.shape[1]

    def longer(carry):
        before_BT, _ = carry
        padded_BX = jnp.pad(before_BT, ((0, 0), (window, 0)))
        chains = [
            jnp.where(takes_BTW[..., d - 1], back(padded_BX, d, width) + 1, 0)
            for d in range(1, window + 1)
        ]
        found_BT = functools.reduce(jnp.maximum, chains)
        return found_BT, (found_BT != before_BT).any()

    nobody_BT = jnp.zeros(takes_BTW.shape[:2], jnp.int32)
    return lax.while_loop(lambda carry: carry[1], longer, (nobody_BT, takes_BTW.any()))[0]


def absorbers(takes_BTW: Bool[Array, "B T W"], pos_BT: Int[Array, "B T"]) -> Int[Array, "B X"]:
    """Position of the first token that absorbs each of the W + T tokens now; NEVER if none."""
    batch, width, window = takes_BTW.shape
    found_BX = jnp.full((batch, window + width), NEVER, jnp.int32)
    for d in range(window, 0, -1):
        by_BT = jnp.where(takes_BTW[..., d - 1], pos_BT, NEVER)
        found_BX = found_BX.at[:, window - d : window - d + width].min(by_BT)
    return found_BX


def contexts(embedded_BXD: Float[Array, "B X D"], real_BX: Bool[Array, "B X"], length: int):
    """Mean input embedding of the last `length` tokens up to each one (D.8, read causally)."""
    exact = exact_dtype(embedded_BXD.dtype)
    x = jnp.where(real_BX[..., None], embedded_BXD.astype(exact), 0)
    width = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (length - 1, 0), (0, 0)))
    counts = jnp.pad(real_BX, ((0, 0), (length - 1, 0))).astype(exact)
    total = sum(padded[:, length - 1 - d : length - 1 - d + width] for d in range(length))
    count = sum(counts[:, length - 1 - d : length - 1 - d + width] for d in range(length))
    return total / jnp.maximum(count, 1)[..., None]
