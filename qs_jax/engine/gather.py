"""Some tokens of each row, gathered into slots and put back; arrays stay in storage on the way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qs_jax.models.cpu import from_storage, to_storage


def take(array_BT: Array, index_BC: Array) -> Array:
    """Entries of each row at distinct positions."""
    rows_B1 = jnp.arange(len(index_BC))[:, None]
    at = to_storage(array_BT).at[rows_B1, index_BC]
    return from_storage(at.get(mode="promise_in_bounds", unique_indices=True))


def put(array_BT: Array, index_BC: Array, value_BC: Array) -> Array:
    """The array with other entries at distinct positions of each row."""
    rows_B1 = jnp.arange(len(index_BC))[:, None]
    at = to_storage(array_BT).at[rows_B1, index_BC]
    value = to_storage(value_BC)
    return from_storage(at.set(value, mode="promise_in_bounds", unique_indices=True))


def true_first(mask_BT: Array) -> Array:
    """Positions where a mask is true, then the others, both rising."""
    return jnp.argsort(~mask_BT, axis=1, stable=True).astype(jnp.int32)


def layer_at(tree: Any, index: Any) -> Any:
    """One layer of stacked arrays."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)
