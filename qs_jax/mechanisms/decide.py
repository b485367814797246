"""Who may be touched, and in which order the mechanisms get their say (paper 2.4, D.6, I.4).

Full processing beats forced halting beats the dynamic decision; halting comes before fusion, and a
token that halts, or has halted, neither absorbs nor is absorbed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.mechanisms import halting
from qs_jax.mechanisms.plan import NEVER, LayerNumbers, Numbers, Plan


class Overrides(NamedTuple):
    """What a caller decided about single tokens.

    Attributes:
      full_BT: Full processing.
      forced_layer_BT: Layer at which a token halts at the latest; NEVER for none.
      retain_BT: Keys that are always written.
    """

    full_BT: Bool[Array | np.ndarray, "B T"]
    forced_layer_BT: Int[Array | np.ndarray, "B T"]
    retain_BT: Bool[Array | np.ndarray, "B T"]


class Rows(NamedTuple):
    """What is known of each token before the first layer.

    Attributes:
      tokens_BT: Ids.
      pos_BT: Positions.
      real_BT: Not padding.
      subject_BT: The mechanisms act on it.
      full_BT: Full processing.
      forced_layer_BT: Forced halt; NEVER for none.
      retain_BT: Its keys are always written.
      asking_BT: One of the prompt's last queries (score "attention").
    """

    tokens_BT: Int[Array, "B T"]
    pos_BT: Int[Array, "B T"]
    real_BT: Bool[Array, "B T"]
    subject_BT: Bool[Array, "B T"]
    full_BT: Bool[Array, "B T"]
    forced_layer_BT: Int[Array, "B T"]
    retain_BT: Bool[Array, "B T"]
    asking_BT: Bool[Array, "B T"]


def rows(
    tokens_BT: Int[Array, "B T"],
    pos_BT: Int[Array, "B T"],
    real_BT: Bool[Array, "B T"],
    prompt_lengths_B: Int[Array, "B"],
    overrides: Overrides | None,
    plan: Plan,
    numbers: Numbers,
) -> Rows:
    """Work out the exemptions of each token."""
    ends_B1 = prompt_lengths_B[:, None]
    special = jnp.asarray(plan.special_ids, jnp.int32)
    full_BT = jnp.isin(tokens_BT, jnp.concatenate([special, numbers.protect_ids]))
    full_BT |= pos_BT < numbers.sink_tokens
    forced_BT = jnp.where(jnp.isin(tokens_BT, numbers.forced_ids), numbers.forced_layer, NEVER)
    retain_BT = jnp.isin(tokens_BT, numbers.retain_ids)
    if overrides is not None:
        full_BT |= overrides.full_BT
        forced_BT = jnp.minimum(forced_BT, overrides.forced_layer_BT)
        retain_BT |= overrides.retain_BT
    subject_BT, asked = real_BT, 0
    if plan.continuation:
        subject_BT = real_BT & (pos_BT < ends_B1 - numbers.recent_tokens)
        asked = plan.halting.score_queries if plan.halting is not None else 0
    asking_BT = real_BT & (pos_BT >= ends_B1 - asked) & (pos_BT < ends_B1)
    return Rows(tokens_BT, pos_BT, real_BT, subject_BT, full_BT, forced_BT, retain_BT, asking_BT)


def eligible(rows: Rows, stopped_BT: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Tokens that halting and fusion may touch; `stopped_BT` are absorbed and not computed."""
    return rows.subject_BT & ~rows.full_BT & ~stopped_BT


def halt(
    rows: Rows,
    halted_BT: Bool[Array, "B T"],
    stopped_BT: Bool[Array, "B T"],
    drift_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"] | None,
    score_BT: Float[Array, "B T"] | None,
    at: LayerNumbers,
    plan: Plan,
    outside_B: Int[Array, "B"] | None = None,
) -> Bool[Array, "B T"]:
    """Tokens that halt at this layer and had not before.

    Args:
      rows: Exemptions.
      halted_BT: Halted at an earlier layer.
      stopped_BT: Absorbed and no longer computed.
      drift_BT: Layer drift.
      entropy_BT: In nats, or None.
      score_BT: Of the quota rule.
      at: Numbers of this layer.
      plan: Rule.
      outside_B: See `halting.quota`.
    """
    assert plan.halting is not None
    eligible_BT = eligible(rows, stopped_BT)
    if plan.halting.rule == "dual":
        dynamic_BT = halting.dual(drift_BT, entropy_BT, at)
    else:
        assert score_BT is not None
        dynamic_BT = halting.quota(score_BT, eligible_BT, halted_BT, at.quota, outside_B)
    forced_BT = at.layer >= rows.forced_layer_BT
    return eligible_BT & ~halted_BT & ((dynamic_BT & at.may_halt) | forced_BT)
