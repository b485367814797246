"""Generation on the fast engines: prefill, or more tokens after a cache, and the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from qs_jax.config import Config, ModelConfig, Speculation
from qs_jax.engine import decode, inputs, prompt, prompt_cache, sampling, speculate
from qs_jax.engine import devices as on_devices
from qs_jax.engine.cache import KVCache, SlotCache, cache_bytes
from qs_jax.engine.decode import DecodeState
from qs_jax.engine.prompt_cache import PromptCache
from qs_jax.engine.prompt_call import Plan, Segments
from qs_jax.engine.prompt_plan import arrange
from qs_jax.engine.request import Request, Rows
from qs_jax.mechanisms import Mechanisms, Overrides
from qs_jax.models import Params, cpu, head
from qs_jax.state import Decisions

# Most new tokens a cache has room for before it grows.
GROWTH = 256


def fill(
    params: Params,
    batch: inputs.Batch,
    overrides: Overrides | None,
    mech: Mechanisms,
    segments: Segments,
    model: ModelConfig,
    prompt_plan: Plan,
) -> tuple[Array, KVCache, Decisions]:
    """Run whole prompts: the normed states of their last tokens, keys and values, decisions."""
    rows = inputs.whole_rows(batch, batch.lengths_B, overrides, mech)
    last_B1 = batch.lengths_B[:, None] - 1
    given = (params, rows, last_B1, model, mech, prompt_plan, segments)
    h_BQD, cache, decisions = prompt.run(*given)
    return h_BQD[:, 0], cache, decisions


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
    given = (batch, overrides, mech, segments, model, prompt_plan)
    h_BD, cache, decisions = fill(params, *given)
    logits_BV = head.logits(params, h_BD)
    text = sampling.begin(batch.tokens_BT, batch.lengths_B, logits_BV, numbers, plan)
    return text, cache, decisions


def resume(
    params: Params,
    layers: Any,
    caches: tuple[SlotCache, ...],
    decisions: Decisions | None,
    batch: inputs.Batch,
    more: inputs.Batch,
    mech: Mechanisms,
    numbers: sampling.Numbers,
    gate: Array | None,
    model: ModelConfig,
    plan: sampling.Plan,
    drafting: Speculation | None,
    width: int,
) -> DecodeState:
    """Run the tokens that caches do not hold yet, and choose the next token of each row.

    `batch` are the whole rows, `more` the tokens at their ends, run `width` at a time.
    """
    where = (more.tokens_BT, more.lengths_B, batch.lengths_B - more.lengths_B)
    given = (params, layers, caches, decisions, *where, model, mech, width)
    h_BD, caches, decisions = prompt_cache.extend(*given)
    logits_BV = head.logits(params, h_BD)
    text = sampling.begin(batch.tokens_BT, batch.lengths_B, logits_BV, numbers, plan)
    return _open(text, caches, decisions, gate, drafting)


def _open(
    text: sampling.Text,
    caches: tuple[SlotCache, ...],
    decisions: Decisions | None,
    gate: Array | None,
    drafting: Speculation | None,
) -> DecodeState:
    drafts = None
    if drafting is not None:
        assert gate is not None
        drafts = speculate.begin(drafting, gate, text)
    return DecodeState(text, caches, decisions, jnp.zeros((), bool), drafts)


_STATIC = ("model", "plan", "drafting", "width")
jit_fill = jax.jit(fill, static_argnames=("model", "prompt_plan"))
jit_start = jax.jit(start, static_argnames=("model", "plan", "prompt_plan"))
jit_resume = jax.jit(resume, static_argnames=_STATIC, donate_argnames=("caches", "decisions"))
_jit_open = jax.jit(_open, static_argnames="drafting")


def prefill(
    params: Params, rows: Rows, mech: Mechanisms, cfg: Config, mesh: Mesh | None
) -> PromptCache:
    """Run the prompts of rows, and keep what later tokens read of them."""
    width, overrides = int(rows.prompts_B.max()), rows.overrides
    real_BT = np.arange(width)[None] < rows.prompts_B[:, None]
    tokens_BT = np.where(real_BT, rows.batch.tokens_BT[:, :width], 0)
    batch, padded = inputs.pad_batch(inputs.Batch(tokens_BT, rows.prompts_B), cfg.model)
    width = padded.tokens_BT.shape[1]
    if overrides is not None:
        overrides = Overrides(*(array[:, :width] for array in overrides))
    cut, segments = arrange(cfg, padded, padded.lengths_B, overrides, mech)
    placed = on_devices.put_rows((padded, overrides), mesh)
    given = {"model": cfg.model, "prompt_plan": cut}
    _, cache, decisions = jit_fill(params, *placed, mech, segments, **given)
    filled_B = np.asarray(placed[0].lengths_B)
    packed = prompt_cache.open_caches(cfg, cache, decisions, filled_B, 0, width)
    about = (batch.lengths_B, batch.lengths_B, prompt_cache.cache_key(cfg))
    made = PromptCache(batch.tokens_BT, *about, *packed, overrides)
    return made.take(np.arange(len(batch.lengths_B)))


class Fast:
    """Prefill and decode, with room made in caches before the steps that need it."""

    def __init__(self, call: Request) -> None:
        self.call, self.cfg = call, call.cfg
        self.produced = self.limit = 0
        self.state: Any = None  # (Text, KVCache, Decisions) after the prompt, then a DecodeState
        self.static = {"model": self.cfg.model, "plan": call.plan}

    @functools.cached_property
    def weights(self) -> tuple[Params, Any]:
        """Parameters and layers as a step takes them, once a second token is asked for."""
        rest = {name: part for name, part in self.call.params.items() if name != "layers"}
        return rest, cpu.decode_layers(self.call.params, len(self.call.batch.lengths_B))

    @property
    def text(self) -> Any:
        """What was produced so far; None before the first token."""
        state = self.state
        return state.text if isinstance(state, DecodeState) else state and state[0]

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
        """Run the prompts, or what the cache does not hold of them."""
        call = self.call
        self.produced = self.limit = 1
        if call.cache is not None:
            state = self._resume(call.cache)
            self.state = state.replace(text=self._end_copies(state.text))
            return self.state.text
        prompts = (call.padded, call.padded.lengths_B, call.overrides)
        cut, segments = arrange(self.cfg, *prompts, call.mech)
        rows = on_devices.put_rows((call.padded, call.overrides), call.mesh)
        given = (*rows, call.mech, segments, call.numbers)
        text, *rest = jit_start(call.params, *given, **self.static, prompt_plan=cut)
        self.state = (self._end_copies(text), *rest)
        return self.state[0]

    def _end_copies(self, text: sampling.Text) -> sampling.Text:
        """The text, of which rows that a mesh was filled up with take no part in any choice."""
        return on_devices.end_copies(text, len(self.call.batch.lengths_B))

    def _resume(self, cache: PromptCache) -> DecodeState:
        """The state after the tokens that a cache does not hold."""
        call, cfg = self.call, self.cfg
        starts_B, room = cache.lengths, self._room()
        counts_B = call.batch.lengths_B - starts_B
        size = inputs.bucket_size(int(counts_B.max()))
        width = min(size, prompt_cache.WIDEST)
        size = -(-size // width) * width
        rows = zip(call.batch.tokens_BT, starts_B, call.batch.lengths_B, strict=True)
        tokens = [np.pad(row[a:b], (0, size - b + a)) for row, a, b in rows]
        more = inputs.Batch(np.stack(tokens), counts_B)
        padded, more = on_devices.put_rows((call.padded, more), call.mesh)
        cache = cache.take(np.minimum(np.arange(len(more.lengths_B)), len(counts_B) - 1))
        slots = size + self._slots(room)
        held, decided = on_devices.put_beside((cache.caches, cache.decisions), call.params)
        caches = prompt_cache.grow_caches(cfg, held, starts_B, slots, for_all=True)
        positions = (self._positions(), cfg.model.num_layers)
        decisions = prompt_cache.widen_decisions(decided, *positions)
        gate, drafting = speculate.split(cfg.speculate, len(starts_B))
        arrays = (caches, decisions, padded, more, call.mech, call.numbers, gate)
        self.limit = 1 + room
        return jit_resume(*self.weights, *arrays, **self.static, drafting=drafting, width=width)

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

    def _room(self) -> int:
        """New tokens of a row to make room for."""
        left, drafting = self.call.plan.capacity - self.produced, self.cfg.speculate
        if drafting is not None and drafting.exact:  # sums over more slots are rounded otherwise
            return left
        return min(left, GROWTH)

    def _slots(self, room: int) -> int:
        """Slots that they take."""
        return room if self.cfg.speculate is None else room + self.cfg.speculate.length

    def _positions(self) -> int:
        """Positions of all tokens of a row, and more."""
        return self.call.padded.tokens_BT.shape[1] + self.call.plan.capacity

    def make_room(self) -> None:
        """Make room in the caches for the next steps; `limit` is where it ends."""
        state, room = self.state, self._room()
        # A cache was full before its limit: this time, room for every token.
        surprised = {"for_all": 1 < self.produced < self.limit}
        text = state.text if isinstance(state, DecodeState) else state[0]
        asked = (np.asarray(text.pos_B), self._slots(room))
        if isinstance(state, DecodeState):
            old: Any = state.caches
            caches = prompt_cache.grow_caches(self.cfg, old, *asked, **surprised)
            self.state = state.replace(caches=caches, full=jnp.zeros((), bool))
        else:
            text, old, decisions = state
            given = (self.cfg, old, decisions, *asked, self._positions())
            packed = prompt_cache.open_caches(*given, **surprised)
            rows = len(self.call.batch.lengths_B)
            drafting = speculate.split(self.cfg.speculate, rows)
            self.state = _jit_open(text, *packed, *drafting)
        used = {id(leaf) for leaf in jax.tree.leaves(self.state)}  # some may be handed through
        for leaf in jax.tree.leaves(old):
            if id(leaf) not in used:
                leaf.delete()
        self.limit = self.produced + room

    def cache(self, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> PromptCache:
        """The first so many tokens of each row, as a later call continues them.

        It is the engine's last act. More tokens may have run; `tokens_BT` are those of whole rows.
        """
        if not isinstance(self.state, DecodeState):
            self.make_room()
        state, call = self.state, self.call
        pos_B, count = np.asarray(state.text.pos_B), len(lengths_B)
        more_B = np.zeros_like(pos_B)  # only drafts run ahead, and every layer keeps them
        more_B[:count] = pos_B[:count] - lengths_B
        caches = tuple(cache.take_back(jnp.asarray(more_B)[None]) for cache in state.caches)
        given = (call.prompts_B, prompt_cache.cache_key(self.cfg), caches, state.decisions)
        made = PromptCache(tokens_BT, lengths_B, *given, call.overrides)
        return made.take(np.arange(count))


def _goes_on(text: sampling.Text, limit: int) -> bool:
    """`Text.going` of any row, on the host: a stream asks before every step."""
    return bool((~np.asarray(text.done_B) & (np.asarray(text.lengths_B) < limit)).any())
