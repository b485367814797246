"""KV caches: a prompt's, over whole rows, and those of decoding, with room for new tokens.

Decoding keeps one `SlotCache` for each segment of layers. A token's keys and values are appended
where some later query may need them and nowhere else, so a segment that most tokens leave early
holds few slots. Slots fill in order, so the last tokens appended can be taken back.

A capacity is a static size, and every new one compiles a program: sizes are buckets, sixteen to an
octave. A cache that cannot hold what the next steps may append grows before they run, so nothing
is ever dropped.
"""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, UInt16

from qs_jax.config import ModelConfig
from qs_jax.mechanisms import int8
from qs_jax.models.cpu import from_storage, storage_dtype, to_storage

SMALLEST = 8


def bucket(n: int) -> int:
    """The smallest capacity that holds `n` slots: sixteen to an octave."""
    step = 1 << max((n - 1).bit_length() - 5, 0)
    return max(-(-n // step) * step, SMALLEST)


def cache_bytes(caches: Any) -> int:
    """Bytes of all arrays of caches."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


@no_type_check
class KVCache(flax.struct.PyTreeNode):
    """Keys, after RoPE, and values of a prompt, in storage; a slot is a position."""

    k_LBSKH: Float[Array, "L B S K H"] | UInt16[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"] | UInt16[Array, "L B S K H"]

    @classmethod
    def zeros(cls, model: ModelConfig, batch: int, capacity: int) -> KVCache:
        """An empty cache of `capacity` slots a row."""
        shape = (model.num_layers, batch, capacity, model.num_kv_heads, model.head_dim)
        dtype = storage_dtype(model.dtype)
        # Two constants that XLA cannot take for one: it would fill one buffer and copy it.
        zero = lax.optimization_barrier(jnp.zeros((), dtype))
        return cls(jnp.zeros(shape, dtype), jnp.broadcast_to(zero, shape))

    def write(self, index: Array, slots_BT: Array | None, k_BTKH: Array, v_BTKH: Array) -> KVCache:
        """Keys and values of a layer at distinct slots: None is 0 and on, past the end nowhere."""

        def put(old_LBSKH: Array, new_BTKH: Array) -> Array:
            new_BTKH = to_storage(new_BTKH)
            if slots_BT is None:
                zero = jnp.zeros_like(index)
                return lax.dynamic_update_slice(old_LBSKH, new_BTKH[None], (index, *[zero] * 4))
            rows_B1 = jnp.arange(len(slots_BT))[:, None]
            return old_LBSKH.at[index, rows_B1, slots_BT].set(new_BTKH, mode="drop")

        with jax.named_scope("kv_write"):
            return KVCache(put(self.k_LBSKH, k_BTKH), put(self.v_LBSKH, v_BTKH))

    def layer(self, index: Array) -> tuple[Array, Array]:
        """One layer's keys and values, `[B, S, K, H]` each."""
        read = lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False)  # noqa: E731
        return from_storage((read(self.k_LBSKH), read(self.v_LBSKH)))

    def cut(self, start: Array, count: int) -> KVCache:
        """`count` layers from `start` on."""
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, count), self)

    def paste(self, start: Array, other: KVCache) -> KVCache:
        """Put back what `cut` gave."""

        def put(old: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(old, new, start, axis=0)

        return jax.tree.map(put, self, other)


@no_type_check
class SlotCache(flax.struct.PyTreeNode):
    """Keys and values of a segment of l layers.

    They are stored as the product with the queries takes them, heads side by side and axes of one
    element left out: through a reshape, XLA would repeat the update of a cache for each of its
    readers, on a copy.

    Attributes:
      k_CO: Keys, after RoPE, `[C, O]` with O = K * H; `[l, C, O]`, `[B, C, O]` or `[l, B, C, O]`
        where there are several layers or rows. In storage, or int8 codes.
      v_CO: Values.
      k_scale_CK: Steps of the keys' codes, one a head (`int8.QTensor`); None where they are floats.
      v_scale_CK: Of the values.
      fill_lB: Slots in use; the next token goes to the slot after them.
      pos_lBC: Position of each slot's token; None where it is the slot's own, or nothing reads it.
      layers: l.
      head_dim: H.
      keeps_all: Every layer keeps every token: fills of a row are equal.
    """

    k_CO: Float[Array, "*lB C O"] | UInt16[Array, "*lB C O"] | Int8[Array, "*lB C O"]
    v_CO: Float[Array, "*lB C O"] | UInt16[Array, "*lB C O"] | Int8[Array, "*lB C O"]
    k_scale_CK: Any
    v_scale_CK: Any
    fill_lB: Int[Array, "l B"]
    pos_lBC: Any
    layers: int = field(pytree_node=False)
    head_dim: int = field(pytree_node=False)
    keeps_all: bool = field(pytree_node=False)

    @classmethod
    def pack(
        cls,
        prompt: KVCache,
        span: slice,
        held_lBS: Bool[Array, "l B S"],
        capacity: int,
        bits_lBS: Int[Array, "l B S"] | None,
        keeps_all: bool,
        slides: bool = False,
    ) -> SlotCache:
        """A segment's entries that a later query can see, then room; int8 codes with bits.

        Where attention `slides` over a window, it reads positions.
        """
        fill_lB = held_lBS.sum(2, dtype=jnp.int32)
        order_lBC = _widen(jnp.argsort(~held_lBS, axis=2, stable=True), capacity, 2)

        def gather(array_LBSKH: Array) -> Array:
            if keeps_all:
                return _widen(array_LBSKH[span], capacity, 2)
            index = order_lBC[..., None, None]
            return jnp.take_along_axis(array_LBSKH[span], index, axis=2)

        k, v = gather(prompt.k_LBSKH), gather(prompt.v_LBSKH)
        k_scale = v_scale = None
        layers, batch, _, _, dim = k.shape
        many = [size for size in (layers, batch) if size > 1]

        def flat(array: Array) -> Array:
            return array.reshape(*many, capacity, -1)

        if bits_lBS is not None:
            bits_lBC = jnp.take_along_axis(bits_lBS, order_lBC, axis=2)
            codes = [int8.recode_kv(from_storage(x), bits_lBC) for x in (k, v)]
            k, v = (each.codes for each in codes)
            k_scale, v_scale = (flat(each.scale) for each in codes)
        pos_lBC = order_lBC.astype(jnp.int32) if slides and not keeps_all else None
        arrays = (flat(k), flat(v), k_scale, v_scale, fill_lB, pos_lBC)
        return cls(*arrays, layers, dim, keeps_all)

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_CO.shape[-2]

    def grow(self, capacity: int) -> SlotCache:
        """The same entries with more room."""
        axis = self.k_CO.ndim - 2
        names = ("k_CO", "v_CO", "k_scale_CK", "v_scale_CK")
        arrays = {name: getattr(self, name) for name in names}
        wider = {n: _widen(x, capacity, axis) for n, x in arrays.items() if x is not None}
        if self.pos_lBC is not None:
            wider["pos_lBC"] = _widen(self.pos_lBC, capacity, 2)
        return self.replace(**wider)

    def append(
        self, k_lBTKH: Array, v_lBTKH: Array, keep_lBT: Array, bits_BT: Array, pos_BT: Array
    ) -> SlotCache:
        """Append the tokens that are kept, in place; a cache of codes needs their bits."""
        slots_lBT = self.fill_lB[..., None] + jnp.cumsum(keep_lBT, axis=2, dtype=jnp.int32) - 1
        # Other tokens go to the slot that the next token will overwrite.
        slots_lBT = jnp.where(keep_lBT, slots_lBT, slots_lBT + 1)
        fields = {"fill_lB": self.fill_lB + keep_lBT.sum(2, dtype=jnp.int32)}
        with jax.named_scope("kv_write"):
            if self.k_scale_CK is not None:
                codes = [int8.recode_kv(x, bits_BT[None]) for x in (k_lBTKH, v_lBTKH)]
                k_lBTKH, v_lBTKH = (each.codes for each in codes)
                k_scale, v_scale = (each.scale for each in codes)
                fields["k_scale_CK"] = self._put(self.k_scale_CK, k_scale, slots_lBT, keep_lBT)
                fields["v_scale_CK"] = self._put(self.v_scale_CK, v_scale, slots_lBT, keep_lBT)
            fields["k_CO"] = self._put(self.k_CO, k_lBTKH, slots_lBT, keep_lBT)
            fields["v_CO"] = self._put(self.v_CO, v_lBTKH, slots_lBT, keep_lBT)
        if self.pos_lBC is not None:
            at_lBT = jnp.where(keep_lBT, slots_lBT, self.capacity)
            layer, row, _ = jnp.ogrid[: self.layers, : len(pos_BT), :1]
            put = self.pos_lBC.at[layer, row, at_lBT]
            fields["pos_lBC"] = put.set(pos_BT[None], mode="drop")
        return self.replace(**fields)

    def _put(self, array_CO: Array, value_lBT: Array, slots_lBT: Array, keep_lBT: Array) -> Array:
        layers, batch, width = slots_lBT.shape
        value_lBTO = value_lBT.reshape(layers, batch, width, -1)
        if array_CO.dtype == jnp.uint16:
            value_lBTO = to_storage(value_lBTO)
        if width > 1:  # two tokens must not meet in one slot
            slots_lBT = jnp.where(keep_lBT, slots_lBT, self.capacity)
        if batch == 1 and width == 1 and (self.keeps_all or layers == 1):
            # A scatter would be a loop of its own on CPU.
            value = value_lBTO[:, 0] if layers > 1 else value_lBTO[0, 0]
            return lax.dynamic_update_slice_in_dim(array_CO, value, slots_lBT[0, 0, 0], axis=-2)
        at, b = jnp.arange(layers)[:, None, None], jnp.arange(batch)[None, :, None]
        if layers == 1 and batch == 1:
            return array_CO.at[slots_lBT[0, 0]].set(value_lBTO[0, 0], mode="drop")
        if layers == 1:
            return array_CO.at[b[0], slots_lBT[0]].set(value_lBTO[0], mode="drop")
        if batch == 1:
            return array_CO.at[at[:, 0], slots_lBT[:, 0]].set(value_lBTO[:, 0], mode="drop")
        return array_CO.at[at, b, slots_lBT].set(value_lBTO, mode="drop")

    def take_back(self, kept_lB: Int[Array, "l B"]) -> SlotCache:
        """Without the last `kept_lB` entries of each layer and row."""
        return self.replace(fill_lB=self.fill_lB - kept_lB)

    def is_full(self, live_B: Bool[Array, "B"], width: int) -> Bool[Array, ""]:
        """Some live row may have no slot left for `width` more tokens."""
        return ((self.fill_lB + width > self.capacity) & live_B[None]).any()

    def layer(self, index: Any) -> tuple[Float[Array, "B C O"], Float[Array, "B C O"]]:
        """Keys and values of a layer of the segment."""

        def of(array: Array) -> Array:
            array = array[index] if self.layers > 1 else array
            return array.reshape(-1, *array.shape[-2:])

        def read(array_CO: Array, scale_CK: Array | None) -> Array:
            array_BCO = of(array_CO)
            if scale_CK is None:
                return from_storage(array_BCO)
            scale_BCK = of(scale_CK)
            codes = array_BCO.reshape(*scale_BCK.shape, self.head_dim)
            return int8.decode_kv(int8.QTensor(codes, scale_BCK)).reshape(array_BCO.shape)

        return read(self.k_CO, self.k_scale_CK), read(self.v_CO, self.v_scale_CK)

    def with_new(
        self, index: Any, k_BTKH: Array, v_BTKH: Array, pos_BT: Array
    ) -> tuple[tuple[Array, Array], Bool[Array, "B T C"], Int[Array, "B C"]]:
        """A layer's keys and values with those of tokens to append.

        Also which slots each of them sees, and the position of each slot's token.
        """
        batch, width = k_BTKH.shape[:2]
        rows_B1, new_1T = jnp.arange(batch)[:, None], jnp.arange(width, dtype=jnp.int32)[None]
        slots_BT = self.fill_lB[index][:, None] + new_1T

        def put(old_BCO: Array, new_BTKH: Array) -> Array:
            new_BTO = to_storage(new_BTKH.reshape(batch, width, -1))
            put_BCO = to_storage(old_BCO).at[rows_B1, slots_BT].set(new_BTO, mode="drop")
            return from_storage(put_BCO)

        k_BCO, v_BCO = self.layer(index)
        seen_BTC = jnp.arange(self.capacity, dtype=jnp.int32)[None, None] <= slots_BT[..., None]
        pos_BC = jnp.broadcast_to(self.positions(index), k_BCO.shape[:2])
        pos_BC = pos_BC.at[rows_B1, slots_BT].set(pos_BT, mode="drop")
        return (put(k_BCO, k_BTKH), put(v_BCO, v_BTKH)), seen_BTC, pos_BC

    def rows(self, index_R: Any) -> SlotCache:
        """Some rows, any number of times."""
        batch, many = self.fill_lB.shape[1], [n for n in (self.layers, len(index_R)) if n > 1]

        def chosen(array_CO: Any) -> Any:
            if array_CO is None:
                return None
            end = array_CO.shape[-2:]
            return array_CO.reshape(self.layers, batch, *end)[:, index_R].reshape(*many, *end)

        arrays = {n: chosen(getattr(self, n)) for n in ("k_CO", "v_CO", "k_scale_CK", "v_scale_CK")}
        pos_lBC = None if self.pos_lBC is None else self.pos_lBC[:, index_R]
        return self.replace(**arrays, fill_lB=self.fill_lB[:, index_R], pos_lBC=pos_lBC)

    def positions(self, index: Any) -> Int[Array, "#B C"]:
        """Position of each slot's token in a layer, where it is in use and attention slides."""
        if self.pos_lBC is None:
            return jnp.arange(self.capacity, dtype=jnp.int32)[None]
        return self.pos_lBC[index]

    def held(self, index: Any) -> Bool[Array, "B C"]:
        """Slots of a layer that are in use."""
        slots_1C = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        return slots_1C < self.fill_lB[index][:, None]


def _widen(array: Array, width: int, axis: int) -> Array:
    """Cut or pad an axis to `width`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, max(width - array.shape[axis], 0))
    return lax.slice_in_dim(jnp.pad(array, widths), 0, width, axis=axis)
