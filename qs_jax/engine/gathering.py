"""A segment's tokens: who computes, gathered into few slots, and laid back over all positions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from qs_jax.engine import decisions
from qs_jax.engine import past as pasts
from qs_jax.engine.call import Around, Call, Passive
from qs_jax.halves import from_bits, to_bits
from qs_jax.mechanisms import decide
from qs_jax.state import LayerRecord, TokenState


def computing(call: Call, state: TokenState, first: Array) -> Bool[Array, "B T"]:
    """Tokens that compute from layer `first` on."""
    computing_BT = call.rows.real_BT & ~call.stopped(state)
    if call.plan.halting is not None and call.plan.halting.freeze:
        computing_BT &= first <= state.halt_layer_BT
    return computing_BT


class Index(NamedTuple):
    """Positions a segment gathers, each rising.

    Attributes:
      slots_BC: Tokens that compute; spare slots hold others, which the masks keep still.
      rest_BP: The others, where their keys may be seen; None where they may not.
      inside_BT: Positions in `slots_BC`.
    """

    slots_BC: Array
    rest_BP: Array | None
    inside_BT: Array


def choose(call: Call, state: TokenState, first: Array, slots: int, keeps_keys: bool) -> Index:
    """Which positions take the slots of the segment that begins with layer `first`.

    Args:
      call: Of all positions.
      state: Its carry.
      first: From 1.
      slots: Of each row; enough for those that compute.
      keeps_keys: Keys of the others may be seen.
    """
    computing_BT = computing(call, state, first)
    halted_BT = call.rows.real_BT & ~call.stopped(state) & ~computing_BT
    # Spare slots go to padding and absorbed tokens first: a halted one there would ask for maps.
    order_BT = jnp.argsort(
        jnp.where(computing_BT, 0, 1 + halted_BT.astype(jnp.int32)), axis=1, stable=True
    ).astype(jnp.int32)
    slots_BC = jnp.sort(order_BT[:, :slots], axis=1)
    rest_BP = jnp.sort(order_BT[:, slots:], axis=1) if keeps_keys else None
    rows_B1 = jnp.arange(len(slots_BC))[:, None]
    inside_BT = jnp.zeros(computing_BT.shape, bool).at[rows_B1, slots_BC].set(True)
    return Index(slots_BC, rest_BP, inside_BT)


def _take(array_BT: Array, index_BC: Array) -> Array:
    rows_B1 = jnp.arange(len(index_BC))[:, None]
    at = to_bits(array_BT).at[rows_B1, index_BC]
    return from_bits(at.get(mode="promise_in_bounds", unique_indices=True))


def gather(call: Call, state: TokenState, index: Index, first: Array) -> tuple[Call, TokenState]:
    """The call and the carry of the gathered tokens."""

    def take(array_BT: Array) -> Array:
        return _take(array_BT, index.slots_BC)

    plan, stopped_BT = call.plan, call.stopped(state)
    passive = None
    if index.rest_BP is not None:
        outside = (call.rows, state.h_BTD, state.halt_layer_BT, call.hidden_from(state))
        outside += (state.bits_BT, state.size_BT, state.code_BTR)
        rest_BP = index.rest_BP
        passive = Passive(*jax.tree.map(lambda leaf: _take(leaf, rest_BP), outside))
    waiting_BT = decide.eligible(call.rows, stopped_BT) & (first > state.halt_layer_BT)
    previous_BTD = context_BXD = None
    weighs = plan.fusion is not None and plan.fusion.alpha == "probability" and call.fuses
    maps = call.params["kv_maps"].features if plan.policy == "extrapolate" else ()
    if weighs or "previous" in maps:
        previous_BTD = take(jnp.roll(state.h_BTD, 1, axis=1))
    if call.fuses:
        assert plan.fusion is not None
        if call.context_BXD is not None:
            own_BTD = take(call.context_BXD[:, plan.fusion.window :])
            context_BXD = jnp.pad(own_BTD, ((0, 0), (plan.fusion.window, 0), (0, 0)))
    around = Around(
        passive=passive,
        halted_B=(waiting_BT & ~index.inside_BT).sum(1, dtype=jnp.int32),
        previous_BTD=previous_BTD,
        slot_of_BT=jnp.cumsum(index.inside_BT, axis=1, dtype=jnp.int32) - 1,
    )
    inner = call._replace(
        rows=jax.tree.map(take, call.rows),
        embedded_BTD=take(call.embedded_BTD),
        context_BXD=context_BXD,
        around=around,
    )
    received = state.received_BTS
    if received is not None:
        assert index.rest_BP is not None
        keys_BS = jnp.concatenate([index.rest_BP, index.slots_BC], axis=1)
        received = jnp.take_along_axis(take(received), keys_BS[:, None, :], axis=2)
    small = jax.tree.map(take, state.replace(received_BTS=None, taken_BW=None))
    return inner, small.replace(received_BTS=received, taken_BW=state.taken_BW)


def scatter(
    call: Call, old: TokenState, new: TokenState, index: Index, first: Array, last: Array
) -> TokenState:
    """The carry over all positions: what was gathered comes back changed by layers first..last."""
    rows_B1 = jnp.arange(len(index.slots_BC))[:, None]

    def put(old_BT: Array, new_BC: Array) -> Array:
        at = to_bits(old_BT).at[rows_B1, index.slots_BC]
        return from_bits(at.set(to_bits(new_BC), mode="promise_in_bounds", unique_indices=True))

    bare = {"received_BTS": None, "taken_BW": None}
    state = jax.tree.map(put, old.replace(**bare), new.replace(**bare))
    received = old.received_BTS
    if received is not None:
        assert index.rest_BP is not None
        assert new.received_BTS is not None
        keys_BS = jnp.concatenate([index.rest_BP, index.slots_BC], axis=1)
        back_BS = jnp.argsort(keys_BS, axis=1)
        found_BCS = jnp.take_along_axis(new.received_BTS, back_BS[:, None, :], axis=2)
        # A running maximum: positions in between repeat the last gathered query before them.
        before_BT = jnp.cumsum(index.inside_BT, axis=1) - 1
        found_BTS = jnp.take_along_axis(found_BCS, jnp.maximum(before_BT, 0)[..., None], axis=1)
        last_BS = state.halt_layer_BT + call.numbers.delay
        settled_BS = (last_BS >= first) & (last_BS <= last)
        settled_BTS = settled_BS[:, None, :] & (before_BT >= 0)[..., None]
        received = jnp.where(settled_BTS, found_BTS, received)
    return state.replace(received_BTS=received, taken_BW=new.taken_BW)


class Put(NamedTuple):
    """Lays a layer's evidence over all positions.

    Attributes:
      before: The carry at the start of the segment, for tokens that take no part.
      index: Positions of those that do; None for all.
      call: The call.
    """

    before: TokenState
    index: Index | None
    call: Call

    def record(self, record: LayerRecord) -> LayerRecord:
        """A layer's record over all positions."""
        if self.index is None:
            return record
        slots_BC, rest_BP = self.index.slots_BC, self.index.rest_BP
        rows_B1 = jnp.arange(len(slots_BC))[:, None]
        outside = 0 if rest_BP is None else rest_BP.shape[1]
        base = decisions.blank_record(self.call, self.before)
        written_BT = base.written_BT
        if rest_BP is not None:
            written_BT = written_BT.at[rows_B1, rest_BP].set(record.written_BT[:, :outside])
        base = base.replace(written_BT=written_BT)
        own = record.replace(written_BT=record.written_BT[:, outside:])
        return jax.tree.map(lambda old, new: old.at[rows_B1, slots_BC].set(new), base, own)

    def kept(self, kept: pasts.Kept | None) -> pasts.Kept | None:
        """What a layer leaves for later tokens, over all positions."""
        if kept is None or kept.size_BT is None or self.index is None:
            return kept
        rows_B1 = jnp.arange(len(self.index.slots_BC))[:, None]
        size_BT = self.before.size_BT.at[rows_B1, self.index.slots_BC].set(kept.size_BT)
        return kept._replace(size_BT=size_BT)
