"""CPU: bfloat16 storage and products of a single vector change no result.

Programs are read as XLA compiles them where a conversion or a copy would cost what is saved.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.config import Config
from qs_jax.engine import cache
from qs_jax.models import cpu
from tests.engine.contract import MATRIX, model_of, params_of
from tests.engine.programs import arguments_of
from tests.support import OPTIMISED, random_tokens

DTYPES = ("float32", "bfloat16")


def bfloat16_model(model_type="llama"):
    model = model_of(model_type, dtype="bfloat16")
    return model, params_of(model)


def in_storage(array, dtype):
    """An array in a dtype, and as programs store it."""
    array = jnp.asarray(array, dtype)
    return array, cpu.to_storage(array)


# --- bfloat16 storage ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_storage_shares_the_memory_of_the_parameters(model_type):
    model, params = bfloat16_model(model_type)
    stored = cpu.stored_params(params)
    for name in ("embed", "layers"):
        pairs = zip(jax.tree.leaves(stored[name]), jax.tree.leaves(params[name]), strict=True)
        for bits, leaf in pairs:
            assert bits.dtype == jnp.uint16
            assert bits.unsafe_buffer_pointer() == leaf.unsafe_buffer_pointer()
            np.testing.assert_array_equal(cpu.from_storage(bits), leaf)
    table = params.get("head", params["embed"])["tokens"]
    assert stored["head"]["tokens"] is table
    assert stored["head"]["stored"].unsafe_buffer_pointer() == table.unsafe_buffer_pointer()
    assert params["layers"]["qkv"]["kernel"].dtype == model.dtype, "the input is left alone"
    before = len(jax.live_arrays())
    del stored, bits
    assert len(jax.live_arrays()) < before


def test_other_backends_store_what_they_compute_with(monkeypatch):
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    assert cpu.storage_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize("mesh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_storage_on_several_devices_stays_where_it_is(mesh):
    model, params = bfloat16_model()
    devices = qs_jax.make_mesh(2, 2) if mesh else jax.local_devices()[:2]
    everywhere = (qs_jax.shard if mesh else qs_jax.replicate)(params, devices)
    bits = cpu.stored_params(everywhere)["layers"]["qkv"]["kernel"]
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
def test_with_and_without_storage_results_are_the_same(name, model_type, monkeypatch):
    """Against XLA's own slices, gathers and updates of bfloat16."""
    model, params = bfloat16_model(model_type)
    cfg = Config(model, MATRIX.get(name), max_new_tokens=6)
    rows = random_tokens(model, width=24)

    def results():
        jax.clear_caches()
        out = qs_jax.generate(params, rows, cfg)
        return out.tokens, out.logprobs, qs_jax.score(params, rows, cfg).logprobs

    stored = results()
    for module in (cpu, cache):
        monkeypatch.setattr(module, "storage_dtype", jnp.dtype)
    plain = results()
    jax.clear_caches()
    np.testing.assert_array_equal(stored[0], plain[0])
    for ours, theirs in zip(stored[1:], plain[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_no_program_converts_stacked_weights_or_caches():
    """Read off the compiled program of a prompt: nothing as large is there in float32."""
    model, params = bfloat16_model()
    # Attention has an axis of rows times key heads: not as many of those as of layers.
    rows = random_tokens(model, batch=5, width=40)
    cfg = Config(model, max_new_tokens=1)
    start = lambda: qs_jax.generate(params, rows, cfg)  # noqa: E731
    program, (stored, *others), static = arguments_of(start, "fast", "jit_start")

    def list_conversions(given) -> set[str]:
        compiled = program.lower(given, *others, **static).compile(compiler_options=OPTIMISED)
        pattern = rf"= (f32\[{model.num_layers},\d+,\d+[\d,]*\])"
        return set(re.findall(pattern, compiled.as_text()))

    assert list_conversions(stored) == set()
    if jax.__version_info__ < (0, 12):  # later ones convert no whole stack of values either
        assert list_conversions(params) != set(), "the pattern finds what would be converted"


# --- products of a single vector ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [576, 1536, 48, 577])  # the last two cannot be cut
@pytest.mark.parametrize("start", [0, 7])
def test_products_with_a_layers_kernel(inputs, start, dtype):
    rng = np.random.default_rng(inputs)
    kernel, stacked = in_storage(rng.normal(size=(3, inputs, 20)), dtype)
    x = jnp.asarray(rng.normal(size=inputs), dtype)

    @jax.jit
    def times(x, stacked, layer):
        return cpu.KernelInPlace(stacked, layer).times(x, start)

    found = times(x, stacked, 1)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel[1], np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact[start:], atol=1e-4)


@pytest.mark.parametrize("inputs", [576, 48])
def test_products_with_a_table(inputs):
    rng = np.random.default_rng(inputs)
    table, stored = in_storage(rng.normal(size=(40, inputs)), "bfloat16")
    x = jnp.asarray(rng.normal(size=inputs), "bfloat16")
    exact = np.asarray(table, np.float64) @ np.asarray(x, np.float64)
    np.testing.assert_allclose(cpu.table_product(x, stored), exact, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_layer_of_the_weights_is_copied_or_converted(dtype):
    """Read off the compiled loop: nothing in it, nor carried into it, has the size of a kernel."""
    rng = np.random.default_rng(0)
    _, stacked = in_storage(rng.normal(size=(4, 512, 512)), dtype)
    x = jnp.asarray(rng.normal(size=512), dtype)

    @jax.jit
    def steps(x, stacked):
        def token(_, x):
            def layer(x, index):
                return cpu.KernelInPlace(stacked, index).times(x).astype(x.dtype), None

            return jax.lax.scan(layer, x, jnp.arange(4))[0]

        return jax.lax.fori_loop(0, 3, token, x)

    text = steps.lower(x, stacked).compile(compiler_options=OPTIMISED).as_text()
    made = re.findall(
        r"= (\w+)\[(?:4,)?512,512\]\S* (?!parameter|get-tuple-element)([\w-]+)\(", text
    )
    assert made == []


def test_a_table_is_not_converted_before_the_loop_that_reads_it():
    """Blocks of it in float32, made once and read at every step, would be twice its bytes."""
    rng = np.random.default_rng(0)
    _, stored = in_storage(rng.normal(size=(512, 512)), "bfloat16")
    x = jnp.asarray(rng.normal(size=512), "bfloat16")

    @jax.jit
    def steps(x, stored):
        def token(_, x):
            return cpu.table_product(x, stored).astype(x.dtype)

        return jax.lax.fori_loop(0, 3, token, x)

    text = steps.lower(x, stored).compile(compiler_options=OPTIMISED).as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    assert len(loops) == 1
    assert "u16[512,512]" in loops[0]
    assert "f32[512," not in loops[0]


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("llama", "bfloat16"),
        pytest.param("llama", "float32", marks=pytest.mark.slow),
        pytest.param("gpt2", "bfloat16", marks=pytest.mark.slow),
        pytest.param("gpt2", "float32", marks=pytest.mark.slow),
    ],
)
def test_one_row_decodes_as_it_does_among_several(model_type, dtype):
    """Wide enough for the products to be cut; the several rows' come from another program."""
    model = model_of(model_type, dtype=dtype, hidden_size=256, mlp_size=512)
    params = params_of(model)
    rows = random_tokens(model, 3, 12)
    cfg = Config(model, max_new_tokens=8, eos_token_ids=())
    alone = qs_jax.generate(params, rows[:1], cfg)
    among = qs_jax.generate(params, rows, cfg)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(alone.logprobs[0, 0], among.logprobs[0, 0], atol=tolerance)
    if dtype == "float32":
        np.testing.assert_array_equal(alone.tokens[0], among.tokens[0])
        np.testing.assert_allclose(alone.logprobs[0], among.logprobs[0], atol=tolerance)
