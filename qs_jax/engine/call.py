"""What all layers of one call of the masked engine share."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.config import ModelConfig
from qs_jax.mechanisms import decide
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.models import Params
from qs_jax.state import Past, TokenState


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

    @property
    def decides(self) -> bool:
        """Tokens of this call may be touched; new ones are not under "continuation"."""
        return not (self.plan.continuation and self.past is not None)

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
