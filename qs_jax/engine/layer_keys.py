"""Which keys a layer finds, and which of them a query sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from qs_jax.engine import past as pasts
from qs_jax.engine.cache import LayerCache
from qs_jax.engine.call import Call
from qs_jax.mechanisms import kv_skip
from qs_jax.mechanisms.decide import Rows
from qs_jax.mechanisms.plan import NEVER
from qs_jax.state import Past, TokenState


def at_layer(call: Call, state: TokenState, layer: Array) -> kv_skip.Keys:
    """Every key as a layer finds it."""
    if call.past is not None:
        return of_past(call.past, call.rows, layer, state)
    return without_past(call, state)


def of_past(past: Past, rows: Rows, layer: Array, state: TokenState) -> kv_skip.Keys:
    """Every cached key as a layer finds it; slots are positions."""
    batch, capacity = past.halt_layer_BS.shape
    free_BS = layer <= past.hidden_after_BS
    if state.taken_BW is not None:  # absorbed by this very token, at an earlier layer
        slots_BW = pasts.last_slots(rows.pos_BT, state.taken_BW.shape[1])
        index_BW = jnp.where(slots_BW < 0, capacity, slots_BW)  # past the end: dropped
        free_BS = free_BS.at[jnp.arange(batch)[:, None], index_BW].min(~state.taken_BW, mode="drop")
    slots_BS = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32)[None], (batch, capacity))
    return kv_skip.Keys(
        pos_BS=slots_BS,
        real_BS=slots_BS < rows.pos_BT[:, :1],
        halt_layer_BS=past.halt_layer_BS,
        hidden_from_BS=jnp.where(free_BS, NEVER, 0),
        retain_BS=past.retain_BS,
        received_BTS=state.received_BTS,
    )


def own(call: Call, state: TokenState) -> kv_skip.Keys:
    """The keys of the call's own tokens."""
    rows = call.rows
    return kv_skip.Keys(
        pos_BS=rows.pos_BT,
        real_BS=rows.real_BT,
        halt_layer_BS=state.halt_layer_BT,
        hidden_from_BS=call.hidden_from(state),
        retain_BS=rows.retain_BT,
        received_BTS=state.received_BTS,
    )


def without_past(call: Call, state: TokenState) -> kv_skip.Keys:
    """The keys a call without a past finds: of passive tokens, then of its own."""
    mine = own(call, state)
    passive = call.around.passive if call.around is not None else None
    if passive is None:
        return mine
    outside = kv_skip.Keys(
        pos_BS=passive.rows.pos_BT,
        real_BS=passive.rows.real_BT,
        halt_layer_BS=passive.halt_layer_BP,
        hidden_from_BS=passive.hidden_from_BP,
        retain_BS=passive.rows.retain_BT,
        received_BTS=None,
    )
    joined = (jnp.concatenate(both, 1) for both in zip(outside[:-1], mine[:-1], strict=True))
    return kv_skip.Keys(*joined, received_BTS=state.received_BTS)


def mask_of_slots(
    call: Call, state: TokenState, cache: LayerCache, layer: Array
) -> Bool[Array, "B 1 X"]:
    """The attention mask of one layer over its slots, and last the token itself."""
    rows, plan = call.rows, call.plan
    # All that is kept stays visible, until it is absorbed; nothing is where slots are positions.
    if plan.policy != "attended" and (cache.by_position or not call.fuses):
        return cache.mask(rows.pos_BT[:, 0])[:, None]
    assert call.past is not None
    known = of_past(call.past, rows, layer, state)
    if not cache.by_position:
        index_BC = jnp.minimum(cache.pos_BC, known.pos_BS.shape[1] - 1)
        assert known.received_BTS is None
        known = jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, index_BC, axis=1), known)
        known = known._replace(pos_BS=cache.pos_BC)
    seen_B1C = kv_skip.visible(rows.pos_BT, known, layer, plan, call.numbers)
    seen_B1C &= known.pos_BS[:, None] < rows.pos_BT[:, :1, None]
    return jnp.pad(seen_B1C, ((0, 0), (0, 0), (0, 1)), constant_values=True)
