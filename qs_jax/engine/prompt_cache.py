"""Caches of rows that were run: how they are laid out and grow, and how more tokens follow."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.engine.cache import KVCache, SlotCache, bucket, cache_bytes
from qs_jax.engine.step import note, step
from qs_jax.errors import ConfigError, InputError
from qs_jax.mechanisms import Mechanisms, Overrides
from qs_jax.models import Params
from qs_jax.record import written_keys
from qs_jax.state import FULL_BITS, NEVER, Decisions

# Segments into which stacked layers are cut where tokens may leave at any of them.
STACKED_SEGMENTS = 6
# Room for new tokens, over the share that the prompt has.
MARGIN = 1.25
# Most tokens of a row that are appended at a time where many are known.
WIDEST = 64


@dataclasses.dataclass(frozen=True)
class PromptCache:
    """Rows that were run, which a later call continues with more tokens, any number of times.

    Attributes:
      tokens: int32 `[B, T]`, right-padded.
      lengths: int32 `[B]`, tokens of each row.
      prompt_lengths: int32 `[B]`, those that the mechanisms act on under "continuation".
      key: Model, mechanisms and protocol; others cannot continue it.
      caches: Keys and values of each segment of layers; None on the masked engine, which runs rows
        anew for every token.
      decisions: About every token; None without mechanisms, and on the masked engine.
      overrides: Of single tokens.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    prompt_lengths: Int[np.ndarray, "B"]
    key: tuple[ModelConfig, QuickSilverConfig | None, str]
    caches: tuple[SlotCache, ...] | None
    decisions: Decisions | None
    overrides: Overrides | None

    @property
    def kv_bytes(self) -> int:
        """Bytes of its keys and values, with the room for more."""
        return cache_bytes(self.caches)

    def check(self, cfg: Config) -> None:
        """Raise ConfigError unless a call under `cfg` can continue it."""
        asked = cache_key(cfg)
        for name, cached, given in zip(
            ("model", "quicksilver", "protocol"), self.key, asked, strict=True
        ):
            if cached != given:
                raise ConfigError(
                    f"the cache was made with another {name}: pass prefill and generate the same "
                    "model, mechanisms and protocol."
                )
        self.key[0].check_weights(asked[0].weights, "the cache was made for", "run prefill")

    def rows(self, count: int, repeats: int) -> PromptCache:
        """One row for each of `count` requests, `repeats` times; a single row serves them all."""
        if len(self.lengths) not in (1, count):
            raise InputError(f"the cache has {len(self.lengths)} rows, the call {count}.")
        each = np.arange(count) if len(self.lengths) == count else np.zeros(count, np.int64)
        index, overrides = np.repeat(each, repeats), self.overrides
        names = ("tokens", "lengths", "prompt_lengths")
        host: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        if overrides is not None:
            host["overrides"] = Overrides(*(array[index] for array in overrides))
        return dataclasses.replace(self, **host).take(index)

    def take(self, index_R: np.ndarray) -> PromptCache:
        """Select rows of the arrays on the device; those on the host stay as they are."""
        if self.caches is None:
            return self
        if np.array_equal(index_R, np.arange(self.caches[0].fill_lB.shape[1])):
            return self
        decisions = jax.tree.map(lambda leaf: leaf[..., index_R, :], self.decisions)
        caches = tuple(cache.rows(index_R) for cache in self.caches)
        return dataclasses.replace(self, caches=caches, decisions=decisions)


def cache_key(cfg: Config) -> tuple[ModelConfig, QuickSilverConfig | None, str]:
    """What decides about the contents of a cache."""
    off = cfg.quicksilver is None or cfg.quicksilver.is_off
    return cfg.model, None if off else cfg.quicksilver, "" if off else cfg.effective_protocol


# --- layout -------------------------------------------------------------------------------------


def open_caches(
    cfg: Config,
    prompt: KVCache,
    decisions: Decisions,
    lengths_B: np.ndarray,
    room: int,
    width: int,
    *,
    for_all: bool = False,
) -> tuple[tuple[SlotCache, ...], Decisions | None]:
    """Caches of decoding from a prompt's, with room for more tokens.

    Args:
      cfg: Call.
      prompt: Keys and values of whole rows.
      decisions: About their tokens.
      lengths_B: Tokens of each row.
      room: Further tokens of a row.
      width: Positions that the decisions get; None is returned without mechanisms.
      for_all: Room for every one of them, whatever share of the prompt's keys is kept.
    """
    qs, layers = cfg.quicksilver, cfg.model.num_layers
    held_LBS = written_keys(decisions, qs, layers, lengths_B)
    most_L, longest = held_LBS.sum(2).max(1), int(lengths_B.max())
    layout, coded, keeps_all = [], _coded_after(cfg), _keeps_all(cfg)
    for start, end in itertools.pairwise(_edges(cfg)):
        size = _capacity(cfg, int(most_L[start:end].max()), longest, room, for_all)
        layout.append((start, end, size, start >= coded, keeps_all))
    off = qs is None or qs.is_off
    slides = cfg.model.sliding_window is not None
    noted = None if off else decisions
    return _pack(prompt, noted, held_LBS, decisions.bits_BT, tuple(layout), width, slides)


def grow_caches(
    cfg: Config,
    caches: tuple[SlotCache, ...],
    lengths_B: np.ndarray,
    room: int,
    *,
    for_all: bool = False,
) -> tuple[SlotCache, ...]:
    """Copies of caches with room for more tokens."""
    fills, longest = jax.device_get([cache.fill_lB for cache in caches]), int(lengths_B.max())
    sizes = [_capacity(cfg, int(fill.max()), longest, room, for_all) for fill in fills]
    sizes = [max(cache.capacity, size) for cache, size in zip(caches, sizes, strict=True)]
    return _grow(caches, tuple(sizes))


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


@functools.partial(jax.jit, static_argnames=("layout", "width", "slides"))
def _pack(
    prompt: KVCache,
    decisions: Decisions | None,
    held_LBS: Bool[Array, "L B S"],
    bits_BS: Array,
    layout: tuple[tuple[int, int, int, bool, bool], ...],
    width: int,
    slides: bool,
) -> tuple[tuple[SlotCache, ...], Decisions | None]:
    """Caches of decoding from a prompt's, and decisions over `width` positions.

    `layout` is, for each segment: its first layer, the one after its last, slots, whether it holds
    int8 codes, and whether it keeps every token.
    """
    caches = []
    for first, end, capacity, coded, keeps_all in layout:
        span = slice(first, end)
        bits = jnp.broadcast_to(bits_BS, held_LBS[span].shape) if coded else None
        packed = (prompt, span, held_LBS[span], capacity, bits, keeps_all, slides)
        caches.append(SlotCache.pack(*packed))
    return tuple(caches), widen_decisions(decisions, width, layers=len(held_LBS))


@functools.partial(jax.jit, static_argnames="capacities")
def _grow(caches: tuple[SlotCache, ...], capacities: tuple[int, ...]) -> tuple[SlotCache, ...]:
    pairs = zip(caches, capacities, strict=True)
    return jax.tree.map(jnp.copy, tuple(cache.grow(size) for cache, size in pairs))


@functools.partial(jax.jit, static_argnames=("width", "layers"))
def widen_decisions(decisions: Decisions | None, width: int, layers: int) -> Decisions | None:
    """Copies of decisions, over more positions about which nothing was decided."""
    if decisions is None:
        return None

    def widen(array: Any, empty: Any) -> Any:
        if array is None:
            return None
        more = max(width - array.shape[-1], 0)
        widths = [(0, 0)] * (array.ndim - 1) + [(0, more)]
        return jnp.copy(jnp.pad(array, widths, constant_values=empty))

    empty = {"depth_BT": layers, "fused_BT": NEVER, "fused_after_BT": NEVER, "bits_BT": FULL_BITS}
    empty |= {"retain_BT": False, "drift_LBT": jnp.nan, "entropy_LBT": jnp.nan}
    return Decisions(**{name: widen(getattr(decisions, name), x) for name, x in empty.items()})


# --- more tokens --------------------------------------------------------------------------------


def extend(
    params: Params,
    layers: Any,
    caches: tuple[SlotCache, ...],
    decisions: Decisions | None,
    tokens_BM: Int[Array, "B M"],
    counts_B: Int[Array, "B"],
    start_B: Int[Array, "B"],
    model: ModelConfig,
    mech: Mechanisms,
    width: int,
) -> tuple[Float[Array, "B D"], tuple[SlotCache, ...], Decisions | None]:
    """Run known tokens after those in the caches, `width` of each row at a time.

    Args:
      params: All arrays but the layers'.
      layers: From `cpu.decode_layers`.
      caches: With room for them.
      decisions: About the tokens before, with positions for them; None without mechanisms.
      tokens_BM: Right-padded; M is a multiple of the width.
      counts_B: Tokens of each row, at least one.
      start_B: Position of the first.
      model: Architecture.
      mech: Mechanisms.
      width: Tokens at a time.

    Returns:
      The normed state of each row's last token, the caches and the decisions.
    """
    rows_B = jnp.arange(len(counts_B))

    def some(part: Array, carry: Any) -> Any:
        caches, decisions, last_BD = carry
        tokens_BT = lax.dynamic_slice_in_dim(tokens_BM, part * width, width, axis=1)
        held_B = jnp.clip(counts_B - part * width, 0, width)
        given = (tokens_BT, start_B + part * width, held_B, caches, model, mech)
        ran = step(params, layers, *given)
        if decisions is not None:
            decisions = note(decisions, ran, held_B)
        here_B = (counts_B - 1) // width == part
        found_BD = ran.h_BTD[rows_B, (counts_B - 1) % width]
        return ran.caches, decisions, jnp.where(here_B[:, None], found_BD, last_BD)

    empty_BD = jnp.zeros((len(counts_B), model.hidden_size), model.dtype)
    parts = -(-counts_B.max() // width)
    caches, decisions, last_BD = lax.fori_loop(0, parts, some, (caches, decisions, empty_BD))
    return last_BD, caches, decisions
