"""Named mechanism settings. Only the dense model exists so far."""

from __future__ import annotations

from qs_jax.config import ModelConfig, QuickSilverConfig
from qs_jax.errors import ConfigError


def off(model: ModelConfig) -> QuickSilverConfig:
    """Every mechanism off: the dense model."""
    del model
    return QuickSilverConfig()


def by_name(name: str, model: ModelConfig) -> QuickSilverConfig:
    """The preset called `name`.

    Raises:
      ConfigError: There is no such preset.
    """
    presets = {"off": off}
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(presets)}.")
    return presets[name](model)
