"""Dynamic token halting (paper 2.1, B; the `quota` rule for prompts is ours)."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Bool, Float, Int


class Signals(NamedTuple):
    """What a halting decision may read after a layer.

    Attributes:
      pos_BT: Positions.
      eligible_BT: Tokens that may halt, or have halted before.
      halted_BT: Halted at an earlier layer.
      drift_BT: Layer drift.
      entropy_BT: In nats, where `Halting.candidates` asked for it; None where no estimator is read.
      received_BT: Most attention from the prompt's last queries; None unless a quota reads it.
      outside_B: Eligible tokens that halted before and are not among these; None for none.
    """

    pos_BT: Int[Array, "B T"]
    eligible_BT: Bool[Array, "B T"]
    halted_BT: Bool[Array, "B T"]
    drift_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"] | None
    received_BT: Float[Array, "B T"] | None = None
    outside_B: Int[Array, "B"] | None = None


@no_type_check
class Halting(flax.struct.PyTreeNode):
    """When a token stops its layers; fields as in `HaltingConfig`, `[L]` where they vary by layer.

    Attributes:
      entropy: The estimator that decisions read; None for none.
      layers: The halting layers, where extrapolation maps belong to them; else None.
    """

    may_halt_L: Bool[Array, "L"]
    tau_drift_L: Float[Array, "L"]
    tau_halt_L: Float[Array, "L"]
    quota_L: Float[Array, "L"]
    forced_layer: Int[Array, ""]
    forced_ids: Int[Array, "m"]
    rule: str = field(pytree_node=False)
    drift: str = field(pytree_node=False)
    entropy: str | None = field(pytree_node=False)
    score: str = field(pytree_node=False)
    score_queries: int = field(pytree_node=False)
    seed: int = field(pytree_node=False)
    freeze: bool = field(pytree_node=False)
    layers: tuple[int, ...] | None = field(pytree_node=False)

    @property
    def reads_attention(self) -> bool:
        """Whether decisions read attention received."""
        return self.rule == "quota" and self.score == "attention"

    @property
    def reads_drift(self) -> bool:
        """Whether decisions read how far a layer moved a token."""
        return self.rule == "dual" or self.score == "drift"

    def candidates(self, signals: Signals, layer: Int[Array, ""]) -> Bool[Array, "B T"]:
        """Tokens whose entropy the decision reads: who fails the cheap test needs none."""
        may_BT = signals.eligible_BT & ~signals.halted_BT & self.may_halt_L[layer - 1]
        return may_BT & self._moved_little(signals, layer) if self.rule == "dual" else may_BT

    def decide(self, signals: Signals, layer: Int[Array, ""]) -> Bool[Array, "B T"]:
        """Tokens that halt at this layer by what the signals say.

        Dual: drift and entropy are both under their thresholds (2.1). Quota: the lowest scores,
        until the layer's share of the eligible tokens has stopped. Forced halts are not dynamic:
        `Rows.forced_layer_BT`.
        """
        if self.rule == "dual":
            halts_BT = self._moved_little(signals, layer)
            if signals.entropy_BT is not None:
                halts_BT &= signals.entropy_BT < self.tau_halt_L[layer - 1]
        else:
            share, score_BT = self.quota_L[layer - 1], self._score(signals)
            halted = (signals.halted_BT, share, signals.outside_B)
            halts_BT = lowest(score_BT, signals.eligible_BT, *halted)
        may_BT = signals.eligible_BT & ~signals.halted_BT & self.may_halt_L[layer - 1]
        return halts_BT & may_BT

    def _moved_little(self, signals: Signals, layer: Array) -> Array:
        return signals.drift_BT < self.tau_drift_L[layer - 1]

    def _score(self, signals: Signals) -> Float[Array, "B T"]:
        if self.score == "attention":
            assert signals.received_BT is not None
            return signals.received_BT
        if self.score == "drift":
            return signals.drift_BT
        if self.score == "entropy":
            assert signals.entropy_BT is not None
            return jnp.nan_to_num(signals.entropy_BT)
        return random_score(signals.pos_BT, self.seed)


def lowest(
    score_BT: Float[Array, "B T"],
    eligible_BT: Bool[Array, "B T"],
    halted_BT: Bool[Array, "B T"],
    share: Float[Array, ""],
    outside_B: Int[Array, "B"] | None = None,
) -> Bool[Array, "B T"]:
    """The lowest scores, until `share` of the eligible tokens has stopped.

    Exactly floor(share * eligible tokens) have stopped afterwards, unless more already had; ties go
    to the earlier position. Each row is ranked alone.

    Args:
      score_BT: The lower, the sooner.
      eligible_BT: Tokens that count and may stop.
      halted_BT: Tokens that have stopped before.
      share: Between 0 and 1.
      outside_B: Eligible tokens that have halted and are not among these; None for none.
    """
    key_BT = jnp.where(halted_BT, -jnp.inf, score_BT)
    key_BT = jnp.where(eligible_BT, key_BT, jnp.inf)
    order_BT = jnp.argsort(key_BT, axis=1, stable=True)
    rank_BT = jnp.argsort(order_BT, axis=1, stable=True)
    # 1e-3 keeps float32 from turning 0.7 * 10 into 6.9999998.
    outside_B = jnp.zeros_like(rank_BT[:, 0]) if outside_B is None else outside_B
    target_B = jnp.floor(share * (eligible_BT.sum(1) + outside_B) + 1e-3) - outside_B
    return eligible_BT & (rank_BT < target_B[:, None])


def attention_received(
    weights_BQS: Float[Array, "B Q S"], counted_BQ: Bool[Array, "B Q"], own_BQ: Int[Array, "B Q"]
) -> Float[Array, "B S"]:
    """Most attention any of the counted queries pays to each other position.

    Args:
      weights_BQS: Maximum over heads of this layer's attention weights.
      counted_BQ: Query mask.
      own_BQ: Each query's own slot: its weight on itself does not count.
    """
    other_BQS = jnp.arange(weights_BQS.shape[2])[None, None] != own_BQ[..., None]
    return jnp.where(counted_BQ[:, :, None] & other_BQS, weights_BQS, 0).max(1)


def random_score(pos_BT: Int[Array, "B T"], seed: int) -> Float[Array, "B T"]:
    """A uniform number for each position, the same in every row (the control)."""
    key = jax.random.key(seed)

    def draw(position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(jax.vmap(draw))(pos_BT)
