"""The mechanisms once more, in plain NumPy: loops over tokens and layers, no masks, no scan.

Tests hold the engines against it. It follows docs/concepts.md and docs/mechanisms and shares no
code with `qs_jax.engine` and `qs_jax.mechanisms`. Under "teacher-forced" it takes one token through
all layers before it looks at the next, as a decoder does, so it cannot look ahead; under
"continuation" it takes all tokens through one layer, because the quota ranks a whole prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qs_jax.config import Config
from tests.oracle.model import TINY, OracleModel
from tests.oracle.row import NEVER, Judge, Row


@dataclasses.dataclass(frozen=True)
class OracleOutput:
    """Logits, and the fields of `qs_jax.record.Record` with the same meaning.

    Padding holds zeros. `drift` and `entropy` are nan where the oracle computed none.

    Attributes:
      logits: float64 `[B, T, V]`.
      margin: Smallest distance of any signal to the threshold it was compared with. Where it is
        below the rounding errors of what is tested, a different decision is no mistake.
    """

    logits: np.ndarray
    active: np.ndarray
    kv_written: np.ndarray
    kv_held: np.ndarray
    visible_keys: np.ndarray
    bits: np.ndarray
    fused: np.ndarray
    drift: np.ndarray
    entropy: np.ndarray
    weighed: np.ndarray
    depth: np.ndarray
    representative: np.ndarray
    margin: float


def oracle_score(
    params: dict[str, Any],
    tokens: Sequence[Sequence[int]] | np.ndarray,
    cfg: Config,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    overrides: Any = None,
) -> OracleOutput:
    """What `qs_jax.score` should compute, with the same arguments.

    Args:
      params: From `qs_jax.load`; "kv_maps" may hold the maps of `fit_kv_maps`.
      tokens: int `[B, T]`, or rows of different lengths.
      cfg: Model, mechanisms and protocol.
      lengths: `[B]` valid tokens of each right-padded row.
      prompt_lengths: `[B]`, "continuation" only; by default all but the last
        `cfg.continuation_tokens`.
      overrides: Anything with `full_processing`, `forced_halt` and `retain_kv`, each `[B, T]` or
        None.

    Returns:
      Logits and records, each `[..., T]` as wide as the longest row.

    Raises:
      ValueError: Bits that need the whole batch and the previous token's output at once.
    """
    net, judge, rows = OracleModel(params, cfg.model), Judge(), []
    for b, listed in enumerate(tokens):
        ids = [int(token) for token in listed][: None if lengths is None else int(lengths[b])]
        prompt = len(ids) - cfg.continuation_tokens
        prompt = prompt if prompt_lengths is None else int(prompt_lengths[b])
        row = Row(net, params.get("kv_maps"), cfg, judge, ids, prompt)
        for t in range(len(ids)):
            row.override(t, *(_given(overrides, name, b, t) for name in _OVERRIDES))
        rows.append(row)

    qs = cfg.quicksilver
    whole_batch = qs is not None and qs.amq is not None and qs.amq.normalization == "minmax"
    spots = [(row, t) for row in rows for t in range(row.count)]
    if whole_batch or not rows[0].online:
        if qs is not None and "final_prev" in qs.entropies:
            raise ValueError("final_prev needs the token before to be done, min-max all of them.")
        passes = [spots]
    else:
        passes = [[spot] for spot in spots]
    for together in passes:
        for layer in range(1, cfg.model.num_layers + 1):
            _run_layer(together, layer)
    return _output(rows, judge.margin)


_OVERRIDES = ("full_processing", "forced_halt", "retain_kv")


def _given(overrides: Any, name: str, b: int, t: int) -> int:
    array = getattr(overrides, name, None)
    return 0 if array is None else int(np.asarray(array)[b, t])


def _assign_bits(spots: list[tuple[Row, int]]) -> None:
    row, _ = spots[0]
    qs, judge, amq = row.qs, row.judge, row.qs.amq
    assert amq is not None
    spots = [(row, t) for row, t in spots if row.touched[t]]
    kind = amq.entropy
    values = [
        0.0 if kind is None else row.uncertainty(kind, row.merged[amq.layer, t], t)
        for row, t in spots
    ]
    if values and amq.normalization == "minmax":
        low, high = min(values), max(values)
        values = [(value - low) / max(high - low, TINY) for value in values]
    elif kind is not None and amq.normalization == "log_vocab":
        model = row.model
        outcomes = {"shortlist": qs.shortlist_size, "latent": model.hidden_size}
        values = [value / math.log(outcomes.get(kind, model.vocab_size)) for value in values]
    for (row, t), value in zip(spots, values, strict=True):
        if row.full[t] or judge.above(value, amq.tau_high):
            row.bits[t] = 8
        else:
            row.bits[t] = 2 if judge.below(value, amq.tau_low) else 4


def _run_layer(spots: list[tuple[Row, int]], layer: int) -> None:
    for row, t in spots:
        row.block(t, layer)
        row.pick_shortlist(t, layer)
    chosen: dict[int, list[int]] = {}
    for row, t in spots:
        quota = row.qs.halting is not None and row.qs.halting.rule == "quota"
        if id(row) not in chosen:
            ranks = quota and row.may_halt(layer)
            chosen[id(row)] = row.lowest_scores(layer) if ranks else []
        row.maybe_halt(t, layer, chosen[id(row)])
    for row, t in spots:
        row.fuse(t, layer)
    amq = spots[0][0].qs.amq
    if amq is not None and layer == amq.layer:
        _assign_bits(spots)
    for row, t in spots:
        row.close(t, layer)
        if layer == row.depth:
            row.logits[t] = row.net.logits(row.state[layer, t])
    halting = spots[0][0].qs.halting
    if halting is not None and halting.light_from == layer + 1 and halting.light_share < 1:
        for row in {id(row): row for row, _ in spots}.values():
            row.leave_whole()


def _output(rows: list[Row], margin: float) -> OracleOutput:
    depth, batch, width = rows[0].depth, len(rows), max(row.count for row in rows)
    names = "active kv_written kv_held visible_keys bits fused drift entropy weighed".split()
    kinds = [bool, bool, bool, int, int, int, float, float, bool]
    layers = {
        name: np.zeros((depth, batch, width), kind) for name, kind in zip(names, kinds, strict=True)
    }
    tokens = {name: np.zeros((batch, width), int) for name in ("depth", "representative")}
    logits = np.zeros((batch, width, rows[0].model.vocab_size))
    for b, row in enumerate(rows):
        logits[b, : row.count] = row.logits
        for t in range(row.count):
            tokens["depth"][b, t] = row.halt[t]
            tokens["representative"][b, t] = row.resolved(depth, t)
            for layer in range(1, depth + 1):
                for name, value in _evidence(row, t, layer).items():
                    layers[name][layer - 1, b, t] = value
    return OracleOutput(logits=logits, **layers, **tokens, margin=margin)


def _evidence(row: Row, t: int, layer: int) -> dict[str, Any]:
    others = [i for i in range(t + 1, row.count) if row.seen[layer, i, t]]
    needed = row.halt[t] >= layer or row.kept(t, layer) or len(others) > 0
    written = not row.stopped(t, layer) and needed
    return {
        "active": row.ran[layer, t],
        "kv_written": written,
        "kv_held": written and not (row.absorber[1:layer, t] < NEVER).any(),
        "visible_keys": row.seen[layer, t].sum(),
        "bits": row.bits_at(t, layer),
        "fused": row.resolved(layer - 1, t),
        "drift": row.drifted(t, layer, row.qs.halting.drift) if row.qs.halting else np.nan,
        "entropy": row.entropy[layer, t],
        "weighed": row.weighed[layer, t],
    }
