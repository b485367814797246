"""KV cache skipping: which keys exist in the layers a halted token does not run (paper 2.2, C)."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Float, Int

from qs_jax.state import TokenState


@no_type_check
class KVSkip(flax.struct.PyTreeNode):
    """What becomes of a halted token's keys and values; fields as in `KVSkipConfig`."""

    tau_kv: Float[Array, ""]
    delay: Int[Array, ""]
    retain_ids: Int[Array, "r"]
    policy: str = field(pytree_node=False)

    def written(self, depth_BS: Array, retain_BS: Array, layer: Array) -> Array:
        """Keys that exist at a layer for every query."""
        if self.policy in ("propagate", "extrapolate"):
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
