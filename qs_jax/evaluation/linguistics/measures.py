"""Halting by word class, fused pairs against constituents, and what it did to predictions.

Counts come with the 95 % Wilson interval of a share, which takes tokens for independent draws.
Differences between two runs over the same tokens come with an interval from the spread between
windows (ratio estimator, Student t), since tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from qs_jax.evaluation.linguistics.align import NO_WORD, ORDER, Aligned, word_labels
from qs_jax.evaluation.linguistics.constituents import Constituents
from qs_jax.evaluation.linguistics.observe import Observed


def share(hits: int, count: int) -> dict[str, Any]:
    """A share with its 95 % Wilson interval; None where there is nothing to count."""
    from scipy.stats import binomtest

    if count == 0:
        return {"hits": 0, "count": 0, "share": None, "interval": None}
    found = binomtest(int(hits), int(count)).proportion_ci(method="wilson")
    ends = [float(found.low), float(found.high)]
    return {
        "hits": int(hits),
        "count": int(count),
        "share": hits / count,
        "interval": ends,
    }


def mean_change(
    change_WT: np.ndarray, chosen_WT: Bool[np.ndarray, "W T"]
) -> tuple[float | None, list[float] | None]:
    """Mean of the chosen entries, with its 95 % interval over windows.

    Args:
      change_WT: Difference between two runs for each token.
      chosen_WT: Which tokens.

    Returns:
      The mean, None if nothing is chosen; the interval, None unless two windows hold a token.
    """
    from scipy.stats import t

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
    aligned: Aligned, observed: Observed, middle: int | None = None
) -> dict[str, dict[str, Any]]:
    """Halting rate and depth of each class (paper Tables 2 and 12, M).

    Tokens that no mechanism may touch (sinks, special and protected tokens, the last of a prompt)
    are left out.

    Args:
      aligned: Words and tags of the tokens.
      observed: Of a run with mechanisms.
      middle: Layer of the paper's "Layer 15"; half of the depth by default.

    Returns:
      For each scheme and class: "halted" (depth below the number of layers) and "halted_by_middle"
      as shares, "mean_depth", "mean_kv_layers", "mean_bits", and "depths", the number of tokens
      that stopped after each layer.
    """
    middle = middle or observed.layers // 2
    return {
        scheme: {
            name: _halting(observed, (classes_WT == name) & observed.open_WT, middle)
            for name in ORDER[scheme]
        }
        for scheme, classes_WT in _schemes(aligned)
    }


def _halting(observed: Observed, chosen_WT: Bool[np.ndarray, "W T"], middle: int) -> dict[str, Any]:
    depth_N = observed.depth_WT[chosen_WT]
    found, counts = np.unique(depth_N, return_counts=True)

    def mean(values_WT: np.ndarray) -> float | None:
        return float(values_WT[chosen_WT].mean()) if len(depth_N) else None

    return {
        "halted": share(int((depth_N < observed.layers).sum()), len(depth_N)),
        "halted_by_middle": share(int((depth_N <= middle).sum()), len(depth_N)),
        "mean_depth": mean(observed.depth_WT),
        "mean_kv_layers": mean(observed.kv_layers_WT),
        "mean_bits": mean(observed.bits_WT),
        "depths": {int(k): int(v) for k, v in zip(found, counts, strict=True)},
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

    Args:
      aligned: With constituents.
      observed: Of a run with fusion.
      layers: Pairs fused up to and including each of these.

    Returns:
      "baseline" over all pairs of adjacent tokens that may fuse, which is the exact expectation of
      the paper's random pairs; and for each layer the same counts over fused pairs. Every entry is
      that of `pair_shares`.
    """
    constituents = Constituents.of(aligned.text)
    open_WT = observed.open_WT
    window_P, at_P = np.nonzero(open_WT[:, :-1] & open_WT[:, 1:])
    pairs = {"baseline": Pairs(window_P, at_P, at_P + 1)}
    for layer in layers:
        pairs[f"layer {layer}"] = fused_pairs(observed.fused_LWT[layer - 1])
    return {name: pair_shares(aligned, constituents, found) for name, found in pairs.items()}


def pair_shares(aligned: Aligned, constituents: Constituents, pairs: Pairs) -> dict[str, Any]:
    """How many token pairs lie inside one constituent.

    Args:
      aligned: The words of each token.
      constituents: Of its text.
      pairs: Of tokens.

    Returns:
      "pairs", and of these "no_word" (a token is white space; left out of everything below) and
      "inside_word" (both in one word, so trivially inside). Then "all" and "across" (all but those
      in one word), each with the shares "phrase" (some NP, VP, PP, ... holds all their words),
      "base" (their words stand next to each other right under one phrase, a chunk), and of each
      label the share held by some phrase of that label.
    """
    first, last = (part[pairs.window_P, pairs.earlier_P] for part in aligned.touched_WT)
    first_later, last_later = (part[pairs.window_P, pairs.later_P] for part in aligned.touched_WT)
    worded = (first <= last) & (first_later <= last_later)
    low, high = np.minimum(first, first_later)[worded], np.maximum(last, last_later)[worded]
    held = constituents.hold(low, high)
    inside_word = low == high

    def counted(chosen: np.ndarray) -> dict[str, Any]:
        return {
            name: share(int(hit[chosen].sum()), int(chosen.sum())) for name, hit in held.items()
        }

    return {
        "pairs": len(pairs.window_P),
        "no_word": int((~worded).sum()),
        "inside_word": int(inside_word.sum()),
        "all": counted(np.ones(len(low), bool)),
        "across": counted(~inside_word),
    }


def prediction_change(
    aligned: Aligned, dense: Observed, observed: Observed
) -> dict[str, dict[str, Any]]:
    """Accuracy and loss of next-token prediction, minus those of the dense model (Figs. 3, 18, L).

    Args:
      aligned: What both runs scored.
      dense: Run without mechanisms, under the same protocol.
      observed: Run with them.

    Returns:
      "predicted": for each scheme and class of the predicted token. "read": of the token whose
      state was read, which is the one that halts; function and content words also by "depth". Each
      with the "tokens", both accuracies, "accuracy_change" and "nll_change" (nats) and their
      intervals. Positive changes are more correct predictions and a larger loss; the paper's Delta
      Acc has the opposite sign.
    """
    scored_WT = dense.scored_WT & observed.scored_WT
    told: dict[str, dict[str, Any]] = {"predicted": {}, "read": {}}
    depth_WT = _read_at(observed.depth_WT, -1)
    for scheme, classes_WT in _schemes(aligned):
        read_WT = _read_at(classes_WT, NO_WORD)
        for way, labels_WT in (("predicted", classes_WT), ("read", read_WT)):
            told[way][scheme] = {
                name: _change(dense, observed, scored_WT & (labels_WT == name))
                for name in ORDER[scheme]
            }
        if scheme == "side":
            for name, entry in told["read"][scheme].items():
                chosen_WT = scored_WT & (read_WT == name)
                entry["depth"] = {
                    int(depth): _change(dense, observed, chosen_WT & (depth_WT == depth))
                    for depth in np.unique(depth_WT[chosen_WT])
                }
    return told


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


def _schemes(aligned: Aligned) -> Iterator[tuple[str, np.ndarray]]:
    for scheme, labels in word_labels(aligned.text).items():
        yield scheme, aligned.classes(labels)
    yield "piece", aligned.pieces()
