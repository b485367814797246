"""Files of extrapolation maps: those that come with the library, and those a preset reads."""

from __future__ import annotations

from pathlib import Path

from qs_jax.config import Config, ModelConfig
from qs_jax.errors import InputError
from qs_jax.mechanisms.kv_maps import FILE_NAME, KVMaps, select
from qs_jax.presets import SHIPPED_PRESET, is_shipped


def shipped_maps(model: ModelConfig) -> KVMaps | None:
    """Extrapolation maps that come with the library: those of `balanced` for the embedded model.

    Put them into `params["kv_maps"]`; `qs_jax.load` does. None for a model of other sizes.
    """
    path = shipped_path(model)
    return None if path is None else KVMaps.load(path)


def shipped_path(model: ModelConfig) -> Path | None:
    """The file of `shipped_maps`."""
    path = maps_path(SHIPPED_PRESET)
    return path if is_shipped(model) and path.exists() else None


def maps_path(preset: Path) -> Path:
    """Where the maps of a preset file are."""
    return preset.with_name(f"{preset.stem}.kv_maps.safetensors")


def reads_maps(cfg: Config) -> bool:
    """Whether the mechanisms of a call read extrapolation maps."""
    qs = cfg.quicksilver
    return qs is not None and qs.kv_skip is not None and qs.kv_skip.policy == "extrapolate"


def find_maps(
    cfg: Config, ckpt: Path, given: Path | None = None, preset: str = ""
) -> tuple[KVMaps, Path] | tuple[None, None]:
    """The maps of the configuration's halting layers, if its policy reads any.

    Args:
      cfg: Its `kv_skip.policy` decides.
      ckpt: Checkpoint folder, where the maps are unless the preset has its own.
      given: Another file, or None.
      preset: The preset's name or file; `calibrate` writes its maps beside it, and `balanced` has
        its own.

    Returns:
      The maps and their file, or None twice.

    Raises:
      CheckpointError: There is no such file.
      ConfigError: The maps are of other layers or another model.
      InputError: A file was given though the policy reads none.
    """
    if not reads_maps(cfg):
        if given is not None:
            raise InputError(f"{given}: KV maps are for kv_skip.policy 'extrapolate' only.")
        return None, None
    assert cfg.quicksilver is not None
    assert cfg.quicksilver.halting is not None
    beside = maps_path(Path(preset)) if preset.endswith(".json") else None
    if preset == "balanced":
        beside = shipped_path(cfg.model)
    path = given or (beside if beside is not None and beside.exists() else ckpt / FILE_NAME)
    path = path / FILE_NAME if path.is_dir() else path
    maps = select(KVMaps.load(path), cfg.quicksilver.halting.layers or ())
    maps.check(cfg.model)
    return maps, path
