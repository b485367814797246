"""Products of a single vector on CPU: weights are read once, where they lie.

XLA's CPU backend multiplies a vector with a slice of a stacked array only after it has copied the
slice, and multiplies bfloat16 vectors in scalar code. Written out as a sum of a few blocks of
weights, a product is one vectorised loop over the array itself, whatever holds it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt16

from qs_jax.halves import exact_dtype, from_bits

# Terms of a sum that is written out: fewer are no faster, more take longer to compile.
MOST_TERMS = 24
# Least rows of a block of a kernel, and least lanes of a block of a table: what is summed last.
LEAST_ROWS = 64
LEAST_LANES = 32


@dataclasses.dataclass(frozen=True)
class KernelAt:
    """One layer's kernel `[C, O]` inside the stacked array; no pytree, but a leaf of one.

    Attributes:
      stacked_LCO: Of all layers; may be held as bits.
      layer: Which, from 0.
    """

    stacked_LCO: Shaped[Array, "L C O"]
    layer: Any

    @property
    def dtype(self) -> Any:
        """Of its values."""
        dtype = self.stacked_LCO.dtype
        return jnp.dtype(jnp.bfloat16) if dtype == jnp.uint16 else dtype

    def times(self, x_C: Float[Array, "C"], start: int = 0) -> Float[Array, "O"]:
        """`x @ kernel` from output column `start` on, in at least float32."""
        x_C = x_C.astype(self.dtype)
        stacked_LCO, (_, inputs, outputs) = self.stacked_LCO, self.stacked_LCO.shape
        rows = block_size(inputs, LEAST_ROWS)
        if rows is None:
            return _product("c,co->o", x_C, from_bits(stacked_LCO[self.layer])[:, start:])
        x_C, stacked_LCO = _tied(x_C, stacked_LCO)
        x_TR1 = x_C.reshape(-1, rows, 1)

        def block(at: int) -> Array:
            corner, size = (self.layer, at * rows, start), (1, rows, outputs - start)
            return _exact(lax.dynamic_slice(stacked_LCO, corner, size)[0])

        return _ones(rows, x_C) @ _sum_of_products(x_TR1, block)


def times_table(x_C: Float[Array, "C"], table_OC: UInt16[Array, "O C"]) -> Float[Array, "O"]:
    """A vector times every row of a table that is held as bits, in float32."""
    lanes = block_size(len(x_C), LEAST_LANES)
    if lanes is None:
        return _product("oc,c->o", from_bits(table_OC), x_C)
    x_C, table_OC = _tied(x_C, table_OC)

    def block(at: int) -> Array:
        return _exact(table_OC[:, at * lanes : (at + 1) * lanes])

    return _sum_of_products(x_C.reshape(-1, 1, lanes), block) @ _ones(lanes, x_C)


def block_size(inputs: int, least: int) -> int | None:
    """Length of the blocks that many inputs are cut into; None if there is no good one."""
    least = max(least, -(-inputs // MOST_TERMS))
    # At least four, as each block but the last is one less of what is written and read again.
    return next((size for size in range(least, inputs // 4 + 1) if inputs % size == 0), None)


def _tied(x_C: Array, weights: Array) -> tuple[Array, Array]:
    """Weights that a loop reads at every step are not converted before it."""
    return lax.optimization_barrier((x_C, weights))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=exact_dtype(a.dtype))


def _exact(weights: Array) -> Array:
    if weights.dtype == jnp.uint16:  # a bfloat16 is the upper half of a float32
        return (weights.astype(jnp.uint32) << 16).view(jnp.float32)
    return weights.astype(exact_dtype(weights.dtype))


def _ones(count: int, x_C: Array) -> Array:
    return jnp.ones(count, exact_dtype(x_C.dtype))


def _sum_of_products(x_T: Shaped[Array, "T ..."], block: Callable[[int], Array]) -> Array:
    """The sum of block(t) * x[t] over t."""
    x_T = x_T.astype(exact_dtype(x_T.dtype))
    terms = [block(at) * x_T[at] for at in range(len(x_T))]
    # Without the barrier XLA would fuse the terms into scalar code for the next product.
    return lax.optimization_barrier(functools.reduce(jnp.add, terms))
