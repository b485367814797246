"""Halting by word class, fused pairs against constituents, and what it did to predictions.

Counts come with the 95 % Wilson interval of a share, which takes tokens for independent draws.
Differences between two runs over the same tokens come with an interval from the spread between
windows (ratio estimator, Student t), since tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from scipy.stats import binomtest, t

from benchmarks.linguistics.align import NO_WORD, ORDER, Aligned
from benchmarks.linguistics.constituents import held_by_phrases
from benchmarks.linguistics.observe import Observed
from qs_jax.config import Config, ModelConfig

_PAPER_DEPTH, _PAPER_HALTING, _PAPER_FUSION = 30, 15, (12, 15, 20)


def study(aligned: Aligned, dense: Observed, observed: Observed, cfg: Config) -> dict[str, Any]:
    """Halting, fusion and predictions of one run.

    Args:
      aligned: What was scored.
      dense: Run without mechanisms, under the same protocol.
      observed: Run with them, in the masked engine.
      cfg: Its configuration.

    Returns:
      "halting", "fusion" (None without fusion or without parses), "prediction", the losses of both
      runs and what they are of.
    """
    assert cfg.quicksilver is not None
    fuses = cfg.quicksilver.fusion is not None and aligned.text.phrases is not None
    scored_WT, middle = dense.scored_WT, at_depth(_PAPER_HALTING, cfg.model)
    return {
        "protocol": cfg.effective_protocol,
        "simulated": True,
        "tokens_scored": int(scored_WT.sum()),
        "tokens_open": int(observed.open_WT.sum()),
        "dense_nll": float(dense.nll_WT[scored_WT].mean(dtype=np.float64)),
        "nll": float(observed.nll_WT[scored_WT].mean(dtype=np.float64)),
        "middle_layer": middle,
        "halting": halting_by_class(aligned, observed, middle),
        "fusion": fusion_by_layer(aligned, observed, fusion_layers(cfg.model)) if fuses else None,
        "prediction": prediction_change(aligned, dense, observed),
    }


def at_depth(layer: int, model: ModelConfig) -> int:
    """A layer of the paper's 30, at this model's depth."""
    return max(round(layer / _PAPER_DEPTH * model.num_layers), 1)


def fusion_layers(model: ModelConfig) -> tuple[int, ...]:
    """The paper's layers 12, 15 and 20 of 30, at this model's depth, and the last layer."""
    return tuple(sorted({*(at_depth(layer, model) for layer in _PAPER_FUSION), model.num_layers}))


def share(hits: int, count: int) -> dict[str, Any]:
    """A share with its 95 % Wilson interval; None where there is nothing to count."""
    if count == 0:
        return {"hits": 0, "count": 0, "share": None, "interval": None}
    ends = binomtest(int(hits), int(count)).proportion_ci(method="wilson")
    interval = [float(ends.low), float(ends.high)]
    return {"hits": int(hits), "count": int(count), "share": hits / count, "interval": interval}


def mean_change(
    change_WT: np.ndarray, chosen_WT: Bool[np.ndarray, "W T"]
) -> tuple[float | None, list[float] | None]:
    """Mean of the chosen entries, with its 95 % interval over windows, or None for either."""
    count_W = chosen_WT.sum(1)
    count_W, sum_W = (x[count_W > 0] for x in (count_W, np.where(chosen_WT, change_WT, 0).sum(1)))
    windows, total = len(count_W), count_W.sum()
    if windows == 0:
        return None, None
    mean = float(sum_W.sum() / total)
    if windows == 1:
        return mean, None
    spread = ((sum_W - mean * count_W) ** 2).sum() * windows / (windows - 1)
    half = float(t.ppf(0.975, windows - 1)) * math.sqrt(spread) / total
    return mean, [float(mean - half), float(mean + half)]


def halting_by_class(
    aligned: Aligned, observed: Observed, middle: int
) -> dict[str, dict[str, Any]]:
    """Halting rate and depth of each class, over open tokens (paper Tables 2 and 12, M).

    Returns:
      For each scheme and class: "halted" (depth below the number of layers) and "halted_by_middle"
      as shares, and "mean_depth".
    """
    return {
        scheme: {
            name: _halting(observed, (classes_WT == name) & observed.open_WT, middle)
            for name in ORDER[scheme]
        }
        for scheme, classes_WT in aligned.schemes().items()
    }


def _halting(observed: Observed, chosen_WT: Bool[np.ndarray, "W T"], middle: int) -> dict[str, Any]:
    depth_N, layers = observed.depth_WT[chosen_WT], len(observed.fused_LWT)
    return {
        "halted": share((depth_N < layers).sum(), len(depth_N)),
        "halted_by_middle": share((depth_N <= middle).sum(), len(depth_N)),
        "mean_depth": float(depth_N.mean()) if len(depth_N) else None,
    }


class Pairs(NamedTuple):
    """Pairs of tokens: the window, and an earlier and a later position in it."""

    window_P: Int[np.ndarray, "P"]
    earlier_P: Int[np.ndarray, "P"]
    later_P: Int[np.ndarray, "P"]


def fused_pairs(fused_WT: Int[np.ndarray, "W T"]) -> Pairs:
    """The pairs of a fused-index map: each absorbed token with the next one of its super-token.

    Where only adjacent tokens fuse, these are the pairs (t, t + 1) that fused.
    """
    order_WT = np.argsort(fused_WT, axis=1, kind="stable")
    kept_WT = np.take_along_axis(fused_WT, order_WT, axis=1)
    window_P, at_P = np.nonzero(kept_WT[:, 1:] == kept_WT[:, :-1])
    return Pairs(window_P, order_WT[window_P, at_P], order_WT[window_P, at_P + 1])


def fusion_by_layer(aligned: Aligned, observed: Observed, layers: Sequence[int]) -> dict[str, Any]:
    """How many fused pairs lie inside one constituent (paper Tables 9 and 13, N).

    Returns:
      `pair_shares` as "baseline" of all pairs of adjacent tokens that may fuse, which is the exact
      expectation of the paper's random pairs, and of the pairs fused up to each layer.
    """
    open_WT = observed.open_WT
    window_P, at_P = np.nonzero(open_WT[:, :-1] & open_WT[:, 1:])
    pairs = {"baseline": Pairs(window_P, at_P, at_P + 1)}
    pairs |= {f"layer {layer}": fused_pairs(observed.fused_LWT[layer - 1]) for layer in layers}
    return {name: pair_shares(aligned, group) for name, group in pairs.items()}


def pair_shares(aligned: Aligned, pairs: Pairs) -> dict[str, Any]:
    """How many token pairs lie inside one constituent.

    Returns:
      "pairs", and of these "no_word" (a token is white space; left out of everything below) and
      "inside_word" (both in one word, so trivially inside). Then "all" and "across" (all but those
      in one word), each with the shares "phrase" (some NP, VP, PP, ... holds all their words) and
      "base" (their words stand next to each other right under one phrase, a chunk).
    """
    first, last = (part[pairs.window_P, pairs.earlier_P] for part in aligned.touched_WT)
    first_later, last_later = (part[pairs.window_P, pairs.later_P] for part in aligned.touched_WT)
    worded = (first <= last) & (first_later <= last_later)
    low, high = np.minimum(first, first_later)[worded], np.maximum(last, last_later)[worded]
    assert aligned.text.phrases is not None
    held = held_by_phrases(aligned.text.phrases, len(aligned.text.tags), low, high)
    across = low != high
    return {
        "pairs": len(pairs.window_P),
        "no_word": int((~worded).sum()),
        "inside_word": int((~across).sum()),
        "all": {name: share(hit.sum(), len(hit)) for name, hit in held.items()},
        "across": {name: share(hit[across].sum(), across.sum()) for name, hit in held.items()},
    }


def prediction_change(
    aligned: Aligned, dense: Observed, observed: Observed
) -> dict[str, dict[str, Any]]:
    """Accuracy and loss of next-token prediction, minus those of the dense model (Figs. 3, 18, L).

    Returns:
      "predicted": for function and content words as the predicted token. "read": as the token whose
      state was read, which is the one that halts; and by its "depth". Each with the "tokens", both
      accuracies, "accuracy_change" and "nll_change" (nats) and their intervals. Positive changes
      are more correct predictions and a larger loss; the paper's Delta Acc has the opposite sign.
    """
    scored_WT, classes_WT = dense.scored_WT & observed.scored_WT, aligned.schemes()["side"]
    read_WT, depth_WT = _read_at(classes_WT, NO_WORD), _read_at(observed.depth_WT, -1)
    predicted, read = {}, {}
    for name in ORDER["side"]:
        predicted[name] = _change(dense, observed, scored_WT & (classes_WT == name))
        chosen_WT = scored_WT & (read_WT == name)
        depths = {
            int(depth): _change(dense, observed, chosen_WT & (depth_WT == depth))
            for depth in np.unique(depth_WT[chosen_WT])
        }
        read[name] = _change(dense, observed, chosen_WT) | {"depth": depths}
    return {"predicted": {"side": predicted}, "read": {"side": read}}


def _read_at(values_WT: np.ndarray, empty: Any) -> np.ndarray:
    """For each token, what holds for the token before it, whose state predicts it."""
    shifted = np.roll(values_WT, 1, axis=1)
    shifted[:, 0] = empty
    return shifted


def _change(
    dense: Observed, observed: Observed, chosen_WT: Bool[np.ndarray, "W T"]
) -> dict[str, Any]:
    right_WT = observed.right_WT.astype(int) - dense.right_WT.astype(int)
    accuracy, accuracy_interval = mean_change(right_WT, chosen_WT)
    nll, nll_interval = mean_change(observed.nll_WT - dense.nll_WT, chosen_WT)
    count = int(chosen_WT.sum())
    return {
        "tokens": count,
        "dense_accuracy": float(dense.right_WT[chosen_WT].mean()) if count else None,
        "accuracy": float(observed.right_WT[chosen_WT].mean()) if count else None,
        "accuracy_change": accuracy,
        "accuracy_interval": accuracy_interval,
        "nll_change": nll,
        "nll_interval": nll_interval,
    }
