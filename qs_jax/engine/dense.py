"""The plain model over whole rows: embed, one `lax.scan` over the stacked layers, final norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine.attention import blocked_attention
from qs_jax.models import Params, apply_block, embed, head

# attend(q, k, v) -> (context, extra): causal attention of a layer, and what `look` gets of it.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def attend_causal(model: ModelConfig) -> Attend:
    """Attention of whole rows over themselves; right padding needs no mask."""
    return lambda q, k, v: (blocked_attention(q, k, v, window=model.sliding_window), None)


def look_at_layers(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    model: ModelConfig,
    look: Callable[[Array, Array, Any], Any] = lambda before, after, kept: None,
    attend: Attend | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """States of the last layer of the dense model, and what `look` returned of every layer.

    `look` gets the states before and after a layer, `[B, T, D]`, and what `attend` kept there.
    """
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    attend = attend or attend_causal(model)

    def layer(h_BTD, params_l):
        after_BTD, kept = apply_block(model, params_l, h_BTD, pos_BT, attend)
        return after_BTD, look(h_BTD, after_BTD, kept)

    return lax.scan(layer, embed(params, tokens_BT, pos_BT, model), params["layers"])


def forward(params: Params, tokens_BT: Array, model: ModelConfig) -> Array:
    """Normed states of right-padded rows; `head.logits` of position i uses tokens 0..i only."""
    return head.normed(params, look_at_layers(params, tokens_BT, model)[0], model)
