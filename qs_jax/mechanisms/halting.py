"""Dynamic token halting (paper 2.1, B; the `quota` rule for prompts is ours)."""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Bool, Float, Int

from qs_jax.mechanisms.signals import EntropyOf
from qs_jax.state import TokenState


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

    def after_layer(
        self,
        state: TokenState,
        rows: Any,
        eligible_BT: Bool[Array, "B T"],
        drift_BT: Float[Array, "B T"],
        layer: Int[Array, ""],
        entropy_of: EntropyOf,
        **read: Any,
    ) -> tuple[TokenState, Float[Array, "B T"]]:
        """Stop tokens, by a forced halt or by `decide`; also the entropies that were read.

        `rows` are the `Rows` of the state's tokens, `read` other `Signals`.
        """
        halted_BT = state.depth_BT < layer
        signals = Signals(rows.pos_BT, eligible_BT, halted_BT, drift_BT, None, **read)
        entropy_BT = jnp.full_like(drift_BT, jnp.nan)
        if self.entropy is not None:
            candidates_BT = self.candidates(signals, layer)
            entropy_BT = entropy_of(self.entropy, candidates_BT)
            entropy_BT = jnp.where(candidates_BT, entropy_BT, jnp.nan)
            signals = signals._replace(entropy_BT=entropy_BT)
        forced_BT = eligible_BT & ~halted_BT & (layer >= rows.forced_layer_BT)
        halts_BT = self.decide(signals, layer) | forced_BT
        active_BT = state.active_BT & ~halts_BT if self.freeze else state.active_BT
        depth_BT = jnp.where(halts_BT, layer, state.depth_BT)
        return state.replace(depth_BT=depth_BT, active_BT=active_BT), entropy_BT

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

    Exactly floor(share * eligible tokens) have stopped afterwards, unless more already had; ties
    go to the earlier position. Each row is ranked alone.
    """
    key_BT = jnp.where(halted_BT, -jnp.inf, score_BT)
    key_BT = jnp.where(eligible_BT, key_BT, jnp.inf)
    order_BT = jnp.argsort(key_BT, axis=1, stable=True)
    place_BT = jnp.broadcast_to(jnp.arange(order_BT.shape[1])[None], order_BT.shape)
    rank_BT = place_BT.at[jnp.arange(len(order_BT))[:, None], order_BT].set(place_BT)
    # 1e-3 keeps float32 from turning 0.7 * 10 into 6.9999998.
    outside_B = jnp.zeros_like(rank_BT[:, 0]) if outside_B is None else outside_B
    target_B = jnp.floor(share * (eligible_BT.sum(1) + outside_B) + 1e-3) - outside_B
    return eligible_BT & (rank_BT < target_B[:, None])


def attention_received(weights_BQS: Array, counted_BQ: Array, own_BQ: Array) -> Array:
    """Most attention any of the counted queries pays to each other position.

    `own_BQ` is each query's own slot: its weight on itself does not count.
    """
    other_BQS = jnp.arange(weights_BQS.shape[2])[None, None] != own_BQ[..., None]
    return jnp.where(counted_BQ[:, :, None] & other_BQS, weights_BQS, 0).max(1)


def random_score(pos_BT: Int[Array, "B T"], seed: int) -> Float[Array, "B T"]:
    """A uniform number for each position, the same in every row (the control)."""
    key = jax.random.key(seed)

    def draw(position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(jax.vmap(draw))(pos_BT)
