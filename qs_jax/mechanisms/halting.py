"""Dynamic token halting (paper 2.1, B; the `quota` rule for prompts is ours)."""

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
    outside_B: Int[Array, "B"] | None = None,
) -> Bool[Array, "B T"]:
    """Halt the lowest scores until `share` of the eligible tokens has stopped.

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


def over_capacity(
    score_BT: Float[Array, "B T"],
    eligible_BT: Bool[Array, "B T"],
    running_BT: Bool[Array, "B T"],
    allowed_B: Float[Array, "B"],
) -> Bool[Array, "B T"]:
    """Halt the lowest scores of those that run on until no more than `allowed_B` do.

    Fewer halt where too few are eligible: the caller plans for those.

    Args:
      score_BT: The lower, the sooner.
      eligible_BT: Tokens that may stop, among `running_BT`.
      running_BT: Tokens that would run on.
      allowed_B: How many may, in each row.
    """
    key_BT = jnp.where(eligible_BT, score_BT, jnp.inf)
    order_BT = jnp.argsort(key_BT, axis=1, stable=True)
    rank_BT = jnp.argsort(order_BT, axis=1, stable=True)
    return eligible_BT & (rank_BT < (running_BT.sum(1) - allowed_B)[:, None])


def attention_received(
    weights_BQS: Float[Array, "B Q S"], asking_BQ: Bool[Array, "B Q"], own_BQ: Int[Array, "B Q"]
) -> Float[Array, "B S"]:
    """Most attention any of the asking queries pays to each other position.

    Args:
      weights_BQS: Maximum over heads of this layer's attention weights.
      asking_BQ: Queries that count.
      own_BQ: Each query's own slot: its weight on itself does not count.
    """
    other_BQS = jnp.arange(weights_BQS.shape[2])[None, None] != own_BQ[..., None]
    counted_BQS = asking_BQ[:, :, None] & other_BQS
    return jnp.where(counted_BQS, weights_BQS, 0).max(1)


def random_score(pos_BT: Int[Array, "B T"], halting: HaltingConfig) -> Float[Array, "B T"]:
    """A uniform number for each position, the same in every row (the control)."""
    key = jax.random.key(halting.seed)

    def draw(position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(jax.vmap(draw))(pos_BT)
