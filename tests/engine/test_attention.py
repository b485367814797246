"""Attention block by block, and of a step's few tokens, against the plain definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.engine import attention
from qs_jax.models import cpu
from qs_jax.state import NEVER

BATCH, WIDTH, HEADS, KV_HEADS, DIM = 2, 40, 6, 2, 8


def random_heads(width, heads, seed=0):
    shape = (BATCH, width, heads, DIM)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def keys_values(slots=WIDTH):
    return random_heads(slots, KV_HEADS, seed=1), random_heads(slots, KV_HEADS, seed=2)


@pytest.fixture(params=["cpu", "others"])
def backend(request, monkeypatch):
    """Both ways to attend: CPU's own, and what GPUs take."""
    monkeypatch.setattr(cpu, "on_cpu", lambda: request.param == "cpu")
    return request.param


def in_window(query_pos_BT, window):
    """By the definition of a sliding window, from distances."""
    apart_BTS = np.asarray(query_pos_BT)[..., None] - np.arange(WIDTH)
    return apart_BTS < (window or WIDTH)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("block", [16, 64])
def test_blocks_give_the_plain_attention(monkeypatch, backend, block, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, (k, v) = random_heads(WIDTH, HEADS), keys_values()
    causal_BTS = jnp.broadcast_to(jnp.tri(WIDTH, dtype=bool), (BATCH, WIDTH, WIDTH))
    mask_BTS = causal_BTS & in_window(np.arange(WIDTH)[None], window)
    expected, _ = attention.attention(q, k, v, mask_BTS, None)
    found = attention.blocked_attention(q, k, v, window=window)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def some_of_each_row(count, seed=0):
    """Positions of the queries, rising, and the first query that sees each key."""
    rng = np.random.default_rng(seed)
    pos_BT = np.sort([rng.choice(WIDTH, count, replace=False) for _ in range(BATCH)])
    first_BS = np.where(rng.random((BATCH, WIDTH)) < 0.3, NEVER, np.arange(WIDTH))
    np.put_along_axis(first_BS, pos_BT, pos_BT, axis=1)
    return jnp.asarray(pos_BT, jnp.int32), jnp.asarray(first_BS, jnp.int32)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("rising", [True, False])
def test_some_queries_see_the_keys_that_exist(monkeypatch, backend, rising, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    q, (k, v), (pos_BT, first_BS) = random_heads(20, HEADS), keys_values(), some_of_each_row(20)
    if not rising:
        pos_BT = pos_BT[:, ::-1]
    mask_BTS = (first_BS[:, None] <= pos_BT[..., None]) & in_window(pos_BT, window)
    expected, _ = attention.attention(q, k, v, mask_BTS, None)
    options = {"window": window, "rising": rising}
    found = attention.blocked_attention(q, k, v, pos_BT, first_BS, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_and_touches_no_other(backend):
    q, (k, v) = random_heads(WIDTH, HEADS), keys_values()
    pos_BT = jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.int32), (BATCH, WIDTH))
    whole = np.asarray(attention.blocked_attention(q, k, v, pos_BT, pos_BT))
    found = np.asarray(attention.blocked_attention(q, k, v, pos_BT - 1, pos_BT))
    assert np.isfinite(found).all()
    again = attention.blocked_attention(q, k, v, jnp.maximum(pos_BT - 1, 0), pos_BT)
    np.testing.assert_array_equal(found[:, 1:], np.asarray(again)[:, 1:])
    assert (found[:, 0] != whole[:, 0]).any()


@pytest.mark.parametrize("width", [1, 3])
def test_a_step_attends_to_the_cache_and_to_itself(backend, width):
    rng = np.random.default_rng(0)
    q, old, new = random_heads(width, HEADS), keys_values(), keys_values(width)
    mask_BTX = rng.random((BATCH, width, WIDTH + width)) < 0.5
    mask_BTX[:, range(width), range(WIDTH, WIDTH + width)] = True
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True))
    expected, _ = attention.attention(q, k, v, jnp.asarray(mask_BTX), None)
    cached = tuple(array.reshape(BATCH, WIDTH, -1) for array in old)
    found = attention.step_attention(q, cached, new, jnp.asarray(mask_BTX))
    np.testing.assert_allclose(found, expected, atol=1e-5)
