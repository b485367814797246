"""Settings as a program takes them: mechanism objects, and which tokens they may touch.

Full processing beats forced halting beats the dynamic decision; halting comes before fusion, and a
token that has halted neither absorbs nor is absorbed (paper 2.4, D.6, I.4).
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax.numpy as jnp
import numpy as np
from flax.struct import field
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import KVSkipConfig, ModelConfig, QuickSilverConfig
from qs_jax.mechanisms.amq import AMQ
from qs_jax.mechanisms.custom import check_policy
from qs_jax.mechanisms.fusion import Fusion
from qs_jax.mechanisms.halting import Halting, reads_of, score_of
from qs_jax.mechanisms.kv_skip import KVSkip
from qs_jax.mechanisms.signals import largest_entropy
from qs_jax.models.layers import Multiply, dense_product
from qs_jax.state import FULL_BITS, NEVER, TokenState, exact_dtype


class Overrides(NamedTuple):
    """What a caller decided about single tokens; fields as in `Rows`."""

    full_BT: Bool[Array | np.ndarray, "B T"]
    forced_layer_BT: Int[Array | np.ndarray, "B T"]
    retain_BT: Bool[Array | np.ndarray, "B T"]


class Rows(NamedTuple):
    """Tokens before the first layer, and their exemptions.

    Attributes:
      real_BT: Not padding.
      subject_BT: The mechanisms act on it.
      full_BT: Full processing.
      forced_layer_BT: Layer at which it halts at the latest; NEVER for none.
      retain_BT: Its keys are always written.
      scoring_BT: Query mask of the score "attention": the prompt's last queries.
    """

    tokens_BT: Int[Array, "B T"]
    pos_BT: Int[Array, "B T"]
    real_BT: Bool[Array, "B T"]
    subject_BT: Bool[Array, "B T"]
    full_BT: Bool[Array, "B T"]
    forced_layer_BT: Int[Array, "B T"]
    retain_BT: Bool[Array, "B T"]
    scoring_BT: Bool[Array, "B T"]

    @property
    def prompt_lengths_B(self) -> Int[Array, "B"]:
        """Lengths of the prompts, whose last token is always among these."""
        return jnp.where(self.scoring_BT, self.pos_BT + 1, 0).max(1)

    def touched(self, state: TokenState) -> Bool[Array, "B T"]:
        """Tokens that halting and fusion may touch, absorbed ones included."""
        may_BT = self.subject_BT & ~self.full_BT
        return may_BT if state.whole_BT is None else may_BT & ~state.whole_BT


@no_type_check
class Mechanisms(flax.struct.PyTreeNode):
    """All mechanisms of a call, for one model and protocol.

    Array leaves are what sweeps vary; everything else is static. Two configurations that differ in
    thresholds, quotas, windows, layers of fusion or AMQ, delays, sinks or the ids (not the count)
    of a list share a program.

    Attributes:
      halting, fusion, amq: None where off.
      kv_skip: Policy "propagate" where off.
      shortlist_layer: Layer whose logit lens picks the shortlist entropy's ids.
      sink_tokens, recent_tokens, protect_ids: Exemptions, as in `QuickSilverConfig`.
      recent_over: Pairs of `recent_tokens_over`.
      special_ids: The model's own protected ids.
      shortlist_size: Ids of the shortlist entropy; 0 where nothing reads it.
      continuation: The protocol: prompts only, and absorbed tokens are not computed.
    """

    halting: Halting | None
    kv_skip: KVSkip
    fusion: Fusion | None
    amq: AMQ | None
    shortlist_layer: Int[Array, ""]
    sink_tokens: Int[Array, ""]
    recent_tokens: Int[Array, ""]
    recent_over: Int[Array, "r 2"]
    protect_ids: Int[Array, "n"]
    special_ids: tuple[int, ...] = field(pytree_node=False)
    shortlist_size: int = field(pytree_node=False)
    continuation: bool = field(pytree_node=False)

    @property
    def is_off(self) -> bool:
        """No mechanism runs: the dense model."""
        return self.halting is None and self.fusion is None and self.amq is None

    @property
    def reads_previous(self) -> bool:
        """Whether a decision reads the model's output one position earlier."""
        parts = (self.halting, self.amq)
        return "final_prev" in [part.entropy for part in parts if part is not None]

    def rows(
        self,
        tokens_BT: Int[Array, "B T"],
        pos_BT: Int[Array, "B T"],
        real_BT: Bool[Array, "B T"],
        prompt_lengths_B: Int[Array, "B"],
        overrides: Overrides | None = None,
    ) -> Rows:
        """Work out the exemptions of each token."""
        ends_B1 = prompt_lengths_B[:, None]
        special = jnp.asarray(self.special_ids, jnp.int32)
        full_BT = jnp.isin(tokens_BT, jnp.concatenate([special, self.protect_ids]))
        full_BT |= pos_BT < self.sink_tokens
        forced_BT = jnp.full(pos_BT.shape, NEVER, jnp.int32)
        if self.halting is not None:
            here_BT = jnp.isin(tokens_BT, self.halting.forced_ids)
            forced_BT = jnp.where(here_BT, self.halting.forced_layer, NEVER)
        retain_BT = jnp.isin(tokens_BT, self.kv_skip.retain_ids)
        if overrides is not None:
            full_BT |= overrides.full_BT
            forced_BT = jnp.minimum(forced_BT, overrides.forced_layer_BT)
            retain_BT |= overrides.retain_BT
        subject_BT, count = real_BT, 0
        if self.continuation:
            recent_B1 = jnp.broadcast_to(self.recent_tokens, ends_B1.shape)
            for over in self.recent_over:
                recent_B1 = jnp.where(ends_B1 > over[0], over[1], recent_B1)
            subject_BT = real_BT & (pos_BT < ends_B1 - recent_B1)
            count = self.halting.score_queries if self.halting is not None else 0
        scoring_BT = real_BT & (pos_BT >= ends_B1 - count) & (pos_BT < ends_B1)
        exempt = (subject_BT, full_BT, forced_BT, retain_BT, scoring_BT)
        return Rows(tokens_BT, pos_BT, real_BT, *exempt)

    def multiply(self, bits_BT: Array, codes: Any, layer: Int[Array, ""]) -> Multiply:
        """The product of a block for tokens of these bits; see `AMQ.multiply`."""
        return dense_product if self.amq is None else self.amq.multiply(bits_BT, codes, layer)

    def stored(self, k: Array, v: Array, bits_BT: Array) -> tuple[Array, Array]:
        """Keys and values `[B, T, K, H]` as they come back from the cache."""
        if self.amq is None:
            return k, v
        return self.amq.stored(k, bits_BT), self.amq.stored(v, bits_BT)

    def start(
        self,
        embedded_BTD: Float[Array, "B T D"],
        rows: Rows,
        model: ModelConfig,
        *,
        code_size: int = 0,
        receives: bool = False,
    ) -> TokenState:
        """The carry before the first layer: all tokens active, none fused, none quantised.

        `code_size` numbers are kept of a token for extrapolation maps; `receives` keeps attention
        received for every query and key.
        """
        shape, exact = rows.pos_BT.shape, exact_dtype(model.dtype)
        never_BT = jnp.full(shape, NEVER, jnp.int32)

        def zeros(size: int, dtype: Any) -> Array | None:
            return jnp.zeros((*shape, size), dtype) if size else None

        window = self.fusion.window if self.fusion is not None else 0
        leaves_whole = self.halting is not None and self.halting.leaves_whole
        return TokenState(
            h_BTD=embedded_BTD,
            active_BT=rows.real_BT,
            fused_BT=never_BT,
            bits_BT=jnp.full(shape, FULL_BITS, jnp.int32),
            depth_BT=jnp.full(shape, model.num_layers, jnp.int32),
            fused_after_BT=never_BT,
            size_BT=jnp.ones(shape, exact),
            similarity_BTW=zeros(window if window > 1 else 0, exact),
            received_BTS=zeros(shape[1] if receives else 0, exact),
            shortlist_BTX=zeros(self.shortlist_size, jnp.int32),
            code_BTR=zeros(code_size, model.dtype),
            whole_BT=jnp.zeros(shape, bool) if leaves_whole else None,
        )


def resolve(qs: QuickSilverConfig | None, model: ModelConfig, protocol: str) -> Mechanisms:
    """Mechanism objects of a configuration that fits the model; None is the dense model."""
    qs = qs or QuickSilverConfig()
    qs.check(model, protocol)
    special = (model.bos_token_id, model.pad_token_id, *model.eos_token_ids)
    special_ids = tuple(sorted({token for token in special if token is not None}))
    return Mechanisms(
        halting=_halting(qs, model),
        kv_skip=_kv_skip(qs, model),
        fusion=_fusion(qs, model),
        amq=_amq(qs, model),
        shortlist_layer=jnp.int32(qs.shortlist_layer or NEVER),
        sink_tokens=jnp.int32(qs.sink_tokens),
        recent_tokens=jnp.int32(max(qs.recent_tokens, 1)),
        recent_over=_ids([(n, max(r, 1)) for n, r in qs.recent_tokens_over]).reshape(-1, 2),
        protect_ids=_ids(qs.protect_ids),
        special_ids=special_ids if qs.protect_special else (),
        shortlist_size=qs.shortlist_size if "shortlist" in qs.entropies else 0,
        continuation=protocol == "continuation",
    )


def _fields(config: Any, names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names.split()}


def _number(value, model: ModelConfig) -> Array:
    return jnp.asarray(0.0 if value is None else value, exact_dtype(model.dtype))


def _by_layer(value, model: ModelConfig) -> Array:
    values = np.broadcast_to(np.asarray(value, np.float64), (model.num_layers,))
    return jnp.asarray(values, exact_dtype(model.dtype))


def _ids(values) -> Array:
    return jnp.asarray(np.asarray(values, np.int32).reshape(-1))


def _halting(qs: QuickSilverConfig, model: ModelConfig) -> Halting | None:
    config = qs.halting
    if config is None:
        return None
    quota = np.zeros(model.num_layers)
    for layer, share in zip(config.layers or (), config.quota, strict=False):
        quota[layer - 1] = share
    reads = reads_of(config, model)
    reads_entropy = config.rule == "dual" or "entropy_BT" in reads
    # Maps belong to halting layers; elsewhere layers are numbers.
    mapped = qs.kv_skip is not None and qs.kv_skip.policy == "extrapolate"
    forced = config.forced_layer
    return Halting(
        may_halt_L=jnp.asarray(config.may_halt(model.num_layers)),
        tau_drift_L=_by_layer(config.tau_drift, model),
        tau_halt_L=_by_layer(config.tau_halt, model),
        quota_L=_by_layer(quota, model),
        light_share=_number(config.light_share, model),
        forced_layer=jnp.int32(NEVER if forced is None else forced),
        forced_ids=_ids(config.forced_ids),
        entropy=config.entropy_used if reads_entropy else None,
        score=score_of(config),
        reads=reads,
        layers=config.layers if mapped else None,
        **_fields(config, "rule drift score_queries freeze light_from leaves_whole"),
    )


def _kv_skip(qs: QuickSilverConfig, model: ModelConfig) -> KVSkip:
    config = qs.kv_skip or KVSkipConfig("propagate")
    if config.is_custom:
        check_policy(config.policy, model)
    return KVSkip(
        tau_kv=_number(config.tau_kv, model),
        delay=jnp.int32(config.delay),
        retain_ids=_ids(config.retain_ids),
        **_fields(config, "policy is_custom reads_frozen"),
    )


def _fusion(qs: QuickSilverConfig, model: ModelConfig) -> Fusion | None:
    config = qs.fusion
    if config is None:
        return None
    layer = np.arange(1, model.num_layers + 1)
    last = config.last_layer or model.num_layers - 1
    return Fusion(
        may_fuse_L=jnp.asarray((layer >= config.first_layer) & (layer <= last)),
        tau_fuse_L=_by_layer(config.tau_fuse, model),
        tau_attn=_number(config.tau_attn, model),
        tau_ctx=_number(config.tau_ctx, model),
        filters_context=config.tau_ctx is not None,
        **_fields(config, "distance window alpha proportional_attention context"),
    )


def _amq(qs: QuickSilverConfig, model: ModelConfig) -> AMQ | None:
    config = qs.amq
    if config is None:
        return None
    return AMQ(
        layer=jnp.int32(config.layer),
        tau_low=_number(config.tau_low, model),
        tau_high=_number(config.tau_high, model),
        largest_entropy=largest_entropy(config.entropy or "vocab", model, qs.shortlist_size),
        **_fields(config, "entropy normalization targets group symmetric rotate execution"),
    )
