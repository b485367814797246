"""Token generation: prefill, then a loop over tokens.

The decode engine (`decode.py`) runs prefill, packing and the loop as programs of their own; the
masked engine is one program. `stream` runs the same pieces, one call a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config
from qs_jax.engine import batching, decode, pack, sampling, token_loop
from qs_jax.engine.cache import cache_bytes
from qs_jax.engine.checks import check_finite, check_maps, check_overflow, check_params
from qs_jax.engine.overrides import TokenOverrides, arrays_of
from qs_jax.engine.schedule import arrange, bind_call, uses_compact
from qs_jax.engine.token_loop import DecodeNumbers, DecodePlan
from qs_jax.halves import bits_of
from qs_jax.mechanisms.execution import with_weights
from qs_jax.models import Params
from qs_jax.record import Record


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns; B rows, M = max_new_tokens columns.

    Attributes:
      tokens: int32 `[B, M]`, the new tokens only, the end token included; padding after it.
      lengths: int32 `[B]`, new tokens of each row.
      logprobs: float32 `[B, M]`, log-probability of each new token as the model ran, before
        temperature, filters and penalties, in nats; 0 in the padding.
      prompt_tokens: int32 `[B, T]`, the right-padded prompts.
      prompt_lengths: int32 `[B]`.
      record: What the mechanisms did to every token that was run: the prompt and all new tokens but
        the last of each row. None for the dense model.
      kv_bytes: Bytes the KV cache took at the end of the call, which is its largest size. The
        prompt's own full cache, which the decode engine packs and frees after prefill, is not in
        it.
    """

    tokens: Int[np.ndarray, "B M"]
    lengths: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B M"]
    prompt_tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    record: Record | None = None
    kv_bytes: int = 0

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and continuation of each row, without padding."""
        return [
            self.prompt_tokens[row, : self.prompt_lengths[row]].tolist()
            + self.tokens[row, : self.lengths[row]].tolist()
            for row in range(len(self.tokens))
        ]


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """One token a row.

    Attributes:
      tokens: int32 `[B]`; the pad id for rows that had ended before.
      logprobs: float32 `[B]`, as in `GenerateOutput`.
      is_new: bool `[B]`, the row produced a token in this step.
      done: bool `[B]`, the row has ended.
    """

    tokens: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B"]
    is_new: Bool[np.ndarray, "B"]
    done: Bool[np.ndarray, "B"]


def _prepare(
    params: Params,
    tokens: batching.TokensLike,
    cfg: Config,
    lengths: Any,
    attention_mask: Any,
    overrides: TokenOverrides | None,
) -> tuple[batching.Batch, batching.Batch, DecodeNumbers, DecodePlan]:
    """The batch as given, the batch as padded to its bucket, and the two halves of the call."""
    model = cfg.model
    batch, padded = batching.prepare_batch(
        tokens,
        model,
        new_tokens=cfg.max_new_tokens,
        lengths=lengths,
        attention_mask=attention_mask,
    )
    sampling_plan, sampling_numbers = sampling.plan_of(cfg)
    fast = cfg.engine != "masked"
    bound = bind_call(cfg, "decode" if fast else "masked")
    chosen = arrays_of(overrides, padded.tokens_BT.shape, batch.tokens_BT.shape[1], cfg)
    schedule = cut = None
    if bound is not None:
        check_maps(params, bound[0], model)
        if uses_compact(cfg):
            schedule, cut = arrange(cfg, padded, padded.lengths_B, chosen, bound[0])
    plan = DecodePlan(
        new_capacity=batching.bucket_size(cfg.max_new_tokens),
        stop_ids=cfg.stop_ids,
        pad_id=model.pad_token_id or 0,
        sampling=sampling_plan,
        mechanisms=bound and bound[0],
        segments=pack.segments(cfg, bound and bound[0], len(padded.lengths_B)) if fast else (),
        schedule=schedule,
    )
    numbers = DecodeNumbers(
        max_new_tokens=jnp.int32(cfg.max_new_tokens),
        seed=jnp.uint32(cfg.seed),
        sampling=sampling_numbers,
        mechanisms=bound and bound[1],
        overrides=chosen,
        segments=cut,
    )
    return batch, padded, numbers, plan


def generate(
    params: Params,
    tokens: batching.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
) -> GenerateOutput:
    """Continue every row until an end token or `cfg.max_new_tokens`.

    A row's result depends neither on padding nor on the other rows.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, one row `[T]`, or rows of different lengths.
      cfg: Model, mechanisms and their protocol, budget and sampling.
      lengths: `[B]` valid tokens of each right-padded row.
      attention_mask: `[B, T]`, true for real tokens; left or right padding.
      overrides: What to do with single tokens of the prompts, whatever their signals say.

    Returns:
      The new tokens, their count and log-probabilities, and the record of the mechanisms.

    Raises:
      ConfigError: The parameters are another model's, or the maps a policy needs are missing.
      InputError: Tokens cannot be used, or prompt + budget exceed the position limit.
      NonFiniteError: The model produced NaN or infinite logits.
    """
    check_params(params, cfg.model)
    batch, padded, numbers, plan = _prepare(params, tokens, cfg, lengths, attention_mask, overrides)
    params = with_weights(params, plan.mechanisms)
    static = {"model": cfg.model, "plan": plan}
    if plan.segments:
        results, kv_bytes = decode.generate(params, padded, numbers, cfg, plan)
    else:
        results = token_loop.jit_generate(bits_of(params), *padded, numbers, **static)
        kv_bytes = cache_bytes(pack.full_cache(cfg.model, padded.tokens_BT.shape, plan))
    out = jax.device_get(results)
    check_finite(out["finite"])
    check_overflow(out["overflow"])
    record = None
    if "evidence" in out:
        ran_B = batch.lengths_B + np.maximum(out["lengths"] - 1, 0)
        record = Record.of(
            out["evidence"],
            int(ran_B.max()),
            ran_B,
            batch.lengths_B,
            cfg.effective_protocol,
            simulated=plan.schedule is None,
        )
    return GenerateOutput(
        tokens=out["tokens"][:, : cfg.max_new_tokens],
        lengths=out["lengths"],
        logprobs=out["logprobs"][:, : cfg.max_new_tokens],
        prompt_tokens=batch.tokens_BT,
        prompt_lengths=batch.lengths_B,
        record=record,
        kv_bytes=kv_bytes,
    )


def stream(
    params: Params,
    tokens: batching.TokensLike,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    attention_mask: Any = None,
    overrides: TokenOverrides | None = None,
) -> Iterator[StreamStep]:
    """`generate`, one token a row at a time: same arguments, same tokens.

    Input is checked by the call itself, before the first step is asked for.

    Returns:
      An iterator that ends when every row has ended or the budget is used up.

    Raises:
      InputError: As `generate`.
      NonFiniteError: As `generate`, while iterating.
    """
    check_params(params, cfg.model)
    _, padded, numbers, plan = _prepare(params, tokens, cfg, lengths, attention_mask, overrides)
    params = with_weights(params, plan.mechanisms)
    return _stream(params, padded, numbers, cfg, plan)


def _stream(
    params: Params,
    padded: batching.Batch,
    numbers: DecodeNumbers,
    cfg: Config,
    plan: DecodePlan,
) -> Iterator[StreamStep]:
    static = {"model": cfg.model, "plan": plan}
    state = token_loop.jit_start(bits_of(params), *padded, numbers, **static)
    check_overflow(bool(state.overflow))
    rows = len(padded.lengths_B)
    decoder = decode.Decoder(params, numbers, cfg, plan, rows) if plan.segments else None
    ended = np.zeros(rows, bool)
    for step in range(cfg.max_new_tokens):
        if step and decoder is not None:
            state = decoder.advance(state)
        elif step:
            state = token_loop.jit_advance(bits_of(params), state, numbers, **static)
        token, logprob, done, finite = jax.device_get(
            (state.last_B, _column(state.logprobs_BM, step), state.done_B, state.finite_B)
        )
        check_finite(finite)
        yield StreamStep(tokens=token, logprobs=logprob, is_new=~ended, done=done)
        ended = done
        if done.all():
            return


@jax.jit
def _column(array_BM: Array, step: Array) -> Array:
    return lax.dynamic_index_in_dim(array_BM, step, axis=1, keepdims=False)
