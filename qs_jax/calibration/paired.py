"""How much worse than the dense model, on the same windows, and how sure of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qs_jax import accounting
from qs_jax.config import Config
from qs_jax.evaluation.perplexity import (
    cut_windows,
    exp,
    per_window_nll,
    score_windows,
    total_counts,
)
from qs_jax.models import Params

OBJECTIVES = ("exact_flops", "paper_flops", "layer_tokens")


@dataclasses.dataclass(frozen=True)
class Scores:
    """One configuration on some windows.

    Attributes:
      nll_W: Mean negative log-likelihood of each window's scored tokens, in nats.
      tokens_W: How many those are.
      saved: Shares saved, from `qs_jax.accounting.summary`.
    """

    nll_W: Float[np.ndarray, "W"]
    tokens_W: Int[np.ndarray, "W"]
    saved: dict[str, Any]

    @property
    def nll(self) -> float:
        """Of all tokens together."""
        return float((self.nll_W * self.tokens_W).sum() / self.tokens_W.sum())

    @property
    def perplexity(self) -> float:
        """Exp of `nll`; infinite beyond float64."""
        return exp(self.nll) or math.inf

    def saving(self, objective: str) -> float:
        """Share of the dense work saved, by one of `OBJECTIVES`."""
        return float(self.saved[f"{objective}_saved"])


def score_tokens(
    params: Params, tokens_WT: Int[np.ndarray, "W T"], cfg: Config, batch_size: int
) -> Scores:
    """Score windows under a configuration.

    Args:
      params: From `qs_jax.load`.
      tokens_WT: Windows.
      cfg: Mechanisms, protocol and engine.
      batch_size: Windows at a time.
    """
    windows = cut_windows(tokens_WT.reshape(-1).tolist(), tokens_WT.shape[1])
    entries = list(score_windows(params, windows, cfg, batch_size=batch_size))
    return Scores(*per_window_nll(entries), accounting.summary(total_counts(entries)))


def ppl_increase(scores: Scores, dense: Scores) -> float:
    """Perplexity less that of the dense model."""
    return scores.perplexity - dense.perplexity


def upper_bound(scores: Scores, dense: Scores, confidence: float) -> float:
    """One-sided confidence bound on the perplexity increase, windows being the sample.

    The differences in mean negative log-likelihood, window by window, are taken as a sample of a
    Student-t mean: what makes a window hard for both plays no part. The dense perplexity that turns
    the bound into perplexity is that of these windows.

    Args:
      scores: Of the mechanisms.
      dense: Of the same windows.
      confidence: Between 0 and 1.

    Returns:
      The bound; infinite for a single window.
    """
    from scipy.stats import t

    change_W = (scores.nll_W - dense.nll_W) * dense.tokens_W / dense.tokens_W.mean()
    count = len(change_W)
    if count < 2:
        return math.inf
    error = change_W.std(ddof=1) / math.sqrt(count)
    highest = change_W.mean() + float(t.ppf(confidence, count - 1)) * error
    grown = exp(float(highest)) or math.inf
    return dense.perplexity * (grown - 1)
