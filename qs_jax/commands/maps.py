"""Finding the maps that a preset's KV policy reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qs_jax import presets
from qs_jax.config import Config
from qs_jax.errors import InputError
from qs_jax.mechanisms.kv_maps import FILE_NAME, KVMaps, select


def find_maps(
    cfg: Config, ckpt: Path, given: Path | None, preset: str = ""
) -> tuple[KVMaps | None, str | None]:
    """The maps of the configuration's halting layers, if its policy reads any.

    Args:
      cfg: Its `kv_skip.policy` decides.
      ckpt: Checkpoint folder, where the maps are unless the preset has its own.
      given: Another file, or None.
      preset: The preset's name or file; `calibrate` writes its maps beside it, and `balanced` has
        its own.

    Returns:
      The maps and the file's SHA-256, or None twice.

    Raises:
      CheckpointError: There is no such file.
      ConfigError: The maps are of other layers or another model.
      InputError: A file was given though the policy reads none.
    """
    qs = cfg.quicksilver
    if qs is None or qs.kv_skip is None or qs.kv_skip.policy != "extrapolate":
        if given is not None:
            raise InputError("--kv-maps is for presets whose kv_skip.policy is 'extrapolate'.")
        return None, None
    assert qs.halting is not None
    assert qs.halting.layers is not None
    own = presets.maps_path(Path(preset)) if preset.endswith(".json") else None
    if preset == "balanced":
        own = presets.shipped_path(cfg.model)
    path = given or (own if own is not None and own.exists() else ckpt / FILE_NAME)
    path = path / FILE_NAME if path.is_dir() else path
    maps = select(KVMaps.load(path), qs.halting.layers)
    maps.check(cfg.model)
    return maps, hashlib.sha256(path.read_bytes()).hexdigest()
