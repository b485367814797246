"""The compact engine: the masked engine's layers, on the tokens that still compute.

Layers run in segments. At the start of each, the tokens that still compute are gathered into one of
a few static capacities, with the keys of those that do not; the layers in between are the masked
engine's own; then everything is scattered back. Decisions are the same, work is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine import decisions, gathering, layer, opening, tokenwise
from qs_jax.engine import past as pasts
from qs_jax.engine.call import Call
from qs_jax.halves import exact_dtype
from qs_jax.mechanisms import fusion
from qs_jax.mechanisms.plan import Numbers, Plan
from qs_jax.models import Params, head
from qs_jax.state import KVCache, LayerRecord, Past, TokenState


class Schedule(NamedTuple):
    """The static half of how a prompt is cut: calls with equal schedules share a program.

    Attributes:
      capacities: Token slots of each segment, where `fixed`; else slots to choose from, rising, the
        whole width last. One body is compiled for each.
      fixed: How many tokens compute is known before the call.
      longest: Where not fixed: most layers of a segment that chooses its slots, or a few more. Keys
        and values of so many layers are made apart: a cache that goes through a branch is copied.
      leading: Where not fixed: the first segment has no choice to make, as nobody has stopped.
      keeps_keys: Tokens that stopped may still be seen: the policy, a delay or a retained key.
    """

    capacities: tuple[int, ...]
    fixed: bool
    longest: int
    leading: bool
    keeps_keys: bool


class Segments(NamedTuple):
    """Runs of layers, numbers to the program; S of them, in order.

    Attributes:
      first_S: First layer, from 1.
      last_S: Last layer.
      whole_S: Every token takes part, whether it computes or not: bits or a shortlist are assigned
        to all of them there.
    """

    first_S: Int[Array, "S"]
    last_S: Int[Array, "S"]
    whole_S: Bool[Array, "S"]


class Carry(NamedTuple):
    """What segments hand on; arrays over all T positions."""

    state: TokenState
    cache: KVCache | None
    record: LayerRecord
    kept: pasts.Kept | None
    overflow: Bool[Array, ""]


class Result(NamedTuple):
    """What a run gives.

    Attributes:
      h_BTD: Normed states of every position, as they were when the token stopped.
      state: Final carry.
      record: Evidence, `[L, B, T]`.
      past: Of the next token; None where nothing is kept.
      overflow: A planned capacity was too small: the result is void.
    """

    h_BTD: Float[Array, "B T D"]
    state: TokenState
    record: LayerRecord
    past: Past | None
    overflow: Bool[Array, ""]


def run(
    params: Params,
    prompt: tokenwise.Prompt,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    schedule: Schedule,
    segments: Segments,
    capacity: int | None = None,
) -> Result:
    """Run whole rows through all layers; same decisions and results as `masked.run`.

    Args:
      params: Stacked tree, with "kv_maps" where the policy extrapolates.
      prompt: Rows.
      model: Architecture.
      plan: Static half of the mechanisms; not one that reads the previous step's output.
      numbers: Traced half.
      schedule: Static capacities.
      segments: Where to gather anew.
      capacity: Slots of the `Past`; None keeps none.
    """
    rows = tokenwise.whole_rows(prompt, plan, numbers)
    keeps = capacity is not None
    opened = opening.open_call(
        params, rows, model, plan, numbers, None, keeps, prompt.prompt_lengths_B
    )
    call = opened._replace(lean=True, lengths_B=prompt.lengths_B)
    cache = None
    if capacity is not None:
        cache = KVCache.zeros(model, rows.tokens_BT.shape[0], capacity)
    carry = Carry(
        opening.start(call), cache, _empty_record(call), _empty_kept(call), jnp.zeros((), bool)
    )
    if schedule.fixed:
        for index, slots in enumerate(schedule.capacities):
            bounds = jax.tree.map(lambda leaf, at=index: leaf[at], segments)
            carry = _fixed_segment(call, schedule, slots, carry, bounds)
    else:
        carry = _dynamic_segments(call, schedule, carry, segments)
    past = None
    if carry.cache is not None:
        assert carry.kept is not None
        past = pasts.begin(call, carry.state, carry.record, carry.kept, carry.cache)
    h_BTD = head.normed(params, carry.state.h_BTD, model)
    return Result(h_BTD, carry.state, carry.record, past, carry.overflow)


def _dynamic_segments(call: Call, schedule: Schedule, carry: Carry, segments: Segments) -> Carry:
    sizes_C = jnp.asarray(schedule.capacities, jnp.int32)

    def branch(slots: int):
        def run(carry: Carry, bounds: Segments) -> Carry:
            cache = own_cache()
            inner = call._replace(layers_before=bounds.first_S - 1)
            return _segment(inner, schedule, slots, carry._replace(cache=cache), bounds)

        return run

    def own_cache() -> KVCache | None:
        if cache is None:
            return None
        shape, dtype = (schedule.longest, *cache.k_LBSKH.shape[1:]), cache.k_LBSKH.dtype
        # Two constants that XLA cannot take for one: it would fill one buffer and copy it.
        zero = lax.optimization_barrier(jnp.zeros((), dtype))
        return KVCache(jnp.zeros(shape, dtype), jnp.broadcast_to(zero, shape))

    def segment(carry: Carry, bounds: Segments):
        needed = gathering.computing(call, carry.state, bounds.first_S).sum(1).max()
        index = jnp.where(bounds.whole_S, len(sizes_C) - 1, (sizes_C < needed).sum())
        branches = [branch(c) for c in schedule.capacities]
        after = lax.switch(index, branches, carry._replace(cache=None), bounds)
        cache = carry.cache
        if cache is not None:
            cache = cache.write_layers(bounds.first_S - 1, bounds.last_S, after.cache)
        return after._replace(cache=cache), None

    cache = carry.cache
    if schedule.leading:
        first = jax.tree.map(lambda leaf: leaf[0], segments)
        carry = _segment(call, schedule, schedule.capacities[-1], carry, first)
        segments = jax.tree.map(lambda leaf: leaf[1:], segments)
    return lax.scan(segment, carry, segments)[0]


def _fixed_segment(
    call: Call, schedule: Schedule, slots: int, carry: Carry, bounds: Segments
) -> Carry:
    needed = gathering.computing(call, carry.state, bounds.first_S).sum(1).max()
    carry = _segment(call, schedule, slots, carry, bounds)
    return carry._replace(overflow=carry.overflow | (needed > slots))


def _segment(call: Call, schedule: Schedule, slots: int, carry: Carry, bounds: Segments) -> Carry:
    """Layers `bounds.first_S` to `bounds.last_S` on `slots` tokens of each row."""
    width = call.rows.pos_BT.shape[1]
    inner, state, index = call, carry.state, None
    if slots < width:
        index = gathering.choose(call, carry.state, bounds.first_S, slots, schedule.keeps_keys)
        inner, state = gathering.gather(call, carry.state, index, bounds.first_S)
    put = gathering.Put(carry.state, index, call)
    weights = layer.weights_of(call, call.params["layers"])

    def body(number: Array, loop):
        state, cache, record, kept = loop

        def here(leaf: Array) -> Array:
            return lax.dynamic_index_in_dim(leaf, number, keepdims=False)

        at, weights_l = jax.tree.map(here, (call.numbers.layers, weights))
        state, cache, record_l, kept_l = layer.run(inner, state, cache, at, weights_l, None)
        record = _set(record, number, put.record(record_l))
        kept = _set(kept, number, put.kept(kept_l))
        return state, cache, record, kept

    loop = (state, carry.cache, carry.record, carry.kept)
    state, cache, record, kept = lax.fori_loop(bounds.first_S - 1, bounds.last_S, body, loop)
    if index is not None:
        state = gathering.scatter(call, carry.state, state, index, bounds.first_S, bounds.last_S)
    return Carry(state, cache, record, kept, carry.overflow)


def _set(buffers: Any, number: Array, values: Any) -> Any:
    """Write one layer's arrays into those of all layers, in place."""
    return jax.tree.map(lambda buffer, value: buffer.at[number].set(value), buffers, values)


def _empty_record(call: Call) -> LayerRecord:
    blank, layers = decisions.blank_record(call, opening.start(call)), call.model.num_layers
    return jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), blank)


def _empty_kept(call: Call) -> pasts.Kept | None:
    if not call.keeps:
        return None
    setting, layers = call.plan.fusion, call.model.num_layers
    batch, width = call.rows.pos_BT.shape
    size = before = merged = None
    exact = exact_dtype(call.model.dtype)
    if setting is not None and setting.proportional_attention:
        size = jnp.zeros((layers, batch, width), exact)
    if setting is not None and not call.plan.continuation:
        mass = jnp.zeros((layers, batch, setting.window), exact)
        states = (*mass.shape, call.model.hidden_size)
        before = jnp.zeros(states, call.embedded_BTD.dtype)
        merged = fusion.Merged(before, mass, mass)
    return pasts.Kept(size, before, merged, None, None)


def run_prompt(
    params: Params,
    prompt: tokenwise.Prompt,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    schedule: Schedule,
    segments: Segments,
    capacity: int,
) -> tuple[Float[Array, "B V"], Past, Bool[Array, ""]]:
    """Prefill: the logits after each row's last token, the past of the next one, overflow."""
    result = run(params, prompt, model, plan, numbers, schedule, segments, capacity)
    rows_B = jnp.arange(prompt.tokens_BT.shape[0])
    logits_BV = head.logits(params, result.h_BTD[rows_B, prompt.lengths_B - 1])
    assert result.past is not None
    live_B = jnp.ones_like(prompt.lengths_B, bool)
    past = tokenwise.remember(result.past, logits_BV, live_B, plan)
    return logits_BV, past, result.overflow
