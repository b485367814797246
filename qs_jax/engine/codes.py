"""What extrapolation maps read of a token, computed once, when it stops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from qs_jax.engine.call import Call
from qs_jax.halves import from_bits
from qs_jax.mechanisms import fusion, kv_skip
from qs_jax.mechanisms.plan import NEVER
from qs_jax.models import family_of
from qs_jax.state import TokenState


def of_halted(call: Call, state: TokenState, layer: Array) -> Array:
    """What the maps read of a token, computed once, from the state it stops with."""
    now_BT = (state.halt_layer_BT == layer) & (layer < call.model.num_layers)
    assert state.code_BTR is not None
    h_BTD, before_BTR = state.h_BTD, state.code_BTR

    def neurons() -> Array:
        layers, block = call.params["layers"], family_of(call.model).block(call.model, parent=None)
        params_l = from_bits(jax.tree.map(lambda leaf: leaf[layer], layers))  # of the next layer
        found: Any = block.apply({"params": params_l}, h_BTD, method=block.mlp_neurons)
        return found

    sources = {
        "state": lambda: h_BTD,
        "embedding": lambda: call.embedded_BTD,
        "previous": lambda: just_before(call, jnp.pad(h_BTD, ((0, 0), (1, 0), (0, 0)))),
        "neurons": neurons,
    }
    wanted_BT = now_BT if call.groups_maps else None

    def encode() -> Array:
        maps, dtype = call.params["kv_maps"], call.model.dtype
        found_BTR = kv_skip.encode(maps, sources, state.halt_layer_BT, wanted_BT, dtype)
        return jnp.where(now_BT[..., None], found_BTR, before_BTR)

    return lax.cond(now_BT.any(), encode, lambda: before_BTR)


def just_before(call: Call, h_BXD: Array) -> Array:
    """State of the token just before each of the call's, `[B, T, D]`.

    Args:
      call: Whole rows, or a segment's gathered tokens.
      h_BXD: Its states, behind those of the tokens before; before a row's first, whatever is there.
    """
    pos_BT = call.rows.pos_BT
    before_BTD = fusion.back(h_BXD, 1, pos_BT.shape[1])
    if call.around is None:
        return before_BTD
    assert call.around.previous_BTD is not None
    near_BT = (jnp.diff(pos_BT, axis=1, prepend=-NEVER) == 1) | (pos_BT == 0)
    return jnp.where(near_BT[..., None], before_BTD, call.around.previous_BTD)
