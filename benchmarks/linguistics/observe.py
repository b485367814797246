"""What a model predicts over an aligned text, and what the mechanisms do there."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

import qs_jax
from benchmarks.linguistics.align import Aligned
from qs_jax.config import Config
from qs_jax.models import Params
from qs_jax.record import Record


@dataclasses.dataclass(frozen=True)
class Observed:
    """Predictions and decisions of a run. W windows of T tokens.

    Attributes:
      nll_WT: Negative log-likelihood of each token, in nats; 0 where nothing is scored.
      right_WT: It was the model's first choice.
      scored_WT: It was scored.
      open_WT: The mechanisms could act on it: it is no padding, sink, special or protected token,
        nor one of the last of a prompt. False everywhere for the dense model.
      depth_WT: Layers it ran before it halted; all of them if it did not.
      fused_LWT: Its representative after each layer; itself if it has none.
    """

    nll_WT: Float[np.ndarray, "W T"]
    right_WT: Bool[np.ndarray, "W T"]
    scored_WT: Bool[np.ndarray, "W T"]
    open_WT: Bool[np.ndarray, "W T"]
    depth_WT: Int[np.ndarray, "W T"]
    fused_LWT: Int[np.ndarray, "L W T"]


def observe(params: Params, aligned: Aligned, cfg: Config, batch_size: int) -> Observed:
    """Score all windows, `batch_size` at a time; the logits of a batch are held at once."""
    tokens_WT = aligned.windows.tokens_WT
    parts = [
        _observe_batch(params, tokens_WT[begin : begin + batch_size], cfg)
        for begin in tqdm(range(0, len(tokens_WT), batch_size), unit="batch", leave=False)
    ]
    # Windows are the last axis but one.
    return Observed(**{name: np.concatenate([p[name] for p in parts], -2) for name in parts[0]})


def _observe_batch(
    params: Params, tokens_BT: Int[np.ndarray, "B T"], cfg: Config
) -> dict[str, np.ndarray]:
    out = qs_jax.score(params, tokens_BT, cfg, return_logits=True)
    assert out.logits is not None
    right_BT = np.zeros(tokens_BT.shape, bool)
    right_BT[:, 1:] = out.logits[:, :-1].argmax(-1) == tokens_BT[:, 1:]
    right_BT &= out.mask
    predictions = {"nll_WT": -out.logprobs, "right_WT": right_BT, "scored_WT": out.mask}
    record, layers = out.record, cfg.model.num_layers
    if record is None:
        itself_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return predictions | {
            "open_WT": np.zeros(tokens_BT.shape, bool),
            "depth_WT": np.full(tokens_BT.shape, layers),
            "fused_LWT": np.broadcast_to(itself_BT, (layers, *tokens_BT.shape)),
        }
    return predictions | {
        "open_WT": open_tokens(record, tokens_BT, cfg),
        "depth_WT": record.depth,
        # Row l of `fused` is in force in layer l + 1: it is what stood after layer l.
        "fused_LWT": np.concatenate([record.fused[1:], record.representative[None]]),
    }


def open_tokens(
    record: Record, tokens_BT: Int[np.ndarray, "B T"], cfg: Config
) -> Bool[np.ndarray, "B T"]:
    """Tokens that may halt or fuse if their signals say so."""
    qs, model = cfg.quicksilver, cfg.model
    assert qs is not None
    special = (model.bos_token_id, model.pad_token_id, *model.eos_token_ids)
    exempt = {*qs.protect_ids, *(special if qs.protect_special else ())} - {None}
    column_1T = np.arange(tokens_BT.shape[1])[None]
    open_BT = record.subject & (column_1T >= qs.sink_tokens)
    open_BT &= ~np.isin(tokens_BT, sorted(exempt))
    if record.protocol == "continuation":
        ends_B = record.prompt_lengths
        open_BT &= column_1T < (ends_B - qs.recent_of(ends_B))[:, None]
    return open_BT
