"""KV caches of the decode engine: one per segment of layers, with a static number of slots.

A token's keys and values are appended where some later query may need them and nowhere else, so a
segment that most tokens leave early holds few slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Position of an empty slot: after every query.
EMPTY = 2**30


@no_type_check
class SlotCache(flax.struct.PyTreeNode):
    """Keys and values of a segment of l layers.

    Attributes:
      k_lBCKH: Keys, after RoPE.
      v_lBCKH: Values.
      pos_lBC: Position of the token in each slot, EMPTY where there is none; None where every
        token is kept and slots are positions.
      fill_lB: Entries kept; the slot after them is the current token's own. None likewise.
    """

    k_lBCKH: Float[Array, "l B C K H"]
    v_lBCKH: Float[Array, "l B C K H"]
    pos_lBC: Int[Array, "l B C"] | None
    fill_lB: Int[Array, "l B"] | None

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_lBCKH.shape[2]


class LayerCache(NamedTuple):
    """One layer of a segment's cache, as the layer's attention sees it.

    Attributes:
      cache: Of the segment.
      index: The layer's place in the segment.
    """

    cache: SlotCache
    index: Any

    @property
    def by_position(self) -> bool:
        """Slots are positions."""
        return self.cache.pos_lBC is None

    @property
    def pos_BC(self) -> Int[Array, "B C"]:
        """Position of the token in each slot."""
        assert self.cache.pos_lBC is not None
        return _layer(self.cache.pos_lBC, self.index)

    def write(self, pos_B: Array, k_B1KH: Array, v_B1KH: Array) -> LayerCache:
        """Put one token a row where its own query finds it; `keep` makes it stay."""
        cache, index = self
        slot_B, pos_lBC = pos_B, cache.pos_lBC
        if pos_lBC is not None:
            assert cache.fill_lB is not None
            slot_B = _layer(cache.fill_lB, index)
            pos_lBC = put(pos_lBC, index, slot_B, pos_B)
        with jax.named_scope("kv_write"):
            written = cache.replace(
                k_lBCKH=put(cache.k_lBCKH, index, slot_B, k_B1KH[:, 0]),
                v_lBCKH=put(cache.v_lBCKH, index, slot_B, v_B1KH[:, 0]),
                pos_lBC=pos_lBC,
            )
        return LayerCache(written, index)

    def write_position(self, pos_B: Array) -> LayerCache:
        """The token's position alone, in the slot that `write` will take."""
        cache, index = self
        assert cache.pos_lBC is not None
        assert cache.fill_lB is not None
        pos_lBC = put(cache.pos_lBC, index, _layer(cache.fill_lB, index), pos_B)
        return LayerCache(cache.replace(pos_lBC=pos_lBC), index)

    def keep(self, keep_B: Bool[Array, "B"]) -> LayerCache:
        """Rows whose token stays for later queries; elsewhere the next one takes its slot."""
        cache, index = self
        if cache.fill_lB is None:
            return self
        return LayerCache(cache.replace(fill_lB=cache.fill_lB.at[index].add(keep_B)), index)

    def mask(self, pos_B: Array) -> Bool[Array, "B C"]:
        """Every entry and the token itself."""
        slots_1C = jnp.arange(self.cache.capacity, dtype=jnp.int32)[None]
        last_B = pos_B if self.cache.fill_lB is None else _layer(self.cache.fill_lB, self.index)
        return slots_1C <= last_B[:, None]

    def of_layer(self) -> tuple[Array, Array]:
        """Keys and values, `[B, C, K, H]` each."""
        return _layer(self.cache.k_lBCKH, self.index), _layer(self.cache.v_lBCKH, self.index)

    def slots_of(self, pos_BX: Int[Array, "B X"]) -> Int[Array, "B X"]:
        """Slot of each position; any where the layer does not hold it."""
        if self.by_position:
            return jnp.maximum(pos_BX, 0)
        return (self.pos_BC[:, None, :] == pos_BX[:, :, None]).argmax(-1).astype(jnp.int32)


def _layer(array: Array, index: Any) -> Array:
    return lax.dynamic_index_in_dim(array, index, keepdims=False)


def put(array_lBX: Array, index: Any, slot_B: Array, value_B: Array) -> Array:
    """`array[index, b, slot_B[b]] = value_B[b]`, in place inside a loop.

    One row needs no scatter, which XLA runs as a loop of its own on CPU.
    """
    batch = slot_B.shape[0]
    if batch == 1:
        zero = jnp.zeros((), slot_B.dtype)
        at = (jnp.asarray(index, slot_B.dtype), zero, slot_B[0])
        rest = (zero,) * (array_lBX.ndim - 3)
        return lax.dynamic_update_slice(array_lBX, value_B[None, :, None], (*at, *rest))
    return array_lBX.at[index, jnp.arange(batch), slot_B].set(value_B)


def cache_bytes(caches: Any) -> int:
    """Bytes of all arrays of caches, slots' positions and fills included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
