"""Stop strings, continuations of one prompt, and processors of the caller's own."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders

import qs_jax
from qs_jax.config import Config, Speculation
from qs_jax.engine import decode, fast
from qs_jax.engine.stops import cut, held_back, stop_table, token_bytes
from qs_jax.errors import ConfigError, InputError
from qs_jax.testing import tiny_model, tiny_params, toy_tokenizer
from qs_jax.text import before_stop
from tests.convert.gguf_files import byte_level_tokenizer, sentencepiece_tokenizer
from tests.test_text import tokenizer_of

MODEL = tiny_model(num_layers=2, eos_token_ids=())
PIECES = st.lists(st.sampled_from(["a", "b", "ab", "aab", "\n", "é", " "]), max_size=12)
STOPS = st.lists(st.text("ab\né", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@pytest.fixture(scope="module")
def params():
    return tiny_params(MODEL)


@pytest.fixture(scope="module", params=[byte_level_tokenizer, sentencepiece_tokenizer])
def tokenizer(request):
    return tokenizer_of(request.param())


@given(st.text("the thé 12\n😀", max_size=24), st.text("the é1\n😀", min_size=1, max_size=4))
def test_the_table_finds_what_is_in_the_text(tokenizer, text, stop):
    """However tokens cut it, characters of several tokens included; and no sooner."""
    size = len(tokenizer)
    table_XV = stop_table(tokenizer, (stop, "zz"), size)
    ids, state, end = (
        tokenizer("e" + text, add_special_tokens=False).input_ids,
        0,
        len(table_XV) - 1,
    )
    pieces = token_bytes(tokenizer, size)
    for at, token in enumerate(ids):
        state = int(table_XV[state, token])
        so_far = b"".join(pieces[each] for each in ids[: at + 1])
        assert (state == end) == (stop.encode() in so_far)


@given(st.text("the thé 12\n😀", max_size=24))
def test_tokens_as_bytes_are_the_decoded_text(tokenizer, text):
    ids, pieces = tokenizer("e" + text).input_ids, token_bytes(tokenizer, len(tokenizer))
    whole = b"".join(pieces[each] for each in ids).decode()
    assert whole.removeprefix(" ") == tokenizer.decode(ids, skip_special_tokens=True)


@given(PIECES, STOPS)
def test_pieces_end_before_the_first_stop_string(pieces, stop):
    """And a piece is given as soon as no stop string can begin in it."""
    whole, found = "".join(pieces), []
    for text in before_stop(iter(pieces), stop):
        found.append(text)
    assert "".join(found) == cut(whole, stop)
    assert not any(each in "".join(found) for each in stop)


@given(st.text("ab", max_size=6), STOPS)
def test_what_is_held_back_may_begin_a_stop_string(text, stop):
    ends = [n for n in range(len(text) + 1) if any(s[:n] == text[len(text) - n :] for s in stop)]
    longest = max((n for n in ends if n < max(map(len, stop))), default=0)
    if not any(each in text for each in stop):
        assert held_back(text, stop) == longest


def plain_of(params, **settings):
    """Rows of tokens without stops, and their text: token i + 2 is the character i + 32."""
    cfg = Config(MODEL, max_new_tokens=24, **settings)
    prompts = np.arange(40).reshape(2, 20) % 95 + 2
    out = qs_jax.generate(params, prompts, cfg)
    texts = ["".join(chr(30 + t) for t in row) for row in np.maximum(out.tokens, 2)]
    return cfg, prompts, out, texts


@pytest.mark.parametrize("more", [{}, {"speculate": Speculation(gate=0)}])
def test_rows_end_where_their_text_holds_a_stop_string(params, more):
    """Strings of two characters from the middle of each row's own text; the other row goes on."""
    cfg, prompts, plain, texts = plain_of(params, temperature=0.9, seed=5, **more)
    for text in texts:
        stop = (text[9:11], "\x00none")
        cfg_stop = cfg.replace(stop=stop)
        out = qs_jax.generate(params, prompts, cfg_stop, tokenizer=toy_tokenizer())
        for row, whole in enumerate(texts):
            at = whole.find(stop[0])
            length = 24 if at < 0 else at + 2
            assert out.lengths[row] == length
            np.testing.assert_array_equal(out.tokens[row, :length], plain.tokens[row, :length])


def test_stop_strings_of_near_lengths_share_a_program(params):
    cfg, prompts, _, texts = plain_of(params)
    sizes = []
    for stop in (texts[0][3:5], texts[1][7:12], "no such text"):
        given = {"tokenizer": toy_tokenizer()}
        qs_jax.generate(params, prompts, cfg.replace(stop=(stop,)), **given)
        sizes.append([each._cache_size() for each in (fast.jit_start, decode.jit_run_until)])
    assert sizes[1:] == sizes[:-1]


def test_what_stop_strings_need(params):
    with pytest.raises(ConfigError, match="stop holds an empty string"):
        Config(MODEL, stop=("a", ""))
    with pytest.raises(ConfigError, match="give tokenizer="):
        qs_jax.generate(params, [[3]], Config(MODEL, stop="a"))
    assert Config(MODEL, stop="\n\n").stop == ("\n\n",)


def test_special_tokens_have_no_text():
    tokenizer = toy_tokenizer()
    pieces = token_bytes(tokenizer, 100)
    assert pieces[:2] == [b"", b""]
    assert pieces[2:5] == [b" ", b"!", b'"']
    assert pieces[97:] == [b"", b"", b""]
    table_XV = stop_table(tokenizer, ("!!",), 100)
    assert table_XV[table_XV[table_XV[0, 3], 1], 3] == len(table_XV) - 1, "an end in between"


def test_a_stop_string_that_is_a_special_token_ends_a_row(params):
    """Decoding leaves it out of the text, so its id counts."""
    cfg, prompts, plain, _ = plain_of(params, temperature=0.9, seed=5)
    given = {"tokenizer": toy_tokenizer()}
    token = int(plain.tokens[0, 7])
    given["tokenizer"].add_special_tokens({"additional_special_tokens": [chr(30 + token)]})
    out = qs_jax.generate(params, prompts, cfg.replace(stop=chr(30 + token)), **given)
    assert out.lengths[0] == plain.tokens[0].tolist().index(token) + 1


def test_decoders_that_are_not_followed_are_refused():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Replace(Regex("a+"), "b")
    with pytest.raises(InputError, match="decoder Replace by Regex"):
        token_bytes(tokenizer, 97)
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.decoder = None
    ids, pieces = [40, 41, 42], token_bytes(tokenizer, 97)
    assert b"".join(pieces[each] for each in ids).decode() == " " + tokenizer.decode(ids)


def test_continuations_of_one_prompt(params):
    """Rows of a prompt are together, differ, and are those of a batch that repeats it."""
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    cfg = Config(MODEL, max_new_tokens=8, temperature=1.0, num_return_sequences=3)
    out = qs_jax.generate(params, prompts, cfg)
    repeated = [row for row in prompts for _ in range(3)]
    expected = qs_jax.generate(params, repeated, cfg.replace(num_return_sequences=1))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert out.prompt_lengths.tolist() == [3, 3, 3, 4, 4, 4]
    assert len({tuple(row) for row in out.tokens[:3].tolist()}) == 3
    with pytest.raises(ConfigError, match="would repeat one greedy text"):
        Config(MODEL, num_return_sequences=2)


def never_twice(logits_BV, so_far):
    """No token that the row has: an independent check is that no row repeats itself."""
    width, rows_B1 = so_far.tokens_BS.shape[1], jnp.arange(len(logits_BV))[:, None]
    there_BS = jnp.arange(width)[None] < so_far.lengths_B[:, None]
    lowest = jnp.where(there_BS, -jnp.inf, jnp.inf)
    return logits_BV.at[rows_B1, so_far.tokens_BS].min(lowest)


@pytest.mark.parametrize("speculate", [None, Speculation(gate=0)])
def test_processors_see_all_tokens_so_far(params, speculate):
    prompts = [[5, 6, 7, 5, 6], [8, 9, 10]]
    cfg = Config(MODEL, max_new_tokens=20, logits_processors=(never_twice,), speculate=speculate)
    out = qs_jax.generate(params, prompts, cfg)
    for row, sequence in enumerate(out.sequences):
        new = sequence[len(prompts[row]) :]
        assert len(set(new)) == 20
        assert not set(new) & set(prompts[row])
    masked = qs_jax.generate(params, prompts, cfg.replace(speculate=None))
    np.testing.assert_array_equal(out.tokens, masked.tokens)
    again = Config.from_dict(cfg.to_dict() | {"model": MODEL, "speculate": speculate})
    assert again.logits_processors == (never_twice,)


def test_processors_compile_once(params):
    sizes = []
    for seed in range(3):
        cfg = Config(MODEL, max_new_tokens=4, logits_processors=(never_twice,), seed=seed)
        qs_jax.generate(params, [[5, 6, 7 + seed]], cfg)
        sizes.append([each._cache_size() for each in (fast.jit_start, decode.jit_run_until)])
    assert sizes[1:] == sizes[:-1]
