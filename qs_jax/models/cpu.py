"""Everything that exists for XLA on CPU only; on other backends functions return their input.

XLA's CPU backend multiplies bfloat16 but neither slices, gathers nor updates it: it converts the
whole array to float32 and back around each such step. And it copies a layer's weights out of the
stacked arrays before it multiplies a single vector with them.

* Storage: stacked weights, embedding tables and KV caches are held as uint16, the bits of their
  bfloat16 values, and read as bfloat16 where they are multiplied.
* A single vector is multiplied in place, with stacked weights (`KernelInPlace`) and the head.
* Attention of new tokens reads keys and values once, against block-diagonal queries.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped, UInt16

from qs_jax.models.quantized import QKernel
from qs_jax.state import exact_dtype

# Where Linux lists the processor's instructions.
CPU_INFO = Path("/proc/cpuinfo")
# Terms of a written-out sum: fewer are no faster, more take longer to compile.
MOST_TERMS = 24
# Fewest rows of a block of a kernel, and fewest lanes of a block of a table.
LEAST_ROWS, LEAST_LANES = 64, 32
# Block-diagonal queries cost K times the arithmetic; more query heads than this no longer hide it.
MOST_HEADS = 16


def on_cpu() -> bool:
    """Whether programs run on CPU by default."""
    return jax.default_backend() == "cpu"


@functools.cache
def processor_multiplies() -> bool:
    """Whether this processor has instructions for bfloat16 products, by Linux's list.

    Without them, XLA multiplies float32 and converts around it.
    """
    return CPU_INFO.exists() and "avx512_bf16" in CPU_INFO.read_text(encoding="utf-8").split()


# --- bfloat16 storage ---------------------------------------------------------------------------


def storage_dtype(dtype: Any) -> Any:
    """The dtype that arrays of a model's dtype are stored in."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 and on_cpu() else dtype


def to_storage(x: Array) -> Array:
    """An array as it is stored."""
    return x.view(storage_dtype(x.dtype))


def from_storage(tree: Any) -> Any:
    """The values of stored arrays."""

    def read(leaf: Any) -> Any:
        return leaf.view(jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf

    return jax.tree.map(read, tree)


def stored_params(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as programs take them: layers and embeddings in storage, memory shared.

    A head's table is there in floats, for products, and as "stored", for single rows of it.
    """
    stored = {name: jax.tree.map(_aliased, params[name]) for name in ("embed", "layers")}
    table_VD = params.get("head", params["embed"])["tokens"]
    stored_VD = _aliased(table_VD)
    if stored_VD is not table_VD:
        stored["head"] = {"tokens": table_VD, "stored": stored_VD}
    return {**params, **stored}


def _aliased(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or storage_dtype(leaf.dtype) == leaf.dtype:
        return leaf
    if not leaf.is_fully_addressable or {each.platform for each in leaf.devices()} != {"cpu"}:
        return leaf
    if not leaf.committed:
        return jax.device_put(np.asarray(leaf).view(np.uint16))
    parts = [
        jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device)
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def own_layer(layers: Any, index: int) -> Any:
    """One layer's parameters as arrays of their own that share the stacked memory.

    A program copies a layer out of stacked arrays before it multiplies. None on other backends, in
    a trace, and where the parameters are on several devices.
    """

    def view(leaf: Any) -> Any:
        own = np.asarray(leaf)[index]
        own = own.view(jnp.bfloat16) if own.dtype == np.uint16 else own
        return jax.device_put(own, *leaf.devices() if leaf.committed else ())

    leaves = jax.tree.leaves(layers)
    traced = any(isinstance(leaf, Tracer) for leaf in leaves)
    if traced or not on_cpu() or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return None
    return jax.tree.map(view, layers) if all(len(x.devices()) == 1 for x in leaves) else None


def unfused(x: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """An array as a step of its own, which later steps read.

    XLA on CPU computes cosines anew for each head and each layer that multiplies with them, and
    takes barriers away before it fuses; a product, here with the identity, it leaves alone.
    """
    if not on_cpu():
        return x
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=lax.Precision.HIGHEST)


# --- products of a single vector ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelInPlace:
    """One layer's kernel `[C, O]` inside the stacked array; not a pytree, but a leaf of one."""

    stacked_LCO: Shaped[Array, "L C O"]
    layer: Any
    computes_in: Any = None  # dtype of codes' products

    @property
    def dtype(self) -> Any:
        """Dtype of its values."""
        dtype = self.stacked_LCO.dtype
        return self.computes_in or (jnp.dtype(jnp.bfloat16) if dtype == jnp.uint16 else dtype)

    @property
    def values(self) -> Array:
        """A copy of the kernel alone."""
        return from_storage(self.stacked_LCO[self.layer]).astype(self.dtype)

    def times(self, x_C: Float[Array, "C"], start: int = 0) -> Float[Array, "O"]:
        """`x @ kernel` from output column `start` on, in at least float32."""
        x_C = x_C.astype(self.dtype)
        stacked_LCO, (_, inputs, outputs) = self.stacked_LCO, self.stacked_LCO.shape
        rows = block_size(inputs, LEAST_ROWS)
        if rows is None:
            return _product("c,co->o", x_C, self.values[:, start:])
        x_C, stacked_LCO = lax.optimization_barrier((x_C, stacked_LCO))
        x_TR1 = x_C.reshape(-1, rows, 1)

        def block(at: int) -> Array:
            corner, size = (self.layer, at * rows, start), (1, rows, outputs - start)
            return _exact(lax.dynamic_slice(stacked_LCO, corner, size)[0], x_C.dtype)

        return jnp.ones(rows, exact_dtype(x_C.dtype)) @ _sum_of_products(x_TR1, block)


def as_they_lie(x: Array, table: Array) -> tuple[Array, Array]:
    """The same, in a loop too: XLA on CPU would transpose the table before it, once a loop."""
    return lax.optimization_barrier((x, table)) if on_cpu() else (x, table)


@dataclasses.dataclass(frozen=True)
class QKernelInPlace:
    """As `KernelInPlace`, of 8-bit codes with a scale for each output channel."""

    stacked: QKernel
    layer: Any

    @property
    def dtype(self) -> Any:
        """Dtype of its codes."""
        return self.stacked.codes.dtype

    @property
    def values(self) -> QKernel:
        """The kernel alone, for products of several vectors."""
        return jax.tree.map(lambda leaf: leaf[self.layer], self.stacked)

    def times(self, x_C: Float[Array, "C"], start: int = 0) -> Float[Array, "O"]:
        """`x @ kernel` from output column `start` on, in at least float32."""
        codes = KernelInPlace(self.stacked.codes, self.layer, x_C.dtype)
        return codes.times(x_C, start) * self.stacked.scale[self.layer, 0, start:]


def table_product(x_C: Float[Array, "C"], table_OC: UInt16[Array, "O C"]) -> Float[Array, "O"]:
    """A vector times every row of a stored table, in float32."""
    lanes = block_size(len(x_C), LEAST_LANES)
    if lanes is None:
        return _product("oc,c->o", from_storage(table_OC), x_C)
    x_C, table_OC = lax.optimization_barrier((x_C, table_OC))
    ones = jnp.ones(lanes, exact_dtype(x_C.dtype))

    def block(at: int) -> Array:
        return _exact(table_OC[:, at * lanes : (at + 1) * lanes], x_C.dtype)

    return _sum_of_products(x_C.reshape(-1, 1, lanes), block) @ ones


def block_size(inputs: int, least: int) -> int | None:
    """Length of the blocks to cut `inputs` into, `least` or more; None if no length divides."""
    least = max(least, -(-inputs // MOST_TERMS))
    # At least four blocks: the sum that is written and read again has the size of one.
    return next((size for size in range(least, inputs // 4 + 1) if inputs % size == 0), None)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=exact_dtype(a.dtype))


def _exact(weights: Array, dtype: Any) -> Array:
    if weights.dtype == jnp.uint16:  # a bfloat16 is the upper half of a float32
        return (weights.astype(jnp.uint32) << 16).view(jnp.float32)
    return weights.astype(exact_dtype(dtype))


def _sum_of_products(x_T: Shaped[Array, "T ..."], block: Callable[[int], Array]) -> Array:
    """The sum of block(t) * x[t] over t."""
    x_T = x_T.astype(exact_dtype(x_T.dtype))
    terms = [block(at) * x_T[at] for at in range(len(x_T))]
    # Without the barrier XLA would fuse the terms into scalar code for the next product.
    return lax.optimization_barrier(functools.reduce(jnp.add, terms))


@flax.struct.dataclass
class InPlace:
    """Stacked layers that a single vector is multiplied with in place."""

    stacked: Any


def decode_layers(params: dict[str, Any], rows: int) -> Any:
    """The stacked layers as decoding takes them: `InPlace` for a single row on one device."""
    layers = params["layers"]
    leaves = [leaf for leaf in jax.tree.leaves(layers) if isinstance(leaf, jax.Array)]
    cut = any(len(leaf.devices()) > 1 for leaf in leaves)
    return InPlace(layers) if rows == 1 and on_cpu() and not cut else layers


def layer_weights(layers: Any, index: Any) -> Any:
    """One layer's parameters, out of stacked or `InPlace` ones."""
    if not isinstance(layers, InPlace):
        return from_storage(jax.tree.map(lambda leaf: leaf[index], layers))

    def read(name: str, leaf: Any) -> Any:
        if name != "kernel":
            return from_storage(leaf[index])
        if not isinstance(leaf, QKernel):
            return KernelInPlace(leaf, index)
        if leaf.by_channel:
            return QKernelInPlace(leaf, index)
        return jax.tree.map(lambda x: x[index], leaf)

    parts = layers.stacked.items()
    return {part: {name: read(name, x) for name, x in leaves.items()} for part, leaves in parts}


def least_kept(rows: int) -> float:
    """Drafted tokens a row that must be kept for a step that verifies drafts to pay.

    On other backends it costs hardly more than a plain step.
    """
    if not on_cpu():
        return 0.1
    return 1.3 if rows == 1 else 3.0


def block_diagonal(heads: int) -> bool:
    """Whether the heads of a single query are cheaper as one block-diagonal product."""
    return heads <= MOST_HEADS and on_cpu()
