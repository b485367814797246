"""bfloat16 arrays as XLA's CPU backend handles them well: by their bits, or in float32.

That backend multiplies bfloat16 but neither slices, gathers nor updates it: it converts the whole
array to float32, does that there, and converts the result back. Stacked weights, embedding tables
and KV caches are therefore held as uint16, whose bits they are, and read as bfloat16 where they
are multiplied. States, which norms read, are held in float32. On other backends, and in other
dtypes, everything here hands its input through.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

if TYPE_CHECKING:  # the blocks of the models use this module
    from qs_jax.models.params import Params


# Where Linux tells what the processor can do.
CPU_INFO = Path("/proc/cpuinfo")


def exact_dtype(dtype: Any) -> Any:
    """What norms, softmax and logits are computed in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def held_dtype(dtype: Any) -> Any:
    """The dtype that arrays of a model's dtype are held in on the default backend."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 and _on_cpu() else dtype


def state_dtype(dtype: Any) -> Any:
    """The dtype that states between layers are held in on the default backend.

    XLA's CPU backend converts bfloat16 states to float32 whole, in a pass of its own, for each norm
    and each distance that reads them. There they are held in float32; their values stay bfloat16's.
    """
    return exact_dtype(dtype) if held_dtype(dtype) != jnp.dtype(dtype) else jnp.dtype(dtype)


def as_state(x: Array, dtype: Any) -> Array:
    """States of a model of this dtype: rounded to its values, in `state_dtype`."""
    if state_dtype(dtype) == jnp.dtype(dtype):
        return x.astype(dtype)
    kept = jnp.finfo(dtype)  # XLA may take out a conversion to bfloat16 and back
    return lax.reduce_precision(x.astype(exact_dtype(dtype)), kept.nexp, kept.nmant)


def to_bits(x: Array) -> Array:
    """What to write of an array into one that is held as bits."""
    return x.view(held_dtype(x.dtype))


def from_bits(tree: Any) -> Any:
    """The values of an array that is held as bits, or of a tree of arrays."""

    def read(leaf: Any) -> Any:
        return leaf.view(jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf

    return jax.tree.map(read, tree)


def bits_of(params: Params) -> Params:
    """Parameters as programs take them: layers and embeddings held as bits.

    Nothing is copied: the arrays share the memory of those given. The head, which may be the
    embedding table, is there in floats, for the product, and as "bits", for single rows of it.

    Args:
      params: Arrays, not traced, on one device or on several.
    """
    held = {name: jax.tree.map(_aliased, params[name]) for name in ("embed", "layers")}
    table_VD = params.get("head", params["embed"])["tokens"]
    bits_VD = _aliased(table_VD)
    if bits_VD is not table_VD:
        held["head"] = {"tokens": table_VD, "bits": bits_VD}
    return {**params, **held}


def _aliased(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or held_dtype(leaf.dtype) == leaf.dtype:
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


@functools.cache
def processor_multiplies() -> bool:
    """Whether this processor has instructions for bfloat16 products, as far as Linux says so.

    Where it has none, XLA multiplies float32 and converts around it.
    """
    return CPU_INFO.exists() and "avx512_bf16" in CPU_INFO.read_text(encoding="utf-8").split()


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
