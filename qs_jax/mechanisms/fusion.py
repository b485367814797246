"""Contextual token fusion (paper 2.3, D; read causally: docs/mechanisms/fusion.md).

A pair (t, u), t before u, is decided at u: u absorbs t, takes the weighted mean of both as its
state, and queries at or after u do not see t's keys. A run of adjacent pairs therefore
gives each member the mean of the run up to itself, and the last member is the super-token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax.numpy as jnp
from flax.struct import field
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.state import NEVER, TokenState, exact_dtype


class Merged(NamedTuple):
    """States after fusion: weighted means, the weights in them, and the tokens in them."""

    h_BTD: Float[Array, "B T D"]
    mass_BT: Float[Array, "B T"]
    size_BT: Float[Array, "B T"]


@no_type_check
class Fusion(flax.struct.PyTreeNode):
    """When near-identical tokens share a path; fields as in `FusionConfig`, `[L]` where by layer.

    Attributes:
      filters_context: Whether contexts must be near as well (D.8).
    """

    may_fuse_L: Bool[Array, "L"]
    tau_fuse_L: Float[Array, "L"]
    tau_attn: Float[Array, ""]
    tau_ctx: Float[Array, ""]
    distance: str = field(pytree_node=False)
    window: int = field(pytree_node=False)
    alpha: str = field(pytree_node=False)
    proportional_attention: bool = field(pytree_node=False)
    filters_context: bool = field(pytree_node=False)
    context: int = field(pytree_node=False)

    def pairs(
        self,
        pos_BT: Int[Array, "B T"],
        h_BTD: Float[Array, "B T D"],
        ready_BT: Bool[Array, "B T"],
        hidden_from_BT: Int[Array, "B T"],
        layer: Int[Array, ""],
        similarity_BTW: Float[Array, "B T W"] | None = None,
        context_BTD: Float[Array, "B T D"] | None = None,
    ) -> Bool[Array, "B T W"]:
        """Which of the W slots before each token it may absorb (2.3, D.8).

        Tokens that are ready are neither halted nor exempt; queries from `hidden_from_BT` on have
        lost a token already. Tokens further back than W positions never fuse. `similarity_BTW` is
        the running mean over layers of query-key cosines; None for adjacency only.
        """
        found, states_apart = [], self._distances_back(h_BTD)
        for d in range(1, self.window + 1):
            ok_BT = states_apart(d) < self.tau_fuse_L[layer - 1]
            ok_BT &= ready_BT & back(ready_BT, d) & (pos_BT < back(hidden_from_BT, d))
            apart_BT = pos_BT - back(pos_BT, d)
            ok_BT &= apart_BT <= self.window
            if similarity_BTW is not None:
                index_BT1 = jnp.clip(apart_BT - 1, 0, self.window - 1)[..., None]
                alike_BT = jnp.take_along_axis(similarity_BTW, index_BT1, axis=-1)[..., 0]
                ok_BT &= (apart_BT == 1) | (alike_BT > self.tau_attn)
            if context_BTD is not None:
                ok_BT &= self._distances_back(context_BTD)(d) < self.tau_ctx
            found.append(ok_BT)
        return jnp.stack(found, axis=-1) & self.may_fuse_L[layer - 1]

    def absorb(
        self,
        state: TokenState,
        pos_BT: Int[Array, "B T"],
        pairs_BTW: Bool[Array, "B T W"],
        weights: tuple[Array, Array | None],
        layer: Int[Array, ""],
        dtype: Any,
        *,
        stops: bool,
    ) -> tuple[TokenState, Bool[Array, "B T"]]:
        """Merge pairs (2.3); also return which tokens took part.

        `weights` are `weight_BT` and `paid_BTW` of `merge`.
        """
        merged, takes_BTW = merge(state.h_BTD, pairs_BTW, *weights, state.size_BT, dtype)
        absorbed_BT = absorbers(takes_BTW, pos_BT)
        now_BT = absorbed_BT != NEVER
        state = state.replace(
            h_BTD=merged.h_BTD,
            size_BT=merged.size_BT,
            active_BT=state.active_BT & ~now_BT if stops else state.active_BT,
            fused_BT=jnp.minimum(state.fused_BT, absorbed_BT),
            fused_after_BT=jnp.minimum(state.fused_after_BT, jnp.where(now_BT, layer, NEVER)),
        )
        return state, now_BT | takes_BTW.any(-1)

    def _distances_back(self, x_BTD: Array) -> Callable[[int], Array]:
        norm_BT = jnp.linalg.norm(x_BTD.astype(exact_dtype(x_BTD.dtype)), axis=-1)

        def at(d: int) -> Array:
            return distances(x_BTD, back(x_BTD, d), self.distance, (norm_BT, back(norm_BT, d)))

        return at


def back(array_BT: Array, distance: int) -> Array:
    """The entry `distance` slots before each slot; zeros before the first."""
    widths = [(0, 0), (distance, 0)] + [(0, 0)] * (array_BT.ndim - 2)
    return jnp.pad(array_BT, widths)[:, : array_BT.shape[1]]


def distances(a: Array, b: Array, kind: str, norms: tuple[Array, Array] | None = None) -> Array:
    """||a - b||_2, or that over the mean of the two norms, which may be given."""
    exact = exact_dtype(a.dtype)
    a, b = a.astype(exact), b.astype(exact)
    apart = jnp.linalg.norm(a - b, axis=-1)
    if kind == "raw":
        return apart
    of_a, of_b = norms or (jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(b, axis=-1))
    return apart / jnp.maximum((of_a + of_b) / 2, 1e-12)


def similarity(q_BTNH: Array, k_BTKH: Array, pos_BT: Array, window: int) -> Array:
    """Cosine of each query with the keys 1..W positions back, mean over heads.

    Where tokens are left out, one that lies d positions back is at most d slots back; entry d - 1
    is 0 if it is not there.
    """
    exact = exact_dtype(q_BTNH.dtype)
    q, k = q_BTNH.astype(exact), k_BTKH.astype(exact)
    q = q / jnp.maximum(jnp.linalg.norm(q, axis=-1, keepdims=True), 1e-12)
    k = k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    steps_W = jnp.arange(1, window + 1)[None, None]
    found_BTW = jnp.zeros((*q.shape[:2], window), exact)
    for d in range(1, window + 1):
        cosine_BT = (q * back(k, d)).sum(-1).mean(-1)
        apart_BT = pos_BT - back(pos_BT, d)
        found_BTW += jnp.where(apart_BT[..., None] == steps_W, cosine_BT[..., None], 0)
    return found_BTW


def merge(
    h_BTD: Float[Array, "B T D"],
    pairs_BTW: Bool[Array, "B T W"],
    weight_BT: Float[Array, "B T"],
    paid_BTW: Float[Array, "B T W"] | None,
    size_BT: Float[Array, "B T"],
    dtype: Any,
) -> tuple[Merged, Bool[Array, "B T W"]]:
    """Merge pairs as a decoder would along the row; a token is absorbed once.

    The mean is (w_u h_u + sum_t w_t m_t) / (w_u + sum_t w_t), where m_t is t's state with all it
    has absorbed. Without `paid_BTW`, w_t is the sum over t's members of `weight_BT`; else it is
    what u pays to t. Means are rounded to the model's dtype.

    A token waits only for those that it absorbs, so there are as many passes as the longest chain
    has links.
    """
    takes_BTW = first_takers(pairs_BTW)
    level_BT = levels(takes_BTW)

    def one_pass(number: Array, merged: Merged) -> Merged:
        mass_BT, size_BT = merged.mass_BT, merged.size_BT
        sum_BTD = mass_BT[..., None] * merged.h_BTD
        for d in range(1, pairs_BTW.shape[-1] + 1):
            take_BT, theirs = takes_BTW[..., d - 1], [back(leaf, d) for leaf in merged]
            paid_BT = theirs[1] if paid_BTW is None else paid_BTW[..., d - 1]
            paid_BT = jnp.where(take_BT, paid_BT, 0)
            # Zeros where not absorbed: nan times a weight of 0 is nan.
            their_BTD = jnp.where(take_BT[..., None], theirs[0], 0)
            sum_BTD = sum_BTD + paid_BT[..., None] * their_BTD
            mass_BT = mass_BT + paid_BT
            size_BT = size_BT + jnp.where(take_BT, theirs[2], 0)
        mean_BTD = sum_BTD / jnp.maximum(mass_BT, 1e-30)[..., None]
        due_BT = level_BT == number
        return Merged(
            jnp.where(due_BT[..., None], mean_BTD.astype(dtype), merged.h_BTD),
            jnp.where(due_BT, mass_BT, merged.mass_BT),
            jnp.where(due_BT, size_BT, merged.size_BT),
        )

    # Without pairs there is no pass. Unlike a branch, a loop hands states on without a copy.
    before = Merged(h_BTD, weight_BT, size_BT)
    return lax.fori_loop(1, level_BT.max() + 1, one_pass, before), takes_BTW


def first_takers(pairs_BTW: Bool[Array, "B T W"]) -> Bool[Array, "B T W"]:
    """The pairs that fuse: each token is absorbed by the nearest later one that may."""
    width = pairs_BTW.shape[1]
    slots_BT = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), pairs_BTW.shape[:2])
    first_BT = absorbers(pairs_BTW, slots_BT)
    firsts = [back(first_BT, d) == slots_BT for d in range(1, pairs_BTW.shape[-1] + 1)]
    return pairs_BTW & jnp.stack(firsts, axis=-1)


def levels(takes_BTW: Bool[Array, "B T W"]) -> Int[Array, "B T"]:
    """Links of the longest chain of absorptions that ends in a token; 0 where it absorbs none."""

    def longer(carry):
        before_BT, _ = carry
        chains = [
            jnp.where(takes_BTW[..., d - 1], back(before_BT, d) + 1, 0)
            for d in range(1, takes_BTW.shape[-1] + 1)
        ]
        found_BT = functools.reduce(jnp.maximum, chains)
        return found_BT, (found_BT != before_BT).any()

    nobody_BT = jnp.zeros(takes_BTW.shape[:2], jnp.int32)
    return lax.while_loop(lambda carry: carry[1], longer, (nobody_BT, takes_BTW.any()))[0]


def absorbers(takes_BTW: Bool[Array, "B T W"], pos_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of the first token that absorbs each one at this layer, or NEVER."""
    found_BT = jnp.full(pos_BT.shape, NEVER, jnp.int32)
    for d in range(1, takes_BTW.shape[-1] + 1):
        by_BT = jnp.where(takes_BTW[:, d:, d - 1], pos_BT[:, d:], NEVER)
        found_BT = found_BT.at[:, : by_BT.shape[1]].min(by_BT)
    return found_BT


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
