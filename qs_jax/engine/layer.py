"""One layer under the mechanisms, whoever runs it: all tokens, a segment's, or one a row."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qs_jax.engine import decisions, layer_keys, one_query
from qs_jax.engine import past as pasts
from qs_jax.engine.attention import Attended, Places, attention, blocked_attention
from qs_jax.engine.branches import zeros_of
from qs_jax.engine.cache import LayerCache
from qs_jax.engine.call import Call, Passive
from qs_jax.halves import exact_dtype, from_bits
from qs_jax.mechanisms import execution, kv_skip, signals
from qs_jax.mechanisms.plan import LayerNumbers
from qs_jax.models import family_of, rope
from qs_jax.models.layers import Multiply, dense_product
from qs_jax.state import KVCache, LayerRecord, TokenState


class Weights(NamedTuple):
    """Arrays of one layer, or of all on a leading axis of L.

    Attributes:
      params: Of the block.
      int8: Codes of its projections, for products in int8; else None.
      maps: Extrapolation maps, `[X, R, O]`; None under other policies.
    """

    params: Any
    int8: Any
    maps: Any


def weights_of(call: Call, layers: Any) -> Weights:
    """What the layers of a call need besides their numbers.

    Args:
      call: Its parameters hold codes and maps.
      layers: Parameters of the blocks.
    """
    maps = call.params["kv_maps"].maps_LXFO if call.plan.policy == "extrapolate" else None
    codes = call.params["int8"] if execution.multiplies(call.plan) else None
    return Weights(layers, codes, maps)


def run(
    call: Call, state: TokenState, cache: Any, at: LayerNumbers, weights: Weights, past_l: Any
) -> tuple[TokenState, Any, LayerRecord, pasts.Kept | None]:
    """One layer, in the order of docs/concepts.md.

    Args:
      call: What all layers share.
      state: The carry.
      cache: Keys and values so far (`pasts.write`); None when nothing is kept.
      at: Numbers of this layer.
      weights: Its arrays.
      past_l: Its part of the past, or None.

    Returns:
      The next carry, the cache, the evidence, and what later tokens need.
    """
    size_BT = state.size_BT
    state, attended, ran_BT, drift_BT = _block(call, state, cache, at, weights, past_l)
    state, record, fused = decisions.decide_layer(
        call, state, attended, ran_BT, drift_BT, at, past_l
    )
    mask_BTS = attended.mask_BTS
    if isinstance(cache, LayerCache):
        mask_BTS = mask_BTS[..., :-1]  # without the token itself
    kept = pasts.of_layer(call, size_BT, *fused, mask_BTS, past_l)
    return state, attended.cache, record, kept


def _block(
    call: Call, state: TokenState, cache: Any, at: LayerNumbers, weights: Weights, past_l: Any
) -> tuple[TokenState, Attended, Array, Array | None]:
    """The block itself: everybody is computed, then only tokens that still do take the result."""
    plan, rows = call.plan, call.rows
    weights = weights._replace(params=from_bits(weights.params))
    block = family_of(call.model).block(call.model)
    mask_BTS = _mask(call, state, cache, at)
    halted_BT = at.layer > state.halt_layer_BT
    log_size_BS = _log_sizes(call, state, cache, past_l)
    passive = call.around.passive if call.around is not None else None
    places = None
    if call.lean and call.by_places:

        def seen():
            keys = layer_keys.at_layer(call, state, at.layer)
            first_BS = kv_skip.seen_from(keys, at.layer, plan, call.numbers)
            return first_BS, keys.hidden_from_BS if call.fuses else None

        # Always taken. Results of a branch are there before the loops that read them: else XLA
        # works them out anew for each query and head.
        places = Places(rows.pos_BT, *lax.cond(at.layer > 0, seen, lambda: zeros_of(seen)))

    def attend(q, k, v):
        k, v = stored(call, state, k, v, halted_BT, weights.maps)
        if isinstance(cache, LayerCache):
            own = cache._replace(k_B1KH=k, v_B1KH=v)
            context, shown_BNTS = one_query.attention(q, own, mask_BTS, log_size_BS)
            return context, Attended(own, mask_BTS, shown_BNTS, k, q, log_size_BS)
        slot = at.layer - 1 - call.layers_before
        kept, k_all, v_all = pasts.write(cache, slot, rows.pos_BT, k, v, call)
        if passive is not None:
            k_p, v_p = _passive_keys(call, passive, at, weights)
            if isinstance(kept, KVCache):
                kept = kept.write_slots(slot, passive.rows.pos_BT, k_p, v_p)
            k_all, v_all = jnp.concatenate([k_p, k_all], 1), jnp.concatenate([v_p, v_all], 1)
        shown_BNTS = None
        if call.lean:
            outside = k_all.shape[1] - q.shape[1]  # keys of passive tokens come first
            context = blocked_attention(
                q, k_all, v_all, mask_BTS, places=places, prefix=outside, log_size_BS=log_size_BS
            )
        else:
            context, shown_BNTS = attention(q, k_all, v_all, mask_BTS, log_size_BS)
        return context, Attended(kept, mask_BTS, shown_BNTS, k_all, q, log_size_BS)

    multiply = multiply_of(call, state.bits_BT, at, weights)
    params = {"params": weights.params}
    out: Any = block.apply(params, state.h_BTD, rows.pos_BT, attend, multiply)
    h_BTD, attended = out
    ran_BT = rows.real_BT & ~call.stopped(state)
    if plan.halting is not None and plan.halting.freeze:
        ran_BT &= ~halted_BT
    taken_BT, drift_BT = ran_BT, None
    if plan.halting is not None and call.decides and call.lean and not plan.halting.drift_used:
        drift_BT = jnp.full(ran_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    elif plan.halting is not None and call.decides:
        with jax.named_scope("signals"):
            drift_BT = signals.drift(plan.halting.drift, h_BTD, state.h_BTD)
        # No drift is below -1, but XLA cannot know and works drifts out before it overwrites
        # the states they are read from. Otherwise, or if a branch read those, it would copy them.
        taken_BT = ran_BT & ~(drift_BT < -1)
    h_BTD = jnp.where(taken_BT[..., None], h_BTD, state.h_BTD)
    return state.replace(h_BTD=h_BTD), attended, ran_BT, drift_BT


def multiply_of(call: Call, bits_BT: Array, at: LayerNumbers, weights: Weights) -> Multiply:
    """How the projections of a layer multiply.

    Args:
      call: What all layers share.
      bits_BT: Of each token.
      at: Numbers of the layer.
      weights: Its arrays.
    """
    if not call.quantizes:
        return dense_product
    return execution.multiplier(call.plan.amq, bits_BT, weights.int8, at.has_bits)


def _mask(call: Call, state: TokenState, cache: Any, at: LayerNumbers) -> Array:
    if isinstance(cache, LayerCache):
        return layer_keys.mask_of_slots(call, state, cache, at.layer)
    keys = layer_keys.at_layer(call, state, at.layer)
    return kv_skip.visible(call.rows.pos_BT, keys, at.layer, call.plan, call.numbers)


def _log_sizes(call: Call, state: TokenState, cache: Any, past_l: Any) -> Array | None:
    """Logarithm of the tokens each key stands for, where attention is proportional."""
    if call.plan.fusion is None or not call.plan.fusion.proportional_attention:
        return None
    own_BT = jnp.log(state.size_BT)
    if isinstance(cache, LayerCache):
        return cache.by_slot(jnp.log(past_l.size_BS), own_BT)
    if call.past is not None:
        return pasts.insert(jnp.log(past_l.size_BS), call.rows.pos_BT, own_BT)
    if call.around is None or call.around.passive is None:
        return own_BT
    return jnp.concatenate([jnp.log(call.around.passive.size_BP), own_BT], axis=1)


def stored(call: Call, state: TokenState, k: Array, v: Array, halted_BT: Array, maps_XRO: Any):
    """A layer's keys and values as they are kept: extrapolated where halted, quantised."""
    if call.decides and call.plan.policy == "extrapolate":
        assert state.code_BTR is not None
        frozen = (state.code_BTR, state.halt_layer_BT, call.rows.pos_BT)

        def mapped():
            return _extrapolated(call, *frozen, k, v, halted_BT, maps_XRO)

        if call.groups_maps:
            k, v = lax.cond(halted_BT.any(), mapped, lambda: (k, v))
        else:
            k, v = mapped()
    if not call.quantizes:
        return k, v
    bits_BT, amq = state.bits_BT, call.plan.amq
    return execution.kept(k, bits_BT, amq), execution.kept(v, bits_BT, amq)


def _passive_keys(
    call: Call, passive: Passive, at: LayerNumbers, weights: Weights
) -> tuple[Array, Array]:
    """Keys and values of tokens that run no more, from their frozen states."""
    rows, amq = passive.rows, call.plan.amq
    if call.plan.policy == "extrapolate":
        assert passive.code_BPR is not None
        frozen = (passive.code_BPR, passive.halt_layer_BP, rows.pos_BT)
        shape = (*rows.pos_BT.shape, call.model.num_kv_heads, call.model.head_dim)
        nothing = jnp.zeros(shape, call.model.dtype)
        everyone_BP = jnp.ones(rows.pos_BT.shape, bool)
        k, v = _extrapolated(call, *frozen, nothing, nothing, everyone_BP, weights.maps)
    else:
        multiply = multiply_of(call, passive.bits_BP, at, weights)
        k, v = keys_values(call, passive.h_BPD, rows.pos_BT, weights.params, multiply)
    return execution.kept(k, passive.bits_BP, amq), execution.kept(v, passive.bits_BP, amq)


def keys_values(call: Call, h_BTD: Array, pos_BT: Array, params_l: Any, multiply: Multiply):
    """Keys and values alone, `[B, T, K, H]` each."""
    block = family_of(call.model).block(call.model, parent=None)  # others are being applied
    found: Any = block.apply(
        {"params": params_l}, h_BTD, pos_BT, multiply, method=block.keys_values
    )
    return found


def _extrapolated(call: Call, code_BTR, halt_layer_BT, pos_BT, k, v, halted_BT, maps):
    """Keys and values with those of halted tokens read from their frozen states."""
    model, kv_maps = call.model, call.params["kv_maps"]
    maps = maps.astype(code_BTR.dtype)
    wanted_BT = halted_BT if call.groups_maps else None
    found = kv_skip.apply_maps(code_BTR, maps, halt_layer_BT, kv_maps.layers, wanted_BT)
    k_mapped, v_mapped = jnp.split(found, 2, axis=-1)
    k_mapped, v_mapped = k_mapped.reshape(k.shape), v_mapped.reshape(v.shape)
    if family_of(model).rotates:
        k_mapped = rope.rotate(k_mapped, pos_BT, model)
    here = halted_BT[..., None, None]
    return jnp.where(here, k_mapped, k), jnp.where(here, v_mapped, v)
