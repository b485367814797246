"""The prompt engine: prefill that leaves out the work that the mechanisms decided against.

Layers run in segments. At the start of each, the tokens that still compute are gathered into a
static number of slots. At its end they go back to their places, and the keys and values that
stopped tokens have in deeper layers are filled in from their frozen states. The mechanism objects
are those of the definition (`masked.py`). They decide inside the segment where a rule looks at
every layer, else at its end. The last layer computes keys and values of every token, and the rest
of the tokens whose output is read. That holds for the dense model, too: a prompt of one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine import prompt_light
from qs_jax.engine.attention import attention_weights, blocked_attention, in_window
from qs_jax.engine.cache import KVCache
from qs_jax.engine.gather import layer_at, put, take, true_first
from qs_jax.engine.prompt_call import Call, Carry, Plan, Segments, Slots, eligible
from qs_jax.engine.prompt_fill import end_segment
from qs_jax.engine.weights import Weights, layer_weights
from qs_jax.mechanisms import Mechanisms, Rows, halting, signals
from qs_jax.models import Params, apply_block, embed, head
from qs_jax.state import NEVER, Decisions, TokenState, exact_dtype


def run(
    params: Params,
    rows: Rows,
    read_BQ: Int[Array, "B Q"],
    model: ModelConfig,
    mech: Mechanisms,
    plan: Plan,
    segments: Segments,
) -> tuple[Array, KVCache, Decisions]:
    """Normed states at the positions that are read, the cache, and what was decided.

    Rows are as in `masked.run`; `prompt_plan.refusal` says which mechanisms can run here.
    """
    embedded_BTD = embed(params, rows.tokens_BT, rows.pos_BT, model)
    call = Call(params, model, mech, plan, rows, embedded_BTD, layer_weights(params))
    rule, shape = mech.halting, rows.pos_BT.shape
    unread = jnp.full((model.num_layers, *shape), jnp.nan, exact_dtype(model.dtype))
    carry = Carry(
        mech.start(embedded_BTD, rows, model),
        KVCache.zeros(model, *shape),
        unread if rule is not None and rule.reads_drift else None,
        unread if rule is not None and rule.entropy is not None else None,
    )
    if plan.fixed:
        for s, slots in enumerate(plan.slots):
            first, last = segments.first_S[s], segments.last_S[s]
            fill = plan.fills[s]
            if plan.light and s == 1:
                carry = prompt_light.run(call, carry, slots)
                carry = end_segment(call, carry, first, last, fill)
                continue
            own = params["light"].deeper if plan.light and s == 2 else None
            given = {"leading": s == 0, "stops": fill > 0, "own": own}
            carry = _segment(call, carry, first, last, slots, **given)
            carry = end_segment(call, carry, first, last, fill)
    else:
        first, last = segments.first_S[0], segments.last_S[0]
        carry = _segment(call, carry, first, last, plan.slots[-1], leading=True)
        carry = end_segment(call, carry, first, last, None)
        carry = _choose_slots(call, carry, segments)
    h_BQD, cache = _last_layer(call, carry, read_BQ)
    state = carry.state
    decided = (state.depth_BT, state.fused_BT, state.fused_after_BT, state.bits_BT)
    decisions = Decisions(*decided, rows.retain_BT, carry.drift_LBT, carry.entropy_LBT)
    return head.normed(params, h_BQD, model), cache, decisions


# --- segments -----------------------------------------------------------------------------------


def _choose_slots(call: Call, carry: Carry, segments: Segments) -> Carry:
    """All segments but the first, each with the fewest slots that hold the tokens it computes."""
    choices, longest = jnp.asarray(call.plan.slots, jnp.int32), call.plan.longest

    def branch(slots: int):
        def run(carry: Carry, first: Array, last: Array, offset: Array) -> Carry:
            return _segment(call, carry, first, last, slots, offset=offset)

        return run

    def segment(carry: Carry, bounds: Segments):
        first, last = bounds.first_S, bounds.last_S
        needed = carry.state.active_BT.sum(1).max()
        # A branch copies the caches it takes: it gets the segment's layers only.
        offset = jnp.clip(first - 1, 0, call.model.num_layers - longest)
        inside = carry._replace(cache=carry.cache.cut(offset, longest))
        branches = [branch(slots) for slots in call.plan.slots]
        index = (choices < needed).sum()
        after = lax.switch(index, branches, inside, first, last, offset)
        after = after._replace(cache=carry.cache.paste(offset, after.cache))
        return end_segment(call, after, first, last, None), None

    rest = jax.tree.map(lambda leaf: leaf[1:], segments)
    return lax.scan(segment, carry, rest)[0]


def _segment(
    call: Call,
    carry: Carry,
    first: Array,
    last: Array,
    slots: int,
    *,
    leading: bool = False,
    offset: Any = 0,
    stops: bool = True,
    own: Mapping[int, Any] | None = None,
) -> Carry:
    """Layers `first` to `last` on so many tokens of each row; the cache begins with `offset`.

    Blocks that the segment's layers have of their `own`, by index, are read in place of the stacked
    ones.
    """
    whole = carry.state
    chosen, state = _gather(call, whole, slots, first)
    chosen = chosen._replace(offset=offset, leading=leading)

    def body(index: Array, loop, weights: Weights | None = None):
        carry, before_BCD = loop
        del before_BCD
        before_BCD = carry.state.h_BTD
        read = weights or layer_at(call.weights, index)
        carry = _run_layer(call, carry, chosen, whole, index, read)
        return carry, before_BCD if remembers else None

    rule = call.mech.halting
    at_end = rule is not None and stops and not call.decides_inside
    remembers = rule is not None and at_end and rule.reads_before
    loop = (carry._replace(state=state), state.h_BTD if remembers else None)
    if own:
        for index, block in own.items():
            loop = body(jnp.int32(index), loop, Weights(block, None, None))
    else:
        loop = lax.fori_loop(first - 1, last, body, loop)
    carry, before_BCD = loop
    if at_end:
        carry = _decide(call, carry, chosen, whole, before_BCD, last)
    return carry._replace(state=_scatter(whole, carry.state, chosen.index_BC))


def _gather(call: Call, whole: TokenState, slots: int, first: Array) -> tuple[Slots, TokenState]:
    """Gather the tokens that compute; spare slots hold stopped ones, which do not change."""
    if slots == call.rows.pos_BT.shape[1]:
        return Slots(None, call.rows, None, first), whole
    index_BC = jnp.sort(true_first(whole.active_BT)[:, :slots], axis=1)
    waiting_BT = eligible(call.rows, whole) & (whole.depth_BT < first)
    inside_B = take(waiting_BT, index_BC).sum(1, dtype=jnp.int32)
    outside_B = waiting_BT.sum(1, dtype=jnp.int32) - inside_B
    rows, state = jax.tree.map(lambda leaf: take(leaf, index_BC), (call.rows, whole))
    return Slots(index_BC, rows, outside_B, first), state


def _scatter(whole: TokenState, state: TokenState, index_BC: Array | None) -> TokenState:
    if index_BC is None:
        return state
    return jax.tree.map(lambda old, new: put(old, index_BC, new), whole, state)


def _everywhere(whole_BT: Array, chosen: Slots, own_BC: Array) -> Array:
    """An array over whole rows with the values of the segment's tokens put in."""
    return own_BC if chosen.index_BC is None else put(whole_BT, chosen.index_BC, own_BC)


# --- one layer ----------------------------------------------------------------------------------


def _run_layer(
    call: Call, carry: Carry, chosen: Slots, whole: TokenState, index: Array, weights: Weights
) -> Carry:
    mech, model, state, rows = call.mech, call.model, carry.state, chosen.rows
    layer = index + 1
    gathered = chosen.index_BC is not None
    among_all = gathered and call.plan.keeps_keys

    def attend(q: Array, k: Array, v: Array):
        k, v = mech.stored(k, v, state.bits_BT)
        slots_BC = None
        if gathered or (call.plan.keeps_keys and not chosen.leading):
            # Keys of tokens that stopped in an earlier segment are there already.
            slots_BC = jnp.where(state.depth_BT >= chosen.first, rows.pos_BT, NEVER)
        cache = carry.cache.write(index - chosen.offset, slots_BC, k, v)
        if among_all or (slots_BC is not None and not gathered):
            k, v = cache.layer(index - chosen.offset)
        first_BS = _first_queries(call, chosen, whole, state, layer, among_all)
        window = model.sliding_window
        return blocked_attention(q, k, v, rows.pos_BT, first_BS, window=window), cache

    multiply = mech.multiply(state.bits_BT, weights.int8, layer)
    given = (state.h_BTD, rows.pos_BT, attend, multiply)
    h_BTD, cache = apply_block(model, weights.params, *given)
    before_BTD = state.h_BTD
    h_BTD = jnp.where(state.active_BT[..., None], h_BTD, before_BTD)
    here = layer == mech.shortlist_layer
    state = signals.pick_shortlist_at(here, state.replace(h_BTD=h_BTD), call.params, model)
    carry = carry._replace(state=state, cache=cache)
    if not call.decides_inside:
        return carry
    if mech.halting is not None:
        carry = _decide(call, carry, chosen, whole, before_BTD, layer)
    if mech.fusion is not None:
        with jax.named_scope("fuse"):
            carry = carry._replace(state=_fuse(call, carry.state, chosen.rows, layer))
    return carry


def _first_queries(
    call: Call, chosen: Slots, whole: TokenState, state: TokenState, layer: Array, among_all: bool
) -> Array:
    """Position of the first query that sees each key; NEVER where the key does not exist."""
    rows, depth_BS, absorbed_BS = chosen.rows, state.depth_BT, state.fused_BT
    if among_all:
        rows = call.rows
        depth_BS = _everywhere(whole.depth_BT, chosen, depth_BS)
        absorbed_BS = _everywhere(whole.fused_BT, chosen, absorbed_BS)
    exists_BS = call.mech.kv_skip.written(depth_BS, rows.retain_BT, layer)
    exists_BS &= rows.real_BT & (absorbed_BS == NEVER)
    return jnp.where(exists_BS, rows.pos_BT, NEVER)


def _last_layer(call: Call, carry: Carry, read_BQ: Array) -> tuple[Array, KVCache]:
    """Keys and values of every token that computes; the rest for the tokens that are read."""
    model, state, rows = call.model, carry.state, call.rows
    index = model.num_layers - 1
    layer, weights = jnp.int32(model.num_layers), layer_at(call.weights, index)
    given = (state.h_BTD, rows.pos_BT, call.mech.multiply(state.bits_BT, weights.int8, layer))
    k, v = apply_block(model, weights.params, *given, method="keys_values")
    k, v = call.mech.stored(k, v, state.bits_BT)
    slots_BT = jnp.where(state.active_BT, rows.pos_BT, NEVER) if call.plan.keeps_keys else None
    cache = carry.cache.write(jnp.int32(index), slots_BT, k, v)
    k, v = cache.layer(jnp.int32(index))
    everyone = Slots(None, rows, None, 1)
    first_BS = _first_queries(call, everyone, state, state, layer, among_all=True)

    def attend(q: Array, *_: Array):
        options = {"window": model.sliding_window, "rising": False}
        return blocked_attention(q, k, v, read_BQ, first_BS, **options), None

    rows_B1 = jnp.arange(len(read_BQ))[:, None]
    own = (state.h_BTD, state.bits_BT, state.active_BT)
    h_BQD, bits_BQ, active_BQ = (array_BT[rows_B1, read_BQ] for array_BT in own)
    multiply = call.mech.multiply(bits_BQ, weights.int8, layer)
    after_BQD, _ = apply_block(model, weights.params, h_BQD, read_BQ, attend, multiply)
    return jnp.where(active_BQ[..., None], after_BQD, h_BQD), cache


# --- decisions ----------------------------------------------------------------------------------


def _decide(
    call: Call, carry: Carry, chosen: Slots, whole: TokenState, before_BCD: Any, layer: Array
) -> Carry:
    """Halting after a layer, as `masked._halt`."""
    rule, state, rows = call.mech.halting, carry.state, chosen.rows
    assert rule is not None
    drift_BT = jnp.full(rows.pos_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    read: dict[str, Any] = {"before_BTD": before_BCD, "after_BTD": state.h_BTD}
    ran_BT = state.active_BT
    with jax.named_scope("signals"):
        if rule.reads_drift:
            drift_BT = signals.drift(rule.drift, state.h_BTD, before_BCD)
        if rule.reads_attention:
            receive = lambda: _received(call, carry, chosen, whole, before_BCD, layer)  # noqa: E731
            nothing = jnp.zeros_like(drift_BT)
            may = rule.may_halt_L[layer - 1]
            inside = call.decides_inside  # else this is a halting layer
            read["received_BT"] = lax.cond(may, receive, lambda: nothing) if inside else receive()
        if rule.reads_keys:
            found = carry.cache.layer(layer - 1 - chosen.offset)
            if chosen.index_BC is not None:
                found = tuple(take(array_BSKH, chosen.index_BC) for array_BSKH in found)
            read |= dict(zip(("keys_BTKH", "values_BTKH"), found, strict=True))
    with jax.named_scope("halt"):
        entropy_of = signals.entropies(state, call.params, call.model)
        decided_by = (eligible(rows, state), drift_BT, layer, entropy_of, read)
        state, entropy_BT = rule.after_layer(state, rows, *decided_by, chosen.outside_B)
    drift_BT = jnp.where(ran_BT, drift_BT, jnp.nan)

    def note(signals_LBT: Array | None, own_BC: Array) -> Array | None:
        if signals_LBT is None:
            return None
        nothing_BT = jnp.full(signals_LBT.shape[1:], jnp.nan, signals_LBT.dtype)
        return signals_LBT.at[layer - 1].set(_everywhere(nothing_BT, chosen, own_BC))

    drift_LBT, entropy_LBT = note(carry.drift_LBT, drift_BT), note(carry.entropy_LBT, entropy_BT)
    return carry._replace(state=state, drift_LBT=drift_LBT, entropy_LBT=entropy_LBT)


def _received(call, carry, chosen, whole, before_BCD, layer) -> Float[Array, "B C"]:
    """Attention that the segment's tokens received in a layer from the prompt's last queries."""
    rule, rows, state = call.mech.halting, chosen.rows, carry.state
    counted_BC = rows.scoring_BT & state.active_BT
    count = min(rule.score_queries, counted_BC.shape[1])
    # Consecutive positions are in consecutive slots, or nearer; past the end, the last repeats.
    index_BQ = counted_BC.argmax(1)[:, None] + jnp.arange(count)[None]
    index_BQ = jnp.minimum(index_BQ, counted_BC.shape[1] - 1)
    read, rows_B1 = (before_BCD, rows.pos_BT, state.bits_BT), jnp.arange(len(index_BQ))[:, None]
    h_BQD, pos_BQ, bits_BQ = (x[rows_B1, index_BQ] for x in read)
    counted_BQ = counted_BC[rows_B1, index_BQ]
    weights = layer_at(call.weights, layer - 1)
    given = (h_BQD, pos_BQ, call.mech.multiply(bits_BQ, weights.int8, layer))
    q_BQNH = apply_block(call.model, weights.params, *given, method="queries")
    k_BSKH, _ = carry.cache.layer(layer - 1 - chosen.offset)
    first_BS = _first_queries(call, chosen, whole, state, layer, among_all=True)
    mask_BQS = first_BS[:, None, :] <= pos_BQ[..., None]
    mask_BQS &= in_window(pos_BQ, first_BS, call.model.sliding_window)
    weights_BQS = attention_weights(q_BQNH, k_BSKH, mask_BQS).max(1)
    received_BS = halting.attention_received(weights_BQS, counted_BQ, pos_BQ)
    return received_BS if chosen.index_BC is None else take(received_BS, chosen.index_BC)


def _fuse(call: Call, state: TokenState, rows: Rows, layer: Array) -> TokenState:
    """Fusion of adjacent tokens after a layer, as `masked._fuse`; absorbed tokens stop."""
    rule = call.mech.fusion
    assert rule is not None
    ready_BT = eligible(rows, state) & (layer < state.depth_BT)
    tokens = (rows.pos_BT, state.h_BTD, ready_BT, state.fused_BT)
    nobody_BTW = jnp.zeros((*rows.pos_BT.shape, 1), bool)
    find = lambda: rule.pairs(*tokens, layer)  # noqa: E731
    pairs_BTW = lax.cond(rule.may_fuse_L[layer - 1], find, lambda: nobody_BTW)
    merging = (rows.pos_BT, pairs_BTW, (state.size_BT, None), layer, call.model.dtype)
    return rule.absorb(state, *merging, stops=True)[0]
