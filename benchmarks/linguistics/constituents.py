"""Which stretches of words one constituent holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.linguistics.text import Phrase

# Clause level of the Penn Treebank (Bies et al. 1995); every sentence is one, so that "inside one
# clause" says little. All other labels are phrases.
CLAUSES = frozenset(["S", "SBAR", "SBARQ", "SINV", "SQ"])


def held_by_phrases(
    phrases: Sequence[Phrase], words: int, low_P: np.ndarray, high_P: np.ndarray
) -> dict[str, np.ndarray]:
    """Whether one phrase holds all words from `low` to `high`, both included.

    Args:
      phrases: Constituents of a text, outer before inner.
      words: Of the text.
      low_P: First word of each stretch.
      high_P: Last word of each.

    Returns:
      "phrase": some phrase does. "base": some phrase is the innermost constituent of all of them.
    """
    # One past the last word of the largest phrase that holds a word, and its innermost constituent.
    reach_W, parent_W = np.arange(words), np.full(words, -1)
    for number, (label, first, end) in enumerate(phrases):
        parent_W[first:end] = -1 if label in CLAUSES else number  # inner ones come later
        if label not in CLAUSES:
            reach_W[first:end] = np.maximum(reach_W[first:end], end)
    changes_W = np.concatenate([[0], np.cumsum(parent_W[1:] != parent_W[:-1])])
    same_P = (changes_W[low_P] == changes_W[high_P]) & (parent_W[low_P] >= 0)
    # Constituents nest: one that holds `low` and reaches past `high` holds all between.
    return {"phrase": reach_W[low_P] > high_P, "base": same_P}
