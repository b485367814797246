"""Single functions against closed forms and properties."""

import dataclasses
import math

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import qs_jax
from qs_jax.config import AMQConfig, Config, HaltingConfig
from qs_jax.engine import attention, score
from qs_jax.mechanisms import amq, fusion, halting, int8, resolve, signals
from tests.engine.contract import MATRIX, model_of, params_of, settings
from tests.support import random_tokens

# Steps of a thousandth: no differences so small that the processor flushes them to zero.
VECTORS = hnp.arrays(np.int32, (3, 16), elements=st.integers(-100_000, 100_000)).map(
    lambda x: (x / 1000).astype(np.float32)
)


def coder(**fields):
    """AMQ as engines have it, in groups of 8."""
    setting = AMQConfig.uniform(8, 1, group=8, **fields)
    return resolve(settings(amq=setting), model_of("llama"), "teacher-forced").amq


@given(VECTORS, st.sampled_from([2, 4]), st.booleans())
def test_sliced_codes_are_direct_codes(x, bits, symmetric):
    """Slicing the 8-bit code is floor(2^b (x - low) / range): quantising to b bits directly."""
    parts = amq.code(jnp.asarray(x), coder(symmetric=symmetric))
    codes, low, span = map(np.asarray, parts)
    groups = x.reshape(3, 2, 8)
    unit = (groups - low) / np.maximum(span, np.finfo(np.float32).tiny)
    direct = np.clip(np.floor(unit * 2**bits), 0, 2**bits - 1)
    sliced = amq.slice_code(jnp.asarray(codes), jnp.full(codes.shape, bits))
    np.testing.assert_array_equal(np.asarray(sliced), direct)


@given(VECTORS, st.sampled_from([2, 4, 8]), st.booleans())
def test_quantisation_error_is_half_a_bin(x, bits, rotate):
    given_bits = jnp.full(3, bits, jnp.int32)
    out = np.asarray(amq.fake_quantize(jnp.asarray(x), given_bits, coder(rotate=rotate)))
    inside = np.asarray(int8.rotate_groups(jnp.asarray(x), 8)) if rotate else x
    groups = inside.reshape(3, 2, 8)
    half = (groups.max(-1) - groups.min(-1)) / 2**bits / 2
    error = np.linalg.norm((out - x).reshape(3, 2, 8), axis=-1)
    slack = 1e-5 * np.abs(x).max() + 1e-30
    assert (error <= half * math.sqrt(8) * (1 + 1e-4) + slack).all()


def test_full_precision_is_untouched_and_bits_are_per_token():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
    setting = AMQConfig.uniform(8, 1, group=16)
    given_amq = resolve(settings(amq=setting), model_of("llama"), "teacher-forced").amq
    out = amq.fake_quantize(x, jnp.array([16, 8, 4, 2]), given_amq)
    np.testing.assert_array_equal(out[0], x[0])
    errors = np.abs(np.asarray(out - x)).max(-1)
    assert 0 < errors[1] < errors[2] < errors[3]
    assert len(np.unique(np.asarray(out[3]))) <= 4  # one group of 16 channels, 2 bits


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_the_rotation_is_hadamard_and_its_own_inverse(size):
    expected = scipy.linalg.hadamard(size) / math.sqrt(size)
    np.testing.assert_allclose(int8.hadamard(size), expected)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)
    np.testing.assert_allclose(int8.rotate_groups(int8.rotate_groups(x, size), size), x, atol=1e-6)


def test_drifts_and_entropies_by_hand():
    after, before = jnp.array([[[3.0, 4.0]]]), jnp.array([[[3.0, 0.0]]])
    assert signals.drift("raw", after, before)[0, 0] == pytest.approx(4.0)
    assert signals.drift("relative", after, before)[0, 0] == pytest.approx(4 / 5)
    assert signals.drift("cosine", after, before)[0, 0] == pytest.approx(1 - 9 / 15, abs=1e-6)
    logits = np.random.default_rng(0).normal(size=(5, 11)) * 3
    expected = scipy.special.entr(scipy.special.softmax(logits, axis=-1)).sum(-1)
    np.testing.assert_allclose(signals.entropy_of(jnp.asarray(logits)), expected, rtol=1e-5)


@given(
    hnp.arrays(np.float32, (2, 12), elements=st.floats(0, 1, width=32)),
    hnp.arrays(bool, (2, 12)),
    st.floats(0, 1),
)
def test_the_quota_stops_exactly_its_share(score, eligible, share):
    halted = np.zeros_like(eligible)
    halts = np.asarray(
        halting.lowest(*map(jnp.asarray, (score, eligible, halted)), jnp.float32(share))
    )
    assert not halts[~eligible].any()
    for row in range(2):
        wanted = math.floor(np.float32(share) * np.float32(eligible[row].sum()) + 1e-3)
        assert halts[row].sum() == wanted
        stopped, kept = score[row][halts[row]], score[row][eligible[row] & ~halts[row]]
        if len(stopped) and len(kept):
            assert stopped.max() <= kept.min()


def test_masked_keys_weigh_exactly_nothing():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, n, 8)), jnp.float32) for n in (4, 2, 2))
    mask = np.tril(rng.random((1, 6, 6)) < 0.5) | np.eye(6, dtype=bool)
    context, weights = attention.attention(q, k, v, jnp.asarray(mask), None)
    assert (np.asarray(weights)[:, :, ~mask[0]] == 0).all()
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=1e-5)
    hidden = ~mask.any(1)[0]
    poisoned = v.at[:, hidden].set(1e30)
    again, _ = attention.attention(q, k, poisoned, jnp.asarray(mask), None)
    np.testing.assert_array_equal(again, context)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[:, None])
    np.testing.assert_allclose(context, theirs, atol=1e-6)


def test_a_run_gives_each_member_the_mean_up_to_itself():
    """6.3: prefix means with uniform weights, sizes accumulate, the last is the super-token."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 3)), jnp.float32)
    pairs = jnp.array([[[0], [1], [1], [0], [1]]], bool)  # 0-1-2 and 3-4
    ones = jnp.ones((1, 5), jnp.float32)
    merged, takes = fusion.merge(h, pairs, ones, None, ones, h.dtype)
    np.testing.assert_array_equal(merged.size_BT[0], [1, 2, 3, 1, 2])
    np.testing.assert_array_equal(merged.h_BTD[0, 0], h[0, 0])
    np.testing.assert_allclose(merged.h_BTD[0, 1], h[0, :2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(merged.h_BTD[0, 2], h[0, :3].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged.h_BTD[0, 3], h[0, 3])
    absorbed = fusion.absorbers(takes, jnp.arange(5, dtype=jnp.int32)[None])[0]
    np.testing.assert_array_equal(absorbed[jnp.array([0, 1, 3])], [1, 2, 4])
    np.testing.assert_array_equal(
        qs_jax.record.resolve(np.array([1, 2, 99, 4, 99])), [2, 2, 2, 4, 4]
    )


@pytest.mark.parametrize("name", ["HKFQ", "quota"])
def test_a_threshold_sweep_compiles_once(name):
    qs, model = MATRIX[name], model_of("llama")
    params, tokens_BT = params_of(model), random_tokens(model, batch=1, width=20)
    given = {"prompt_lengths": [12]} if name == "quota" else {}
    results, sizes = set(), []
    for step in range(4):
        fusing = dataclasses.replace(qs.fusion, tau_fuse=0.3 * step, first_layer=1 + step)
        bits = dataclasses.replace(qs.amq, layer=1 + step, tau_low=0.5 * step)
        stop = {"window": (1, 5 - step), "tau_drift": 0.2 * step, "tau_halt": 1.0 * step}
        if name == "quota":
            stop = {"layers": (1 + step, 5), "quota": (0.1 * step, 0.9), "window": (1, 5)}
        swept = dataclasses.replace(
            qs,
            halting=dataclasses.replace(qs.halting, **stop),
            fusion=fusing,
            amq=bits,
            kv_skip=dataclasses.replace(qs.kv_skip, delay=step),
            sink_tokens=step,
            recent_tokens=step,
        )
        out = qs_jax.score(params, tokens_BT, Config(model, swept, engine="masked"), **given)
        results.add(float(out.logprobs.sum()))
        sizes.append(score._jit_masked._cache_size())
    assert sizes[0] == sizes[-1]
    assert len(results) == 4, "the swept numbers must matter"


def test_off_is_the_dense_model_bit_for_bit():
    model = model_of("llama")
    params, tokens_BT = params_of(model), random_tokens(model, width=30)
    dense = qs_jax.score(params, tokens_BT, Config(model), return_logits=True)
    off = qs_jax.score(
        params, tokens_BT, Config(model, qs_jax.presets.off(model)), return_logits=True
    )
    np.testing.assert_array_equal(off.logits, dense.logits)
    np.testing.assert_array_equal(off.logprobs, dense.logprobs)
    assert off.record is None
    a = qs_jax.generate(params, tokens_BT, Config(model, qs_jax.presets.off(model)))
    b = qs_jax.generate(params, tokens_BT, Config(model))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_thresholds_that_never_act_leave_the_dense_model(kind):
    """The masked engine itself, doing nothing: equal to dense up to the order of sums."""
    never = qs_jax.QuickSilverConfig(
        halting=HaltingConfig(tau_drift=0.0),
        kv_skip=qs_jax.KVSkipConfig("skip"),
        fusion=qs_jax.FusionConfig(tau_fuse=0.0),
    )
    model = model_of(kind)
    params, tokens_BT = params_of(model), random_tokens(model, width=30)
    out = qs_jax.score(params, tokens_BT, Config(model, never), return_logits=True)
    dense = qs_jax.score(params, tokens_BT, Config(model), return_logits=True)
    np.testing.assert_allclose(out.logits, dense.logits, atol=2e-4)
    assert out.record.layer_tokens_saved == 0
