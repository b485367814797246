"""How far a configuration is from the dense model on some windows, and what it saves there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax import accounting
from qs_jax.config import Config
from qs_jax.evaluation.perplexity import check_width, exp, per_window_nll, total_counts
from qs_jax.evaluation.rows import score_rows
from qs_jax.models import Params, head


@dataclasses.dataclass(frozen=True)
class Scores:
    """One configuration on some windows, each with N scored tokens.

    Attributes:
      nll_W: Mean negative log-likelihood of a window's scored tokens, in nats.
      tokens_W: Their number.
      saved: Shares of the dense work, by every account of `qs_jax.accounting`.
      states_WND: What the head reads before each; of the dense model only.
      kl_W: Mean KL divergence from the dense model, in nats; zeros for itself.
      agreement: Share of tokens at which both prefer the same next token.
    """

    nll_W: Float[np.ndarray, "W"]
    tokens_W: Int[np.ndarray, "W"]
    saved: dict[str, Any]
    states_WND: Any = None
    kl_W: Any = None
    agreement: float = 1.0

    @property
    def perplexity(self) -> float:
        """Of all tokens together; infinite beyond float64."""
        nll = (self.nll_W * self.tokens_W).sum() / self.tokens_W.sum()
        return exp(float(nll)) or math.inf

    @property
    def kl(self) -> float:
        """Mean KL divergence from the dense model over all tokens, in nats."""
        return 0.0 if self.kl_W is None else float(self.kl_W.mean())

    def part(self, windows: slice) -> Scores:
        """The same measures on some of the windows, but for shares, which are of all."""
        kl_W = None if self.kl_W is None else self.kl_W[windows]
        some = (self.nll_W[windows], self.tokens_W[windows])
        return dataclasses.replace(self, nll_W=some[0], tokens_W=some[1], kl_W=kl_W)


def score_tokens(
    params: Params,
    tokens_WT: Int[np.ndarray, "W T"],
    cfg: Config,
    batch_size: int,
    dense: Scores | None = None,
) -> Scores:
    """Score windows under a configuration, `batch_size` at a time, against the dense model's."""
    width = tokens_WT.shape[1]
    check_width(width, cfg)
    prompt = width - cfg.continuation_tokens if cfg.effective_protocol == "continuation" else 0
    pairs = [(row[:prompt], row[prompt:]) for row in tokens_WT.tolist()]
    first, entries, states, apart = max(prompt, 1) - 1, [], [], []
    for batch in score_rows(params, pairs, cfg, batch_size=batch_size, return_states=True):
        assert batch.out.states is not None
        read_BND = batch.out.states[:, first : width - 1]
        if dense is None:
            states.append(np.asarray(read_BND))
        else:
            assert dense.states_WND is not None
            both = (np.asarray(read_BND), dense.states_WND[np.asarray(batch.index)])
            apart.append(jax.device_get(_compare(params, *both)))
        nll_B = -batch.out.logprobs.sum(axis=1, dtype=np.float64)
        tokens_B = batch.out.mask.sum(axis=1)
        entries.append({"nll": nll_B.tolist(), "tokens": tokens_B.tolist(), "counts": batch.counts})
    found = (*per_window_nll(entries), accounting.summary(total_counts(entries)))
    if dense is None:
        return Scores(*found, states_WND=np.concatenate(states))
    kl_WN, same_WN = (np.concatenate(part) for part in zip(*apart, strict=True))
    return Scores(*found, kl_W=kl_WN.mean(1, dtype=np.float64), agreement=float(same_WN.mean()))


@jax.jit
def _compare(params: Params, h_BND: Array, dense_BND: Array) -> tuple[Array, Array]:
    """KL divergence from the dense model, in nats, and whether both prefer the same token."""

    def compare(h_BCD: Array, dense_BCD: Array) -> Array:
        now, dense = (head.logits(params, x) for x in (h_BCD, dense_BCD))
        now, dense = jax.nn.log_softmax(now), jax.nn.log_softmax(dense)
        kl_BC = (jnp.exp(dense) * (dense - now)).sum(-1)
        same_BC = now.argmax(-1) == dense.argmax(-1)
        return jnp.stack([kl_BC, same_BC.astype(kl_BC.dtype)], axis=-1)

    vocab = head.head_table(params).shape[0]
    both_BN2 = head.map_positions(compare, 2 * vocab, h_BND, dense_BND)
    return both_BN2[..., 0], both_BN2[..., 1]


def upper_bound(scores: Scores, dense: Scores, confidence: float) -> float:
    """One-sided confidence bound on the perplexity increase, windows being the sample.

    A Student-t bound on the mean difference in negative log-likelihood, window by window (what
    makes a window hard for both plays no part), as perplexity. It is infinite for a single window.
    """
    from scipy.stats import sem, t

    change_W = (scores.nll_W - dense.nll_W) * dense.tokens_W / dense.tokens_W.mean()
    count = len(change_W)
    if count < 2:
        return math.inf
    highest = change_W.mean() + float(t.ppf(confidence, count - 1)) * sem(change_W)
    return dense.perplexity * ((exp(float(highest)) or math.inf) - 1)
