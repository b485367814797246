"""Dynamic token halting (paper 2.1, B; DESIGN's `quota` rule for prompts)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import HaltingConfig
from qs_jax.mechanisms.plan import LayerNumbers


def dual(
    drift_BT: Float[Array, "B T"], entropy_BT: Float[Array, "B T"] | None, at: LayerNumbers
) -> Bool[Array, "B T"]:
    """Halt where both signals are under this layer's thresholds (2.1).

    Args:
      drift_BT: Layer drift.
      entropy_BT: In nats; None leaves the test out.
      at: Thresholds of this layer.
    """
    halt_BT = drift_BT < at.tau_drift
    return halt_BT if entropy_BT is None else halt_BT & (entropy_BT < at.tau_halt)


def quota(
    score_BT: Float[Array, "B T"],
    eligible_BT: Bool[Array, "B T"],
    halted_BT: Bool[Array, "B T"],
    share: Float[Array, ""],
) -> Bool[Array, "B T"]:
    """Halt the lowest scores until `share` of the eligible tokens has stopped.

    Exactly floor(share * eligible tokens) have stopped afterwards, unless more already had; ties go
    to the earlier position. Each row is ranked alone.

    Args:
      score_BT: The lower, the sooner.
      eligible_BT: Tokens that count and may stop.
      halted_BT: Tokens that have stopped before.
      share: Between 0 and 1.
    """
    key_BT = jnp.where(halted_BT, -jnp.inf, score_BT)
    key_BT = jnp.where(eligible_BT, key_BT, jnp.inf)
    order_BT = jnp.argsort(key_BT, axis=1, stable=True)
    rank_BT = jnp.argsort(order_BT, axis=1, stable=True)
    # 1e-3 keeps float32 from turning 0.7 * 10 into 6.9999998.
    target_B = jnp.floor(share * eligible_BT.sum(1) + 1e-3)
    return eligible_BT & (rank_BT < target_B[:, None])


def attention_received(
    weights_BTS: Float[Array, "B T S"], asking_BT: Bool[Array, "B T"]
) -> Float[Array, "B S"]:
    """Most attention any of the asking queries pays to each other position.

    Args:
      weights_BTS: Maximum over heads of this layer's attention weights.
      asking_BT: Queries that count; a query's weight on itself does not.
    """
    width = weights_BTS.shape[1]
    other_1TS = ~jnp.eye(width, dtype=bool)[None]
    counted_BTS = asking_BT[:, :, None] & other_1TS
    return jnp.where(counted_BTS, weights_BTS, 0).max(1)


def random_score(pos_BT: Int[Array, "B T"], halting: HaltingConfig) -> Float[Array, "B T"]:
    """A uniform number for each position, the same in every row (the control)."""
    key = jax.random.key(halting.seed)

    def draw(position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(jax.vmap(draw))(pos_BT)
