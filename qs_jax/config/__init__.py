"""Frozen, hashable configuration: what a model is, which mechanisms run, what a call does."""

from qs_jax.config.mechanisms import AMQConfig, FusionConfig, HaltingConfig, KVSkipConfig
from qs_jax.config.model import ROPE_SCALINGS, ModelConfig, RopeScaling, Sampling
from qs_jax.config.quicksilver import GREEDY, PROTOCOLS, Config, QuickSilverConfig, Speculation

__all__ = [
    "AMQConfig",
    "Config",
    "FusionConfig",
    "GREEDY",
    "HaltingConfig",
    "KVSkipConfig",
    "ModelConfig",
    "PROTOCOLS",
    "QuickSilverConfig",
    "ROPE_SCALINGS",
    "RopeScaling",
    "Sampling",
    "Speculation",
]
