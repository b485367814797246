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

    They are stored as the product with the queries takes them, heads side by side and axes of one
    element left out: through a reshape, XLA would repeat the update of a cache for each of its
    readers, on a copy.

    Attributes:
      k_CO: Keys, after RoPE, `[C, O]` with O = K * H; `[l, C, O]`, `[B, C, O]` or `[l, B, C, O]`
        where there are several layers or rows.
      v_CO: Values.
      pos_lBC: Position of the token in each slot, EMPTY where there is none; None where every
        token is kept and slots are positions.
      fill_lB: Entries kept; the slot after them is the current token's own. None likewise.
    """

    k_CO: Float[Array, "*lB C O"]
    v_CO: Float[Array, "*lB C O"]
    pos_lBC: Int[Array, "l B C"] | None
    fill_lB: Int[Array, "l B"] | None
    layers: int = flax.struct.field(pytree_node=False)
    head_dim: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, k_lBCKH: Array, v_lBCKH: Array, pos_lBC: Array | None, fill_lB: Array | None):
        """A cache of these keys and values, `[l, B, C, K, H]`."""
        layers, batch, capacity, heads, dim = k_lBCKH.shape
        many = [size for size in (layers, batch) if size > 1]
        shape = (*many, capacity, heads * dim)
        return cls(k_lBCKH.reshape(shape), v_lBCKH.reshape(shape), pos_lBC, fill_lB, layers, dim)

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_CO.shape[-2]


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
            stored = cache.replace(
                k_CO=self._put(cache.k_CO, slot_B, k_B1KH),
                v_CO=self._put(cache.v_CO, slot_B, v_B1KH),
                pos_lBC=pos_lBC,
            )
        return LayerCache(stored, index)

    def _put(self, array_CO: Array, slot_B: Array, value_B1KH: Array) -> Array:
        batch = slot_B.shape[0]
        value_BO = value_B1KH.reshape(batch, -1)
        at = (self.index,) if self.cache.layers > 1 else ()
        if batch > 1:
            return array_CO.at[(*at, jnp.arange(batch), slot_B)].set(value_BO)
        # One row needs no scatter, which XLA runs as a loop of its own on CPU.
        value_CO = value_BO.reshape((1,) * (array_CO.ndim - 1) + (-1,))
        where = [jnp.asarray(i, slot_B.dtype) for i in (*at, slot_B[0], 0)]
        return lax.dynamic_update_slice(array_CO, value_CO, where)

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
        cache, index = self

        def of(array_CO: Array) -> Array:
            array_CO = _layer(array_CO, index) if cache.layers > 1 else array_CO
            capacity, width = array_CO.shape[-2:]
            return array_CO.reshape(-1, capacity, width // cache.head_dim, cache.head_dim)

        return of(cache.k_CO), of(cache.v_CO)

    def slots_of(self, pos_BX: Int[Array, "B X"]) -> Int[Array, "B X"]:
        """Slot of each position; any where the layer does not hold it."""
        if self.by_position:
            return jnp.maximum(pos_BX, 0)
        return (self.pos_BC[:, None, :] == pos_BX[:, :, None]).argmax(-1).astype(jnp.int32)


def _layer(array: Array, index: Any) -> Array:
    return lax.dynamic_index_in_dim(array, index, keepdims=False)


def put(array_lBC: Array, index: Any, slot_B: Array, value_B: Array) -> Array:
    """`array[index, b, slot_B[b]] = value_B[b]`."""
    return array_lBC.at[index, jnp.arange(slot_B.shape[0]), slot_B].set(value_B)


def cache_bytes(caches: Any) -> int:
    """Bytes of all arrays of caches, slots' positions and fills included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
