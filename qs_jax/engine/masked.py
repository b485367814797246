"""The masked engine: the definition of every mechanism, as mask arithmetic in one `lax.scan`.

Every token is computed at every layer and the decisions select what counts, so nothing is saved
here: savings are simulated. `run` takes a whole batch of rows (scoring, prefill) or one token a row
after a `Past` (decoding); both go through the same layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qs_jax.config import ModelConfig
from qs_jax.engine import past as pasts
from qs_jax.engine.attention import Attended, attention
from qs_jax.engine.call import Call
from qs_jax.mechanisms import amq, decide, execution, fusion, halting, kv_skip, signals
from qs_jax.mechanisms.plan import NEVER, LayerNumbers, Numbers, Plan
from qs_jax.models import Params, family_of, head, rope
from qs_jax.models.layers import dense_product, exact_dtype
from qs_jax.state import KVCache, LayerRecord, Past, TokenState


def run(
    params: Params,
    rows: decide.Rows,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    past: Past | None = None,
    capacity: int | None = None,
) -> tuple[Float[Array, "B T D"], TokenState, LayerRecord, Past | None]:
    """Run tokens through all layers under the mechanisms.

    Args:
      params: Stacked tree, with "kv_maps" where the policy extrapolates.
      rows: Tokens: whole rows from position 0, or, with a past, one token a row.
      model: Architecture.
      plan: Static half of the configuration.
      numbers: Traced half.
      past: Of the tokens before; None at the start of a row.
      capacity: Slots of a new `Past`; None keeps none.

    Returns:
      Normed states, the final carry, the evidence `[L, B, T]`, and the past of the next token.
    """
    family = family_of(model)
    with jax.named_scope("embed"):
        embedded: Any = family.embed(model).apply(
            {"params": params["embed"]}, rows.tokens_BT, rows.pos_BT
        )
    keeps = past is not None or capacity is not None
    call = Call(params, model, plan, numbers, rows, embedded, past, keeps, None)
    if call.fuses:
        call = call._replace(context_BXD=pasts.contexts(embedded, rows, plan, past))
    cache = past.cache if past is not None else None
    if capacity is not None:
        cache = KVCache.zeros(model, rows.tokens_BT.shape[0], capacity)
    block = family.block(model)

    def layer(carry, scanned):
        state, cache = carry
        at, params_l, int8_l, maps_l, past_l = scanned
        size_BT = state.size_BT
        state, attended, ran_BT, before_BTD = _block(
            call, block, state, cache, at, params_l, int8_l, maps_l, past_l
        )
        state, record, fused = _decide(call, state, attended, ran_BT, before_BTD, at, past_l)
        kept = pasts.of_layer(call, size_BT, *fused, attended.mask_BTS, past_l)
        return (state, attended.cache), (record, kept)

    maps = params["kv_maps"].maps_LXFO if plan.policy == "extrapolate" else None
    codes = params["int8"] if execution.multiplies(plan) else None
    scanned = (numbers.layers, params["layers"], codes, maps, pasts.by_layer(past))
    (state, cache), (record, kept) = lax.scan(layer, (_start(call), cache), scanned)
    following = None
    if cache is not None:
        assert kept is not None
        follow = pasts.begin if past is None else pasts.extend
        following = follow(call, state, record, kept, cache)
    return head.normed(params, state.h_BTD, model), state, record, following


def _start(call: Call) -> TokenState:
    plan, model, past = call.plan, call.model, call.past
    shape, exact = call.rows.pos_BT.shape, exact_dtype(model.dtype)
    never_BT = jnp.full(shape, NEVER, jnp.int32)
    similarity = received = shortlist = taken = None
    if call.fuses:
        assert plan.fusion is not None
        taken = jnp.zeros((shape[0], plan.fusion.window), bool)
        if plan.fusion.window > 1:
            similarity = jnp.zeros((*shape, plan.fusion.window), exact)
    if plan.policy == "attended":
        received = jnp.zeros((*shape, shape[1]), exact)
        if past is not None:
            assert past.received_BS is not None
            received = past.received_BS[:, None, :]
    if plan.shortlist_size:
        shortlist = jnp.zeros((*shape, plan.shortlist_size), jnp.int32)
    return TokenState(
        h_BTD=call.embedded_BTD,
        halt_layer_BT=jnp.full(shape, model.num_layers, jnp.int32),
        hidden_from_BT=never_BT,
        hidden_after_BT=never_BT,
        size_BT=jnp.ones(shape, exact),
        bits_BT=jnp.full(shape, amq.FULL_BITS, jnp.int32),
        similarity_BTW=similarity,
        received_BTS=received,
        shortlist_BTX=shortlist,
        taken_BW=taken,
    )


def _keys(call: Call, state: TokenState, layer: Array) -> kv_skip.Keys:
    """Every key as this layer finds it."""
    if call.past is not None:
        return pasts.keys(call.past, call.rows, layer, state)
    return pasts.own_keys(call, state)


def _block(
    call: Call, block, state: TokenState, cache, at: LayerNumbers, params_l, int8_l, maps_l, past_l
):
    """The layer itself: dense work, then only tokens that still compute take the result."""
    plan, rows = call.plan, call.rows
    keys = _keys(call, state, at.layer)
    mask_BTS = kv_skip.visible(rows.pos_BT, keys, at.layer, plan, call.numbers)
    halted_BT = at.layer > state.halt_layer_BT
    log_size_BS = None
    if plan.fusion is not None and plan.fusion.proportional_attention:
        log_size_BS = jnp.log(state.size_BT)
        if call.past is not None:
            log_size_BS = pasts.insert(jnp.log(past_l.size_BS), rows.pos_BT, log_size_BS)

    def attend(q, k, v):
        if plan.policy == "extrapolate":
            k, v = _extrapolated(call, state, k, v, halted_BT, maps_l)
        k = execution.kept(k, state.bits_BT, plan.amq)
        v = execution.kept(v, state.bits_BT, plan.amq)
        kept, k_all, v_all = pasts.write(cache, at.layer - 1, rows.pos_BT, k, v, call.past)
        context, weights = attention(q, k_all, v_all, mask_BTS, log_size_BS)
        return context, Attended(kept, mask_BTS, weights, k_all, q)

    def run_block(multiply):
        return block.apply({"params": params_l}, state.h_BTD, rows.pos_BT, attend, multiply)

    multiply = execution.multiplier(plan.amq, state.bits_BT, int8_l)
    if int8_l is None:
        out: Any = run_block(multiply)
    else:  # layers without bits yet run in the model's dtype
        out = lax.cond(at.has_bits, lambda: run_block(multiply), lambda: run_block(dense_product))
    h_BTD, attended = out
    ran_BT = rows.real_BT & ~call.stopped(state)
    if plan.halting is not None and plan.halting.freeze:
        ran_BT &= ~halted_BT
    before_BTD = state.h_BTD
    h_BTD = jnp.where(ran_BT[..., None], h_BTD, before_BTD)
    return state.replace(h_BTD=h_BTD), attended, ran_BT, before_BTD


def _extrapolated(call: Call, state: TokenState, k, v, halted_BT, maps_XFO):
    model, maps = call.model, call.params["kv_maps"]
    read = kv_skip.features(state.h_BTD, call.embedded_BTD, maps.features)
    found = kv_skip.extrapolate(read, maps_XFO.astype(read.dtype), state.halt_layer_BT, maps.layers)
    k_mapped, v_mapped = jnp.split(found, 2, axis=-1)
    k_mapped, v_mapped = k_mapped.reshape(k.shape), v_mapped.reshape(v.shape)
    if family_of(model).rotates:
        k_mapped = rope.rotate(k_mapped, call.rows.pos_BT, model)
    here = halted_BT[..., None, None]
    return jnp.where(here, k_mapped, k), jnp.where(here, v_mapped, v)


def _decide(call: Call, state: TokenState, attended: Attended, ran_BT, before_BTD, at, past_l):
    """Signals, then halting, then fusion, then bits (DESIGN section 5)."""
    plan, in_force = call.plan, state
    stopped_BT = call.stopped(state)
    nan_BT = jnp.full(ran_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    drift_BT = entropy_BT = nan_BT
    if plan.shortlist_size:
        state = state.replace(
            shortlist_BTX=lax.cond(
                at.pick_shortlist,
                lambda: signals.pick_shortlist(
                    state.h_BTD, call.params, call.model, plan.shortlist_size
                ),
                lambda: in_force.shortlist_BTX,
            )
        )
    if plan.halting is not None and call.decides:
        with jax.named_scope("halt"):
            state, drift_BT, entropy_BT = _halt(
                call, state, attended, ran_BT, stopped_BT, before_BTD, at
            )
    if plan.policy == "attended":
        state = state.replace(received_BTS=_received(call, state, attended, ran_BT, at.layer))
    fused = (None, None, None)
    weighed_BT = jnp.zeros_like(ran_BT)
    if call.fuses:
        with jax.named_scope("fuse"):
            state, fused, weighed_BT = _fuse(call, state, attended, stopped_BT, at, past_l)
    if plan.amq is not None and (call.decides or plan.narrow):
        with jax.named_scope("amq"):
            state = _quantize(call, state, ran_BT, at)
    record = LayerRecord(
        active_BT=ran_BT,
        written_BT=_written(call, in_force, ran_BT, attended.mask_BTS, at.layer),
        visible_BT=jnp.where(ran_BT, attended.mask_BTS.sum(-1), 0).astype(jnp.int32),
        bits_BT=in_force.bits_BT,
        fused_BT=in_force.hidden_from_BT,
        drift_BT=drift_BT,
        entropy_BT=entropy_BT,
        weighed_BT=weighed_BT,
    )
    return state, record, fused


def _halt(call: Call, state: TokenState, attended, ran_BT, stopped_BT, before_BTD, at):
    plan, rows = call.plan, call.rows
    rule = plan.halting
    assert rule is not None
    drift_BT = signals.drift(rule.drift, state.h_BTD, before_BTD)
    halted_BT = at.layer > state.halt_layer_BT
    candidates_BT = decide.eligible(rows, stopped_BT) & ~halted_BT & at.may_halt
    if rule.rule == "dual":  # the cheap test first: who fails it needs no entropy
        candidates_BT &= drift_BT < at.tau_drift
    entropy_BT = jnp.full(drift_BT.shape, jnp.nan, drift_BT.dtype)
    if rule.entropy_used is not None:
        entropy_BT = _entropy(call, state, rule.entropy_used, candidates_BT)
        entropy_BT = jnp.where(candidates_BT, entropy_BT, jnp.nan)
    score_BT = None
    if rule.rule == "quota":
        scores = {
            "attention": lambda: halting.attention_received(
                attended.weights_BNTS.max(1), rows.asking_BT & ran_BT
            ),
            "drift": lambda: drift_BT,
            "entropy": lambda: jnp.where(candidates_BT, entropy_BT, 0),
            "random": lambda: halting.random_score(rows.pos_BT, rule),
        }
        score_BT = scores[rule.score]()
    tested = entropy_BT if rule.entropy_used is not None else None
    halts_BT = decide.halt(rows, halted_BT, stopped_BT, drift_BT, tested, score_BT, at, plan)
    state = state.replace(halt_layer_BT=jnp.where(halts_BT, at.layer, state.halt_layer_BT))
    return state, jnp.where(ran_BT, drift_BT, jnp.nan), entropy_BT


def _entropy(call: Call, state: TokenState, kind: str, needed_BT: Array) -> Array:
    """Entropies, computed only if some token needs one."""
    previous_BT = jnp.full(needed_BT.shape, jnp.inf, exact_dtype(call.model.dtype))
    if call.past is not None:
        previous_BT = call.past.previous_B[:, None]

    def compute() -> Array:
        with jax.named_scope("signals"):
            return signals.entropy(
                kind, state.h_BTD, call.params, call.model, state.shortlist_BTX, previous_BT
            )

    shape, dtype = needed_BT.shape, exact_dtype(call.model.dtype)
    return lax.cond(needed_BT.any(), compute, lambda: jnp.zeros(shape, dtype))


def _received(call: Call, state: TokenState, attended: Attended, ran_BT, layer) -> Array:
    keys = _keys(call, state, layer)
    before_BS = call.past.received_BS if call.past is not None else None
    found_BTS = kv_skip.running_maximum(
        attended.weights_BNTS.max(1), call.rows.pos_BT, keys, ran_BT, before_BS
    )
    last_BS = keys.halt_layer_BS + call.numbers.delay
    assert state.received_BTS is not None
    return jnp.where((last_BS == layer)[:, None, :], found_BTS, state.received_BTS)


def _written(call: Call, state: TokenState, ran_BT, mask_BTS, layer) -> Array:
    """Tokens of the call whose keys and values were written at this layer.

    A key that "attended" brings back counts as written once some query sees it.
    """
    own = pasts.own_keys(call, state)
    exists_BT = kv_skip.written(own, layer, call.plan, call.numbers)
    if call.plan.policy == "attended" and call.past is None:
        others_BTS = mask_BTS & ~jnp.eye(mask_BTS.shape[1], dtype=bool)[None]
        exists_BT |= (others_BTS & ran_BT[:, :, None]).any(1)
    halted_BT = layer > state.halt_layer_BT
    return call.rows.real_BT & ~call.stopped(state) & (exists_BT | ~halted_BT)


def _fuse(call: Call, state: TokenState, attended: Attended, stopped_BT, at, past_l):
    rows, setting = call.rows, call.plan.fusion
    assert setting is not None
    width = rows.pos_BT.shape[1]
    before = pasts.earlier(call, state, past_l, at.layer)
    ready_BT = decide.eligible(rows, stopped_BT) & (at.layer < state.halt_layer_BT)
    own = fusion.Tokens(rows.pos_BT, state.h_BTD, ready_BT, call.hidden_from(state), None)
    joined = [jnp.concatenate(both, 1) for both in zip(before.tokens[:4], own[:4], strict=True)]
    tokens = fusion.Tokens(*joined, context_BXD=call.context_BXD)
    mean_BTW = None
    if setting.window > 1:
        k_BXKH = pasts.last_keys(call, attended.k_BSKH, setting.window)
        found_BTW = fusion.similarity(attended.q_BTNH, k_BXKH, setting.window)
        assert state.similarity_BTW is not None
        state = state.replace(similarity_BTW=state.similarity_BTW + found_BTW)
        mean_BTW = state.similarity_BTW / at.layer.astype(found_BTW.dtype)
    pairs_BTW = at.may_fuse & fusion.pairs(
        tokens, width, mean_BTW, at.tau_fuse, setting, call.numbers
    )

    def merge():
        own_BT, paid_BTW = _weights(call, state, attended, tokens.h_BXD)
        return fusion.merge(state.h_BTD, pairs_BTW, own_BT, paid_BTW, state.size_BT, before.merged)

    def leave():
        mass_BT = state.size_BT  # never read
        return fusion.Merged(state.h_BTD, mass_BT, state.size_BT), jnp.zeros_like(pairs_BTW)

    # Where later tokens follow, they may fuse with these: their weights must be known.
    needed = at.may_fuse if call.keeps else pairs_BTW.any()
    merged, takes_BTW = lax.cond(needed, merge, leave)
    absorbed_BX = fusion.absorbers(takes_BTW, rows.pos_BT)
    absorbed_BT = absorbed_BX[:, -width:]
    now_BT = absorbed_BT != NEVER
    took_BW = absorbed_BX[:, :-width] != NEVER
    fused = (state.h_BTD, merged, took_BW)
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
        before_BTD = fusion.back(h_BXD, 1, width)
        found_BT = signals.token_probability(before_BTD, rows.tokens_BT, call.params, call.model)
        found_BT = jnp.where(rows.pos_BT == 0, 1.0 / call.model.vocab_size, found_BT)
        return found_BT * state.size_BT, None
    mean_BTS = attended.weights_BNTS.mean(1)
    steps_W = jnp.arange(window + 1)[None, None, :]
    slots_BTW = jnp.maximum(rows.pos_BT[..., None] - steps_W, 0)
    paid_BTW = jnp.take_along_axis(mean_BTS, slots_BTW, axis=-1)
    return paid_BTW[..., 0], paid_BTW[..., 1:]


def _quantize(call: Call, state: TokenState, ran_BT, at) -> TokenState:
    plan, rows = call.plan, call.rows
    setting = plan.amq
    assert setting is not None
    entropy_BT = jnp.zeros(ran_BT.shape, exact_dtype(call.model.dtype))
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
    state = state.replace(bits_BT=jnp.where(at.assign_bits, assigned_BT, state.bits_BT))
    if "hidden" in setting.targets:
        kept_BTD = execution.simulate(state.h_BTD, state.bits_BT, setting)
        state = state.replace(h_BTD=jnp.where(ran_BT[..., None], kept_BTD, state.h_BTD))
    return state
