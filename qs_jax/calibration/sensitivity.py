"""How much later queries feel an error in a key or a value, layer by layer.

For a scored query q, a far key s and a head r with weights p: an error in the value moves the
residual a_q by p W_o^r; an error in the key moves the softmax, and with it the context from o_q
towards v_s. Relative to |a_q|, and squared, that is a diagonal metric of each layer's keys (before
RoPE, pairs alike) and a matrix for the values of each KV head.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qs_jax.config import ModelConfig
from qs_jax.engine import dense
from qs_jax.engine.attention import attention, in_window
from qs_jax.models import apply_block, family_of
from qs_jax.models.cpu import from_storage

FAR = 32  # distance of a query that counts, in tokens
ASKING = 128  # last tokens of a window whose queries count, at most a quarter of it


class Felt(NamedTuple):
    """Sums over tokens of one layer: see the module."""

    key_KH: Any
    value_KHH: Any
    squares: Any  # mean square of the state that the layer reads


def layer_params(params: Any, index: int) -> Any:
    """One layer's parameters, which may be in storage, in their dtype."""
    return from_storage(jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), params["layers"]))


@functools.partial(jax.jit, static_argnames="model")
def dense_layer(params_l: Any, h_BTD: Array, pos_BT: Array, model: ModelConfig) -> Array:
    """States after a whole layer."""
    return apply_block(model, params_l, h_BTD, pos_BT, dense.attend_causal(model))[0]


@functools.partial(jax.jit, static_argnames="model")
def unrotated(params_l: Any, h_BTD: Array, model: ModelConfig) -> Float[Array, "B T O"]:
    """Keys before RoPE, then values, of states, side by side."""
    return apply_block(model, params_l, h_BTD, method="unrotated")


@functools.partial(jax.jit, static_argnames=("model", "skip_first"))
def watched_layer(params_l: Any, h_BTD: Array, pos_BT: Array, model: ModelConfig, skip_first: int):
    """A whole layer: states after it, attention received, and what is felt.

    Attention is squared and summed over heads, `[B, T]` twice: the mean of queries from afar, and
    the sum of the window's last queries.
    """
    width = h_BTD.shape[1]
    seen: dict[str, Any] = {}

    def attend(q: Array, k: Array, v: Array):
        mask_BTS = pos_BT[:, None, :] <= pos_BT[:, :, None]
        mask_BTS &= in_window(pos_BT, pos_BT, model.sliding_window)
        context, weights = attention(q, k, v, mask_BTS)
        seen.update(q=q, v=v, context=context, weights=weights)
        return context, None

    after_BTD, _ = apply_block(model, params_l, h_BTD, pos_BT, attend)
    weights_BNTS, pos_T = seen["weights"], jnp.arange(width)
    far_TS = pos_T[:, None] >= pos_T[None] + FAR
    queries_S = jnp.maximum(width - FAR - pos_T, 16)
    received_BS = (jnp.where(far_TS, weights_BNTS, 0.0) ** 2).sum((1, 2)) / queries_S[None]
    first = width - min(ASKING, width // 4)
    asked_BS = (weights_BNTS[:, :, first:] ** 2).sum((1, 2))
    keys_S = (pos_T >= skip_first) & (pos_T < first - FAR // 2)
    felt = _felt(params_l["out"], h_BTD, seen, first, keys_S, model)
    return after_BTD, (received_BS, asked_BS), felt


def _felt(out, h_BTD, seen, first, keys_S, model: ModelConfig) -> Felt:
    kv_heads, dim = model.num_kv_heads, model.head_dim
    out_QD = out["kernel"].astype(h_BTD.dtype)
    groups, batch = model.num_heads // kv_heads, h_BTD.shape[0]
    context = seen["context"][:, first:]
    a_BTD = h_BTD[:, first:] + context.reshape(batch, -1, out_QD.shape[0]) @ out_QD
    a_BTD += jnp.broadcast_to(out.get("bias", 0.0), a_BTD.shape)
    size_BT = 1 / jnp.square(a_BTD).sum(-1)
    q, o = (x.reshape(batch, -1, kv_heads, groups, dim) for x in (seen["q"][:, first:], context))
    v = seen["v"]
    out_KGHD = out_QD.reshape(kv_heads, groups, dim, -1)
    reads_KGHH = jnp.einsum("kghd,kgid->kghi", out_KGHD, out_KGHD)
    p = seen["weights"].reshape(batch, kv_heads, groups, *seen["weights"].shape[2:])[
        :, :, :, first:
    ]
    p2 = jnp.where(keys_S, p * p, 0.0) * size_BT[:, None, None, :, None]
    vr, orr = (
        jnp.einsum("bskh,kghi->bskgi", v, reads_KGHH),
        jnp.einsum("btkgh,kghi->btkgi", o, reads_KGHH),
    )
    v2 = jnp.einsum("bskgi,bski->bkgs", vr, v)[:, :, :, None]
    o2 = jnp.einsum("btkgi,btkgi->bkgt", orr, o)[..., None]
    apart = v2 + o2 - 2 * jnp.einsum("btkgi,bski->bkgts", orr, v)
    key_KH = jnp.einsum("bkgt,btkgh->kh", (p2 * apart).sum(-1) / dim, q * q)
    value_KHH = jnp.einsum("kg,kghi->khi", p2.sum((0, 3, 4)), reads_KGHH)
    return Felt(key_KH, value_KHH, jnp.square(h_BTD[:, first // 2 :]).mean())


def as_float64(tree: Any) -> Any:
    """Arrays on the host, in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


class Metric:
    """What is felt of each layer's keys and values, from sums over all batches."""

    def __init__(
        self, params: Any, felt: list[Felt], tokens: int, batches: int, model: ModelConfig
    ):
        self.params, self.model = params, model
        self.key, self.value, self.rms = [], [], []
        for sums in felt:
            key_KH = np.asarray(sums.key_KH, np.float64) / tokens
            if family_of(model).rotates:
                half = model.head_dim // 2
                pair = (key_KH[:, :half] + key_KH[:, half:]) / 2
                key_KH = np.concatenate([pair, pair], axis=1)
            value = np.asarray(sums.value_KHH, np.float64) / tokens
            floor = 1e-9 * np.trace(value, axis1=1, axis2=2)[:, None, None] + 1e-30
            self.key.append(np.sqrt(key_KH + 1e-6 * key_KH.mean() + 1e-30).reshape(-1))
            self.value.append(np.linalg.cholesky(value + floor * np.eye(model.head_dim)))
            self.rms.append(math.sqrt(float(sums.squares) / batches))

    def weigh(self, columns: np.ndarray, layer: int) -> np.ndarray:
        """Columns of layer's keys and values `[..., 2 K H]` in units of what is felt."""
        keys, values = np.split(columns, 2, axis=-1)
        by_head = values.reshape(*values.shape[:-1], self.model.num_kv_heads, -1)
        felt = np.einsum("...kh,khi->...ki", by_head, self.value[layer - 1])
        return np.concatenate([keys * self.key[layer - 1], felt.reshape(keys.shape)], axis=-1)

    def of_state(self, layer: int) -> Float[np.ndarray, "D D"]:
        """Factor of the metric of the state after a layer, by what all deeper layers read of it."""
        size = self.model.hidden_size
        total = np.zeros((size, size))
        for deeper in range(layer + 1, self.model.num_layers + 1):
            part = layer_params(self.params, deeper - 1)
            names = ("attn_norm", "qkv", "k_norm")
            part = {name: as_float64(part[name]) for name in names if name in part}
            norm, kernel = part["attn_norm"], part["qkv"]["kernel"]
            reads = kernel[:, self.model.q_size :] * norm["scale"][:, None]
            if "bias" in norm:  # a layer norm takes the mean away
                reads = reads - reads.mean(0)
            if "k_norm" in part:  # over the root mean square that keys of white states have
                keys, values = np.split(reads, 2, axis=1)
                by_head = keys.reshape(size, self.model.num_kv_heads, -1)
                by_head = by_head / np.sqrt((by_head**2).sum(0).mean(-1))[None, :, None]
                keys = (by_head * part["k_norm"]["scale"]).reshape(keys.shape)
                reads = np.concatenate([keys, values], axis=1)
            felt = self.weigh(reads / self.rms[deeper - 1], deeper)
            total += felt @ felt.T
        return np.linalg.cholesky(total + (0.1 * np.trace(total) / size + 1e-30) * np.eye(size))
