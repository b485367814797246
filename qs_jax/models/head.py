"""Final norm and head: logits of states, at the end of the model or in the middle (logit lens)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.models import cpu, layers
from qs_jax.models.params import Params
from qs_jax.models.registry import family_of

# Logits that exist at a time, 64 MiB: a whole [B, T, V] array would dwarf the rest of the program.
HEAD_ELEMENTS = 2**24


def head_table(params: Params) -> Float[Array, "V D"]:
    """The output embedding: the head's own, or the token embedding when tied."""
    return params["head"]["tokens"] if "head" in params else params["embed"]["tokens"]


def head_rows(params: Params, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of the output embedding."""
    stored_VD = params["head"].get("stored") if "head" in params else None
    return layers.embed_lookup(head_table(params) if stored_VD is None else stored_VD, ids)


def logits(params: Params, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Logits of normed states, in at least float32."""
    stored_VD = params["head"].get("stored") if "head" in params else None
    with jax.named_scope("head"):
        if stored_VD is not None and h.size == h.shape[-1]:
            return cpu.table_product(h.reshape(-1), stored_VD).reshape(*h.shape[:-1], -1)
        return layers.unembed(*cpu.as_they_lie(h, head_table(params)))


def lens(params: Params, h: Array, model: ModelConfig) -> Array:
    """Logits of unnormed states of any layer (the logit lens): final norm, then head."""
    return logits(params, normed(params, h, model))


def normed(params: Params, h: Array, model: ModelConfig) -> Array:
    """The final norm."""
    out: Any = family_of(model).final_norm(model).apply({"params": params["final_norm"]}, h)
    return out


def map_positions(function: Callable[..., Array], width: int, *arrays: Array) -> Array:
    """Apply a function along T piece by piece, so that its wide intermediate stays small.

    `width` is how many elements of the intermediate a position needs.
    """
    batch, positions = arrays[0].shape[:2]
    chunk = max(min(HEAD_ELEMENTS // (batch * width), positions), 1)
    pad = -positions % chunk

    def cut(array: Array) -> Array:
        widths = [(0, 0), (0, pad)] + [(0, 0)] * (array.ndim - 2)
        split = jnp.pad(array, widths).reshape(batch, -1, chunk, *array.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    chunks = lax.map(lambda pieces: function(*pieces), tuple(cut(array) for array in arrays))
    joined = jnp.moveaxis(chunks, 0, 1)
    return joined.reshape(batch, -1, *joined.shape[3:])[:, :positions]
