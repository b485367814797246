"""What all layers of one call of the masked engine share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.mechanisms import decide
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.models import Params
from qs_jax.state import Past, TokenState


class Passive(NamedTuple):
    """Tokens that run no more, but whose keys later queries may see: P of each row.

    Attributes:
      rows: Tokens and their exemptions.
      h_BPD: Frozen states.
      halt_layer_BP: Layers they ran.
      hidden_from_BP: Position from which queries have lost them.
      bits_BP: Bits of their keys and values.
      size_BP: Tokens they stand for.
      code_BPR: What extrapolation maps read of them; None under other policies.
    """

    rows: decide.Rows
    h_BPD: Float[Array, "B P D"]
    halt_layer_BP: Int[Array, "B P"]
    hidden_from_BP: Int[Array, "B P"]
    bits_BP: Int[Array, "B P"]
    size_BP: Float[Array, "B P"]
    code_BPR: Float[Array, "B P R"] | None


class Around(NamedTuple):
    """What surrounds the tokens a segment gathered (compact engine).

    Attributes:
      passive: Tokens outside whose keys may be needed; None where no policy keeps any.
      halted_B: Eligible tokens outside that have halted; a quota counts them.
      previous_BTD: State of the token just before each gathered one, as the segment found it.
      slot_of_BT: Slot of each position; meaningless where it was not gathered.
    """

    passive: Passive | None
    halted_B: Int[Array, "B"]
    previous_BTD: Float[Array, "B C D"] | None
    slot_of_BT: Int[Array, "B T"]


class Call(NamedTuple):
    """Constants of the scan over layers.

    Attributes:
      params: Stacked tree.
      model: Architecture.
      plan: Static half of the configuration.
      numbers: Traced half.
      rows: Tokens and their exemptions.
      embedded_BTD: Input embeddings.
      past: Of the tokens before; None at the start of a row.
      keeps: Later tokens will follow: what they need must be exact.
      context_BXD: Contexts of the W tokens before and of the call's; None without the filter.
      lengths_B: Tokens of each row; only gathered tokens need it.
      prompt_lengths_B: Tokens of each row's prompt; only planned capacities read it.
      lean: Nothing dear is computed that no decision reads: attention weights and entropies only
        where a decision falls, drifts recorded only there and only under rules that read them
        (compact engine).
      layers_before: Layers before the cache's first, where it holds a segment's only.
      around: The tokens are a segment's gathered ones; None for whole rows.
    """

    params: Params
    model: ModelConfig
    plan: Plan
    numbers: Numbers
    rows: decide.Rows
    embedded_BTD: Float[Array, "B T D"]
    past: Past | None
    keeps: bool
    context_BXD: Float[Array, "B X D"] | None
    lengths_B: Int[Array, "B"] | None = None
    prompt_lengths_B: Int[Array, "B"] | None = None
    lean: bool = False
    layers_before: Any = 0
    around: Around | None = None

    @property
    def decides(self) -> bool:
        """Tokens of this call may be touched; new ones are not under "continuation"."""
        return not (self.plan.continuation and self.past is not None)

    @property
    def groups_maps(self) -> bool:
        """Extrapolation takes the wanted tokens only; the masked engine takes all, plainly."""
        return self.lean or (self.past is not None and isinstance(self.past.cache, tuple))

    @property
    def quantizes(self) -> bool:
        """Tokens of this call have bits; in int8 also those that no mechanism may touch."""
        return self.plan.amq is not None and (self.decides or self.plan.narrow)

    @property
    def by_places(self) -> bool:
        """Positions say who sees a key: from its own on, and until one that absorbed it.

        Not where a key comes back for some queries, or where tokens without one go on computing.
        """
        frozen = self.plan.halting is None or self.plan.halting.freeze
        return self.plan.policy != "attended" and frozen

    @property
    def fuses(self) -> bool:
        """Fusion may happen."""
        return self.plan.fusion is not None and self.decides

    def stopped(self, state: TokenState) -> Array:
        """Absorbed tokens that are no longer computed, `[B, T]`."""
        absorbed_BT = state.hidden_from_BT != NEVER
        return absorbed_BT if self.plan.continuation else jnp.zeros_like(absorbed_BT)

    def hidden_from(self, state: TokenState) -> Array:
        """Position from which queries have lost each token, `[B, T]`.

        Under "continuation" an absorbed token is not computed, so nobody sees it.
        """
        stopped_BT = self.stopped(state)
        return jnp.where(stopped_BT, 0, state.hidden_from_BT)
