"""GPT-2 modules: learned positions, pre-LayerNorm, biases everywhere, GELU MLP, tied head.

Source: Radford et al. 2019.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array

from qs_jax.config import ModelConfig
from qs_jax.models import layers


class Embed(nn.Module):
    """Token embedding plus the embedding of the token's original position."""

    model: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: Array, pos_BT: Array) -> Array:
        m, init = self.model, nn.initializers.normal(0.02)
        table_VD = self.param("tokens", init, (m.vocab_size, m.hidden_size))
        table_PD = self.param("positions", init, (m.max_positions, m.hidden_size))
        tokens_BTD = layers.embed_lookup(table_VD, tokens_BT)
        positions_BTD = layers.embed_lookup(table_PD, pos_BT)
        return (tokens_BTD + positions_BTD).astype(m.dtype)


class Block(layers.PreNormBlock):
    """LayerNorm, multi-head attention, two-layer MLP."""

    def setup(self) -> None:
        m = self.model
        self.attn_norm = layers.layer_norm(m)
        self.qkv = nn.Dense(m.q_size + 2 * m.kv_size)
        self.out = nn.Dense(m.hidden_size)
        self.mlp_norm = layers.layer_norm(m)
        self.up = nn.Dense(m.mlp_size)
        self.down = nn.Dense(m.hidden_size)

    def project(
        self, x_BTD: Array, pos_BT: Array, multiply: layers.Multiply = layers.dense_product
    ) -> tuple[Array, Array, Array]:
        del pos_BT  # positions are in the embedding
        return layers.split_heads(multiply(self.qkv, x_BTD).astype(x_BTD.dtype), self.model)

    def neurons(self, x_BTD: Array, multiply: layers.Multiply) -> Array:
        found_BTF = layers.ACTIVATIONS[self.model.activation](multiply(self.up, x_BTD))
        return found_BTF.astype(x_BTD.dtype)
