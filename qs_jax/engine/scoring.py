"""Log-probabilities of given text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import batching, dense
from qs_jax.engine.checks import check_finite, check_params
from qs_jax.models import Params

# Logits that exist at a time, 64 MiB: a whole [B, T, V] array would dwarf the rest of the program.
HEAD_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """What `score` returns; columns are those of the tokens given.

    Attributes:
      logprobs: float32 `[B, T]`; column i is log p(token i | tokens before i) in nats; 0 where
        nothing is scored (the first token of a row, padding).
      mask: bool `[B, T]`, true where a position is scored.
      logits: float32 `[B, T, V]` if asked for; column i uses tokens 0..i, and predicts i + 1.
      record: What the mechanisms did; None for the dense model.
    """

    logprobs: Float[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    logits: Float[np.ndarray, "B T V"] | None = None
    record: None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the scored positions, in nats; nan if there are none."""
        count = self.mask.sum()
        return -float(self.logprobs.sum(dtype=np.float64) / count) if count else float("nan")

    @property
    def perplexity(self) -> float:
        """Exp of `nll`."""
        return float(np.exp(self.nll))


def score_tokens(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig
) -> Float[Array, "B T"]:
    """Log-probability of each token given those before it; column 0 is 0."""
    h_BTD = dense.forward(params, tokens_BT, model)
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    batch, width = tokens_BT.shape
    chunk = max(min(HEAD_ELEMENTS // (batch * model.vocab_size), width), 1)
    pad = -width % chunk

    def by_chunk(array: Array) -> Array:
        widths = [(0, 0), (0, pad)] + [(0, 0)] * (array.ndim - 2)
        split = jnp.pad(array, widths).reshape(batch, -1, chunk, *array.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def chunk_logprobs(chunk: tuple[Array, Array]) -> Array:
        h_BCD, next_BC = chunk
        logits_BCV = dense.logits(params, h_BCD)
        picked_BC = jnp.take_along_axis(logits_BCV, next_BC[..., None], axis=-1)[..., 0]
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1)

    chunks = lax.map(chunk_logprobs, (by_chunk(h_BTD), by_chunk(next_BT)))
    logprobs_BT = jnp.moveaxis(chunks, 0, 1).reshape(batch, -1)[:, : width - 1]
    return jnp.pad(logprobs_BT, ((0, 0), (1, 0)))


def all_logits(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig
) -> Float[Array, "B T V"]:
    """float32 logits of every position."""
    return dense.logits(params, dense.forward(params, tokens_BT, model))


jit_score = jax.jit(score_tokens, static_argnames=("model",))
jit_logits = jax.jit(all_logits, static_argnames=("model",))


def score(
    params: Params,
    tokens: batching.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    return_logits: bool = False,
) -> ScoreOutput:
    """Log-probability of every token given the tokens before it in its row.

    A row's result depends neither on padding nor on the other rows, and a token touches no earlier
    position.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Its `model` is used; sampling plays no part.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      return_logits: Also return `[B, T, V]` float32 logits (4 * B * T * V bytes).

    Returns:
      Per-position log-probabilities in nats, rows right-padded.

    Raises:
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
    mask_BT = (column_1T < batch.lengths_B[:, None]) & (column_1T > 0)
    logprobs_BT = np.asarray(jit_score(params, padded.tokens_BT, model=model))[:, :width]
    logprobs_BT = np.where(mask_BT, logprobs_BT, np.float32(0))
    check_finite(np.all(np.isfinite(logprobs_BT), axis=1))
    logits_BTV = None
    if return_logits:
        logits_BTV = np.asarray(jit_logits(params, padded.tokens_BT, model=model))[:, :width]
        check_finite(np.all(np.isfinite(logits_BTV), axis=(1, 2)))
    return ScoreOutput(logprobs=logprobs_BT, mask=mask_BT, logits=logits_BTV)
