"""Pieces that GPT-2 and Llama blocks share.

Letters: B batch, T query position, S key position, D model width, N query heads, K key/value heads,
H head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.config import ModelConfig
from qs_jax.models import cpu
from qs_jax.models.quantized import QKernel
from qs_jax.state import exact_dtype

# Given this layer's queries [B, T, N, H] and keys and values [B, T, K, H] of the same tokens,
# returns the context [B, T, N, H] and what the caller wants back (an updated cache).
# The engine decides about keys: which exist, where they are stored, which queries see them.
Attend: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Any]]

# multiply(dense, x, start=0) applies one of the four projections (a dense module, known by its
# name) to its input [B, T, C], from output column `start` on, and returns at least float32;
# quantisation enters here.
Multiply: TypeAlias = Callable[..., Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
}


def product(x: Float[Array, "*batch C"], kernel: Array, transposed: bool = False) -> Array:
    """`x @ kernel` (or its transpose), accumulated in and returned in at least float32."""
    equation = "...c,oc->...o" if transposed else "...c,co->...o"
    return jnp.einsum(equation, x, kernel, preferred_element_type=exact_dtype(x.dtype))


def dense_product(dense: nn.Dense, x: Array, start: int = 0) -> Array:
    """The product as the module defines it, from output column `start` on, at least float32.

    The kernel may be a `QKernel`, or lie in place, where a single vector is multiplied with it.
    """
    weights = dense.variables.get("params")
    if weights is None:  # parameters are being made
        return dense(x)
    kernel: Any = weights["kernel"]
    in_place = isinstance(kernel, cpu.KernelInPlace | cpu.QKernelInPlace)
    if in_place and x.size > x.shape[-1]:
        kernel, in_place = kernel.values, False
    if isinstance(kernel, QKernel):
        y = kernel.times(x, product, start)
    elif in_place:
        y = kernel.times(x.reshape(-1), start).reshape(*x.shape[:-1], -1)
    else:
        y = product(x.astype(kernel.dtype), kernel[:, start:])
    if "bias" not in weights:
        return y
    return y + weights["bias"][start:].astype(y.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class PreNormBlock(nn.Module):
    """One layer: `h + Attn(norm(h))`, then `h + MLP(norm(h))`.

    Families define the submodules `attn_norm`, `qkv`, `out`, `mlp_norm` and `down`, and the methods
    below.
    """

    model: ModelConfig

    def project(
        self, x_BTD: Array, pos_BT: Array, multiply: Multiply = dense_product
    ) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of normed states."""
        raise NotImplementedError

    def queries(self, h_BTD: Array, pos_BT: Array, multiply: Multiply = dense_product) -> Array:
        """Queries `[B, T, N, H]` alone."""
        return self.project(normed(self.attn_norm, h_BTD, self.model), pos_BT, multiply)[0]

    def keys_values(
        self, h_BTD: Array, pos_BT: Array, multiply: Multiply = dense_product
    ) -> tuple[Array, Array]:
        """Keys and values `[B, T, K, H]` alone."""
        with jax.named_scope("attn"):
            k, v = split_keys_values(self.unrotated(h_BTD, multiply), self.model)
            return self.place(k, pos_BT), v

    def unrotated(self, h_BTD: Array, multiply: Multiply = dense_product) -> Array:
        """Keys before they are rotated, then values, side by side `[B, T, 2 K H]`."""
        x_BTD = normed(self.attn_norm, h_BTD, self.model)
        return multiply(self.qkv, x_BTD, self.model.q_size).astype(x_BTD.dtype)

    def place(self, x_BTXH: Array, pos_BT: Array) -> Array:
        """Queries or keys rotated by their positions, where the family rotates."""
        del pos_BT
        return x_BTXH

    def neurons(self, x_BTD: Array, multiply: Multiply) -> Array:
        """Inner activations of the MLP, which `down` reads, `[B, T, F]` in the states' dtype."""
        raise NotImplementedError

    def mlp_neurons(self, h_BTD: Float[Array, "B T D"]) -> Array:
        """`neurons` of states that are not normed."""
        return self.neurons(normed(self.mlp_norm, h_BTD, self.model), dense_product)

    def __call__(
        self, h_BTD: Array, pos_BT: Array, attend: Attend, multiply: Multiply = dense_product
    ) -> tuple[Array, Any]:
        with jax.named_scope("attn"):
            x_BTD = normed(self.attn_norm, h_BTD, self.model)
            q, k, v = self.project(x_BTD, pos_BT, multiply)
            context_BTNH, kept = attend(q, k, v)
            context_BTO = context_BTNH.reshape(*h_BTD.shape[:2], -1)
            h_BTD = added(h_BTD, multiply(self.out, context_BTO), self.model)
        with jax.named_scope("mlp"):
            x_BTD = self.neurons(normed(self.mlp_norm, h_BTD, self.model), multiply)
            return added(h_BTD, multiply(self.down, x_BTD), self.model), kept

    def light(
        self, h_BTD: Array, pos_BT: Array, attend: Attend, code: tuple[Array, ...]
    ) -> tuple[Array, Any]:
        """A light layer (`qs_jax.mechanisms.light`).

        `code` is its encoder, in the parts that read the state, the neurons and 1 (products whose
        sizes are even are faster than one of all), and its decoder.
        """
        with jax.named_scope("light"):
            q, k, v = self.project(normed(self.attn_norm, h_BTD, self.model), pos_BT)
            context_BTNH, kept = attend(q, k, v)
            context_BTO = context_BTNH.reshape(*h_BTD.shape[:2], -1)
            h_BTD = added(h_BTD, dense_product(self.out, context_BTO), self.model)
            of_state_DR, of_neurons_MR, one_R, decode_RD = (x.astype(h_BTD.dtype) for x in code)
            code_BTR = product(rms_normalised(h_BTD), of_state_DR)
            code_BTR += product(self.mlp_neurons(h_BTD), of_neurons_MR)
            code_BTR = (code_BTR + one_R[None, None]).astype(h_BTD.dtype)
            return added(h_BTD, product(code_BTR, decode_RD), self.model), kept

    def light_features(self, h_BTD: Array) -> Array:
        """What a light layer's map reads after attention: state over its RMS, neurons, and 1."""
        parts = (rms_normalised(h_BTD), self.mlp_neurons(h_BTD))
        return jnp.concatenate([*parts, jnp.ones_like(h_BTD[..., :1])], axis=-1)


class FinalNorm(nn.Module):
    """The norm between the last layer and the head."""

    model: ModelConfig
    make_norm: Callable[[ModelConfig], nn.Module]

    def setup(self) -> None:
        self.norm = self.make_norm(self.model)

    def __call__(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return normed(self.norm, h, self.model)


def rms_norm(model: ModelConfig) -> nn.Module:
    """Root-mean-square norm (Zhang & Sennrich 2019), at least float32 inside."""
    return nn.RMSNorm(epsilon=model.norm_eps, dtype=exact_dtype(model.dtype))


def layer_norm(model: ModelConfig) -> nn.Module:
    """Layer norm (Ba et al. 2016), at least float32 inside."""
    dtype = exact_dtype(model.dtype)
    return nn.LayerNorm(epsilon=model.norm_eps, dtype=dtype, use_fast_variance=False)


def normed(norm: Callable[[Array], Array], h: Array, model: ModelConfig) -> Array:
    """Apply a norm to states; in the dtype of the model, as products take it.

    A norm divides by infinity where the squares of a state overflow, and so makes zeros of it,
    which the head would turn into even probabilities: such states become NaN.
    """
    squares = jnp.square(h.astype(exact_dtype(model.dtype))).mean(-1, keepdims=True)
    return jnp.where(jnp.isinf(squares), jnp.nan, norm(h)).astype(model.dtype)


def rms_normalised(x: Array) -> Array:
    """X over its root mean square."""
    return x / jnp.maximum(jnp.sqrt((x * x).mean(-1, keepdims=True)), 1e-6)


def added(h: Array, update: Array, model: ModelConfig) -> Array:
    """Add an update to states, rounded once."""
    return (h.astype(update.dtype) + update).astype(model.dtype)


def split_heads(qkv_BTO: Float[Array, "B T O"], model: ModelConfig) -> tuple[Array, Array, Array]:
    """Cut the fused projection into q `[B, T, N, H]`, k and v `[B, T, K, H]`."""
    shape = (*qkv_BTO.shape[:2], -1, model.head_dim)
    queries = qkv_BTO.shape[-1] - 2 * model.kv_size  # fewer where heads were left out
    q, k, v = jnp.split(qkv_BTO, [queries, queries + model.kv_size], axis=-1)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def split_keys_values(kv_BTO: Float[Array, "B T O"], model: ModelConfig) -> tuple[Array, Array]:
    """Keys and values `[B, T, K, H]` that lie side by side."""
    shape = (*kv_BTO.shape[:2], model.num_kv_heads, model.head_dim)
    k_BTKH, v_BTKH = (part.reshape(shape) for part in jnp.split(kv_BTO, 2, axis=-1))
    return k_BTKH, v_BTKH


def embed_lookup(table_VD: Array, ids: Array) -> Array:
    """Rows of an embedding table, which may be held by its bits; ids are checked before."""
    return cpu.from_storage(jnp.take(table_VD, ids, axis=0, mode="clip"))


def unembed(h: Float[Array, "*batch D"], table_VD: Float[Array, "V D"]) -> Array:
    """Logits `[..., V]`, accumulated in at least float32 (Press & Wolf 2017 when tied)."""
    return product(h, table_VD, transposed=True)
