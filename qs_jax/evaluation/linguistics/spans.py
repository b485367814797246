"""Annotated words as natural text, each with the characters it has there.

Treebanks store words apart ("do n't", "( ", "U.S. ."); a language model wants the text as it was
written. The text is put together word by word by the spacing rules of English print, so that the
place of every word is known and nothing has to be found again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from qs_jax.errors import InputError

BRACKETS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LCB-": "{",
    "-RCB-": "}",
    "-LSB-": "[",
    "-RSB-": "]",
}
_WRITTEN = BRACKETS | {"``": '"', "''": '"'}
_ESCAPED = re.compile(r"\\([/*])")
# Nothing stands between these and the next word, or between the word before and these.
_OPENING = frozenset(["(", "[", "{", "``", "`", "$", "#"])
_CLOSING = frozenset([")", "]", "}", "''", "'", ",", ".", ":", ";", "?", "!", "%", "..."])
_CLITIC = re.compile(r"('(s|d|m|ll|re|ve)|n't)", re.IGNORECASE)
_CURRENCY = re.compile(r"[A-Z]+\$")
# Words the Penn Treebank cuts in two.
_SPLIT = frozenset(["can not", "gon na", "wan na", "got ta", "gim me", "lem me"])


class Phrase(NamedTuple):
    """A constituent over words `first` to `end` - 1."""

    label: str
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Words as the treebank has them, with their tags.

    Attributes:
      words: Tokens of the treebank, brackets still as -LRB-.
      tags: One each.
      phrases: Constituents that hold words, outer before inner; empty without a parse.
      source: File and number, for messages.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    phrases: tuple[Phrase, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class TaggedText:
    """A text whose words are known. W words, in order, without overlap.

    Attributes:
      name: Of the corpus, or the file's name.
      text: All of it.
      starts_W: First character of each word.
      ends_W: One past its last.
      tags: Of each word, in the corpus's own tag set.
      universal: Of each word, in the 12 universal tags.
      phrases: Constituents over word indices, outer before inner; None where there are no parses.
      tag_set: "penn" or "brown".
    """

    name: str
    text: str
    starts_W: Int[np.ndarray, "W"]
    ends_W: Int[np.ndarray, "W"]
    tags: tuple[str, ...]
    universal: tuple[str, ...]
    phrases: tuple[Phrase, ...] | None
    tag_set: str

    @property
    def words(self) -> list[str]:
        """Each word as it is written."""
        ends = zip(self.starts_W.tolist(), self.ends_W.tolist(), strict=True)
        return [self.text[start:end] for start, end in ends]


def written(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """A sentence's words as they are printed.

    Brackets and quotation marks are restored, escapes of the Penn Treebank undone. Between two
    words there is one space or none; every other character belongs to exactly one word. An
    abbreviation gives its full stop to the full stop that ends the sentence ("the U.S." "." is
    printed "the U.S.").

    Args:
      words: Of a treebank.

    Returns:
      The text, and the first and one past the last character of each word.

    Raises:
      InputError: A word is empty or holds a space.
    """
    text, spans = "", []
    for index, word in enumerate(words):
        if not word or any(character.isspace() for character in word):
            raise InputError(f"word {index + 1}, {word!r}, is empty or holds a space.")
        shown = _WRITTEN.get(word) or _ESCAPED.sub(r"\1", word)
        following = words[index + 1] if index + 1 < len(words) else ""
        if following == "." and len(word) > 1 and word.endswith(".") and word.strip("."):
            shown = shown[:-1]
        if index and not _joined(words[index - 1], word):
            text += " "
        spans.append((len(text), len(text) + len(shown)))
        text += shown
    return text, spans


def _joined(before: str, word: str) -> bool:
    """Whether nothing is printed between two words."""
    before, word = BRACKETS.get(before, before), BRACKETS.get(word, word)
    return (
        before in _OPENING
        or word in _CLOSING
        or _CLITIC.fullmatch(word) is not None
        or (_CURRENCY.fullmatch(before) is not None and word[:1].isdigit())
        or f"{before} {word}".lower() in _SPLIT
    )


def join(
    documents: Sequence[Sequence[Sentence]],
    universal: Sequence[str],
    *,
    name: str,
    tag_set: str,
) -> TaggedText:
    """Put documents together: a space between sentences, a blank line between documents.

    Args:
      documents: Sentences of each document.
      universal: Universal tag of each word of them all.
      name: Of the corpus.
      tag_set: "penn" or "brown".

    Raises:
      InputError: A word that cannot be printed, with its file and sentence.
    """
    text, starts, ends, tags, phrases = [], [], [], [], []
    at, parsed = 0, False
    for document in documents:
        for order, sentence in enumerate(document):
            try:
                shown, spans = written(sentence.words)
            except InputError as error:
                raise InputError(f"{sentence.source}: {error}") from error
            gap = "" if not text else " " if order else "\n\n"
            at += len(gap)
            first_word = len(tags)
            starts += [at + start for start, _ in spans]
            ends += [at + end for _, end in spans]
            tags += sentence.tags
            parsed |= bool(sentence.phrases)
            phrases += [
                Phrase(label, first + first_word, end + first_word)
                for label, first, end in sentence.phrases
            ]
            text.append(gap + shown)
            at += len(shown)
    return TaggedText(
        name=name,
        text="".join(text),
        starts_W=np.array(starts, np.int64),
        ends_W=np.array(ends, np.int64),
        tags=tuple(tags),
        universal=tuple(universal),
        phrases=tuple(phrases) if parsed else None,
        tag_set=tag_set,
    )
