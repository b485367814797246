"""KV cache skipping: which keys exist in the layers a halted token does not run (paper 2.2, C)."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from flax.struct import field
from jaxtyping import Array, Bool, Float, Int


class Keys(NamedTuple):
    """Every key at one layer.

    Attributes:
      pos_BS: Positions.
      real_BS: Not padding.
      depth_BS: Layers the token runs.
      hidden_from_BS: The key is gone for queries at or after this position (fusion).
      retain_BS: Always written.
      received_BTS: "attended": most attention the key received from queries up to each query, in
        the last layer where every query could see it; None under other policies.
    """

    pos_BS: Int[Array, "B S"]
    real_BS: Bool[Array, "B S"]
    depth_BS: Int[Array, "B S"]
    hidden_from_BS: Int[Array, "B S"]
    retain_BS: Bool[Array, "B S"]
    received_BTS: Float[Array, "B T S"] | None = None


@no_type_check
class KVSkip(flax.struct.PyTreeNode):
    """What becomes of a halted token's keys and values; fields as in `KVSkipConfig`."""

    tau_kv: Float[Array, ""]
    delay: Int[Array, ""]
    retain_ids: Int[Array, "r"]
    policy: str = field(pytree_node=False)

    @property
    def writes_all(self) -> bool:
        """Whether every key exists in every layer."""
        return self.policy in ("propagate", "extrapolate")

    def written(self, depth_BS: Array, retain_BS: Array, layer: Array) -> Array:
        """Keys that exist at a layer for every query."""
        if self.writes_all:
            return jnp.ones_like(retain_BS)
        return (layer <= depth_BS + self.delay) | retain_BS

    def visible(self, query_pos_BT: Array, keys: Keys, layer: Array) -> Array:
        """The attention mask of a layer: a query sees itself and every earlier key that exists."""
        query_BT1, key_B1S = query_pos_BT[:, :, None], keys.pos_BS[:, None, :]
        exists_BTS = self.written(keys.depth_BS, keys.retain_BS, layer)[:, None, :]
        if self.policy == "attended":
            assert keys.received_BTS is not None
            exists_BTS = exists_BTS | (keys.received_BTS > self.tau_kv)
        seen_BTS = keys.real_BS[:, None, :] & exists_BTS
        seen_BTS &= query_BT1 < keys.hidden_from_BS[:, None, :]
        return (query_BT1 == key_B1S) | ((key_B1S < query_BT1) & seen_BTS)


def running_maximum(
    weights_BTS: Array, query_pos_BT: Array, key_pos_BS: Array, counted_BT: Array
) -> Array:
    """Most attention each key received from later queries up to each query (C.4, read causally)."""
    later_BTS = counted_BT[:, :, None] & (key_pos_BS[:, None, :] < query_pos_BT[:, :, None])
    return jax.lax.cummax(jnp.where(later_BTS, weights_BTS, 0), axis=1)
