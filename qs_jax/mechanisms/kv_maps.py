"""Linear maps from frozen states to deeper keys and values (`kv_skip.policy` "extrapolate")."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, no_type_check

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, ConfigError
from qs_jax.files import parse_json, write_whole
from qs_jax.mechanisms.light import LightLayer, LightSizes
from qs_jax.models import family_of, rope
from qs_jax.models.layers import product, rms_normalised, split_keys_values
from qs_jax.state import exact_dtype

Sources: TypeAlias = Mapping[str, Callable[[], Array]]

FILE_NAME = "kv_maps.safetensors"
FEATURES = ("state", "embedding", "previous", "neurons")
# These need more than the token's own states: a whole prompt.
PROMPT_FEATURES = ("previous", "neurons")


class MapSizes(NamedTuple):
    """Sizes that decide the work of extrapolating: features, code, neurons, and light layers."""

    features: int
    code: int
    neurons: int = 0
    light: tuple[LightSizes, ...] = ()


@no_type_check
class KVMaps(flax.struct.PyTreeNode):
    """Maps of each layer, one for each halting layer; they travel as `params["kv_maps"]`.

    Attributes:
      maps_LXFO: O is the keys' 2 K H columns, keys before RoPE, then values; F what the maps read.
        Entry [l - 1, x] is zero where layer l is not deeper than `layers[x]`.
      layers: X halting layers.
      features: What is read of a token that stops: "state"; "embedding", its input embedding;
        "previous", the state of the token before it (these three RMS-normalised); "neurons", the
        inner activations of the following layers' MLPs on its state.
      provenance: JSON text: data, tokens, rows, ridge, and the fingerprint of the weights.
      encode_XFR: Of reduced rank: the code that the maps of all deeper layers read, R numbers, from
        the features. None where the maps read the features themselves, a constant 1 last.
      neurons: Of the feature "neurons": which are read of the first layer after the one that a
        token stopped at, of the second, and so on.
      light: Layers that tokens run light before they stop at `layers[0]`, the only one then; they
        and the maps were fitted on one another's states. Empty where they run whole.
      light_from: Number of the first of them.
      attended_F: Of light layers: how much later tokens will attend one, in logs, from its state
        over the RMS before the first light layer, and 1. None where nothing ranks by it.
    """

    maps_LXFO: Float[Array, "L X F O"]
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
    features: tuple[str, ...] = flax.struct.field(pytree_node=False)
    provenance: str = flax.struct.field(pytree_node=False, default="{}")
    encode_XFR: Float[Array, "X F R"] | None = None
    neurons: tuple[Int[Array, "m"], ...] = ()
    light: tuple[LightLayer, ...] = ()
    light_from: int | None = flax.struct.field(pytree_node=False, default=None)
    attended_F: Float[Array, "F"] | None = None

    @property
    def code_size(self) -> int:
        """Numbers that the maps of each layer read."""
        return self.maps_LXFO.shape[2]

    @property
    def sizes(self) -> MapSizes:
        """Sizes that decide the work of extrapolating."""
        features = self.code_size if self.encode_XFR is None else self.encode_XFR.shape[1]
        light = tuple(layer.sizes for layer in self.light)
        return MapSizes(features, self.code_size, sum(map(len, self.neurons)), light)

    def save(self, path: str | Path, dtype: str = "float32") -> Path:
        """Write one safetensors file; a folder gets the usual name in it.

        Args:
          path: File or folder.
          dtype: "float32", or "float16" for half of the bytes.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        maps = np.asarray(self.maps_LXFO)
        metadata = {"depth": str(len(maps)), "provenance": self.provenance}
        metadata |= {"layers": json.dumps(self.layers), "features": json.dumps(self.features)}
        # Layers that are not deeper hold zeros.
        arrays = {f"maps.{layer}": maps[layer:, x] for x, layer in enumerate(self.layers)}
        if self.encode_XFR is not None:
            arrays["encode"] = np.asarray(self.encode_XFR)
        if self.attended_F is not None:
            arrays["attended"] = np.asarray(self.attended_F)
        for at, light in enumerate(self.light, start=self.light_from or 0):
            arrays |= {f"light.{at}.encode": light.encode_FR, f"light.{at}.decode": light.decode_RD}
        stored = {name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()}
        chosen = {f"neurons.{at}": ids for at, ids in enumerate(self.neurons)}
        for at, light in enumerate(self.light, start=self.light_from or 0):
            chosen |= {f"light.{at}.heads": light.heads_N, f"light.{at}.neurons": light.neurons_M}
        stored |= {name: np.ascontiguousarray(ids, np.int32) for name, ids in chosen.items()}
        with write_whole(path) as (staged,):
            save_file(stored, staged, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> KVMaps:
        """Inverse of `save`.

        Raises:
          CheckpointError: The file is missing, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _from_arrays(arrays, metadata)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"there are no KV maps at {path}: fit them with qs_jax.fit_kv_maps and save them."
            ) from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} does not hold KV maps: {error}") from error

    def check(self, model: ModelConfig) -> None:
        """Raise `ConfigError` if these are maps of another model or of other weights."""
        count, size = len(self.layers), feature_count(self.features, model, self.neurons)
        encode_XFR = self.encode_XFR
        rank = size if encode_XFR is None else encode_XFR.shape[-1]
        found = [self.maps_LXFO.shape] + ([] if encode_XFR is None else [encode_XFR.shape])
        expected = [(model.num_layers, count, rank, 2 * model.kv_size), (count, size, rank)]
        if found != expected[: len(found)]:
            raise ConfigError(f"these KV maps are not of this model: {found}, expected {expected}.")
        _check_light(self, model)
        made_for = json.loads(self.provenance).get("weights")
        model.check_weights(made_for, "these KV maps were fitted on", "fit maps on these")


def _from_arrays(arrays: dict[str, np.ndarray], metadata: Mapping[str, str]) -> KVMaps:
    """Maps as `KVMaps.save` wrote them."""
    layers, depth = tuple(json.loads(metadata["layers"])), int(metadata["depth"])
    deeper = [arrays[f"maps.{layer}"] for layer in layers]
    maps = np.zeros((depth, len(layers), *deeper[0].shape[1:]), np.float32)
    for x, layer in enumerate(layers):
        maps[layer:, x] = deeper[x]
    if not isinstance(parse_json(metadata["provenance"]), dict):
        raise ValueError("its provenance is no object")

    def numbers(name: str) -> Array:
        return jnp.asarray(arrays[name], jnp.float32)

    def ids(name: str) -> Array:
        return jnp.asarray(arrays[name], jnp.int32)

    following = sum(name.startswith("neurons.") for name in arrays)
    light = sorted(int(name.split(".")[1]) for name in arrays if name.endswith(".heads"))
    return KVMaps(
        jnp.asarray(maps),
        layers,
        tuple(json.loads(metadata["features"])),
        metadata["provenance"],
        numbers("encode") if "encode" in arrays else None,
        tuple(ids(f"neurons.{at}") for at in range(following)),
        tuple(
            LightLayer(
                ids(f"light.{at}.heads"),
                ids(f"light.{at}.neurons"),
                numbers(f"light.{at}.encode"),
                numbers(f"light.{at}.decode"),
            )
            for at in light
        ),
        light[0] if light else None,
        numbers("attended") if "attended" in arrays else None,
    )


def sizes_of(params: dict[str, Any]) -> MapSizes | None:
    """`KVMaps.sizes` of the maps that travel with the parameters; None where there are none."""
    maps = params.get("kv_maps")
    return None if maps is None else maps.sizes


def _check_light(maps: KVMaps, model: ModelConfig) -> None:
    """Raise `ConfigError` unless ids exist and light layers have the model's sizes."""
    given = [(ids, model.mlp_size, "neuron") for ids in maps.neurons]
    for light in maps.light:
        size = model.hidden_size + len(light.neurons_M) + 1
        if light.encode_FR.shape[0] != size or light.decode_RD.shape[1] != model.hidden_size:
            raise ConfigError("these light layers are not of this model: other sizes.")
        given += [(light.neurons_M, model.mlp_size, "neuron")]
        given += [(light.heads_N, model.num_heads, "head")]
    for ids, count, name in given:
        wrong = [at for at in np.asarray(ids).tolist() if not 0 <= at < count]
        if wrong:
            raise ConfigError(f"these KV maps name {name} {wrong[0]}; this model has {count}.")
    if maps.attended_F is not None and maps.attended_F.shape != (model.hidden_size + 1,):
        raise ConfigError("these KV maps rank tokens of another model: other sizes.")
    if maps.layers[-1] + len(maps.neurons) > model.num_layers:
        raise ConfigError("these KV maps read neurons of layers that this model does not have.")
    if maps.light and len(maps.light) != maps.layers[0] - (maps.light_from or 0) + 1:
        raise ConfigError("these light layers do not reach from the first to where tokens stop.")


def feature_count(
    features: Sequence[str], model: ModelConfig, neurons: Sequence[Any] | None = None
) -> int:
    """Total width of these features, with the constant; `neurons` as in `KVMaps`."""
    read = model.mlp_size if neurons is None else sum(map(len, neurons))
    widths = {"neurons": read}
    return sum(widths.get(name, model.hidden_size) for name in features) + 1


def require_maps(
    params: dict[str, Any],
    layers: tuple[int, ...],
    model: ModelConfig,
    *,
    light_from: int | None = None,
    ranks: bool = False,
    prompts_only: bool,
) -> None:
    """Refuse to extrapolate without maps of these halting layers, or with prompts' features."""
    maps = params.get("kv_maps")
    if maps is None:
        raise ConfigError(
            "kv_skip.policy 'extrapolate' needs maps: put qs_jax.fit_kv_maps(params, tokens, "
            f"layers={layers}, model=model) or KVMaps.load(FILE) into params['kv_maps']."
        )
    if maps.light_from != light_from:
        names: dict[Any, str] = {None: "layers that run whole"}
        made, asked = (
            names.get(at, f"light layers from {at}") for at in (maps.light_from, light_from)
        )
        raise ConfigError(
            f"the KV maps were fitted behind {made}, the configuration runs {asked} "
            "(halting.light_from): give the maps that were saved with the preset."
        )
    if ranks and maps.attended_F is None:
        raise ConfigError("halting.light_share below 1 needs maps that rank tokens: fit them anew.")
    missing = sorted(set(layers) - set(maps.layers))
    if missing:
        raise ConfigError(
            f"the KV maps are for halting layers {tuple(maps.layers)}, the configuration also "
            f"halts at {tuple(missing)}."
        )
    maps.check(model)
    beyond = [name for name in maps.features if name in PROMPT_FEATURES]
    if beyond and not prompts_only:
        raise ConfigError(
            f"these KV maps read {beyond}, which is for prompts: protocol='continuation', or maps "
            "of ('state', 'embedding')."
        )


def select(maps: KVMaps, layers: tuple[int, ...]) -> KVMaps:
    """The maps of some of the halting layers."""
    missing = [layer for layer in layers if layer not in maps.layers]
    if missing:
        raise ConfigError(f"there are KV maps for layers {maps.layers}, none for {missing}.")
    index = np.array([maps.layers.index(layer) for layer in layers])
    encode = None if maps.encode_XFR is None else maps.encode_XFR[index]
    return maps.replace(maps_LXFO=maps.maps_LXFO[:, index], layers=tuple(layers), encode_XFR=encode)


def extrapolate(code_BTR: Array, maps_XRO: Array, depth_BT: Array, layers: Sequence[int]) -> Array:
    """What the map of the layer that each token halted at gives; zeros for other tokens."""
    out = jnp.zeros((*code_BTR.shape[:2], maps_XRO.shape[-1]), exact_dtype(code_BTR.dtype))
    for index, layer in enumerate(layers):
        here_BT1 = (depth_BT == layer)[..., None]
        out = jnp.where(here_BT1, product(code_BTR, maps_XRO[index].astype(code_BTR.dtype)), out)
    return out.astype(code_BTR.dtype)


def keys_values(mapped_BTO: Array, pos_BT: Array, model: ModelConfig) -> tuple[Array, Array]:
    """Keys, after RoPE, and values `[B, T, K, H]` of the maps' columns."""
    k_BTKH, v_BTKH = split_keys_values(mapped_BTO, model)
    return place(k_BTKH, pos_BT, model), v_BTKH


def place(k_BTKH: Array, pos_BT: Array, model: ModelConfig) -> Array:
    """Keys rotated by their positions, where the family rotates."""
    return rope.rotate(k_BTKH, pos_BT, model) if family_of(model).rotates else k_BTKH


def mapped(read_BTF: Array, map_FO: Array) -> Array:
    """What one map gives for each token, in the dtype of what it reads."""
    return product(read_BTF, map_FO.astype(read_BTF.dtype)).astype(read_BTF.dtype)


def following_neurons(neurons: Sequence[Any], compute: Callable[[int], Array]) -> Array:
    """The neurons that are read of each following layer, side by side, in the states' dtype.

    `compute(i)` gives those of the (i + 1)th layer after the one that a token stopped at.
    """
    return jnp.concatenate([compute(at) for at in range(len(neurons))], axis=-1)


def encode(
    kv_maps: KVMaps, sources: Sources, depth_BT: Array, dtype: Any, index: Array | None = None
) -> Array:
    """What the maps of deeper layers read of a token that stops: its features, or their code.

    With an index, all tokens halt at that one of the maps' layers.
    """
    read_BTF = features(sources, kv_maps.features, dtype)
    if kv_maps.encode_XFR is None:
        return read_BTF
    if index is not None:
        return mapped(read_BTF, kv_maps.encode_XFR[index])
    return extrapolate(read_BTF, kv_maps.encode_XFR, depth_BT, kv_maps.layers)


def sources(
    h_BTD: Array, embedded_BTD: Array, previous_BTD: Array, neurons: Callable[[], Array]
) -> Sources:
    """Functions that compute each feature, by name."""
    return {
        "state": lambda: h_BTD,
        "embedding": lambda: embedded_BTD,
        "previous": lambda: previous_BTD,
        "neurons": neurons,
    }


def features(sources: Sources, names: Sequence[str], dtype: Any) -> Float[Array, "B T F"]:
    """Features of tokens that stop, in the order of the names, and 1; in the model's dtype."""
    found = {name: sources[name]().astype(dtype) for name in names}
    parts = [x if name == "neurons" else rms_normalised(x) for name, x in found.items()]
    return jnp.concatenate([*parts, jnp.ones_like(parts[0][..., :1])], axis=-1)
