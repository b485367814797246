"""Choosing the next token.

Which filters run is static; their numbers are arrays, so a sweep over them compiles once.
The order is the one Hugging Face uses: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from qs_jax.config import Config


class SamplingPlan(NamedTuple):
    """The static part: what the program contains.

    Attributes:
      greedy: Take the most likely token.
      penalize: Apply the repetition penalty.
      shortlist: How many of the largest logits are sorted for top-k (a power of two >= top_k); 0
        when there is no top-k.
      nucleus: Apply top-p.
    """

    greedy: bool
    penalize: bool
    shortlist: int
    nucleus: bool


class SamplingNumbers(NamedTuple):
    """The traced part, all scalars: see `Config`."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def plan_of(cfg: Config) -> tuple[SamplingPlan, SamplingNumbers]:
    """Split a `Config` into its static and its traced part."""
    vocab = cfg.model.vocab_size
    top_k = min(cfg.top_k or vocab, vocab)
    greedy = cfg.temperature == 0
    plan = SamplingPlan(
        greedy=greedy,
        penalize=cfg.repetition_penalty != 1.0,
        shortlist=0 if greedy or top_k == vocab else min(1 << (top_k - 1).bit_length(), vocab),
        nucleus=not greedy and cfg.top_p is not None and cfg.top_p < 1.0,
    )
    numbers = SamplingNumbers(
        temperature=jnp.float32(cfg.temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(1.0 if cfg.top_p is None else cfg.top_p),
        repetition_penalty=jnp.float32(cfg.repetition_penalty),
    )
    return plan, numbers


def penalize(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones by it."""
    changed_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, changed_BV, logits_BV)


def filter_logits(
    logits_BV: Float[Array, "B V"], plan: SamplingPlan, numbers: SamplingNumbers
) -> Float[Array, "B V"]:
    """Logits after temperature, top-k and top-p, with -inf where a token is filtered out.

    Top-k keeps every token at least as likely as the k-th. Top-p keeps the smallest set of most
    likely tokens that holds the probability; tokens as likely as its last one are kept too. The
    most likely token always survives.
    """
    # Relative to the largest, so that no temperature, however low, divides anything into infinity
    # but what is out of reach anyway.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / numbers.temperature
    if plan.shortlist:
        best_BC = jax.lax.top_k(logits_BV, plan.shortlist)[0]
        least_B1 = jax.lax.dynamic_index_in_dim(best_BC, numbers.top_k - 1, axis=1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if plan.nucleus:
        prob_BV = jax.nn.softmax(logits_BV, axis=-1)
        least_B = nucleus_threshold(prob_BV, numbers.top_p)
        logits_BV = jnp.where(prob_BV >= least_B[:, None], logits_BV, -jnp.inf)
    return logits_BV


def nucleus_threshold(prob_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B"]:
    """The largest probability t such that the tokens with probability >= t hold `top_p` together.

    A bisection over float32 bit patterns, which are ordered as the non-negative numbers they stand
    for: exact after 31 halvings, and ten times faster than sorting a vocabulary.
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = (
            bounds  # tokens >= low hold top_p; tokens >= high do not, or high is above all
        )
        middle_B = low_B + (high_B - low_B) // 2
        at_least_BV = prob_BV >= jax.lax.bitcast_convert_type(middle_B, jnp.float32)[:, None]
        enough_B = jnp.where(at_least_BV, prob_BV, 0.0).sum(-1) >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    largest_B = prob_BV.max(axis=-1)
    high_B = jax.lax.bitcast_convert_type(largest_B, jnp.int32) + 1
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high_B), high_B))
    threshold_B = jax.lax.bitcast_convert_type(low_B, jnp.float32)
    return jnp.minimum(threshold_B, largest_B)


def row_keys(seed: UInt[Array, ""], batch: int) -> Array:
    """One PRNG key a row, so that a row's draws do not depend on its batch mates."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def choose(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B _"],
    keys_B: Array,
    step: Int[Array, ""],
    plan: SamplingPlan,
    numbers: SamplingNumbers,
) -> Int[Array, "B"]:
    """The next token of each row.

    Args:
      logits_BV: float32 logits of the plain model.
      seen_BV: Ids of prompt and continuation; any width when the penalty is off.
      keys_B: From `row_keys`.
      step: Index of the token, folded into the keys.
      plan: What runs.
      numbers: With which numbers.
    """
    if plan.penalize:
        logits_BV = penalize(logits_BV, seen_BV, numbers.repetition_penalty)
    if plan.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    filtered_BV = filter_logits(logits_BV, plan, numbers)
    return jax.vmap(jax.random.categorical)(step_keys_B, filtered_BV).astype(jnp.int32)
