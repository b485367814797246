"""Rates, precisions and changes on the miniature treebank, against counts made by hand."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import norm

from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics import Observed, read_treebank
from qs_jax.evaluation.linguistics.align import ENDS, GOES_ON, Aligned, Touched
from qs_jax.evaluation.linguistics.constituents import Constituents
from qs_jax.evaluation.linguistics.measures import (
    Pairs,
    fused_pairs,
    fusion_by_layer,
    halting_by_class,
    mean_change,
    pair_shares,
    prediction_change,
    share,
)
from qs_jax.evaluation.linguistics.tags import AUXILIARY, CATEGORIES, CONTENT, FUNCTION, OTHER
from qs_jax.evaluation.perplexity import Windows
from tests.evaluation.miniature import WORDS, write_treebank

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
    whole = np.full(shape, LAYERS)
    itself = np.broadcast_to(np.arange(shape[1]), (LAYERS, *shape))
    fields = {
        "nll_WT": np.zeros(shape, np.float32),
        "right_WT": np.zeros(shape, bool),
        "scored_WT": np.ones(shape, bool),
        "open_WT": np.ones(shape, bool),
        "depth_WT": whole,
        "kv_layers_WT": whole,
        "bits_WT": np.full(shape, 16),
        "fused_LWT": itself,
    }
    return Observed(**(fields | changes), layers=LAYERS)


# The first sentence, "The old dog does n't bark at me .", a token a word, but "dog" of two tokens
# and "n't bark" one token; then a token that is a space.
FIRST = [[0, 1, 2, 2, 3, 4, 6, 7, 8, 9]]
LAST = [[0, 1, 2, 2, 3, 5, 6, 7, 8, 8]]


def wilson(hits, count):
    """The interval solved for in closed form (Wilson 1927)."""
    z = norm.ppf(0.975)
    share = hits / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [centre - half, centre + half]


@pytest.mark.parametrize(("hits", "count"), [(0, 4), (3, 8), (8, 8), (540, 1000)])
def test_shares_have_the_wilson_interval(hits, count):
    got = share(hits, count)
    assert (got["hits"], got["count"], got["share"]) == (hits, count, hits / count)
    assert got["interval"] == pytest.approx(wilson(hits, count), abs=1e-9)


def test_a_share_of_nothing():
    assert share(0, 0) == {"hits": 0, "count": 0, "share": None, "interval": None}


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
    observed = observed_as(depth.shape, depth_WT=depth, open_WT=may, kv_layers_WT=depth - 1)
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
    assert paper[CW]["mean_kv_layers"] == paper[CW]["mean_depth"] - 1
    assert paper[CW]["depths"] == {3: 1, 4: 1, 5: 1, 6: 1}
    assert paper[DT]["mean_depth"] is None
    assert got["auxiliary"][AUXILIARY]["halted"]["count"] == 1
    sides = {name: row["halted"]["count"] for name, row in got["side"].items()}
    assert sides == {FUNCTION: 3, CONTENT: 4, OTHER: 1, "several classes": 0}
    universal = {name: row["halted"]["count"] for name, row in got["universal"].items()}
    assert {name: count for name, count in universal.items() if count} == {
        **{"NOUN": 2, "VERB": 1, "ADJ": 1, "PRON": 1, "ADP": 1, ".": 1, "several classes": 1}
    }
    assert got["piece"][GOES_ON]["depths"] == {3: 1}  # the first token of "dog"
    assert got["piece"][ENDS]["halted"]["count"] == 7  # all other words


def test_fused_pairs_are_neighbours_in_a_super_token():
    fused = np.array([[0, 3, 3, 3, 4, 5], [2, 3, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    window, earlier, later = fused_pairs(fused)
    assert sorted(zip(window, earlier, later, strict=True)) == [
        *[(0, 1, 2), (0, 2, 3), (1, 0, 2), (1, 1, 3)]
    ]


# Pairs of neighbouring words of the first sentence, by hand from its tree.
#            The-old old-dog dog-does does-n't n't-bark bark-at at-me me-.
IN_PHRASE = [True, True, False, True, True, True, True, False]
IN_BASE = [True, True, False, True, False, False, False, False]
IN_NP = [True, True, *[False] * 6]
IN_VP = [False, False, False, True, True, True, True, False]
IN_PP = [*[False] * 6, True, False]


def test_constituents_by_hand(treebank):
    low = np.arange(8)
    held = Constituents.of(treebank).hold(low, low + 1)
    expected = {"phrase": IN_PHRASE, "base": IN_BASE, "NP": IN_NP, "VP": IN_VP, "PP": IN_PP}
    assert {name: hit.tolist() for name, hit in held.items()} == expected
    # Further apart: all of the noun phrase; "does" to "me"; over the end of the verb phrase.
    low, high = np.array([0, 3, 3, 0]), np.array([2, 7, 8, 3])
    held = Constituents.of(treebank).hold(low, high)
    assert held["phrase"].tolist() == [True, True, False, False]
    assert held["base"].tolist() == [True, False, False, False]
    # In the second sentence: the comma and the quotation mark, both right under a clause.
    held = Constituents.of(treebank).hold(np.array([11]), np.array([12]))
    assert not any(hit.any() for hit in held.values())


def test_constituents_are_those_of_the_tree(treebank):
    """Every pair of words of the text, against a search through all phrases."""
    clauses = ("S", "SBAR")
    words = len(WORDS)
    low, high = np.triu_indices(words)
    held = Constituents.of(treebank).hold(low, high)
    phrases = [p for p in treebank.phrases if p.label not in clauses]
    for name in ("phrase", "NP", "VP", "PP"):
        expected = [
            any(p.first <= a and b < p.end and name in ("phrase", p.label) for p in phrases)
            for a, b in zip(low, high, strict=True)
        ]
        assert held[name].tolist() == expected


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
    assert hits(mine["all"]) == {
        "phrase": (3, 3), "base": (2, 3), "NP": (2, 3), "VP": (1, 3), "PP": (0, 3)
    }  # fmt: skip
    assert hits(mine["across"]) == {
        "phrase": (2, 2), "base": (1, 2), "NP": (1, 2), "VP": (1, 2), "PP": (0, 2)
    }  # fmt: skip
    # All nine pairs but the one with a space: The-old, old-do, do-g, g-does, does-n't bark,
    # n't bark-at, at-me, me-".".
    base = got["baseline"]
    assert (base["pairs"], base["inside_word"], base["no_word"]) == (9, 1, 1)
    assert hits(base["all"])["phrase"] == (6, 8)
    assert hits(base["across"]) == {
        "phrase": (5, 7), "base": (2, 7), "NP": (2, 7), "VP": (3, 7), "PP": (1, 7)
    }  # fmt: skip


def test_the_baseline_has_only_pairs_that_may_fuse(treebank):
    aligned = aligned_as(treebank, FIRST, LAST)
    may = np.array([[False, True, True, True, True, False, True, True, True, True]])
    got = fusion_by_layer(aligned, observed_as((1, 10), open_WT=may), ())
    assert got["baseline"]["pairs"] == 6


def test_the_baseline_is_the_expectation_of_random_pairs(treebank):
    """The paper's random adjacent pairs, many of them drawn."""
    aligned = aligned_as(treebank, [list(range(len(WORDS)))], [list(range(len(WORDS)))])
    observed = observed_as((1, len(WORDS)))
    expected = fusion_by_layer(aligned, observed, ())["baseline"]["all"]
    at = np.random.default_rng(0).integers(0, len(WORDS) - 1, 20_000)
    drawn = Pairs(np.zeros_like(at), at, at + 1)
    got = pair_shares(aligned, Constituents.of(treebank), drawn)["all"]
    for name, row in expected.items():
        assert got[name]["share"] == pytest.approx(row["share"], abs=0.015)


def test_fusion_needs_parses(treebank):
    bare = dataclasses.replace(treebank, phrases=None)
    with pytest.raises(InputError, match="has no parses"):
        fusion_by_layer(aligned_as(bare, FIRST, LAST), observed_as((1, 10)), (3,))


def test_changes_of_predictions_by_hand(treebank):
    """Two windows of the first five tokens: The old do-g does."""
    aligned = aligned_as(treebank, [FIRST[0][:5]] * 2, [LAST[0][:5]] * 2)
    scored = np.array([[False, True, True, True, True]] * 2)
    right = np.array([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]], bool)
    after = np.array([[0, 1, 0, 0, 0], [0, 1, 1, 0, 1]], bool)
    nll = np.array([[0, 1, 2, 3, 4], [0, 1, 1, 1, 1]], np.float32)
    depth = np.array([[2, 6, 6, 6, 6], [6, 6, 2, 2, 6]])
    dense = observed_as((2, 5), scored_WT=scored, right_WT=right, nll_WT=0 * nll)
    halted = observed_as((2, 5), scored_WT=scored, right_WT=after, nll_WT=nll, depth_WT=depth)
    got = prediction_change(aligned, dense, halted)
    # Predicted: content words old, do, g; of the function words only "does" ("The" is not scored).
    row = got["predicted"]["side"][CONTENT]
    assert (row["tokens"], row["dense_accuracy"], row["accuracy"]) == (6, 4 / 6, 3 / 6)
    assert row["accuracy_change"] == pytest.approx(-1 / 6)
    assert row["nll_change"] == pytest.approx((1 + 2 + 3 + 1 + 1 + 1) / 6)
    row = got["predicted"]["side"][FUNCTION]
    assert (row["tokens"], row["accuracy_change"], row["nll_change"]) == (2, -0.5, 2.5)
    assert got["predicted"]["paper"][AUX]["tokens"] == 2
    # Read: "The" predicts "old"; old, do and g predict do, g and "does"; by the first one's depth.
    row = got["read"]["side"][FUNCTION]
    assert row["tokens"] == 2
    assert {d: (e["tokens"], e["accuracy_change"]) for d, e in row["depth"].items()} == {
        2: (1, 0.0),
        6: (1, 1.0),
    }
    row = got["read"]["side"][CONTENT]["depth"]
    assert {d: (e["tokens"], e["nll_change"]) for d, e in row.items()} == {
        2: (2, 1.0),
        6: (4, (2 + 3 + 4 + 1) / 4),
    }
