"""What is decided after a layer has run: signals, halting, fusion, bits (docs/concepts.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qs_jax.engine import codes, layer_keys
from qs_jax.engine import past as pasts
from qs_jax.engine.attention import Attended
from qs_jax.engine.branches import zeros_of
from qs_jax.engine.cache import LayerCache
from qs_jax.engine.call import Call
from qs_jax.halves import as_state, exact_dtype
from qs_jax.mechanisms import amq, decide, execution, fusion, halting, kv_skip, signals
from qs_jax.mechanisms.plan import NEVER, LayerNumbers
from qs_jax.state import LayerRecord, TokenState

# A lean call gathers the candidates of an entropy where they are fewer than one in this many.
FEW_CANDIDATES = 8


def decide_layer(call: Call, state: TokenState, attended: Attended, ran_BT, drift_BT, at, past_l):
    """Signals, then halting, then fusion, then bits (order: docs/concepts.md)."""
    plan, in_force = call.plan, state
    stopped_BT = call.stopped(state)
    nan_BT = jnp.full(ran_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    recorded_BT = entropy_BT = nan_BT
    if plan.shortlist_size and call.decides:
        state = find_shortlist(call, state, at)
    if plan.halting is not None and call.decides:
        with jax.named_scope("halt"):
            halts_BT, recorded_BT, entropy_BT = _halt_if_asked(
                call, state, attended, ran_BT, stopped_BT, drift_BT, at
            )
            state = state.replace(halt_layer_BT=jnp.where(halts_BT, at.layer, state.halt_layer_BT))
    if plan.policy == "attended":
        state = state.replace(received_BTS=_received(call, state, attended, ran_BT, at.layer))
    fused = (None, None, None)
    weighed_BT = jnp.zeros_like(ran_BT)
    if call.fuses:
        with jax.named_scope("fuse"):
            state, fused, weighed_BT = _fuse(call, state, attended, stopped_BT, at, past_l)
    if call.quantizes:
        with jax.named_scope("amq"):
            state = _quantize(call, state, ran_BT, at)
    if plan.policy == "extrapolate" and call.decides:
        state = state.replace(code_BTR=codes.of_halted(call, state, at.layer))
    record = LayerRecord(
        active_BT=ran_BT,
        written_BT=written_of(call, in_force, ran_BT, attended.mask_BTS, at.layer),
        visible_BT=jnp.where(ran_BT, _visible(call, in_force, attended, at.layer), 0),
        bits_BT=in_force.bits_BT,
        fused_BT=in_force.hidden_from_BT,
        drift_BT=recorded_BT,
        entropy_BT=entropy_BT,
        weighed_BT=weighed_BT,
    )
    return state, record, fused


def _visible(call: Call, state: TokenState, attended: Attended, layer: Array) -> Array:
    """How many keys each token's query could see, itself included."""
    if not (call.lean and call.by_places):
        return attended.mask_BTS.sum(-1, dtype=jnp.int32)
    keys, pos_BT = layer_keys.without_past(call, state), call.rows.pos_BT
    first_BS = kv_skip.seen_from(keys, layer, call.plan, call.numbers)
    ever_BS = (first_BS < keys.hidden_from_BS).astype(jnp.int32)
    shape = call.around.slot_of_BT.shape if call.around is not None else pos_BT.shape
    rows_B1 = jnp.arange(len(pos_BT))[:, None]
    change_BP = jnp.zeros(shape, jnp.int32).at[rows_B1, first_BS].add(ever_BS, mode="drop")
    change_BP = change_BP.at[rows_B1, keys.hidden_from_BS].add(-ever_BS, mode="drop")
    return jnp.take_along_axis(jnp.cumsum(change_BP, axis=1), pos_BT, axis=1)


def blank_record(call: Call, state: TokenState) -> LayerRecord:
    """The record of tokens that take no part in a layer."""
    no_BT = jnp.zeros(call.rows.pos_BT.shape, bool)
    nan_BT = jnp.full(no_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    return LayerRecord(
        active_BT=no_BT,
        written_BT=no_BT,
        visible_BT=no_BT.astype(jnp.int32),
        bits_BT=state.bits_BT,
        fused_BT=state.hidden_from_BT,
        drift_BT=nan_BT,
        entropy_BT=nan_BT,
        weighed_BT=no_BT,
    )


def find_shortlist(call: Call, state: TokenState, at: LayerNumbers) -> TokenState:
    """The ids of the shortlist entropy, at the one layer that picks them."""
    before_BTX, size = state.shortlist_BTX, call.plan.shortlist_size
    found_BTX = lax.cond(
        at.pick_shortlist,
        lambda: signals.pick_shortlist(state.h_BTD, call.params, call.model, size),
        lambda: before_BTX,
    )
    return state.replace(shortlist_BTX=found_BTX)


def _halt_if_asked(call: Call, state: TokenState, attended, ran_BT, stopped_BT, drift_BT, at):
    """Who halts now, drifts and entropies; a lean call looks only where somebody might."""

    def decide_now():
        return _halt(call, state, attended, ran_BT, stopped_BT, drift_BT, at)

    if not call.lean:
        return decide_now()
    asked = at.may_halt | (call.rows.forced_layer_BT == at.layer).any()
    if call.plan.planned:
        asked |= at.keep < 1
    nan_BT = jnp.full(ran_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    return lax.cond(asked, decide_now, lambda: (jnp.zeros_like(ran_BT), nan_BT, nan_BT))


def _halt(call: Call, state: TokenState, attended, ran_BT, stopped_BT, drift_BT, at):
    plan, rows = call.plan, call.rows
    rule = plan.halting
    assert rule is not None
    halted_BT = at.layer > state.halt_layer_BT
    decided = at.may_halt | (at.keep < 1) if plan.planned else at.may_halt
    candidates_BT = decide.eligible(rows, stopped_BT) & ~halted_BT & decided
    if rule.rule == "dual":  # the cheap test first: who fails it needs no entropy
        candidates_BT &= drift_BT < at.tau_drift
    entropy_BT = jnp.full(drift_BT.shape, jnp.nan, drift_BT.dtype)
    if rule.entropy_used is not None:
        entropy_BT = _entropy(call, state, rule.entropy_used, candidates_BT)
        entropy_BT = jnp.where(candidates_BT, entropy_BT, jnp.nan)
    score_BT = None
    if rule.rule == "quota":
        scores = {
            "attention": lambda: _attention_received(call, attended, rows.asking_BT & ran_BT),
            "drift": lambda: drift_BT,
            "entropy": lambda: jnp.where(candidates_BT, entropy_BT, 0),
            "random": lambda: halting.random_score(rows.pos_BT, rule),
        }
        with jax.named_scope("signals"):
            score_BT = scores[rule.score]()
    tested = entropy_BT if rule.entropy_used is not None else None
    outside_B = call.around.halted_B if call.around is not None else None
    signals_read = (drift_BT, tested, score_BT)
    halts_BT = decide.halt(rows, halted_BT, stopped_BT, *signals_read, at, plan, outside_B)
    if plan.planned:
        assert call.prompt_lengths_B is not None
        running_BT = ran_BT & ~halts_BT & (rows.pos_BT < call.prompt_lengths_B[:, None])
        allowed_B = jnp.ceil(at.keep * call.prompt_lengths_B - 1e-3)
        may_BT = decide.eligible(rows, stopped_BT) & running_BT
        ranked_BT = drift_BT if score_BT is None else score_BT
        halts_BT |= halting.over_capacity(ranked_BT, may_BT, running_BT, allowed_B)
    return halts_BT, jnp.where(ran_BT, drift_BT, jnp.nan), entropy_BT


def _attention_received(call: Call, attended: Attended, asking_BT: Array) -> Array:
    """Attention each of the call's own tokens received from the asking queries."""
    width = asking_BT.shape[1]
    rule = call.plan.halting
    assert rule is not None
    count = min(rule.score_queries, width)
    index_BQ = jnp.argsort(~asking_BT, axis=1, stable=True)[:, :count]
    asking_BQ = jnp.take_along_axis(asking_BT, index_BQ, axis=1)
    weights_BQS = attended.weights_at(index_BQ).max(1)[..., -width:]
    return halting.attention_received(weights_BQS, asking_BQ, index_BQ)


def _entropy(call: Call, state: TokenState, kind: str, needed_BT: Array) -> Array:
    """Entropies, computed only if some token needs one."""
    previous_BT = jnp.full(needed_BT.shape, jnp.inf, exact_dtype(call.model.dtype))
    if call.past is not None:
        previous_BT = call.past.previous_B[:, None]

    read = (state.h_BTD, state.shortlist_BTX, previous_BT)

    def compute(h_BTD, shortlist_BTX, previous_BT) -> Array:
        with jax.named_scope("signals"):
            return signals.entropy(kind, h_BTD, call.params, call.model, shortlist_BTX, previous_BT)

    def nothing() -> Array:
        return jnp.zeros(needed_BT.shape, exact_dtype(call.model.dtype))

    few = needed_BT.size // FEW_CANDIDATES
    if not call.lean or few == 0:
        return lax.cond(needed_BT.any(), lambda: compute(*read), nothing)

    def compute_few() -> Array:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), read)
        index_M = jnp.argsort(~needed_BT.reshape(-1), stable=True)[:few]
        found_1M = compute(*jax.tree.map(lambda leaf: leaf[index_M][None], flat))
        return nothing().reshape(-1).at[index_M].set(found_1M[0]).reshape(needed_BT.shape)

    count = needed_BT.sum()
    case = (count > 0).astype(jnp.int32) + (count > few)
    return lax.switch(case, [nothing, compute_few, lambda: compute(*read)])


def _received(call: Call, state: TokenState, attended: Attended, ran_BT, layer) -> Array:
    keys = layer_keys.at_layer(call, state, layer)
    before_BS = call.past.received_BS if call.past is not None else None
    last_BS = keys.halt_layer_BS + call.numbers.delay
    here_BS = last_BS == layer
    received_BTS = state.received_BTS
    assert received_BTS is not None

    def look() -> Array:
        weights_BTS = attended.weights().max(1)
        if isinstance(attended.cache, LayerCache):
            weights_BTS = weights_BTS[..., :-1]  # slots are positions; without the token itself
        found_BTS = kv_skip.running_maximum(weights_BTS, call.rows.pos_BT, keys, ran_BT, before_BS)
        return jnp.where(here_BS[:, None, :], found_BTS, received_BTS)

    return lax.cond(here_BS.any(), look, lambda: received_BTS) if call.lean else look()


def written_of(call: Call, state: TokenState, ran_BT, mask_BTS, layer) -> Array:
    """Tokens whose keys and values were written at this layer: passive ones, then the call's.

    A key that "attended" brings back counts as written once some query sees it.
    """
    own = (
        layer_keys.own(call, state)
        if call.past is not None
        else layer_keys.without_past(call, state)
    )
    exists_BS = kv_skip.written(own, layer, call.plan, call.numbers)
    if call.plan.policy == "attended" and call.past is None:
        width, total = mask_BTS.shape[1:]
        others_BTS = mask_BTS & ~jnp.eye(width, total, k=total - width, dtype=bool)[None]
        exists_BS |= (others_BTS & ran_BT[:, :, None]).any(1)
    halted_BS = layer > own.halt_layer_BS
    stopped_BS = call.stopped(state)
    if stopped_BS.shape != halted_BS.shape:  # what a stopped token had is gone from the start
        outside = halted_BS.shape[1] - stopped_BS.shape[1]
        gone_BP = own.hidden_from_BS[:, :outside] == 0
        stopped_BS = jnp.concatenate([gone_BP, stopped_BS], axis=1)
    return own.real_BS & ~stopped_BS & (exists_BS | ~halted_BS)


def _fuse(call: Call, state: TokenState, attended: Attended, stopped_BT, at, past_l):
    rows, setting = call.rows, call.plan.fusion
    assert setting is not None
    width = rows.pos_BT.shape[1]
    before = pasts.earlier(call, state, past_l, at.layer)
    ready_BT = decide.eligible(rows, stopped_BT) & (at.layer < state.halt_layer_BT)
    own = fusion.Tokens(rows.pos_BT, state.h_BTD, ready_BT, call.hidden_from(state), None)
    mean_BTW = None
    if setting.window > 1:
        k_BXKH = pasts.last_keys(call, attended.k_BSKH, setting.window, attended.cache)
        pos_BX = jnp.concatenate([before.tokens.pos_BX, rows.pos_BT], axis=1)
        found_BTW = fusion.similarity(attended.q_BTNH, k_BXKH, pos_BX, setting.window)
        assert state.similarity_BTW is not None
        state = state.replace(similarity_BTW=state.similarity_BTW + found_BTW)
        mean_BTW = state.similarity_BTW / at.layer.astype(found_BTW.dtype)

    def joined() -> fusion.Tokens:
        both = zip(before.tokens[:4], own[:4], strict=True)
        parts = [jnp.concatenate(pair, 1) for pair in both]
        return fusion.Tokens(*parts, context_BXD=call.context_BXD)

    # The last states as well: taken elsewhere, nothing would tell XLA that the merge, which reuses
    # the memory of the states, comes after it, and it would copy them at every layer.
    def find():
        found_BTW = fusion.pairs(joined(), width, mean_BTW, at.tau_fuse, setting, call.numbers)
        return found_BTW, pasts.last_states(call, state.h_BTD, past_l)

    pairs_BTW, last_BWD = lax.cond(at.may_fuse, find, lambda: zeros_of(find))

    # Where later tokens follow that may fuse with these, their weights must be known.
    followed = call.keeps and not call.plan.continuation

    def weigh():
        return _weights(call, state, attended, joined().h_BXD)

    read = pairs_BTW.any() | (at.may_fuse & followed)
    own_BT, paid_BTW = lax.cond(read, weigh, lambda: zeros_of(weigh))
    merged, takes_BTW = fusion.merge(
        state.h_BTD,
        pairs_BTW,
        own_BT,
        paid_BTW,
        state.size_BT,
        before.merged,
        call.model.dtype,
    )
    absorbed_BX = fusion.absorbers(takes_BTW, rows.pos_BT)
    absorbed_BT = absorbed_BX[:, -width:]
    now_BT = absorbed_BT != NEVER
    took_BW = absorbed_BX[:, :-width] != NEVER
    fused = (last_BWD, merged, took_BW)
    after_BT = jnp.where(now_BT, at.layer, NEVER)
    assert state.taken_BW is not None
    state = state.replace(
        h_BTD=merged.h_BXD,
        size_BT=merged.size_BX,
        hidden_from_BT=jnp.minimum(state.hidden_from_BT, absorbed_BT),
        hidden_after_BT=jnp.minimum(state.hidden_after_BT, after_BT),
        taken_BW=state.taken_BW | took_BW,
    )
    return state, fused, now_BT | takes_BTW.any(-1)


def _weights(call: Call, state: TokenState, attended: Attended, h_BXD):
    """Each token's weight in a mean, and what it pays to the W tokens before it (or None)."""
    plan, rows = call.plan, call.rows
    assert plan.fusion is not None
    window, width = plan.fusion.window, rows.pos_BT.shape[1]
    if plan.fusion.alpha == "uniform":
        return state.size_BT, None
    if plan.fusion.alpha == "probability":
        before_BTD = codes.just_before(call, h_BXD)
        found_BT = signals.token_probability(before_BTD, rows.tokens_BT, call.params, call.model)
        found_BT = jnp.where(rows.pos_BT == 0, 1.0 / call.model.vocab_size, found_BT)
        return found_BT * state.size_BT, None
    mean_BTS = attended.weights().mean(1)
    steps_W = jnp.arange(window + 1)[None, None, :]
    own_BT = rows.pos_BT
    if call.past is None:  # the call's own keys come last
        own_BT = mean_BTS.shape[2] - width + jnp.broadcast_to(jnp.arange(width)[None], own_BT.shape)
    slots_BTW = jnp.maximum(own_BT[..., None] - steps_W, 0)
    if isinstance(attended.cache, LayerCache):
        before_B1W = attended.cache.slots_of(slots_BTW[:, 0, 1:])[:, None]
        own_B11 = jnp.full_like(slots_BTW[..., :1], mean_BTS.shape[-1] - 1)
        slots_BTW = jnp.concatenate([own_B11, before_B1W], axis=-1)
    paid_BTW = jnp.take_along_axis(mean_BTS, slots_BTW, axis=-1)
    return paid_BTW[..., 0], paid_BTW[..., 1:]


def _quantize(call: Call, state: TokenState, ran_BT: Array, at: LayerNumbers) -> TokenState:
    setting = call.plan.amq
    assert setting is not None
    state = assign_bits(call, state, at)
    if "hidden" in setting.targets:
        dtype = call.model.dtype
        found_BTD = execution.simulate(state.h_BTD.astype(dtype), state.bits_BT, setting)
        kept_BTD = as_state(found_BTD, dtype)
        state = state.replace(h_BTD=jnp.where(ran_BT[..., None], kept_BTD, state.h_BTD))
    return state


def assign_bits(call: Call, state: TokenState, at: LayerNumbers) -> TokenState:
    """The bits of every token, at the one layer that assigns them."""
    plan, rows = call.plan, call.rows
    setting = plan.amq
    assert setting is not None
    entropy_BT = jnp.zeros(rows.pos_BT.shape, exact_dtype(call.model.dtype))
    if setting.entropy is not None:
        needed_BT = rows.subject_BT & at.assign_bits
        entropy_BT = _entropy(call, state, setting.entropy, needed_BT)
    assigned_BT = amq.assign_bits(
        entropy_BT,
        rows.subject_BT,
        rows.full_BT,
        setting,
        call.numbers,
        call.model,
        plan.shortlist_size,
    )
    return state.replace(bits_BT=jnp.where(at.assign_bits, assigned_BT, state.bits_BT))
