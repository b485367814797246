"""Linear maps from frozen states to deeper keys and values (`kv_skip.policy` "extrapolate")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, ConfigError

FILE_NAME = "kv_maps.safetensors"
FEATURES = ("state", "embedding")


@no_type_check
class KVMaps(flax.struct.PyTreeNode):
    """Maps of each layer, one for each halting layer; they travel as `params["kv_maps"]`.

    Attributes:
      maps_LXFO: O is the keys' 2 K H columns, keys before RoPE, then values; F the features, a
        constant 1 last. Entry [l - 1, x] is zero where layer l is not deeper than `layers[x]`.
      layers: X halting layers.
      features: What the maps read: "state", or "state" and "embedding", each RMS-normalised.
      provenance: JSON text: data, tokens, rows, ridge.
    """

    maps_LXFO: Float[Array, "L X F O"]
    layers: tuple[int, ...] = flax.struct.field(pytree_node=False)
    features: tuple[str, ...] = flax.struct.field(pytree_node=False)
    provenance: str = flax.struct.field(pytree_node=False, default="{}")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; a folder gets the usual name in it."""
        from safetensors.numpy import save_file

        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        maps = np.ascontiguousarray(np.asarray(self.maps_LXFO, np.float32))
        metadata = {
            "layers": json.dumps(self.layers),
            "features": json.dumps(self.features),
            "provenance": self.provenance,
        }
        save_file({"maps": maps}, str(path), metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> KVMaps:
        """Inverse of `save`.

        Raises:
          CheckpointError: There is no such file, or it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                return cls(
                    maps_LXFO=jnp.asarray(file.get_tensor("maps")),
                    layers=tuple(json.loads(metadata["layers"])),
                    features=tuple(json.loads(metadata["features"])),
                    provenance=metadata["provenance"],
                )
        except FileNotFoundError as error:
            raise CheckpointError(
                f"there are no KV maps at {path}: fit them with qs_jax.fit_kv_maps and save them."
            ) from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} does not hold KV maps: {error}") from error

    def check(self, model: ModelConfig) -> None:
        """Refuse maps of another model.

        Raises:
          ConfigError: Their sizes differ.
        """
        size = len(self.features) * model.hidden_size + 1
        expected = (model.num_layers, len(self.layers), size, 2 * model.kv_size)
        if self.maps_LXFO.shape != expected:
            raise ConfigError(
                f"these KV maps are not of this model: {self.maps_LXFO.shape}, expected {expected}."
            )


def require_maps(params: dict[str, Any], layers: tuple[int, ...], model: ModelConfig) -> None:
    """Refuse to extrapolate without the maps of these halting layers.

    Raises:
      ConfigError: `params["kv_maps"]` is absent or is for other layers.
    """
    maps = params.get("kv_maps")
    if maps is None:
        raise ConfigError(
            "kv_skip.policy 'extrapolate' needs maps: put qs_jax.fit_kv_maps(params, tokens, "
            f"layers={layers}, model=model) or KVMaps.load(FILE) into params['kv_maps']."
        )
    if tuple(maps.layers) != tuple(layers):
        raise ConfigError(
            f"the KV maps are for halting layers {tuple(maps.layers)}, the configuration halts at "
            f"{tuple(layers)}."
        )
    maps.check(model)


def select(maps: KVMaps, layers: tuple[int, ...]) -> KVMaps:
    """The maps of some of the halting layers.

    Raises:
      ConfigError: There are none for one of them.
    """
    missing = [layer for layer in layers if layer not in maps.layers]
    if missing:
        raise ConfigError(f"there are KV maps for layers {maps.layers}, none for {missing}.")
    index = np.array([maps.layers.index(layer) for layer in layers])
    return maps.replace(maps_LXFO=maps.maps_LXFO[:, index], layers=tuple(layers))


def rms_normalised(x: jax.Array) -> jax.Array:
    """X over its root mean square."""
    return x / jnp.maximum(jnp.sqrt((x * x).mean(-1, keepdims=True)), 1e-6)
