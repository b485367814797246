"""A configuration in two halves: what changes the program, and the numbers it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import (
    AMQConfig,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.halves import exact_dtype

NEVER = 2**30  # a layer or a position that is never reached


class Plan(NamedTuple):
    """The static half: configurations with their numbers blanked out.

    Attributes:
      halting: Rule, drift, entropy, score and halting layers.
      kv_skip: Policy.
      fusion: Distance, window, alpha, filters.
      amq: Estimator, normalisation, targets, group.
      continuation: The protocol: prompts only, and what has stopped is not computed.
      shortlist_size: Ids of the shortlist entropy.
      special_ids: The model's own protected ids.
      planned: No more than a share of each prompt stays active after some layers.
    """

    halting: HaltingConfig | None
    kv_skip: KVSkipConfig | None
    fusion: FusionConfig | None
    amq: AMQConfig | None
    continuation: bool
    shortlist_size: int
    special_ids: tuple[int, ...]
    planned: bool = False

    @property
    def policy(self) -> str:
        """What becomes of a halted token's keys."""
        return self.kv_skip.policy if self.kv_skip is not None else "propagate"

    @property
    def narrow(self) -> bool:
        """Every token has bits, whether the mechanisms act on it or not."""
        return self.amq is not None and self.amq.execution != "fake"

    @property
    def sequential(self) -> bool:
        """Rows can only be run token by token: a decision reads the previous step's output."""
        halting, amq = self.halting, self.amq
        used = [halting and halting.entropy_used, amq and amq.entropy]
        return "final_prev" in used


class LayerNumbers(NamedTuple):
    """Numbers of one layer, or of all on a leading axis of L."""

    layer: Int[Array, "*L"]
    may_halt: Bool[Array, "*L"]
    tau_drift: Float[Array, "*L"]
    tau_halt: Float[Array, "*L"]
    quota: Float[Array, "*L"]
    may_fuse: Bool[Array, "*L"]
    tau_fuse: Float[Array, "*L"]
    assign_bits: Bool[Array, "*L"]
    has_bits: Bool[Array, "*L"]
    pick_shortlist: Bool[Array, "*L"]
    keep: Float[Array, "*L"]


class Numbers(NamedTuple):
    """The traced half.

    Attributes:
      layers: Per layer.
      tau_kv, delay: KV skipping.
      tau_attn, tau_ctx: Fusion.
      tau_low, tau_high: AMQ.
      sink_tokens, recent_tokens, forced_layer: Overrides.
      protect_ids, forced_ids, retain_ids: Token ids.
    """

    layers: LayerNumbers
    tau_kv: Float[Array, ""]
    delay: Int[Array, ""]
    tau_attn: Float[Array, ""]
    tau_ctx: Float[Array, ""]
    tau_low: Float[Array, ""]
    tau_high: Float[Array, ""]
    sink_tokens: Int[Array, ""]
    recent_tokens: Int[Array, ""]
    forced_layer: Int[Array, ""]
    protect_ids: Int[Array, "n"]
    forced_ids: Int[Array, "m"]
    retain_ids: Int[Array, "r"]


def bind(
    qs: QuickSilverConfig | None,
    model: ModelConfig,
    protocol: str,
    retention: Sequence[tuple[int, float]] = (),
) -> tuple[Plan, Numbers] | None:
    """Split a configuration for a model.

    Two configurations that differ in thresholds, quotas, windows, layers of fusion or AMQ, delays,
    sinks or the ids (not the count) of a list have equal plans and share a program.

    Args:
      qs: Mechanisms.
      model: Architecture.
      protocol: What they act on.
      retention: (layer, share): at most this share of a prompt stays active after the layer.

    Returns:
      The two halves, or None when every mechanism is off.

    Raises:
      ConfigError: The configuration does not fit the model or the protocol.
    """
    if qs is None or qs.is_off:
        return None
    qs.check(model, protocol)
    plan = Plan(
        halting=_static_halting(qs.halting, qs.kv_skip),
        kv_skip=qs.kv_skip
        and dataclasses.replace(
            qs.kv_skip, tau_kv=None if qs.kv_skip.tau_kv is None else 0.5, delay=0, retain_ids=()
        ),
        fusion=qs.fusion and _static_fusion(qs.fusion),
        amq=qs.amq and _static_amq(qs.amq),
        continuation=protocol == "continuation",
        shortlist_size=qs.shortlist_size if "shortlist" in qs.entropies else 0,
        special_ids=_special_ids(model) if qs.protect_special else (),
        planned=bool(retention),
    )
    return plan, _numbers(qs, model, retention)


def _static_halting(halting: HaltingConfig | None, skip: KVSkipConfig | None):
    if halting is None:
        return None
    # Extrapolation maps belong to halting layers; elsewhere, layers are numbers.
    mapped = skip is not None and skip.policy == "extrapolate"
    quota = halting.rule == "quota"
    return dataclasses.replace(
        halting,
        tau_drift=0.0,
        tau_halt=0.0,
        window=None,
        min_layer=1,
        layers=halting.layers if mapped else ((1,) if quota else None),
        quota=((0.0,) * len(halting.layers or ()) if mapped else (0.0,)) if quota else (),
        forced_ids=(),
        forced_layer=None,
    )


def _static_fusion(fusion: FusionConfig) -> FusionConfig:
    return dataclasses.replace(
        fusion,
        tau_fuse=0.0,
        first_layer=1,
        last_layer=None,
        tau_attn=None if fusion.tau_attn is None else 0.0,
        tau_ctx=None if fusion.tau_ctx is None else 0.0,
    )


def _static_amq(amq: AMQConfig) -> AMQConfig:
    uniform = amq.entropy is None
    low, high = (float("-inf"), float("inf")) if uniform else (0.0, 0.0)
    return dataclasses.replace(amq, layer=1, tau_low=low, tau_high=high, allow_noncausal=False)


def _special_ids(model: ModelConfig) -> tuple[int, ...]:
    ids = (model.bos_token_id, model.pad_token_id, *model.eos_token_ids)
    return tuple(sorted({token for token in ids if token is not None}))


def _numbers(
    qs: QuickSilverConfig, model: ModelConfig, retention: Sequence[tuple[int, float]]
) -> Numbers:
    dtype, count = exact_dtype(model.dtype), model.num_layers
    layer = np.arange(1, count + 1)
    halting, fusion, amq, skip = qs.halting, qs.fusion, qs.amq, qs.kv_skip

    def real(value) -> Array:
        return jnp.asarray(0.0 if value is None else value, dtype)

    def per_layer(value) -> Array:
        return jnp.asarray(np.broadcast_to(np.asarray(value, np.float64), (count,)), dtype)

    def ids(values) -> Array:
        return jnp.asarray(np.asarray(values, np.int32).reshape(-1))

    may_halt, quota = np.zeros(count, bool), np.zeros(count)
    if halting is not None:
        may_halt = halting.may_halt(count)
        for at, share in zip(halting.layers or (), halting.quota, strict=False):
            quota[at - 1] = share
    may_fuse = np.zeros(count, bool)
    if fusion is not None:
        may_fuse = (layer >= fusion.first_layer) & (layer <= (fusion.last_layer or count - 1))
    forced = halting.forced_layer if halting is not None else None
    return Numbers(
        layers=LayerNumbers(
            layer=jnp.asarray(layer, jnp.int32),
            may_halt=jnp.asarray(may_halt),
            tau_drift=per_layer(halting.tau_drift if halting is not None else 0.0),
            tau_halt=per_layer(halting.tau_halt if halting is not None else 0.0),
            quota=per_layer(quota),
            may_fuse=jnp.asarray(may_fuse),
            tau_fuse=per_layer(fusion.tau_fuse if fusion is not None else 0.0),
            assign_bits=jnp.asarray(layer == (amq.layer if amq is not None else 0)),
            has_bits=jnp.asarray(layer > (amq.layer if amq is not None else count)),
            pick_shortlist=jnp.asarray(layer == (qs.shortlist_layer or 0)),
            keep=per_layer([dict(retention).get(at, 1.0) for at in layer.tolist()]),
        ),
        tau_kv=real(skip and skip.tau_kv),
        delay=jnp.int32(skip.delay if skip is not None else 0),
        tau_attn=real(fusion and fusion.tau_attn),
        tau_ctx=real(fusion and fusion.tau_ctx),
        tau_low=real(amq and amq.tau_low),
        tau_high=real(amq and amq.tau_high),
        sink_tokens=jnp.int32(qs.sink_tokens),
        recent_tokens=jnp.int32(max(qs.recent_tokens, 1)),
        forced_layer=jnp.int32(NEVER if forced is None else forced),
        protect_ids=ids(qs.protect_ids),
        forced_ids=ids(halting.forced_ids if halting is not None else ()),
        retain_ids=ids(skip.retain_ids if skip is not None else ()),
    )
