"""Running a model over an aligned text, dense or with mechanisms, and keeping what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from qs_jax.config import Config
from qs_jax.engine.scoring import score
from qs_jax.evaluation.linguistics.align import Aligned
from qs_jax.models import Params
from qs_jax.record import Record


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a model predicted and what the mechanisms did. W windows of T tokens.

    Attributes:
      nll_WT: Negative log-likelihood of each token, in nats; 0 where nothing is scored.
      right_WT: It was the model's first choice.
      scored_WT: It was scored.
      open_WT: The mechanisms could act on it: it is no padding, sink, special or protected token,
        nor one of the last of a prompt. False everywhere for the dense model.
      depth_WT: Layers it ran before it halted; all of them if it did not.
      kv_layers_WT: Layers in which its keys and values were written.
      bits_WT: Bits of its activations in the last layer.
      fused_LWT: Its representative after each layer; itself if it has none.
      layers: Of the model.
      simulated: Every token was computed; the decisions only selected.
    """

    nll_WT: Float[np.ndarray, "W T"]
    right_WT: Bool[np.ndarray, "W T"]
    scored_WT: Bool[np.ndarray, "W T"]
    open_WT: Bool[np.ndarray, "W T"]
    depth_WT: Int[np.ndarray, "W T"]
    kv_layers_WT: Int[np.ndarray, "W T"]
    bits_WT: Int[np.ndarray, "W T"]
    fused_LWT: Int[np.ndarray, "L W T"]
    layers: int
    simulated: bool = False


def observe(
    params: Params, aligned: Aligned, cfg: Config, *, batch_size: int
) -> Iterator[Observed]:
    """Score batch after batch of windows.

    Needs `4 * batch_size * T * V` bytes for the logits, from which the first choices are read.

    Args:
      params: From `qs_jax.load`.
      aligned: What to score.
      cfg: Model, mechanisms and protocol.
      batch_size: Windows at a time.
    """
    tokens_WT = aligned.windows.tokens_WT
    for begin in range(0, len(tokens_WT), batch_size):
        tokens_BT = tokens_WT[begin : begin + batch_size]
        out = score(params, tokens_BT, cfg, return_logits=True)
        assert out.logits is not None
        right_BT = np.zeros(tokens_BT.shape, bool)
        right_BT[:, 1:] = out.logits[:, :-1].argmax(-1) == tokens_BT[:, 1:]
        yield _observed(out.record, tokens_BT, cfg, -out.logprobs, right_BT, out.mask)


def together(parts: list[Observed]) -> Observed:
    """All batches as one."""
    first = parts[0]
    names = [field.name for field in dataclasses.fields(Observed) if field.name.endswith("WT")]
    # Windows are the last axis but one.
    joined = {name: np.concatenate([getattr(part, name) for part in parts], -2) for name in names}
    return dataclasses.replace(first, **joined)


def _observed(
    record: Record | None,
    tokens_BT: np.ndarray,
    cfg: Config,
    nll_BT: np.ndarray,
    right_BT: np.ndarray,
    scored_BT: np.ndarray,
) -> Observed:
    layers = cfg.model.num_layers
    itself_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    told = {"nll_WT": nll_BT, "right_WT": right_BT & scored_BT, "scored_WT": scored_BT}
    if record is None:
        whole_BT = np.full(tokens_BT.shape, layers)
        return Observed(
            **told,
            open_WT=np.zeros(tokens_BT.shape, bool),
            depth_WT=whole_BT,
            kv_layers_WT=whole_BT,
            bits_WT=np.full(tokens_BT.shape, 16),
            fused_LWT=np.broadcast_to(itself_BT, (layers, *tokens_BT.shape)),
            layers=layers,
        )
    return Observed(
        **told,
        open_WT=open_tokens(record, tokens_BT, cfg),
        depth_WT=record.depth,
        kv_layers_WT=record.kv_written.sum(0),
        bits_WT=record.bits[-1],
        # Row l of `fused` is in force in layer l + 1: it is what stood after layer l.
        fused_LWT=np.concatenate([record.fused[1:], record.representative[None]]),
        layers=layers,
        simulated=record.simulated,
    )


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
        open_BT &= column_1T < record.prompt_lengths[:, None] - max(qs.recent_tokens, 1)
    return open_BT
