"""int8 execution: integer arithmetic, its stated bound, and what `auto` chooses."""

import gc

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qs_jax
from qs_jax.config import AMQConfig, Config, QuickSilverConfig
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import amq, execution, int8
from qs_jax.mechanisms.plan import bind
from qs_jax.models import init_params
from tests.engine.contract import model_of, params_of, settings
from tests.support import random_tokens

CHANNELS, OUTPUTS = 12, 3
MODEL = model_of("llama")
encode, product = jax.jit(int8.encode), jax.jit(int8.product)


def thousandths(*shape):
    """No differences so small that the processor flushes them to zero."""
    return hnp.arrays(np.int32, shape, elements=st.integers(-100_000, 100_000)).map(
        lambda x: (x / 1000).astype(np.float32)
    )


WIDTHS = hnp.arrays(np.int32, 3, elements=st.sampled_from([2, 4, 8, 16]))
PRODUCT = (thousandths(3, CHANNELS), thousandths(CHANNELS, OUTPUTS), WIDTHS)


@given(*PRODUCT)
def test_the_product_is_numpys_integer_arithmetic(x, kernel, bits):
    """From the definition alone: top bits of floor(128 x / a), weights to the nearest of 127."""
    with jax.enable_x64(True):
        x, kernel = x.astype(np.float64), kernel.astype(np.float64)
        weights = int8.quantize_kernel(jnp.asarray(kernel))
        found = np.asarray(product(jnp.asarray(x), jnp.asarray(bits), weights))
        codes = np.asarray(encode(jnp.asarray(x), jnp.asarray(bits)).codes)
    largest = np.maximum(np.abs(x).max(-1), np.finfo(float).tiny)
    scale = np.maximum(np.abs(kernel).max(0), np.finfo(float).tiny) / 127
    rounded = np.rint(kernel / scale).astype(np.int64)
    for row, width in enumerate(np.minimum(bits, 8)):
        exact = 128 * x[row] / largest[row]
        code = np.clip(np.floor(exact), -128, 127).astype(np.int64) >> (8 - width)
        # The engine's quotient may fall the other side of an edge by a rounding; zero may not.
        edge = (np.abs(exact - np.rint(exact)) < 1e-9) & (x[row] != 0)
        assert ((codes[row] == code) | edge).all()
        inside = 2 * codes[row].astype(np.int64) @ rounded + rounded.sum(0)
        step = np.abs(x[row]).max() / 2 ** (width - 1)
        np.testing.assert_allclose(found[row], step * scale / 2 * inside, rtol=1e-12, atol=1e-300)


@jax.jit
def simulate(x, bits):
    return amq.fake_quantize(x, bits, AMQConfig.uniform(8, 1, group=0, symmetric=True))


@given(*PRODUCT)
def test_int8_is_within_its_bound_of_fake_quantisation(x, kernel, bits):
    """The bounds of the module docstring, element by element."""
    kept = jnp.minimum(jnp.asarray(bits), 8)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64)
        simulated = simulate(x, kept)
        weights = int8.quantize_kernel(kernel)
        found = product(x, kept, weights)
        # The codes are the same: with weights that are already rounded, nothing is left.
        exact = simulated @ (weights.codes * weights.scale[None])
        largest = float(jnp.abs(x).max() * jnp.abs(kernel).max() * CHANNELS)
        np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-13 * largest)
        rounding = weights.scale[None] / 2 * jnp.abs(simulated).sum(-1, keepdims=True)
        slack = 1e-13 * largest
        assert (jnp.abs(found - simulated @ kernel) <= rounding + slack).all()
        step = jnp.abs(x).max(-1) / 2.0 ** (kept - 1)
        coding = step[:, None] / 2 * jnp.abs(kernel).sum(0)[None]
        assert (jnp.abs(found - x @ kernel) <= rounding + coding + slack).all()


@given(thousandths(2, 3, 2, 8), hnp.arrays(np.int32, (2, 3), elements=st.sampled_from([2, 4, 8])))
def test_keys_come_back_within_half_a_step(k, bits):
    cached = int8.encode_kv(jnp.asarray(k), jnp.asarray(bits))
    assert (cached.codes.dtype, cached.scale.shape) == (np.int8, k.shape[:-1])
    back = np.asarray(int8.decode_kv(cached))
    step = np.abs(k).max(-1) / 2.0 ** (bits[..., None] - 1)
    np.testing.assert_allclose(cached.scale, step, rtol=1e-6)
    assert (np.abs(back - k).max(-1) <= step / 2 * (1 + 1e-4)).all()


def test_extreme_weights_fit_into_the_int32():
    """The most channels there may be, all at the ends of their ranges."""
    kernel = jnp.ones((int8.MOST_CHANNELS, 1), jnp.float32)
    weights = int8.quantize_kernel(kernel)
    low = int8.product(-jnp.ones((1, int8.MOST_CHANNELS)), jnp.array([8]), weights)
    assert float(low[0, 0]) == pytest.approx(-int8.MOST_CHANNELS * 127.5 / 128, rel=1e-6)
    with pytest.raises(ConfigError, match="could overflow int32"):
        int8.quantize_kernel(jnp.ones((int8.MOST_CHANNELS + 1, 1), jnp.float32))
    empty = int8.quantize_kernel(jnp.zeros((4, 2), jnp.float32))
    np.testing.assert_array_equal(int8.product(jnp.zeros((1, 4)), jnp.array([8]), empty), 0)


def test_other_orders_of_the_sum_change_no_bit():
    """An int32 sum is exact: the same for a token alone and among others, unlike a float one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 576)), jnp.bfloat16)
    weights = int8.quantize_kernel(jnp.asarray(rng.normal(size=(576, 96)), jnp.bfloat16))
    bits = jnp.asarray(rng.choice([2, 4, 8], 40), jnp.int32)
    together = int8.product(x, bits, weights)
    assert together.dtype == jnp.bfloat16
    for row in (0, 17, 39):
        alone = int8.product(x[row : row + 1], bits[row : row + 1], weights)
        np.testing.assert_array_equal(np.asarray(alone, float)[0], np.asarray(together, float)[row])


def logits(params, model, setting):
    qs = settings(amq=setting) if setting is not None else None
    tokens_BT = random_tokens(model, 2, 30)
    return qs_jax.score(params, tokens_BT, Config(model, qs), return_logits=True).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_stay_near_fake_quantisation(kind):
    """Measured on the tiny models, 8 bits from layer 2 of 6: the mean deviation is 1 % of the
    spread of the logits, and int8 costs at most twice what the same codes cost in float."""
    model = model_of(kind)
    params = params_of(model)
    setting = AMQConfig.uniform(8, 2, execution="int8")
    fake = AMQConfig.uniform(8, 2, group=0, symmetric=True)
    dense, simulated, found = (logits(params, model, each) for each in (None, fake, setting))
    spread = dense.std()
    assert 0 < np.abs(found - simulated).mean() < 0.02 * spread
    assert np.abs(found - dense).mean() < 2 * np.abs(simulated - dense).mean()


def test_layers_before_the_bits_are_untouched():
    """Bits after the last layer that may have them: only the last layer is int8."""
    params = params_of(MODEL)
    late = AMQConfig.uniform(2, MODEL.num_layers - 1, execution="int8")
    record = qs_jax.score(params, random_tokens(MODEL, 1, 20), Config(MODEL, settings(amq=late)))
    bits = record.record.bits
    assert (bits[:-1] == 16).all()
    assert set(np.unique(bits[-1])) == {2, 8}


def test_weights_are_quantised_once_and_go_with_their_parameters():
    params = params_of(MODEL)
    first = execution.quantize_weights(params)
    again = execution.quantize_weights(dict(params))
    assert first["int8"]["qkv"] is again["int8"]["qkv"]
    assert first["layers"] is params["layers"]
    assert first["int8"]["down"].codes.shape == params["layers"]["down"]["kernel"].shape
    assert execution.quantize_weights(first) is first
    other = init_params(MODEL.replace(hidden_size=16), jax.random.key(0))
    with pytest.raises(ConfigError, match="another model"):
        execution.quantize_weights(first | {"layers": other["layers"]})
    del params, first, again, other
    gc.collect()
    fresh = init_params(MODEL, jax.random.key(1))
    execution.quantize_weights(fresh)
    assert execution._last
    del fresh
    gc.collect()
    assert not execution._last


def test_given_codes_change_nothing():
    setting = AMQConfig.uniform(8, 2, execution="int8")
    params = params_of(MODEL)
    given = execution.quantize_weights(params)
    np.testing.assert_array_equal(logits(given, MODEL, setting), logits(params, MODEL, setting))
    np.testing.assert_array_equal(logits(given, MODEL, None), logits(params, MODEL, None))


def test_auto_is_int8_where_it_is_faster_and_nothing_elsewhere():
    auto = AMQConfig(2, execution="auto")
    qs = QuickSilverConfig(amq=auto)
    asked = []

    def faster(model, tokens):
        asked.append(tokens)
        return tokens > 1

    assert execution.resolve_execution(qs, MODEL, "masked", faster).amq.execution == "fake"
    assert not asked
    assert execution.resolve_execution(qs, MODEL, "compact", faster).amq.execution == "int8"
    assert execution.resolve_execution(qs, MODEL, "decode", faster).amq is None
    assert asked == [512, 512, 1]
    assert execution.resolve_execution(qs, MODEL, "compact", lambda *_: False).is_off
    for chosen in ("fake", "int8"):
        named = QuickSilverConfig(amq=AMQConfig(2, execution=chosen))
        assert execution.resolve_execution(named, MODEL, "decode", faster) is named
    # What the masked engine simulates are the codes that int8 would use.
    plan, _ = bind(qs, MODEL, "teacher-forced")
    assert (plan.amq.execution, plan.amq.group, plan.amq.symmetric) == ("fake", 0, True)


def test_the_measurement_is_kept(monkeypatch):
    calls = []

    def seconds(inputs, outputs, tokens, dtypes):
        calls.append((inputs, outputs))
        return {"float32": 1.3, "int8": 1.0}

    execution._gain.cache_clear()
    monkeypatch.setattr(execution, "product_seconds", seconds)
    assert execution.is_faster(MODEL, 7)
    assert execution.is_faster(MODEL, 7)
    assert len(calls) == 4
    execution._gain.cache_clear()
    kernels = params_of(MODEL)["layers"]
    named = {name: kernels[name]["kernel"].shape[1:] for name in execution.shapes(MODEL)}
    assert named == execution.shapes(MODEL)


def test_products_are_timed():
    found = execution.product_seconds(16, 8, 4, ("float32", "bfloat16"), rounds=1, seconds=1e-4)
    assert set(found) == {"float32", "bfloat16", "int8"}
    assert all(each > 0 for each in found.values())
