"""Everything the paper says about words, for one configuration, as plain JSON types."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from qs_jax.config import Config, ModelConfig
from qs_jax.evaluation.linguistics.align import Aligned
from qs_jax.evaluation.linguistics.measures import (
    fusion_by_layer,
    halting_by_class,
    prediction_change,
)
from qs_jax.evaluation.linguistics.observe import Observed

_PAPER_DEPTH, _PAPER_HALTING, _PAPER_FUSION = 30, 15, (12, 15, 20)


def describe(aligned: Aligned) -> dict[str, Any]:
    """What was read, and how its tokens lie on its words."""
    first, last = aligned.touched_WT
    words_per_token = Counter((last - first + 1).clip(0).ravel().tolist())
    inside = first <= last
    return {
        "corpus": aligned.text.name,
        "tag_set": aligned.text.tag_set,
        "parsed": aligned.text.phrases is not None,
        "words_in_corpus": len(aligned.text.tags),
        "words": int(last[inside].max() + 1 - first[inside].min()) if inside.any() else 0,
        "windows": len(aligned.windows.tokens_WT),
        "seq_len": aligned.windows.tokens_WT.shape[1],
        "tokens": int(aligned.windows.tokens_WT.size),
        "tokens_sha256": aligned.windows.sha256,
        "tokens_by_words_touched": {str(k): words_per_token[k] for k in sorted(words_per_token)},
    }


def study(aligned: Aligned, dense: Observed, observed: Observed, cfg: Config) -> dict[str, Any]:
    """Halting, fusion and predictions of one run.

    Args:
      aligned: What was scored.
      dense: Run without mechanisms, under the same protocol.
      observed: Run with them.
      cfg: Its configuration.

    Returns:
      "halting", "fusion" (None without fusion or without parses), "prediction"; "protocol",
      "simulated" and the losses of both runs.
    """
    assert cfg.quicksilver is not None
    fuses = cfg.quicksilver.fusion is not None and aligned.text.phrases is not None
    scored_WT = dense.scored_WT
    return {
        "protocol": cfg.effective_protocol,
        "simulated": observed.simulated,
        "tokens_scored": int(scored_WT.sum()),
        "tokens_open": int(observed.open_WT.sum()),
        "dense_nll": float(dense.nll_WT[scored_WT].mean(dtype=np.float64)),
        "nll": float(observed.nll_WT[scored_WT].mean(dtype=np.float64)),
        "middle_layer": middle_layer(cfg.model),
        "halting": halting_by_class(aligned, observed, middle_layer(cfg.model)),
        "fusion": fusion_by_layer(aligned, observed, fusion_layers(cfg.model)) if fuses else None,
        "prediction": prediction_change(aligned, dense, observed),
    }


def middle_layer(model: ModelConfig) -> int:
    """The paper's layer 15 of 30, at this model's depth."""
    return scaled(_PAPER_HALTING, model)


def fusion_layers(model: ModelConfig) -> tuple[int, ...]:
    """The paper's layers 12, 15 and 20 of 30, at this model's depth, and the last layer."""
    layers = {scaled(layer, model) for layer in _PAPER_FUSION}
    return tuple(sorted(layers | {model.num_layers}))


def scaled(layer: int, model: ModelConfig) -> int:
    """A layer of the paper's 30, at this model's depth."""
    return max(round(layer / _PAPER_DEPTH * model.num_layers), 1)
