"""Log-probabilities of given text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import batching, dense, masked, tokenwise
from qs_jax.engine.checks import check_finite, check_maps, check_params
from qs_jax.engine.overrides import TokenOverrides, arrays_of
from qs_jax.mechanisms.execution import with_weights
from qs_jax.mechanisms.plan import Numbers, Plan, bind
from qs_jax.models import Params, head
from qs_jax.record import Record


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """What `score` returns; columns are those of the tokens given.

    Attributes:
      logprobs: float32 `[B, T]`; column i is log p(token i | tokens before i) in nats; 0 where
        nothing is scored (the first token of a row, padding, the prompt under "continuation").
      mask: bool `[B, T]`, true where a position is scored.
      logits: float32 `[B, T, V]` if asked for; column i uses tokens 0..i, and predicts i + 1.
      record: What the mechanisms did; None for the dense model.
    """

    logprobs: Float[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    logits: Float[np.ndarray, "B T V"] | None = None
    record: Record | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the scored positions, in nats; nan if there are none."""
        count = self.mask.sum()
        return -float(self.logprobs.sum(dtype=np.float64) / count) if count else float("nan")

    @property
    def perplexity(self) -> float:
        """Exp of `nll`."""
        return float(np.exp(self.nll))


def next_logprobs(
    params: Params, h_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log-probability of each token, read from the normed state before it; column 0 is 0."""
    next_BT = jnp.roll(tokens_BT, -1, axis=1)

    def chunk_logprobs(h_BCD: Array, next_BC: Array) -> Array:
        logits_BCV = head.logits(params, h_BCD)
        picked_BC = jnp.take_along_axis(logits_BCV, next_BC[..., None], axis=-1)[..., 0]
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    vocab = head.head_table(params).shape[0]
    logprobs_BT = head.map_positions(chunk_logprobs, vocab, h_BTD, next_BT)
    return jnp.pad(logprobs_BT[:, :-1], ((0, 0), (1, 0)))


def score_tokens(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig
) -> Float[Array, "B T"]:
    """Log-probability of each token given those before it; column 0 is 0."""
    return next_logprobs(params, dense.forward(params, tokens_BT, model), tokens_BT)


def all_logits(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig
) -> Float[Array, "B T V"]:
    """Logits of every position."""
    return head.logits(params, dense.forward(params, tokens_BT, model))


jit_score = jax.jit(score_tokens, static_argnames=("model",))
jit_logits = jax.jit(all_logits, static_argnames=("model",))


def score_masked(
    params: Params,
    prompt: tokenwise.Prompt,
    numbers: Numbers,
    model: ModelConfig,
    plan: Plan,
    return_logits: bool,
) -> dict[str, Any]:
    """Log-probabilities under the mechanisms, and the evidence; logits if asked for."""
    if plan.sequential:
        width = prompt.tokens_BT.shape[1]
        h_BTD, past = tokenwise.run_rows(params, prompt, model, plan, numbers, width)
        evidence = tokenwise.evidence(past)
    else:
        rows = tokenwise.whole_rows(prompt, plan, numbers)
        h_BTD, state, record, _ = masked.run(params, rows, model, plan, numbers)
        evidence = {
            "layers": record,
            "halt_layer": state.halt_layer_BT,
            "hidden_after": state.hidden_after_BT,
            "hidden_from": state.hidden_from_BT,
        }
    out = {"logprobs": next_logprobs(params, h_BTD, prompt.tokens_BT), "evidence": evidence}
    return out | ({"logits": head.logits(params, h_BTD)} if return_logits else {})


jit_score_masked = jax.jit(score_masked, static_argnames=("model", "plan", "return_logits"))


def score(
    params: Params,
    tokens: batching.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    overrides: TokenOverrides | None = None,
    return_logits: bool = False,
) -> ScoreOutput:
    """Log-probability of every token given the tokens before it in its row.

    A row's result depends neither on padding nor on the other rows, and a token touches no earlier
    position (min-max entropy, which looks at the whole batch, is the one exception). Under
    "continuation" the mechanisms act on each row's prompt and only the tokens after it are scored.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and protocol; sampling plays no part.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      prompt_lengths: `[B]`, "continuation" only: tokens of each prompt; by default all but the last
        `cfg.continuation_tokens`.
      overrides: What to do with single tokens, whatever their signals say.
      return_logits: Also return `[B, T, V]` float32 logits (4 * B * T * V bytes).

    Returns:
      Per-position log-probabilities in nats, rows right-padded, and the record of the mechanisms.

    Raises:
      ConfigError: The parameters are another model's, or the maps a policy needs are missing.
      InputError: Tokens cannot be used, or a row exceeds the position limit.
      NonFiniteError: The model produced NaN or infinite logits.
    """
    model = cfg.model
    check_params(params, model)
    batch, padded = batching.prepare_batch(
        tokens, model, lengths=lengths, attention_mask=attention_mask
    )
    width = batch.tokens_BT.shape[1]
    column_1T = np.arange(width)[None, :]
    ends_B = batching.split_prompts(batch.lengths_B, prompt_lengths, cfg)
    first_B1 = np.maximum(ends_B, 1)[:, None]
    mask_BT = (column_1T < batch.lengths_B[:, None]) & (column_1T >= first_B1)
    bound = bind(cfg.quicksilver, model, cfg.effective_protocol)
    chosen = arrays_of(overrides, padded.tokens_BT.shape, width, cfg)
    record = logits_BTV = None
    if bound is None:
        logprobs_BT = np.asarray(jit_score(params, padded.tokens_BT, model=model))
        if return_logits:
            logits_BTV = np.asarray(jit_logits(params, padded.tokens_BT, model=model))
    else:
        plan, numbers = bound
        check_maps(params, plan, model)
        params = with_weights(params, plan)
        host: Any = (*padded, ends_B)  # NumPy arrays until the program takes them
        prompt = tokenwise.Prompt(*host, overrides=chosen)
        out = jax.device_get(
            jit_score_masked(
                params, prompt, numbers, model=model, plan=plan, return_logits=return_logits
            )
        )
        logprobs_BT, logits_BTV = out["logprobs"], out.get("logits")
        record = Record.of(out["evidence"], width, batch.lengths_B, ends_B, cfg.effective_protocol)
    logprobs_BT = np.where(mask_BT, logprobs_BT[:, :width], np.zeros((), logprobs_BT.dtype))
    check_finite(np.all(np.isfinite(logprobs_BT), axis=1))
    if logits_BTV is not None:
        logits_BTV = logits_BTV[:, :width]
        check_finite(np.all(np.isfinite(logits_BTV), axis=(1, 2)))
    return ScoreOutput(logprobs=logprobs_BT, mask=mask_BT, logits=logits_BTV, record=record)
