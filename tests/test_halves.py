"""bfloat16 arrays held by their bits: the same memory, the same results, no conversions."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from qs_jax.mechanisms.plan import bind

import qs_jax
from qs_jax import halves
from qs_jax.config import Config
from qs_jax.diagnostics.diagnosis import dense_states, masked_states
from qs_jax.engine import fit_maps, generate, token_loop, tokenwise
from qs_jax.mechanisms import execution
from tests.engine.contract import MATRIX, model_of, params_of
from tests.support import OPTIMISED, random_tokens


def half(model_type: str = "llama"):
    model = model_of(model_type, dtype="bfloat16")
    return model, params_of(model)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_bits_share_the_memory_of_the_parameters(model_type):
    model, params = half(model_type)
    held = halves.bits_of(params)
    for name in ("embed", "layers"):
        pairs = zip(jax.tree.leaves(held[name]), jax.tree.leaves(params[name]), strict=True)
        for bits, leaf in pairs:
            assert bits.dtype == jnp.uint16
            assert bits.unsafe_buffer_pointer() == leaf.unsafe_buffer_pointer()
            np.testing.assert_array_equal(halves.from_bits(bits), leaf)
    table = params.get("head", params["embed"])["tokens"]
    assert held["head"]["tokens"] is table
    assert held["head"]["bits"].unsafe_buffer_pointer() == table.unsafe_buffer_pointer()
    assert params["layers"]["qkv"]["kernel"].dtype == model.dtype, "the input is left alone"


def test_the_parameters_go_when_their_bits_have_gone():
    _, params = half()
    held = halves.bits_of(params)
    before = len(jax.live_arrays())
    del held
    assert len(jax.live_arrays()) < before


def test_float32_parameters_are_handed_through():
    params = params_of(model_of("llama"))
    held = halves.bits_of(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (held, params)), strict=True))
    assert halves.held_dtype("float32") == jnp.float32


def test_bits_of_several_devices_stay_where_they_are():
    model, params = half()
    devices = jax.local_devices()[:2]
    everywhere = qs_jax.replicate(params, devices)
    bits = halves.bits_of(everywhere)["layers"]["qkv"]["kernel"]
    kernel = everywhere["layers"]["qkv"]["kernel"]
    assert (bits.dtype, bits.sharding) == (jnp.uint16, kernel.sharding)
    for ours, theirs in zip(bits.addressable_shards, kernel.addressable_shards, strict=True):
        assert ours.data.unsafe_buffer_pointer() == theirs.data.unsafe_buffer_pointer()
    rows = random_tokens(model, batch=4, width=16)
    alone = qs_jax.score(params, rows, Config(model)).logprobs
    shared = qs_jax.score(everywhere, rows, Config(model), devices=devices).logprobs
    np.testing.assert_allclose(shared, alone, atol=0.02)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        pytest.param("dense", "gpt2", marks=pytest.mark.slow),
        ("dense", "llama"),
        pytest.param("HKFQ", "llama", marks=pytest.mark.slow),
    ],
)
def test_held_by_bits_or_by_values_results_are_the_same(name, model_type, monkeypatch):
    """Against XLA's own slices, gathers and updates of bfloat16."""
    model, params = half(model_type)
    cfg = Config(model, MATRIX.get(name), max_new_tokens=6, continuation_tokens=6)
    rows = random_tokens(model, width=24)

    def results():
        jax.clear_caches()
        out = qs_jax.generate(params, rows, cfg)
        return out.tokens, out.logprobs, qs_jax.score(params, rows, cfg).logprobs

    by_bits = results()
    monkeypatch.setattr(halves, "_on_cpu", lambda: False)
    assert halves.held_dtype("bfloat16") == jnp.bfloat16
    by_values = results()
    jax.clear_caches()
    np.testing.assert_array_equal(by_bits[0], by_values[0])
    for ours, theirs in zip(by_bits[1:], by_values[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_no_program_converts_stacked_weights_or_caches():
    """Read off the compiled program of a prompt: nothing as large is there in float32."""
    model, params = half()
    cfg = Config(model, max_new_tokens=1)
    # Attention has an axis of rows times key heads: not as many of those as of layers.
    rows = random_tokens(model, batch=5, width=40)
    _, padded, numbers, plan = generate._prepare(params, rows, cfg, None, None, None)

    def found(given) -> set[str]:
        program = token_loop.jit_start.lower(given, *padded, numbers, model=model, plan=plan)
        text = program.compile(compiler_options=OPTIMISED).as_text()
        return set(re.findall(rf"= (f32\[{model.num_layers},\d+,\d+[\d,]*\])", text))

    assert found(halves.bits_of(params)) == set()
    if jax.__version_info__ < (0, 12):  # later ones convert no whole stack of values either
        assert found(params) != set(), "values would be converted: the pattern finds something"


def test_states_are_rounded_as_a_conversion_rounds():
    """Also in a program that XLA optimises: conversions there and back may be taken out of it."""
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    halfway = np.float32(1) + np.float32(2) ** -8 * np.arange(16, dtype=np.float32)
    x = np.concatenate([x, 1e4 * x, 1e-4 * x, halfway, -halfway, [0, np.inf, -np.inf]])
    x = x.astype(np.float32)
    rounded = jax.jit(lambda x: halves.as_state(x + 0, "bfloat16"))
    found = rounded.lower(x).compile(compiler_options=OPTIMISED)(x)
    assert (halves.state_dtype("bfloat16"), found.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_array_equal(found, x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_states_of_other_dtypes_are_handed_through():
    assert halves.state_dtype("float32") == jnp.float32
    np.testing.assert_array_equal(halves.as_state(jnp.float32(1 / 3), "float32"), np.float32(1 / 3))


def test_on_other_backends_states_are_held_in_the_dtype_of_the_model(monkeypatch):
    monkeypatch.setattr(halves, "_on_cpu", lambda: False)
    assert halves.state_dtype("bfloat16") == jnp.bfloat16
    assert halves.as_state(jnp.float32(1 / 3), "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("HKFQ", "llama"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("HKFQ", "gpt2"), ("HF", "gpt2"), ("HF", "llama"), ("dense", "gpt2"))
        ],
    ],
)
def test_every_state_has_a_value_of_the_model_s_dtype(name, model_type):
    """After embedding, blocks, fusion and quantisation of states: float32 holds, bfloat16 is."""
    model, params = half(model_type)
    cfg = Config(model, MATRIX.get(name))
    rows = jnp.asarray(random_tokens(model, batch=2, width=24))
    found = bind(cfg.quicksilver, model, cfg.effective_protocol)
    lengths_B = jnp.full(2, 24, jnp.int32)
    prompt = tokenwise.Prompt(rows, lengths_B, lengths_B * 0, None)

    @jax.jit
    def states(params):
        if found is None:
            return dense_states(params, rows, model)
        plan, numbers = found
        return masked_states(params, prompt, numbers, model, plan)[0]

    params = halves.bits_of(execution.with_weights(params, found[0] if found else None))
    held = np.asarray(states.lower(params).compile(compiler_options=OPTIMISED)(params))
    assert held.dtype == np.float32
    np.testing.assert_array_equal(held, held.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_maps_are_fitted_from_sums_in_float32():
    """Sums over tokens rounded to bfloat16 would spoil what is solved from them."""
    model, params = half()
    exact = model.replace(dtype="float32")
    upcast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    rows = random_tokens(model, batch=4, width=32)
    counted = np.ones(rows.shape, bool)

    def moments(params, model):
        return fit_maps._moments(
            params, jnp.asarray(rows), jnp.asarray(counted), model, (2, 4), ("state", "neurons")
        )

    for ours, theirs in zip(
        moments(halves.bits_of(params), model), moments(upcast, exact), strict=True
    ):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)
