"""The end of a segment of the prompt engine: deeper keys and values of tokens that stopped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qs_jax.engine.cache import KVCache
from qs_jax.engine.gather import layer_at, take, true_first
from qs_jax.engine.prompt_call import Call, Carry
from qs_jax.mechanisms import fusion, kv_maps, signals
from qs_jax.models import apply_block
from qs_jax.state import NEVER, TokenState

FILL = 32  # stopped tokens of a row whose keys are filled in at a time, where their number varies


def end_segment(call: Call, carry: Carry, first: Array, last: Array, fill: int | None) -> Carry:
    """Assign bits, at the layer that does; fill in deeper keys of tokens that stopped."""
    amq, state = call.mech.amq, carry.state
    if amq is not None:
        with jax.named_scope("amq"):
            entropy_of = signals.entropies(state, call.params, call.model)
            state = amq.assign_at(last, state, call.rows, entropy_of)
        carry = carry._replace(state=state)
    if call.plan.keeps_keys and fill != 0:
        carry = carry._replace(cache=_fill(call, carry, first, last, fill))
    return carry


def _fill(call: Call, carry: Carry, first: Array, last: Array, fill: int | None) -> KVCache:
    """The cache with the deeper keys of stopped tokens, up to where bits change them again."""
    mech, model, state, rows = call.mech, call.model, carry.state, call.rows
    since, until = first, jnp.int32(model.num_layers)
    if mech.amq is not None:
        since = jnp.where(last == mech.amq.layer, 1, first)
        until = jnp.where(last < mech.amq.layer, mech.amq.layer, until)
    stopped_BT = rows.real_BT & (state.depth_BT >= since) & (state.depth_BT <= last)
    stopped_BT &= state.fused_BT == NEVER
    order_BT = true_first(stopped_BT)
    count_B1 = stopped_BT.sum(1, dtype=jnp.int32)[:, None]
    at_once = min(FILL, order_BT.shape[1]) if fill is None else fill
    widened_BT = jnp.pad(order_BT, ((0, 0), (0, at_once)))

    def some(part: Array, cache: KVCache) -> KVCache:
        index_BP = lax.dynamic_slice_in_dim(widened_BT, part * at_once, at_once, axis=1)
        held_BP = part * at_once + jnp.arange(at_once, dtype=jnp.int32)[None] < count_B1
        slots_BP = jnp.where(held_BP, index_BP, NEVER)
        keys_values = _frozen_keys_values(call, state, index_BP, last)

        def layer(index: Array, cache: KVCache) -> KVCache:
            return cache.write(index, slots_BP, *keys_values(index))

        return lax.fori_loop(last, until, layer, cache)

    parts = 1 if fill is not None else -(-count_B1.max() // at_once)
    return lax.fori_loop(0, parts, some, carry.cache)


def _frozen_keys_values(call: Call, state: TokenState, index_BP: Array, last: Array):
    """A function from a layer's index to keys and values of some tokens that stopped."""
    mech, model = call.mech, call.model
    h_BPD, bits_BP = take(state.h_BTD, index_BP), take(state.bits_BT, index_BP)

    def propagated(index: Array) -> tuple[Array, Array]:
        weights = layer_at(call.weights, index)
        given = (h_BPD, index_BP, mech.multiply(bits_BP, weights.int8, index + 1))
        k, v = apply_block(model, weights.params, *given, method="keys_values")
        return mech.stored(k, v, bits_BP)

    if not mech.kv_skip.reads_frozen:
        return propagated

    embedded_BPD, depth_BP = take(call.embedded_BTD, index_BP), take(state.depth_BT, index_BP)
    before_BPD = take(fusion.back(state.h_BTD, 1), index_BP)

    def of_policy(index: Array) -> tuple[Array, Array]:
        weights, layer = layer_at(call.weights, index), index + 1
        frozen = (h_BPD, embedded_BPD, before_BPD, index_BP, depth_BP)
        given = (layer, weights.params, mech.multiply(bits_BP, weights.int8, layer))
        return mech.stored(*mech.kv_skip.keys_values(frozen, model, *given), bits_BP)

    if mech.kv_skip.is_custom:
        return of_policy

    maps = call.params["kv_maps"]

    def compute(at: int) -> Array:
        if "light" in call.params:
            return apply_block(model, call.params["light"].neurons[at], h_BPD, method="mlp_neurons")
        following = layer_at(call.weights.params, last + at)
        return apply_block(model, following, h_BPD, method="mlp_neurons")[..., maps.neurons[at]]

    neurons = lambda: kv_maps.following_neurons(maps.neurons, compute)  # noqa: E731
    x = jnp.argmax(jnp.asarray(maps.layers) == last)
    sources = kv_maps.sources(h_BPD, embedded_BPD, before_BPD, neurons)
    code_BPR = kv_maps.encode(maps, sources, depth_BP, model.dtype, x)

    def mapped(index: Array) -> tuple[Array, Array]:
        mapped_BPO = kv_maps.mapped(code_BPR, layer_at(call.weights.maps, index)[x])
        return mech.stored(*kv_maps.keys_values(mapped_BPO, index_BP, model), bits_BP)

    return mapped
