"""Prompt caches: what is run once and continued is what one call for the whole rows gives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import presets
from qs_jax.config import PROTOCOLS, Config, Speculation
from qs_jax.engine import decode, fast
from qs_jax.errors import ConfigError, InputError
from qs_jax.testing import tiny_model
from tests.engine.contract import FAST, fast_case, few, model_of, params_of
from tests.oracle.comparison import assert_same_record
from tests.support import random_tokens, row_of

WHOLE, CUT, NEW = (30, 22, 17), (20, 13, 9), 6
CASES = [
    f"{name}-{protocol}"
    for name, qs in FAST.items()
    for protocol in PROTOCOLS
    if protocol == "continuation" or (qs and qs.prompts_only is None and qs.fusion is None)
]
BY_DEFAULT = ("dual-skip-qwen3-teacher-forced", "light-continuation")


def parts(rows):
    """The beginnings of rows, and what follows."""
    pairs = list(zip(rows, CUT, strict=True))
    return [row[:cut] for row, cut in pairs], [row[cut:] for row, cut in pairs]


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.prompt_tokens, expected.prompt_tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    if expected.record is not None:
        assert_same_record(found.record, expected.record, expected.record.real)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", few(CASES, *BY_DEFAULT))
def test_a_continued_cache_is_the_whole_call(case):
    """By the definition, in float64: first tokens, more tokens twice over, and a second turn."""
    name, protocol = re.fullmatch("(.*?)-(teacher-forced|continuation)", case).groups()
    params, cfg = fast_case(name, protocol, max_new_tokens=NEW)
    rows = [row_of(cfg.model, width) for width in WHOLE]
    first, rest = parts(rows)
    acts = cfg.quicksilver is not None and protocol == "continuation"
    limits = {"prompt_lengths": CUT} if acts else {}
    masked = cfg.replace(engine="masked" if cfg.quicksilver else "auto")
    expected = qs_jax.generate(params, rows, masked, **limits)
    cache = qs_jax.prefill(params, first, cfg)
    for _ in range(2):
        found = qs_jax.generate(params, rest, cfg, cache=cache, return_cache=True)
        assert_same(found, expected)
    turn = [[5, 6, 7], [8], [9, 10]]
    again = qs_jax.generate(params, turn, cfg, cache=found.cache)
    ran = zip(rows, found.tokens, turn, strict=True)
    longer = [row + new[:-1].tolist() + more for row, new, more in ran]
    assert_same(again, qs_jax.generate(params, longer, masked, **limits))


@pytest.mark.usefixtures("float64")
def test_prompt_lengths_need_no_cache():
    params, cfg = fast_case("quota-extrapolate", "continuation", max_new_tokens=NEW)
    rows = [row_of(cfg.model, width) for width in WHOLE]
    given = {"prompt_lengths": CUT}
    expected = qs_jax.generate(params, rows, cfg.replace(engine="masked"), **given)
    assert_same(qs_jax.generate(params, rows, cfg, **given), expected)


@pytest.mark.parametrize("name", few(("paper", "balanced", "small-cache"), "paper"))
def test_presets_continue(name):
    """The masked engine's cache is the rows themselves; `paper` fuses new tokens and needs it."""
    model = model_of("llama")
    params = params_of(model)
    cfg = presets.config(name, model, max_new_tokens=3, eos_token_ids=())
    rows = [row_of(model, 60)]
    limits = {"prompt_lengths": [50]} if cfg.effective_protocol == "continuation" else {}
    expected = qs_jax.generate(params, rows, cfg.replace(engine="masked"), **limits)
    cache = qs_jax.prefill(params, [rows[0][:50]], cfg)
    found = qs_jax.generate(params, [rows[0][50:]], cfg, cache=cache)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_drafts_penalties_and_samples_read_the_whole_row():
    """They look at all tokens so far, those in the cache included."""
    model = tiny_model(num_layers=2)
    params = params_of(model)
    rows = [[3, 4, 5, 6] * 6, [8, 9] * 9]
    given = {"temperature": 0.8, "repetition_penalty": 1.3}
    given["speculate"] = Speculation(gate=0, ngram=(1,))
    cfg = Config(model, max_new_tokens=12, eos_token_ids=(), seed=3, **given)
    expected = qs_jax.generate(params, rows, cfg)
    cache = qs_jax.prefill(params, [row[:10] for row in rows], cfg)
    found = qs_jax.generate(params, [row[10:] for row in rows], cfg, cache=cache)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert found.drafted.sum() > 0


def test_one_document_many_questions():
    model = tiny_model(num_layers=2)
    params, document = params_of(model), row_of(model, 40)
    cfg = Config(model, max_new_tokens=4, eos_token_ids=(), temperature=0.7)
    cache = qs_jax.prefill(params, document, cfg)
    questions = [row_of(model, width) for width in (3, 1, 9)]
    cfg = cfg.replace(num_return_sequences=2)
    found = qs_jax.generate(params, questions, cfg, cache=cache)
    expected = qs_jax.generate(params, [document + each for each in questions], cfg)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert found.sequences == expected.sequences


def test_long_continuations_run_in_parts():
    """More tokens than a step takes, in rows of very different lengths."""
    model = tiny_model(num_layers=2, max_positions=512)
    params, cfg = params_of(model), Config(model, max_new_tokens=3, eos_token_ids=())
    rows = [row_of(model, width) for width in (180, 40)]
    cache = qs_jax.prefill(params, [row[:30] for row in rows], cfg)
    found = qs_jax.generate(params, [row[30:] for row in rows], cfg, cache=cache)
    expected = qs_jax.generate(params, rows, cfg)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_a_turn_compiles_once():
    """Other tokens, lengths and settings that are numbers share the programs of a shape."""
    model = tiny_model(num_layers=2)
    params, sizes = params_of(model), []
    for seed in range(3):
        cfg = Config(model, max_new_tokens=4, eos_token_ids=(), temperature=0.5, seed=seed)
        cache = qs_jax.prefill(params, [row_of(model, 20), row_of(model, 12 + seed)], cfg)
        more = random_tokens(model, 2, 16 - seed, seed)
        qs_jax.generate(params, more, cfg, cache=cache, return_cache=True)
        programs = (fast.jit_fill, fast.jit_resume, decode.jit_run_until)
        sizes.append([program._cache_size() for program in programs])
    assert sizes[1:] == sizes[:-1]


def test_caches_that_do_not_fit_are_refused():
    model = model_of("llama")
    params, cfg = params_of(model), Config(model, max_new_tokens=2)
    cache = qs_jax.prefill(params, random_tokens(model, 2, 20), cfg)
    skip = cfg.replace(quicksilver=FAST["dual-skip"])
    with pytest.raises(ConfigError, match="another quicksilver"):
        qs_jax.generate(params, [[3]] * 2, skip, cache=cache)
    other = cfg.replace(model=model.replace(norm_eps=1e-4))
    with pytest.raises(ConfigError, match="another model"):
        qs_jax.generate(params, [[3]] * 2, other, cache=cache)
    with pytest.raises(InputError, match="the cache has 2 rows, the call 3"):
        qs_jax.generate(params, [[3]] * 3, cfg, cache=cache)
    with pytest.raises(InputError, match="belong to the call that made the cache"):
        qs_jax.generate(params, [[3]] * 2, cfg, cache=cache, prompt_lengths=[20, 20])
    with pytest.raises(InputError, match="positions"):
        qs_jax.generate(params, [[3] * 107] * 2, cfg, cache=cache)
    masked = qs_jax.prefill(params, [3, 4, 5], skip.replace(engine="masked"))
    with pytest.raises(ConfigError, match="the masked engine's"):
        qs_jax.generate(params, [3], skip, cache=masked)
    with pytest.raises(InputError, match="prompt_lengths is for protocol 'continuation'"):
        qs_jax.generate(params, [[3, 4]], cfg, prompt_lengths=[1])


@pytest.mark.parametrize("engine", ["masked", "compact"])
def test_overrides_stay_with_the_cache(engine):
    """Also where the other engine made it: then all tokens are full, so nothing halts."""
    model = model_of("llama")
    params, row = params_of(model), row_of(model, 30)
    cfg = Config(model, FAST["dual-skip"], max_new_tokens=3, eos_token_ids=())
    given = {"overrides": qs_jax.TokenOverrides(full_processing=np.ones((1, 20), bool))}
    cache = qs_jax.prefill(params, row[:20], cfg.replace(engine="compact"), **given)
    found = qs_jax.generate(params, row[20:], cfg.replace(engine=engine), cache=cache)
    given = {"overrides": qs_jax.TokenOverrides(full_processing=np.arange(30)[None] < 20)}
    expected = qs_jax.generate(params, row, cfg.replace(engine="masked"), **given)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_a_cache_goes_to_the_devices_of_the_call():
    model = tiny_model(num_layers=2)
    params = jax.device_put(params_of(model), jax.devices()[0])
    mesh, cfg = qs_jax.make_mesh(2, 1), Config(model, max_new_tokens=4, eos_token_ids=())
    rows = random_tokens(model, 2, 20)
    expected = qs_jax.generate(params, rows, cfg)
    for made, used in ((None, mesh), (mesh, None), (mesh, qs_jax.make_mesh(1, 2))):
        cache = qs_jax.prefill(params, rows[:, :15], cfg, devices=made)
        found = qs_jax.generate(params, rows[:, 15:], cfg, cache=cache, devices=used)
        np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_stream_of_drafts_hands_over_what_it_gave():
    """In the middle of several tokens that one step kept."""
    model = tiny_model(num_layers=2)
    params, row = params_of(model), [3, 4, 5, 6] * 5
    plain = Config(model, max_new_tokens=16, eos_token_ids=(), logits_processors=(in_rhythm,))
    cfg = plain.replace(speculate=Speculation(gate=0))
    whole = qs_jax.generate(params, row, plain).tokens[0].tolist()
    for count in range(1, 8):
        steps = qs_jax.stream(params, row, cfg)
        new = [int(next(steps).tokens[0]) for _ in range(count)]
        cache = steps.cache()
        assert cache.tokens[0].tolist() == row + new[:-1]
        rest = plain.replace(max_new_tokens=16 - count)
        found = qs_jax.generate(params, [new[-1]], rest, cache=cache)
        assert new + found.tokens[0].tolist() == whole


def in_rhythm(logits_BV, so_far):
    """What stood four tokens before is likely, so that drafts are kept."""
    back_B1 = jnp.maximum(so_far.lengths_B[:, None] - 4, 0)
    before_B1 = jnp.take_along_axis(so_far.tokens_BS, back_B1, axis=1)
    return logits_BV + 50.0 * jax.nn.one_hot(before_B1[:, 0], logits_BV.shape[1])


def test_a_stream_hands_over_its_cache():
    model = tiny_model(num_layers=2)
    params, cfg = params_of(model), Config(model, max_new_tokens=5, eos_token_ids=())
    rows = random_tokens(model, 2, 18)
    steps = qs_jax.stream(params, rows, cfg)
    with pytest.raises(InputError, match="has not begun"):
        steps.cache()
    new = np.stack([next(steps).tokens for _ in range(3)], axis=1)
    cache = steps.cache()
    assert next(steps, None) is None
    np.testing.assert_array_equal(cache.tokens, np.concatenate([rows, new[:, :-1]], axis=1))
    found = qs_jax.generate(params, new[:, -1:], cfg, cache=cache)
    expected = qs_jax.generate(params, np.concatenate([rows, new], axis=1), cfg)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(2, 1), (2, 2)])
def test_caches_live_on_a_mesh(sizes):
    """Three rows on two groups of devices: one is filled up, and leaves again."""
    params, cfg = fast_case("quota-extrapolate", "continuation", max_new_tokens=NEW)
    rows, mesh = [row_of(cfg.model, width) for width in WHOLE], qs_jax.make_mesh(*sizes)
    first, rest = parts(rows)
    expected = qs_jax.generate(params, rows, cfg, prompt_lengths=CUT, return_cache=True)
    cache = qs_jax.prefill(params, first, cfg, devices=mesh)
    given = {"devices": mesh, "return_cache": True}
    found = qs_jax.generate(params, rest, cfg, cache=cache, **given)
    assert_same(found, expected)
    turn = [[5, 6, 7], [8], [9, 10]]
    again = qs_jax.generate(params, turn, cfg, cache=found.cache, devices=mesh)
    assert_same(again, qs_jax.generate(params, turn, cfg, cache=expected.cache))
