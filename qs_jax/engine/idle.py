"""A layer in which no live token computes: what is left of it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qs_jax.engine import decisions, layer
from qs_jax.engine import past as pasts
from qs_jax.engine.call import Call
from qs_jax.mechanisms import fusion
from qs_jax.mechanisms.plan import LayerNumbers
from qs_jax.state import LayerRecord, TokenState


def idle(
    call: Call,
    state: TokenState,
    cache: LayerCache,
    at: LayerNumbers,
    weights: layer.Weights,
    past_l: Any,
    stores: bool,
) -> tuple[TokenState, LayerCache, LayerRecord, pasts.Kept | None]:
    """`layer.run` where every live token has halted before: only their keys and values, if any.

    Args:
      call: What all layers share.
      state: The carry.
      cache: As in `layer.run`.
      at: Numbers of this layer.
      weights: Its arrays.
      past_l: Its part of the past.
      stores: Some key needs writing.
    """
    rows, plan = call.rows, call.plan
    nobody_BT = jnp.zeros_like(rows.real_BT)
    if stores:
        multiply = layer.multiply_of(call, state.bits_BT, at, weights)
        k, v = layer.keys_values(call, state.h_BTD, rows.pos_BT, weights.params, multiply)
        k, v = layer.stored(call, state, k, v, ~nobody_BT, weights.maps)
        cache = cache._replace(k_B1KH=k, v_B1KH=v)
    in_force = state
    if plan.shortlist_size and call.decides:
        state = decisions.find_shortlist(call, state, at)
    if call.quantizes:
        state = decisions.assign_bits(call, state, at)
    no_mask_BTS = nobody_BT[..., None]
    written_BT = decisions.written_of(call, in_force, nobody_BT, no_mask_BTS, at.layer)
    record = decisions.blank_record(call, in_force).replace(written_BT=written_BT)
    fused = (None, None, None)
    if call.fuses:
        assert state.taken_BW is not None
        merged = fusion.Merged(state.h_BTD, state.size_BT, state.size_BT)
        last_BWD = pasts.last_states(call, state.h_BTD, past_l)
        fused = (last_BWD, merged, jnp.zeros_like(state.taken_BW))
    width = call.past.halt_layer_BS.shape[1] if call.past is not None else rows.pos_BT.shape[1]
    kept_mask_BTS = jnp.zeros((*rows.pos_BT.shape, width), bool)
    kept = pasts.of_layer(call, state.size_BT, *fused, kept_mask_BTS, past_l)
    return state, cache, record, kept
