"""Presets of a search on disk: the preset, the maps it reads and the search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qs_jax import presets
from qs_jax.config import ModelConfig
from qs_jax.evaluation.journal import write_json
from qs_jax.presets import maps_path

if TYPE_CHECKING:
    from qs_jax.calibration.search import Calibration


def save(calibration: Calibration, path: str | Path, model: ModelConfig) -> list[Path]:
    """Write a preset as FILE.json and what belongs to it beside it.

    FILE.search.json holds everything that was measured, FILE.kv_maps.safetensors the maps the
    preset reads, if it reads any.

    Returns:
      The files, the preset first.
    """
    path = Path(path)
    written = [presets.save(path, calibration.preset, model)]
    if calibration.maps is not None:
        written.append(calibration.maps.save(maps_path(path)))
    found = path.with_name(f"{path.stem}.search.json")
    write_json(found, calibration.to_dict())
    return [*written, found]
