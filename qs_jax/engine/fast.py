"""Generation on the fast engines: prefill, packing and the loop over tokens, as three programs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from qs_jax.config import Config, ModelConfig, Speculation
from qs_jax.engine import decode, inputs, prompt, sampling, speculate
from qs_jax.engine import devices as on_devices
from qs_jax.engine.cache import KVCache, SlotCache, bucket, cache_bytes
from qs_jax.engine.decode import DecodeState
from qs_jax.engine.prompt_call import Plan, Segments
from qs_jax.engine.prompt_plan import arrange
from qs_jax.mechanisms import Mechanisms, Overrides
from qs_jax.models import Params, cpu, head
from qs_jax.record import written_keys
from qs_jax.state import FULL_BITS, NEVER, Decisions

# Most new tokens a cache has room for before it grows.
GROWTH = 256
# Segments into which stacked layers are cut where tokens may leave at any of them.
STACKED_SEGMENTS = 6
# Room for new tokens, over the share that the prompt has.
MARGIN = 1.25


class Request(NamedTuple):
    """A call, ready to run; `padded` holds the prompts padded to their bucket."""

    params: Params
    batch: inputs.Batch
    padded: inputs.Batch
    overrides: Overrides | None
    mech: Mechanisms
    numbers: sampling.Numbers
    plan: sampling.Plan
    cfg: Config
    mesh: Mesh | None = None


def start(
    params: Params,
    batch: inputs.Batch,
    overrides: Overrides | None,
    mech: Mechanisms,
    segments: Segments,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
    prompt_plan: Plan,
) -> tuple[sampling.Text, KVCache, Decisions]:
    """Run the prompts and choose the first token of each row."""
    rows = inputs.whole_rows(batch, batch.lengths_B, overrides, mech)
    last_B1 = batch.lengths_B[:, None] - 1
    cut = (prompt_plan, segments)
    h_BQD, cache, decisions = prompt.run(params, rows, last_B1, model, mech, *cut)
    logits_BV = head.logits(params, h_BQD[:, 0])
    text = sampling.begin(batch.tokens_BT, batch.lengths_B, logits_BV, numbers, plan)
    return text, cache, decisions


jit_start = jax.jit(start, static_argnames=("model", "plan", "prompt_plan"))


class Fast:
    """Prefill and decode, with room made in caches before the steps that need it."""

    def __init__(self, call: Request) -> None:
        self.call, self.cfg = call, call.cfg
        self.edges = _edges(self.cfg)
        self.produced = self.limit = 0
        self.state: Any = None  # (Text, KVCache, Decisions) after the prompt, then a DecodeState
        self.static = {"model": self.cfg.model, "plan": call.plan}

    @functools.cached_property
    def weights(self) -> tuple[Params, Any]:
        """Parameters and layers as a step takes them, once a second token is asked for."""
        rest = {name: part for name, part in self.call.params.items() if name != "layers"}
        return rest, cpu.decode_layers(self.call.params, len(self.call.batch.lengths_B))

    @property
    def width(self) -> int:
        """Most tokens of a row in a step."""
        return 1 if self.cfg.speculate is None else 1 + self.cfg.speculate.length

    def counts(self, lengths_B: np.ndarray) -> dict[str, Any]:
        """Steps of each row, and its drafts."""
        drafts = self.state.drafts if isinstance(self.state, DecodeState) else None
        return speculate.counts(drafts, lengths_B)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the caches; of the prompt's cache where only one token was generated."""
        state = self.state
        return cache_bytes(state.caches if isinstance(state, DecodeState) else state[1])

    def begin(self) -> sampling.Text:
        """Run the prompts."""
        call = self.call
        prompts = (call.padded, call.padded.lengths_B, call.overrides)
        cut, segments = arrange(self.cfg, *prompts, call.mech)
        rows = on_devices.put_rows((call.padded, call.overrides), call.mesh)
        given = (*rows, call.mech, segments, call.numbers)
        text, *rest = jit_start(self.call.params, *given, **self.static, prompt_plan=cut)
        self.state = (on_devices.end_copies(text, len(call.batch.lengths_B)), *rest)
        self.produced = self.limit = 1
        return self.state[0]

    def advance(self) -> sampling.Text:
        """One more token a row, or more where drafts are verified."""
        if self.produced == 0:
            return self.begin()
        return self.run(decode.jit_advance)

    def finish(self) -> tuple[sampling.Text, Decisions | None]:
        """All tokens, and the decisions."""
        text, budget = self.begin(), self.cfg.max_new_tokens
        while _goes_on(text, budget):
            text = self.run(decode.jit_run_until)
        if self.call.mech.is_off:
            return text, None
        state = self.state
        return text, state.decisions if isinstance(state, DecodeState) else state[2]

    def run(self, steps: Callable[..., DecodeState]) -> sampling.Text:
        """A step or many, once there is room for the next."""
        if not isinstance(self.state, DecodeState) or self.is_short:
            self.make_room()
        limit = jnp.int32(min(self.limit, self.cfg.max_new_tokens))
        given = (*self.weights, self.state, limit, self.call.mech, self.call.numbers)
        self.state = steps(*given, **self.static)
        self.produced = int(np.asarray(self.state.text.lengths_B).max())
        return self.state.text

    @property
    def is_short(self) -> bool:
        """A cache is full, or every live row has as many tokens as there is room for."""
        return bool(self.state.full) or not _goes_on(self.state.text, self.limit)

    def make_room(self) -> None:
        """Make room in the caches for the next steps; `limit` is where it ends."""
        call, state = self.call, self.state
        # A cache was full before its limit: this time, room for every token.
        surprised = 1 < self.produced < self.limit
        room = min(call.plan.capacity - self.produced, GROWTH)
        drafting = self.cfg.speculate
        if drafting is not None and drafting.exact:  # sums over more slots are rounded otherwise
            room = call.plan.capacity - self.produced
        slots = room if drafting is None else room + drafting.length
        text = state.text if isinstance(state, DecodeState) else state[0]
        longest = int(np.asarray(text.pos_B).max())
        if isinstance(state, DecodeState):
            old: Any = state.caches
            fills = jax.device_get([cache.fill_lB for cache in old])
            sizes = [_capacity(self.cfg, int(f.max()), longest, slots, surprised) for f in fills]
            sizes = [max(cache.capacity, size) for cache, size in zip(old, sizes, strict=True)]
            self.state = _grow(state, tuple(sizes))
        else:
            text, old, decisions = state
            qs, layers = self.cfg.quicksilver, self.cfg.model.num_layers
            held_LBS = written_keys(decisions, qs, layers, np.asarray(text.pos_B))
            most_L = held_LBS.sum(2).max(1)
            layout, coded, keeps_all = [], _coded_after(self.cfg), _keeps_all(self.cfg)
            for start, end in itertools.pairwise(self.edges):
                most = int(most_L[start:end].max())
                size = _capacity(self.cfg, most, longest, slots, surprised)
                layout.append((start, end, size, start >= coded, keeps_all))
            width = old.k_LBSKH.shape[2] + call.plan.capacity
            noted = None if call.mech.is_off else decisions
            arrays = (text, old, noted, held_LBS, decisions.bits_BT)
            prompts = on_devices.put_rows(call.padded.tokens_BT, call.mesh) if drafting else None
            drafts = (prompts, *speculate.split(drafting, len(call.batch.lengths_B)))
            self.state = _pack(*arrays, *drafts, tuple(layout), width)
        used = {id(leaf) for leaf in jax.tree.leaves(self.state)}  # some may be handed through
        for leaf in jax.tree.leaves(old):
            if id(leaf) not in used:
                leaf.delete()
        self.limit = self.produced + room


def _goes_on(text: sampling.Text, limit: int) -> bool:
    """`Text.going` of any row, on the host: a stream asks before every step."""
    return bool((~np.asarray(text.done_B) & (np.asarray(text.lengths_B) < limit)).any())


def _edges(cfg: Config) -> list[int]:
    """Layers before which segments begin, from 0, and their number."""
    count, qs = cfg.model.num_layers, cfg.quicksilver
    edges = {0, _coded_after(cfg), count}
    if qs is not None and (qs.halting is not None or qs.fusion is not None):
        layers = (qs.halting.layers if qs.halting is not None else None) or ()
        few = 0 < len(layers) <= STACKED_SEGMENTS
        edges |= set(layers) if few else set(range(0, count, -(-count // STACKED_SEGMENTS)))
    return sorted(edges)


def _coded_after(cfg: Config) -> int:
    """Layers before the first whose cache holds int8 codes; all layers if there is no such."""
    amq = cfg.quicksilver.amq if cfg.quicksilver is not None else None
    if amq is not None and amq.execution == "int8" and "kv" in amq.targets:
        return amq.layer
    return cfg.model.num_layers


def _keeps_all(cfg: Config) -> bool:
    """Whether every layer keeps every token: only "skip" and fusion leave keys out."""
    qs = cfg.quicksilver
    if qs is None or qs.is_off:
        return True
    return qs.fusion is None and (qs.kv_skip is None or qs.kv_skip.policy != "skip")


def _capacity(cfg: Config, held: int, longest: int, room: int, for_all: bool) -> int:
    """Slots of a cache: what it holds, and room for a like share of new tokens, or for all."""
    share = min(MARGIN * held / longest, 1.0)
    if for_all or _keeps_all(cfg) or cfg.effective_protocol == "continuation":
        share = 1.0
    return bucket(held + max(math.ceil(share * room), 1))


@functools.partial(jax.jit, static_argnames=("drafting", "layout", "width"))
def _pack(
    text: sampling.Text,
    cache: KVCache,
    decisions: Decisions | None,
    held_LBS: Array,
    bits_BS: Array,
    prompts_BT: Array | None,
    gate: Array | None,
    drafting: Speculation | None,
    layout: tuple[tuple[int, int, int, bool, bool], ...],
    width: int,
) -> DecodeState:
    """Caches of decoding from a prompt's, and decisions over `width` positions.

    `layout` is, for each segment: its first layer, the one after its last, slots, whether it holds
    int8 codes, and whether it keeps every token.
    """
    caches = []
    for first, end, capacity, coded, keeps_all in layout:
        span = slice(first, end)
        bits = jnp.broadcast_to(bits_BS, held_LBS[span].shape) if coded else None
        packed = (cache, span, held_LBS[span], capacity, bits, keeps_all)
        caches.append(SlotCache.pack(*packed))

    def widen(array: Any, empty: Any) -> Any:
        if array is None:
            return None
        widths = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
        return jnp.pad(array, widths, constant_values=empty)

    if decisions is not None:
        layers = cache.k_LBSKH.shape[0]
        empty = (layers, NEVER, NEVER, FULL_BITS, False, jnp.nan, jnp.nan)
        given = (getattr(decisions, field.name) for field in dataclasses.fields(decisions))
        decisions = Decisions(*map(widen, given, empty))
    drafts = None
    if drafting is not None:
        assert gate is not None
        assert prompts_BT is not None
        drafts = speculate.begin(drafting, gate, prompts_BT, text)
    return DecodeState(text, tuple(caches), decisions, jnp.zeros((), bool), drafts)


@functools.partial(jax.jit, static_argnames=("capacities",))
def _grow(state: DecodeState, capacities: tuple[int, ...]) -> DecodeState:
    pairs = zip(state.caches, capacities, strict=True)
    caches = tuple(cache.grow(size) for cache, size in pairs)
    return state.replace(caches=caches, full=jnp.zeros((), bool))
