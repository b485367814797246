"""One step of the decode engine, for the dense model and under the mechanisms.

A step runs a few tokens of each row (one, or a draft to be verified) through all layers and appends
their keys and values to caches that hold what later queries can see. Layers run in segments, each
with a cache. In a segment in which no row computes, keys and values are written where the policy
needs them, and nothing else runs. `take_back` undoes the last appends.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine.attention import in_window, step_attention
from qs_jax.engine.cache import SlotCache
from qs_jax.mechanisms import Mechanisms, Rows, kv_maps, signals
from qs_jax.models import Params, apply_block, embed, head
from qs_jax.models.cpu import InPlace, layer_weights
from qs_jax.state import NEVER, Decisions, TokenState, exact_dtype


class Call(NamedTuple):
    """What all layers of a step share.

    `layers` come from `cpu.decode_layers`, `params` have all other arrays. Tokens of rows that have
    ended are not real.
    """

    params: Params
    layers: Any
    model: ModelConfig
    mech: Mechanisms
    rows: Rows
    embedded_BTD: Float[Array, "B T D"]
    exact: bool

    @property
    def halts(self) -> bool:
        """New tokens may halt."""
        return self.mech.halting is not None and not self.mech.continuation

    @property
    def extrapolates(self) -> bool:
        """Deeper keys of halted new tokens are read from maps."""
        return self.halts and self.mech.kv_skip.policy == "extrapolate"


class Step(NamedTuple):
    """What a step gives: normed states after each token, caches, and what was decided.

    `keeps` are, for each segment, which tokens were appended in which layers. Drifts and entropies
    are None where no decision reads them.
    """

    h_BTD: Float[Array, "B T D"]
    caches: tuple[SlotCache, ...]
    keeps: tuple[Bool[Array, "l B T"], ...]
    rows: Rows
    state: TokenState
    drift_LBT: Float[Array, "L B T"] | None
    entropy_LBT: Float[Array, "L B T"] | None


def step(
    params: Params,
    layers: Any,
    tokens_BT: Int[Array, "B T"],
    pos_B: Int[Array, "B"],
    held_B: Int[Array, "B"],
    caches: tuple[SlotCache, ...],
    model: ModelConfig,
    mech: Mechanisms,
    *,
    exact: bool = False,
) -> Step:
    """Run T tokens of each row, the first at `pos_B`, and append to the caches of each segment.

    Only the first `held_B` of a row are its tokens: the others append nothing. `exact` steps of one
    width round a token's numbers alike wherever in a step it stands; every layer must keep it.
    """
    pos_BT = pos_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < held_B[:, None]
    nobody_B = jnp.zeros_like(pos_B)  # under "continuation" no new token is a subject
    rows = mech.rows(tokens_BT, pos_BT, real_BT, nobody_B)
    embedded_BTD = embed(params, tokens_BT, pos_BT, model)
    call = Call(params, layers, model, mech, rows, embedded_BTD, exact)
    size = params["kv_maps"].code_size if call.extrapolates else 0
    state = mech.start(call.embedded_BTD, rows, model, code_size=size)
    outs, appended, keeps, first = [], [], [], 0
    for cache in caches:
        state, (out, (k, v), keep_lBT) = _segment(call, state, cache, first)
        outs.append(out)
        keeps.append(keep_lBT)
        appended.append(cache.append(k, v, keep_lBT, state.bits_BT, pos_BT))
        first += cache.layers
    drift_LBT, entropy_LBT = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs)
    h_BTD = head.normed(params, state.h_BTD, model)
    return Step(h_BTD, tuple(appended), tuple(keeps), rows, state, drift_LBT, entropy_LBT)


def take_back(
    caches: tuple[SlotCache, ...], keeps: tuple[Array, ...], accepted_B: Int[Array, "B"]
) -> tuple[SlotCache, ...]:
    """Caches without what a step appended for all but the first `accepted_B` of its tokens."""
    after = []
    for cache, keep_lBT in zip(caches, keeps, strict=True):
        rejected_BT = jnp.arange(keep_lBT.shape[2])[None] >= accepted_B[:, None]
        after.append(cache.take_back((keep_lBT & rejected_BT[None]).sum(2, dtype=jnp.int32)))
    return tuple(after)


def _segment(call: Call, state: TokenState, cache: SlotCache, first: int):
    """Run a segment, reading its cache; it is left out where no token computes.

    Layers of a single row whose weights lie in place are left out one by one.
    """
    runs: list[Any] = [functools.partial(_stay, call, stores) for stores in (False, True)]
    runs.append(functools.partial(_run_layer, call))

    def needed(state: TokenState, layer: Array) -> Array:
        """What a layer has to do: an index into `runs`."""
        written_BT = call.mech.kv_skip.written(state.depth_BT, call.rows.retain_BT, layer)
        stores = (written_BT & call.rows.real_BT).any().astype(jnp.int32)
        return jnp.where(state.active_BT.any(), 2, stores)

    def choose(state: TokenState, cache: SlotCache, offset: Any, index: Any):
        chosen = [functools.partial(run, offset=offset, index=index) for run in runs]
        return lax.switch(needed(state, index + 1), chosen, state, cache)

    def all_layers(run: Any, state: TokenState, cache: SlotCache):
        if cache.layers == 1:
            state, out = run(state, cache, offset=0, index=first)
            return state, jax.tree.map(lambda leaf: leaf[None], out)

        def body(state: TokenState, offset: Array):
            return run(state, cache, offset=offset, index=first + offset)

        return lax.scan(body, state, jnp.arange(cache.layers, dtype=jnp.int32))

    # There are two branches even where no token may halt: XLA keeps a cache's readers in a branch
    # before its writer.
    which, branches = call.rows.real_BT.any().astype(jnp.int32), [runs[0], runs[2]]
    if call.halts and cache.layers > 1 and isinstance(call.layers, InPlace):
        branches[1] = choose
    elif call.halts:
        which, branches = needed(state, jnp.int32(first + 1)), runs
    chosen = [functools.partial(all_layers, run) for run in branches]
    return lax.switch(which, chosen, state, cache)


def _stay(call: Call, stores: bool, state: TokenState, cache: SlotCache, offset: Any, index: Any):
    """A layer in which no token computes: keys and values of frozen states, where written."""
    mech, model, layer = call.mech, call.model, jnp.int32(index) + 1
    shape = (*call.rows.pos_BT.shape, model.num_kv_heads, model.head_dim)
    k = v = jnp.zeros(shape, model.dtype)
    if stores:
        multiply = mech.multiply(state.bits_BT, _codes(call, index), layer)
        given = (state.h_BTD, call.rows.pos_BT, multiply)
        weights = layer_weights(call.layers, index)
        k, v = apply_block(model, weights, *given, method="keys_values")
        k, v = _stored(call, state, k, v, layer)
    keep_BT = mech.kv_skip.written(state.depth_BT, call.rows.retain_BT, layer) & call.rows.real_BT
    state, read = _decide(call, state, None, layer)
    return state, (read, (k, v), keep_BT)


def _run_layer(call: Call, state: TokenState, cache: SlotCache, offset: Any, index: Any):
    mech, model, rows = call.mech, call.model, call.rows
    layer, width = jnp.int32(index) + 1, rows.pos_BT.shape[1]
    keep_BT = mech.kv_skip.written(state.depth_BT, rows.retain_BT, layer) & rows.real_BT
    earlier_TT = jnp.tri(width, k=-1, dtype=bool)
    own_BTT = (earlier_TT[None] & keep_BT[:, None, :]) | jnp.eye(width, dtype=bool)[None]
    held_BC, window = cache.held(offset), model.sliding_window
    held_BTC = jnp.broadcast_to(held_BC[:, None], (len(held_BC), width, held_BC.shape[1]))
    held_BTC &= in_window(rows.pos_BT, cache.positions(offset), window)
    own_BTT &= in_window(rows.pos_BT, rows.pos_BT, window)
    mask_BTX = jnp.concatenate([held_BTC, own_BTT], axis=2)

    def attend(q: Array, k: Array, v: Array):
        k, v = _stored(call, state, k, v, layer)
        if call.exact:
            held, mask_BTC, pos_BC = cache.with_new(offset, k, v, rows.pos_BT)
            mask_BTC &= in_window(rows.pos_BT, pos_BC, window)
            return step_attention(q, held, None, mask_BTC), (k, v)
        return step_attention(q, cache.layer(offset), (k, v), mask_BTX), (k, v)

    multiply = mech.multiply(state.bits_BT, _codes(call, index), layer)
    given = (state.h_BTD, rows.pos_BT, attend, multiply)
    h_BTD, keys_values = apply_block(model, layer_weights(call.layers, index), *given)
    h_BTD = jnp.where(state.active_BT[..., None], h_BTD, state.h_BTD)
    state, read = _decide(call, state.replace(h_BTD=h_BTD), state, layer)
    if call.extrapolates:
        state = _encode(call, state, layer)
    return state, (read, keys_values, keep_BT)


def _codes(call: Call, index: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], call.params.get("int8"))


def _stored(call: Call, state: TokenState, k: Array, v: Array, layer: Array):
    """Keys and values as the cache holds them: of halted tokens by their maps, quantised."""
    mech, model = call.mech, call.model
    if call.extrapolates:
        maps = call.params["kv_maps"]
        maps_XRO = maps.maps_LXFO[layer - 1]
        mapped_BTO = kv_maps.extrapolate(state.code_BTR, maps_XRO, state.depth_BT, maps.layers)
        k_mapped, v_mapped = kv_maps.keys_values(mapped_BTO, call.rows.pos_BT, model)
        halted = (state.depth_BT < layer)[..., None, None]
        k, v = jnp.where(halted, k_mapped, k), jnp.where(halted, v_mapped, v)
    return mech.stored(k, v, state.bits_BT)


def _decide(call: Call, state: TokenState, before: TokenState | None, layer: Array):
    """Decisions after a layer, and the drifts and entropies that they read.

    Halting is by the dual rule, as quotas are for prompts; where nobody computes (`before` is
    None), nobody halts.
    """
    mech, rule, rows = call.mech, call.mech.halting, call.rows
    here = (layer == mech.shortlist_layer) & (not mech.continuation)
    state = signals.pick_shortlist_at(here, state, call.params, call.model)
    drift_BT = entropy_BT = None
    if call.halts:
        assert rule is not None
        drift_BT = jnp.full(rows.pos_BT.shape, jnp.nan, exact_dtype(call.model.dtype))
        entropy_BT = drift_BT if rule.entropy is not None else None
    if call.halts and before is not None:
        assert rule is not None
        with jax.named_scope("signals"):
            drift_BT = signals.drift(rule.drift, state.h_BTD, before.h_BTD)
        with jax.named_scope("halt"):
            may_BT = rows.subject_BT & ~rows.full_BT
            read = (may_BT, drift_BT, layer, signals.entropies(state, call.params, call.model))
            state, found_BT = rule.after_layer(state, rows, *read)
        drift_BT = jnp.where(before.active_BT, drift_BT, jnp.nan)
        entropy_BT = found_BT if rule.entropy is not None else None
    if mech.amq is not None:
        entropy_of = signals.entropies(state, call.params, call.model)
        state = mech.amq.assign_at(layer, state, rows, entropy_of)
    return state, (drift_BT, entropy_BT)


def _encode(call: Call, state: TokenState, layer: Array) -> TokenState:
    """What the maps of deeper layers read of tokens that halted at this one."""
    now_BT = state.depth_BT == layer
    sources = {"state": lambda: state.h_BTD, "embedding": lambda: call.embedded_BTD}
    code_BTR = kv_maps.encode(call.params["kv_maps"], sources, state.depth_BT, call.model.dtype)
    return state.replace(code_BTR=jnp.where(now_BT[..., None], code_BTR, state.code_BTR))


def note(decisions: Decisions, ran: Step, kept_B: Array) -> Decisions:
    """Store the decisions about the tokens of a step that each row keeps, the first so many."""
    kept_BT = jnp.arange(ran.rows.pos_BT.shape[1])[None] < kept_B[:, None]
    at_BT = jnp.where(kept_BT, ran.rows.pos_BT, NEVER)
    rows_B1 = jnp.arange(len(kept_B))[:, None]

    def put(old_BS: Array, new_BT: Array) -> Array:
        return old_BS.at[rows_B1, at_BT].set(new_BT, mode="drop")

    def put_layers(old_LBS: Array | None, new_LBT: Array | None) -> Array | None:
        if old_LBS is None or new_LBT is None:
            return old_LBS
        return jax.vmap(put)(old_LBS, new_LBT)

    return decisions.replace(
        depth_BT=put(decisions.depth_BT, ran.state.depth_BT),
        bits_BT=put(decisions.bits_BT, ran.state.bits_BT),
        retain_BT=put(decisions.retain_BT, ran.rows.retain_BT),
        drift_LBT=put_layers(decisions.drift_LBT, ran.drift_LBT),
        entropy_LBT=put_layers(decisions.entropy_LBT, ran.entropy_LBT),
    )
