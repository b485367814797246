"""Scoring many rows of different lengths: sorted, in full batches, under any protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qs_jax import accounting
from qs_jax.config import Config
from qs_jax.engine.score import ScoreOutput, score
from qs_jax.errors import InputError
from qs_jax.mechanisms.kv_maps import MapSizes, sizes_of
from qs_jax.models import Params
from qs_jax.record import Record

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt, and of what follows it


class ScoredBatch(NamedTuple):
    """Some of the rows.

    Attributes:
      index: Which of the rows, in the order of `out`; `out` may hold more rows behind them.
      out: Of `score`.
      counts: Tally of `qs_jax.accounting`: the prompts are "prefill", what follows is "decode".
    """

    index: list[int]
    out: ScoreOutput
    counts: dict[str, Any]


def score_rows(
    params: Params,
    pairs: Sequence[Pair],
    cfg: Config,
    *,
    batch_size: int,
    devices: Sequence[jax.Device] | None = None,
    return_states: bool = False,
) -> Iterator[ScoredBatch]:
    """Score rows longest first, so that little is padding.

    Under "continuation" the mechanisms act on the prompts; under "teacher-forced" on every token.
    A last batch is filled up with copies, so that it needs no program of its own.

    Args:
      params: From `qs_jax.load`; with several devices, of `qs_jax.replicate`.
      pairs: What to score; a prompt has at least one token.
      cfg: Model, mechanisms and protocol.
      batch_size: Rows at a time.
      devices: Split each batch over these; None is the default device.
      return_states: As `score`.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}.")
    continued = cfg.effective_protocol == "continuation"
    sizes = sizes_of(params)
    rows = [[*prompt, *after] for prompt, after in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for at in range(0, len(order), batch_size):
        index = order[at : at + batch_size]
        filled = index + index[-1:] * (min(batch_size, len(order)) - len(index))
        prompts_B = np.array([len(pairs[i][0]) for i in filled])
        lengths_B = np.array([len(rows[i]) for i in index])
        out = score(
            params,
            [rows[i] for i in filled],
            cfg,
            prompt_lengths=prompts_B if continued else None,
            return_states=return_states,
            devices=devices,
        )
        counts = _count(out, lengths_B, prompts_B[: len(index)], cfg, sizes)
        yield ScoredBatch(index, out, counts)


def _count(
    out: ScoreOutput,
    lengths_B: np.ndarray,
    prompts_B: np.ndarray,
    cfg: Config,
    sizes: MapSizes | None,
) -> dict[str, Any]:
    if out.record is None:
        return accounting.dense_tally(lengths_B, prompts_B, cfg.model)
    # Whatever the protocol, a prompt is read out at its end only.
    record = dataclasses.replace(_first(out.record, len(lengths_B)), prompt_lengths=prompts_B)
    return accounting.tally(record, cfg.model, cfg.quicksilver, sizes)


def _first(record: Record, count: int) -> Record:
    """The record of the first rows."""
    cut = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            cut[field.name] = value[:, :count] if value.ndim == 3 else value[:count]
    return dataclasses.replace(record, **cut)
