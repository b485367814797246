"""Which stretches of words one constituent holds."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int

from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics.spans import TaggedText

# Clause level of the Penn Treebank (Bies et al. 1995); every sentence is one, so that "inside one
# clause" says little. All other labels are phrases.
CLAUSES = frozenset(["S", "SBAR", "SBARQ", "SINV", "SQ"])
LABELS = ("NP", "VP", "PP")


@dataclasses.dataclass(frozen=True)
class Constituents:
    """Constituents of a text of W words, ready to be asked.

    Attributes:
      reach_W: For each group of labels, one past the last word of the largest phrase of that group
        that holds the word; the word itself where there is none.
      parent_W: The innermost constituent of each word, -1 where it is a clause or missing.
    """

    reach_W: dict[str, Int[np.ndarray, "W"]]
    parent_W: Int[np.ndarray, "W"]

    @classmethod
    def of(cls, text: TaggedText) -> Constituents:
        """Look at every phrase once.

        Raises:
          InputError: The text has no parses.
        """
        if text.phrases is None:
            raise InputError(
                f"{text.name} has no parses: fused pairs can be compared with constituents only "
                "on a treebank with trees (*.mrg)."
            )
        reach_W = {name: np.arange(len(text.tags)) for name in ("phrase", *LABELS)}
        parent_W = np.full(len(text.tags), -1)
        for number, (label, first, end) in enumerate(text.phrases):
            clause = label in CLAUSES
            parent_W[first:end] = -1 if clause else number  # inner ones come later
            groups = () if clause else ("phrase", label)
            for group in groups:
                if group in reach_W:
                    reach_W[group][first:end] = np.maximum(reach_W[group][first:end], end)
        return cls(reach_W, parent_W)

    def hold(
        self, low_P: Int[np.ndarray, "P"], high_P: Int[np.ndarray, "P"]
    ) -> dict[str, np.ndarray]:
        """Whether one constituent holds all words from `low` to `high`, both included.

        Returns:
          "phrase": some phrase does. "base": some phrase is the innermost constituent of all of
          them. "NP", "VP", "PP": some phrase of that label does.
        """
        # Constituents nest: one that holds `low` and reaches past `high` holds all between.
        held = {name: reach_W[low_P] > high_P for name, reach_W in self.reach_W.items()}
        changes_W = np.concatenate([[0], np.cumsum(self.parent_W[1:] != self.parent_W[:-1])])
        same_P = (changes_W[low_P] == changes_W[high_P]) & (self.parent_W[low_P] >= 0)
        return {"phrase": held.pop("phrase"), "base": same_P, **held}
