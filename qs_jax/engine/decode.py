"""The decode engine: a loop over tokens, and in it a walk over layers that ends where all halt.

The layer is every engine's (`layer.run`), over compact caches that are written in place.
A segment of layers in which no row computes is not run: its keys and values are written where the
policy needs them, and that is all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import (
    batching,
    layer,
    layer_keys,
    one_query,
    opening,
    pack,
    token_loop,
    tokenwise,
    weights,
)
from qs_jax.engine import past as pasts
from qs_jax.engine.branches import zeros_of
from qs_jax.engine.cache import LayerCache, SlotCache, cache_bytes
from qs_jax.engine.call import Call
from qs_jax.engine.idle import idle
from qs_jax.engine.token_loop import DecodeNumbers, DecodePlan
from qs_jax.halves import bits_of
from qs_jax.mechanisms import decide, kv_skip
from qs_jax.mechanisms.plan import Numbers, Plan
from qs_jax.models import Params, family_of, head
from qs_jax.state import DecodeState, Past

# run(carry, cache, params_l, index) -> (carry, out)
Layer = Callable[[Any, LayerCache, Any, Any], tuple[Any, Any]]


def over_segment(
    layers: Any, start: int, count: int, run: Layer, carry: Any, cache: SlotCache
) -> tuple[Any, Any]:
    """Run a segment's layers one after the other; the cache is only read.

    Args:
      layers: `weights.as_decoded`. Stacked ones are scanned over; separate ones are for segments
        of one layer, which run as they are.
      start: The segment's first layer, from 0.
      count: Its layers.
      run: What to run.
      carry: Handed from layer to layer.
      cache: The segment's.

    Returns:
      The carry, and the layers' outputs on a leading axis.
    """
    if isinstance(layers, tuple):
        assert count == 1
        carry, out = run(carry, LayerCache(cache, 0), layers[start], start)
        return carry, jax.tree.map(lambda leaf: leaf[None], out)

    def body(carry, offset):
        params_l = weights.of_layer(layers, start + offset)
        return run(carry, LayerCache(cache, offset), params_l, start + offset)

    return lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))


def dense_step(
    params: Params,
    layers: Any,
    tokens_B: Int[Array, "B"],
    pos_B: Int[Array, "B"],
    live_B: Bool[Array, "B"],
    caches: tuple[SlotCache, ...],
    model: ModelConfig,
    segments: tuple[int, ...],
) -> tuple[Float[Array, "B V"], tuple[SlotCache, ...]]:
    """Run one token a row at `pos_B` through the plain model; the logits after it."""
    family = family_of(model)
    block, pos_B1 = family.block(model), pos_B[:, None]

    def run(h_B1D, cache: LayerCache, params_l, index):
        del index
        mask_B1X = cache.mask(pos_B)[:, None]

        def attend(q, k, v):
            own = cache._replace(k_B1KH=k, v_B1KH=v)
            return one_query.attention(q, own, mask_B1X, None)[0], (k[:, 0], v[:, 0])

        out: Any = block.apply({"params": params_l}, h_B1D, pos_B1, attend)
        return out

    h_B1D: Any = family.embed(model).apply({"params": params["embed"]}, tokens_B[:, None], pos_B1)

    def walk(h_B1D, caches):
        owns, start = [], 0
        for count, cache in zip(segments, caches, strict=True):
            h_B1D, own = over_segment(layers, start, count, run, h_B1D, cache)
            owns.append(own)
            start += count
        return h_B1D, owns

    def stay(h_B1D, caches):
        return h_B1D, zeros_of(walk, h_B1D, caches)[1]

    # Always taken. A branch is what keeps a cache's readers before its writer: else XLA copies it.
    h_B1D, owns = lax.cond(live_B.any(), walk, stay, h_B1D, caches)
    written = tuple(
        cache.append(pos_B, own[0], own[1], jnp.ones((cache.layers, *live_B.shape), bool))
        for cache, own in zip(caches, owns, strict=True)
    )
    return head.logits(params, head.normed(params, h_B1D, model)[:, 0]), written


def step(
    params: Params,
    layers: Any,
    rows: decide.Rows,
    past: Past,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    segments: tuple[int, ...],
) -> tuple[Float[Array, "B V"], Past]:
    """Run one token a row under the mechanisms; the logits after it and the next past."""
    assert isinstance(past.cache, tuple)
    call = opening.open_call(params, rows, model, plan, numbers, past, True)
    state, outs, written, start = opening.start(call), [], [], 0
    for count, cache in zip(segments, past.cache, strict=True):
        state, out, own = _segment(call, layers, start, count, state, cache)
        outs.append(out)
        written.append(cache.append(rows.pos_BT[:, 0], *own, state.bits_BT[:, 0]))
        start += count
    record, kept = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs)
    following = pasts.extend(call, state, record, kept, tuple(written))
    logits_BV = head.logits(params, head.normed(params, state.h_BTD, model)[:, 0])
    return logits_BV, tokenwise.remember(following, logits_BV, rows.real_BT[:, 0], plan)


def _segment(call: Call, layers: Any, start: int, count: int, state, cache: SlotCache):
    """A segment under the mechanisms, skipped where nobody computes at its first layer.

    A single row's layers are skipped one by one: that token computes as many as it needs.
    """
    plan, rows = call.plan, call.rows
    shared, past_layers = layer.weights_of(call, None), pasts.by_layer(call.past)

    def of_layer(params_l, index):
        at = _at(call.numbers.layers, index)
        if isinstance(index, int):
            at = at._replace(layer=jnp.int32(index + 1))
        return at, _at(shared, index)._replace(params=params_l), _at(past_layers, index)

    def put_by(state, at, cache: LayerCache):
        own = layer_keys.own(call, state)
        keep_BT = kv_skip.written(own, at.layer, plan, call.numbers) & rows.real_BT
        shape = (len(rows.pos_BT), call.model.num_kv_heads, call.model.head_dim)
        if cache.k_B1KH is None or cache.v_B1KH is None:
            nothing_BKH = jnp.zeros(shape, call.model.dtype)
            return nothing_BKH, nothing_BKH, keep_BT[:, 0]
        return cache.k_B1KH[:, 0], cache.v_B1KH[:, 0], keep_BT[:, 0]

    def computes(before, cache: LayerCache, params_l, index):
        found = of_layer(params_l, index)
        state, cache, record, kept = layer.run(call, before, cache, *found)
        return state, ((record, kept), put_by(before, found[0], cache))

    def stays(stores: bool, before, cache: LayerCache, params_l, index):
        found = of_layer(params_l, index)
        state, cache, record, kept = idle(call, before, cache, *found, stores)
        return state, ((record, kept), put_by(before, found[0], cache))

    def branch(run: Layer):
        return functools.partial(over_segment, layers, start, count, run)

    def needed(state, number):
        """What is to be done in the layer of this number: an index into `every`."""
        own = layer_keys.own(call, state)
        stores = (kv_skip.written(own, number, plan, call.numbers) & live_BT).any()
        stores |= plan.policy == "attended"
        computing = (live_BT & (number <= state.halt_layer_BT)).any()
        return jnp.where(computing, 2, stores.astype(jnp.int32))

    live_BT = rows.real_BT
    every = [*(functools.partial(stays, stores) for stores in (False, True)), computes]

    def chooses(before, cache: LayerCache, params_l, index):
        runs = [functools.partial(run, params_l=params_l, index=index) for run in every]
        return lax.switch(needed(before, index + 1), runs, before, cache)

    # One of the branches is taken even where nobody may leave: a branch is what keeps a cache's
    # readers before its writer.
    which, runs = live_BT.any().astype(jnp.int32), [every[0], computes]
    if plan.halting is not None and plan.halting.freeze and call.decides:
        if count > 1 and isinstance(layers, weights.InPlace):
            runs[1] = chooses  # a choice a layer costs a GPU more than it saves
        else:
            which, runs = needed(state, jnp.int32(start + 1)), every
    state, (out, own) = lax.switch(which, [branch(run) for run in runs], state, cache)
    return state, out, own


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def advance(
    params: Params,
    layers: Any,
    state: DecodeState,
    numbers: DecodeNumbers,
    model: ModelConfig,
    plan: DecodePlan,
) -> DecodeState:
    """Run each row's last token through the model and choose the next one."""
    cache: Any = state.cache
    if plan.mechanisms is None:
        logits_BV, cache = dense_step(
            params,
            layers,
            state.last_B,
            state.pos_B,
            ~state.done_B,
            cache,
            model,
            plan.segments,
        )
    else:
        assert numbers.mechanisms is not None
        rows = token_loop.next_rows(state, plan.mechanisms, numbers.mechanisms)
        logits_BV, cache = step(
            params,
            layers,
            rows,
            cache,
            model,
            plan.mechanisms,
            numbers.mechanisms,
            plan.segments,
        )
    moved = state.replace(cache=cache, pos_B=state.pos_B + ~state.done_B)
    state = token_loop.emit(moved, logits_BV, numbers, plan)
    caches = slot_caches(state)
    full = functools.reduce(jnp.logical_or, [each.full(~state.done_B) for each in caches])
    return state.replace(full=full)


def slot_caches(state: DecodeState) -> Any:
    """The caches of all segments; the prompt's full one where nothing has been packed yet."""
    return state.cache.cache if isinstance(state.cache, Past) else state.cache


def run_until(
    params: Params,
    layers: Any,
    state: DecodeState,
    limit: Int[Array, ""],
    numbers: DecodeNumbers,
    model: ModelConfig,
    plan: DecodePlan,
) -> DecodeState:
    """Steps until `limit` tokens are produced, every row has ended, or a cache is full."""

    def unfinished(state: DecodeState) -> Array:
        return (state.step < limit) & ~state.done_B.all() & ~state.full

    def body(state: DecodeState) -> DecodeState:
        return advance(params, layers, state, numbers, model, plan)

    return lax.while_loop(unfinished, body, state)


_STATIC = ("model", "plan")
jit_advance = jax.jit(advance, static_argnames=_STATIC, donate_argnames=("state",))
jit_run_until = jax.jit(run_until, static_argnames=_STATIC, donate_argnames=("state",))


class Decoder:
    """The host's side of one call: it makes room before the steps that need it."""

    def __init__(
        self, params: Params, numbers: DecodeNumbers, cfg: Config, plan: DecodePlan, rows: int
    ) -> None:
        parts = bits_of(params)
        self.params = {name: part for name, part in parts.items() if name != "layers"}
        self.prompt_params, self.rows = params, rows
        self.numbers, self.cfg, self.plan = numbers, cfg, plan
        self.static = {"model": cfg.model, "plan": plan}
        self.produced = 1  # prefill chooses the first token
        self.limit = 1
        self.surprised = False  # a cache was full before its time

    @functools.cached_property
    def layers(self) -> Any:
        """Their weights as `over_segment` takes them, once a second token is asked for."""
        return weights.as_decoded(self.prompt_params, self.cfg.decode_weights, self.rows)

    def room(self, state: DecodeState) -> DecodeState:
        """Caches with room for the next steps; `limit` is where it ends."""
        self.surprised |= self.produced < self.limit
        steps = min(self.plan.new_capacity - self.produced, pack.GROWTH)
        state = pack.make_room(
            state, self.numbers, self.cfg, self.plan, steps, for_all=self.surprised
        )
        self.limit = self.produced + steps
        return state

    def advance(self, state: DecodeState) -> DecodeState:
        """One more token a row."""
        if self.produced == self.limit or bool(state.full):
            state = self.room(state)
        self.produced += 1
        return jit_advance(self.params, self.layers, state, self.numbers, **self.static)

    def finish(self, state: DecodeState) -> DecodeState:
        """All tokens that are still to come."""
        budget = self.cfg.max_new_tokens
        while self.produced < budget and not np.asarray(state.done_B).all():
            state = self.room(state)
            limit = jnp.int32(min(self.limit, budget))
            state = jit_run_until(
                self.params, self.layers, state, limit, self.numbers, **self.static
            )
            self.produced = int(state.step)
        return state


def generate(
    params: Params, padded: batching.Batch, numbers: DecodeNumbers, cfg: Config, plan: DecodePlan
) -> tuple[dict[str, Any], int]:
    """The whole call: `token_loop.results`, and the bytes of the KV cache at its end."""
    state = token_loop.jit_start(bits_of(params), *padded, numbers, model=cfg.model, plan=plan)
    decoder = Decoder(params, numbers, cfg, plan, len(padded.lengths_B))
    state = decoder.finish(state)
    return token_loop.results(state), cache_bytes(slot_caches(state))
