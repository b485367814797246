"""Annotated words as natural text, each with the characters it has there.

Treebanks store words apart ("do n't", "( ", "U.S. ."); a language model wants the text as it was
printed. The text is put together word by word by the spacing rules of English print, so that the
place of every word is known. Any other text is tagged by spaCy, the paper's tagger (M).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import read_text

_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LCB-": "{", "-RCB-": "}", "-LSB-": "[", "-RSB-": "]"}
_QUOTES = {"``": '"', "''": '"'}
_ESCAPED = re.compile(r"-[LR][RCS]B-|\\[/*]")
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
class TaggedText:
    """A text whose words are known. W words, in order, without overlap.

    Attributes:
      name: Of the corpus, or the file's name.
      text: All of it.
      spans: First character of each word, and one past its last.
      tags: Penn Treebank tag of each word.
      phrases: Constituents over word indices, outer before inner; None where there are no parses.
    """

    name: str
    text: str
    spans: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]
    phrases: tuple[Phrase, ...] | None = None

    @property
    def words(self) -> list[str]:
        """Each word as it is printed."""
        return [self.text[start:end] for start, end in self.spans]


def print_words(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Put a sentence's words together as they are printed.

    Brackets, inside words too, and quotation marks are restored, escapes undone. Between two
    words there is one space or none; every other character belongs to exactly one word. An
    abbreviation gives its full stop to the full stop that ends the sentence ("the U.S." "." is
    printed "the U.S.").

    Returns:
      The text, and the first and one past the last character of each word.
    """
    text, spans = "", []
    for index, word in enumerate(words):
        shown = _QUOTES.get(word) or _ESCAPED.sub(lambda m: _BRACKETS.get(m[0], m[0][-1]), word)
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
    before, word = _BRACKETS.get(before, before), _BRACKETS.get(word, word)
    return (
        before in _OPENING
        or word in _CLOSING
        or _CLITIC.fullmatch(word) is not None
        or (_CURRENCY.fullmatch(before) is not None and word[:1].isdigit())
        or f"{before} {word}".lower() in _SPLIT
    )


def tag_text(path: str, model: str) -> TaggedText:
    """Read a text and tag it with an English spaCy model that has Penn Treebank tags."""
    import spacy

    text = read_text(path)
    pipeline = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    return run_tagger(text.text, pipeline, text.name)


def run_tagger(text: str, pipeline: Any, name: str) -> TaggedText:
    """Tag a text line by line with a spaCy pipeline.

    Raises:
      InputError: The text has no words, or the pipeline gives some no tag.
    """
    spans, tags, at = [], [], 0
    lines = text.split("\n")
    for line, doc in zip(lines, pipeline.pipe(lines), strict=True):
        for token in doc:
            if not token.is_space:
                start = at + token.idx
                spans.append((start, start + len(token.text)))
                tags.append(token.tag_)
        at += len(line) + 1
    if not tags:
        raise InputError(f"{name} holds no words.")
    if not all(tags):
        raise InputError("the spaCy model has no tagger: give one with Penn Treebank tags.")
    return TaggedText(name, text, tuple(spans), tuple(tags))
