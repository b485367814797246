"""Projections held in fewer bits: weight-only, activations stay as they are.

    w = scale * code                     int8: one scale an output channel, symmetric
    w = scale * code + offset            the blocks of a GGUF file: groups of 32 input channels

A product with 8-bit codes of whole channels multiplies the codes, which every float dtype holds
exactly, and scales the sum. Others dequantise a layer before they multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Float, Int8, UInt8

from qs_jax.state import exact_dtype


@no_type_check  # JAX rebuilds it with placeholders, see qs_jax/state.py
class QKernel(flax.struct.PyTreeNode):
    """A kernel `[C, O]`, or stacked ones, as codes.

    Attributes:
      codes: Of 8 bits `[..., C, O]`, or of 4 bits `[..., C / 2, O]`: two of a group in a byte, the
        first half of the group in the low bits.
      scale: Step of each group of input channels, `[..., G, O]`.
      offset: What code 0 stands for; None where that is 0.
      bits: Of a code.
    """

    codes: Int8[Array, "... C O"] | UInt8[Array, "... C O"]
    scale: Float[Array, "... G O"]
    offset: Any = None
    bits: int = field(pytree_node=False, default=8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that the codes stand for."""
        *batch, rows, columns = self.codes.shape
        return (*batch, rows * 8 // self.bits, columns)

    def values(self, dtype: Any) -> Array:
        """The kernel, rounded to a dtype."""
        *batch, channels, columns = self.shape
        groups = self.scale.shape[-2]
        codes = self.codes.reshape(*batch, groups, -1, columns)
        if self.bits == 4:
            codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
        exact = exact_dtype(dtype)
        found = codes.astype(exact) * self.scale.astype(exact)[..., None, :]
        if self.offset is not None:
            found = found + self.offset.astype(exact)[..., None, :]
        return found.reshape(*batch, channels, columns).astype(dtype)

    @property
    def by_channel(self) -> bool:
        """Codes of 8 bits with one scale for each output channel."""
        return self.bits == 8 and self.scale.shape[-2] == 1 and self.offset is None

    def times(
        self, x: Float[Array, "*batch C"], product: Callable[..., Array], start: int
    ) -> Float[Array, "*batch O"]:
        """`x @ kernel` from output column `start` on; `product` multiplies two float arrays."""
        kept = jax.tree.map(lambda leaf: leaf[..., start:], self)
        if self.by_channel:
            scale = kept.scale.reshape((1,) * (x.ndim - 1) + (-1,))
            return product(x, kept.codes.astype(x.dtype)) * scale
        if self.bits == 8:
            return product(x, kept.values(x.dtype))
        # The halves of each group apart: joined, XLA would dequantise them one by one.
        exact, (groups, columns) = exact_dtype(x.dtype), kept.scale.shape
        codes = kept.codes.reshape(groups, -1, columns)
        x_halves = x.reshape(*x.shape[:-1], groups, 2, -1)

        def half(at: int) -> Array:
            values = (codes >> 4 if at else codes & 15).astype(exact)
            values = values * kept.scale.astype(exact)[:, None]
            if kept.offset is not None:
                values = values + kept.offset.astype(exact)[:, None]
            own = x_halves[..., at, :].reshape(*x.shape[:-1], -1)
            return product(own, values.astype(x.dtype).reshape(-1, columns))

        return half(0) + half(1)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a parameter tree is a `QKernel`."""
    return isinstance(leaf, QKernel)


def with_floats(tree: Any, dtype: Any) -> Any:
    """A parameter tree with the values of its codes."""

    def read(leaf: Any) -> Any:
        return leaf.values(dtype) if is_quantized(leaf) else leaf

    return jax.tree.map(read, tree, is_leaf=is_quantized)


@jax.jit
def to_int8(kernel_LCO: Float[Array, "*batch C O"]) -> QKernel:
    """A kernel in 8 bits: one symmetric scale an output channel, rounded to the nearest."""
    exact = kernel_LCO.astype(exact_dtype(kernel_LCO.dtype))
    scale = jnp.abs(exact).max(-2, keepdims=True) / 127
    codes = jnp.round(exact / jnp.maximum(scale, jnp.finfo(exact.dtype).tiny))
    return QKernel(jnp.clip(codes, -127, 127).astype(jnp.int8), scale)


def in_int8(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the projections of all layers in 8 bits; everything else is shared."""
    layers = {
        name: part | {"kernel": to_int8(part["kernel"])} if "kernel" in part else part
        for name, part in params["layers"].items()
    }
    return {**params, "layers": layers}
