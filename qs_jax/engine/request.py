"""A call of generation, ready to run: its rows, checked and joined with what a cache holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from qs_jax.config import Config
from qs_jax.engine import inputs, sampling
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.engine.prompt_cache import PromptCache
from qs_jax.mechanisms import Mechanisms, Overrides
from qs_jax.models import Params


class Request(NamedTuple):
    """A call, ready to run.

    Attributes:
      batch: Whole prompts, what a cache holds of them included.
      padded: The same, padded to their bucket.
      prompts_B: Tokens of each row that the mechanisms act on under "continuation".
      cache: Of the first tokens of each row; None where there is none.
      mesh: Devices that rows and parameters are split over; None for one.
    """

    params: Params
    batch: inputs.Batch
    padded: inputs.Batch
    prompts_B: np.ndarray
    overrides: Overrides | None
    mech: Mechanisms
    numbers: sampling.Numbers
    plan: sampling.Plan
    cfg: Config
    cache: PromptCache | None
    mesh: Mesh | None


class Rows(NamedTuple):
    """Checked rows of a call: whole prompts, and what the mechanisms act on."""

    batch: inputs.Batch
    padded: inputs.Batch
    prompts_B: np.ndarray
    overrides: Overrides | None


def new_rows(
    given: inputs.Batch,
    cfg: Config,
    prompt_lengths: Any,
    overrides: TokenOverrides | None,
    repeats: int,
) -> Rows:
    """Rows that no cache begins."""
    prompts_B = given.lengths_B
    if prompt_lengths is not None:
        prompts_B = inputs.split_prompts(given.lengths_B, prompt_lengths, cfg)
    batch, padded = inputs.pad_batch(given, cfg.model, cfg.max_new_tokens)
    shape, width = padded.tokens_BT.shape, batch.tokens_BT.shape[1]
    chosen = inputs.override_arrays(overrides, shape, width, cfg)
    if chosen is not None:
        chosen = Overrides(*(np.repeat(array, repeats, axis=0) for array in chosen))
    rows = (
        repeat_rows(batch, repeats),
        repeat_rows(padded, repeats),
        np.repeat(prompts_B, repeats),
    )
    return Rows(*rows, chosen)


def continued_rows(cache: PromptCache, more: inputs.Batch, cfg: Config) -> Rows:
    """Rows that a cache begins."""
    ends = zip(cache.tokens, cache.lengths, more.tokens_BT, more.lengths_B, strict=True)
    whole = [[*old[:a].tolist(), *new[:b].tolist()] for old, a, new, b in ends]
    joined = inputs.make_batch(whole, cfg.model)
    batch, padded = inputs.pad_batch(joined, cfg.model, cfg.max_new_tokens)
    continues = cfg.effective_protocol == "continuation"
    prompts_B = cache.prompt_lengths if continues else batch.lengths_B
    chosen = cache.overrides
    if chosen is not None:
        chosen = inputs.widen_overrides(chosen, padded.tokens_BT.shape[1])
    return Rows(batch, padded, prompts_B, chosen)


def repeat_rows(batch: inputs.Batch, repeats: int) -> inputs.Batch:
    """Each row so many times."""
    return inputs.Batch(*(np.repeat(array, repeats, axis=0) for array in batch))
