"""Token generation: prefill, then one `lax.while_loop` over tokens, in a single program.

`stream` runs the same two pieces, `start` and `advance`, one call a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from qs_jax.config import Config, ModelConfig
from qs_jax.engine import batching, dense, sampling, tokenwise
from qs_jax.engine.checks import check_finite, check_maps, check_params
from qs_jax.engine.overrides import TokenOverrides, arrays_of
from qs_jax.mechanisms import decide
from qs_jax.mechanisms.execution import with_weights
from qs_jax.mechanisms.plan import Numbers, Plan, bind
from qs_jax.models import Params
from qs_jax.record import Record
from qs_jax.state import DecodeState, KVCache, Past


class DecodePlan(NamedTuple):
    """Everything static about one call; calls with equal plans and shapes share a program.

    Attributes:
      new_capacity: M, width of the output buffer, a bucket that holds max_new_tokens.
      stop_ids: Token ids that end a row.
      pad_id: Fills a row after its end.
      sampling: Which filters run.
      mechanisms: Static half of the mechanisms; None is the dense model.
    """

    new_capacity: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: sampling.SamplingPlan
    mechanisms: Plan | None


class DecodeNumbers(NamedTuple):
    """Everything traced about one call but the tokens."""

    max_new_tokens: Int[Array, ""]
    seed: UInt[Array, ""]
    sampling: sampling.SamplingNumbers
    mechanisms: Numbers | None
    overrides: decide.Overrides | None


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
    """

    tokens: Int[np.ndarray, "B M"]
    lengths: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B M"]
    prompt_tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, "B"]
    record: Record | None = None

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


def emit(
    state: DecodeState,
    logits_BV: Float[Array, "B V"],
    numbers: DecodeNumbers,
    plan: DecodePlan,
) -> DecodeState:
    """Choose each row's next token from its logits and note it; ended rows stay as they are."""
    rows = jnp.arange(logits_BV.shape[0])
    keys_B = sampling.row_keys(numbers.seed, logits_BV.shape[0])
    token_B = sampling.choose(
        logits_BV, state.seen_BV, keys_B, state.step, plan.sampling, numbers.sampling
    )
    logprob_B = jax.nn.log_softmax(logits_BV, axis=-1)[rows, token_B]
    live_B = ~state.done_B
    token_B = jnp.where(live_B, token_B, plan.pad_id)
    stop_B = jnp.isin(token_B, jnp.array(plan.stop_ids, jnp.int32))
    seen_BV = state.seen_BV
    if plan.sampling.penalize:
        seen_BV = seen_BV.at[rows, token_B].max(live_B)
    return state.replace(
        step=state.step + 1,
        last_B=token_B,
        done_B=state.done_B | stop_B,
        finite_B=state.finite_B & (state.done_B | jnp.isfinite(logits_BV).all(-1)),
        seen_BV=seen_BV,
        tokens_BM=state.tokens_BM.at[:, state.step].set(token_B),
        logprobs_BM=state.logprobs_BM.at[:, state.step].set(jnp.where(live_B, logprob_B, 0.0)),
        lengths_B=state.lengths_B + live_B,
    )


def start(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    numbers: DecodeNumbers,
    model: ModelConfig,
    plan: DecodePlan,
) -> DecodeState:
    """Run the prompts and choose the first token of each row."""
    batch, width = tokens_BT.shape
    capacity = width + plan.new_capacity
    if plan.mechanisms is None:
        logits_BV, cache = dense.prefill(params, tokens_BT, lengths_B, model, capacity)
    else:
        assert numbers.mechanisms is not None
        prompt = tokenwise.Prompt(tokens_BT, lengths_B, lengths_B, numbers.overrides)
        logits_BV, cache = tokenwise.run_prompt(
            params, prompt, model, plan.mechanisms, numbers.mechanisms, capacity
        )
    seen_BV = jnp.zeros((batch, model.vocab_size if plan.sampling.penalize else 1), bool)
    if plan.sampling.penalize:
        real_BT = jnp.arange(width)[None, :] < lengths_B[:, None]
        seen_BV = seen_BV.at[jnp.arange(batch)[:, None], tokens_BT].max(real_BT)
    state = DecodeState(
        step=jnp.int32(0),
        last_B=jnp.zeros(batch, jnp.int32),
        pos_B=lengths_B,
        done_B=jnp.zeros(batch, bool),
        finite_B=jnp.ones(batch, bool),
        seen_BV=seen_BV,
        tokens_BM=jnp.full((batch, plan.new_capacity), plan.pad_id, jnp.int32),
        logprobs_BM=jnp.zeros((batch, plan.new_capacity), logits_BV.dtype),
        lengths_B=jnp.zeros(batch, jnp.int32),
        cache=cache,
    )
    return emit(state, logits_BV, numbers, plan)


def advance(
    params: Params,
    state: DecodeState,
    numbers: DecodeNumbers,
    model: ModelConfig,
    plan: DecodePlan,
) -> DecodeState:
    """Run each row's last token through the model and choose the next one."""
    if plan.mechanisms is None:
        assert isinstance(state.cache, KVCache)
        logits_BV, cache = dense.decode_step(params, state.last_B, state.pos_B, state.cache, model)
    else:
        assert numbers.mechanisms is not None
        assert isinstance(state.cache, Past)
        nothing_B = jnp.zeros_like(state.pos_B)  # under "continuation" no new token is a subject
        columns = (state.last_B[:, None], state.pos_B[:, None], ~state.done_B[:, None])
        rows = decide.rows(*columns, nothing_B, None, plan.mechanisms, numbers.mechanisms)
        _, logits_BV, cache = tokenwise.step(
            params, rows, state.cache, model, plan.mechanisms, numbers.mechanisms
        )
    moved = state.replace(cache=cache, pos_B=state.pos_B + ~state.done_B)
    return emit(moved, logits_BV, numbers, plan)


def generate_result(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    numbers: DecodeNumbers,
    model: ModelConfig,
    plan: DecodePlan,
) -> dict[str, Any]:
    """The whole call: prompts in, finished rows out, no host in between; the cache is freed."""

    def unfinished(state: DecodeState) -> Array:
        # Two ways to stop: the token budget is used up, or every row has ended.
        return (state.step < numbers.max_new_tokens) & ~state.done_B.all()

    def body(state: DecodeState) -> DecodeState:
        return advance(params, state, numbers, model, plan)

    started = start(params, tokens_BT, lengths_B, numbers, model, plan)
    state = lax.while_loop(unfinished, body, started)
    out: dict[str, Any] = {
        "tokens": state.tokens_BM,
        "lengths": state.lengths_B,
        "logprobs": state.logprobs_BM,
        "finite": state.finite_B,
    }
    if plan.mechanisms is not None:
        assert isinstance(state.cache, Past)
        out["evidence"] = tokenwise.evidence(state.cache)
    return out


_STATIC = ("model", "plan")
jit_generate = jax.jit(generate_result, static_argnames=_STATIC)
jit_start = jax.jit(start, static_argnames=_STATIC)
jit_advance = jax.jit(advance, static_argnames=_STATIC, donate_argnames=("state",))


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
    bound = bind(cfg.quicksilver, model, cfg.effective_protocol)
    if bound is not None:
        check_maps(params, bound[0], model)
    plan = DecodePlan(
        new_capacity=batching.bucket_size(cfg.max_new_tokens),
        stop_ids=cfg.stop_ids,
        pad_id=model.pad_token_id or 0,
        sampling=sampling_plan,
        mechanisms=bound and bound[0],
    )
    numbers = DecodeNumbers(
        max_new_tokens=jnp.int32(cfg.max_new_tokens),
        seed=jnp.uint32(cfg.seed),
        sampling=sampling_numbers,
        mechanisms=bound and bound[1],
        overrides=arrays_of(overrides, padded.tokens_BT.shape, batch.tokens_BT.shape[1], cfg),
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
    out = jax.device_get(jit_generate(params, *padded, numbers, model=cfg.model, plan=plan))
    check_finite(out["finite"])
    record = None
    if "evidence" in out:
        ran_B = batch.lengths_B + np.maximum(out["lengths"] - 1, 0)
        record = Record.of(
            out["evidence"], int(ran_B.max()), ran_B, batch.lengths_B, cfg.effective_protocol
        )
    return GenerateOutput(
        tokens=out["tokens"][:, : cfg.max_new_tokens],
        lengths=out["lengths"],
        logprobs=out["logprobs"][:, : cfg.max_new_tokens],
        prompt_tokens=batch.tokens_BT,
        prompt_lengths=batch.lengths_B,
        record=record,
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
    state = jit_start(params, *padded, numbers, **static)
    ended = np.zeros(len(padded.lengths_B), bool)
    for step in range(cfg.max_new_tokens):
        if step:
            state = jit_advance(params, state, numbers, **static)
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
