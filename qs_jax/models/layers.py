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
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig

# Given this layer's queries [B, T, N, H] and keys and values [B, T, K, H] of the same tokens,
# returns what attention reads [B, T, N, H] and whatever the caller wants back (an updated cache).
# The engine owns the keys: which exist, where they are stored, who may see them.
Attend: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Any]]

# Applied to the input of each of the four projections; quantisation enters here.
Cast: TypeAlias = Callable[[Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
}


def as_it_is(x: Array) -> Array:
    """No cast."""
    return x


class PreNormBlock(nn.Module):
    """One layer: `h + Attn(norm(h))`, then `h + MLP(norm(h))`.

    Families define the submodules `attn_norm`, `qkv`, `out` and `mlp_norm`, and the methods below.
    """

    model: ModelConfig

    def project(self, x_BTD: Array, pos_BT: Array) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of normed states."""
        raise NotImplementedError

    def mlp(self, x_BTD: Array, cast: Cast) -> Array:
        """The MLP of normed states; `cast` is applied to the input of the down projection."""
        raise NotImplementedError

    def place(self, k_BTKH: Array, pos_BT: Array) -> Array:
        """Keys as they are cached: with positions, where those are not in the embedding."""
        del pos_BT
        return k_BTKH

    def keys_values(
        self, h_BTD: Float[Array, "B T D"], pos_BT: Int[Array, "B T"], cast: Cast = as_it_is
    ) -> tuple[Array, Array]:
        """What `project` gives as keys and values, by their columns of the projection alone."""
        x_BTD, weights = cast(normed(self.attn_norm, h_BTD)), self.qkv.variables["params"]
        kv_BTO = x_BTD @ weights["kernel"][:, self.model.q_size :]
        if "bias" in weights:
            kv_BTO += weights["bias"][None, None, self.model.q_size :]
        shape = (*h_BTD.shape[:2], -1, self.model.head_dim)
        k_BTO, v_BTO = jnp.split(kv_BTO, 2, axis=-1)
        return self.place(k_BTO.reshape(shape), pos_BT), v_BTO.reshape(shape)

    def __call__(
        self,
        h_BTD: Float[Array, "B T D"],
        pos_BT: Int[Array, "B T"],
        attend: Attend,
        cast: Cast = as_it_is,
    ) -> tuple[Float[Array, "B T D"], Any]:
        with jax.named_scope("attn"):
            q, k, v = self.project(cast(normed(self.attn_norm, h_BTD)), pos_BT)
            context_BTNH, kept = attend(q, k, v)
            h_BTD = h_BTD + self.out(cast(context_BTNH.reshape(*h_BTD.shape[:2], -1)))
        with jax.named_scope("mlp"):
            return h_BTD + self.mlp(cast(normed(self.mlp_norm, h_BTD)), cast), kept


def exact_dtype(dtype: Any) -> Any:
    """What norms, softmax and logits are computed in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(model: ModelConfig) -> nn.Module:
    """Root-mean-square norm (Zhang & Sennrich 2019), at least float32 inside."""
    return nn.RMSNorm(epsilon=model.norm_eps, dtype=exact_dtype(model.dtype))


def layer_norm(model: ModelConfig) -> nn.Module:
    """Layer norm (Ba et al. 2016), at least float32 inside."""
    dtype = exact_dtype(model.dtype)
    return nn.LayerNorm(epsilon=model.norm_eps, dtype=dtype, use_fast_variance=False)


def normed(norm: Callable[[Array], Array], h: Float[Array, "*batch D"]) -> Array:
    """Apply a norm and return to the dtype of the residual stream."""
    return norm(h).astype(h.dtype)


def split_heads(qkv_BTO: Float[Array, "B T O"], model: ModelConfig) -> tuple[Array, Array, Array]:
    """Cut the fused projection into q `[B, T, N, H]`, k and v `[B, T, K, H]`."""
    shape = (*qkv_BTO.shape[:2], -1, model.head_dim)
    cuts = [model.q_size, model.q_size + model.kv_size]
    q, k, v = jnp.split(qkv_BTO, cuts, axis=-1)
    return q.reshape(shape), k.reshape(shape), v.reshape(shape)


def embed_lookup(table_VD: Float[Array, "V D"], ids: Int[Array, "*batch"]) -> Array:
    """Rows of an embedding table; ids are checked before they get here."""
    return jnp.take(table_VD, ids, axis=0, mode="clip")


def unembed(h: Float[Array, "*batch D"], table_VD: Float[Array, "V D"]) -> Array:
    """Logits `[..., V]`, accumulated in at least float32 (Press & Wolf 2017 when tied)."""
    dtype = exact_dtype(h.dtype)
    return jnp.einsum("...d,vd->...v", h, table_VD, preferred_element_type=dtype)
