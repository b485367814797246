"""Token generation: a prompt, then a loop over tokens, on the fast engines or on the masked one.

The fast engines run prefill, packing and the loop as separate programs. The masked engine scores
the row so far for every new token: slow, and what the others are tested against. `stream` runs the
same pieces, one call a token.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import decode, inputs, prompt, sampling
from qs_jax.engine.cache import KVCache, SlotCache, bucket, cache_bytes
from qs_jax.engine.decode import DecodeState
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.prompt_call import Plan, Segments
from qs_jax.engine.prompt_plan import arrange, runs_fast
from qs_jax.engine.score import run_masked
from qs_jax.engine.weights import check_finite, prepare_params
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import Mechanisms, Overrides, resolve
from qs_jax.models import Params, cpu, head
from qs_jax.record import Record, decided, written_keys
from qs_jax.state import FULL_BITS, NEVER, Decisions, evidence


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns; B rows, M = max_new_tokens columns.

    Attributes:
      tokens: int32 `[B, M]`, the new tokens only, the end token included; padding after it.
      lengths: int32 `[B]`, new tokens of each row.
      logprobs: float32 `[B, M]`, log-probability of each new token as the model ran, before
        temperature, filters and penalties, in nats; 0 in the padding.
      prompt_tokens: int32 `[B, T]`, the right-padded prompts.
      prompt_lengths: int32 `[B]`.
      record: What the mechanisms did to every token that was run: the prompt and all new tokens but
        the last of each row. None for the dense model.
      kv_bytes: Bytes the KV cache took at the end of the call, which is its largest size. The
        prompt's own full cache, which the decode engine packs and frees after prefill, is not in
        it.
    """

    tokens: Int[np.ndarray, "B M"]
    lengths: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B M"]
    prompt_tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    record: Record | None = None
    kv_bytes: int = 0

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and continuation of each row, without padding."""
        return [
            self.prompt_tokens[row, : self.prompt_lengths[row]].tolist()
            + self.tokens[row, : self.lengths[row]].tolist()
            for row in range(len(self.tokens))
        ]


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """One token a row.

    Attributes:
      tokens: int32 `[B]`; the pad id for rows that had ended before.
      logprobs: float32 `[B]`, as in `GenerateOutput`.
      is_new: bool `[B]`, the row produced a token in this step.
      done: bool `[B]`, the row has ended.
    """

    tokens: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B"]
    is_new: Bool[np.ndarray, "B"]
    done: Bool[np.ndarray, "B"]


class _Call(NamedTuple):
    """A call, ready to run; `padded` holds the prompts padded to their bucket."""

    params: Params
    batch: inputs.Batch
    padded: inputs.Batch
    overrides: Overrides | None
    mech: Mechanisms
    numbers: sampling.Numbers
    plan: sampling.Plan
    cfg: Config


def _prepare(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    lengths: Any,
    attention_mask: Any,
    overrides: TokenOverrides | None,
) -> _Masked | _Fast:
    model, mech = cfg.model, resolve(cfg.quicksilver, cfg.model, cfg.effective_protocol)
    params = prepare_params(params, model, mech)
    given = {"lengths": lengths, "attention_mask": attention_mask}
    batch, padded = inputs.prepare_batch(tokens, model, new_tokens=cfg.max_new_tokens, **given)
    shape, width = padded.tokens_BT.shape, batch.tokens_BT.shape[1]
    chosen = inputs.override_arrays(overrides, shape, width, cfg)
    plan, numbers = sampling.plan_of(cfg, inputs.bucket_size(cfg.max_new_tokens))
    call = _Call(params, batch, padded, chosen, mech, numbers, plan, cfg)
    return _Fast(call) if runs_fast(cfg, generates=True) else _Masked(call)


@default_settings()
def generate(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
) -> GenerateOutput:
    """Continue every row until an end token or `cfg.max_new_tokens`.

    A row's result depends neither on padding nor on the other rows.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and their protocol, budget and sampling.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      overrides: Of single tokens of the prompts, whatever their signals.

    Returns:
      The new tokens, their count and log-probabilities, and the record of the mechanisms.

    Raises:
      ConfigError: The parameters are another model's, or the maps a policy needs are missing.
      InputError: Tokens cannot be used, or prompt + budget exceed the position limit.
      NonFiniteError: The model produced NaN or infinite logits.
    """
    engine = _prepare(params, tokens, cfg, lengths, attention_mask, overrides)
    text, found = jax.device_get(engine.finish())
    check_finite(text.finite_B)
    call, record = engine.call, None
    if found is not None:
        ran_B = call.batch.lengths_B + np.maximum(text.lengths_B - 1, 0)
        if isinstance(found, Decisions):
            assert cfg.quicksilver is not None
            found = decided(found, cfg.quicksilver, cfg.model.num_layers, ran_B)
        counted = (int(ran_B.max()), ran_B, call.batch.lengths_B, cfg.effective_protocol)
        told = {"simulated": isinstance(engine, _Masked), "quicksilver": cfg.quicksilver}
        record = Record.of(found, *counted, **told)
    return GenerateOutput(
        tokens=text.tokens_BM[:, : cfg.max_new_tokens],
        lengths=text.lengths_B,
        logprobs=text.logprobs_BM[:, : cfg.max_new_tokens],
        prompt_tokens=call.batch.tokens_BT,
        prompt_lengths=call.batch.lengths_B,
        record=record,
        kv_bytes=engine.kv_bytes,
    )


@default_settings()
def stream(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
) -> Iterator[StreamStep]:
    """`generate`, one token a row at a time: same arguments, same tokens.

    Input is checked by the call itself, before the first step is asked for.

    Returns:
      An iterator that ends when every row has ended or the budget is used up.

    Raises:
      InputError: As `generate`.
      NonFiniteError: As `generate`, while iterating.
    """
    return _steps(_prepare(params, tokens, cfg, lengths, attention_mask, overrides))


def _steps(engine: _Masked | _Fast) -> Iterator[StreamStep]:
    ended = np.zeros(len(engine.call.batch.lengths_B), bool)
    for step in range(engine.call.cfg.max_new_tokens):
        with default_settings():  # not around the yield, where the caller's code runs
            text = engine.advance()
            token, logprob, done, finite = jax.device_get(
                (text.last_B, _column(text.logprobs_BM, step), text.done_B, text.finite_B)
            )
        check_finite(finite)
        yield StreamStep(tokens=token, logprobs=logprob, is_new=~ended, done=done)
        ended = done
        if done.all():
            return


@jax.jit
def _column(array_BM: Array, step: Array) -> Array:
    return lax.dynamic_index_in_dim(array_BM, step, axis=1, keepdims=False)


# --- by the definition --------------------------------------------------------------------------


class _Masked:
    """Generation by scoring the rows so far."""

    kv_bytes = 0  # it keeps no cache

    def __init__(self, call: _Call) -> None:
        self.call, more = call, call.plan.capacity

        def widen(array: Any, value: Any) -> Any:
            return np.pad(array, ((0, 0), (0, more)), constant_values=value)

        self.tokens, self.overrides = widen(call.padded.tokens_BT, 0), None
        if call.overrides is not None:
            self.overrides = Overrides(*map(widen, call.overrides, (False, NEVER, False)))
        self.text: Any = None
        self.evidence: Any = None

    def advance(self) -> sampling.Text:
        """One more token a row."""
        call = self.call
        given = (self.tokens, call.batch.lengths_B, self.overrides, self.text)
        arrays = (call.params, *given, call.mech, call.numbers)
        out = _rescore(*arrays, model=call.cfg.model, plan=call.plan)
        self.tokens, self.text, self.evidence = out
        return self.text

    def finish(self) -> tuple[sampling.Text, Any]:
        """All tokens, and the evidence of their record."""
        for _ in range(self.call.cfg.max_new_tokens):
            if np.asarray(self.advance().done_B).all():
                break
        return self.text, self.evidence


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def _rescore(
    params: Params,
    tokens_BS: Array,
    prompt_lengths_B: Array,
    overrides: Overrides | None,
    text: sampling.Text | None,
    mech: Mechanisms,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
):
    """Append each live row's last token, run the rows, and choose the next tokens."""
    rows_B = jnp.arange(len(tokens_BS))
    tokens_BS, lengths_B = jnp.asarray(tokens_BS), jnp.asarray(prompt_lengths_B)
    if text is not None:
        at_B = jnp.where(text.done_B, NEVER, text.pos_B)
        tokens_BS = tokens_BS.at[rows_B, at_B].set(text.last_B, mode="drop")
        text = text.replace(pos_B=text.pos_B + ~text.done_B)
        lengths_B = text.pos_B
    batch = inputs.Batch(tokens_BS, lengths_B)
    rows = inputs.whole_rows(batch, prompt_lengths_B, overrides, mech)
    h_BTD, state, record = run_masked(params, rows, model, mech)
    logits_BV = head.logits(params, h_BTD[rows_B, lengths_B - 1])
    if text is None:
        text = sampling.begin(tokens_BS, lengths_B, logits_BV, numbers, plan)
    else:
        text = sampling.emit(text, logits_BV, numbers, plan)
    return tokens_BS, text, evidence(state, record)


# --- on the fast engines ------------------------------------------------------------------------

# Most new tokens a cache has room for before it grows.
GROWTH = 256
# Segments into which stacked layers are cut where tokens may leave at any of them.
STACKED_SEGMENTS = 6
# Room for new tokens, over the share that the prompt has.
MARGIN = 1.25


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


class _Fast:
    """Prefill and decode, with room made in caches before the steps that need it."""

    def __init__(self, call: _Call) -> None:
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
    def kv_bytes(self) -> int:
        """Bytes of the caches; of the prompt's cache where only one token was generated."""
        state = self.state
        return cache_bytes(state.caches if isinstance(state, DecodeState) else state[1])

    def begin(self) -> sampling.Text:
        """Run the prompts."""
        call = self.call
        prompts = (call.padded, call.padded.lengths_B, call.overrides)
        cut, segments = arrange(self.cfg, *prompts, call.mech)
        given = (call.padded, call.overrides, call.mech, segments, call.numbers)
        self.state = jit_start(self.call.params, *given, **self.static, prompt_plan=cut)
        self.produced = self.limit = 1
        return self.state[0]

    def advance(self) -> sampling.Text:
        """One more token a row."""
        if self.produced == 0:
            return self.begin()
        if self.produced == self.limit or bool(self.state.full):
            self.make_room()
        given = (*self.weights, self.state, self.call.mech, self.call.numbers)
        self.state = decode.jit_advance(*given, **self.static)
        self.produced += 1
        return self.state.text

    def finish(self) -> tuple[sampling.Text, Decisions | None]:
        """All tokens, and the decisions."""
        text, budget = self.begin(), self.cfg.max_new_tokens
        while self.produced < budget and not np.asarray(text.done_B).all():
            self.make_room()
            limit = jnp.int32(min(self.limit, budget))
            given = (*self.weights, self.state, limit, self.call.mech, self.call.numbers)
            self.state = decode.jit_run_until(*given, **self.static)
            text = self.state.text
            self.produced = int(text.step)
        if self.call.mech.is_off:
            return text, None
        state = self.state
        return text, state.decisions if isinstance(state, DecodeState) else state[2]

    def make_room(self) -> None:
        """Make room in the caches for the next steps; `limit` is where it ends."""
        call, state = self.call, self.state
        # A cache was full before its limit: this time, room for every token.
        surprised = 1 < self.produced < self.limit
        room = min(call.plan.capacity - self.produced, GROWTH)
        text = state.text if isinstance(state, DecodeState) else state[0]
        longest = int(np.asarray(text.pos_B).max())
        if isinstance(state, DecodeState):
            old: Any = state.caches
            fills = jax.device_get([cache.fill_lB for cache in old])
            sizes = [_capacity(self.cfg, int(f.max()), longest, room, surprised) for f in fills]
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
                size = _capacity(self.cfg, most, longest, room, surprised)
                layout.append((start, end, size, start >= coded, keeps_all))
            width = old.k_LBSKH.shape[2] + call.plan.capacity
            noted = None if call.mech.is_off else decisions
            self.state = _pack(text, old, noted, held_LBS, decisions.bits_BT, tuple(layout), width)
        used = {id(leaf) for leaf in jax.tree.leaves(self.state)}  # some may be handed through
        for leaf in jax.tree.leaves(old):
            if id(leaf) not in used:
                leaf.delete()
        self.limit = self.produced + room


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


@functools.partial(jax.jit, static_argnames=("layout", "width"))
def _pack(
    text: sampling.Text,
    cache: KVCache,
    decisions: Decisions | None,
    held_LBS: Array,
    bits_BS: Array,
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
    return DecodeState(text, tuple(caches), decisions, jnp.zeros((), bool))


@functools.partial(jax.jit, static_argnames=("capacities",))
def _grow(state: DecodeState, capacities: tuple[int, ...]) -> DecodeState:
    pairs = zip(state.caches, capacities, strict=True)
    caches = tuple(cache.grow(size) for cache, size in pairs)
    return state.replace(caches=caches, full=jnp.zeros((), bool))
