"""The sentence of the paper's Table 5 on this model: what each token went through."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

import qs_jax
from benchmarks.paper_quotes import SENTENCE_5
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.models import Params


def walk(
    params: Params,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    qs: QuickSilverConfig,
) -> dict[str, Any]:
    """Score the sentence teacher-forced.

    Returns:
      "tokens": for each its "text", "depth" (layers run), "kv_layers" (layers that hold its keys at
      the end), "bits", and "fused_into", the position of the token that stands for it, or None.
    """
    ids = np.asarray(tokenizer(SENTENCE_5).input_ids, np.int32)[None]
    cfg = Config(model, qs, protocol="teacher-forced", engine="masked")
    record = qs_jax.score(params, ids, cfg).record
    assert record is not None
    into = record.representative[0]
    tokens = [
        {
            "text": tokenizer.decode([int(token)]),
            "depth": int(record.depth[0, at]),
            "kv_layers": int(record.kv_held[:, 0, at].sum()),
            "bits": int(record.bits[-1, 0, at]),
            "fused_into": int(into[at]) if into[at] != at else None,
        }
        for at, token in enumerate(ids[0])
    ]
    return {"layers": model.num_layers, "tokens": tokens, "quicksilver": qs.to_dict()}
