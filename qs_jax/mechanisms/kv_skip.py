"""KV cache skipping: which keys exist in the layers a halted token does not run (paper 2.2, C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.halves import exact_dtype, from_bits, to_bits
from qs_jax.mechanisms.kv_maps import KVMaps, rms_normalised
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.models.layers import product

Sources: TypeAlias = Mapping[str, Callable[[], Array]]


class Keys(NamedTuple):
    """What is known of every key at one layer.

    Attributes:
      pos_BS: Positions.
      real_BS: Not padding, and not an empty slot.
      halt_layer_BS: Layers the token runs.
      hidden_from_BS: The key is gone for queries at or after this position (fusion).
      retain_BS: Always written.
      received_BTS: "attended": most attention the key got from queries up to each query, in the
        last layer where every query could see it; None under other policies.
    """

    pos_BS: Int[Array, "B S"]
    real_BS: Bool[Array, "B S"]
    halt_layer_BS: Int[Array, "B S"]
    hidden_from_BS: Int[Array, "B S"]
    retain_BS: Bool[Array, "B S"]
    received_BTS: Float[Array, "B T S"] | None


def written(keys: Keys, layer: Int[Array, ""], plan: Plan, numbers: Numbers) -> Array:
    """Keys that exist at a layer for every query, `[B, S]`."""
    if plan.policy in ("propagate", "extrapolate"):
        return jnp.ones_like(keys.real_BS)
    return (layer <= keys.halt_layer_BS + numbers.delay) | keys.retain_BS


def visible(
    query_pos_BT: Int[Array, "B T"],
    keys: Keys,
    layer: Int[Array, ""],
    plan: Plan,
    numbers: Numbers,
) -> Bool[Array, "B T S"]:
    """The attention mask of one layer: a query sees itself and every earlier key that exists."""
    query_BT1, key_B1S = query_pos_BT[:, :, None], keys.pos_BS[:, None, :]
    exists_BTS = written(keys, layer, plan, numbers)[:, None, :]
    if plan.policy == "attended":
        assert keys.received_BTS is not None
        exists_BTS = exists_BTS | (keys.received_BTS > numbers.tau_kv)
    seen_BTS = keys.real_BS[:, None, :] & exists_BTS & (query_BT1 < keys.hidden_from_BS[:, None, :])
    return (query_BT1 == key_B1S) | ((key_B1S < query_BT1) & seen_BTS)


def seen_from(keys: Keys, layer: Int[Array, ""], plan: Plan, numbers: Numbers) -> Int[Array, "B S"]:
    """Position of the first query that sees each key, the token's own; NEVER where it is gone.

    With `hidden_from_BS` it is all there is to `visible` for queries whose own key exists, unless
    the policy is "attended".
    """
    there_BS = keys.real_BS & written(keys, layer, plan, numbers)
    return jnp.where(there_BS, keys.pos_BS, NEVER)


def running_maximum(
    weights_BTS: Float[Array, "B T S"],
    query_pos_BT: Int[Array, "B T"],
    keys: Keys,
    asking_BT: Bool[Array, "B T"],
    before_BS: Float[Array, "B S"] | None,
) -> Float[Array, "B T S"]:
    """Most attention each key got from later queries up to each query (C.4, read causally).

    Args:
      weights_BTS: Maximum over heads of this layer's attention weights.
      query_pos_BT: Positions of the queries.
      keys: Positions of the keys.
      asking_BT: Queries that exist.
      before_BS: What earlier calls found; None for nothing.
    """
    later_BTS = asking_BT[:, :, None] & (keys.pos_BS[:, None, :] < query_pos_BT[:, :, None])
    found_BTS = jax.lax.cummax(jnp.where(later_BTS, weights_BTS, 0), axis=1)
    return found_BTS if before_BS is None else jnp.maximum(found_BTS, before_BS[:, None, :])


def extrapolate(
    features_BTF: Float[Array, "B T F"],
    maps_XFO: Float[Array, "X F O"],
    halt_layer_BT: Int[Array, "B T"],
    layers: Sequence[int],
) -> Float[Array, "B T O"]:
    """Keys and values of halted tokens by the map of the layer they halted at.

    Args:
      features_BTF: Of the frozen states, a constant 1 among them.
      maps_XFO: This layer's maps, one for each halting layer.
      halt_layer_BT: Where each token halted.
      layers: The halting layers, in the order of the maps.
    """
    exact = exact_dtype(features_BTF.dtype)
    out = jnp.zeros((*features_BTF.shape[:2], maps_XFO.shape[-1]), exact)
    for index, layer in enumerate(layers):
        here_BT1 = (halt_layer_BT == layer)[..., None]
        out = jnp.where(here_BT1, product(features_BTF, maps_XFO[index]), out)
    return out.astype(features_BTF.dtype)


# Tokens that are mapped at a time.
CHUNK = 64


def extrapolate_grouped(
    features_BTF: Float[Array, "B T F"],
    maps_XFO: Float[Array, "X F O"],
    halt_layer_BT: Int[Array, "B T"],
    layers: Sequence[int],
    wanted_BT: Bool[Array, "B T"],
) -> Float[Array, "B T O"]:
    """`extrapolate` at the cost of one product a wanted token; zeros for the others.

    Tokens are sorted by their map and go through it in as many chunks as are needed.

    Args:
      features_BTF: As in `extrapolate`.
      maps_XFO: Likewise.
      halt_layer_BT: Likewise.
      layers: Likewise.
      wanted_BT: Tokens whose result is read.
    """
    batch, width, size = features_BTF.shape
    count, chunk, kinds = batch * width, min(CHUNK, batch * width), len(layers)
    layers_X = jnp.asarray(layers, jnp.int32)
    here_XN = (halt_layer_BT.reshape(1, count) == layers_X[:, None]) & wanted_BT.reshape(1, count)
    kind_N = jnp.where(here_XN.any(0), here_XN.argmax(0), kinds).astype(jnp.int32)
    order_N = jnp.argsort(kind_N, stable=True).astype(jnp.int32)
    tokens_X = here_XN.sum(1, dtype=jnp.int32)
    chunks_X = -(-tokens_X // chunk)
    first_X = jnp.cumsum(tokens_X) - tokens_X  # place in the order of each map's first token
    before_X = jnp.cumsum(chunks_X) - chunks_X
    features_NF, maps_XFO = to_bits(features_BTF.reshape(count, size)), to_bits(maps_XFO)

    def body(index: Array, out_NO: Array) -> Array:
        kind = (before_X + chunks_X <= index).sum(dtype=jnp.int32)
        offsets_C = (index - before_X[kind]) * chunk + jnp.arange(chunk, dtype=jnp.int32)
        places_C = jnp.minimum(first_X[kind] + offsets_C, count - 1)
        tokens_C = jnp.where(offsets_C < tokens_X[kind], order_N[places_C], count)
        features_CF = from_bits(features_NF.at[tokens_C].get(mode="clip"))
        found_CO = product(features_CF, from_bits(maps_XFO[kind]))
        return out_NO.at[tokens_C].set(found_CO, mode="drop")

    nothing_NO = jnp.zeros((count, maps_XFO.shape[-1]), exact_dtype(features_BTF.dtype))
    out_NO = jax.lax.fori_loop(0, chunks_X.sum(), body, nothing_NO)
    return out_NO.astype(features_BTF.dtype).reshape(batch, width, -1)


def apply_maps(
    read_BTF: Float[Array, "B T F"],
    maps_XFO: Float[Array, "X F O"],
    halt_layer_BT: Int[Array, "B T"],
    layers: Sequence[int],
    wanted_BT: Bool[Array, "B T"] | None,
) -> Float[Array, "B T O"]:
    """`extrapolate_grouped` of the wanted tokens, or `extrapolate` of all where None is given."""
    if wanted_BT is None:
        return extrapolate(read_BTF, maps_XFO, halt_layer_BT, layers)
    return extrapolate_grouped(read_BTF, maps_XFO, halt_layer_BT, layers, wanted_BT)


def encode(
    kv_maps: KVMaps,
    sources: Sources,
    halt_layer_BT: Int[Array, "B T"],
    wanted_BT: Bool[Array, "B T"] | None,
    dtype: Any,
) -> Float[Array, "B T R"]:
    """What the maps of all deeper layers read of a token that stops: its features, or their code.

    Args:
      kv_maps: With `encode_XFR` where a code stands between features and maps.
      sources: Each feature of the tokens.
      halt_layer_BT: Where each token halted.
      wanted_BT: Tokens whose result is read; None for all.
      dtype: As in `features`.
    """
    read_BTF = features(sources, kv_maps.features, dtype)
    if kv_maps.encode_XFR is None:
        return read_BTF
    encoders = kv_maps.encode_XFR.astype(read_BTF.dtype)
    return apply_maps(read_BTF, encoders, halt_layer_BT, kv_maps.layers, wanted_BT)


def features(sources: Sources, names: Sequence[str], dtype: Any) -> Float[Array, "B T F"]:
    """What is read of tokens that stop, in the order of the names, and 1.

    Args:
      sources: "state", "embedding", "previous": `[B, T, D]`; "neurons": `[B, T, F]`. Called for
        those that are named.
      names: Of `KVMaps.features`.
      dtype: Of the model, and of the result; states may be held in another.
    """
    found = {name: sources[name]().astype(dtype) for name in names}
    parts = [x if name == "neurons" else rms_normalised(x) for name, x in found.items()]
    return jnp.concatenate([*parts, jnp.ones_like(parts[0][..., :1])], axis=-1)
