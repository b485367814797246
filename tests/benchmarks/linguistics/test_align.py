"""Words in a text, and the words of each token, by properties and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.linguistics.align import NO_WORD, SEVERAL, Aligned, Touched, align, touched_words
from benchmarks.linguistics.text import TaggedText, print_words
from benchmarks.linguistics.treebank import read_treebank
from qs_jax.errors import InputError
from qs_jax.testing import toy_tokenizer
from tests.benchmarks.linguistics.miniature import WORDS, write_treebank
from tests.convert.gguf_files import byte_level_tokenizer
from tests.test_text import tokenizer_of

PLAIN = st.text(
    st.characters(blacklist_categories=["Z", "C"], blacklist_characters="\\`'.-"), min_size=1
)
PRINTED = st.sampled_from(
    "-LRB- -RRB- `` '' ` ' , . : ; ? ! % $ n't 's C$ 5 U.S. can not ... 😀 👩‍👩‍👧 中文".split()
)
WORD_LISTS = st.lists(st.one_of(PRINTED, PLAIN.filter(str.isprintable)), min_size=1, max_size=30)


def as_text(words):
    text, spans = print_words(words)
    return TaggedText("given", text, tuple(spans), ("NN",) * len(words))


@pytest.fixture(scope="module")
def byte_level():
    return tokenizer_of(byte_level_tokenizer())


def bytes_touched(text, pieces):
    """The words each token touches, from the bytes its tokens spell: no offsets are used."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    char_at = [i for i, char in enumerate(text.text) for _ in char.encode()]
    at, found = 0, []
    for piece in pieces:
        size = len(bytes(byte_of[char] for char in piece))
        chars = set(char_at[at : at + size])
        at += size
        found.append([w for w, span in enumerate(text.spans) if chars & set(range(*span))])
    assert at == len(char_at)
    return found


@given(words=WORD_LISTS)
def test_every_token_has_the_words_its_characters_touch(byte_level, words):
    text = as_text(words)
    encoded = byte_level(text.text, return_offsets_mapping=True)
    first, last = touched_words(np.array(encoded["offset_mapping"]), text)
    got = [list(range(a, b + 1)) for a, b in zip(first, last, strict=True)]
    assert got == bytes_touched(text, byte_level.convert_ids_to_tokens(encoded["input_ids"]))
    assert {word for touched in got for word in touched} == set(range(len(words)))


def test_classes_of_tokens(tmp_path):
    """Characters as tokens, then hand-made tokens over several words."""
    text = read_treebank(write_treebank(tmp_path))
    offsets = [(0, 3), (3, 7), (7, 8), (4, 11), (12, 16), (16, 19), (14, 19), (0, 0), (31, 34)]
    first, last = touched_words(np.array(offsets), text)
    touched = [" ".join(text.words[a : b + 1]) for a, b in zip(first, last, strict=True)]
    assert touched == ["The", "old", "", "old dog", "does", "n't", "does n't", "", '" Run']
    aligned = align(text, toy_tokenizer(), 8, 2)
    assert aligned.windows.tokens_WT.shape == (2, 8)
    labels = [str(number) for number in range(len(WORDS))]
    assert aligned.classify(labels).tolist() == [
        ["0", "0", "0", NO_WORD, "1", "1", "1", NO_WORD],
        ["2", "2", "2", NO_WORD, "3", "3", "3", "3"],
    ]
    made = Aligned(text, aligned.windows, Touched(first[None], last[None]))
    got = made.classify(text.tags)[0].tolist()
    assert got == ["DT", "JJ", NO_WORD, SEVERAL, "VBZ", "RB", SEVERAL, NO_WORD, SEVERAL]
    assert made.classify(["same"] * len(WORDS))[0].tolist()[3] == "same"


def test_a_tokenizer_that_loses_words():
    def lossy(*args, **options):
        return {"input_ids": [1, 2], "offset_mapping": [(0, 1), (1, 2)]}

    with pytest.raises(InputError, match="no token for 1 words: 'dog'"):
        align(as_text(["a", "dog"]), lossy, 4)
