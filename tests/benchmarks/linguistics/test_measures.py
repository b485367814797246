"""Rates, precisions and changes on the miniature treebank, against counts made by hand."""

import numpy as np
import pytest

from benchmarks.linguistics.align import Aligned, Touched
from benchmarks.linguistics.classes import CATEGORIES, CONTENT, FUNCTION, OTHER
from benchmarks.linguistics.measures import fusion_by_layer, halting_by_class, mean_change
from benchmarks.linguistics.observe import Observed
from benchmarks.linguistics.treebank import read_treebank
from qs_jax.evaluation.perplexity import Windows
from tests.benchmarks.linguistics.miniature import write_treebank

DT, IN, _, PRP, AUX, CW = CATEGORIES
LAYERS = 6


@pytest.fixture(scope="module")
def treebank(tmp_path_factory):
    return read_treebank(write_treebank(tmp_path_factory.mktemp("treebank")))


def aligned_as(text, first, last):
    """Windows of tokens with these words."""
    first, last = np.array(first), np.array(last)
    windows = Windows(np.zeros(first.shape, np.int32), first.size, 0, "")
    return Aligned(text, windows, Touched(first, last))


def observed_as(shape, **changes):
    itself = np.broadcast_to(np.arange(shape[1]), (LAYERS, *shape))
    fields = {
        "nll_WT": np.zeros(shape, np.float32),
        "right_WT": np.zeros(shape, bool),
        "scored_WT": np.ones(shape, bool),
        "open_WT": np.ones(shape, bool),
        "depth_WT": np.full(shape, LAYERS),
        "fused_LWT": itself,
    }
    return Observed(**(fields | changes))


# The first sentence, "The old dog does n't bark at me .", a token a word, but "dog" of two tokens
# and "n't bark" one token; then a token that is a space.
FIRST = [[0, 1, 2, 2, 3, 4, 6, 7, 8, 9]]
LAST = [[0, 1, 2, 2, 3, 5, 6, 7, 8, 8]]


def test_the_mean_change_and_its_interval():
    """Equal windows: the t interval of their means; unequal ones: the ratio estimator by hand."""
    change = np.array([[1.0, 3.0], [0.0, 0.0], [2.0, 6.0]])
    mean, ends = mean_change(change, np.ones((3, 2), bool))
    assert mean == 2
    half = 4.302653 * np.std([2, 0, 4], ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert ends == pytest.approx([2 - half, 2 + half], rel=1e-6)
    chosen = np.array([[True, True], [False, False], [True, False]])
    mean, ends = mean_change(change, chosen)
    assert mean == 2  # of 1, 3 and 2; residuals by window 4 - 2 * 2 and 2 - 1 * 2
    assert ends == [2, 2]
    assert mean_change(change, np.zeros((3, 2), bool)) == (None, None)
    assert mean_change(change, np.array([[True, True], [False] * 2, [False] * 2])) == (2, None)


def test_halting_by_hand(treebank):
    """The, old, do-g, does, n't+bark, at, me, ".", space: depths and what may halt."""
    depth = np.array([[2, 6, 3, 4, 6, 5, 2, 6, 3, 1]])
    may = np.array([[False, *[True] * 9]])
    aligned = aligned_as(treebank, FIRST, LAST)
    observed = observed_as(depth.shape, depth_WT=depth, open_WT=may)
    got = halting_by_class(aligned, observed, middle=3)
    paper = got["paper"]
    counts = {name: (row["halted"]["hits"], row["halted"]["count"]) for name, row in paper.items()}
    # "The" may not halt; "n't bark" is two words of the same category (RB, VB).
    assert counts == {
        **dict.fromkeys(CATEGORIES, (0, 0)),
        **{IN: (1, 1), PRP: (0, 1), AUX: (0, 1), CW: (3, 4), OTHER: (1, 1)},
        "several classes": (0, 0),
    }
    assert paper[CW]["halted_by_middle"]["hits"] == 1
    assert paper[CW]["mean_depth"] == (6 + 3 + 4 + 5) / 4
    assert paper[DT]["mean_depth"] is None
    sides = {name: row["halted"]["count"] for name, row in got["side"].items()}
    assert sides == {FUNCTION: 3, CONTENT: 4, OTHER: 1, "several classes": 0}


def test_precision_and_baseline_by_hand(treebank):
    """Pairs of tokens 0-1, 1-2, ... of FIRST; the last two cross "me ." and a space."""
    aligned = aligned_as(treebank, FIRST, LAST)
    fused = np.array([[[1, 1, 3, 3, 5, 5, 6, 7, 9, 9]]])  # The-old, dog, does-n't bark, .-space
    fused_LWT = np.concatenate([np.arange(10).reshape(1, 1, 10).repeat(2, 0), fused.repeat(4, 0)])
    observed = observed_as((1, 10), fused_LWT=fused_LWT)
    got = fusion_by_layer(aligned, observed, (2, 3))
    assert got["layer 2"]["pairs"] == 0
    assert got["layer 2"]["all"]["phrase"]["share"] is None
    mine = got["layer 3"]
    assert (mine["pairs"], mine["inside_word"], mine["no_word"]) == (4, 1, 1)

    def hits(entry):
        return {name: (row["hits"], row["count"]) for name, row in entry.items()}

    # The-old (NP); dog in one word (NP); does-n't-bark (VP, not its innermost).
    assert hits(mine["all"]) == {"phrase": (3, 3), "base": (2, 3)}
    assert hits(mine["across"]) == {"phrase": (2, 2), "base": (1, 2)}
    # All nine pairs but the one with a space: The-old, old-do, do-g, g-does, does-n't bark,
    # n't bark-at, at-me, me-".".
    base = got["baseline"]
    assert (base["pairs"], base["inside_word"], base["no_word"]) == (9, 1, 1)
    assert hits(base["all"])["phrase"] == (6, 8)
    assert hits(base["across"]) == {"phrase": (5, 7), "base": (2, 7)}
    may = np.array([[False, True, True, True, True, False, True, True, True, True]])
    got = fusion_by_layer(aligned, observed_as((1, 10), open_WT=may), ())
    assert got["baseline"]["pairs"] == 6
