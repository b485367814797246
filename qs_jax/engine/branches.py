"""What a branch returns that has nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def zeros_of(function: Callable[..., Any], *args: Any) -> Any:
    """Zeros of the shapes and dtypes of what a function would return; it is traced, not run."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
