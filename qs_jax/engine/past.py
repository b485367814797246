"""Reading and writing `Past`: what a later token needs of the tokens before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qs_jax.engine.cache import LayerCache
from qs_jax.engine.call import Call
from qs_jax.halves import exact_dtype, from_bits, to_bits
from qs_jax.mechanisms import fusion
from qs_jax.mechanisms.decide import Rows
from qs_jax.mechanisms.plan import NEVER, Plan
from qs_jax.state import FusionWindow, KVCache, LayerRecord, Past, TokenState


class PastLayer(NamedTuple):
    """The arrays of a `Past` that differ by layer, on a leading axis of L or of one layer."""

    size_BS: Array | None
    before_BWD: Array | None
    merged: fusion.Merged | None


class Kept(NamedTuple):
    """What a layer leaves for later tokens; `absorbed_BW` and `seen_BS` concern earlier ones."""

    size_BT: Array | None
    before_BWD: Array | None
    merged: fusion.Merged | None
    absorbed_BW: Array | None
    seen_BS: Array | None


class Earlier(NamedTuple):
    """The W tokens before the call's first."""

    tokens: fusion.Tokens
    merged: fusion.Merged


def by_layer(past: Past | None) -> PastLayer | None:
    """The layer-wise part of a past, to be scanned over."""
    if past is None:
        return None
    window = past.window
    if window is None:
        return PastLayer(past.size_LBS, None, None)
    merged = fusion.Merged(window.after_LBWD, window.mass_LBW, window.size_LBW)
    return PastLayer(past.size_LBS, window.before_LBWD, merged)


def insert(array_BS: Array, pos_BT: Array, values_BT: Array) -> Array:
    """Write each row's one value at its position."""
    return array_BS.at[jnp.arange(len(pos_BT)), pos_BT[:, 0]].set(values_BT[:, 0])


def write(
    cache: KVCache | None, index: Array, pos_BT: Array, k: Array, v: Array, call: Call
) -> tuple[KVCache | None, Array, Array]:
    """Write a layer's keys and values; returns the cache and all keys and values to attend to."""
    if cache is None:
        return None, k, v
    if call.around is not None:
        return cache.write_slots(index, pos_BT, k, v), k, v
    if call.past is None:
        return cache.write_rows(index, k, v), k, v
    cache = cache.write_step(index, pos_BT[:, 0], k, v)
    return cache, *cache.of_layer(index)


def contexts(embedded_BTD: Array, rows: Rows, plan: Plan, past: Past | None) -> Array | None:
    """Contexts of the W tokens before the call's and of its own, `[B, W + T, D]`."""
    setting = plan.fusion
    if setting is None or setting.tau_ctx is None:
        return None
    if past is None:
        own_BTD = fusion.contexts(embedded_BTD, rows.real_BT, setting.context)
        return jnp.pad(own_BTD, ((0, 0), (setting.window, 0), (0, 0)))
    window = past.window
    assert window is not None
    assert window.embedded_BCD is not None
    assert window.embedded_real_BC is not None
    assert window.context_BWD is not None
    all_BCD = jnp.concatenate([window.embedded_BCD, embedded_BTD], axis=1)
    real_BC = jnp.concatenate([window.embedded_real_BC, jnp.ones_like(rows.real_BT)], axis=1)
    own_B1D = fusion.contexts(all_BCD, real_BC, setting.context)[:, -1:]
    return jnp.concatenate([window.context_BWD, own_B1D], axis=1)


def last_slots(pos_BT: Array, count: int) -> Array:
    """The `count` positions before each row's one token, oldest first; negative where none."""
    return pos_BT[:, :1] + jnp.arange(-count, 0, dtype=jnp.int32)[None]


def _take(array_BX: Array, index_BW: Array) -> Array:
    index_BW = jnp.clip(index_BW, 0, array_BX.shape[1] - 1)
    index_BW = index_BW.reshape(*index_BW.shape, *[1] * (array_BX.ndim - 2))
    return from_bits(jnp.take_along_axis(to_bits(array_BX), index_BW, axis=1))


def earlier(call: Call, state: TokenState, past_l: PastLayer | None, layer: Array) -> Earlier:
    """The W tokens before the call's, as far as they may still fuse at this layer."""
    past, pos_BT = call.past, call.rows.pos_BT
    assert state.taken_BW is not None
    batch, count = state.taken_BW.shape
    if past is None:
        shape, exact = (batch, count), exact_dtype(call.model.dtype)
        zeros_BW = jnp.zeros(shape, exact)
        h_BWD = jnp.zeros((*shape, call.model.hidden_size), call.embedded_BTD.dtype)
        nobody_BW = jnp.zeros(shape, jnp.int32)
        tokens = fusion.Tokens(nobody_BW, h_BWD, nobody_BW > 0, nobody_BW, None)
        return Earlier(tokens, fusion.Merged(h_BWD, zeros_BW, zeros_BW))
    assert past.window is not None
    assert past_l is not None
    assert past_l.before_BWD is not None
    assert past_l.merged is not None
    slots_BW = last_slots(pos_BT, count)
    runs_BW = _take(past.halt_layer_BS, slots_BW) > layer
    free_BW = (_take(past.hidden_after_BS, slots_BW) > layer) & ~state.taken_BW
    tokens = fusion.Tokens(
        pos_BX=slots_BW,
        h_BXD=past_l.before_BWD,
        ready_BX=(slots_BW >= 0) & ~past.window.exempt_BW & runs_BW,
        hidden_from_BX=jnp.where(free_BW, NEVER, 0),
        context_BXD=None,
    )
    return Earlier(tokens, past_l.merged)


def last_keys(call: Call, k_BSKH: Array, count: int, cache: Any) -> Array:
    """Keys of the W tokens before the call's and of its own, `[B, W + T, K, H]`."""
    if call.past is None:
        k_BSKH = k_BSKH[:, -call.rows.pos_BT.shape[1] :]  # passive tokens come first
        return jnp.pad(k_BSKH, ((0, 0), (count, 0), (0, 0), (0, 0)))
    if isinstance(cache, LayerCache):
        slots_BW = cache.slots_of(last_slots(call.rows.pos_BT, count))
        found_BWO = _take(cache.of_layer()[0], slots_BW)
        found_BWKH = found_BWO.reshape(*slots_BW.shape, *k_BSKH.shape[2:])
        return jnp.concatenate([found_BWKH, k_BSKH], axis=1)
    slots_BX = jnp.concatenate([last_slots(call.rows.pos_BT, count), call.rows.pos_BT], axis=1)
    return _take(k_BSKH, slots_BX)


def _last(call: Call, old: Array | None, new_BTX: Array, count: int) -> Array:
    """The last `count` entries of each row: of the call's tokens, or of old ones and the new."""
    if call.past is None:
        if call.around is not None:
            assert call.lengths_B is not None
            index_BW = last_slots(call.lengths_B[:, None], count)
            return _take(new_BTX, _take(call.around.slot_of_BT, index_BW))
        ends_B1 = call.rows.real_BT.sum(1, dtype=jnp.int32)[:, None]
        return _take(new_BTX, last_slots(ends_B1, count))
    assert old is not None
    moved = jnp.concatenate([old, new_BTX], axis=1)[:, 1:]
    live = call.rows.real_BT[:, 0].reshape(-1, *[1] * (new_BTX.ndim - 1))
    return jnp.where(live, moved, old)


def last_states(call: Call, h_BTD: Array, past_l: PastLayer | None) -> Array | None:
    """States `[B, W, D]` of the last tokens as they are now; None where no later token fuses."""
    fusing = call.plan.fusion
    if fusing is None or not call.keeps or call.plan.continuation:
        return None
    return _last(call, past_l.before_BWD if past_l is not None else None, h_BTD, fusing.window)


def of_layer(
    call: Call,
    size_BT: Array,
    before_BWD: Array | None,
    merged: fusion.Merged | None,
    absorbed_BW: Array | None,
    mask_BTS: Array,
    past_l: PastLayer | None,
) -> Kept | None:
    """What this layer leaves for later tokens; None if there will be none."""
    if not call.keeps:
        return None
    plan, kept_before, kept_merged = call.plan, None, None
    proportional = plan.fusion is not None and plan.fusion.proportional_attention
    if merged is not None and not plan.continuation:
        assert plan.fusion is not None
        count = plan.fusion.window
        old = past_l if past_l is not None else PastLayer(None, None, None)
        kept_before = before_BWD
        olds = old.merged if old.merged is not None else (None, None, None)
        pieces = [_last(call, was, new, count) for was, new in zip(olds, merged, strict=True)]
        kept_merged = fusion.Merged(*pieces)
    decoding = call.past is not None
    return Kept(
        size_BT=size_BT if proportional else None,
        before_BWD=kept_before,
        merged=kept_merged,
        absorbed_BW=absorbed_BW if decoding else None,
        seen_BS=mask_BTS[:, 0] if decoding and plan.policy == "attended" else None,
    )


def begin(call: Call, state: TokenState, record: LayerRecord, kept: Kept, cache: KVCache) -> Past:
    """The past after whole rows."""
    rows, capacity = call.rows, cache.capacity
    batch, width = rows.pos_BT.shape

    def pad(array: Array, value: int, axis: int = 1) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, capacity - width)
        return jnp.pad(array, widths, constant_values=value)

    received_BS = None
    if state.received_BTS is not None:
        last_B = jnp.maximum(rows.real_BT.sum(1) - 1, 0)
        received_BS = pad(state.received_BTS[jnp.arange(batch), last_B], 0)
    exact = exact_dtype(call.model.dtype)
    return Past(
        cache=cache,
        halt_layer_BS=pad(
            jnp.where(rows.real_BT, state.halt_layer_BT, call.model.num_layers),
            call.model.num_layers,
        ),
        hidden_after_BS=pad(state.hidden_after_BT, NEVER),
        hidden_from_BS=pad(state.hidden_from_BT, NEVER),
        retain_BS=pad(rows.retain_BT, 0),
        received_BS=received_BS,
        size_LBS=None if kept.size_BT is None else pad(kept.size_BT, 1, axis=2),
        window=_window(call, kept),
        previous_B=jnp.full(batch, jnp.inf, exact),
        record=jax.tree.map(lambda leaf: pad(leaf, 0, axis=2), record),
    )


def _window(call: Call, kept: Kept) -> FusionWindow | None:
    setting, past = call.plan.fusion, call.past
    if setting is None or kept.merged is None:
        return None
    assert kept.before_BWD is not None
    old = past.window if past is not None else None
    rows = call.rows
    exempt_BT = ~rows.subject_BT | rows.full_BT | ~rows.real_BT
    exempt_BW = _last(call, old.exempt_BW if old is not None else None, exempt_BT, setting.window)
    if past is None:
        ends_B1 = rows.real_BT.sum(1, dtype=jnp.int32)[:, None]
        exempt_BW |= last_slots(ends_B1, setting.window) < 0
    embedded = real = context = None
    if setting.tau_ctx is not None:
        assert call.context_BXD is not None
        olds = (None,) * 3
        if old is not None:
            olds = (old.embedded_BCD, old.embedded_real_BC, old.context_BWD)
        width = rows.pos_BT.shape[1]
        embedded = _last(call, olds[0], call.embedded_BTD, setting.context - 1)
        real = _last(call, olds[1], jnp.ones_like(rows.real_BT), setting.context - 1)
        if past is None:
            ends_B1 = rows.real_BT.sum(1, dtype=jnp.int32)[:, None]
            real &= last_slots(ends_B1, setting.context - 1) >= 0
        context = _last(call, olds[2], call.context_BXD[:, -width:], setting.window)
    return FusionWindow(
        before_LBWD=kept.before_BWD,
        after_LBWD=kept.merged.h_BXD,
        mass_LBW=kept.merged.mass_BX,
        size_LBW=kept.merged.size_BX,
        exempt_BW=exempt_BW,
        embedded_BCD=embedded,
        embedded_real_BC=real,
        context_BWD=context,
    )


def extend(call: Call, state: TokenState, record: LayerRecord, kept: Kept, cache: Any) -> Past:
    """The past after one more token a row; rows that are not live keep theirs."""
    past, rows = call.past, call.rows
    assert past is not None
    batch_B, pos_B, live_B = jnp.arange(len(rows.pos_BT)), rows.pos_BT[:, 0], rows.real_BT[:, 0]

    def put(old_BS: Array, new_BT: Array) -> Array:
        return old_BS.at[batch_B, pos_B].set(
            jnp.where(live_B, new_BT[:, 0], old_BS[batch_B, pos_B])
        )

    def put_layers(old_LBS: Array, new_LBT: Array) -> Array:
        return jax.vmap(put)(old_LBS, new_LBT)

    hidden_after_BS = put(past.hidden_after_BS, state.hidden_after_BT)
    hidden_from_BS = put(past.hidden_from_BS, state.hidden_from_BT)
    if kept.absorbed_BW is not None and past.window is not None:
        taken_LBW = kept.absorbed_BW & live_B[None, :, None]
        layer_L11 = call.numbers.layers.layer[:, None, None]
        after_BW = jnp.where(taken_LBW, layer_L11, NEVER).min(0)
        from_BW = jnp.where(taken_LBW.any(0), rows.pos_BT, NEVER)
        slots_BW = jnp.maximum(last_slots(rows.pos_BT, after_BW.shape[1]), 0)
        hidden_after_BS = hidden_after_BS.at[batch_B[:, None], slots_BW].min(after_BW)
        hidden_from_BS = hidden_from_BS.at[batch_B[:, None], slots_BW].min(from_BW)
    received_BS = past.received_BS
    if received_BS is not None:
        assert state.received_BTS is not None
        received_BS = jnp.where(live_B[:, None], state.received_BTS[:, 0], received_BS)
    records = jax.tree.map(put_layers, past.record, record)
    if kept.absorbed_BW is not None and past.window is not None:
        taken_LBW = kept.absorbed_BW & live_B[None, :, None]
        slots_BW = jnp.maximum(last_slots(rows.pos_BT, taken_LBW.shape[2]), 0)
        weighed_LBS = records.weighed_BT.at[:, batch_B[:, None], slots_BW].max(taken_LBW)
        layer_L11 = call.numbers.layers.layer[:, None, None]
        first_BW = jnp.where(taken_LBW, layer_L11, NEVER).min(0)
        by_LBW = jnp.where(layer_L11 > first_BW[None], rows.pos_BT[None], NEVER)
        fused_LBS = records.fused_BT.at[:, batch_B[:, None], slots_BW].min(by_LBW)
        records = records.replace(weighed_BT=weighed_LBS, fused_BT=fused_LBS)
    if kept.seen_BS is not None:
        slots_1S = jnp.arange(past.halt_layer_BS.shape[1])[None]
        others_BS = (slots_1S < pos_B[:, None]) & live_B[:, None]
        seen_LBS = kept.seen_BS & others_BS[None] & record.active_BT
        records = records.replace(written_BT=records.written_BT | seen_LBS)
    return past.replace(
        cache=cache,
        halt_layer_BS=put(past.halt_layer_BS, state.halt_layer_BT),
        hidden_after_BS=hidden_after_BS,
        hidden_from_BS=hidden_from_BS,
        retain_BS=put(past.retain_BS, rows.retain_BT),
        received_BS=received_BS,
        size_LBS=jax.tree.map(put_layers, past.size_LBS, kept.size_BT),  # both may be None
        window=_window(call, kept),
        record=records,
    )
