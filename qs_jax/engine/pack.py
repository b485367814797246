"""From the full cache of a prompt to the compact caches of decoding, and their growth.

A capacity is a static size, so every new one is a new program: what is held (the last token, and
the others in buckets, sixteen to an octave) and room for new tokens; groups of layers share it. A
cache that cannot hold what the next steps may write is grown before they run, so nothing is ever
dropped. New tokens get room for as large a share of them as of the prompt; where that runs out the
loop stops, and from there on there is room for all. A call of n new tokens compiles at most `2 +
ceil(n / GROWTH)` decoding programs, and further calls whose tokens leave alike none. Segments
before the first layer that a token may leave hold every token: slots are positions there, as in all
of the dense model's.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import weights
from qs_jax.engine.cache import EMPTY, SlotCache, position_dtype
from qs_jax.engine.token_loop import DecodeNumbers, DecodePlan
from qs_jax.mechanisms import kv_skip
from qs_jax.mechanisms.decide import Overrides
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.state import DecodeState, KVCache, Past

# Most new tokens a cache has room for before it grows.
GROWTH = 256
# Layers that share a capacity where tokens may leave at any layer.
SHARED = 3
# Segments of a stacked scan where tokens may leave at any layer: each costs a host sync on GPU.
STACKED_SEGMENTS = 6
SMALLEST = 8
# Room for new tokens beyond what the prompt's share foretells.
MARGIN = 1.25


def bucket(n: int, smallest: int = SMALLEST) -> int:
    """The smallest capacity that holds `n` slots: sixteen to an octave."""
    step = 1 << max((n - 1).bit_length() - 5, 0)
    return max(-(-n // step) * step, smallest)


def _leaving(cfg: Config) -> set[int]:
    """Layers after which tokens may leave, where the configuration names few."""
    qs = cfg.quicksilver
    if qs is None or qs.halting is None or qs.halting.layers is None:
        return set()
    delay = qs.kv_skip.delay if qs.kv_skip is not None else 0
    layers = set(qs.halting.layers)
    layers |= {layer + delay for layer in layers}
    return {layer for layer in layers if layer < cfg.model.num_layers}


def complete_layers(cfg: Config, overrides: Overrides | None = None) -> int:
    """Layers at the front that every token runs and after which nobody is gone."""
    count, qs = cfg.model.num_layers, cfg.quicksilver
    first = {count}
    if qs is not None and qs.halting is not None:
        first |= set((np.flatnonzero(qs.halting.may_halt(count)) + 1).tolist()[:1])
        first |= set() if qs.halting.forced_layer is None else {qs.halting.forced_layer}
    if qs is not None and qs.fusion is not None:
        first |= {max(qs.fusion.first_layer, 1)}
    if overrides is not None:
        first |= {int(np.asarray(overrides.forced_layer_BT).min(initial=count))}
    return max(min(first), 0)


def _sizes(boundaries: set[int], count: int) -> tuple[int, ...]:
    edges = [0, *sorted(boundaries - {0, count}), count]
    return tuple(b - a for a, b in itertools.pairwise(edges))


def segments(cfg: Config, plan: Plan | None, rows: int) -> tuple[int, ...]:
    """Layers of each segment: one each where weights are separate, else few."""
    count = cfg.model.num_layers
    if weights.chosen(cfg.decode_weights, rows) == "separate":
        return (1,) * count
    edges = {coded_after(cfg, plan)}
    if plan is None or (plan.halting is None and plan.fusion is None):
        return _sizes(edges, count)
    leaving, first = _leaving(cfg), complete_layers(cfg)
    if leaving and len(leaving) <= 2 * STACKED_SEGMENTS:
        return _sizes(edges | leaving | {first}, count)
    width = max(-(-(count - first) // (STACKED_SEGMENTS - 1)), 1)
    return _sizes(edges | set(range(first, count, width)), count)


def coded_after(cfg: Config, plan: Plan | None) -> int:
    """Layers before those whose cache holds int8 codes; all of them where none does."""
    qs = cfg.quicksilver
    if plan is None or plan.amq is None or qs is None or qs.amq is None:
        return cfg.model.num_layers
    holds = plan.amq.execution == "int8" and "kv" in plan.amq.targets
    return min(qs.amq.layer, cfg.model.num_layers) if holds else cfg.model.num_layers


def _groups(cfg: Config, plan: DecodePlan, complete: int) -> list[slice]:
    """Neighbouring segments that share a capacity, after the complete ones."""
    count, leaving = cfg.model.num_layers, _leaving(cfg)
    edges = set(leaving)
    fused = cfg.quicksilver is not None and cfg.quicksilver.fusion is not None
    if len(leaving) > 2 * STACKED_SEGMENTS or not leaving or fused:
        edges |= set(range(0, count, SHARED))
    starts = np.cumsum((0, *plan.segments))
    numbered = enumerate(starts[complete:-1], complete)
    marks = [i for i, start in numbered if i == complete or start in edges]
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


def _packed(
    cache: KVCache,
    held_LBS: Array,
    span: slice,
    capacity: int,
    bits_LBS: Array | None,
    dtype: jnp.dtype,
) -> SlotCache:
    """A segment's entries that are held, in order, then room; positions in this dtype."""
    held_lBS = held_LBS[span]
    fill_lB = held_lBS.sum(2, dtype=jnp.int32)
    order_lBS = jnp.argsort(~held_lBS, axis=2, stable=True).astype(jnp.int32)
    order_lBC = _pad(order_lBS, capacity, 2)
    slots_11C = jnp.arange(capacity, dtype=jnp.int32)[None, None]
    pos_lBC = jnp.where(slots_11C < fill_lB[..., None], order_lBC, EMPTY).astype(dtype)

    def gather(array_LBSKH: Array) -> Array:
        index = order_lBC[..., None, None]
        return jnp.take_along_axis(array_LBSKH[span], index, axis=2)

    bits_lBC = None
    if bits_LBS is not None:
        bits_lBC = jnp.take_along_axis(bits_LBS[span], order_lBC, axis=2)
    return SlotCache.of(gather(cache.k_LBSKH), gather(cache.v_LBSKH), pos_lBC, fill_lB, bits_lBC)


@functools.partial(
    jax.jit, static_argnames=("plan", "capacities", "width", "coded", "complete", "dtype")
)
def _pack(
    state: DecodeState,
    numbers: Numbers | None,
    plan: DecodePlan,
    capacities: tuple[int, ...],
    width: int,
    coded: int,
    complete: int,
    dtype: jnp.dtype,
) -> DecodeState:
    past, cache = state.cache, state.cache
    if isinstance(past, Past):
        cache = past.cache
    assert isinstance(cache, KVCache)
    spans = list(zip(_spans(plan.segments), capacities, strict=True))

    def bits_from(span: slice) -> Array | None:
        return past.record.bits_BT if isinstance(past, Past) and span.start >= coded else None

    def whole(span: slice, size: int) -> SlotCache:
        bits_LBS = bits_from(span)
        bits_lBC = None if bits_LBS is None else _pad(bits_LBS[span], size, 2)
        k, v = (_pad(array[span], size, 2) for array in (cache.k_LBSKH, cache.v_LBSKH))
        return SlotCache.of(k, v, None, None, bits_lBC)

    caches = tuple(whole(span, size) for span, size in spans[:complete])
    if complete < len(spans):
        assert isinstance(past, Past)
        assert plan.mechanisms is not None
        assert numbers is not None
        held_LBS = held(past, state.pos_B, plan.mechanisms, numbers)
        caches += tuple(
            _packed(cache, held_LBS, span, size, bits_from(span), dtype)
            for span, size in spans[complete:]
        )
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
        pos_lBC, axis = cache.pos_lBC, cache.k_CO.ndim - 2
        names = ("k_CO", "v_CO", "k_scale_CK", "v_scale_CK")
        given = {name: getattr(cache, name) for name in names}
        padded = {n: _pad(array, size, axis) for n, array in given.items() if array is not None}
        if pos_lBC is not None:
            pos_lBC = _pad(pos_lBC, size, 2, jnp.array(EMPTY).astype(pos_lBC.dtype))
        return cache.replace(pos_lBC=pos_lBC, **padded)

    caches = tuple(wider(cache, size) for cache, size in zip(caches, capacities, strict=True))
    state = state.replace(full=jnp.zeros((), bool))
    if isinstance(past, Past):
        return state.replace(cache=_widened(past.replace(cache=caches), width))
    return state.replace(cache=caches)


def make_room(
    state: DecodeState,
    numbers: DecodeNumbers,
    cfg: Config,
    plan: DecodePlan,
    room: int,
    *,
    for_all: bool,
) -> DecodeState:
    """Caches that hold all there is and more tokens a row; what they hold is unchanged.

    Args:
      state: After prefill, with a full cache, or with caches to grow. Its caches are deleted: no
        donation can reuse them for others of another size.
      numbers: Of the mechanisms, and where single tokens leave.
      cfg: Model and where tokens may leave.
      plan: Static half of the call.
      room: Steps that will follow.
      for_all: Make room for all of their tokens in every layer, not for a share of them.
    """
    past = state.cache
    caches: Any = past.cache if isinstance(past, Past) else past
    longest = int(np.asarray(state.pos_B).max())
    width, fresh = bucket(longest + room), isinstance(caches, KVCache)
    longest = width - room  # as many values as there are buckets, no more
    if isinstance(past, Past) and not fresh:
        width = max(width, past.halt_layer_BS.shape[1])
    spans = _spans(plan.segments)
    if fresh:
        complete = _complete_segments(cfg, plan, numbers.overrides)
    else:
        complete = sum(cache.pos_lBC is None for cache in caches)
    capacities = (width,) * complete
    if complete < len(spans):
        assert plan.mechanisms is not None
        if fresh:
            filled = np.asarray(_needed(past, state.pos_B, numbers.mechanisms, plan.mechanisms))
            most = [int(filled[span].max()) for span in spans[complete:]]
        else:
            fills = jax.device_get([cache.fill_lB for cache in caches[complete:]])
            most = [int(fill.max()) for fill in fills]
        # Under "continuation" new tokens are no subjects: every layer keeps them.
        least = 1.0 if for_all or plan.mechanisms.continuation else 0.0
        for group in _groups(cfg, plan, complete):
            own = most[group.start - complete : group.stop - complete]
            # The last token always runs: a round share of a round prompt and it are one bucket.
            held_slots = bucket(max(own) - 1, smallest=0) + 1
            share = min(max(MARGIN * held_slots / longest, least), 1.0)
            size = held_slots + max(math.ceil(share * room), 1)
            capacities += (min(max(size, SMALLEST), width),) * len(own)
    if fresh:
        after = coded_after(cfg, plan.mechanisms)
        dtype = position_dtype(cfg.model.max_positions)
        roomy = _pack(state, numbers.mechanisms, plan, capacities, width, after, complete, dtype)
    else:
        old = [cache.capacity for cache in caches]
        capacities = tuple(max(pair) for pair in zip(old, capacities, strict=True))
        roomy = _grow(state, capacities, width)
    used = {id(leaf) for leaf in jax.tree.leaves(roomy)}  # some may be handed through
    for leaf in jax.tree.leaves(caches):
        if id(leaf) not in used:
            leaf.delete()
    return roomy


def _complete_segments(cfg: Config, plan: DecodePlan, overrides: Overrides | None) -> int:
    """Segments at the front that hold every token."""
    if by_position(plan.mechanisms):
        return len(plan.segments)
    layers = complete_layers(cfg, overrides)
    return sum(span.stop <= layers for span in _spans(plan.segments))


def full_cache(model: ModelConfig, shape: tuple[int, ...], plan: DecodePlan) -> Any:
    """Shapes of the masked engine's cache for a batch `[B, T]`."""
    return jax.eval_shape(lambda: KVCache.zeros(model, shape[0], shape[1] + plan.new_capacity))
