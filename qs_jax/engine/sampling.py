"""Choosing the next token.

Which filters run is static; their numbers are arrays, so a sweep over them compiles once.
The order is the one Hugging Face uses: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import Config


class SamplingPlan(NamedTuple):
    """The static part: what the program contains.

    Attributes:
      greedy: Take the most likely token.
      penalize: Apply the repetition penalty.
      shortlist: Most likely ids kept for sampling (a power of two >= top_k); 0 for all.
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


def candidates(
    logits_BV: Float[Array, "B V"], plan: SamplingPlan, numbers: SamplingNumbers
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Logits left after temperature, top-k and top-p (-inf where filtered), and their token ids.

    Without filters the candidates are the whole vocabulary in id order; otherwise they are sorted,
    most likely first, and the first one always survives.
    """
    logits_BV = logits_BV / numbers.temperature
    vocab = logits_BV.shape[-1]
    if not plan.shortlist and not plan.nucleus:
        ids_BV = jnp.broadcast_to(jnp.arange(vocab)[None, :], logits_BV.shape)
        return logits_BV, ids_BV
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, plan.shortlist or vocab)
    rank_1C = jnp.arange(logits_BC.shape[-1])[None, :]
    logits_BC = jnp.where(rank_1C < numbers.top_k, logits_BC, -jnp.inf)
    if plan.nucleus:
        prob_BC = jax.nn.softmax(logits_BC, axis=-1)
        before_BC = jnp.cumsum(prob_BC, axis=-1) - prob_BC
        kept_BC = (before_BC < numbers.top_p) | (rank_1C == 0)
        logits_BC = jnp.where(kept_BC, logits_BC, -jnp.inf)
    return logits_BC, ids_BC


def row_keys(seed: Int[Array, ""], batch: int) -> Array:
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
    logits_BC, ids_BC = candidates(logits_BV, plan, numbers)
    step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
    pick_B = jax.vmap(jax.random.categorical)(step_keys_B, logits_BC)
    return jnp.take_along_axis(ids_BC, pick_B[:, None], axis=1)[:, 0].astype(jnp.int32)
