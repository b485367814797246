"""Scoring rows of any length in batches: prompts, and what follows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qs_jax import accounting
from qs_jax.config import Config
from qs_jax.engine.devices import Devices, place
from qs_jax.engine.score import ScoreOutput, score
from qs_jax.errors import InputError, NonFiniteError
from qs_jax.mechanisms.kv_maps import sizes_of
from qs_jax.models import Params

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt, and of what follows it


class ScoredBatch(NamedTuple):
    """Number of each row of a batch, its score, and its tally: prompts are "prefill"."""

    index: list[int]
    out: ScoreOutput
    counts: dict[str, Any]


def score_rows(
    params: Params,
    pairs: Sequence[Pair],
    cfg: Config,
    *,
    batch_size: int,
    batches: Sequence[int] | None = None,
    devices: Devices | None = None,
    return_states: bool = False,
) -> Iterator[ScoredBatch]:
    """Score rows longest first, so that little is padding; `batches` are indices, None is all.

    Under "continuation" the mechanisms act on the prompts; under "teacher-forced" on every token.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}.")
    params = place(params, devices)
    continued, sizes = cfg.effective_protocol == "continuation", sizes_of(params)
    rows = [[*prompt, *after] for prompt, after in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for batch in range(-(-len(rows) // batch_size)) if batches is None else batches:
        index = order[batch * batch_size : (batch + 1) * batch_size]
        prompts_B = np.array([len(pairs[i][0]) for i in index])
        options: dict[str, Any] = {"return_states": return_states, "devices": devices}
        options["prompt_lengths"] = prompts_B if continued else None
        try:
            out = score(params, [rows[i] for i in index], cfg, **options)
        except NonFiniteError as error:
            raise NonFiniteError(f"in the batch of rows {index}, {error}") from error
        if out.record is None:
            lengths_B = np.array([len(rows[i]) for i in index])
            counts = accounting.dense_tally(lengths_B, prompts_B, cfg.model)
        else:
            # Whatever the protocol, a prompt is read out at its end only.
            record = dataclasses.replace(out.record, prompt_lengths=prompts_B)
            counts = accounting.tally(record, cfg.model, cfg.quicksilver, sizes)
        yield ScoredBatch(index, out, counts)
