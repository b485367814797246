"""The plain model: embed, one `lax.scan` over the stacked layers, final norm, head.

Every other engine must agree with this one bit for bit when all mechanisms are off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine.attention import blocked_attention
from qs_jax.halves import from_bits
from qs_jax.models import Params, family_of
from qs_jax.models.head import logits
from qs_jax.state import KVCache

# attend(cache, layer, q, k, v) -> (context, cache): one layer's attention and its cache update.
AttendAt = Callable[[Any, Array, Array, Array, Array], tuple[Array, Any]]


def run_layers(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    pos_BT: Int[Array, "B T"],
    model: ModelConfig,
    attend: AttendAt,
    cache: KVCache | None,
    unroll: int = 1,
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Embed tokens and run them through all layers and the final norm.

    The cache travels in the carry and is updated in place: as a scanned input and output it would
    be copied whole at every call.

    Args:
      params: Stacked tree of `model`.
      tokens_BT: Token ids.
      pos_BT: Their original positions.
      model: Architecture.
      attend: Called once per layer with the cache and the layer's index.
      cache: Handed from layer to layer; None when nothing is kept.
      unroll: Layers per iteration of the scan.

    Returns:
      Normed states ready for the head, and the cache.
    """
    family = family_of(model)
    block = family.block(model)

    def layer(carry, scanned):
        h_BTD, cache = carry
        index, params_l = scanned[0], from_bits(scanned[1])
        attend_here = functools.partial(attend, cache, index)
        after: Any = block.apply({"params": params_l}, h_BTD, pos_BT, attend_here)
        return after, None

    h_BTD: Any
    with jax.named_scope("embed"):
        h_BTD = family.embed(model).apply({"params": params["embed"]}, tokens_BT, pos_BT)
    scanned = (jnp.arange(model.num_layers), params["layers"])
    (h_BTD, cache), _ = lax.scan(layer, (h_BTD, cache), scanned, unroll=unroll)
    normed: Any = family.final_norm(model).apply({"params": params["final_norm"]}, h_BTD)
    return normed, cache


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
) -> Float[Array, "B T N H"]:
    """Attention of rows over themselves, softmax in float32."""
    return blocked_attention(q_BTNH, k_BTKH, v_BTKH)


def attend_causal(cache: KVCache | None, index: Array, q: Array, k: Array, v: Array):
    """Attention of whole rows over themselves; writes the cache at slots 0.. when there is one.

    Right padding needs no mask: no real query comes after a pad.
    """
    context_BTNH = causal_attention(q, k, v)
    if cache is not None:
        cache = cache.write_rows(index, k, v)
    return context_BTNH, cache


def attend_cached(pos_B: Array) -> AttendAt:
    """Attention of one token a row, at `pos_B`, over the cached keys up to and including itself."""

    def attend(cache: KVCache, index: Array, q: Array, k: Array, v: Array):
        cache = cache.write_step(index, pos_B, k, v)
        k_BSKH, v_BSKH = cache.of_layer(index)
        seen_BS = jnp.arange(cache.capacity)[None, :] <= pos_B[:, None]
        mask_B11S = seen_BS[:, None, None, :]
        return jax.nn.dot_product_attention(q, k_BSKH, v_BSKH, mask=mask_B11S), cache

    return attend


def forward(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig, unroll: int = 1
) -> Float[Array, "B T D"]:
    """Normed states of right-padded rows; `logits` of position i uses tokens 0..i only."""
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    return run_layers(params, tokens_BT, pos_BT, model, attend_causal, None, unroll)[0]


def look_at_layers(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    model: ModelConfig,
    look: Callable[[Array, Array, Any], Any],
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
) -> Any:
    """What a function says of every layer of the dense model.

    Args:
      params: Stacked tree of `model`.
      tokens_BT: Rows without padding.
      model: Architecture.
      look: Gets the states before and after a layer, `[B, T, D]`, and what `attend` kept there.
      attend: Causal attention; gets q, k and v of a layer, returns the context and what to keep.

    Returns:
      What `look` returned, stacked: leaves `[L, ...]`.
    """
    family = family_of(model)
    block = family.block(model)
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)

    def layer(h_BTD, params_l):
        out: Any = block.apply({"params": from_bits(params_l)}, h_BTD, pos_BT, attend)
        after_BTD, kept = out
        return after_BTD, look(h_BTD, after_BTD, kept)

    embedded: Any = family.embed(model).apply({"params": params["embed"]}, tokens_BT, pos_BT)
    return lax.scan(layer, embedded, params["layers"])[1]


def prefill(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    model: ModelConfig,
    capacity: int,
    unroll: int = 1,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Run prompts, fill a fresh cache, and return the logits after each row's last token.

    Args:
      params: Stacked tree of `model`.
      tokens_BT: Right-padded prompts.
      lengths_B: Valid tokens of each row.
      model: Architecture.
      capacity: Slots of the cache, at least T.
      unroll: Layers per iteration of the scan.
    """
    batch = tokens_BT.shape[0]
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    cache = KVCache.zeros(model, batch, capacity)
    h_BTD, cache = run_layers(params, tokens_BT, pos_BT, model, attend_causal, cache, unroll)
    assert cache is not None
    last_BD = h_BTD[jnp.arange(batch), lengths_B - 1]
    return logits(params, last_BD), cache


def decode_step(
    params: Params,
    tokens_B: Int[Array, "B"],
    pos_B: Int[Array, "B"],
    cache: KVCache,
    model: ModelConfig,
    unroll: int = 1,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Run one token a row at `pos_B` and return the logits after it and the updated cache."""
    h_BTD, cache_out = run_layers(
        params, tokens_B[:, None], pos_B[:, None], model, attend_cached(pos_B), cache, unroll
    )
    assert cache_out is not None
    return logits(params, h_BTD[:, 0]), cache_out
