"""The masked engine one token at a time: decoding, and scoring that must see each step's output."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine import masked
from qs_jax.mechanisms import decide
from qs_jax.mechanisms.plan import Numbers, Plan
from qs_jax.mechanisms.signals import entropy_of
from qs_jax.models import Params, head
from qs_jax.state import LayerRecord, Past, TokenState


class Prompt(NamedTuple):
    """Rows as a program gets them.

    Attributes:
      tokens_BT: Right-padded.
      lengths_B: Valid tokens.
      prompt_lengths_B: Tokens of the prompt; only "continuation" reads it.
      overrides: Of single tokens, or None.
    """

    tokens_BT: Int[Array, "B T"]
    lengths_B: Int[Array, "B"]
    prompt_lengths_B: Int[Array, "B"]
    overrides: decide.Overrides | None


def whole_rows(prompt: Prompt, plan: Plan, numbers: Numbers) -> decide.Rows:
    """All tokens of the rows, from position 0."""
    batch, width = prompt.tokens_BT.shape
    pos_BT = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
    real_BT = pos_BT < prompt.lengths_B[:, None]
    return decide.rows(
        prompt.tokens_BT, pos_BT, real_BT, prompt.prompt_lengths_B, prompt.overrides, plan, numbers
    )


def step(
    params: Params,
    rows: decide.Rows,
    past: Past,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
) -> tuple[Float[Array, "B D"], Float[Array, "B V"], Past]:
    """Run one token a row; returns its normed state, the logits after it and the next past."""
    h_B1D, _, _, following = masked.run(params, rows, model, plan, numbers, past)
    assert following is not None
    logits_BV = head.logits(params, h_B1D[:, 0])
    return h_B1D[:, 0], logits_BV, remember(following, logits_BV, rows.real_BT[:, 0], plan)


def remember(past: Past, logits_BV: Array, live_B: Bool[Array, "B"], plan: Plan) -> Past:
    """Note the output entropy for the next token, where a decision reads it."""
    if not plan.sequential:
        return past
    return past.replace(previous_B=jnp.where(live_B, entropy_of(logits_BV), past.previous_B))


def run_rows(
    params: Params,
    prompt: Prompt,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    capacity: int,
) -> tuple[Float[Array, "B T D"], Past]:
    """Run whole rows token by token, as decoding would; same results as `masked.run`.

    Returns:
      Normed states of every position and the past after the rows.
    """
    whole = whole_rows(prompt, plan, numbers)

    def column(index: Array | int) -> decide.Rows:
        return decide.Rows(
            *(lax.dynamic_index_in_dim(leaf, index, 1, keepdims=True) for leaf in whole)
        )

    first = column(0)
    h_B1D, _, _, past = masked.run(params, first, model, plan, numbers, capacity=capacity)
    assert past is not None
    past = remember(past, head.logits(params, h_B1D[:, 0]), first.real_BT[:, 0], plan)

    def body(past: Past, index: Array):
        h_BD, _, past = step(params, column(index), past, model, plan, numbers)
        return past, h_BD

    past, h_TBD = lax.scan(body, past, jnp.arange(1, prompt.tokens_BT.shape[1], dtype=jnp.int32))
    return jnp.concatenate([h_B1D, jnp.moveaxis(h_TBD, 0, 1)], axis=1), past


def run_prompt(
    params: Params,
    prompt: Prompt,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    capacity: int,
) -> tuple[Float[Array, "B V"], Past]:
    """Prefill: the logits after each row's last token, and the past of the next one."""
    rows_B = jnp.arange(prompt.tokens_BT.shape[0])
    if plan.sequential:
        h_BTD, past = run_rows(params, prompt, model, plan, numbers, capacity)
    else:
        rows = whole_rows(prompt, plan, numbers)
        h_BTD, _, _, kept = masked.run(
            params,
            rows,
            model,
            plan,
            numbers,
            capacity=capacity,
            prompt_lengths_B=prompt.prompt_lengths_B,
        )
        assert kept is not None
        past = kept
    logits_BV = head.logits(params, h_BTD[rows_B, prompt.lengths_B - 1])
    return logits_BV, remember(past, logits_BV, jnp.ones_like(prompt.lengths_B, bool), plan)


def evidence(past: Past) -> dict[str, Any]:
    """What a `Record` is made of, `[L, B, S]` and `[B, S]`."""
    return {
        "layers": past.record,
        "halt_layer": past.halt_layer_BS,
        "hidden_after": past.hidden_after_BS,
        "hidden_from": past.hidden_from_BS,
    }


def evidence_of(state: TokenState, record: LayerRecord) -> dict[str, Any]:
    """The same after whole rows that left no past."""
    return {
        "layers": record,
        "halt_layer": state.halt_layer_BT,
        "hidden_after": state.hidden_after_BT,
        "hidden_from": state.hidden_from_BT,
    }
