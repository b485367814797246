"""What the jitted programs carry.

Their annotations are documentation: JAX rebuilds these structs with placeholders in place of arrays
(shapes, shardings, argument infos), which a runtime check would refuse.
"""

from __future__ import annotations

from typing import no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig


@no_type_check
class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer; a token's slot is its position in its row.

    Attributes:
      k_LBSKH: Keys, after RoPE.
      v_LBSKH: Values.
    """

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]

    @classmethod
    def zeros(cls, model: ModelConfig, batch: int, capacity: int) -> KVCache:
        """An empty cache of `capacity` slots a row, in the model's dtype."""
        shape = (model.num_layers, batch, capacity, model.num_kv_heads, model.head_dim)
        return cls(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.k_LBSKH.shape[2]


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
      logprobs_BM: Log-probability of each produced token under the plain model, in nats.
      lengths_B: Tokens each row has produced, the end token included.
      cache: Keys and values of all positions before `pos_B`.
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
    cache: KVCache
