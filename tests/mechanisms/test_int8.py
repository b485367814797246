"""int8 execution: integer arithmetic and its stated bounds."""

import gc

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import qs_jax
from qs_jax.config import AMQConfig, Config
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import int8
from qs_jax.models import init_params
from tests.engine.contract import model_of, params_of, settings
from tests.support import random_tokens

CHANNELS, OUTPUTS, GROUP = 12, 3, 4
MODEL = model_of("llama")
TURN = np.kron(np.eye(CHANNELS // 4), scipy.linalg.hadamard(4) / 2)
encode = jax.jit(int8.encode, static_argnames=("group",))
simulate = jax.jit(int8.simulate, static_argnames=("group",))
product = jax.jit(int8.product, static_argnames=("group",))


def thousandths(*shape):
    """No differences so small that the processor flushes them to zero."""
    return hnp.arrays(np.int32, shape, elements=st.integers(-100_000, 100_000)).map(
        lambda x: (x / 1000).astype(np.float32)
    )


WIDTHS = hnp.arrays(np.int32, 3, elements=st.sampled_from([2, 4, 8, 16]))
PRODUCT = (thousandths(3, CHANNELS), thousandths(CHANNELS, OUTPUTS), WIDTHS)


def sliced(codes, bits):
    """The b highest bits that a group uses, in the middle of what they stand for; by NumPy."""
    out = codes.reshape(len(codes), -1, GROUP).astype(np.int64)
    for row, width in enumerate(np.minimum(bits, 8)):
        for group in out[row]:
            used = max(int(code if code >= 0 else ~code).bit_length() for code in group) + 1
            dropped = max(used - width, 0)
            group[:] = group // 2**dropped * 2**dropped + 2**dropped // 2
    return out.reshape(codes.shape)


@given(*PRODUCT)
def test_the_product_is_numpys_integer_arithmetic(x, kernel, bits):
    """From the definition alone: rotated, rounded to 127 steps, sliced, and summed as integers."""
    with jax.enable_x64(True):
        x, kernel = x.astype(np.float64), kernel.astype(np.float64)
        weights = int8.quantize_kernel(jnp.asarray(kernel))
        found = np.asarray(product(jnp.asarray(x), jnp.asarray(bits), GROUP, weights))
        x, kernel = x @ TURN, TURN @ kernel
        codes = np.asarray(encode(jnp.asarray(x), jnp.asarray(bits * 0 + 8), GROUP).codes)
        narrow = np.asarray(encode(jnp.asarray(x), jnp.asarray(bits), GROUP).codes)
    step = np.abs(x).max(-1, keepdims=True) / 127
    scale = np.abs(kernel).max(0, keepdims=True) / 127
    tiny = np.finfo(float).tiny
    near = 0.5 + 1e-9  # halfway, either neighbour will do
    assert (np.abs(x / np.maximum(step, tiny) - codes) <= near).all()
    assert (np.abs(kernel / np.maximum(scale, tiny) - weights.codes) <= near).all()
    np.testing.assert_array_equal(narrow, sliced(codes, bits))
    whole = narrow.astype(np.int64) @ np.asarray(weights.codes, np.int64)
    # The engine rotates inside its program: a code may be the other neighbour there.
    slack = step * scale * np.abs(weights.codes).sum(0) * 1e-9
    flips = (np.abs(np.abs(x / np.maximum(step, tiny) - codes) - 0.5) < 1e-9).any(-1)
    within = np.abs(found - step * scale * whole) <= slack
    assert (within | flips[:, None]).all()


@given(thousandths(3, CHANNELS))
def test_slices_nest(x):
    """Slicing the 8-bit codes is the whole conversion, and slicing 4 bits again gives the 2."""
    bits = jnp.full(3, 8, jnp.int32)
    eight, four, two = (
        np.asarray(encode(jnp.asarray(x), bits * 0 + width, GROUP).codes, np.int64)
        for width in (8, 4, 2)
    )
    np.testing.assert_array_equal(four, sliced(eight, np.full(3, 4)))
    np.testing.assert_array_equal(two, sliced(four, np.full(3, 2)))
    for codes, width in ((four, 4), (two, 2)):
        groups = codes.reshape(3, -1, GROUP)
        assert all(len(np.unique(group)) <= 2**width for row in groups for group in row)


@given(*PRODUCT)
def test_int8_is_within_its_bound_of_fake_quantisation(x, kernel, bits):
    """The bounds of the module docstring, element by element."""
    kept = jnp.minimum(jnp.asarray(bits), 8)
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64)
        simulated = simulate(x, kept, GROUP)
        weights = int8.quantize_kernel(kernel)
        found = product(x, kept, GROUP, weights)
        largest = float(jnp.abs(x).max() * jnp.abs(kernel).max() * CHANNELS)
        slack = 1e-12 * largest
        # The codes are the same: with weights that are already rounded, nothing is left.
        exact = simulated @ (TURN @ (weights.codes * weights.scale[None]))
        assert (jnp.abs(found - exact) <= slack).all()
        turned = simulated @ TURN
        rounding = weights.scale[None] / 2 * jnp.abs(turned).sum(-1, keepdims=True)
        assert (jnp.abs(found - simulated @ kernel) <= rounding + slack).all()
        coding = jnp.abs(turned - x @ TURN) @ jnp.abs(TURN @ kernel)
        assert (jnp.abs(found - x @ kernel) <= rounding + coding + slack).all()
        # Each group errs by half of what it drops and half a step.
        step = jnp.abs(x @ TURN).max(-1)[:, None, None] / 127
        error = jnp.abs(turned - x @ TURN).reshape(3, -1, GROUP).max(-1, keepdims=True)
        peak = jnp.abs(x @ TURN).reshape(3, -1, GROUP).max(-1, keepdims=True) + step / 2
        dropped = jnp.maximum(peak / 2.0 ** (kept[:, None, None] - 2), step)  # at most 2^r steps
        assert (error <= dropped / 2 + step / 2 + slack).all()


@given(thousandths(2, 3, 2, 8), hnp.arrays(np.int32, (2, 3), elements=st.sampled_from([2, 4, 8])))
def test_keys_come_back_as_they_were_coded(k, bits):
    cached = int8.encode_kv(jnp.asarray(k), jnp.asarray(bits), 8)
    assert (cached.codes.dtype, cached.scale.shape) == (np.int8, k.shape[:-1])
    back = np.asarray(int8.decode_kv(cached))
    largest = np.abs(k).max(-1)
    np.testing.assert_allclose(np.asarray(cached.scale), largest / 127, rtol=1e-6)
    error = np.abs(back - k).max(-1)
    half = np.where(bits == 8, 0.5, 2.0 ** (7 - bits) + 0.5)[..., None]
    assert (error <= half * largest / 127 * (1 + 1e-4)).all()
    again = int8.recode_kv(int8.decode_kv(cached), jnp.asarray(bits))
    np.testing.assert_array_equal(again.codes, cached.codes)
    np.testing.assert_allclose(again.scale, cached.scale, rtol=1e-6)


def test_extreme_products_fit_into_the_int32():
    """The most channels there may be but one, all at the ends of their ranges."""
    most = int8.MOST_CHANNELS - 1
    assert most % 2 == 1, "nothing rotates"
    weights = int8.quantize_kernel(jnp.ones((most, 1), jnp.float32))
    low = int8.product(-jnp.ones((1, most)), jnp.array([8]), most, weights)
    assert float(low[0, 0]) == pytest.approx(-most, rel=1e-6)
    with pytest.raises(ConfigError, match="could overflow int32"):
        int8.quantize_kernel(jnp.ones((most + 2, 1), jnp.float32))
    empty = int8.quantize_kernel(jnp.zeros((4, 2), jnp.float32))
    np.testing.assert_array_equal(int8.product(jnp.zeros((1, 4)), jnp.array([8]), 4, empty), 0)


def logits(params, model, setting):
    qs = settings(amq=setting) if setting is not None else None
    tokens_BT = random_tokens(model, 2, 30)
    cfg = Config(model, qs, engine="masked")
    return qs_jax.score(params, tokens_BT, cfg, return_logits=True).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_stay_near_fake_quantisation(kind):
    """Measured on the tiny models, 8 bits from layer 2 of 6: the mean deviation is 1 % of the
    spread of the logits, and int8 costs at most twice what the same codes cost in float."""
    model = model_of(kind)
    params = params_of(model)
    setting = AMQConfig.uniform(8, 2, group=8, execution="int8")
    fake = AMQConfig.uniform(8, 2, group=8, symmetric=True, rotate=True)
    dense, simulated, found = (logits(params, model, each) for each in (None, fake, setting))
    spread = dense.std()
    assert 0 < np.abs(found - simulated).mean() < 0.02 * spread
    assert np.abs(found - dense).mean() < 2 * np.abs(simulated - dense).mean()


def test_layers_before_the_bits_are_untouched():
    """Bits after the last layer that may have them: only the last layer is int8."""
    params = params_of(MODEL)
    late = AMQConfig.uniform(2, MODEL.num_layers - 1, group=8, execution="int8")
    record = qs_jax.score(params, random_tokens(MODEL, 1, 20), Config(MODEL, settings(amq=late)))
    bits = record.record.bits
    assert (bits[:-1] == 16).all()
    assert set(np.unique(bits[-1])) == {2, 8}


def test_weights_are_quantised_once_and_go_with_their_parameters():
    params = params_of(MODEL)
    first = int8.quantize_weights(params)
    again = int8.quantize_weights(dict(params))
    assert first["int8"]["qkv"] is again["int8"]["qkv"]
    assert first["layers"] is params["layers"]
    assert first["int8"]["down"].codes.shape == params["layers"]["down"]["kernel"].shape
    assert int8.quantize_weights(first) is first
    other = init_params(MODEL.replace(hidden_size=16), jax.random.key(0))
    with pytest.raises(ConfigError, match="another model"):
        int8.quantize_weights(first | {"layers": other["layers"]})
    del params, first, again, other
    gc.collect()
    fresh = init_params(MODEL, jax.random.key(1))
    int8.quantize_weights(fresh)
    assert int8._last
    del fresh
    gc.collect()
    assert not int8._last


def test_given_codes_change_nothing():
    setting = AMQConfig.uniform(8, 2, group=8, execution="int8")
    params = params_of(MODEL)
    given = int8.quantize_weights(params)
    np.testing.assert_array_equal(logits(given, MODEL, setting), logits(params, MODEL, setting))
    np.testing.assert_array_equal(logits(given, MODEL, None), logits(params, MODEL, None))
