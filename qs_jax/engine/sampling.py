"""Choosing the next token.

Which filters run is static; their numbers are arrays, so a sweep over them compiles once.
The order is the one Hugging Face uses: repetition penalty, the caller's own processors,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from qs_jax.config import Config
from qs_jax.state import NEVER


class Plan(NamedTuple):
    """The static part: what the program contains.

    Attributes:
      capacity: M, width of the output buffer.
      shortlist: How many of the largest logits are sorted for top-k (a power of two >= top_k); 0
        when there is no top-k.
      nucleus: Apply top-p.
      cutoff: Apply min-p.
      processors: `Config.logits_processors`.
      keeps_history: `Text.history_BS` is there.
    """

    capacity: int
    stop_ids: tuple[int, ...]
    pad_id: int
    greedy: bool
    penalize: bool
    shortlist: int
    nucleus: bool
    cutoff: bool
    processors: tuple[Callable[..., Array], ...]
    keeps_history: bool


class Numbers(NamedTuple):
    """The traced part: scalars (`qs_jax.config.Sampling`), and the table of stop strings, or None.

    See `stops.stop_table`.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]
    seed: UInt[Array, ""]
    stop_XV: Any


class SoFar(NamedTuple):
    """What logits processors get beside the logits.

    Attributes:
      tokens_BS: int32, prompt and new tokens of each row, then anything.
      lengths_B: int32, how many.
    """

    tokens_BS: Int[Array, "B S"]
    lengths_B: Int[Array, "B"]


@no_type_check
class Text(flax.struct.PyTreeNode):
    """What was produced so far.

    Attributes:
      last_B: Token of each row that has not been run through the model yet, at `pos_B`.
      start_B: Tokens of its prompt.
      done_B: The row has ended.
      finite_B: Every logit of the row was finite so far.
      seen_BV: Token ids of the prompt and continuation (repetition penalty), V = 1 when unused.
      lengths_B: Tokens each row has produced, the end token included; the next one's column.
      history_BS: Token at each position; None where nothing reads it.
      stop_B: State of each row in the table of stop strings; None without.
    """

    last_B: Int[Array, "B"]
    start_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    finite_B: Bool[Array, "B"]
    seen_BV: Bool[Array, "B V"]
    tokens_BM: Int[Array, "B M"]
    logprobs_BM: Float[Array, "B M"]
    lengths_B: Int[Array, "B"]
    history_BS: Any
    stop_B: Any

    @property
    def pos_B(self) -> Int[Array, "B"]:
        """Position of the last token, and so the number of those that were run."""
        return self.start_B + self.lengths_B - 1

    def going(self, limit: Any) -> Bool[Array, "B"]:
        """Rows that have not ended and have fewer than `limit` tokens."""
        return ~self.done_B & (self.lengths_B < limit)


def plan_of(cfg: Config, capacity: int, stop_XV: Any = None) -> tuple[Plan, Numbers]:
    """Split a `Config` into its static and its traced part, with a table of stop strings."""
    sampling, vocab = cfg.sampling, cfg.model.vocab_size
    top_k = min(sampling.top_k or vocab, vocab)
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    greedy = sampling.temperature < least  # zero in float32

    def number(value: float) -> Array:
        return jnp.float32(min(max(value, least), most))

    plan = Plan(
        capacity=capacity,
        stop_ids=cfg.stop_ids,
        pad_id=cfg.model.pad_token_id or 0,
        greedy=greedy,
        penalize=sampling.repetition_penalty != 1.0,
        shortlist=0 if greedy or top_k == vocab else min(1 << (top_k - 1).bit_length(), vocab),
        nucleus=not greedy and sampling.top_p < 1.0,
        cutoff=not greedy and sampling.min_p > 0.0,
        processors=cfg.logits_processors,
        keeps_history=cfg.speculate is not None or bool(cfg.logits_processors),
    )
    numbers = Numbers(
        temperature=number(sampling.temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(sampling.top_p),
        min_p=jnp.float32(sampling.min_p),
        repetition_penalty=number(sampling.repetition_penalty),
        seed=jnp.uint32(cfg.seed),
        stop_XV=None if stop_XV is None else jnp.asarray(stop_XV),
    )
    return plan, numbers


def begin(
    tokens_BT: Array, lengths_B: Array, logits_BV: Array, numbers: Numbers, plan: Plan
) -> Text:
    """Choose the first token of each row from the logits after its prompt."""
    batch, width = tokens_BT.shape
    seen_BV = jnp.zeros((batch, logits_BV.shape[1] if plan.penalize else 1), bool)
    if plan.penalize:
        real_BT = jnp.arange(width)[None, :] < lengths_B[:, None]
        seen_BV = seen_BV.at[jnp.arange(batch)[:, None], tokens_BT].max(real_BT)
    text = Text(
        last_B=jnp.zeros(batch, jnp.int32),
        start_B=lengths_B,
        done_B=jnp.zeros(batch, bool),
        finite_B=jnp.ones(batch, bool),
        seen_BV=seen_BV,
        tokens_BM=jnp.full((batch, plan.capacity), plan.pad_id, jnp.int32),
        logprobs_BM=jnp.zeros((batch, plan.capacity), logits_BV.dtype),
        lengths_B=jnp.zeros(batch, jnp.int32),
        history_BS=jnp.pad(tokens_BT, ((0, 0), (0, plan.capacity))) if plan.keeps_history else None,
        stop_B=None if numbers.stop_XV is None else jnp.zeros(batch, jnp.int32),
    )
    return emit(text, logits_BV, jnp.ones(batch, bool), numbers, plan)


def emit(
    text: Text,
    logits_BV: Float[Array, "B V"],
    live_B: Bool[Array, "B"],
    numbers: Numbers,
    plan: Plan,
) -> Text:
    """Choose each live row's next token from its logits and note it; others stay as they are."""
    rows = jnp.arange(logits_BV.shape[0])
    keys_B = row_keys(numbers.seed, logits_BV.shape[0])
    so_far = SoFar(text.history_BS, text.start_B + text.lengths_B) if plan.processors else None
    given = (text.seen_BV, keys_B, text.lengths_B, plan, numbers, so_far)
    token_B = choose(logits_BV, *given)
    logprob_B = jax.nn.log_softmax(logits_BV, axis=-1)[rows, token_B]
    ends_B = jnp.isin(token_B, jnp.array(plan.stop_ids, jnp.int32))
    more = {}
    if text.stop_B is not None:
        state_B = numbers.stop_XV[text.stop_B, token_B]
        ends_B |= state_B == len(numbers.stop_XV) - 1
        more["stop_B"] = jnp.where(live_B, state_B, text.stop_B)
    if text.history_BS is not None:
        to_B = jnp.where(live_B, text.start_B + text.lengths_B, NEVER)
        more["history_BS"] = text.history_BS.at[rows, to_B].set(token_B, mode="drop")
    seen_BV = text.seen_BV.at[rows, token_B].max(live_B) if plan.penalize else text.seen_BV
    at_B = jnp.where(live_B, text.lengths_B, plan.capacity)  # past the end: dropped
    return text.replace(
        last_B=jnp.where(live_B, token_B, text.last_B),
        done_B=text.done_B | (live_B & ends_B),
        finite_B=text.finite_B & (~live_B | jnp.isfinite(logits_BV).all(-1)),
        seen_BV=seen_BV,
        tokens_BM=text.tokens_BM.at[rows, at_B].set(token_B, mode="drop"),
        logprobs_BM=text.logprobs_BM.at[rows, at_B].set(logprob_B, mode="drop"),
        lengths_B=text.lengths_B + live_B,
        **more,
    )


def penalize(logits_BV: Array, seen_BV: Array, penalty: Array) -> Array:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones by it."""
    changed_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    limits = jnp.finfo(logits_BV.dtype)  # two infinities could not be compared
    return jnp.where(seen_BV, jnp.clip(changed_BV, limits.min, limits.max), logits_BV)


def filter_logits(logits_BV: Array, plan: Plan, numbers: Numbers) -> Array:
    """Logits after temperature, top-k, top-p and min-p, with -inf where a token is filtered out.

    Tokens as likely as the last one that is kept are kept too.
    """
    # Relative to the largest: a low temperature makes nothing infinite that is within reach.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / numbers.temperature
    if plan.shortlist:
        best_BC = jax.lax.top_k(logits_BV, plan.shortlist)[0]
        least_B1 = jax.lax.dynamic_index_in_dim(best_BC, numbers.top_k - 1, axis=1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if plan.nucleus:
        prob_BV = jax.nn.softmax(logits_BV, axis=-1)
        least_B = nucleus_threshold(prob_BV, numbers.top_p)
        logits_BV = jnp.where(prob_BV >= least_B[:, None], logits_BV, -jnp.inf)
    if plan.cutoff:  # the largest logit is 0, and no filter takes it
        logits_BV = jnp.where(logits_BV >= jnp.log(numbers.min_p), logits_BV, -jnp.inf)
    return logits_BV


def nucleus_threshold(prob_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B"]:
    """The largest probability t such that the tokens with probability >= t hold `top_p` together.

    A bisection over float32 bit patterns, which are ordered as the non-negative numbers they stand
    for: exact after 31 halvings, and ten times faster than sorting a vocabulary.
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds  # tokens >= low hold top_p; those >= high do not, if there are any
        middle_B = low_B + (high_B - low_B) // 2
        at_least_BV = prob_BV >= jax.lax.bitcast_convert_type(middle_B, jnp.float32)[:, None]
        enough_B = jnp.where(at_least_BV, prob_BV, 0.0).sum(-1) >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    largest_B = prob_BV.max(axis=-1)
    high_B = jax.lax.bitcast_convert_type(largest_B, jnp.int32) + 1
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high_B), high_B))
    threshold_B = jax.lax.bitcast_convert_type(low_B, jnp.float32)
    return jnp.minimum(threshold_B, largest_B)


def first_largest(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax`, in two passes that XLA on CPU makes vector code of; 0 among numbers that are none.

    It takes a half to a quarter of the time.
    """
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    largest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
    found_B = jnp.where(largest_BV, ids_V, NEVER).min(-1)
    return jnp.where(found_B == NEVER, 0, found_B)


def row_keys(seed: UInt[Array, ""], batch: int) -> Array:
    """One PRNG key a row, so that a row's draws do not depend on its batch mates."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def choose(
    logits_BV: Array,
    seen_BV: Array,
    keys_B: Array,
    step_B: Array,
    plan: Plan,
    numbers: Numbers,
    so_far: SoFar | None = None,
) -> Array:
    """The next token of each row, its `step_B`th, which is folded into the row's key.

    `so_far` is for the processors of the plan.
    """
    if plan.penalize:
        logits_BV = penalize(logits_BV, seen_BV, numbers.repetition_penalty)
    for process in plan.processors:
        logits_BV = process(logits_BV, so_far).astype(logits_BV.dtype)
    if plan.greedy:
        return first_largest(logits_BV)
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, step_B)
    filtered_BV = filter_logits(logits_BV, plan, numbers)
    return jax.vmap(jax.random.categorical)(step_keys_B, filtered_BV).astype(jnp.int32)
