"""Llama-2-family modules: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Sources: Touvron et al. 2023 (Llama 2); Ainslie et al. 2023 (GQA); Shazeer 2020 (SwiGLU).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from qs_jax.config import ModelConfig
from qs_jax.models import layers, rope


class Embed(nn.Module):
    """Token embedding; positions enter through RoPE."""

    model: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: Array, pos_BT: Array) -> Array:
        del pos_BT
        init = nn.initializers.normal(0.02)
        table_VD = self.param("tokens", init, (self.model.vocab_size, self.model.hidden_size))
        return (layers.embed_lookup(table_VD, tokens_BT)).astype(self.model.dtype)


class Block(layers.PreNormBlock):
    """RMSNorm, rotary grouped-query attention, SwiGLU."""

    def setup(self) -> None:
        m = self.model
        self.attn_norm = layers.rms_norm(m)
        self.qkv = nn.Dense(m.q_size + 2 * m.kv_size, use_bias=m.attention_bias)
        self.out = nn.Dense(m.hidden_size, use_bias=m.attention_bias)
        self.mlp_norm = layers.rms_norm(m)
        self.gate_up = nn.Dense(2 * m.mlp_size, use_bias=m.mlp_bias)
        self.down = nn.Dense(m.hidden_size, use_bias=m.mlp_bias)

    def project(
        self, x_BTD: Array, pos_BT: Array, multiply: layers.Multiply = layers.dense_product
    ) -> tuple[Array, Array, Array]:
        qkv_BTO = multiply(self.qkv, x_BTD).astype(x_BTD.dtype)
        q, k, v = layers.split_heads(qkv_BTO, self.model)
        return self.place(q, pos_BT), self.place(k, pos_BT), v

    def place(self, x_BTXH: Array, pos_BT: Array) -> Array:
        return rope.rotate(x_BTXH, pos_BT, self.model)

    def neurons(self, x_BTD: Array, multiply: layers.Multiply) -> Array:
        gate_BTF, up_BTF = jnp.split(multiply(self.gate_up, x_BTD), 2, axis=-1)
        found_BTF = layers.ACTIVATIONS[self.model.activation](gate_BTF) * up_BTF
        return found_BTF.astype(x_BTD.dtype)
