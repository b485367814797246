"""Text in pieces is the text as a whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.gguf_tokenizer import build_tokenizer
from qs_jax.text import text_pieces
from tests.convert.gguf_files import byte_level_tokenizer, sentencepiece_tokenizer

TEXT = st.text(st.sampled_from("the thé 12 \n😀عx"), max_size=30)


def tokenizer_of(metadata):
    values = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return build_tokenizer(lambda name, default=None: values.get(name, default), 0)[0]


@pytest.fixture(scope="module", params=[byte_level_tokenizer, sentencepiece_tokenizer])
def tokenizer(request):
    return tokenizer_of(request.param())


@given(TEXT, TEXT)
def test_pieces_join_to_the_decoded_text(tokenizer, prompt, continuation):
    """Cut anywhere between two tokens: a leading space is kept, a cut character is completed."""
    ids = tokenizer(prompt + continuation).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        if before.endswith("\ufffd"):
            continue  # the prompt itself ends inside a character
        assert before + "".join(text_pieces(tokenizer, ids[:cut], ids[cut:])) == whole


def test_a_space_before_the_first_new_word_is_kept(tokenizer):
    prompt, new = tokenizer("the").input_ids, tokenizer("the the").input_ids
    new = new[len(prompt) :]
    assert "".join(text_pieces(tokenizer, prompt, new)) == " the"


def test_a_character_cut_by_the_end_shows(tokenizer):
    ids = tokenizer("t😀").input_ids
    text = "".join(text_pieces(tokenizer, ids[:-4], ids[-4:-1]))
    assert text
    assert set(text) == {"\ufffd"}


@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_tokens_give_some_text(tokenizer, ids):
    assert isinstance("".join(text_pieces(tokenizer, [], ids)), str)
