"""From the full cache of a prompt to the compact caches of decoding, and their growth.

A capacity is a static size, so every new one is a new program. They are buckets, eight to an
octave, shared by groups of layers; a cache that cannot hold what the next steps may write is grown
before they run, so nothing is ever dropped. A call of n new tokens compiles at most
`1 + ceil(n / GROWTH)` decoding programs, and further calls whose tokens leave alike none.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import weights
from qs_jax.engine.cache import EMPTY, SlotCache
from qs_jax.engine.token_loop import DecodePlan
from qs_jax.mechanisms import kv_skip
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.state import DecodeState, KVCache, Past

# Most new tokens a cache has room for before it grows.
GROWTH = 256
# Layers that share a capacity where tokens may leave at any layer.
SHARED = 3
# Segments of a stacked scan where tokens may leave at any layer: each costs a host sync on GPU.
STACKED_SEGMENTS = 6
SMALLEST = 8


def bucket(n: int) -> int:
    """The smallest capacity that holds `n` slots: eight to an octave."""
    step = 1 << max((n - 1).bit_length() - 4, 0)
    return max(-(-n // step) * step, SMALLEST)


def _leaving(cfg: Config) -> set[int]:
    """Layers after which tokens may leave, where the configuration names few."""
    qs = cfg.quicksilver
    if qs is None or qs.halting is None or qs.halting.layers is None:
        return set()
    delay = qs.kv_skip.delay if qs.kv_skip is not None else 0
    layers = set(qs.halting.layers)
    layers |= {layer + delay for layer in layers}
    return {layer for layer in layers if layer < cfg.model.num_layers}


def _sizes(boundaries: set[int], count: int) -> tuple[int, ...]:
    edges = [0, *sorted(boundaries - {0, count}), count]
    return tuple(b - a for a, b in itertools.pairwise(edges))


def segments(cfg: Config, plan: Plan | None) -> tuple[int, ...]:
    """Layers of each segment: one each where weights are separate, else few."""
    count = cfg.model.num_layers
    if weights.chosen(cfg.decode_weights) == "separate":
        return (1,) * count
    if plan is None or (plan.halting is None and plan.fusion is None):
        return (count,)
    leaving = _leaving(cfg)
    if leaving and len(leaving) <= 2 * STACKED_SEGMENTS:
        return _sizes(leaving, count)
    width = -(-count // STACKED_SEGMENTS)
    return _sizes(set(range(0, count, width)), count)


def _groups(cfg: Config, plan: DecodePlan) -> list[slice]:
    """Neighbouring segments that share a capacity."""
    count, leaving = cfg.model.num_layers, _leaving(cfg)
    edges = set(leaving)
    fused = cfg.quicksilver is not None and cfg.quicksilver.fusion is not None
    if len(leaving) > 2 * STACKED_SEGMENTS or not leaving or fused:
        edges |= set(range(0, count, SHARED))
    starts = np.cumsum((0, *plan.segments))
    marks = [i for i, start in enumerate(starts[:-1]) if i == 0 or start in edges]
    return [slice(a, b) for a, b in zip(marks, [*marks[1:], len(plan.segments)], strict=True)]


def by_position(plan: Plan | None) -> bool:
    """Every token is kept in every layer: slots are positions, and nothing is saved.

    "attended" may bring any key back; "propagate" and "extrapolate" write all; only "skip" and
    fusion leave keys out.
    """
    if plan is None or plan.policy == "attended":
        return True
    return plan.policy != "skip" and plan.fusion is None


def held(past: Past, lengths_B: Array, plan: Plan, numbers: Numbers) -> Bool[Array, "L B S"]:
    """Entries of a prompt that its next query can see, layer by layer."""
    width = past.halt_layer_BS.shape[1]
    pos_BS = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], past.halt_layer_BS.shape)

    def at(layer: Array) -> Array:
        keys = kv_skip.Keys(
            pos_BS=pos_BS,
            real_BS=pos_BS < lengths_B[:, None],
            halt_layer_BS=past.halt_layer_BS,
            hidden_from_BS=jnp.where(layer <= past.hidden_after_BS, NEVER, 0),
            retain_BS=past.retain_BS,
            received_BTS=None,
        )
        return kv_skip.visible(jnp.full_like(pos_BS[:, :1], width), keys, layer, plan, numbers)[
            :, 0
        ]

    return jax.vmap(at)(numbers.layers.layer)


@functools.partial(jax.jit, static_argnames=("plan",))
def _needed(past: Past, lengths_B: Array, numbers: Numbers, plan: Plan) -> Int[Array, "L"]:
    return held(past, lengths_B, plan, numbers).sum(2).max(1).astype(jnp.int32)


def _pad(array: Array, width: int, axis: int, value: Any = 0) -> Array:
    """Cut or pad an axis to `width`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, max(width - array.shape[axis], 0))
    array = jnp.pad(array, widths, constant_values=value)
    return jax.lax.slice_in_dim(array, 0, width, axis=axis)


def _spans(sizes: tuple[int, ...]) -> list[slice]:
    edges = np.cumsum((0, *sizes)).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _packed(cache: KVCache, held_LBS: Array, span: slice, capacity: int) -> SlotCache:
    """A segment's entries that are held, in order, then room."""
    held_lBS = held_LBS[span]
    fill_lB = held_lBS.sum(2, dtype=jnp.int32)
    order_lBS = jnp.argsort(~held_lBS, axis=2, stable=True).astype(jnp.int32)
    order_lBC = _pad(order_lBS, capacity, 2)
    slots_11C = jnp.arange(capacity, dtype=jnp.int32)[None, None]
    pos_lBC = jnp.where(slots_11C < fill_lB[..., None], order_lBC, EMPTY)

    def gather(array_LBSKH: Array) -> Array:
        index = order_lBC[..., None, None]
        return jnp.take_along_axis(array_LBSKH[span], index, axis=2)

    return SlotCache.of(gather(cache.k_LBSKH), gather(cache.v_LBSKH), pos_lBC, fill_lB)


@functools.partial(jax.jit, static_argnames=("plan", "capacities", "width"))
def _pack(
    state: DecodeState,
    numbers: Numbers | None,
    plan: DecodePlan,
    capacities: tuple[int, ...],
    width: int,
) -> DecodeState:
    past, cache = state.cache, state.cache
    if isinstance(past, Past):
        cache = past.cache
    assert isinstance(cache, KVCache)
    spans = list(zip(_spans(plan.segments), capacities, strict=True))
    if by_position(plan.mechanisms):
        caches = tuple(
            SlotCache.of(
                _pad(cache.k_LBSKH[span], size, 2), _pad(cache.v_LBSKH[span], size, 2), None, None
            )
            for span, size in spans
        )
    else:
        assert isinstance(past, Past)
        assert plan.mechanisms is not None
        assert numbers is not None
        held_LBS = held(past, state.pos_B, plan.mechanisms, numbers)
        caches = tuple(_packed(cache, held_LBS, span, size) for span, size in spans)
    if isinstance(past, Past):
        return state.replace(cache=_widened(past.replace(cache=caches), width))
    return state.replace(cache=caches)


def _widened(past: Past, width: int) -> Past:
    """The arrays over positions, cut or padded to `width` positions."""
    record = jax.tree.map(lambda leaf: _pad(leaf, width, 2), past.record)
    layers = past.record.active_BT.shape[0]
    received_BS, size_LBS = past.received_BS, past.size_LBS
    return past.replace(
        halt_layer_BS=_pad(past.halt_layer_BS, width, 1, layers),
        hidden_after_BS=_pad(past.hidden_after_BS, width, 1, NEVER),
        hidden_from_BS=_pad(past.hidden_from_BS, width, 1, NEVER),
        retain_BS=_pad(past.retain_BS, width, 1),
        received_BS=None if received_BS is None else _pad(received_BS, width, 1),
        size_LBS=None if size_LBS is None else _pad(size_LBS, width, 2, 1),
        record=record,
    )


@functools.partial(jax.jit, static_argnames=("capacities", "width"))
def _grow(state: DecodeState, capacities: tuple[int, ...], width: int) -> DecodeState:
    past = state.cache
    caches: Any = past.cache if isinstance(past, Past) else past

    def wider(cache: SlotCache, size: int) -> SlotCache:
        pos_lBC = cache.pos_lBC
        return cache.replace(
            k_CO=_pad(cache.k_CO, size, cache.k_CO.ndim - 2),
            v_CO=_pad(cache.v_CO, size, cache.v_CO.ndim - 2),
            pos_lBC=None if pos_lBC is None else _pad(pos_lBC, size, 2, EMPTY),
        )

    caches = tuple(wider(cache, size) for cache, size in zip(caches, capacities, strict=True))
    if isinstance(past, Past):
        return state.replace(cache=_widened(past.replace(cache=caches), width))
    return state.replace(cache=caches)


def make_room(
    state: DecodeState, numbers: Numbers | None, cfg: Config, plan: DecodePlan, room: int
) -> DecodeState:
    """Caches that hold all there is and `room` more tokens a row; what they hold is unchanged.

    Args:
      state: After prefill, with a full cache, or with caches to grow. Its caches are deleted: no
        donation can reuse them for others of another size.
      numbers: Of the mechanisms.
      cfg: Model and where tokens may leave.
      plan: Static half of the call.
      room: Steps that will follow.
    """
    past = state.cache
    caches: Any = past.cache if isinstance(past, Past) else past
    longest = int(np.asarray(state.pos_B).max())
    width, fresh = bucket(longest + room), isinstance(caches, KVCache)
    if by_position(plan.mechanisms):
        capacities = (width,) * len(plan.segments)
    else:
        if fresh:
            assert plan.mechanisms is not None
            filled = np.asarray(_needed(past, state.pos_B, numbers, plan.mechanisms))
        else:
            fills = jax.device_get([cache.fill_lB for cache in caches])
            filled = np.concatenate([fill.max(1) for fill in fills])
        needed = [int(filled[span].max()) + room for span in _spans(plan.segments)]
        capacities = _shared(needed, cfg, plan)
    if fresh:
        roomy = _pack(state, numbers, plan, capacities, width)
    else:
        old = [cache.capacity for cache in caches]
        capacities = tuple(max(pair) for pair in zip(old, capacities, strict=True))
        if isinstance(past, Past):
            width = max(width, past.halt_layer_BS.shape[1])
        roomy = _grow(state, capacities, width)
    used = {id(leaf) for leaf in jax.tree.leaves(roomy)}  # some may be handed through
    for leaf in jax.tree.leaves(caches):
        if id(leaf) not in used:
            leaf.delete()
    return roomy


def _shared(needed: list[int], cfg: Config, plan: DecodePlan) -> tuple[int, ...]:
    capacities = [0] * len(needed)
    for group in _groups(cfg, plan):
        size = bucket(max(needed[group]))
        capacities[group] = [size] * len(capacities[group])
    return tuple(capacities)


def full_cache(model: ModelConfig, shape: tuple[int, ...], plan: DecodePlan) -> Any:
    """Shapes of the masked engine's cache for a batch `[B, T]`."""
    return jax.eval_shape(lambda: KVCache.zeros(model, shape[0], shape[1] + plan.new_capacity))
