"""Which words each subword token belongs to, by the characters they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics import tags
from qs_jax.evaluation.linguistics.spans import TaggedText
from qs_jax.evaluation.perplexity import Windows, cut_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_WORD, SEVERAL = "no word", "several classes"
GOES_ON, ENDS = "Tokens whose word goes on", "Tokens that end a word"


class Touched(NamedTuple):
    """The words that tokens touch: `first` to `last`; none where `first` is larger.

    A token's words are neighbours. A word has one token or several; a token that crosses a boundary
    ("n't" read as "n" and "'t" after "do") has several words; white space belongs to no word.
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

    def classes(self, labels: Sequence[str]) -> np.ndarray:
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
        found = names[codes_W[first]].astype(object)
        found[changes_W[first] != changes_W[last]] = SEVERAL
        found[~inside] = NO_WORD
        return found

    def pieces(self) -> np.ndarray:
        """`GOES_ON` where the next token continues a token's last word, else `ENDS` `[W, T]`.

        `NO_WORD` where a token has no word, and for the last token of a window.
        """
        first, last = self.touched_WT
        goes_on = (first[:, 1:] == last[:, :-1]) & (first[:, 1:] <= last[:, 1:])
        found = np.full(first.shape, NO_WORD, dtype=object)
        found[:, :-1] = np.where(goes_on, GOES_ON, ENDS)
        found[first > last] = NO_WORD
        return found


def touched_words(offsets_T2: Int[np.ndarray, "T 2"], text: TaggedText) -> Touched:
    """The words each token touches.

    Args:
      offsets_T2: First and one past the last character of each token; equal for none.
      text: Its words do not overlap and are in order.
    """
    start_T, end_T = offsets_T2[:, 0], offsets_T2[:, 1]
    first_T = np.searchsorted(text.ends_W, start_T, side="right")
    last_T = np.searchsorted(text.starts_W, end_T, side="left") - 1
    return Touched(first_T, np.where(start_T < end_T, last_T, first_T - 1))


def align(
    text: TaggedText, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None = None
) -> Aligned:
    """Tokenise a text whole, cut it into windows, and find each token's words.

    Args:
      text: Its words.
      tokenizer: Of the checkpoint; it must be able to tell the characters of its tokens.
      seq_len: Tokens of each window.
      limit: Number of windows; None takes all.

    Raises:
      InputError: The tokenizer cannot tell them, or has no token for some word; as `cut_windows`.
    """
    try:
        encoded = tokenizer(text.text, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise InputError(
            "this tokenizer does not say which characters its tokens stand for; words can be "
            "aligned only with a fast tokenizer (tokenizer.json)."
        ) from error
    offsets_T2 = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    windows = cut_windows(encoded["input_ids"], seq_len, limit)
    touched = touched_words(offsets_T2, text)
    _require_all_words(touched, text)
    count, width = windows.tokens_WT.shape
    cut = (part[: count * width].reshape(count, width) for part in touched)
    return Aligned(text, windows, Touched(*cut))


def _require_all_words(touched: Touched, text: TaggedText) -> None:
    """Refuse a tokenizer that loses words, or whose offsets are not to be trusted."""
    inside = touched.first <= touched.last
    steps_W = np.zeros(len(text.tags) + 1, np.int64)
    np.add.at(steps_W, touched.first[inside], 1)
    np.add.at(steps_W, touched.last[inside] + 1, -1)
    lost_W = np.flatnonzero(np.cumsum(steps_W)[:-1] == 0)
    if len(lost_W):
        start, end = int(text.starts_W[lost_W[0]]), int(text.ends_W[lost_W[0]])
        raise InputError(
            f"the tokenizer has no token for {len(lost_W)} of {len(text.tags)} words, the first at "
            f"character {start}: {text.text[start:end]!r}."
        )


def word_labels(text: TaggedText) -> dict[str, list[str]]:
    """A label for each word in each scheme: "paper", "side", "auxiliary" and "universal"."""
    words, tag_set = text.words, text.tag_set
    pairs = list(zip(words, text.tags, strict=True))
    return {
        "paper": [tags.category(tag, tag_set) for tag in text.tags],
        "side": [tags.side(word, tag, tag_set) for word, tag in pairs],
        "auxiliary": [
            tags.AUXILIARY if tags.is_auxiliary(word, tag, tag_set) else tags.OTHER
            for word, tag in pairs
        ],
        "universal": list(text.universal),
    }


ORDER = {
    "paper": (*tags.CATEGORIES, tags.OTHER, SEVERAL),
    "side": (tags.FUNCTION, tags.CONTENT, tags.OTHER, SEVERAL),
    "auxiliary": (tags.AUXILIARY,),
    "piece": (GOES_ON, ENDS),
    "universal": (*tags.UNIVERSAL, SEVERAL),
}
