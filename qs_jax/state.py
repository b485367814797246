"""What the jitted programs carry.

Their annotations are documentation: JAX rebuilds these structs with placeholders in place of arrays
(shapes, shardings, argument infos), which a runtime check would refuse.
"""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt16

from qs_jax.config import ModelConfig
from qs_jax.halves import from_bits, held_dtype, to_bits


@no_type_check
class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer; a token's slot is its position in its row.

    Attributes:
      k_LBSKH: Keys, after RoPE; bfloat16 on CPU by its bits (`halves`).
      v_LBSKH: Values.
    """

    k_LBSKH: Float[Array, "L B S K H"] | UInt16[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"] | UInt16[Array, "L B S K H"]

    @classmethod
    def zeros(cls, model: ModelConfig, batch: int, capacity: int) -> KVCache:
        """An empty cache of `capacity` slots a row, in the model's dtype."""
        shape = (model.num_layers, batch, capacity, model.num_kv_heads, model.head_dim)
        dtype = held_dtype(model.dtype)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_LBSKH.shape[2]

    def write_rows(self, index: Array, k_BTKH: Array, v_BTKH: Array) -> KVCache:
        """One layer's keys and values of whole rows, at slots 0 and on."""
        zero = jnp.zeros((), index.dtype)
        start = (index, zero, zero, zero, zero)
        with jax.named_scope("kv_write"):
            return self.replace(
                k_LBSKH=lax.dynamic_update_slice(self.k_LBSKH, to_bits(k_BTKH)[None], start),
                v_LBSKH=lax.dynamic_update_slice(self.v_LBSKH, to_bits(v_BTKH)[None], start),
            )

    def write_layers(self, first: Array, end: Array, other: KVCache) -> KVCache:
        """The layers from `first` up to `end`, not included: the first ones of another cache."""

        def write(index: Array, cache: KVCache) -> KVCache:
            k_BSKH, v_BSKH = other.held_by(index - first)
            return cache.write_rows(index, k_BSKH, v_BSKH)

        return lax.fori_loop(first, end, write, self)

    def write_slots(self, index: Array, pos_BC: Array, k_BCKH: Array, v_BCKH: Array) -> KVCache:
        """One layer's keys and values of a few tokens a row, at their distinct positions."""
        rows_B1 = jnp.arange(pos_BC.shape[0])[:, None]
        at = {"unique_indices": True, "mode": "promise_in_bounds"}
        with jax.named_scope("kv_write"):
            return self.replace(
                k_LBSKH=self.k_LBSKH.at[index, rows_B1, pos_BC].set(to_bits(k_BCKH), **at),
                v_LBSKH=self.v_LBSKH.at[index, rows_B1, pos_BC].set(to_bits(v_BCKH), **at),
            )

    def write_step(self, index: Array, pos_B: Array, k_B1KH: Array, v_B1KH: Array) -> KVCache:
        """One layer's keys and values of one token a row, at its position."""
        rows_B = jnp.arange(pos_B.shape[0])
        with jax.named_scope("kv_write"):
            return self.replace(
                k_LBSKH=self.k_LBSKH.at[index, rows_B, pos_B].set(to_bits(k_B1KH)[:, 0]),
                v_LBSKH=self.v_LBSKH.at[index, rows_B, pos_B].set(to_bits(v_B1KH)[:, 0]),
            )

    def of_layer(self, index: Array) -> tuple[Array, Array]:
        """One layer's keys and values, `[B, S, K, H]` each."""
        return from_bits(self.held_by(index))

    def held_by(self, index: Array) -> tuple[Array, Array]:
        """The same as they are held."""
        k_BSKH = lax.dynamic_index_in_dim(self.k_LBSKH, index, keepdims=False)
        return k_BSKH, lax.dynamic_index_in_dim(self.v_LBSKH, index, keepdims=False)


@no_type_check
class TokenState(flax.struct.PyTreeNode):
    """The carry of the masked engine's scan over layers.

    Attributes:
      h_BTD: States, in `halves.state_dtype`; frozen where a token no longer computes.
      halt_layer_BT: Layers the token runs; L until it halts. `layer > halt_layer_BT` is the
        complement of the active-token mask.
      hidden_from_BT: Fused-index map as it grows: position of the first token that absorbed this
        one; NEVER if none has.
      hidden_after_BT: Layer after which that happened first; NEVER if it has not.
      size_BT: Tokens the state stands for.
      bits_BT: Bit-width vector: 2, 4, 8, or 16 for not quantised.
      similarity_BTW: Sum over layers of query-key cosines with the W positions before; or None.
      received_BTS: Attention received by each key (`kv_skip.Keys.received_BTS`); or None.
      shortlist_BTX: Ids of the shortlist entropy; or None.
      taken_BW: Which of the W tokens before the call's first it has absorbed; or None.
      code_BTR: What the extrapolation maps read of a token, from when it halted; or None.
    """

    h_BTD: Float[Array, "B T D"]
    halt_layer_BT: Int[Array, "B T"]
    hidden_from_BT: Int[Array, "B T"]
    hidden_after_BT: Int[Array, "B T"]
    size_BT: Float[Array, "B T"]
    bits_BT: Int[Array, "B T"]
    similarity_BTW: Float[Array, "B T W"] | None
    received_BTS: Float[Array, "B T S"] | None
    shortlist_BTX: Int[Array, "B T X"] | None
    taken_BW: Bool[Array, "B W"] | None
    code_BTR: Float[Array, "B T R"] | None


@no_type_check
class LayerRecord(flax.struct.PyTreeNode):
    """Evidence of one layer, or of all layers on a leading axis of L; what was in force in it.

    Attributes:
      active_BT: The token ran this layer.
      written_BT: Its keys and values were written at this layer.
      visible_BT: Keys its query could see, itself included; 0 where it did not run.
      bits_BT: Bits of its activations; 16 is not quantised.
      fused_BT: Position of the first token that has absorbed it; NEVER if none has. `Record.fused`
        is the map it resolves to.
      drift_BT: Layer drift; nan where it did not run, was not computed, or halting is off.
      entropy_BT: Entropy the halting decision read, in nats; nan where it read none.
      weighed_BT: The token took part in a fusion at the end of this layer.
    """

    active_BT: Bool[Array, "*L B T"]
    written_BT: Bool[Array, "*L B T"]
    visible_BT: Int[Array, "*L B T"]
    bits_BT: Int[Array, "*L B T"]
    fused_BT: Int[Array, "*L B T"]
    drift_BT: Float[Array, "*L B T"]
    entropy_BT: Float[Array, "*L B T"]
    weighed_BT: Bool[Array, "*L B T"]


@no_type_check
class Past(flax.struct.PyTreeNode):
    """What a later token needs of the tokens before it, under the mechanisms.

    Attributes:
      cache: Keys and values of every slot; whether a query sees one is decided by what follows. In
        the decode engine a `SlotCache` for each segment of layers.
      halt_layer_BS: Layers each token ran.
      hidden_after_BS: Its keys are gone after this layer (fusion).
      hidden_from_BS: Position of the first token that absorbed it; NEVER if none.
      retain_BS: Its keys are always written.
      received_BS: Most attention it got in the last layer where every query could see it; or None.
      size_LBS: Tokens each key stands for, at each layer; None unless attention is proportional.
      window: Fusion only, the last W tokens: see `FusionWindow`.
      previous_B: Entropy of the model's output after the last token, in nats.
      record: Evidence of every token so far, `[L, B, S]`.
    """

    cache: KVCache | tuple[Any, ...]
    halt_layer_BS: Int[Array, "B S"]
    hidden_after_BS: Int[Array, "B S"]
    hidden_from_BS: Int[Array, "B S"]
    retain_BS: Bool[Array, "B S"]
    received_BS: Float[Array, "B S"] | None
    size_LBS: Float[Array, "L B S"] | None
    window: FusionWindow | None
    previous_B: Float[Array, "B"]
    record: LayerRecord


@no_type_check
class FusionWindow(flax.struct.PyTreeNode):
    """The last W tokens of each row, oldest first.

    Attributes:
      before_LBWD: States of each layer before fusion.
      after_LBWD: And after it.
      mass_LBW: Sum of the weights in each state.
      size_LBW: Tokens each state stands for after that layer.
      exempt_BW: Protected, padding or not there.
      embedded_BCD: Input embeddings of the last tokens; None without the context filter.
      embedded_real_BC: Which of them exist.
      context_BWD: Contexts of the last W tokens; None likewise.
    """

    before_LBWD: Float[Array, "L B W D"]
    after_LBWD: Float[Array, "L B W D"]
    mass_LBW: Float[Array, "L B W"]
    size_LBW: Float[Array, "L B W"]
    exempt_BW: Bool[Array, "B W"]
    embedded_BCD: Float[Array, "B C D"] | None
    embedded_real_BC: Bool[Array, "B C"] | None
    context_BWD: Float[Array, "B W D"] | None


@no_type_check
class DecodeState(flax.struct.PyTreeNode):
    """The carry of the token loop: everything the next step needs, and what was produced so far.

    Attributes:
      step: Tokens produced so far, the column of `tokens_BM` written next.
      last_B: Token of each row that has not been run through the model yet.
      pos_B: Position of `last_B` in its row.
      done_B: The row has ended; it is carried along unchanged.
      finite_B: Every logit of the row was finite so far.
      seen_BV: Token ids of the prompt and continuation (repetition penalty), V = 1 when unused.
      tokens_BM: Output buffer; M is the capacity for new tokens.
      logprobs_BM: Log-probability of each produced token in nats.
      lengths_B: Tokens each row has produced, the end token included.
      overflow: A planned capacity of the prompt was too small.
      full: Decode engine: some cache has no slot left for a live row's next token.
      cache: Keys and values of all positions before `pos_B`; a `Past` under the mechanisms. In the
        decode engine a `SlotCache` for each segment of layers takes the place of a `KVCache`.
    """

    step: Int[Array, ""]
    last_B: Int[Array, "B"]
    pos_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    finite_B: Bool[Array, "B"]
    seen_BV: Bool[Array, "B V"]
    tokens_BM: Int[Array, "B M"]
    logprobs_BM: Float[Array, "B M"]
    lengths_B: Int[Array, "B"]
    overflow: Bool[Array, ""]
    full: Bool[Array, ""]
    cache: KVCache | tuple[Any, ...] | Past
