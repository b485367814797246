"""The decode engine: one loop over new tokens, with or without drafts, around `step`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from qs_jax.config import ModelConfig
from qs_jax.engine import sampling, speculate
from qs_jax.engine.cache import SlotCache
from qs_jax.engine.speculate import Drafts
from qs_jax.engine.step import note, step, take_back
from qs_jax.mechanisms import Mechanisms
from qs_jax.models import Params, head
from qs_jax.state import Decisions


@no_type_check
class DecodeState(flax.struct.PyTreeNode):
    """The carry of the loop.

    Attributes:
      text: What was produced so far.
      caches: Of each segment.
      decisions: Of every token that ran, over S positions; None without mechanisms.
      full: Some cache has no slot left for a live row's next step.
      drafts: What is verified next; None where tokens run one by one.
    """

    text: sampling.Text
    caches: tuple[SlotCache, ...]
    decisions: Decisions | None
    full: Bool[Array, ""]
    drafts: Drafts | None

    @property
    def width(self) -> int:
        """Most tokens of a row in a step."""
        return 1 if self.drafts is None else 1 + self.drafts.length


def advance(
    params: Params,
    layers: Any,
    state: DecodeState,
    limit: Int[Array, ""],
    mech: Mechanisms,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
) -> DecodeState:
    """One step: each row's last token, and where it pays a draft, through the model.

    Rows with `limit` tokens wait.
    """

    def of(width: int) -> Callable[[DecodeState], DecodeState]:
        given = (limit, mech, numbers, model, plan, width)
        return lambda state: _advance(params, layers, state, *given)

    if state.drafts is None or state.drafts.exact:
        return of(state.width)(state)
    # Loops of one step or none: a branch would copy the caches that it writes.
    wide = state.drafts.wide.astype(jnp.int32)
    for times, width in ((wide, state.width), (1 - wide, 1)):
        step = of(width)
        state = lax.fori_loop(0, times, lambda _, state, step=step: step(state), state)
    return state


def _advance(
    params: Params,
    layers: Any,
    state: DecodeState,
    limit: Array,
    mech: Mechanisms,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
    width: int,
) -> DecodeState:
    """A step of `width` tokens: each row keeps the first and what it would have chosen itself."""
    text, decisions, drafts = state.text, state.decisions, state.drafts
    live_B = text.going(limit)
    tokens_BT = text.last_B[:, None]
    if width > 1:
        assert drafts is not None
        tokens_BT = jnp.concatenate([tokens_BT, drafts.draft_BK], axis=1)
    given = (tokens_BT, text.pos_B, jnp.where(live_B, width, 0), state.caches, model, mech)
    ran = step(params, layers, *given, exact=drafts is not None and drafts.exact)
    logits_BTV = head.logits(params, ran.h_BTD)
    after = _choose(text, logits_BTV, tokens_BT, live_B, limit, numbers, plan)
    kept_B, caches = after.lengths_B - text.lengths_B, ran.caches
    if width > 1:
        caches = take_back(caches, ran.keeps, kept_B)
    if decisions is not None:
        decisions = note(decisions, ran, kept_B)
    if drafts is not None:
        drafts = speculate.learn(drafts, text, after, live_B, width)
    live_B = ~after.done_B
    full = [cache.is_full(live_B, state.width) for cache in caches]
    full = functools.reduce(jnp.logical_or, full)
    return DecodeState(after, caches, decisions, full, drafts)


def _choose(
    text: sampling.Text,
    logits_BTV: Array,
    tokens_BT: Array,
    live_B: Array,
    limit: Array,
    numbers: sampling.Numbers,
    plan: sampling.Plan,
) -> sampling.Text:
    """Each row's next tokens: up to the first that is not the draft's, the row's end or `limit`."""
    width = tokens_BT.shape[1]
    if width == 1:
        return sampling.emit(text, logits_BTV[:, 0], live_B, numbers, plan)

    def goes_on(loop: tuple[Array, sampling.Text, Array]) -> Array:
        return (loop[0] < width) & loop[2].any()

    def choose(loop: tuple[Array, sampling.Text, Array]):
        at, text, live_B = loop
        logits_BV = lax.dynamic_index_in_dim(logits_BTV, at, axis=1, keepdims=False)
        text = sampling.emit(text, logits_BV, live_B, numbers, plan)
        drafted_B = tokens_BT[:, jnp.minimum(at + 1, width - 1)]
        live_B &= (text.last_B == drafted_B) & text.going(limit)
        return at + 1, text, live_B

    return lax.while_loop(goes_on, choose, (jnp.int32(0), text, live_B))[1]


def run_until(
    params: Params,
    layers: Any,
    state: DecodeState,
    limit: Int[Array, ""],
    mech: Mechanisms,
    numbers: sampling.Numbers,
    model: ModelConfig,
    plan: sampling.Plan,
) -> DecodeState:
    """Steps until every row has ended or has `limit` tokens, or a cache is full."""

    def unfinished(state: DecodeState) -> Array:
        return state.text.going(limit).any() & ~state.full

    def body(state: DecodeState) -> DecodeState:
        return advance(params, layers, state, limit, mech, numbers, model, plan)

    return lax.while_loop(unfinished, body, state)


_STATIC = ("model", "plan")
jit_advance = jax.jit(advance, static_argnames=_STATIC, donate_argnames=("state",))
jit_run_until = jax.jit(run_until, static_argnames=_STATIC, donate_argnames=("state",))
