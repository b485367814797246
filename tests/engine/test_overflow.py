"""Numbers beyond float32: an error, never a plausible result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import presets
from qs_jax.config import Config
from qs_jax.engine import attention, sampling
from qs_jax.errors import InputError, NonFiniteError
from qs_jax.models import layers
from qs_jax.state import NEVER
from qs_jax.testing import tiny_model, tiny_params

ROWS = [list(range(5, 25)), list(range(40, 55))]
# Where the weights are so large that the squares of a state overflow, though no state does.
LARGE = {
    "embeddings": ("embed", "tokens"),
    "attention": ("layers", "out", "kernel"),
    "mlp": ("layers", "down", "kernel"),
}


def scaled(params, path, factor, rows=...):
    """Parameters with some rows of an array times a factor."""
    if not path:
        return params.at[rows].multiply(factor)
    return params | {path[0]: scaled(params[path[0]], path[1:], factor, rows)}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e18, 1e19, 1e20, 3e38])
def test_a_norm_is_right_or_not_a_number(kind, size):
    """Against float64."""
    model = tiny_model(kind)
    norm = (layers.layer_norm if kind == "gpt2" else layers.rms_norm)(model)
    x = size * np.random.default_rng(0).uniform(-1, 1, (3, model.hidden_size)).astype(np.float32)
    norm = norm.bind(norm.init(jax.random.key(0), x))
    found = np.asarray(layers.normed(norm, jnp.asarray(x), model))
    centred = x.astype(float) - (x.astype(float).mean(-1, keepdims=True) if kind == "gpt2" else 0)
    exact = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.norm_eps)
    if size < 1e19:
        np.testing.assert_allclose(found, exact, atol=1e-5)
    else:
        assert np.isnan(found).all() or np.allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "preset"),
    [
        ("embeddings", "off"),
        pytest.param("attention", "off", marks=pytest.mark.slow),
        ("mlp", "balanced"),
        pytest.param("mlp", "small-cache", marks=pytest.mark.slow),
    ],
)
def test_states_whose_squares_overflow_are_reported(where, preset):
    model = tiny_model("gpt2" if where == "attention" else "llama")
    params = scaled(tiny_params(model), LARGE[where], 1e21)
    settings = {"max_new_tokens": 2, "continuation_tokens": 8}
    cfg = Config(model, presets.by_name(preset, model), **settings)
    calls = [
        lambda: qs_jax.score(params, ROWS, cfg),
        lambda: qs_jax.score(params, ROWS, cfg, return_states=True),
        lambda: qs_jax.generate(params, ROWS, cfg),
        lambda: list(qs_jax.stream(params, ROWS, cfg)),
    ]
    for call in calls:
        with pytest.raises(NonFiniteError, match=r"row\(s\) \[0, 1\]"):
            call()


@pytest.mark.slow
def test_one_such_token_spoils_what_follows_in_its_row_alone():
    """Though the state that predicts is finite: it has read the token's keys and values."""
    model = tiny_model()
    params = scaled(tiny_params(model), LARGE["embeddings"], 1e22, rows=7)
    settings = {"max_new_tokens": 2, "continuation_tokens": 8}
    cfg = Config(model, presets.by_name("balanced", model), **settings)
    for call in (qs_jax.generate, qs_jax.score):
        with pytest.raises(NonFiniteError, match=r"row\(s\) \[0\] "):
            call(params, ROWS, cfg)
        call(params, ROWS[1:], cfg)


def test_a_logit_of_minus_infinity_does_not_let_hidden_keys_in():
    """The first query sees its own key only; their product overflows."""
    q, k = (jnp.full((1, 4, 1, 8), x, jnp.float32) for x in (1e20, -1e20))
    v = jnp.arange(4, dtype=jnp.float32)[None, :, None, None] * jnp.ones((1, 4, 1, 8))
    causal = jnp.tri(4, dtype=bool)[None]
    assert np.isnan(attention.attention(q, k, v, causal)[0][:, 0]).all()
    assert np.isnan(attention._attend_block(q, k, v, causal[:, None])[:, 0]).all()
    cached, new = (x[:, :3].reshape(1, 3, 8) for x in (k, v)), (k[:, 3:], v[:, 3:])
    own_only = jnp.asarray([[[False, False, False, True]]])
    assert np.isnan(attention.step_attention(q[:, 3:], tuple(cached), new, own_only)).all()


EXTREMES = [
    {"temperature": 1e-300, "top_p": 0.5},
    {"temperature": 1e-45, "top_k": 5},
    {"temperature": 1e-3, "top_p": 1e-300},
    {"repetition_penalty": 1e300},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e300, "temperature": 1e-9, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_extreme_sampling_is_greedy_over_penalised_logits(settings):
    """Against float64, where none of these numbers overflows."""
    model = tiny_model()
    rng = np.random.default_rng(0)
    logits_BV = rng.normal(0, 3, (6, model.vocab_size)).astype(np.float32)
    logits_BV[:, 3] = 0.0
    seen_BV = rng.random(logits_BV.shape) < 0.3
    seen_BV[:, 3] = True
    if settings.get("repetition_penalty", 1) < 1:  # float32 tells no two enlarged ones apart
        seen_BV = np.arange(model.vocab_size)[None] == logits_BV.argmax(1)[:, None]
    penalty, exact_BV = settings.get("repetition_penalty", 1.0), logits_BV.astype(float)
    changed_BV = np.where(exact_BV > 0, exact_BV / penalty, exact_BV * penalty)
    expected_B = np.where(seen_BV, changed_BV, exact_BV).argmax(1)
    plan, numbers = sampling.plan_of(Config(model, **settings), 16)
    keys_B = sampling.row_keys(numbers.seed, len(logits_BV))
    given = (jnp.asarray(logits_BV), jnp.asarray(seen_BV), keys_B, jnp.zeros(6, jnp.int32))
    np.testing.assert_array_equal(sampling.choose(*given, plan, numbers), expected_B)


def test_an_endless_temperature_is_uniform():
    plan, numbers = sampling.plan_of(Config(tiny_model(), temperature=1e300), 16)
    logits_BV = jnp.asarray([[-5.0, 0.0, 1e38]])
    kept = np.asarray(sampling.filter_logits(logits_BV, plan, numbers))
    np.testing.assert_allclose(kept, 0, atol=1)


def test_positions_that_int32_does_not_count_are_refused():
    model = tiny_model(max_positions=2**31 - 1)
    with pytest.raises(InputError, match=f"exceed this model's {NEVER} positions"):
        qs_jax.generate(tiny_params(model), [[5]], Config(model, max_new_tokens=2**33))
    cfg = Config(model, protocol="continuation", continuation_tokens=2**70)
    with pytest.raises(InputError, match="has no prompt before its last"):
        qs_jax.score(tiny_params(model), [[5, 6]], cfg)
