"""The loop over tokens: choose one, run it, and so on; the masked engine's and what all share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from qs_jax.config import ModelConfig
from qs_jax.engine import compact, dense, sampling, tokenwise
from qs_jax.mechanisms import decide
from qs_jax.mechanisms.plan import Numbers, Plan
from qs_jax.models import Params
from qs_jax.state import DecodeState, KVCache, Past


class DecodePlan(NamedTuple):
    """Everything static about one call; calls with equal plans and shapes share a program.

    Attributes:
      new_capacity: M, width of the output buffer, a bucket that holds max_new_tokens.
      stop_ids: Token ids that end a row.
      pad_id: Fills a row after its end.
      sampling: Which filters run.
      mechanisms: Static half of the mechanisms; None is the dense model.
      segments: Layers of each segment of the decode engine; none for the masked engine.
      unroll: Layers per iteration of the dense model's scan over a prompt.
      schedule: How the compact engine cuts the prompts; None where the masked engine runs them.
    """

    new_capacity: int
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: sampling.SamplingPlan
    mechanisms: Plan | None
    segments: tuple[int, ...] = ()
    unroll: int = 1
    schedule: compact.Schedule | None = None


class DecodeNumbers(NamedTuple):
    """Everything traced about one call but the tokens."""

    max_new_tokens: Int[Array, ""]
    seed: UInt[Array, ""]
    sampling: sampling.SamplingNumbers
    mechanisms: Numbers | None
    overrides: decide.Overrides | None
    segments: compact.Segments | None = None


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
    # The decode engine packs the prompt's cache next: room for new tokens comes with that.
    capacity = width if plan.segments else width + plan.new_capacity
    overflow = jnp.zeros((), bool)
    if plan.mechanisms is None:
        logits_BV, cache = dense.prefill(params, tokens_BT, lengths_B, model, capacity, plan.unroll)
    else:
        assert numbers.mechanisms is not None
        prompt = tokenwise.Prompt(tokens_BT, lengths_B, lengths_B, numbers.overrides)
        halves = (plan.mechanisms, numbers.mechanisms)
        if plan.schedule is None:
            logits_BV, cache = tokenwise.run_prompt(params, prompt, model, *halves, capacity)
        else:
            assert numbers.segments is not None
            cut = (plan.schedule, numbers.segments)
            logits_BV, cache, overflow = compact.run_prompt(
                params, prompt, model, *halves, *cut, capacity
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
        overflow=overflow,
        full=jnp.zeros((), bool),
        cache=cache,
    )
    return emit(state, logits_BV, numbers, plan)


def next_rows(state: DecodeState, plan: Plan, numbers: Numbers) -> decide.Rows:
    """Each row's last token, as the mechanisms see it."""
    nothing_B = jnp.zeros_like(state.pos_B)  # under "continuation" no new token is a subject
    columns = (state.last_B[:, None], state.pos_B[:, None], ~state.done_B[:, None])
    return decide.rows(*columns, nothing_B, None, plan, numbers)


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
        rows = next_rows(state, plan.mechanisms, numbers.mechanisms)
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
    return results(state)


def results(state: DecodeState) -> dict[str, Any]:
    """What the host reads at the end."""
    out: dict[str, Any] = {
        "tokens": state.tokens_BM,
        "lengths": state.lengths_B,
        "logprobs": state.logprobs_BM,
        "finite": state.finite_B,
        "overflow": state.overflow,
    }
    if isinstance(state.cache, Past):
        out["evidence"] = tokenwise.evidence(state.cache)
    return out


_STATIC = ("model", "plan")
jit_generate = jax.jit(generate_result, static_argnames=_STATIC)
jit_start = jax.jit(start, static_argnames=_STATIC)
jit_advance = jax.jit(advance, static_argnames=_STATIC, donate_argnames=("state",))
