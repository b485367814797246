"""Adaptive Matryoshka quantization: bits by entropy, nested codes (paper 2.5, E)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.mechanisms import int8
from qs_jax.mechanisms.signals import EntropyOf
from qs_jax.models.layers import Multiply, dense_product
from qs_jax.state import FULL_BITS, TokenState, exact_dtype


@no_type_check
class AMQ(flax.struct.PyTreeNode):
    """How many bits a token's activations keep; fields as in `AMQConfig`.

    Attributes:
      layer: Bits are assigned when this layer has run.
      largest_entropy: The largest that the estimator can have, in nats.
    """

    layer: Int[Array, ""]
    tau_low: Float[Array, ""]
    tau_high: Float[Array, ""]
    entropy: str | None = field(pytree_node=False)
    normalization: str = field(pytree_node=False)
    largest_entropy: float = field(pytree_node=False)
    targets: tuple[str, ...] = field(pytree_node=False)
    group: int = field(pytree_node=False)
    symmetric: bool = field(pytree_node=False)
    rotate: bool = field(pytree_node=False)
    execution: str = field(pytree_node=False)

    @property
    def narrow(self) -> bool:
        """Whether every token has bits in a layer of int8, exempt ones included."""
        return self.execution == "int8"

    @property
    def multiplies_int8(self) -> bool:
        """Whether projections are int8 products."""
        return self.narrow and "linear" in self.targets

    def assign_at(
        self, layer: Int[Array, ""], state: TokenState, rows: Any, entropy_of: EntropyOf
    ) -> TokenState:
        """The carry with every token's bits, if this is the layer that assigns them (E.2).

        8 above tau_high, 2 below tau_low, 4 in between. Tokens that no mechanism acts on keep
        `FULL_BITS`, or 8 in int8.
        """
        here, subject_BT = layer == self.layer, rows.subject_BT
        entropy_BT = jnp.zeros_like(state.size_BT)
        if self.entropy is not None:
            entropy_BT = entropy_of(self.entropy, subject_BT & here)
        if self.normalization == "log_vocab" and self.entropy is not None:
            entropy_BT = entropy_BT / self.largest_entropy
        elif self.normalization == "minmax":  # over the batch, as E.1 says
            low = jnp.where(subject_BT, entropy_BT, jnp.inf).min()
            high = jnp.where(subject_BT, entropy_BT, -jnp.inf).max()
            entropy_BT = (entropy_BT - low) / jnp.maximum(high - low, 1e-12)
        bits_BT = jnp.where(entropy_BT > self.tau_high, 8, 4)
        bits_BT = jnp.where(entropy_BT < self.tau_low, 2, bits_BT)
        bits_BT = jnp.where(rows.full_BT, 8, bits_BT)
        bits_BT = jnp.where(subject_BT, bits_BT, 8 if self.narrow else FULL_BITS)
        return state.replace(bits_BT=jnp.where(here, bits_BT.astype(jnp.int32), state.bits_BT))

    def quantize(self, x: Array, bits: Array) -> Array:
        """Quantise and dequantise each vector at its own number of bits; 16 is untouched."""
        with jax.named_scope("amq"):
            if self.narrow:
                return int8.simulate(x, bits, self.group)
            return fake_quantize(x, bits, self)

    def multiply(
        self, bits_BT: Array, weights: Mapping[str, int8.QTensor] | None, layer: Array
    ) -> Multiply:
        """How a block multiplies tokens of these bits, with the layer's codes by projection."""
        if "linear" not in self.targets:
            return dense_product

        def simulated(dense: Any, x: Array, start: int = 0) -> Array:
            return dense_product(dense, self.quantize(x, bits_BT), start)

        def in_int8(dense: Any, x: Array, start: int = 0) -> Array:
            assert weights is not None
            with jax.named_scope("amq"):
                bias_O = dense.variables["params"].get("bias")
                whole = (weights[dense.name], bias_O)
                columns = jax.tree.map(lambda leaf: leaf[..., start:], whole)
                # Chosen in each product: around a block, XLA would copy the cache that it writes.
                return lax.cond(
                    layer > self.layer,
                    lambda: int8.product(x, bits_BT, self.group, *columns),
                    lambda: dense_product(dense, x, start),
                )

        return in_int8 if self.narrow else simulated

    def stored(self, x_BTKH: Array, bits_BT: Array) -> Array:
        """Keys or values as they come back from the cache."""
        if "kv" not in self.targets:
            return x_BTKH
        with jax.named_scope("amq"):
            if self.narrow:
                codes = int8.encode_kv(x_BTKH, bits_BT, self.group)
                decoded = int8.decode_kv(codes).astype(x_BTKH.dtype)
                return jnp.where((bits_BT < FULL_BITS)[..., None, None], decoded, x_BTKH)
            bits_BTK = jnp.broadcast_to(bits_BT[..., None], x_BTKH.shape[:-1])
            return fake_quantize(x_BTKH, bits_BTK, self)


def code(x: Float[Array, "*batch C"], amq: AMQ) -> tuple[Int[Array, "*batch M G"], Array, Array]:
    """8-bit codes `[..., C/G, G]`, floor(256 (x - low) / range), with each group's low and range.

    A floor nests: the top 4 or 2 bits are floor(16 ...) and floor(4 ...), the codes a direct
    quantisation to 4 or 2 bits would give.
    """
    groups = x.reshape(*x.shape[:-1], -1, amq.group)
    tiny = jnp.finfo(x.dtype).tiny
    if amq.symmetric:
        high = jnp.abs(groups).max(-1, keepdims=True)
        low = -high
        # From zero up: zero is an edge between two codes, it must not fall with a rounding.
        edge = jnp.floor(groups / jnp.maximum(high, tiny) * 128) + 128
    else:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        edge = jnp.floor((groups - low) / jnp.maximum(high - low, tiny) * 256)
    return jnp.clip(edge, 0, 255).astype(jnp.int32), low, high - low


def slice_code(codes: Int[Array, "*batch"], bits: Int[Array, "*#batch"]) -> Int[Array, "*batch"]:
    """The nested code of fewer bits: the top `bits` of the 8."""
    return codes >> (8 - bits)


def fake_quantize(x: Array, bits: Array, amq: AMQ) -> Array:
    """Quantise and dequantise each vector at its own number of bits; `FULL_BITS` is untouched."""
    exact = x.astype(exact_dtype(x.dtype))
    if amq.rotate:
        exact = int8.rotate_groups(exact, amq.group)
    codes, low, span = code(exact, amq)
    kept = jnp.minimum(bits, 8)[..., None, None]
    middles = (slice_code(codes, kept).astype(span.dtype) + 0.5) / (1 << kept).astype(span.dtype)
    out = (low + middles * span).reshape(x.shape)
    if amq.rotate:
        out = int8.rotate_groups(out, amq.group)
    return jnp.where((bits < FULL_BITS)[..., None], out.astype(x.dtype), x)
