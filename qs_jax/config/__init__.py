"""Frozen, hashable configuration: what a model is, which mechanisms run, what a call does."""

from qs_jax.config.mechanisms import AMQConfig, FusionConfig, HaltingConfig, KVSkipConfig
from qs_jax.config.model import ALLOW_OTHER_WEIGHTS, ROPE_SCALINGS, ModelConfig, RopeScaling
from qs_jax.config.quicksilver import PROTOCOLS, Config, QuickSilverConfig

__all__ = [
    "ALLOW_OTHER_WEIGHTS",
    "AMQConfig",
    "Config",
    "FusionConfig",
    "HaltingConfig",
    "KVSkipConfig",
    "ModelConfig",
    "PROTOCOLS",
    "QuickSilverConfig",
    "ROPE_SCALINGS",
    "RopeScaling",
]
