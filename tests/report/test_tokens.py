"""Labels of tokens: parts of characters, invisible characters, characters that turn the writing."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qs_jax.report import labels
from qs_jax.report.tokens import visible


@pytest.fixture(scope="module")
def by_bytes():
    """A byte-level tokenizer without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("a ❤é\n", None, ["a", " ", "⟨E2⟩", "⟨9D⟩", "⟨A4⟩❤", "⟨C3⟩", "⟨A9⟩é", "⏎\n"]),
        ("👩", 2, ["⟨F0⟩", "⟨9F⟩"]),  # a character cut off stays bytes
    ],
)
def test_bytes_of_characters(by_bytes, text, count, expected):
    ids = by_bytes(text).input_ids
    assert len(ids) == len(text.encode())
    assert labels(by_bytes, ids[:count]) == expected
    more = [*expected, "⟨62⟩b" if count else "b"]
    assert labels(by_bytes, [*ids[:count], *by_bytes("b").input_ids]) == more


def test_every_byte_is_known(by_bytes):
    every = "".join(map(chr, range(1, 0x250)))
    shown = "".join(labels(by_bytes, by_bytes(every).input_ids))
    for code in range(0xC0, 0x250):
        raw = chr(code).encode()
        assert f"⟨{raw[0]:02X}⟩⟨{raw[1]:02X}⟩{chr(code)}" in shown


def test_sentencepiece_bytes_and_spaces():
    names = ["<unk>", "▁the", "<0xC3>", "<0xA9>", "x"]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert labels(tokenizer, [1, 2, 3, 4, 0]) == [" the", "⟨C3⟩", "⟨A9⟩é", "x", "<unk>"]


def test_invisible_characters_are_code_points():
    assert visible("a\u202eb\u200dc\x00") == "a⟨U+202E⟩b⟨U+200D⟩c⟨U+0000⟩"
    assert visible("tab\t, café, مرحبا, 漢字, 🌈") == "tab⇥\t, café, مرحبا, 漢字, 🌈"
