"""Dynamic token halting (paper 2.1, B; the `quota` rule for prompts is ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import HaltingConfig, ModelConfig
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import custom
from qs_jax.mechanisms.custom import Signals
from qs_jax.mechanisms.signals import EntropyOf
from qs_jax.models.layers import rms_normalised
from qs_jax.state import NEVER, TokenState


@no_type_check
class Halting(flax.struct.PyTreeNode):
    """When a token stops its layers; fields as in `HaltingConfig`, `[L]` where they vary by layer.

    Attributes:
      entropy: The estimator that decisions read, or None.
      layers: The halting layers, where extrapolation maps belong to them; else None.
      score: A function of `Signals`.
      reads: The signals that decisions read.
      leaves_whole: As `HaltingConfig.leaves_whole`.
    """

    may_halt_L: Bool[Array, "L"]
    tau_drift_L: Float[Array, "L"]
    tau_halt_L: Float[Array, "L"]
    quota_L: Float[Array, "L"]
    light_share: Float[Array, ""]
    forced_layer: Int[Array, ""]
    forced_ids: Int[Array, "m"]
    rule: str = field(pytree_node=False)
    drift: str = field(pytree_node=False)
    entropy: str | None = field(pytree_node=False)
    score: Callable[[Signals], Array] = field(pytree_node=False)
    reads: frozenset[str] = field(pytree_node=False)
    score_queries: int = field(pytree_node=False)
    freeze: bool = field(pytree_node=False)
    layers: tuple[int, ...] | None = field(pytree_node=False)
    light_from: int | None = field(pytree_node=False)
    leaves_whole: bool = field(pytree_node=False)

    @property
    def ranks(self) -> bool:
        """Whether decisions compare the tokens of a prompt; light ones all stop together."""
        return self.rule == "quota" and self.light_from is None

    @property
    def reads_before(self) -> bool:
        """Whether decisions read states as they were before the layer."""
        return bool(self.reads & {"before_BTD", "drift_BT", "received_BT"})

    @property
    def reads_keys(self) -> bool:
        """Whether decisions read the layer's keys or values."""
        return bool(self.reads & {"keys_BTKH", "values_BTKH"})

    @property
    def reads_attention(self) -> bool:
        """Whether decisions read attention received."""
        return "received_BT" in self.reads

    @property
    def reads_drift(self) -> bool:
        """Whether decisions read how far a layer moved a token."""
        return "drift_BT" in self.reads

    def leave_whole(
        self,
        state: TokenState,
        rows: Any,
        eligible_BT: Bool[Array, "B T"],
        attended_F: Float[Array, "F"],
    ) -> TokenState:
        """Choose, before the first light layer, the tokens that run every layer whole.

        All but `light_share` of the eligible ones: those with the highest expected attention, which
        `attended_F` reads from a state over its RMS, and 1. Forced halts come first.
        """
        x_BTD = rms_normalised(state.h_BTD.astype(attended_F.dtype))
        score_BT = x_BTD @ attended_F[:-1] + attended_F[-1]
        nobody_BT = jnp.zeros_like(eligible_BT)
        light_BT = lowest(score_BT, eligible_BT, nobody_BT, self.light_share)
        whole_BT = eligible_BT & ~light_BT & (rows.forced_layer_BT == NEVER)
        return state.replace(whole_BT=whole_BT)

    def after_layer(
        self,
        state: TokenState,
        rows: Any,
        eligible_BT: Bool[Array, "B T"],
        drift_BT: Float[Array, "B T"],
        layer: Int[Array, ""],
        entropy_of: EntropyOf,
        read: Mapping[str, Array] | None = None,
        outside_B: Int[Array, "B"] | None = None,
    ) -> tuple[TokenState, Float[Array, "B T"]]:
        """Stop tokens of `rows`, by a forced halt or by the rule; also the entropies it has read.

        Dual: drift and entropy are both under their thresholds (2.1). Quota: the lowest scores,
        until the layer's share of the eligible tokens has stopped, `outside_B` others among them.
        `read` is what the engine gives of the `Signals` of the layer.
        """
        halted_BT = state.depth_BT < layer
        may_BT = eligible_BT & ~halted_BT & self.may_halt_L[layer - 1]
        if self.rule == "dual":
            may_BT &= drift_BT < self.tau_drift_L[layer - 1]
        entropy_BT = jnp.full_like(drift_BT, jnp.nan)
        if self.entropy is not None:  # who fails the cheap test needs none
            entropy_BT = jnp.where(may_BT, entropy_of(self.entropy, may_BT), jnp.nan)
        if self.ranks:
            ready_BT = eligible_BT & ~halted_BT
            found = Signals.of(rows, ready_BT, layer, drift_BT, entropy_BT, read or {})
            # Finite, or fewer might stop than engines have counted on.
            score_BT = jnp.nan_to_num(self.score(found).astype(drift_BT.dtype))
            ranked = (score_BT, eligible_BT, halted_BT)
            may_BT &= lowest(*ranked, self.quota_L[layer - 1], outside_B)
        elif self.entropy is not None:
            may_BT &= entropy_BT < self.tau_halt_L[layer - 1]
        halts_BT = may_BT | (eligible_BT & ~halted_BT & (layer >= rows.forced_layer_BT))
        active_BT = state.active_BT & ~halts_BT if self.freeze else state.active_BT
        depth_BT = jnp.where(halts_BT, layer, state.depth_BT)
        return state.replace(depth_BT=depth_BT, active_BT=active_BT), entropy_BT


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

    `own_BQ` is the slot of each query, whose weight on itself does not count.
    """
    other_BQS = jnp.arange(weights_BQS.shape[2])[None, None] != own_BQ[..., None]
    return jnp.where(counted_BQ[:, :, None] & other_BQS, weights_BQS, 0).max(1)


@dataclasses.dataclass(frozen=True)
class Random:
    """A uniform number for each position, the same in every row (the control)."""

    seed: int

    def __call__(self, signals: Signals) -> Float[Array, "B T"]:
        key = jax.random.key(self.seed)

        def draw(position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

        return jax.vmap(jax.vmap(draw))(signals.pos_BT)


_SCORES: Mapping[str, Callable[[Signals], Any]] = {
    "attention": lambda signals: signals.received_BT,
    "drift": lambda signals: signals.drift_BT,
    "entropy": lambda signals: signals.entropy_BT,
}


def score_of(config: HaltingConfig) -> Callable[[Signals], Array]:
    """The function that a quota ranks by."""
    if not isinstance(config.score, str):
        return config.score
    return Random(config.seed) if config.score == "random" else _SCORES[config.score]


def reads_of(config: HaltingConfig, model: ModelConfig) -> frozenset[str]:
    """Names of the `Signals` that decisions read; `ConfigError` if an entropy has no estimator."""
    if not config.ranks:
        return frozenset({"drift_BT"} if config.rule == "dual" else ())
    found = custom.reads(score_of(config), model)
    if "entropy_BT" in found and config.entropy is None:
        raise ConfigError("halting.score reads entropy_BT: name its estimator, halting.entropy.")
    return found
