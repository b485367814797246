"""Parameters as a plain nested dict of arrays, with the layers stacked on a leading axis."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from qs_jax.config import ModelConfig
from qs_jax.models.cpu import from_storage
from qs_jax.models.registry import family_of

Params: TypeAlias = dict[str, Any]


def init_params(model: ModelConfig, key: jax.Array) -> Params:
    """Random parameters of a model in `model.dtype`, for tests and for shapes."""
    family, zeros_BT = family_of(model), jnp.zeros((1, 1), jnp.int32)
    h_BTD = jnp.zeros((1, 1, model.hidden_size))
    k_embed, k_layers, k_norm, k_head = jax.random.split(key, 4)

    def layer(key: jax.Array) -> Any:
        init = family.block(model).init
        return init(key, h_BTD, zeros_BT, lambda q, k, v: (q, None))["params"]

    params = {
        "embed": family.embed(model).init(k_embed, zeros_BT, zeros_BT)["params"],
        "layers": jax.vmap(layer)(jax.random.split(k_layers, model.num_layers)),
        "final_norm": family.final_norm(model).init(k_norm, h_BTD)["params"],
    }
    if not model.tie_embeddings:
        shape = (model.vocab_size, model.hidden_size)
        params["head"] = {"tokens": 0.02 * jax.random.normal(k_head, shape)}
    return jax.tree.map(lambda leaf: leaf.astype(model.dtype), params)


def abstract_params(model: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def embed(params: Params, tokens_BT: jax.Array, pos_BT: jax.Array, model: ModelConfig) -> Any:
    """Input embeddings of tokens."""
    with jax.named_scope("embed"):
        module = family_of(model).embed(model)
        return module.apply({"params": params["embed"]}, tokens_BT, pos_BT)


def apply_block(model: ModelConfig, weights: Params, *args: Any, method: Any = None) -> Any:
    """A layer's block, or a method of it, with the layer's weights, which may be in storage."""
    block = family_of(model).block(model, parent=None)  # it may run inside another's attention
    return block.apply({"params": from_storage(weights)}, *args, method=method)


def count_params(model: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model)))


def param_bytes(model: ModelConfig) -> int:
    """Bytes of the parameters in the model's dtype."""
    return count_params(model) * jnp.dtype(model.dtype).itemsize
