"""The paper's grid over the two entropy thresholds of AMQ, and its utility (E.9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from qs_jax.calibration import paired
from qs_jax.config import AMQConfig, Config, QuickSilverConfig
from qs_jax.errors import ConfigError
from qs_jax.models import Params

LOWS = (0.2, 0.25, 0.3, 0.35, 0.4)
HIGHS = (0.5, 0.55, 0.6, 0.65, 0.7)
WEIGHT = 15.0  # the paper's lambda


@dataclasses.dataclass(frozen=True)
class BitsPoint:
    """One pair of thresholds.

    Attributes:
      tau_low: Below it, 2 bits.
      tau_high: Above it, 8 bits; between them, 4.
      ppl_increase: Over the same layers at 8 bits for all.
      paper_flops_saved: By the paper's account, over 8 bits for all: its FLOPs are relative to
        those, so 8 bits save nothing.
      exact_flops_saved: Of the dense model; negative by what the entropies cost.
      utility: WEIGHT * paper_flops_saved - ppl_increase.
    """

    tau_low: float
    tau_high: float
    ppl_increase: float
    paper_flops_saved: float
    exact_flops_saved: float
    utility: float


def amq_grid(
    params: Params,
    tokens_WT: Int[np.ndarray, "W T"],
    cfg: Config,
    *,
    lows: Sequence[float] = LOWS,
    highs: Sequence[float] = HIGHS,
    weight: float = WEIGHT,
    amq: AMQConfig | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> list[BitsPoint]:
    """Score every pair of thresholds; one program, as thresholds are numbers to it.

    Args:
      params: From `qs_jax.load`.
      tokens_WT: Windows.
      cfg: Model and protocol; its mechanisms play no part.
      lows: Candidates for `tau_low`.
      highs: For `tau_high`.
      weight: What a whole saving is worth in perplexity, the paper's lambda.
      amq: Everything but the thresholds; by default from the middle layer on, by logit-lens
        entropy over log V, with the group of the presets.
      batch_size: Windows at a time.
      progress: Show a progress bar.

    Returns:
      The points, the best utility first.

    Raises:
      ConfigError: A low threshold is not below a high one.
    """
    if not lows or not highs or max(lows) > min(highs):
        raise ConfigError(f"every low threshold must be below every high one: {lows}, {highs}.")
    middle = max(cfg.model.num_layers // 2, 1)
    if amq is None:
        amq = AMQConfig(layer=middle, normalization="log_vocab", tau_low=lows[0], tau_high=highs[0])
    uniform = AMQConfig.uniform(
        8,
        layer=amq.layer,
        targets=amq.targets,
        group=amq.group,
        symmetric=amq.symmetric,
        rotate=amq.rotate,
        execution=amq.execution,
    )
    cfg = cfg.replace(engine="masked")

    def scored(setting: AMQConfig) -> paired.Scores:
        qs = QuickSilverConfig(amq=setting)
        return paired.score_tokens(params, tokens_WT, cfg.replace(quicksilver=qs), batch_size)

    base = scored(uniform)
    pairs = [(low, high) for low in lows for high in highs]
    found = []
    for low, high in tqdm(pairs, "bits", disable=not progress):
        scores = scored(dataclasses.replace(amq, tau_low=low, tau_high=high))
        increase, saved = paired.ppl_increase(scores, base), scores.saving("paper_flops")
        found.append(
            BitsPoint(
                tau_low=low,
                tau_high=high,
                ppl_increase=increase,
                paper_flops_saved=saved,
                exact_flops_saved=scores.saving("exact_flops"),
                utility=weight * saved - increase,
            )
        )
    return sorted(found, key=lambda point: -point.utility)
