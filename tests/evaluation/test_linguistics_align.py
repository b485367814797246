"""Words in a text, and the words of each token, by properties and by hand."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics import align as align_text
from qs_jax.evaluation.linguistics import read_treebank, written
from qs_jax.evaluation.linguistics.align import (
    NO_WORD,
    SEVERAL,
    Aligned,
    Touched,
    touched_words,
    word_labels,
)
from qs_jax.evaluation.linguistics.spans import Sentence, join
from qs_jax.testing import toy_tokenizer
from tests.evaluation.miniature import (
    WORDS,
    write_treebank,
)

PLAIN = st.text(
    st.characters(blacklist_categories=["Z", "C"], blacklist_characters="\\`'.-"), min_size=1
)
PRINTED = st.sampled_from(
    [
        *"-LRB- -RRB- `` '' ` ' , . : ; ? ! % $ # n't 's C$".split(),
        *"5 U.S. can not ... 😀 👩‍👩‍👧 naïve 中文 é".split(),
    ]
)
WORD_LISTS = st.lists(st.one_of(PRINTED, PLAIN.filter(str.isprintable)), min_size=1, max_size=30)


@given(WORD_LISTS)
def test_every_character_but_spaces_belongs_to_one_word(words):
    text, spans = written(words)
    owners = [sum(start <= i < end for start, end in spans) for i in range(len(text))]
    assert [text[i] for i, count in enumerate(owners) if count == 0] == [" "] * owners.count(0)
    assert max(owners) == 1
    assert spans == sorted(spans)
    assert all(start < end for start, end in spans)
    assert "  " not in text
    assert text == text.strip()


def as_text(words):
    sentence = Sentence(tuple(words), ("NN",) * len(words), (), "given")
    return join([[sentence]], ["NOUN"] * len(words), name="given", tag_set="penn")


CORPUS = [
    "the old dog doesn't bark at me. " * 3,
    "it isn't in the U.S. (1/2 mile)",
    "in the in the",
]


@pytest.fixture(scope="module", params=[True, False], ids=["words", "across words"])
def byte_level(request):
    """A byte-level BPE; its merges stop at spaces, or do not."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=request.param
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model)


def bytes_touched(text, pieces):
    """The words each token touches, from the bytes its tokens spell: no offsets are used."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    char_at = [i for i, char in enumerate(text.text) for _ in char.encode()]
    at, found = 0, []
    for piece in pieces:
        size = len(bytes(byte_of[char] for char in piece))
        chars = set(char_at[at : at + size])
        at += size
        spans = zip(text.starts_W, text.ends_W, strict=True)
        found.append([w for w, (start, end) in enumerate(spans) if chars & set(range(start, end))])
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


def test_an_emoji_of_many_tokens_and_a_token_of_several_words(byte_level):
    text = as_text(["in", "the", "👩‍👩‍👧", "dog", "in", "the"])
    aligned = align_text(text, byte_level, 999)
    ids = aligned.windows.tokens_WT[0].tolist()
    pieces = byte_level.convert_ids_to_tokens(ids)
    assert (aligned.touched_WT.first <= 2).sum() >= 18 + 1  # its 18 bytes, one token each at most
    crossing = [p for p in pieces if "Ġthe" in p and p.startswith("in")]
    widths = (aligned.touched_WT.last - aligned.touched_WT.first + 1)[0]
    assert bool(crossing) == bool((widths > 1).any())


def test_classes_of_tokens(tmp_path):
    """Characters as tokens, then hand-made tokens over several words."""
    text = read_treebank(write_treebank(tmp_path))
    offsets = [(0, 3), (3, 7), (7, 8), (4, 11), (12, 16), (16, 19), (14, 19), (0, 0), (31, 34)]
    first, last = touched_words(np.array(offsets), text)
    assert [text.words[a : b + 1] for a, b in zip(first, last, strict=True)] == [
        *[
            ["The"],
            ["old"],
            [],
            ["old", "dog"],
            ["does"],
            ["n't"],
            ["does", "n't"],
            [],
            ['"', "Run"],
        ]
    ]
    aligned = align_text(text, toy_tokenizer(), 8, 2)
    assert aligned.windows.tokens_WT.shape == (2, 8)
    labels = [str(number) for number in range(len(WORDS))]
    assert aligned.classes(labels).tolist() == [
        ["0", "0", "0", NO_WORD, "1", "1", "1", NO_WORD],
        ["2", "2", "2", NO_WORD, "3", "3", "3", "3"],
    ]
    made = Aligned(text, aligned.windows, Touched(first[None], last[None]))
    got = made.classes(word_labels(text)["universal"])[0].tolist()
    assert got == ["DET", "ADJ", NO_WORD, SEVERAL, "VERB", "ADV", SEVERAL, NO_WORD, SEVERAL]
    assert made.classes(["same"] * len(WORDS))[0].tolist()[3] == "same"


def test_a_sentencepiece_style_tokenizer():
    """Metaspace and bytes for what it does not know; a token in front that stands for nothing."""
    pieces = ["<s>", "▁", "▁dog", "s", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate([*pieces, "d", "o", "g", "▁d", "▁do"])},
            merges=[("▁", "d"), ("▁d", "o"), ("▁do", "g")],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<s>",
        )
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    text = as_text(["dogs", "😀", "dog", "."])
    aligned = align_text(text, PreTrainedTokenizerFast(tokenizer_object=model), 99)
    tokens = [pieces[i] for i in aligned.windows.tokens_WT[0]]
    got = [aligned.touched_WT.first[0][i] for i in range(len(tokens))]
    assert tokens == [
        *["<s>", "▁dog", "s", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁dog", "."]
    ]
    inside = aligned.touched_WT.first[0] <= aligned.touched_WT.last[0]
    assert inside.tolist() == [False, True, True, False, *[True] * 6]
    assert [got[i] for i in np.flatnonzero(inside)] == [0, 0, 1, 1, 1, 1, 2, 3]


def test_tokenizers_that_cannot_be_aligned(tmp_path, byte_level):
    text = as_text(["a", "dog"])

    class Slow:
        def __call__(self, *args, **options):
            raise NotImplementedError

    class Lossy:
        def __call__(self, *args, **options):
            return {"input_ids": [1, 2], "offset_mapping": [(0, 1), (1, 2)]}

    with pytest.raises(InputError, match="fast tokenizer"):
        align_text(text, Slow(), 4)
    with pytest.raises(InputError, match="no token for 1 of 2 words, the first at character 2"):
        align_text(text, Lossy(), 4)
