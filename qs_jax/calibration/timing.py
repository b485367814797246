"""What a preset's saving is in seconds, on this machine and now."""

from __future__ import annotations

import time
from statistics import median

import jax
import numpy as np
from jaxtyping import Int

from qs_jax.config import Config
from qs_jax.engine.generate import generate
from qs_jax.engine.scoring import score
from qs_jax.models import Params


def time_saved(
    params: Params, tokens_WT: Int[np.ndarray, "W T"], cfg: Config, runs: int = 3
) -> float:
    """Share of the dense time that the compact engine saves on the work that was scored.

    Under "continuation" that is the prefill of the prompts, else the scoring of whole windows.
    Both are called in turn (A B A B) after a warm-up each; the share is 1 less the median of the
    ratios of neighbours. Of calls as a user makes them: checks and records included.

    Args:
      params: With the maps that the mechanisms read.
      tokens_WT: Windows of one batch.
      cfg: Mechanisms and protocol.
      runs: Of each.
    """
    continued = cfg.effective_protocol == "continuation"
    rows_WT = (
        tokens_WT[:, : tokens_WT.shape[1] - cfg.continuation_tokens] if continued else tokens_WT
    )
    fast = cfg.replace(engine="compact", max_new_tokens=1, eos_token_ids=())
    dense = fast.replace(quicksilver=None)

    def seconds(one: Config) -> float:
        began = time.perf_counter()
        jax.block_until_ready((generate if continued else score)(params, rows_WT, one).logprobs)
        return time.perf_counter() - began

    for one in (dense, fast):
        seconds(one)
    pairs = [(seconds(dense), seconds(fast)) for _ in range(runs)]
    return 1 - median(after / before for before, after in pairs)
