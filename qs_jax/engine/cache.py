"""KV caches of the decode engine: one per segment of layers, with a static number of slots.

A token's keys and values are appended where some later query may need them and nowhere else, so a
segment that most tokens leave early holds few slots.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, UInt16

from qs_jax.halves import from_bits, to_bits
from qs_jax.mechanisms import int8

# Position of an empty slot: after every query. All that remains of it in 16 bits is 65,535.
EMPTY = 2**30 - 1


def position_dtype(max_positions: int) -> jnp.dtype:
    """The dtype of positions in slots, the smallest that tells `EMPTY` from every position."""
    return jnp.dtype(jnp.uint16 if max_positions < 2**16 else jnp.int32)


@no_type_check
class SlotCache(flax.struct.PyTreeNode):
    """Keys and values of a segment of l layers.

    They are stored as the product with the queries takes them, heads side by side and axes of one
    element left out: through a reshape, XLA would repeat the update of a cache for each of its
    readers, on a copy.

    Attributes:
      k_CO: Keys, after RoPE, `[C, O]` with O = K * H; `[l, C, O]`, `[B, C, O]` or `[l, B, C, O]`
        where there are several layers or rows. bfloat16 on CPU by its bits (`halves`).
      v_CO: Values.
      k_scale_CK: Steps of the keys, one a head, where they are int8 codes (`int8.QTensor`); None
        where they are floats.
      v_scale_CK: Of the values.
      pos_lBC: Position of the token in each slot, EMPTY where there is none, in `position_dtype`;
        None where every token is kept and slots are positions.
      fill_lB: Entries kept; the next token goes to the slot after them. None likewise.
      layers: l.
      head_dim: H.
    """

    k_CO: Float[Array, "*lB C O"] | UInt16[Array, "*lB C O"] | Int8[Array, "*lB C O"]
    v_CO: Float[Array, "*lB C O"] | UInt16[Array, "*lB C O"] | Int8[Array, "*lB C O"]
    k_scale_CK: Float[Array, "*lB C K"] | None
    v_scale_CK: Float[Array, "*lB C K"] | None
    pos_lBC: Int[Array, "l B C"] | UInt16[Array, "l B C"] | None
    fill_lB: Int[Array, "l B"] | None
    layers: int = flax.struct.field(pytree_node=False)
    head_dim: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(
        cls,
        k_lBCKH: Array,
        v_lBCKH: Array,
        pos_lBC: Array | None,
        fill_lB: Array | None,
        bits_lBC: Array | None = None,
    ):
        """A cache of these keys and values, `[l, B, C, K, H]`.

        Args:
          k_lBCKH: Keys; values that int8 codes stand for, where there are bits.
          v_lBCKH: Values.
          pos_lBC: As the attribute.
          fill_lB: As the attribute.
          bits_lBC: Hold int8 codes: bits of each token.
        """
        layers, batch, _, _, dim = k_lBCKH.shape
        many = [size for size in (layers, batch) if size > 1]

        def flat(array: Array) -> Array:
            return array.reshape(*many, array.shape[2], -1)

        k_scale = v_scale = None
        if bits_lBC is not None:
            k, v = (int8.recode_kv(from_bits(x), bits_lBC) for x in (k_lBCKH, v_lBCKH))
            k_lBCKH, v_lBCKH = k.codes, v.codes
            k_scale, v_scale = flat(k.scale), flat(v.scale)
        keys_values = flat(k_lBCKH), flat(v_lBCKH)
        return cls(*keys_values, k_scale, v_scale, pos_lBC, fill_lB, layers, dim)

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_CO.shape[-2]

    def append(
        self,
        pos_B: Int[Array, "B"],
        k_lBKH: Float[Array, "l B K H"],
        v_lBKH: Float[Array, "l B K H"],
        keep_lB: Bool[Array, "l B"],
        bits_B: Int[Array, "B"] | None = None,
    ) -> SlotCache:
        """One token a row, written in place; where it is not kept the next one takes its slot.

        Args:
          pos_B: Positions.
          k_lBKH: Keys.
          v_lBKH: Values.
          keep_lB: The token is kept in the layer.
          bits_B: Of the tokens; needed where the cache holds int8 codes.
        """
        slot_lB, pos_lBC, fill_lB = self.slots(pos_B), self.pos_lBC, self.fill_lB
        if pos_lBC is not None:
            assert fill_lB is not None
            rows = jnp.arange(self.layers)[:, None], jnp.arange(pos_B.shape[0])[None, :]
            own_lB = jnp.where(keep_lB, pos_B[None], EMPTY).astype(pos_lBC.dtype)
            pos_lBC = pos_lBC.at[(*rows, slot_lB)].set(own_lB)
            fill_lB = fill_lB + keep_lB
        with jax.named_scope("kv_write"):
            moved = self.replace(pos_lBC=pos_lBC, fill_lB=fill_lB)
            put = functools.partial(_put, slot_lB=slot_lB, same=self.fill_lB is None)
            if self.k_scale_CK is not None:
                assert self.v_scale_CK is not None
                assert bits_B is not None
                k, v = (int8.recode_kv(x, bits_B[None]) for x in (k_lBKH, v_lBKH))
                k_lBKH, v_lBKH = k.codes, v.codes
                moved = moved.replace(
                    k_scale_CK=put(self.k_scale_CK, k.scale),
                    v_scale_CK=put(self.v_scale_CK, v.scale),
                )
            return moved.replace(k_CO=put(self.k_CO, k_lBKH), v_CO=put(self.v_CO, v_lBKH))

    def full(self, live_B: Bool[Array, "B"]) -> Bool[Array, ""]:
        """Some live row has no slot left in some layer; never where slots are positions."""
        if self.fill_lB is None:
            return jnp.zeros((), bool)
        return ((self.fill_lB >= self.capacity) & live_B[None]).any()

    def slots(self, pos_B: Int[Array, "B"]) -> Int[Array, "l B"]:
        """Where the token at each row's position goes."""
        if self.fill_lB is None:
            return jnp.broadcast_to(pos_B[None], (self.layers, *pos_B.shape))
        return self.fill_lB


def _put(array_CO: Array, value_lBKH: Array, slot_lB: Array, same: bool) -> Array:
    """Write one value a layer and row; `same` says that a row's slot is the same in all layers."""
    layers, batch = slot_lB.shape
    value_lBO = value_lBKH.reshape(layers, batch, -1)
    if array_CO.dtype == jnp.uint16:
        value_lBO = to_bits(value_lBO)
    if batch == 1 and (same or layers == 1):  # scatters are loops of their own on CPU
        value = value_lBO if layers > 1 else value_lBO[0]
        return lax.dynamic_update_slice_in_dim(array_CO, value, slot_lB[0, 0], axis=-2)
    if layers == 1:
        return array_CO.at[jnp.arange(batch), slot_lB[0]].set(value_lBO[0])
    if batch == 1:
        return array_CO.at[jnp.arange(layers), slot_lB[:, 0]].set(value_lBO[:, 0])
    return array_CO.at[jnp.arange(layers)[:, None], jnp.arange(batch)[None], slot_lB].set(value_lBO)


class LayerCache(NamedTuple):
    """One layer of a segment's cache, read only, and the current token's own keys and values.

    The own ones are kept apart until the segment is over: inside a branch, writing a cache copies
    it. Arrays over X = C + 1 keys have the current token's last.

    Attributes:
      cache: Of the segment.
      index: The layer's place in the segment.
      k_B1KH: The current token's keys; None before they are known.
      v_B1KH: And values.
    """

    cache: SlotCache
    index: Any
    k_B1KH: Array | None = None
    v_B1KH: Array | None = None

    @property
    def by_position(self) -> bool:
        """Slots are positions."""
        return self.cache.pos_lBC is None

    @property
    def pos_BC(self) -> Int[Array, "B C"]:
        """Position of the token in each slot."""
        assert self.cache.pos_lBC is not None
        return self.cache.pos_lBC[self.index].astype(jnp.int32)

    def mask(self, pos_B: Int[Array, "B"]) -> Bool[Array, "B X"]:
        """Every entry and the token itself."""
        slots_1C = jnp.arange(self.cache.capacity, dtype=jnp.int32)[None]
        held_BC = slots_1C < self.cache.slots(pos_B)[self.index][:, None]
        return jnp.pad(held_BC, ((0, 0), (0, 1)), constant_values=True)

    def of_layer(self) -> tuple[Float[Array, "B C O"], Float[Array, "B C O"]]:
        """Keys and values of the tokens before."""
        cache, index = self.cache, self.index

        def of(array_CO: Array) -> Array:
            array_CO = array_CO[index] if cache.layers > 1 else array_CO
            return array_CO.reshape(-1, *array_CO.shape[-2:])

        def decoded(codes_CO: Array, scale_CK: Array | None) -> Array:
            found_BCO = of(codes_CO)
            if scale_CK is None:
                return from_bits(found_BCO)
            scale_BCK = of(scale_CK)
            codes_BCKH = found_BCO.reshape(*scale_BCK.shape, cache.head_dim)
            return int8.decode_kv(int8.QTensor(codes_BCKH, scale_BCK)).reshape(found_BCO.shape)

        return decoded(cache.k_CO, cache.k_scale_CK), decoded(cache.v_CO, cache.v_scale_CK)

    def slots_of(self, pos_BW: Int[Array, "B W"]) -> Int[Array, "B W"]:
        """Slot of each earlier position; any where the layer does not hold it."""
        if self.by_position:
            return jnp.maximum(pos_BW, 0)
        return (self.pos_BC[:, None, :] == pos_BW[:, :, None]).argmax(-1).astype(jnp.int32)

    def by_slot(self, array_BS: Array, own_B1: Array) -> Array:
        """An array over positions in the order of the slots, `[B, X]`."""
        if not self.by_position:
            index_BC = jnp.minimum(self.pos_BC, array_BS.shape[1] - 1)
            array_BS = jnp.take_along_axis(array_BS, index_BC, axis=1)
        return jnp.concatenate([array_BS, own_B1], axis=1)


def cache_bytes(caches: Any) -> int:
    """Bytes of all arrays of caches, slots' positions and fills included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
