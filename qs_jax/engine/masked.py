"""The masked engine: the definition of every mechanism, as mask arithmetic in one `lax.scan`.

Every token of every row is computed at every layer, and masks select what counts: savings are
simulated. The scan over layers carries a `TokenState`, above all the active-token mask, the
fused-index map and the bit-width vector; `run_layer` is one layer, in the paper's order:

    1. block      active tokens take the layer's result, under the layer's attention mask
    2. signals    drift, and entropy where a decision reads it
    3. halting    halted tokens keep their state from here on
    4. fusion     of tokens that did not halt
    5. bits       assigned once, at `amq.layer`
    6. keys       what the next layer reads: depth, fused-index map, attention, frozen features

Nothing a token does depends on a later token, except where a rule ranks a whole prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine.attention import attention, in_window
from qs_jax.engine.weights import Weights, layer_weights
from qs_jax.mechanisms import Mechanisms, Rows, fusion, halting, kv_maps, kv_skip, light, signals
from qs_jax.models import Params, apply_block, embed, head
from qs_jax.state import NEVER, LayerRecord, TokenState, exact_dtype


class Call(NamedTuple):
    """What all layers share.

    Attributes:
      params: Stacked tree, with "kv_maps" where the policy extrapolates.
      model: Architecture.
      mech: Mechanisms.
      rows: Tokens and their exemptions.
      embedded_BTD: Input embeddings.
      previous_BT: Entropy of the model's output one position earlier, in nats; None if not read.
      lights: Light layers; None where every layer runs whole.
    """

    params: Params
    model: ModelConfig
    mech: Mechanisms
    rows: Rows
    embedded_BTD: Float[Array, "B T D"]
    previous_BT: Float[Array, "B T"] | None
    lights: light.Stacked | None


class Attended(NamedTuple):
    """What signals read of a layer's block: states after it, and what its attention read."""

    h_BTD: Any
    q_BTNH: Float[Array, "B T N H"]
    k_BTKH: Float[Array, "B T K H"]
    v_BTKH: Float[Array, "B T K H"]
    weights_BNTS: Float[Array, "B N T S"]


def run(
    params: Params,
    rows: Rows,
    model: ModelConfig,
    mech: Mechanisms,
    previous_BT: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], TokenState, LayerRecord]:
    """Run whole rows through all layers under the mechanisms.

    Args:
      params: Stacked tree, from `weights.prepare_params`.
      rows: Right-padded rows from position 0.
      model: Architecture.
      mech: Mechanisms.
      previous_BT: See `Call`; `score.run_masked` computes it.

    Returns:
      Normed states, frozen where a token stopped; the final carry; the record `[L, B, T]`.
    """
    call = open_call(params, rows, model, mech, previous_BT)

    def body(state: TokenState, scanned: tuple[Array, Weights]):
        state, record, _ = run_layer(call, state, *scanned)
        return state, record

    numbers = jnp.arange(1, model.num_layers + 1, dtype=jnp.int32)
    state, record = lax.scan(body, start(call), (numbers, layer_weights(params)))
    return head.normed(params, state.h_BTD, model), state, record


def open_call(
    params: Params,
    rows: Rows,
    model: ModelConfig,
    mech: Mechanisms,
    previous_BT: Array | None = None,
) -> Call:
    """Embed the tokens."""
    embedded_BTD = embed(params, rows.tokens_BT, rows.pos_BT, model)
    rule = mech.halting
    runs_light = rule is not None and rule.light_from is not None
    lights = light.stack(params["kv_maps"].light, model) if runs_light else None
    return Call(params, model, mech, rows, embedded_BTD, previous_BT, lights)


def start(call: Call) -> TokenState:
    """The carry before the first layer."""
    mech, policy = call.mech, call.mech.kv_skip.policy
    size = call.params["kv_maps"].code_size if policy == "extrapolate" else 0
    size = call.model.hidden_size if mech.kv_skip.is_custom else size
    extra = {"code_size": size, "receives": policy == "attended"}
    return mech.start(call.embedded_BTD, call.rows, call.model, **extra)


def run_layer(
    call: Call, state: TokenState, layer: Int[Array, ""], weights: Weights
) -> tuple[TokenState, LayerRecord, Attended]:
    """One layer, in the order of the module's docstring.

    Returns:
      The next carry, what was in force in this layer, and what signals read of its block.
    """
    mech, before = call.mech, state
    mask_BTS = attention_mask(call, state, layer)
    state, attended = _block(call, state, layer, weights, mask_BTS)
    state = signals.pick_shortlist_at(layer == mech.shortlist_layer, state, call.params, call.model)
    no_BT = jnp.full(state.active_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
    drift_BT, entropy_BT, weighed_BT = no_BT, no_BT, jnp.zeros_like(state.active_BT)
    if mech.halting is not None:
        with jax.named_scope("signals"):
            drift_BT = signals.drift(mech.halting.drift, state.h_BTD, before.h_BTD)
        with jax.named_scope("halt"):
            read = scored(call, before, attended)
            state, entropy_BT = _halt(call, state, read, drift_BT, layer)
        drift_BT = jnp.where(before.active_BT, drift_BT, jnp.nan)
    if mech.kv_skip.policy == "attended":
        state = _receive(call, state, attended, before.active_BT, layer)
    if mech.fusion is not None:
        with jax.named_scope("fuse"):
            state, weighed_BT = _fuse(call, state, attended, layer)
    if mech.amq is not None:
        with jax.named_scope("amq"):
            state = _quantize(call, state, before.active_BT, layer)
    if mech.kv_skip.reads_frozen:
        state = _encode(call, state, layer)
    if mech.halting is not None and mech.halting.leaves_whole:
        state = _leave_whole(call, state, layer)
    record = LayerRecord(
        active_BT=before.active_BT,
        written_BT=_written(call, before, mask_BTS, layer),
        visible_BT=jnp.where(before.active_BT, mask_BTS.sum(-1, dtype=jnp.int32), 0),
        bits_BT=before.bits_BT,
        fused_BT=before.fused_BT,
        drift_BT=drift_BT,
        entropy_BT=entropy_BT,
        weighed_BT=weighed_BT,
    )
    return state, record, attended


# --- 1. block, and 6. the keys it sees ------------------------------------------------------------


def _stopped(call: Call, state: TokenState) -> Bool[Array, "B T"]:
    """Absorbed tokens that stop: those of a prompt, whose predictions are not read."""
    absorbed_BT = state.fused_BT != NEVER
    return absorbed_BT if call.mech.continuation else jnp.zeros_like(absorbed_BT)


def _hidden_from(call: Call, state: TokenState) -> Int[Array, "B T"]:
    """Position of the first query that does not see each token."""
    return jnp.where(_stopped(call, state), 0, state.fused_BT)


def attention_mask(call: Call, state: TokenState, layer: Array) -> Bool[Array, "B T S"]:
    """Causal, and of the earlier keys only those that this layer still has, within the window."""
    mask_BTS = call.mech.kv_skip.visible(call.rows, state, _hidden_from(call, state), layer)
    return mask_BTS & in_window(call.rows.pos_BT, call.rows.pos_BT, call.model.sliding_window)


def _block(
    call: Call, state: TokenState, layer: Array, weights: Weights, mask_BTS: Array
) -> tuple[TokenState, Attended]:
    mech, model, pos_BT = call.mech, call.model, call.rows.pos_BT
    log_size_BS = None
    if mech.fusion is not None and mech.fusion.proportional_attention:
        log_size_BS = jnp.log(state.size_BT)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Attended]:
        if mech.kv_skip.reads_frozen:
            k, v = _extrapolated(call, state, layer, weights, k, v)
        k, v = mech.stored(k, v, state.bits_BT)
        context_BTNH, weights_BNTS = attention(q, k, v, mask_BTS, log_size_BS)
        return context_BTNH, Attended(None, q, k, v, weights_BNTS)

    multiply = mech.multiply(state.bits_BT, weights.int8, layer)
    inputs = (state.h_BTD, pos_BT, attend, multiply)
    h_BTD, attended = apply_block(model, weights.params, *inputs)
    if call.lights is not None:
        h_BTD = _run_light(call, state, layer, weights, h_BTD, mask_BTS)
    h_BTD = jnp.where(state.active_BT[..., None], h_BTD, state.h_BTD)
    return state.replace(h_BTD=h_BTD), attended._replace(h_BTD=h_BTD)


def _run_light(
    call: Call, state: TokenState, layer: Array, weights: Weights, h_BTD: Array, mask_BTS: Array
) -> Array:
    """The layer's states `h_BTD`, with those of tokens that run it light put in."""
    rule, lights, model = call.mech.halting, call.lights, call.model
    assert rule is not None
    assert rule.light_from is not None
    assert lights is not None
    index = layer - rule.light_from
    heads_N, encode_ER, decode_RD = (_at(part, index) for part in lights)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        context_BTNH, _ = attention(q, k, v, mask_BTS)
        return jnp.where(heads_N[None, None, :, None], context_BTNH, 0), None

    code = (*light.split(encode_ER, model.hidden_size), decode_RD)

    def run() -> Array:
        inputs = (state.h_BTD, call.rows.pos_BT, attend, code)
        light_BTD, _ = apply_block(model, weights.params, *inputs, method="light")
        return jnp.where(eligible(call, state)[..., None], light_BTD, h_BTD)

    here = (index >= 0) & (index < len(lights.heads_XN))
    return lax.cond(here, run, lambda: h_BTD)


def _at(stacked: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _extrapolated(
    call: Call, state: TokenState, layer: Array, weights: Weights, k: Array, v: Array
) -> tuple[Array, Array]:
    """Keys and values, with those of halted tokens read from their frozen states."""
    assert state.code_BTR is not None
    halted, pos_BT = (state.depth_BT < layer)[..., None, None], call.rows.pos_BT
    if call.mech.kv_skip.is_custom:
        multiply = call.mech.multiply(state.bits_BT, weights.int8, layer)
        frozen = (state.h_BTD, call.embedded_BTD, state.code_BTR, pos_BT, state.depth_BT)
        given = (frozen, call.model, layer, weights.params, multiply)
        k_mapped, v_mapped = call.mech.kv_skip.keys_values(*given)
    else:
        layers = call.params["kv_maps"].layers
        mapped_BTO = kv_maps.extrapolate(state.code_BTR, weights.maps, state.depth_BT, layers)
        k_mapped, v_mapped = kv_maps.keys_values(mapped_BTO, pos_BT, call.model)
    return jnp.where(halted, k_mapped, k), jnp.where(halted, v_mapped, v)


def _encode(call: Call, state: TokenState, layer: Array) -> TokenState:
    """What deeper keys are read from, of the tokens that halted at this layer."""
    model, h_BTD = call.model, state.h_BTD
    now_BT = (state.depth_BT == layer) & (layer < model.num_layers)
    if call.mech.kv_skip.is_custom:  # the rest that a policy reads does not change
        code_BTR = jnp.where(now_BT[..., None], fusion.back(h_BTD, 1), state.code_BTR)
        return state.replace(code_BTR=code_BTR)

    def neurons() -> Array:
        ids = call.params["kv_maps"].neurons

        def compute(at: int) -> Array:
            following = jax.tree.map(lambda leaf: leaf[layer + at], call.params["layers"])
            return apply_block(model, following, h_BTD, method="mlp_neurons")[..., ids[at]]

        return kv_maps.following_neurons(ids, compute)

    def encode() -> Array:
        read = (h_BTD, call.embedded_BTD, fusion.back(h_BTD, 1), neurons)
        maps, sources = call.params["kv_maps"], kv_maps.sources(*read)
        code_BTR = kv_maps.encode(maps, sources, state.depth_BT, model.dtype)
        return jnp.where(now_BT[..., None], code_BTR, state.code_BTR)

    return state.replace(code_BTR=lax.cond(now_BT.any(), encode, lambda: state.code_BTR))


def _receive(
    call: Call, state: TokenState, attended: Attended, ran_BT: Array, layer: Array
) -> TokenState:
    """Attention received by keys whose last layer with every query this is (C.4)."""
    here_BS = state.depth_BT + call.mech.kv_skip.delay == layer
    pos_BT, weights_BTS = call.rows.pos_BT, attended.weights_BNTS.max(1)
    found_BTS = kv_skip.running_maximum(weights_BTS, pos_BT, pos_BT, ran_BT)
    return state.replace(received_BTS=jnp.where(here_BS[:, None, :], found_BTS, state.received_BTS))


def _written(call: Call, state: TokenState, mask_BTS: Array, layer: Array) -> Array:
    """Tokens whose keys exist at this layer; under "attended", also those that a query sees."""
    mech, rows = call.mech, call.rows
    exists_BT = mech.kv_skip.written(state.depth_BT, rows.retain_BT, layer)
    if mech.kv_skip.policy == "attended":
        others_BTS = mask_BTS & ~jnp.eye(mask_BTS.shape[1], dtype=bool)[None]
        exists_BT |= (others_BTS & state.active_BT[:, :, None]).any(1)
    exists_BT |= layer <= state.depth_BT
    return rows.real_BT & ~_stopped(call, state) & exists_BT


# --- 2. signals, and 3. halting -----------------------------------------------------------------


def eligible(call: Call, state: TokenState) -> Bool[Array, "B T"]:
    """Tokens that halting and fusion may touch."""
    return call.rows.touched(state) & ~_stopped(call, state)


def _leave_whole(call: Call, state: TokenState, layer: Array) -> TokenState:
    """Before the first light layer, choose the tokens that run whole."""
    rule, attended_F = call.mech.halting, call.params["kv_maps"].attended_F
    assert rule is not None
    assert rule.light_from is not None
    leave = lambda: rule.leave_whole(state, call.rows, eligible(call, state), attended_F)  # noqa: E731
    return lax.cond(layer == rule.light_from - 1, leave, lambda: state)


def _halt(
    call: Call, state: TokenState, read: dict[str, Array], drift_BT: Array, layer: Array
) -> tuple[TokenState, Array]:
    rule = call.mech.halting
    assert rule is not None
    entropy_of = signals.entropies(state, call.params, call.model, call.previous_BT)
    signals_read = (eligible(call, state), drift_BT, layer, entropy_of, read)
    return rule.after_layer(state, call.rows, *signals_read)


def scored(call: Call, before: TokenState, attended: Attended) -> dict[str, Array]:
    """What a score may read of a layer (`qs_jax.mechanisms.custom.Signals`)."""
    states = {"before_BTD": before.h_BTD, "after_BTD": attended.h_BTD}
    states |= {"keys_BTKH": attended.k_BTKH, "values_BTKH": attended.v_BTKH}
    return states | {"received_BT": received(call, before, attended)}


def received(call: Call, state: TokenState, attended: Attended) -> Float[Array, "B T"]:
    """Most attention that each token receives from the prompt's last queries."""
    counted_BT = call.rows.scoring_BT & state.active_BT
    return halting.attention_received(attended.weights_BNTS.max(1), counted_BT, call.rows.pos_BT)


# --- 4. fusion, and 5. bits ---------------------------------------------------------------------


def _fuse(
    call: Call, state: TokenState, attended: Attended, layer: Array
) -> tuple[TokenState, Array]:
    rows, rule = call.rows, call.mech.fusion
    assert rule is not None
    ready_BT = eligible(call, state) & (layer < state.depth_BT)
    tokens = (rows.pos_BT, state.h_BTD, ready_BT, _hidden_from(call, state))
    contexts_BTD = mean_BTW = None
    if rule.filters_context:
        contexts_BTD = fusion.contexts(call.embedded_BTD, rows.real_BT, rule.context)
    if rule.window > 1:
        keys = (attended.q_BTNH, attended.k_BTKH, rows.pos_BT)
        sum_BTW = state.similarity_BTW + fusion.similarity(*keys, rule.window)
        state = state.replace(similarity_BTW=sum_BTW)
        mean_BTW = sum_BTW / layer.astype(sum_BTW.dtype)
    pairs_BTW = rule.pairs(*tokens, layer, mean_BTW, contexts_BTD)
    weights = _weigh(call, state, attended, pairs_BTW)
    merging = (rows.pos_BT, pairs_BTW, weights, layer, call.model.dtype)
    return rule.absorb(state, *merging, stops=call.mech.continuation)


def _weigh(call: Call, state: TokenState, attended: Attended, pairs_BTW: Array):
    """Each token's weight in a mean (D.4), and what it pays to the W tokens before it, or None."""
    rows, rule = call.rows, call.mech.fusion
    assert rule is not None
    if rule.alpha == "uniform":
        return state.size_BT, None
    if rule.alpha == "probability":

        def weigh() -> Array:
            before_BTD = fusion.back(state.h_BTD, 1)
            ids = (rows.tokens_BT, call.params, call.model)
            found_BT = signals.token_probability(before_BTD, *ids)
            return jnp.where(rows.pos_BT == 0, 1.0 / call.model.vocab_size, found_BT)

        nothing = jnp.zeros_like(state.size_BT)
        return lax.cond(pairs_BTW.any(), weigh, lambda: nothing) * state.size_BT, None
    steps_W = jnp.arange(rule.window + 1)[None, None, :]
    slots_BTW = jnp.maximum(rows.pos_BT[..., None] - steps_W, 0)
    paid_BTW = jnp.take_along_axis(attended.weights_BNTS.mean(1), slots_BTW, axis=-1)
    return paid_BTW[..., 0], paid_BTW[..., 1:]


def _quantize(call: Call, state: TokenState, ran_BT: Array, layer: Array) -> TokenState:
    amq = call.mech.amq
    assert amq is not None
    entropy_of = signals.entropies(state, call.params, call.model, call.previous_BT)
    state = amq.assign_at(layer, state, call.rows, entropy_of)
    if "hidden" not in amq.targets:
        return state
    coarse_BTD = amq.quantize(state.h_BTD, state.bits_BT)
    return state.replace(h_BTD=jnp.where(ran_BT[..., None], coarse_BTD, state.h_BTD))
