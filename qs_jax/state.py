"""What scans over layers carry and what they record.

Annotations are documentation: JAX rebuilds these structs with placeholders in place of arrays
(shapes, shardings, argument infos), which a runtime check would refuse.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEVER = 2**30  # a layer or a position that is never reached
FULL_BITS = 16  # not quantised


def exact_dtype(dtype: Any) -> Any:
    """What norms, softmax and logits are computed in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@no_type_check
class TokenState(flax.struct.PyTreeNode):
    """The carry of the scan over layers.

    Attributes:
      h_BTD: States; frozen where a token no longer computes.
      active_BT: Active-token mask: the token has neither halted nor, in a prompt, been absorbed.
      fused_BT: Fused-index map: position of the first token that absorbed this one; NEVER if none.
      bits_BT: Bit-width vector: 2, 4, 8, or 16 for not quantised.
      depth_BT: Layers the token runs before it halts; L until it halts.
      fused_after_BT: Layer after which it was absorbed; NEVER if it was not.
      size_BT: Tokens that the state stands for.
      similarity_BTW: Sum over layers of query-key cosines with the W positions before; or None.
      received_BTS: Most attention each key received from later queries up to each query; or None.
      shortlist_BTX: Ids of the shortlist entropy; or None.
      code_BTR: What extrapolation maps read of a token, from when it halted; or None.
      whole_BT: It runs every layer whole, because later tokens will attend it; or None.
    """

    h_BTD: Float[Array, "B T D"]
    active_BT: Bool[Array, "B T"]
    fused_BT: Int[Array, "B T"]
    bits_BT: Int[Array, "B T"]
    depth_BT: Int[Array, "B T"]
    fused_after_BT: Int[Array, "B T"]
    size_BT: Float[Array, "B T"]
    similarity_BTW: Any = None
    received_BTS: Any = None
    shortlist_BTX: Any = None
    code_BTR: Any = None
    whole_BT: Any = None


@no_type_check
class LayerRecord(flax.struct.PyTreeNode):
    """What was in force in one layer, or in all layers on a leading axis of L.

    Attributes:
      active_BT: The token ran this layer.
      written_BT: Its keys and values were written at this layer.
      visible_BT: Keys its query could see, itself included; 0 where it did not run.
      bits_BT: Bits of its activations; 16 is not quantised.
      fused_BT: Position of the first token that has absorbed it; NEVER if none has.
      drift_BT: Layer drift; nan where it was not computed.
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


class Evidence(NamedTuple):
    """What a `qs_jax.record.Record` is made of.

    Attributes:
      layers: Of all layers, `[L, B, T]`.
      depth_BT: As in `TokenState`, at the end.
      fused_BT: Likewise.
      fused_after_BT: Likewise.
    """

    layers: LayerRecord
    depth_BT: Int[Array, "B T"]
    fused_BT: Int[Array, "B T"]
    fused_after_BT: Int[Array, "B T"]


def evidence(state: TokenState, layers: LayerRecord) -> Evidence:
    """Evidence of a finished scan."""
    return Evidence(layers, state.depth_BT, state.fused_BT, state.fused_after_BT)


@no_type_check
class Decisions(flax.struct.PyTreeNode):
    """What a fast engine decided; a record follows from it (`record.decided`).

    Attributes:
      depth_BT: Layers the token ran before it halted; L if it did not.
      fused_BT: Position of the token that absorbed it; NEVER if none.
      fused_after_BT: Layer after which it was absorbed; NEVER if it was not.
      bits_BT: Bits from the layer after `amq.layer` on.
      retain_BT: Keys that are always written.
      drift_LBT: Layer drifts that decisions read, nan elsewhere; None where they read none.
      entropy_LBT: Entropies, likewise, in nats.
    """

    depth_BT: Int[Array, "B T"]
    fused_BT: Int[Array, "B T"]
    fused_after_BT: Int[Array, "B T"]
    bits_BT: Int[Array, "B T"]
    retain_BT: Bool[Array, "B T"]
    drift_LBT: Any
    entropy_LBT: Any
