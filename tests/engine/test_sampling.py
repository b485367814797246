"""The filters against Hugging Face's, and the draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qs_jax
from qs_jax.config import Config, ModelConfig, Sampling
from qs_jax.engine import sampling
from qs_jax.errors import ConfigError
from qs_jax.testing import tiny_model, tiny_params

MODEL = tiny_model()


def filtered(logits_BV, **settings):
    plan, numbers = sampling.plan_of(Config(MODEL, **settings), 16)
    return np.asarray(sampling.filter_logits(jnp.asarray(logits_BV), plan, numbers))


@pytest.mark.hf
@pytest.mark.parametrize("top_k", [None, 1, 5, 33])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 0.99])
@pytest.mark.parametrize("min_p", [None, 0.02, 0.4, 1.0])
def test_filters_equal_hugging_face(top_k, top_p, min_p):
    torch = pytest.importorskip("torch")
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits_BV = np.random.default_rng(0).normal(0, 3, (8, MODEL.vocab_size)).astype(np.float32)
    theirs = TemperatureLogitsWarper(0.8)(None, torch.tensor(logits_BV))
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    if min_p:
        theirs = MinPLogitsWarper(min_p)(None, theirs)
    ours = filtered(logits_BV, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    # Ours are relative to the largest, which changes no probability.
    expected = theirs.numpy() - theirs.numpy().max(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10_000), st.floats(1e-4, 1.0), st.floats(0.1, 30.0))
def test_the_nucleus_is_the_smallest_set_that_holds_the_probability(seed, top_p, spread):
    """Against the definition, by sorting in float64."""
    logits = np.random.default_rng(seed).normal(0, spread, (1, 300))
    prob = np.exp(logits - logits.max())
    prob = (prob / prob.sum()).astype(np.float32)
    threshold = jax.jit(sampling.nucleus_threshold)(jnp.asarray(prob), jnp.float32(top_p))
    kept = np.sort(prob[prob >= np.asarray(threshold)].astype(np.float64))
    assert kept.size >= 1
    assert kept.sum() >= min(top_p, 1.0) - 1e-5
    assert kept[1:].sum() < top_p + 1e-5, "without its least likely token it holds less"


def test_draws_follow_the_filtered_distribution():
    """Frequencies of 20,000 draws are within five standard errors of the exact probabilities."""
    logits = np.random.default_rng(1).normal(0, 2, (1, MODEL.vocab_size)).astype(np.float32)
    settings = {"temperature": 1.3, "top_k": 12, "top_p": 0.9}
    kept = filtered(logits, **settings)[0]
    exact = np.exp(kept - kept.max()) / np.exp(kept - kept.max()).sum()
    plan, numbers = sampling.plan_of(Config(MODEL, **settings), 16)
    draws = 20_000
    seen = jnp.zeros((draws, 1), bool)
    keys = sampling.row_keys(jnp.uint32(3), draws)
    repeated = jnp.broadcast_to(jnp.asarray(logits), (draws, MODEL.vocab_size))
    picks = sampling.choose(repeated, seen, keys, jnp.zeros(draws, jnp.int32), plan, numbers)
    frequency = np.bincount(np.asarray(picks), minlength=MODEL.vocab_size) / draws
    error = np.sqrt(exact * (1 - exact) / draws)
    assert (np.abs(frequency - exact) <= 5 * error).all()
    assert (exact > 0).sum() > 4


def test_seeds_rows_and_steps_draw_differently():
    params = tiny_params(MODEL, scale=1.0)
    cfg = Config(MODEL, max_new_tokens=24, temperature=1.0, eos_token_ids=())
    rows = [[5, 6, 7]] * 3
    first = qs_jax.generate(params, rows, cfg).tokens
    again = qs_jax.generate(params, rows, cfg).tokens
    other = qs_jax.generate(params, rows, cfg.replace(seed=1)).tokens
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5
    assert (first[0] != first[1]).mean() > 0.5
    assert len(set(first[0])) > 6


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-38},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 1.0},
    ],
)
def test_a_tiny_temperature_or_nucleus_is_greedy(settings):
    params, greedy = tiny_params(MODEL), Config(MODEL, max_new_tokens=12)
    expected = qs_jax.generate(params, [[4, 5]], greedy).tokens
    sampled = qs_jax.generate(params, [[4, 5]], greedy.replace(**settings))
    np.testing.assert_array_equal(sampled.tokens, expected)


def test_a_call_that_says_nothing_takes_the_settings_of_the_model():
    """Whatever it says wins, and there is a way to say that a filter is off."""
    stated = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    model = MODEL.replace(generation=Sampling(**stated))
    assert Config(model).sampling == Sampling(**stated)
    assert Config(model, top_k=9).sampling == Sampling(**stated | {"top_k": 9})
    off = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    assert Config(model, **off).sampling == Config(MODEL).sampling == Sampling()
    assert ModelConfig.from_dict(model.to_dict()).generation == model.generation
    plain, params = Config(MODEL, max_new_tokens=12), tiny_params(MODEL, scale=1.0)
    sampled = qs_jax.generate(params, [[4, 5]], plain.replace(model=model)).tokens
    expected = qs_jax.generate(params, [[4, 5]], plain.replace(**stated)).tokens
    np.testing.assert_array_equal(sampled, expected)
    assert (sampled != qs_jax.generate(params, [[4, 5]], plain).tokens).any()


def test_settings_may_be_numpy_scalars_and_lists():
    cfg = Config(
        MODEL, max_new_tokens=np.int64(3), top_k=np.int32(5), eos_token_ids=[2, np.int64(3)]
    )
    assert cfg == Config(MODEL, max_new_tokens=3, top_k=5, eos_token_ids=(2, 3))
    assert hash(cfg) == hash(Config(MODEL, max_new_tokens=3, top_k=5, eos_token_ids=(2, 3)))
    assert Config(MODEL, eos_token_ids=7).stop_ids == (7,)
    with pytest.raises(ConfigError, match=r"model must be .* an instance of ModelConfig"):
        Config("ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed must be a valid integer"),
        ({"temperature": "warm"}, "temperature must be a valid number"),
        ({"quicksilver": "paper"}, "quicksilver must be .* an instance of"),
        ({"eos_token_ids": (97,)}, "outside the vocabulary"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(MODEL, **settings)
