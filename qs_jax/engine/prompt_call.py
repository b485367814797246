"""What the parts of the prompt engine hand to one another."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine.cache import KVCache
from qs_jax.engine.weights import Weights
from qs_jax.mechanisms import Mechanisms, Rows
from qs_jax.models import Params
from qs_jax.state import NEVER, TokenState


class Plan(NamedTuple):
    """The static part of how a prompt is cut; prompts with equal plans share a program.

    Attributes:
      slots: Token slots of each segment, where `fixed`; else the choices, rising, whole rows last.
        One body is compiled for each.
      fixed: How many tokens compute is known before the call.
      fills: Where fixed: most tokens of a row that stop at the end of each segment, or have bits
        assigned there after they stopped.
      longest: Where not fixed: layers of the longest segment that chooses its slots, or a few more.
      keeps_keys: Stopped tokens may have keys in deeper layers.
      light: Most tokens of a row that run light layers, which are the second segment; its slots
        hold those that run them whole. 0 where no token does.
    """

    slots: tuple[int, ...]
    fixed: bool
    fills: tuple[int, ...] = ()
    longest: int = 0
    keeps_keys: bool = False
    light: int = 0


class Segments(NamedTuple):
    """First and last layer, from 1, of segments up to the last layer but one."""

    first_S: Int[Array, "S"]
    last_S: Int[Array, "S"]


class Call(NamedTuple):
    """What all layers share; see `masked.Call`."""

    params: Params
    model: ModelConfig
    mech: Mechanisms
    plan: Plan
    rows: Rows
    embedded_BTD: Float[Array, "B T D"]
    weights: Weights

    @property
    def decides_inside(self) -> bool:
        """Decisions fall in every layer, not only at the ends of segments."""
        rule = self.mech.halting
        return self.mech.fusion is not None or (rule is not None and rule.rule == "dual")


class Carry(NamedTuple):
    """What segments hand on; drifts and entropies are None where no decision reads them."""

    state: TokenState
    cache: KVCache
    drift_LBT: Float[Array, "L B T"] | None
    entropy_LBT: Float[Array, "L B T"] | None


class Slots(NamedTuple):
    """A segment's tokens.

    Attributes:
      index_BC: Their positions, rising; None for whole rows.
      rows: Their exemptions.
      outside_B: Eligible tokens that have halted and are not among them.
      first: The segment's first layer.
      offset: Index of the first layer of the cache that the segment gets.
      leading: No token stops before it.
    """

    index_BC: Int[Array, "B C"] | None
    rows: Rows
    outside_B: Int[Array, "B"] | None
    first: Any
    offset: Any = 0
    leading: bool = False


def eligible(rows: Rows, state: TokenState) -> Bool[Array, "B T"]:
    """Tokens that halting and fusion may touch."""
    return rows.touched(state) & (state.fused_BT == NEVER)
