"""Attention block by block against the plain definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.engine import attention


def made(prefix, width=40, batch=2, heads=6, kv_heads=2, dim=8):
    rng = np.random.default_rng(0)
    shapes = [(width, heads), (prefix + width, kv_heads), (prefix + width, kv_heads)]
    arrays = [rng.standard_normal((batch, *shape, dim)).astype(np.float32) for shape in shapes]
    causal_TS = np.arange(prefix + width)[None, :] <= prefix + np.arange(width)[:, None]
    return (*map(jnp.array, arrays), np.broadcast_to(causal_TS, (batch, *causal_TS.shape)), rng)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("prefix", [0, 5])
def test_blocks_give_the_plain_attention(monkeypatch, block, prefix):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    q, k, v, causal_BTS, _ = made(prefix)
    expected, _ = attention.attention(q, k, v, jnp.array(causal_BTS), None)
    found = attention.blocked_attention(q, k, v, prefix=prefix)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 5])
def test_blocks_take_any_mask_within_slot_causality_and_log_sizes(monkeypatch, prefix):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    q, k, v, causal_BTS, rng = made(prefix)
    mask_BTS = causal_BTS & (rng.random(causal_BTS.shape) < 0.5)
    mask_BTS |= np.eye(*causal_BTS.shape[1:], k=prefix, dtype=bool)
    mask_BTS, log_size_BS = jnp.array(mask_BTS), jnp.log(jnp.array(rng.integers(1, 5, k.shape[:2])))
    expected, _ = attention.attention(q, k, v, mask_BTS, log_size_BS)
    found = attention.blocked_attention(q, k, v, mask_BTS, prefix=prefix, log_size_BS=log_size_BS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_and_touches_no_other():
    q, k, v, causal_BTS, _ = made(0)
    mask_BTS = jnp.array(causal_BTS).at[:, 3].set(False)
    found = np.asarray(attention.blocked_attention(q, k, v, mask_BTS))
    whole = np.asarray(attention.blocked_attention(q, k, v))
    assert np.isfinite(found).all()
    assert (found[:, 3] != whole[:, 3]).any()
    others = np.arange(40) != 3
    np.testing.assert_array_equal(found[:, others], whole[:, others])


@pytest.mark.parametrize("most", [0, 40_000])  # heads apart; rows apart
@pytest.mark.parametrize("by", ["mask", "places", None])
def test_rows_and_heads_one_after_the_other_are_the_same_attention(monkeypatch, most, by):
    q, k, v, causal_BTS, rng = made(0)
    batch, width = k.shape[:2]
    log_size_BS = jnp.log(jnp.array(rng.integers(1, 5, (batch, width))))
    mask_BTS, given = jnp.array(causal_BTS), {}
    if by is not None:
        gone_BS = rng.random((batch, width)) < 0.3
        own_TT = np.eye(width, dtype=bool)
        mask_BTS = jnp.array(causal_BTS & (own_TT | ~gone_BS[:, None]))
        given = {"mask_BTS": mask_BTS}
    if by == "places":  # gone for every later query, its own excepted
        pos_BT = jnp.broadcast_to(jnp.arange(width), (batch, width))
        until_BS = jnp.where(gone_BS, pos_BT + 1, width)
        given = {"places": attention.Places(pos_BT, pos_BT, until_BS)}
    expected, _ = attention.attention(q, k, v, mask_BTS, log_size_BS)
    monkeypatch.setattr(attention, "MOST_LOGITS", most)
    called, plain = [], attention._attend_tile
    monkeypatch.setattr(
        attention, "_attend_tile", lambda q, *a: called.append(q.shape[:2]) or plain(q, *a)
    )
    found = attention.blocked_attention(q, k, v, **given, log_size_BS=log_size_BS)
    assert called == [(1, 1 if most == 0 else k.shape[2])]
    np.testing.assert_allclose(found, expected, atol=1e-5)
