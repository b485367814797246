"""Drafts change no token: against plain decoding, and lookups against a search in plain Python."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qs_jax
from qs_jax import presets
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, QuickSilverConfig, Speculation
from qs_jax.engine.speculate import look_up
from qs_jax.errors import ConfigError
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import FAST, MATRIX, fast_case, few, model_of, params_of

ALWAYS = Speculation(length=3, gate=0)
# Little to say, and said again and again; rows end at different steps.
REPETITIVE = [[5, 6, 7] * 7, [9] * 12, [3, 4] * 5 + [8] + [3, 4] * 3, [11, 12, 13, 14]]


def search(tokens, ngram, length):
    """The draft for a list of tokens, and the n-gram's place; None twice without an earlier one."""
    for place, size in enumerate(ngram):
        for end in range(len(tokens) - 2, size - 2, -1):
            if tokens[end - size + 1 : end + 1] == tokens[len(tokens) - size :]:
                text, rhythm = list(tokens), len(tokens) - 1 - end
                for _ in range(length):
                    text.append(text[-rhythm])
                return text[len(tokens) :], place
    return None, None


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=24),
    st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
    st.integers(1, 7),
)
def test_a_draft_follows_the_latest_earlier_occurrence(tokens, ngram, length):
    expected, place = search(tokens, ngram, length)
    history = jnp.asarray(tokens + [0] * (40 - len(tokens)), jnp.int32)
    draft, by = look_up(history, jnp.int32(len(tokens) - 1), tuple(ngram), length)
    if expected is None:
        assert by == len(ngram)
    else:
        assert by == place
        np.testing.assert_array_equal(draft, expected)


def both(cfg, settings, prompts, params=None, **more):
    """Outputs without drafts and with them, found equal; the second is returned."""
    params = params_of(cfg.model) if params is None else params
    plain = qs_jax.generate(params, prompts, cfg, **more)
    drafted = qs_jax.generate(params, prompts, cfg.replace(speculate=settings), **more)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.lengths, plain.lengths)
    np.testing.assert_allclose(drafted.logprobs, plain.logprobs, atol=1e-4)
    assert (drafted.passes + drafted.accepted == plain.passes).all()
    assert (drafted.accepted <= drafted.drafted).all()
    assert not plain.drafted.any()
    return drafted


BY_DEFAULT = [("greedy", "llama"), ("sampled-penalised", "gpt2")]
SAMPLING = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3},
    "penalised": {"repetition_penalty": 1.3},
    "sampled-penalised": {"temperature": 0.4, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize(
    ("name", "model_type"), few(itertools.product(SAMPLING, ("llama", "gpt2")), *BY_DEFAULT)
)
def test_drafts_change_no_token(name, model_type):
    cfg = Config(model_of(model_type), max_new_tokens=29, eos_token_ids=(), **SAMPLING[name])
    out = both(cfg, ALWAYS, REPETITIVE)
    assert out.drafted.any()
    if name == "greedy":
        assert (out.accepted > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        Speculation(),
        Speculation(length=1, ngram=1, gate=0),
        Speculation(length=7, ngram=(5, 1), gate=0.5),
        Speculation(length=3, gate=0, exact=True),
    ],
    ids=["default", "shortest", "longest", "exact"],
)
@pytest.mark.slow
def test_any_settings_change_no_token(settings):
    cfg = Config(model_of("llama"), max_new_tokens=40, eos_token_ids=())
    both(cfg, settings, REPETITIVE)


@hypothesis.settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(3, 6), min_size=9, max_size=14), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 9),
)
def test_drafts_change_no_token_of_adversarial_texts(prompts, temperature, seed):
    """Four token ids in any order, one of which ends a row, often inside a draft."""
    model = model_of("llama", vocab_size=7)
    given = {"temperature": temperature, "seed": seed, "eos_token_ids": 5}
    cfg = Config(model, max_new_tokens=16, **given)
    both(cfg, ALWAYS, prompts)


def test_an_end_token_inside_a_draft_ends_the_row():
    cfg = Config(model_of("llama"), max_new_tokens=29, eos_token_ids=())
    free = both(cfg, ALWAYS, REPETITIVE)
    end = int(free.tokens[0, 11])
    out = both(cfg.replace(eos_token_ids=end), ALWAYS, REPETITIVE)
    assert (out.lengths < 29).any()
    assert (out.tokens[np.arange(29)[None] >= out.lengths[:, None]] == 0).all()


def test_a_row_does_not_depend_on_its_batch():
    cfg = Config(model_of("llama"), max_new_tokens=21, eos_token_ids=(), speculate=ALWAYS)
    together = qs_jax.generate(params_of(cfg.model), REPETITIVE, cfg)
    alone = qs_jax.generate(params_of(cfg.model), REPETITIVE[1:2], cfg)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])


@pytest.mark.parametrize("name", few(FAST, "light"))
def test_drafts_go_with_mechanisms_on_prompts(name):
    """The same tokens, and the same record of them."""
    with jax.enable_x64(True):
        params, cfg = fast_case(name, "continuation", max_new_tokens=21, eos_token_ids=())
        plain = qs_jax.generate(params, REPETITIVE, cfg)
        out = both(cfg, ALWAYS, REPETITIVE, params)
    if plain.record is not None:
        np.testing.assert_array_equal(out.record.depth, plain.record.depth)
        np.testing.assert_array_equal(out.record.kv_held, plain.record.kv_held)
        assert not out.record.simulated


def test_streaming_gives_the_tokens_of_generate():
    cfg = Config(model_of("llama"), max_new_tokens=21, eos_token_ids=(7,), speculate=ALWAYS)
    params = params_of(cfg.model)
    expected = qs_jax.generate(params, REPETITIVE, cfg)
    rows, ended = [[] for _ in REPETITIVE], np.zeros(len(REPETITIVE), bool)
    for step in qs_jax.stream(params, REPETITIVE, cfg):
        assert not (step.is_new & ended).any()
        ended = step.done
        for row in np.flatnonzero(step.is_new):
            rows[row].append(int(step.tokens[row]))
    assert rows == [expected.tokens[b, :n].tolist() for b, n in enumerate(expected.lengths)]
    for name in ("passes", "drafted", "accepted"):
        np.testing.assert_array_equal(getattr(step, name), getattr(expected, name))


def test_a_closed_gate_verifies_nothing_and_an_open_one_every_draft():
    cfg = Config(model_of("llama"), max_new_tokens=21, eos_token_ids=())
    params = params_of(cfg.model)
    closed = cfg.replace(speculate=Speculation(gate=99))
    out = qs_jax.generate(params, REPETITIVE, closed)
    assert not out.drafted.any()
    np.testing.assert_array_equal(out.passes, out.lengths - 1)
    wide = qs_jax.generate(params, REPETITIVE, cfg.replace(speculate=ALWAYS))
    assert (wide.passes < out.passes).any()


def test_a_gate_closes_on_lookups_that_are_wrong():
    """Sampling at random from many tokens: what follows an n-gram says nothing."""
    model = model_of("llama")
    settings = Speculation(length=3, ngram=1, gate=0.5)
    cfg = Config(model, max_new_tokens=100, eos_token_ids=(), temperature=50.0)
    kept = qs_jax.generate(params_of(model), [[4, 5] * 8], cfg.replace(speculate=settings))
    always = settings.replace(gate=0)
    tried = qs_jax.generate(params_of(model), [[4, 5] * 8], cfg.replace(speculate=always))
    assert kept.drafted[0] < tried.drafted[0] / 4


def test_exact_steps_round_alike_whatever_was_drafted():
    """In bfloat16, to the last bit: with drafts, and where none is ever found."""
    model = model_of("llama", dtype="bfloat16")
    cfg = Config(model, max_new_tokens=60, eos_token_ids=())
    found = Speculation(length=3, gate=0, exact=True)
    outs = [
        qs_jax.generate(params_of(model), REPETITIVE, cfg.replace(speculate=each))
        for each in (found, found.replace(ngram=(100,)))
    ]
    assert outs[0].accepted.any()
    assert not outs[1].accepted.any()
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_array_equal(outs[0].logprobs, outs[1].logprobs)


def test_what_cannot_be_drafted_is_refused_by_name():
    model = model_of("llama")
    with pytest.raises(ConfigError, match="halting, kv_skip would act on them"):
        Config(model, FAST["dual-skip"], speculate=Speculation())
    params, cfg = params_of(model), presets.config("fast-answers", model, engine="masked")
    with pytest.raises(ConfigError, match="'masked' keeps no cache"):
        qs_jax.generate(params, [[1, 2, 3]], cfg)
    assert qs_jax.score(params, [[1, 2, 3]], cfg, prompt_lengths=[2]).perplexity > 0
    cfg = Config(model, MATRIX["F"], protocol="continuation", speculate=Speculation())
    with pytest.raises(ConfigError, match="needs the fast engines: fusion"):
        qs_jax.generate(params_of(model), [[1, 2, 3]], cfg)
    for wrong in ({"length": 8}, {"length": 0}, {"ngram": ()}, {"ngram": (0,)}, {"gate": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Speculation(**wrong)


def test_the_preset_fast_answers_is_balanced_with_drafts():
    model = model_of("llama")
    cfg = presets.config("fast-answers", model, max_new_tokens=5)
    assert cfg == presets.config("balanced", model, max_new_tokens=5, speculate=Speculation())
    assert cfg.effective_protocol == "continuation"
    assert presets.config("balanced", model).speculate is None


def test_exact_drafts_under_a_window_with_keys_left_out():
    """Slots do not tell positions there, and new tokens see themselves."""
    model = tiny_model("mistral", num_layers=4)
    params, row = tiny_params(model), [3, 4, 5, 6] * 6
    halting = HaltingConfig(rule="quota", layers=(1, 2), quota=(0.5, 0.9), entropy=None)
    qs = QuickSilverConfig(halting, KVSkipConfig("skip"), sink_tokens=1, recent_tokens=3)
    cfg = Config(model, qs, max_new_tokens=12, eos_token_ids=())
    expected = qs_jax.generate(params, row, cfg.replace(engine="masked"))
    found = qs_jax.generate(
        params, row, cfg.replace(speculate=Speculation(gate=0, exact=True, ngram=1))
    )
    assert found.drafted.sum() > 0
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
