"""KV cache skipping: which keys exist in the layers a halted token does not run (paper 2.2, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.mechanisms.custom import Frozen
from qs_jax.mechanisms.kv_maps import place
from qs_jax.models import Params, apply_block
from qs_jax.models.layers import Multiply, split_keys_values
from qs_jax.state import TokenState


@no_type_check
class KVSkip(flax.struct.PyTreeNode):
    """What becomes of a halted token's keys and values; fields as in `KVSkipConfig`."""

    tau_kv: Float[Array, ""]
    delay: Int[Array, ""]
    retain_ids: Int[Array, "r"]
    policy: Any = field(pytree_node=False)
    is_custom: bool = field(pytree_node=False)
    reads_frozen: bool = field(pytree_node=False)

    def keys_values(
        self,
        frozen: Sequence[Array],
        model: ModelConfig,
        layer: Int[Array, ""],
        weights: Params,
        multiply: Multiply,
    ) -> tuple[Array, Array]:
        """Keys, after RoPE, and values `[B, T, K, H]` of the user's own policy.

        Args:
          frozen: The arrays of `Frozen`.
          model: Architecture.
          layer: The layer's number.
          weights: Of its block.
          multiply: Its product, for these tokens.
        """

        def project() -> tuple[Array, Array]:
            kv_BTO = apply_block(model, weights, frozen[0], multiply, method="unrotated")
            return split_keys_values(kv_BTO, model)

        given: Any = (*frozen, model, project)
        k, v = self.policy.keys_values(Frozen(*given), layer)
        return place(k.astype(model.dtype), given[3], model), v.astype(model.dtype)

    def written(self, depth_BS: Array, retain_BS: Array, layer: Array) -> Array:
        """Keys that exist at a layer for every query."""
        if self.policy not in ("skip", "attended"):
            return jnp.ones_like(retain_BS)
        return (layer <= depth_BS + self.delay) | retain_BS

    def visible(self, rows: Any, state: TokenState, hidden_from_BS: Array, layer: Array) -> Array:
        """The attention mask `[B, T, S]`: a query sees itself and every earlier key that exists.

        A key is gone for queries at or after `hidden_from_BS` (fusion).
        """
        query_BT1, key_B1S = rows.pos_BT[:, :, None], rows.pos_BT[:, None, :]
        exists_BTS = self.written(state.depth_BT, rows.retain_BT, layer)[:, None, :]
        if self.policy == "attended":
            exists_BTS = exists_BTS | (state.received_BTS > self.tau_kv)
        seen_BTS = rows.real_BT[:, None, :] & exists_BTS
        seen_BTS &= query_BT1 < hidden_from_BS[:, None, :]
        return (query_BT1 == key_B1S) | ((key_B1S < query_BT1) & seen_BTS)


def running_maximum(
    weights_BTS: Array, query_pos_BT: Array, key_pos_BS: Array, counted_BT: Array
) -> Array:
    """Most attention each key received from later queries up to each query (C.4, read causally)."""
    later_BTS = counted_BT[:, :, None] & (key_pos_BS[:, None, :] < query_pos_BT[:, :, None])
    return jax.lax.cummax(jnp.where(later_BTS, weights_BTS, 0), axis=1)
