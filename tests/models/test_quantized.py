"""Projections in codes: the rounding, the product, and whole models against their float values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.config import Config, Speculation
from qs_jax.errors import ConfigError
from qs_jax.models.layers import product
from qs_jax.models.quantized import QKernel, in_int8, to_int8, with_floats
from tests.engine.contract import FAST, MATRIX, few, model_of, params_of
from tests.oracle.comparison import with_maps
from tests.support import random_tokens


def test_a_code_is_the_nearest_step_of_its_channel():
    w_CO = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
    w_CO[:, 3] = 0.0
    kernel = to_int8(jnp.asarray(w_CO))
    steps_O = np.abs(w_CO).max(0) / 127
    assert kernel.codes.dtype == jnp.int8
    error_CO = np.abs(np.asarray(kernel.values(jnp.float32)) - w_CO)
    assert (error_CO <= steps_O / 2 * 1.001).all()
    assert np.abs(kernel.codes).max(0).tolist() == [127, 127, 127, 0, 127, 127, 127]


def packed(codes_CO):
    """Two codes of a group of 32 in a byte, by the definition."""
    out_RO = np.zeros((len(codes_CO) // 2, codes_CO.shape[1]), np.uint8)
    for group in range(len(codes_CO) // 32):
        for at in range(16):
            low, high = codes_CO[32 * group + at], codes_CO[32 * group + 16 + at]
            out_RO[16 * group + at] = low + 16 * high
    return out_RO


@pytest.mark.parametrize("kind", ["int8", "groups-8", "groups-4"])
@pytest.mark.parametrize("start", [0, 2])
def test_a_product_is_that_of_the_values(kind, start):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x_TC = jnp.asarray(rng.normal(size=(3, 64)))
        if kind == "int8":
            kernel, codes = to_int8(jnp.asarray(rng.normal(size=(64, 5)))), None
            values = np.asarray(kernel.codes) * np.asarray(kernel.scale)
        else:
            least, most = (0, 16) if kind == "groups-4" else (-127, 128)
            codes = rng.integers(least, most, (64, 5))
            scale, offset = rng.normal(size=(2, 2, 5))
            held = packed(codes) if kind == "groups-4" else codes.astype(np.int8)
            bits = 4 if kind == "groups-4" else 8
            kernel = QKernel(*map(jnp.asarray, (held, scale, offset)), bits=bits)
            values = codes * np.repeat(scale, 32, 0) + np.repeat(offset, 32, 0)
        assert kernel.shape == (64, 5)
        np.testing.assert_allclose(kernel.values(jnp.float64), values, rtol=1e-12)
        found = kernel.times(x_TC, product, start)
        np.testing.assert_allclose(found, x_TC @ values[:, start:], rtol=1e-10, atol=1e-12)


CASES = {
    "dense": (None, None, {}),
    "dense-gpt2": (None, None, {"model_type": "gpt2"}),
    "masked": (MATRIX["HKFQ"], None, {}),
    "fast": (FAST["dual-skip"], None, {}),
    "int8": (FAST["quota-fusion-int8"], "continuation", {}),
    "light": (FAST["light"], "continuation", {}),
    "drafts": (None, None, {"speculate": Speculation(length=3, gate=0)}),
}


SHOWN = [("dense", 1), ("dense", 3), ("light", 3), ("drafts", 1)]


@pytest.mark.parametrize(("name", "rows"), few(itertools.product(CASES, (1, 3)), *SHOWN))
def test_every_engine_runs_codes_as_their_values(name, rows):
    """In float64; a single row's loop reads kernels in place."""
    qs, protocol, more = CASES[name]
    model = model_of(more.get("model_type", "llama"), dtype="float64")
    given = {key: value for key, value in more.items() if key != "model_type"}
    with jax.enable_x64(True):
        cfg = Config(model, qs, protocol=protocol, max_new_tokens=6, eos_token_ids=(), **given)
        coded = in_int8(params_of(model))
        floats = with_floats(coded, jnp.float64)
        if qs is not None:
            floats = with_maps(floats, model, qs, protocol, 0)
            coded = coded | {n: part for n, part in floats.items() if n not in coded}
        prompts = random_tokens(model, rows, 14)
        ours, theirs = (qs_jax.generate(params, prompts, cfg) for params in (coded, floats))
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)
        options = {"prompt_lengths": [8] * rows} if protocol == "continuation" else {}
        scores = [qs_jax.score(params, prompts, cfg, **options) for params in (coded, floats)]
        np.testing.assert_allclose(scores[0].logprobs, scores[1].logprobs, atol=1e-6)


def test_codes_of_another_model_are_refused():
    coded, other = in_int8(params_of(model_of("llama"))), model_of("llama", mlp_size=56)
    with pytest.raises(ConfigError, match=r"not those of cfg\.model"):
        qs_jax.generate(coded, [[1, 2]], Config(other, max_new_tokens=2))


def test_maps_are_not_fitted_on_codes():
    model = model_of("llama")
    with pytest.raises(ConfigError, match="fitted on floats"):
        qs_jax.fit_kv_maps(in_int8(params_of(model)), random_tokens(model, 4, 16), (3,), model)
