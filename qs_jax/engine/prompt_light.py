"""Light layers in the prompt engine: a smaller block for most tokens, the whole for the rest."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from qs_jax.engine.attention import blocked_attention
from qs_jax.engine.cache import KVCache
from qs_jax.engine.gather import layer_at, put, take, true_first
from qs_jax.engine.prompt_call import Call, Carry, eligible
from qs_jax.mechanisms import Rows
from qs_jax.mechanisms.light import shared_keys
from qs_jax.models import apply_block
from qs_jax.state import NEVER


def run(call: Call, carry: Carry, slots: int) -> Carry:
    """State and cache after the light layers, whole for tokens that are exempt.

    Two groups of each row are gathered, each with its own block. All light tokens stop at the end.

    Args:
      call: What all layers share; its parameters hold the reduced layers.
      carry: After the last whole layer.
      slots: Most tokens of a row that do not.
    """
    rule, rows, whole = call.mech.halting, call.rows, carry.state
    assert rule is not None
    assert rule.light_from is not None
    light_BT = eligible(rows, whole)
    if rule.leaves_whole:
        whole = rule.leave_whole(whole, rows, light_BT, call.params["kv_maps"].attended_F)
        light_BT = eligible(rows, whole)
    exact = _group(rows, rows.real_BT & ~light_BT, slots)
    light = _group(rows, light_BT, call.plan.light)
    first_BS, cache = jnp.where(rows.real_BT, rows.pos_BT, NEVER), carry.cache
    # Where each position is among the tokens of both groups; a gather is cheaper than a scatter.
    held_BX = jnp.concatenate([exact.slots_BC, light.slots_BC], axis=1)
    place_BS = jnp.argsort(held_BX, axis=1)
    place_BS = jnp.take_along_axis(place_BS, _rank(rows.real_BT), axis=1)
    h_BCD, h_BPD = (take(whole.h_BTD, group.index_BC) for group in (exact, light))
    for index, bound in enumerate(call.params["light"].layers, start=rule.light_from - 1):
        given = (call, bound, jnp.int32(index), exact, light, place_BS, first_BS)
        h_BCD, h_BPD, cache = _light_layer(*given, h_BCD, h_BPD, cache)
    h_BTD = whole.h_BTD
    for group, own in ((exact, h_BCD), (light, h_BPD)):  # spare slots keep what is there
        now = jnp.where(group.held_BC[..., None], own, take(h_BTD, group.index_BC))
        h_BTD = put(h_BTD, group.index_BC, now)
    last = rule.light_from - 1 + len(call.params["light"].layers)
    stopped = {"active_BT": whole.active_BT & ~light_BT}
    stopped["depth_BT"] = jnp.where(light_BT, last, whole.depth_BT)
    return carry._replace(state=whole.replace(h_BTD=h_BTD, **stopped), cache=cache)


class _Group(NamedTuple):
    """Positions of a group's tokens, rising; slots beyond them hold others."""

    index_BC: Int[Array, "B C"]
    held_BC: Bool[Array, "B C"]
    slots_BC: Int[Array, "B C"]


def _group(rows: Rows, mask_BT: Array, slots: int) -> _Group:
    index_BC = jnp.sort(true_first(mask_BT)[:, :slots], axis=1)
    held_BC = take(mask_BT, index_BC)
    return _Group(index_BC, held_BC, jnp.where(held_BC, index_BC, NEVER))


def _rank(real_BT: Array) -> Array:
    """How many real tokens are before each position; padding gets the last real token's."""
    return jnp.maximum(jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1, 0)


def _light_layer(
    call: Call,
    bound: dict[str, Any],
    index: Array,
    exact: _Group,
    light: _Group,
    place_BS: Array,
    first_BS: Array,
    h_BCD: Array,
    h_BPD: Array,
    cache: KVCache,
) -> tuple[Array, Array, KVCache]:
    """One layer: whole for one group, reduced for the other; each sees the keys of both."""
    model, whole = call.model, bound["whole"] or layer_at(call.weights, index).params
    window = model.sliding_window

    def attend(q: Array, k_exact: Array, v_exact: Array):
        def attend_light(q: Array, k_light: Array, v_light: Array):
            pairs = ((k_exact, k_light), (v_exact, v_light))
            k, v = (take(jnp.concatenate(pair, axis=1), place_BS) for pair in pairs)
            shared = (bound["heads"], model.num_heads)
            keys = (shared_keys(k, *shared), shared_keys(v, *shared))
            return blocked_attention(q, *keys, light.index_BC, first_BS, window=window), (k, v)

        given = (h_BPD, light.index_BC, attend_light, bound["code"])
        light_BPD, (k, v) = apply_block(model, bound["block"], *given, method="light")
        context = blocked_attention(q, k, v, exact.index_BC, first_BS, window=window)
        return context, (light_BPD, cache.write(index, None, k, v))

    given = (h_BCD, exact.index_BC, attend)
    h_BCD, (h_BPD, cache) = apply_block(model, whole, *given)
    return h_BCD, h_BPD, cache
