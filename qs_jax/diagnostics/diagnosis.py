"""Semantic drift of a preset from the dense model, and error attribution to tokens (paper R.3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import dense, inputs, masked
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.score import next_logprobs
from qs_jax.engine.weights import Weights, check_finite, layer_weights, prepare_params
from qs_jax.errors import InputError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import Mechanisms, Overrides, Rows, resolve
from qs_jax.models import Params, family_of, head
from qs_jax.record import Record
from qs_jax.state import LayerRecord, TokenState, evidence, exact_dtype


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A text under a preset, beside the dense model; padding and what is not scored hold 0.

    Attributes:
      tokens: Token ids, right-padded.
      lengths: Tokens of each row.
      drift_index: Semantic drift index after each layer, a distance from the dense state.
      relative_index: Drift index over the norm of the dense state.
      attribution: Error attribution score, in nats per unit of the input embedding.
      dense_logprobs: Log-probability of each token in the dense model, in nats.
      logprobs: Log-probability of each token under the preset, in nats.
      kl: KL(dense || preset) of the predictions of this token, in nats.
      agrees: Both predict the same token as the likeliest.
      mask: Positions that are scored.
      record: Of the mechanisms, simulated.
    """

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    drift_index: Float[np.ndarray, "L B T"]
    relative_index: Float[np.ndarray, "L B T"]
    attribution: Float[np.ndarray, "B T"]
    dense_logprobs: Float[np.ndarray, "B T"]
    logprobs: Float[np.ndarray, "B T"]
    kl: Float[np.ndarray, "B T"]
    agrees: Bool[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    record: Record

    @property
    def token_drift(self) -> Float[np.ndarray, "B T"]:
        """The semantic drift index of each token: that of the last layer."""
        return self.drift_index[-1]

    @property
    def touched(self) -> Bool[np.ndarray, "B T"]:
        """Tokens that halted, were absorbed, or had fewer than 8 bits in some layer."""
        record = self.record
        own = np.arange(self.tokens.shape[1])[None]
        halted = record.depth < len(record.active)
        return record.real & (halted | (record.representative != own) | (record.bits.min(0) < 8))

    def summary(self) -> dict[str, float]:
        """Perplexities, mean KL (nats), share of agreement and layer-tokens saved of a text."""

        def mean(values: np.ndarray) -> float:
            return float(values.sum(dtype=np.float64) / self.mask.sum())

        return {
            "dense_perplexity": math.exp(-mean(self.dense_logprobs)),
            "perplexity": math.exp(-mean(self.logprobs)),
            "kl": mean(self.kl),
            "top1_agreement": mean(self.agrees),
            "layer_tokens_saved": self.record.layer_tokens_saved,
        }


@default_settings()
def diagnose(
    params: Params,
    tokens: inputs.TokensLike,
    cfg: Config,
    *,
    overrides: TokenOverrides | None = None,
) -> Diagnosis:
    """Compare a preset with the dense model, token by token and layer by layer.

    With h the states after layer l and L a row's mean loss over its scored positions,

        drift index(t, l)  = || h_dense(t, l) - h_preset(t, l) ||_2
        attribution(t)     = || d (L_preset - L_dense) / d x_t ||_2 ,  x_t the input embedding.

    The gradient is `jax.grad` through the masked engine. Decisions are piecewise constant and have
    none; rounding and merging are passed straight through. Memory grows with the states and the
    attention weights of all layers, L x B x T x D and L x B x N x T x T.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and protocol; the masked engine runs whatever `engine` says.
      overrides: As in `qs_jax.score`.

    Raises:
      ConfigError: The parameters are another model's, or the maps a policy needs are missing.
      InputError: Tokens cannot be used, no mechanism runs, or rows can only run token by token.
      NonFiniteError: The model produced NaN or infinity.

    Source: QuickSilver R.3 and figure 21.
    """
    model, mech = cfg.model, check_mechanisms(cfg)
    params = prepare_params(params, model, mech)
    batch, padded = inputs.prepare_batch(tokens, model)
    ends_B = inputs.split_prompts(batch.lengths_B, None, cfg)
    width = batch.tokens_BT.shape[1]
    column_1T = np.arange(padded.tokens_BT.shape[1])[None]
    ends_B1 = np.maximum(ends_B, 1)[:, None]
    mask_BT = (column_1T >= ends_B1) & (column_1T < batch.lengths_B[:, None])
    if not mask_BT.any(1).all():
        raise InputError("a row of one token predicts nothing: give at least two.")
    chosen = inputs.override_arrays(overrides, padded.tokens_BT.shape, width, cfg)
    out = jax.device_get(_compare(params, padded, ends_B, chosen, mask_BT, mech, model=model))
    check_finite(np.isfinite(out["attribution"]).all(1) & np.isfinite(out["kl"]).all(1))
    record = Record.of(out.pop("evidence"), width, batch.lengths_B, ends_B, cfg.effective_protocol)
    mask_BT = mask_BT[:, :width]
    out = {k: np.where(record.real, x[..., :width], x.dtype.type(0)) for k, x in out.items()}
    return Diagnosis(batch.tokens_BT, batch.lengths_B, **out, mask=mask_BT, record=record)


@jax.jit(static_argnames=("model",))
def _compare(
    params: Params,
    batch: inputs.Batch,
    ends_B: Int[Array, "B"],
    overrides: Overrides | None,
    mask_BT: Bool[Array, "B T"],
    mech: Mechanisms,
    model: ModelConfig,
) -> dict[str, Any]:
    """Arrays of a `Diagnosis` and the evidence of its record."""
    scored_BT = mask_BT / mask_BT.sum(1, keepdims=True)
    rows = inputs.whole_rows(batch, ends_B, overrides, mech)

    def loss_difference(nudge_BTD: Array) -> tuple[Array, dict[str, Any]]:
        with nudge_embeddings(model, nudge_BTD):
            dense_LBTD = dense_states(params, batch.tokens_BT, model)
            preset_LBTD, state, record = masked_states(params, rows, model, mech)
        dense_BTD = head.normed(params, dense_LBTD[-1], model)
        preset_BTD = head.normed(params, preset_LBTD[-1], model)
        dense_logprobs = next_logprobs(params, dense_BTD, batch.tokens_BT)
        logprobs = next_logprobs(params, preset_BTD, batch.tokens_BT)
        kl_BT, agrees_BT = _divergence(params, dense_BTD, preset_BTD)
        drift_LBT = _norm(dense_LBTD - preset_LBTD)
        out = {
            "drift_index": drift_LBT,
            "relative_index": drift_LBT / jnp.maximum(_norm(dense_LBTD), 1e-30),
            "dense_logprobs": jnp.where(mask_BT, dense_logprobs, 0),
            "logprobs": jnp.where(mask_BT, logprobs, 0),
            "kl": jnp.where(mask_BT, kl_BT, 0),
            "agrees": mask_BT & agrees_BT,
            "evidence": evidence(state, record),
        }
        return ((dense_logprobs - logprobs) * scored_BT).sum(), out

    zeros_BTD = jnp.zeros((*batch.tokens_BT.shape, model.hidden_size), model.dtype)
    gradient_BTD, out = jax.grad(loss_difference, has_aux=True)(zeros_BTD)
    return out | {"attribution": _norm(gradient_BTD)}


def _norm(x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    return jnp.linalg.norm(x.astype(exact_dtype(x.dtype)), axis=-1)


def _divergence(params: Params, dense_BTD: Array, preset_BTD: Array) -> tuple[Array, Array]:
    """KL(dense || preset) of the predictions of each token, and whether their likeliest agree."""

    def compare(*states_BCD: Array) -> Array:
        p, q = (jax.nn.log_softmax(head.logits(params, h)) for h in states_BCD)
        same = p.argmax(-1) == q.argmax(-1)
        return jnp.stack([(jnp.exp(p) * (p - q)).sum(-1), same.astype(p.dtype)], axis=-1)

    states = jax.lax.stop_gradient((dense_BTD, preset_BTD))
    out_BT2 = head.map_positions(compare, 2 * head.head_table(params).shape[0], *states)
    out_BT2 = jnp.pad(out_BT2[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return out_BT2[..., 0], out_BT2[..., 1] > 0


def check_mechanisms(cfg: Config) -> Mechanisms:
    """The mechanisms of a call, refused where there is nothing to diagnose."""
    mech = resolve(cfg.quicksilver, cfg.model, cfg.effective_protocol)
    if mech.is_off:
        raise InputError("there is nothing to diagnose: every mechanism is off.")
    if mech.reads_previous:
        raise InputError("final_prev has no gradient over whole rows: use another entropy.")
    return mech


def nudge_embeddings(model: ModelConfig, nudge_BTD: Array) -> AbstractContextManager[Any]:
    """Add `nudge_BTD` to the input embeddings of every engine traced inside."""
    embed = family_of(model).embed

    def add(function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = function(*args, **kwargs)
        is_embed = isinstance(context.module, embed) and context.method_name == "__call__"
        return out + nudge_BTD if is_embed else out

    return nn.intercept_methods(add)


def dense_states(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig
) -> Float[Array, "L B T D"]:
    """States after each layer of the dense model."""
    return dense.look_at_layers(params, tokens_BT, model, lambda _, after, __: after)[1]


def masked_states(
    params: Params, rows: Rows, model: ModelConfig, mech: Mechanisms
) -> tuple[Float[Array, "L B T D"], TokenState, LayerRecord]:
    """States after each layer of the masked engine, the final carry and the evidence `[L, B, T]`.

    JAX has no gradient of merging, and that of rounding is 0: gradients go through both as if they
    changed nothing (the straight-through estimator, Bengio et al. 2013).
    """
    call = masked.open_call(params, rows, model, mech)
    # Sees what fusion hid, but neither merges nor rounds.
    straight = call._replace(mech=mech.replace(fusion=None, amq=None))

    def run(state: TokenState, scanned: tuple[Array, Weights]) -> tuple[TokenState, LayerRecord]:
        if mech.fusion is None and mech.amq is None:
            return masked.run_layer(call, state, *scanned)[:2]
        fixed, frozen = jax.tree.map(lax.stop_gradient, (state, call.embedded_BTD))
        acting = call._replace(embedded_BTD=frozen)
        after, record, _ = masked.run_layer(acting, fixed, *scanned)
        smooth = masked.run_layer(straight, state, *scanned)[0].h_BTD
        # Adds its gradient and exactly nothing to the value.
        zero_BTD = smooth - lax.stop_gradient(smooth)
        return after.replace(h_BTD=lax.stop_gradient(after.h_BTD) + zero_BTD), record

    @jax.checkpoint  # a layer's attention weights are computed again rather than stored
    def body(state: TokenState, scanned: Any) -> tuple[TokenState, tuple[Array, LayerRecord]]:
        after, record = run(state, scanned)
        return after, (after.h_BTD, record)

    numbers = jnp.arange(1, model.num_layers + 1, dtype=jnp.int32)
    scanned = (numbers, layer_weights(params))
    state, (states_LBTD, record) = lax.scan(body, masked.start(call), scanned)
    return states_LBTD, state, record
