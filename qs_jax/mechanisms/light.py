"""Light layers: what prompt tokens run instead of whole layers, before they stop (ours).

A light layer keeps some attention heads and MLP neurons of the layer whose place it takes. Keys and
values are those of the layer, so later tokens see all heads. What was left out is made good by one
linear map, fitted in closed form on states that the light layers before it made:

    a  = h + Attn(norm(h)) over the kept heads
    h' = a + decode(encode([a / rms(a); kept neurons of norm(a); 1]))

Relatives: SwiftKV (Qiao et al. 2024) trains what is fitted here; the choice of heads and neurons is
structured pruning by least squares (He et al. 2017) in a metric of what later queries feel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.models.cpu import from_storage, own_layer
from qs_jax.models.quantized import with_floats


class LightSizes(NamedTuple):
    """Sizes that decide the work of a light layer: query heads, MLP neurons, numbers of a code."""

    heads: int
    neurons: int
    code: int


@no_type_check
class LightLayer(flax.struct.PyTreeNode):
    """What is left of one layer.

    Attributes:
      heads_N: Query heads that are kept, rising.
      neurons_M: MLP neurons that are kept, rising.
      encode_FR: From what is read of a token, F = D + M + 1 numbers, to a code.
      decode_RD: From the code to the change of the state.
    """

    heads_N: Int[Array, "n"]
    neurons_M: Int[Array, "m"]
    encode_FR: Float[Array, "F R"]
    decode_RD: Float[Array, "R D"]

    @property
    def sizes(self) -> LightSizes:
        """Sizes that decide its work."""
        return LightSizes(len(self.heads_N), len(self.neurons_M), self.decode_RD.shape[0])


def kept_mlp(params_l: dict[str, Any], neurons_M: Array, mlp_size: int) -> dict[str, Any]:
    """One layer's parameters up to some of its neurons: the norm, and columns of the projection."""
    name = "gate_up" if "gate_up" in params_l else "up"
    products = params_l[name]["kernel"].shape[-1] // mlp_size
    columns = jnp.concatenate([neurons_M + mlp_size * at for at in range(products)])
    kept = {part: leaf[..., columns] for part, leaf in params_l[name].items()}
    return {"mlp_norm": params_l["mlp_norm"], name: kept}


def reduced_layer(
    params_l: dict[str, Any], light: LightLayer, head_dim: int, mlp_size: int
) -> dict[str, Any]:
    """One layer's parameters with the kept heads and neurons only, as `PreNormBlock.light` reads.

    The projection back out of the MLP is left out: the map takes its place.
    """
    rows = (light.heads_N[:, None] * head_dim + jnp.arange(head_dim)[None]).reshape(-1)
    queries, out = params_l["out"]["kernel"].shape[0], params_l["out"]
    qkv = {
        name: jnp.concatenate([leaf[..., rows], leaf[..., queries:]], axis=-1)
        for name, leaf in params_l["qkv"].items()
    }
    kept = {"qkv": qkv, "out": out | {"kernel": out["kernel"][rows]}}
    norms = ("attn_norm", "q_norm", "k_norm")
    kept |= {name: params_l[name] for name in norms if name in params_l}
    return kept | kept_mlp(params_l, light.neurons_M, mlp_size)


def split(encode_FR: Array, hidden_size: int) -> tuple[Array, Array, Array]:
    """An encoder in the parts that read the state, the neurons, and 1."""
    return encode_FR[:hidden_size], encode_FR[hidden_size:-1], encode_FR[-1]


def spread(light: LightLayer, hidden_size: int, mlp_size: int) -> Float[Array, "E R"]:
    """The encoder over all neurons, E = D + F + 1: rows of those left out are zeros."""
    encode_FR = light.encode_FR
    state_DR, kept_MR, one_1R = jnp.split(encode_FR, [hidden_size, encode_FR.shape[0] - 1])
    empty_FR = jnp.zeros((mlp_size, encode_FR.shape[1]), encode_FR.dtype)
    return jnp.concatenate([state_DR, empty_FR.at[light.neurons_M].set(kept_MR), one_1R])


def shared_keys(k_BSKH: Array, heads_N: Array, num_heads: int) -> Array:
    """Keys or values by kept query head, `[B, S, n, H]`: groups may have kept several or none."""
    group = num_heads // k_BSKH.shape[2]
    return jnp.take(k_BSKH, heads_N // group, axis=2)


@no_type_check
class Bound(flax.struct.PyTreeNode):
    """Parameters as the prompt engine reads them, gathered once.

    Attributes:
      layers: Of each light layer: the reduced block, its code in the model's dtype, and the whole
        block, where a program would copy it out of stacked weights.
      neurons: MLP inputs of the layers after the stop, with the neurons that the maps read.
      deeper: Whole blocks of the layers after the stop, by index and without the last, where a
        program would copy them.
    """

    layers: tuple[dict[str, Any], ...]
    neurons: tuple[dict[str, Any], ...]
    deeper: dict[int, Any]


class Stacked(NamedTuple):
    """Light layers as the definition reads them: over all heads and neurons, for a scan."""

    heads_XN: Bool[Array, "X N"]
    encode_XER: Float[Array, "X E R"]
    decode_XRD: Float[Array, "X R D"]


def bind(params: dict[str, Any], kv_maps: Any, model: ModelConfig) -> Bound:
    """Gather the weights that light layers, and maps that read neurons, leave to be computed."""

    def params_of(index: int) -> dict[str, Any]:
        layer = jax.tree.map(lambda leaf: leaf[index], params["layers"])
        return with_floats(from_storage(layer), model.dtype)

    layers = []
    for at, light in enumerate(kv_maps.light, start=(kv_maps.light_from or 1) - 1):
        block = reduced_layer(params_of(at), light, model.head_dim, model.mlp_size)
        parts = (*split(light.encode_FR, model.hidden_size), light.decode_RD)
        code = tuple(part.astype(model.dtype) for part in parts)
        bound = {"block": block, "code": code, "heads": light.heads_N}
        layers.append(bound | {"whole": own_layer(params["layers"], at)})
    neurons = []
    for at, ids in enumerate(kv_maps.neurons, start=kv_maps.layers[0]):
        neurons.append(kept_mlp(params_of(at), ids, model.mlp_size))
    stop = kv_maps.layers[0]
    after = {i: own_layer(params["layers"], i) for i in range(stop, model.num_layers - 1)}
    deeper = {index: own for index, own in after.items() if own is not None}
    return Bound(tuple(layers), tuple(neurons), deeper)


def stack(lights: Sequence[LightLayer], model: ModelConfig) -> Stacked:
    """Light layers of any sizes in arrays of one: what is left out, and short codes, are zeros."""
    longest = max(light.decode_RD.shape[0] for light in lights)
    heads, encode, decode = [], [], []
    for light in lights:
        more = longest - light.decode_RD.shape[0]
        heads.append(jnp.zeros(model.num_heads, bool).at[light.heads_N].set(True))
        encode.append(
            jnp.pad(spread(light, model.hidden_size, model.mlp_size), ((0, 0), (0, more)))
        )
        decode.append(jnp.pad(light.decode_RD, ((0, more), (0, 0))))
    return Stacked(*map(jnp.stack, (heads, encode, decode)))
