"""Products of one vector with weights where they lie, against float64, and as XLA compiles them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import halves
from qs_jax.config import Config
from qs_jax.models import one_vector
from tests.engine.contract import model_of, params_of
from tests.support import OPTIMISED, random_tokens

DTYPES = ("float32", "bfloat16")


def held(array, dtype):
    """An array in a dtype, and as programs hold it."""
    array = jnp.asarray(array, dtype)
    return array, halves.to_bits(array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [576, 1536, 48, 577])  # the last two cannot be cut
@pytest.mark.parametrize("start", [0, 7])
def test_products_with_a_layers_kernel(inputs, start, dtype):
    rng = np.random.default_rng(inputs)
    kernel, stacked = held(rng.normal(size=(3, inputs, 20)), dtype)
    x = jnp.asarray(rng.normal(size=inputs), dtype)

    @jax.jit
    def times(x, stacked, layer):
        return one_vector.KernelAt(stacked, layer).times(x, start)

    found = times(x, stacked, 1)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel[1], np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact[start:], atol=1e-4)


@pytest.mark.parametrize("inputs", [576, 48])
def test_products_with_a_table(inputs):
    rng = np.random.default_rng(inputs)
    table, bits = held(rng.normal(size=(40, inputs)), "bfloat16")
    x = jnp.asarray(rng.normal(size=inputs), "bfloat16")
    exact = np.asarray(table, np.float64) @ np.asarray(x, np.float64)
    np.testing.assert_allclose(one_vector.times_table(x, bits), exact, atol=1e-4)


@pytest.mark.parametrize(("inputs", "size"), [(576, 64), (1536, 64), (4096, 256), (11008, 688)])
def test_blocks_are_whole_and_few(inputs, size):
    assert one_vector.block_size(inputs, least=64) == size
    assert inputs % size == 0
    assert 4 <= inputs // size <= one_vector.MOST_TERMS
    assert all(one_vector.block_size(whole, least=64) is None for whole in (48, 577, 255))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_layer_of_the_weights_is_copied_or_converted(dtype):
    """Read off the compiled loop: nothing in it, nor carried into it, has the size of a kernel."""
    rng = np.random.default_rng(0)
    _, stacked = held(rng.normal(size=(4, 512, 512)), dtype)
    x = jnp.asarray(rng.normal(size=512), dtype)

    @jax.jit
    def steps(x, stacked):
        def token(_, x):
            def layer(x, index):
                return one_vector.KernelAt(stacked, index).times(x).astype(x.dtype), None

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
    _, bits = held(rng.normal(size=(512, 512)), "bfloat16")
    x = jnp.asarray(rng.normal(size=512), "bfloat16")

    @jax.jit
    def steps(x, bits):
        def token(_, x):
            return one_vector.times_table(x, bits).astype(x.dtype)

        return jax.lax.fori_loop(0, 3, token, x)

    text = steps.lower(x, bits).compile(compiler_options=OPTIMISED).as_text()
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
