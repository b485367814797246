"""The modules of Llama and its relatives: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Mistral adds a sliding window, which is the engines' part; Qwen2 biases on queries, keys and values;
Qwen3 norms of each head's queries and keys.
Sources: Touvron et al. 2023 (Llama 2); Ainslie et al. 2023 (GQA); Shazeer 2020 (SwiGLU); Jiang et
al. 2023 (Mistral 7B); Yang et al. 2024 and 2025 (Qwen2, Qwen3).
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
        bias = m.attention_bias or m.qkv_bias
        self.qkv = nn.Dense(m.q_size + 2 * m.kv_size, use_bias=bias)
        if m.qk_norm:
            self.q_norm, self.k_norm = layers.rms_norm(m), layers.rms_norm(m)
        self.out = nn.Dense(m.hidden_size, use_bias=m.attention_bias)
        self.mlp_norm = layers.rms_norm(m)
        self.gate_up = nn.Dense(2 * m.mlp_size, use_bias=m.mlp_bias)
        self.down = nn.Dense(m.hidden_size, use_bias=m.mlp_bias)

    def project(
        self, x_BTD: Array, pos_BT: Array, multiply: layers.Multiply = layers.dense_product
    ) -> tuple[Array, Array, Array]:
        qkv_BTO = multiply(self.qkv, x_BTD).astype(x_BTD.dtype)
        q, k, v = layers.split_heads(qkv_BTO, self.model)
        if self.model.qk_norm:
            q = layers.normed(self.q_norm, q, self.model)
            k = layers.normed(self.k_norm, k, self.model)
        return self.place(q, pos_BT), self.place(k, pos_BT), v

    def unrotated(self, h_BTD: Array, multiply: layers.Multiply = layers.dense_product) -> Array:
        kv_BTO = super().unrotated(h_BTD, multiply)
        if not self.model.qk_norm:
            return kv_BTO
        k_BTKH, v_BTKH = layers.split_keys_values(kv_BTO, self.model)
        k_BTKH = layers.normed(self.k_norm, k_BTKH, self.model)
        return jnp.concatenate([k_BTKH, v_BTKH], axis=2).reshape(kv_BTO.shape)

    def place(self, x_BTXH: Array, pos_BT: Array) -> Array:
        return rope.rotate(x_BTXH, pos_BT, self.model)

    def neurons(self, x_BTD: Array, multiply: layers.Multiply) -> Array:
        gate_BTF, up_BTF = jnp.split(multiply(self.gate_up, x_BTD), 2, axis=-1)
        found_BTF = layers.ACTIVATIONS[self.model.activation](gate_BTF) * up_BTF
        return found_BTF.astype(x_BTD.dtype)
