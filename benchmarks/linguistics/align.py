"""Which words each subword token belongs to, by the characters they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from benchmarks.linguistics import classes
from benchmarks.linguistics.text import TaggedText
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import Windows, cut_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_WORD, SEVERAL = "no word", "several classes"
# Classes of each scheme, in the order of the tables.
ORDER = {
    "paper": (*classes.CATEGORIES, classes.OTHER, SEVERAL),
    "side": (classes.FUNCTION, classes.CONTENT, classes.OTHER, SEVERAL),
}


class Touched(NamedTuple):
    """The words that tokens touch: `first` to `last`; none where `first` is larger.

    A word has one token or several; a token that crosses a boundary ("n't" read as "n" and "'t"
    after "do") has several words; white space belongs to no word.
    """

    first: Int[np.ndarray, "*tokens"]
    last: Int[np.ndarray, "*tokens"]


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A text in windows of tokens whose words are known.

    Attributes:
      text: Words and their tags.
      windows: Its tokens; `T` a window.
      touched_WT: The words of each token.
    """

    text: TaggedText
    windows: Windows
    touched_WT: Touched

    def classify(self, labels: Sequence[str]) -> np.ndarray:
        """Class of each token `[W, T]`, from a label for each word.

        A token of several words has their class if they share it, else `SEVERAL`; `NO_WORD` where
        it has none.
        """
        names, codes_W = np.unique(np.array(labels, dtype=object).astype(str), return_inverse=True)
        first, last = self.touched_WT
        # Words i to j share a class if no word after i, up to j, differs from the one before it.
        changes_W = np.concatenate([[0], np.cumsum(codes_W[1:] != codes_W[:-1])])
        inside = first <= last
        first, last = np.where(inside, first, 0), np.where(inside, last, 0)
        classes_WT = names[codes_W[first]].astype(object)
        classes_WT[changes_W[first] != changes_W[last]] = SEVERAL
        classes_WT[~inside] = NO_WORD
        return classes_WT

    def schemes(self) -> dict[str, np.ndarray]:
        """Class of each token `[W, T]` in each scheme of `ORDER`."""
        pairs = list(zip(self.text.words, self.text.tags, strict=True))
        return {
            "paper": self.classify([classes.category(tag) for _, tag in pairs]),
            "side": self.classify([classes.side(*pair) for pair in pairs]),
        }

    def describe(self) -> dict[str, Any]:
        """What was read, as plain JSON types."""
        first, last = self.touched_WT
        inside = first <= last
        return {
            "corpus": self.text.name,
            "words_in_corpus": len(self.text.tags),
            "tokens_in_corpus": self.windows.tokens_in_text,
            "words": int(last[inside].max() + 1 - first[inside].min()),
            "tokens": int(inside.size),
            "tokens_of_one_word": int((first == last).sum()),
            "tokens_of_no_word": int((~inside).sum()),
            "tokens_sha256": self.windows.sha256,
        }


def touched_words(offsets_T2: Int[np.ndarray, "T 2"], text: TaggedText) -> Touched:
    """The words each token touches, from its first and one past its last character."""
    (start_T, end_T), (starts_W, ends_W) = offsets_T2.T, np.array(text.spans).T
    first_T = np.searchsorted(ends_W, start_T, side="right")
    last_T = np.searchsorted(starts_W, end_T, side="left") - 1
    return Touched(first_T, np.where(start_T < end_T, last_T, first_T - 1))


def align(
    text: TaggedText, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None = None
) -> Aligned:
    """Tokenise a text whole, cut it into windows, and find each token's words.

    Raises:
      InputError: The tokenizer has no token for some word; as `cut_windows`.
    """
    encoded = tokenizer(text.text, return_offsets_mapping=True, verbose=False)
    windows = cut_windows(encoded["input_ids"], seq_len, limit)
    touched = touched_words(np.asarray(encoded["offset_mapping"], np.int64), text)
    _require_all_words(touched, text)
    count, width = windows.tokens_WT.shape
    cut = (part[: count * width].reshape(count, width) for part in touched)
    return Aligned(text, windows, Touched(*cut))


def _require_all_words(touched: Touched, text: TaggedText) -> None:
    covered = {i for first, last in zip(*touched, strict=True) for i in range(first, last + 1)}
    lost = [word for i, word in enumerate(text.words) if i not in covered]
    if lost:
        raise InputError(f"the tokenizer has no token for {len(lost)} words: {lost[0]!r}, ...")
